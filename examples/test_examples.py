"""pytest: the examples as they stand, and their mathematics against independent computations."""
import importlib
import pathlib
import subprocess
import sys
import types

import imageio.v3
import numpy as np
import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # where mac.py is
import eval as evaluation
import mac
from support import worlds
from support.data import Trajectories
from support.test_common import COUNTING, NET, SINGLE, CountingEnv, failing, generator, read_csv

HERE = pathlib.Path(__file__).parent
SHORT = ["--steps", "4", "--warmup", "0.5", "--log-interval", "2", "--eval-interval", "0"]


@pytest.fixture(autouse=True, scope="module")
def registered():
    """What the examples change in mac.py is undone at the end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(HERE)
        patch.setattr(mac, "Config", mac.Config)
        for module, name in ((mac, "POLICIES"), (mac, "AGENTS"), (worlds, "WORLDS")):
            patch.setattr(module, name, getattr(module, name).copy())
        importlib.import_module("ablations")
        yield


def example(name):
    return importlib.import_module(name)


def config(**settings):
    return mac.Config(**{"width": 16, "chunk": 3, "horizon": 4, "discount": 0.9, **settings})


def make_agent(goal=2, **settings):
    torch.manual_seed(1)
    settings = config(**settings)
    return mac.AGENTS.get(settings.policy, mac.Agent)(4, 2, list(range(goal)), settings)


def chunk_data(goal=2, **settings):
    torch.manual_seed(2)
    arrays = (torch.randn(60, 4), torch.rand(60, 2) * 2 - 1, torch.tensor([19, 39, 59]),
              torch.randn(60), torch.zeros(3, dtype=torch.bool))
    return mac.ChunkDataset(Trajectories(*arrays), list(range(goal)), config(**settings))


def toy_batch(chunk, goal_width=0, observation_width=1):
    observation = torch.randn(len(chunk), observation_width)
    goal, zeros = torch.randn(len(chunk), goal_width), torch.zeros(len(chunk))
    return mac.Batch(observation, chunk, zeros, observation, zeros, goal * torch.nan, goal, zeros,
                     torch.ones_like(chunk))  # the value goal is not the policy's affair


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with goals."""
    folder = tmp_path_factory.mktemp("goals") / "run"
    assert mac.main([*COUNTING, *SHORT, "--save-dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def recorded_run(tmp_path_factory):
    """A run with a reward on recorded episodes, beside their file."""
    folder = tmp_path_factory.mktemp("recorded")
    assert example("record").main([str(folder / "reacher.npz"), "--episodes", "3"]) == 0
    assert mac.main(["--env", "Reacher-v5", "--data", str(folder / "reacher.npz"), *NET, *SHORT,
                     "--chunk", "3", "--save-dir", str(folder / "run")]) == 0
    return folder / "run"


# ------------------------------------------------------------------------------ ablations

def test_gaussian_log_likelihood_to_which_padding_does_not_count():
    policy = mac.POLICIES["gaussian"](2, 1, 4, config())
    batch = toy_batch(torch.rand(9, 4) * 1.9 - 0.95, 1, 2)
    mean, log_std = (x.detach().double().numpy()
                     for x in policy.moments(batch.observation, batch.actor_goal))
    a = batch.chunk.double().numpy()  # density of tanh(x): that of x over the slope of tanh
    z = (np.arctanh(a) - mean) / np.exp(log_std)
    log_p = -z ** 2 / 2 - log_std - np.log(2 * np.pi) / 2 - np.log(1 - a ** 2)
    valid = (torch.arange(4) < torch.randint(1, 5, (9, 1))).float()
    losses = [policy.loss(batch._replace(chunk=torch.where(valid == 1, batch.chunk, padding),
                                         valid=valid), None)["likelihood"] for padding in (0, 1.0)]
    assert losses[0] == losses[1]
    assert np.isclose(losses[0].item(), -(valid.numpy() * log_p).mean(), rtol=1e-4)


def test_a_gaussian_has_a_single_mode():
    torch.manual_seed(0)
    policy, noise = mac.POLICIES["gaussian"](1, 0, 1, config(width=32)), generator()
    optimizer = torch.optim.Adam(policy.parameters(), 3e-3)
    for _ in range(300):
        sign = torch.randint(0, 2, (256, 1), generator=noise) * 2.0 - 1
        batch = toy_batch(0.6 * sign + 0.05 * torch.randn(256, 1, generator=noise))
        optimizer.zero_grad()
        policy.loss(batch._replace(observation=torch.zeros(256, 1)), noise)["likelihood"].backward()
        optimizer.step()
    with torch.no_grad():
        sample = policy.propose(torch.zeros(4000, 1), torch.zeros(4000, 0), noise)
    x = torch.atanh(sample.clamp(-0.9999, 0.9999))  # moments of atanh of the data: 0 and 0.69
    assert abs(x.mean()) < 0.1 and 0.6 < x.std() < 0.8
    assert (abs(sample) < 0.3).float().mean() > 0.15  # where there are no data


def test_onestep_is_the_flow_policy_with_one_euler_step():
    flow, one = mac.FlowPolicy(2, 1, 4, config()), mac.POLICIES["onestep"](2, 1, 4, config())
    one.velocity.load_state_dict(flow.velocity.state_dict())
    batch, z = toy_batch(torch.rand(9, 4), 1, 2), torch.randn(9, 4, generator=generator(3))
    given = batch.observation, batch.actor_goal
    expected = (z + flow.velocity(*given, z, torch.zeros(9, 1))).clamp(-1, 1)
    assert torch.equal(one.propose(*given, generator(3)), expected)
    assert one.loss(batch, generator(4)) == {"flow": flow.flow_loss(batch, generator(4))}
    assert not hasattr(one, "one_step")


@pytest.mark.parametrize("env, weight", [("cube-double-play-v0", 0.3), (SINGLE, 1), (SINGLE, 2)])
def test_fql_gradient_reaches_the_one_step_policy_only(env, weight):
    given = {"fql_alpha": 2.0} if weight == 2 else {}  # else that of Table 11
    agent = make_agent(policy="fql", candidates=1, env=env, **given)
    batch, noise = chunk_data().sample(16, generator()), generator(7)
    plain, rollout = mac.Agent.losses(agent, batch, noise)
    states, goals = rollout.observations[:-1], rollout.goals
    z = torch.randn(4, 16, 6, generator=noise)
    q = agent.critic(states, agent.policy.one_step(states, goals, z).clamp(-1, 1), goals)
    actor = -q.mean() / q.abs().mean().item()  # over a number: no gradient goes through it
    gradients = torch.autograd.grad(actor, list(agent.policy.one_step.parameters()))
    losses, _ = agent.losses(batch, generator(7))
    assert torch.allclose(losses["distill"], weight * plain["distill"])
    assert all(torch.equal(losses[name], plain[name]) for name in plain if name != "distill")
    assert torch.isclose(losses["actor"], actor)
    losses["actor"].backward()
    for p, gradient in zip(agent.policy.one_step.parameters(), gradients):
        assert torch.allclose(p.grad, gradient, rtol=1e-4, atol=1e-7) and gradient.any()
    assert {".".join(name.split(".")[:2]) for name, p in agent.named_parameters()
            if p.grad is not None} == {"policy.one_step"}
    assert "actor" not in agent.losses(batch, generator(7), model_only=True)[0]  # no Q to climb yet


@pytest.mark.parametrize("policy", ["onestep", "gaussian", "fql"])
@pytest.mark.parametrize("chunk", [1, 5])
def test_every_ablation_updates(policy, chunk):
    agent, data = make_agent(policy=policy, chunk=chunk), chunk_data(chunk=chunk)
    before = {name: p.clone() for name, p in agent.named_parameters()}
    losses = mac.update(agent, mac.make_optimizer(agent), data.sample(8, generator()), generator())
    assert all(value.isfinite() for value in losses.values())
    assert all((p != before[name]).any() for name, p in agent.named_parameters()
               if not name.startswith("target"))  # which was V's copy, and follows V as it was
    assert agent.act(np.zeros(4), np.zeros(2)).shape == (chunk, 2)


@pytest.mark.parametrize("policy, own, chunk, candidates", [
    ("onestep", "flow", 5, 32), ("gaussian", "likelihood", 1, 32), ("fql", "actor", 3, 1)])
def test_every_ablation_from_the_command_line(policy, own, chunk, candidates, tmp_path, capsys):
    run = str(tmp_path / "run")
    assert mac.main([*COUNTING, *SHORT, "--policy", policy, "--chunk", str(chunk), "--save-dir",
                     run]) == 0
    warmup, joint = read_csv(tmp_path / "run" / "train.csv")
    assert joint[own] and joint["critic"] and not warmup["critic"]
    assert bool(warmup[own]) == (policy != "fql")
    assert evaluation.main([run, "--with", str(HERE / "ablations.py")]) == 0
    assert f"{policy} policy, best of {candidates}, 1 of" in capsys.readouterr().out


def test_ablations_as_a_program_and_what_they_refuse(tmp_path, capsys):
    command = [sys.executable, HERE / "ablations.py", "--policy", "gaussian", "--fql-alpha", "-1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: --fql-alpha: -1.0 is not")
    error = failing(capsys, *COUNTING, "--policy", "fql", "--critic", "model")
    assert error == "error: --critic model: --policy fql climbs Q, a network"


# ------------------------------------------------------------------------------ reach

@pytest.mark.parametrize("goal", [0, 1])
@pytest.mark.parametrize("distance", [0, 5, 20])
def test_reach_is_measured_at_that_distance_within_a_trajectory(goal, distance):
    ends, rewards, seen = np.array([8, 11, 27]), np.zeros(28, np.float32), []
    rewards[[11, 14, 21, 22]] = -1, 1, 1, 2  # it rises at 14, 21, 22, and to another trajectory
    states = np.arange(28, dtype=np.float32)[:, None]
    data = mac.ChunkDataset(Trajectories(states, np.repeat(states, 2, 1) / 100, ends, rewards,
                                         np.zeros(3, bool)), list(range(goal)), config())
    agent = types.SimpleNamespace(
        columns=torch.arange(goal), config=data.config,
        normalize=lambda batch: seen.extend(batch.observation[:, 0].tolist()) or batch,
        value=lambda s, g: g[:, 0] - s[:, 0] if goal else s[:, 0],
        q=lambda s, chunk, g: 100 * chunk[:, 0],
        proposals=lambda s, g, count, generator: (None, torch.arange(count).expand(len(s), -1) - s),
        model_q=lambda s, chunk, g: torch.arange(16.0) ** 2 * (s[..., 0] % 2),  # flat if even
        outcome=types.SimpleNamespace(
            predict=lambda s, chunk, g: (s[:, 0], (s[:, 0] % 2 == 0).float())))
    result = example("reach").reach(agent, data, distance)
    trajectories = range(0, 9), range(9, 12), range(12, 28)
    starts = [t for part in trajectories for t in part if max(t + distance + 1, t + 3) in part]
    if not goal:
        starts = [t - distance for t in (14, 21, 22) if t - distance in starts]
    if not starts:
        assert result is None
        return
    assert set(seen) == set(starts)
    mean = np.mean(seen)
    assert np.allclose(result[:3], [distance if goal else mean, mean,
                                    np.mean(np.array(seen) % 2) if goal else mean], rtol=1e-4)
    agreement = np.corrcoef(np.arange(16), np.arange(16) ** 2)[0, 1]
    assert np.isclose(result[3], agreement if any(t % 2 for t in starts) else np.nan, atol=1e-5,
                      equal_nan=True)


@pytest.mark.parametrize("distance", [0, 1, 3, 4, 5, 6, 7, 20])
def test_ideal_of_reach_is_the_return_until_a_chunk_meets_the_goal(distance):
    total, begin = 0.0, 0
    while distance not in range(begin, begin + 3):
        total, begin = total - 0.9 ** begin, begin + 3
    assert np.isclose(example("reach").ideal(config(), distance), total)


def test_reach_of_runs_with_goals_or_a_reward(run, recorded_run, tmp_path, capsys):
    picture = tmp_path / "x.png"
    plot = ["--plot", str(picture)] if importlib.util.find_spec("matplotlib") else []
    for folder, columns in ((run, {"success", "ideal"}), (recorded_run, {"reward"})):
        assert example("reach").main([str(folder), *plot]) == 0
        rows = read_csv(folder / "reach.csv")
        assert {"steps", "V", "Q", "agreement"} | columns == set(rows[0])
        assert all(np.isfinite(float(row[name])) for row in rows for name in ("V", "Q", *columns))
        assert "task1 begins" in capsys.readouterr().out
        assert not plot or imageio.v3.imread(picture).std() > 0
    assert "nowhere holds no checkpoint" in failing(capsys, "nowhere", main=example("reach").main)


# ------------------------------------------------------------------------------ the model

@pytest.mark.parametrize("n, steps, expected", [
    (1, 6, [0, 1, 4, 9, 16, 25, 36]), (3, 6, [0, 9, 36]), (4, 7, [0, 16]), (1, 13, None)])
def test_model_error_stays_within_trajectories(n, steps, expected):
    ends = np.array([8, 11, 25])
    states = np.arange(26, dtype=np.float32) + 1000 * (np.arange(26) > 8)  # a crossing would show
    states = states + 1000 * (np.arange(26) > 11)
    data = Trajectories(states[:, None], np.zeros((26, 2), np.float32), ends, np.zeros(26),
                        np.ones(3, bool))
    agent = mac.Agent(1, 2, [0], config(chunk=n))
    agent.next_observation = lambda state, chunk: state  # so the error is the steps squared
    curve = example("model_error").model_error(agent, data, steps)
    assert [step for step, _ in curve] == list(range(0, steps + 1, n))
    assert np.allclose([error for _, error in curve], expected or np.arange(14.0) ** 2)
    for wrong in (16, n - 1):
        with pytest.raises(mac.MacError, match=f"--steps {wrong}: from a chunk"):
            example("model_error").model_error(agent, data, wrong)


def test_model_error_against_a_plain_loop():
    agent, data = make_agent(0), chunk_data(0)
    states, actions = data.observations, data.actions
    agent.normalizer.fit(states)
    whole = Trajectories(states.numpy(), actions.numpy(), np.array([59]), np.zeros(60),
                         np.zeros(1, bool))
    curve = example("model_error").model_error(agent, whole, 9, count=5)
    errors = np.zeros(4)
    for t in np.linspace(0, 50, 5).astype(int):
        state = agent.normalizer(states[t])
        for k in range(3):
            chunk = actions[t + 3 * k:t + 3 * k + 3].flatten()
            state = state + agent.dynamics(state, chunk.clamp(-1 + 1e-5, 1 - 1e-5)).detach()
            truth = agent.normalizer(states[t + 3 * k + 3])
            errors[k + 1] += ((state - truth) ** 2).mean().item() / 5
    assert [step for step, _ in curve] == [0, 3, 6, 9]
    assert np.allclose([e for _, e in curve], errors, rtol=1e-4)


def test_model_errors_of_runs(run, recorded_run, tmp_path, capsys):
    picture = tmp_path / "x.png"
    plot = ["--plot", str(picture)] if importlib.util.find_spec("matplotlib") else []
    command = [str(run), str(recorded_run), "--steps", "7", *plot]
    assert example("model_error").main(command) == 0
    for folder in (run, recorded_run):
        assert [row["steps"] for row in read_csv(folder / "model_error.csv")] == ["0", "3", "6"]
        assert str(folder) in capsys.readouterr().out or folder != run
    assert not plot or imageio.v3.imread(picture).std() > 0
    assert "--steps 9: from" in failing(capsys, *command[:3], "9", main=example("model_error").main)


class Filmed(CountingEnv):
    """An image of it shows its steps, or the state that it was set to."""

    model, unwrapped = types.SimpleNamespace(nv=2), property(lambda env: env)

    def set_state(self, qpos, qvel):
        self.steps = qpos + qvel.sum()

    def render(self):
        return np.full((16, 16, 3), self.steps, np.uint8)


def test_a_film_of_what_is_simulated_and_of_the_logged_states_nearest_to_what_is_imagined(
        run, tmp_path, capsys, monkeypatch):
    imagine, world, agent = example("imagine"), worlds.find_world("counting"), mac.load(run)
    states, world.made = np.linspace(-1, 8, 50, dtype=np.float32)[:, None], [Filmed()]
    np.savez(tmp_path / "counted.npz", qpos=np.arange(100, 150), observations=states)
    agent.facts["data"] = "counted.npz"
    for owner, name, result in ((mac, "load", agent), (worlds, "find_world", world),
                                (imagine.console, "home", tmp_path)):
        monkeypatch.setattr(owner, name, lambda *_, result=result: result)
    film = str(tmp_path / "x.gif")
    assert imagine.main([str(run), film]) == 0
    frames = imageio.v3.imread(film).astype(int)[:, 0, (0, -1), 0]
    assert np.allclose(frames[:, 0], range(0, 99, 3), atol=1)
    state, goal = agent.prepare(np.zeros(1), np.ones(1))
    chunk = agent.best_of(state, goal, 32, generator())
    assert np.allclose(world.env.actions[0][:3], chunk[0].detach())
    for (_, shown), imagined in zip(frames, (state, agent.next_observation(state, chunk))):
        nearest = (agent.normalizer(torch.tensor(states)) - imagined).abs().argmin().item()
        assert abs(shown - 100 - nearest) <= 1
    assert "films are .gif" in failing(capsys, str(run), "x.png", main=imagine.main)


# ------------------------------------------------------------------------------ the others

def test_recorded_episodes_are_whole_and_not_overwritten(recorded_run, tmp_path, capsys):
    path = recorded_run.parent / "reacher.npz"
    with np.load(path) as file:
        assert file["observations"].shape == (150, 10) and file["timeouts"].sum() == 3
        assert np.array_equal(file["next_observations"][:49], file["observations"][1:50])
        assert abs(file["actions"]).max() <= 1 and not file["terminals"].any()
    before = path.read_bytes()
    for wrong in (str(path), str(tmp_path / "x.hdf5")):
        assert "must be a new .npz file" in failing(capsys, wrong, main=example("record").main)
    assert path.read_bytes() == before and not mac.load(recorded_run).terminations


def test_a_world_of_ones_own_from_training_to_evaluation(tmp_path, capsys):
    run = str(tmp_path / "run")
    command = ("--env line --policy smooth --small --width 32 --chunk 5 --steps 40 "
               "--log-interval 20 --eval-interval 0 --save-dir").split()
    done = subprocess.run([sys.executable, HERE / "world.py", *command, run], capture_output=True,
                          text=True)
    assert done.returncode == 0 and "random walks" in done.stdout, done.stderr
    assert "--with FILE" in failing(capsys, run, main=evaluation.main)
    assert evaluation.main([run, "--with", str(HERE / "world.py"), "--episodes", "3"]) == 0
    assert "smooth policy" in capsys.readouterr().out
    agent, place = mac.load(run), torch.zeros(3, 1)
    batch = toy_batch(torch.zeros(3, 5), 1)._replace(observation=place, next_observation=place)
    batch = batch._replace(value_goal=torch.tensor([[0.04], [-1], [9]]))
    logits = agent.outcome.outputs(place, batch.chunk, batch.value_goal)["success"]
    near = F.binary_cross_entropy_with_logits(logits, torch.tensor([1.0, 0, 0]))
    assert torch.equal(agent.model_losses(batch)["success"], near)
    given = place, place, torch.randn(3, 5)
    plain = mac.FlowPolicy.decode(agent.policy, *given)
    assert torch.allclose(agent.policy.decode(*given)[:, 1:], (plain[:, 1:] + plain[:, :-1]) / 2)
    world = worlds.find_world("line")
    for states, actions, *_ in world.data("", None):
        world.reset(world.env, 1, 0)
        world.env.goal += 9  # which it cannot meet
        assert np.allclose([world.env.step(a)[0] for a in actions[:49]], states[1:50], atol=1e-5)


@pytest.mark.parametrize("policy, goal, settings", [
    ("flow", 2, {}), ("flow", 0, {"eval_flow": True}), ("centered", 2, {"critic": "model"}),
    ("centered", 2, {"eval_flow": True}), ("onestep", 0, {}), ("gaussian", 2, {})])
def test_an_exported_program_acts_as_the_agent_does(policy, goal, settings):
    agent = make_agent(goal, policy=policy, flow_steps=3, **settings).eval()
    agent.normalizer.fit(torch.randn(9, 4))
    export, given = example("export"), (torch.zeros(4), torch.zeros(goal), torch.zeros(2, 6))
    sizes = None, None, {0: torch.export.Dim("N")}
    program = torch.export.export(export.Acting(agent), given, dynamic_shapes=sizes).module()
    x, g = torch.linspace(-1, 1, 4), torch.tensor([0.5, 2])[:goal]
    for n in (1, 7):
        z = torch.randn(n, 6, generator=generator(n))
        for kind in (torch.float32, torch.float64):
            chunk = program(x.to(kind), g.to(kind), z.to(kind))
            assert not chunk.requires_grad and chunk.dtype == torch.float32
            assert np.allclose(chunk, agent.act(x, g, n, generator(n)), atol=1e-5)


def test_an_exported_file(run, tmp_path, capsys):
    path, export = str(tmp_path / "x.pt2"), example("export").main
    assert export([str(run), path, "--with", str(HERE / "ablations.py")]) == 0
    program, z = torch.export.load(path).module(), torch.randn(32, 3, generator=generator())
    chunk = program(torch.ones(1), torch.ones(1), z)
    assert np.allclose(chunk, mac.load(run).act([1.0], [1.0], None, generator()), atol=1e-5)
    assert "nowhere" in failing(capsys, "nowhere", path, main=export)

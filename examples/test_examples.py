"""pytest: the examples as they stand, and their mathematics against independent computations."""
import importlib
import os
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # where mac.py is
import eval as evaluation
import mac
from support import worlds
from support.data import Trajectories
from support.test_common import (
    COUNTING, NET, SINGLE, CountingEnv, failing, generator, read_csv)

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
    rows = len(chunk)
    observation, goal = torch.randn(rows, observation_width), torch.randn(rows, goal_width)
    zeros = torch.zeros(rows)  # the value goal is not the policy's affair
    return mac.Batch(observation, chunk, zeros, observation, zeros, goal * torch.nan, goal, zeros,
                     torch.ones_like(chunk))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with goals."""
    folder = tmp_path_factory.mktemp("goals") / "run"
    assert mac.main([*COUNTING, *SHORT, "--save-dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def own_run(tmp_path_factory):
    """A run with a reward, on data of one's own without a simulator, in which tasks end."""
    folder, rng = tmp_path_factory.mktemp("own"), np.random.default_rng(0)
    states = rng.normal(size=(3, 31, 4))
    np.savez(folder / "own.npz", observations=states[:, :-1].reshape(90, 4),
             next_observations=states[:, 1:].reshape(90, 4), rewards=rng.normal(size=90),
             actions=rng.uniform(-1, 1, (90, 2)), terminals=np.arange(1, 91) % 30 == 0)
    assert mac.main(["--data", str(folder / "own.npz"), *NET, *SHORT, "--chunk", "3",
                     "--save-dir", str(folder / "run")]) == 0
    return folder / "run"


# ------------------------------------------------------------------------------ ablations

def test_gaussian_log_likelihood():
    policy = mac.POLICIES["gaussian"](2, 1, 4, config())
    batch = toy_batch(torch.rand(9, 4) * 1.9 - 0.95, 1, 2)
    mean, log_std = (x.detach().double().numpy()
                     for x in policy.moments(batch.observation, batch.actor_goal))
    a = batch.chunk.double().numpy()  # density of tanh(x): that of x over the slope of tanh
    z = (np.arctanh(a) - mean) / np.exp(log_std)
    log_p = -z ** 2 / 2 - log_std - np.log(2 * np.pi) / 2 - np.log(1 - a ** 2)
    assert np.isclose(policy.loss(batch, None)["likelihood"].item(), -log_p.mean(), rtol=1e-4)
    valid = (torch.arange(4) < torch.tensor([[4], [4], [2], [3], [1], [4], [4], [2], [1]])).float()
    losses = [policy.loss(batch._replace(chunk=torch.where(valid == 1, batch.chunk, padding),
                                         valid=valid), None)["likelihood"] for padding in (0, 1.0)]
    assert losses[0] == losses[1]
    assert np.isclose(losses[0].item(), -(valid.numpy() * log_p).mean(), rtol=1e-4)


def test_a_gaussian_has_a_single_mode():
    torch.manual_seed(0)
    policy, noise = mac.POLICIES["gaussian"](1, 0, 1, config(width=32)), generator()
    torch.nn.init.zeros_(policy.network.output.weight)
    torch.nn.init.constant_(policy.network.output.bias, 0.5)
    optimizer = torch.optim.Adam(policy.parameters(), 3e-3)
    for _ in range(500):
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
    given = *COUNTING, *SHORT, "--policy", policy, "--chunk", str(chunk)
    run = str(tmp_path / "run")
    assert example("ablations").mac.main([*given, "--save-dir", run]) == 0
    warmup, joint = read_csv(tmp_path / "run" / "train.csv")
    assert joint[own] and joint["critic"] and not warmup["critic"]
    assert bool(warmup[own]) == (policy != "fql")
    assert evaluation.main([run, "--with", str(HERE / "ablations.py")]) == 0
    assert f"{policy} policy, best of {candidates}, 1 of" in capsys.readouterr().out
    error = failing(capsys, *given, "--policy", "fql", "--critic", "model")
    assert error == "error: --critic model: --policy fql climbs Q, a network"


def test_ablations_as_a_program_and_without_it(tmp_path, capsys):
    command = [sys.executable, HERE / "ablations.py", "--policy", "gaussian", "--fql-alpha", "-1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: --fql-alpha: -1.0 is not")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mac, "POLICIES", {"flow": mac.FlowPolicy})
        error = failing(capsys, *COUNTING, "--policy", "gaussian")
    assert "no 'gaussian' here, only flow" in error


# ------------------------------------------------------------------------------ reach

@pytest.mark.parametrize("goal", [0, 1])
@pytest.mark.parametrize("distance", [0, 2, 5, 20])
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


def test_reach_of_runs_with_goals_or_a_reward(run, own_run, tmp_path, capsys):
    picture = tmp_path / "x.png"
    plot = ["--plot", str(picture)] if importlib.util.find_spec("matplotlib") else []
    for folder, more in ((run, ["success", "agreement", "ideal"]), (own_run, ["reward",
                                                                              "agreement"])):
        assert example("reach").main([str(folder), *plot]) == 0
        names, *rows = (line.split(",") for line in (folder / "reach.csv").read_text().splitlines())
        assert names == ["steps", "V", "Q", *more] and rows
        assert np.isfinite(np.array(rows, float)[:, :4]).all()
        assert ("task1 begins" in capsys.readouterr().out) == (folder is run)
        assert not plot or picture.read_bytes()[:4] == b"\x89PNG"
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


def test_model_errors_of_runs(run, own_run, tmp_path, capsys):
    plot = ["--plot", str(tmp_path / "x.png")] if importlib.util.find_spec("matplotlib") else []
    command = [str(run), str(own_run), "--steps", "7", *plot]
    assert example("model_error").main(command) == 0
    assert f"n = 3, {own_run}: 3 steps" in capsys.readouterr().out
    for folder in (run, own_run):
        assert [row["steps"] for row in read_csv(folder / "model_error.csv")] == ["0", "3", "6"]
    assert not plot or (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    assert "--steps 9: from" in failing(capsys, *command[:3], "9", main=example("model_error").main)


def test_imagined_futures(run, own_run, tmp_path, capsys, monkeypatch):
    step, state = CountingEnv.step, np.zeros(1)  # an array that is used again

    def step_in_place(env, action):
        state[:], *rest = step(env, action)
        return state, *rest

    monkeypatch.setattr(CountingEnv, "step", step_in_place)
    if importlib.util.find_spec("matplotlib"):
        assert example("imagine").main([str(run), str(tmp_path / "x.png")]) == 0
        assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    failing(capsys, str(own_run), "x.png", main=example("imagine").main)  # it has no simulator
    agent, world = mac.load(run), worlds.find_world("counting")
    states, _, imagined = example("imagine").play(world, agent, 7, 0)
    assert states[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6] and len(imagined) == 3
    given = agent.prepare(np.zeros(1), np.ones(1))
    first = agent.best_of(*given, 32, generator())
    assert torch.allclose(imagined[1], agent.next_observation(given[0], first)[0])
    actions = world.env.actions[-1]
    assert np.allclose(actions[:3], first[0].detach()) and len(actions) == 6


def test_a_film_has_the_logged_states_nearest_to_the_imagined(tmp_path, capsys, run):
    agent, env = make_agent(0), types.SimpleNamespace(model=types.SimpleNamespace(nv=2))
    agent.facts, logged = {"data": "x.npz"}, np.random.default_rng(0).normal(size=(9, 4))
    agent.config = config(dataset_dir=str(tmp_path))
    np.savez(tmp_path / "x.npz", qpos=np.arange(9), observations=np.float32(logged))
    env.set_state = lambda qpos, qvel: setattr(env, "shown", qpos + qvel.sum())
    env.render = lambda: np.full((2, 2, 3), env.shown)
    world = types.SimpleNamespace(env=types.SimpleNamespace(unwrapped=env, render=env.render))
    images = [np.full((2, 2, 3), 100 + t) for t in range(9)]
    imagined = agent.normalizer(torch.tensor(logged[[7, 2, 5, 1]] + 0.01, dtype=torch.float32))
    frames = example("imagine").beside(world, agent, images, imagined)
    assert [frame[0, (0, -1), 0].tolist() for frame in frames] == [[100, 7], [103, 2], [106, 5]]


@pytest.mark.skipif("MAC_SLOW" not in os.environ, reason="MAC_SLOW=1 runs it")
def test_a_film_of_a_simulator(tmp_path):
    where = ["--save-dir", str(tmp_path / "run"), "--dataset-dir", str(tmp_path)]
    assert mac.main(["--env", SINGLE, *NET, *SHORT, "--collect", "1", *where]) == 0
    environment = {key: os.environ[key] for key in os.environ if key != "MUJOCO_GL"}
    done = subprocess.run([sys.executable, HERE / "imagine.py", "run", "x.gif"], cwd=tmp_path,
                          env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "wrote x.gif", done.stderr


# ------------------------------------------------------------------------------ the others

def test_recorded_episodes_are_trained_on(tmp_path, capsys):
    path, record = tmp_path / "reacher.npz", example("record").main
    assert record([str(path), "--episodes", "3"]) == 0
    with np.load(path) as file:
        assert file["observations"].shape == (150, 10) and file["timeouts"].sum() == 3
        assert np.array_equal(file["next_observations"][:49], file["observations"][1:50])
        assert abs(file["actions"]).max() <= 1 and not file["terminals"].any()
    before = path.read_bytes()
    for wrong in (str(path), str(tmp_path / "x.hdf5")):
        assert "must be a new .npz file" in failing(capsys, wrong, main=record)
    assert path.read_bytes() == before
    run = str(tmp_path / "run")
    assert mac.main(["--env", "Reacher-v5", "--data", str(path), *NET, *SHORT, "--chunk", "3",
                     "--save-dir", run]) == 0
    assert not mac.load(run).terminations


def test_a_world_of_ones_own_from_training_to_evaluation(tmp_path, capsys):
    command = ("--env line --policy smooth --small --width 32 --chunk 5 --steps 40 "
               "--log-interval 20 --eval-interval 0 --save-dir run").split()
    done = subprocess.run([sys.executable, HERE / "world.py", *command], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "random walks" in done.stdout
    assert len(read_csv(tmp_path / "run" / "train.csv")) == 2
    run = str(tmp_path / "run")
    assert "--with FILE" in failing(capsys, run, main=evaluation.main)
    assert evaluation.main([run, "--with", str(HERE / "world.py"), "--episodes", "3"]) == 0
    assert "smooth policy" in capsys.readouterr().out
    agent = mac.load(run)
    batch = toy_batch(torch.zeros(3, 5), 1)._replace(value_goal=torch.tensor([[0.04], [-1], [9]]))
    batch = batch._replace(observation=torch.zeros(3, 1), next_observation=torch.zeros(3, 1))
    near, given = torch.tensor([1.0, 0, 0]), (batch.observation, batch.chunk, batch.value_goal)
    assert torch.equal(agent.model_losses(batch)["success"], F.binary_cross_entropy_with_logits(
        agent.outcome.outputs(*given)["success"], near))
    given = torch.zeros(3, 1), torch.zeros(3, 1), torch.randn(3, 5)
    plain = mac.FlowPolicy.decode(agent.policy, *given)
    assert torch.allclose(agent.policy.decode(*given)[:, 1:], (plain[:, 1:] + plain[:, :-1]) / 2)
    world = worlds.find_world("line")
    for states, actions, ends, rewards, ended, _ in world.data("", None):
        assert len(states) == len(actions) == len(rewards) == ends[-1] + 1 and len(ended) == 100
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

"""pytest: the examples as they stand, and their mathematics against independent computations."""
import copy
import importlib
import pathlib
import re
import subprocess
import sys
import types

import imageio.v3
import numpy as np
import pytest
import torch

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # where mac.py and the examples are
import eval as evaluation
import mac
from support import worlds
from support.data import Trajectories
from support.test_common import COUNTING, NET, SINGLE, CountingEnv, failing, generator, read_csv

import bars
import export
import imagine
import model_error
import reach
import record

SHORT = ["--steps", "4", "--warmup", "0.5", "--log-interval", "2", "--eval-interval", "0"]
PLOT = ["--plot", "x.png"] if importlib.util.find_spec("matplotlib") else []


@pytest.fixture(autouse=True, scope="module")
def registered():
    """What the examples change in mac.py is undone at the end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worlds, "WORLDS", worlds.WORLDS.copy())
        for name in ("Config", "POLICIES", "AGENTS"):
            patch.setattr(mac, name, copy.copy(getattr(mac, name)))
        importlib.import_module("ablations")
        yield


def config(**settings):
    return mac.Config(**{"width": 16, "chunk": 3, "horizon": 4, "discount": 0.9, **settings})


def make_agent(goal=2, **settings):
    torch.manual_seed(1)
    settings = config(**settings)
    return mac.AGENTS.get(settings.policy, mac.Agent)(4, 2, list(range(goal)), settings)


def random_data(ends):
    n, noise = ends[-1] + 1, generator(2)
    states, actions = (torch.randn(n, width, generator=noise).clamp(-1, 1) for width in (4, 2))
    return Trajectories(states, actions, np.array(ends), torch.ones(n), np.zeros(len(ends), bool))


def toy_batch():
    state, chunk, zeros = torch.randn(9, 2), torch.rand(9, 4) * 1.9 - 0.95, torch.zeros(9)
    valid = (torch.arange(4) < torch.randint(1, 5, (9, 1))).float()
    nan = torch.full((9, 1), torch.nan)  # the value goal is not the policy's affair
    return mac.Batch(state, chunk, zeros, state, zeros, nan, torch.randn(9, 1), zeros, valid)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("goals") / "run"
    assert mac.main([*COUNTING, *SHORT, "--save-dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def recorded_run(tmp_path_factory):
    """A run with a reward on recorded episodes, beside their file."""
    folder = tmp_path_factory.mktemp("recorded")
    assert record.main([str(folder / "reacher.npz"), "--episodes", "3"]) == 0
    assert mac.main(["--env", "Reacher-v5", "--data", str(folder / "reacher.npz"), *NET, *SHORT,
                     "--chunk", "3", "--save-dir", str(folder / "run")]) == 0
    return folder / "run"


def test_a_gaussian_has_one_mode_and_is_fitted_by_its_likelihood_without_padding():
    policy, batch = mac.POLICIES["gaussian"](2, 1, 4, config()), toy_batch()
    given = batch.observation, batch.actor_goal
    mean, log_std = (x.detach().double() for x in policy.moments(*given))
    z = torch.randn(9, 4, generator=generator(3))
    assert torch.allclose(policy.decode(*given, z).double(), torch.tanh(mean + log_std.exp() * z))
    a = batch.chunk.double()  # density of tanh(x): that of x over the slope of tanh
    z = (torch.atanh(a) - mean) / log_std.exp()
    log_p = -z ** 2 / 2 - log_std - np.log(2 * np.pi) / 2 - torch.log(1 - a ** 2)
    for padding in (0, 1.0):
        padded = batch._replace(chunk=torch.where(batch.valid == 1, batch.chunk, padding))
        likelihood = policy.loss(padded, None)["likelihood"].item()
        assert np.isclose(likelihood, -(batch.valid * log_p).mean().item(), rtol=1e-4)


def test_a_gaussian_puts_one_mode_between_two():
    torch.manual_seed(0)
    policy, noise = mac.POLICIES["gaussian"](1, 0, 1, config(width=32)), generator()
    torch.nn.init.zeros_(policy.network.output.weight)
    torch.nn.init.constant_(policy.network.output.bias, 0.5)
    optimizer, zeros = torch.optim.Adam(policy.parameters(), 3e-3, fused=True), torch.zeros(256)
    states, goals = torch.zeros(256, 1), torch.zeros(256, 0)
    for _ in range(500):
        sign = torch.randint(0, 2, (256, 1), generator=noise) * 2.0 - 1
        chunk = 0.6 * sign + 0.05 * torch.randn(256, 1, generator=noise)
        optimizer.zero_grad()
        policy.loss(mac.Batch(states, chunk, zeros, states, zeros, goals, goals, zeros,
                              torch.ones_like(chunk)), noise)["likelihood"].backward()
        optimizer.step()
    with torch.no_grad():
        sample = policy.decode(states[:1], goals[:1], torch.randn(4000, 1, generator=noise))
    x = torch.atanh(sample.clamp(-0.9999, 0.9999))  # moments of atanh of the data: 0, atanh(0.6)
    assert abs(x.mean()) < 0.1 and 0.6 < x.std() < 0.8
    near = [(abs(sample - mode) < 0.2).float().mean() for mode in (-0.6, 0.6)]
    assert (near[0] - near[1]).abs() < 0.1 and (abs(sample) < 0.3).float().mean() > 0.15


def test_onestep_is_the_flow_policy_with_one_euler_step():
    flow, one = mac.FlowPolicy(2, 1, 4, config()), mac.POLICIES["onestep"](2, 1, 4, config())
    one.velocity.load_state_dict(flow.velocity.state_dict())
    batch, z = toy_batch(), torch.randn(9, 4, generator=generator(3))
    given = batch.observation, batch.actor_goal
    expected = (z + flow.velocity(*given, z, torch.zeros(9, 1))).clamp(-1, 1)
    assert torch.equal(one.decode(*given, z), expected)
    assert one.loss(batch, generator(4)) == flow.flow_losses(batch, generator(4))


@pytest.mark.parametrize("weight, settings", [
    (0.3, {"env": "cube-double-play-v0"}), (1, {"env": SINGLE}), (2, {"fql_alpha": 2.0})])
def test_fql_gradient_reaches_the_one_step_policy_only(weight, settings):
    agent, noise = make_agent(policy="fql", candidates=1, **settings), generator(7)
    batch = mac.ChunkDataset(random_data([19, 39]), [0, 1], config()).sample(16, generator())
    plain, rollout = mac.Agent.losses(agent, batch, noise)
    states, goals = rollout.observations[:-1], rollout.goal.expand(4, -1, -1)
    z = torch.randn(4, 16, 6, generator=noise)
    q = agent.critic(states, agent.policy.one_step(states, goals, z).clamp(-1, 1), goals)
    actor = -q.mean() / q.abs().mean().item()  # over a number: no gradient goes through it
    own = list(agent.policy.one_step.parameters())
    gradients = torch.autograd.grad(actor, own)
    losses, _ = agent.losses(batch, generator(7))
    expected = {**plain, "distill": weight * plain["distill"], "actor": actor}
    assert all(torch.isclose(loss, expected[name]) for name, loss in losses.items())
    losses["actor"].backward()
    assert all(torch.allclose(p.grad, g, rtol=1e-4, atol=1e-7) for p, g in zip(own, gradients))
    assert sum(p.grad is not None for p in agent.parameters()) == len(own)


@pytest.mark.parametrize("given, loss, candidates", [
    ("onestep --chunk 5", "flow", 32), ("gaussian --chunk 1", "likelihood", 32),
    ("fql", "actor", 1), ("flow --eval-flow", "flow", 32), ("flow --critic model", "flow", 32)])
def test_a_policy_from_training_to_export(given, loss, candidates, tmp_path, capsys, monkeypatch):
    run = *COUNTING, *SHORT, "--save-dir", str(tmp_path), "--policy"
    assert mac.main([*run, *given.split()]) == 0
    assert "fql climbs Q" in failing(capsys, *run, "fql", "--critic", "model")
    assert "--fql-alpha: -1.0 is not" in failing(capsys, *run, "fql", "--fql-alpha", "-1")
    warmup, joint = read_csv(tmp_path / "train.csv")
    assert joint["value"] and joint[loss] and bool(warmup[loss]) == (loss != "actor")
    monkeypatch.setattr(mac, "Config", mac.Config)  # --with changes it again
    ours = ["--with", str(HERE / "ablations.py")]
    assert evaluation.main([str(tmp_path), *ours]) == 0
    assert f"{given.split()[0]} policy, best of {candidates}, 1" in capsys.readouterr().out
    assert export.main([str(tmp_path), str(tmp_path / "x.pt2"), *ours]) == 0
    agent, program = mac.load(tmp_path), torch.export.load(tmp_path / "x.pt2").module()
    for n, kind in ((1, torch.float32), (7, torch.float64)):
        z = torch.randn(n, agent.policy.chunk_size, generator=generator(n))
        chunk = program(*torch.ones(2, 1, dtype=kind), z.to(kind))
        assert not chunk.requires_grad and chunk.dtype == torch.float32
        assert np.allclose(chunk, agent.act([1.0], [1.0], n, generator(n)), atol=1e-5)
    (tmp_path / "checkpoint.pt").unlink()
    before = mac.load(tmp_path)  # checkpoint-previous.pt, of step 0
    assert all((p != q).any() for p, q in zip(agent.parameters(), before.parameters()))


@pytest.mark.parametrize("goal, distance", [(0, 0), (0, 2), (0, 20), (1, 0), (1, 5), (1, 20)])
def test_reach_is_measured_at_that_distance_within_a_trajectory(goal, distance):
    rewards, seen = np.zeros(28, np.float32), []
    rewards[[11, 14, 21, 22]] = -1, 1, 1, 2  # it rises at 14, 21, 22, and to another trajectory
    states = np.arange(28, dtype=np.float32)[:, None]
    data = mac.ChunkDataset(Trajectories(states, np.repeat(states, 2, 1) / 100, np.array(
        [8, 11, 27]), rewards, np.zeros(3, bool)), list(range(goal)), config())
    agent = types.SimpleNamespace(
        columns=torch.arange(goal), config=data.config,
        normalize=lambda batch: seen.extend(batch.observation[:, 0].tolist()) or batch,
        value=lambda s, g: g[:, 0] - s[:, 0] if goal else s[:, 0],
        q=lambda s, chunk, g: 100 * chunk[:, 0],
        proposals=lambda s, g, count, generator: (None, torch.arange(count).expand(len(s), -1) - s),
        model_q=lambda s, chunk, g: torch.arange(16.0) ** 2 * (s[..., 0] % 2),  # flat if even
        outcome=types.SimpleNamespace(
            predict=lambda s, chunk, g: (s[:, 0], (s[:, 0] % 2 == 0).float())))
    result = reach.reach(agent, data, distance)
    assert np.isclose(reach.ideal(data.config, distance), -sum(
        0.9 ** t for t in range(0, distance // 3 * 3, 3)))  # until a chunk meets the goal
    trajectories = range(0, 9), range(9, 12), range(12, 28)
    starts = [t for part in trajectories for t in part if max(t + distance + 1, t + 3) in part]
    if not goal:
        starts = [t - distance for t in (14, 21, 22) if t - distance in starts]
    assert set(seen) == set(starts) and (result is None) == (not starts)
    if starts:
        mean, odd = np.mean(seen), np.mean(np.array(seen) % 2)
        agreement = np.corrcoef(np.arange(16), np.arange(16) ** 2)[0, 1]
        expected = [distance if goal else mean, mean, odd if goal else mean, agreement]
        assert np.allclose(result, expected, rtol=1e-4)


@pytest.mark.parametrize("n, steps", [(1, 6), (3, 7), (4, 15)])
def test_model_error_is_that_of_a_plain_loop_within_each_trajectory(n, steps):
    agent, data, span = make_agent(0, chunk=n), random_data([8, 11, 27]), steps // n * n
    normalize, errors = agent.normalizer, np.zeros((0, span // n + 1))
    normalize.fit(data.observations)
    for start in (*range(9 - span), *range(9, 12 - span), *range(12, 28 - span)):
        state, row = normalize(data.observations[start]), [0]
        for t in range(start, start + span, n):
            chunk = data.actions[t:t + n].flatten().clamp(-1 + 1e-5, 1 - 1e-5)
            state = state + agent.dynamics(state, chunk).detach()
            row.append((state - normalize(data.observations[t + n])).square().mean().item())
        errors = np.vstack([errors, row])
    curve = model_error.model_error(agent, data, steps)
    assert np.allclose(curve, [*zip(range(0, span + 1, n), errors.mean(0))], rtol=1e-4)
    with pytest.raises(mac.MacError, match="--steps 18: from a chunk"):
        model_error.model_error(agent, data, 18)


def test_reach_and_model_error_of_runs(run, recorded_run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder, names in ((run, {"success", "ideal"}), (recorded_run, {"reward"})):
        for main, more in ((model_error.main, ["--steps", "7"]), (reach.main, [])):
            assert main([str(folder), *more, *PLOT]) == 0
            assert not PLOT or imageio.v3.imread("x.png").std() > 0
        out = capsys.readouterr().out
        assert re.findall(r", (\d+) steps ", out) == ["3", "6"] and "task1 begins" in out
        head, *lines = [line.split() for line in out[out.index("     steps"):].splitlines()]
        rows = [dict(zip(head, line)) for line in lines if len(line) == len(head)]
        assert rows and all(np.isfinite(float(row[x])) for row in rows for x in ("V", "Q", *names))


@pytest.mark.skipif(not PLOT, reason="needs matplotlib")
def test_bars_are_as_long_as_the_numbers(tmp_path):
    (tmp_path / "table.csv").write_text("task,A,A ±,B,B ±\nx,80,0,40,\ny,,,40,0\n")
    assert bars.main([str(tmp_path / "table.csv"), str(tmp_path / "x.png")]) == 0
    image = imageio.v3.imread(tmp_path / "x.png")[..., :3]
    a, b = ((image == color).all(-1).sum() for color in ((31, 119, 180), (255, 127, 14)))
    assert abs(a / b - 80 / (40 + 40)) < 0.05 and a > 1000


@pytest.mark.skipif(not PLOT, reason="needs matplotlib")
@pytest.mark.parametrize("table", ["", "task,A,A ±\n", "task,A\nx,1\n", "task,A,A ±\nx,y,z\n"])
def test_a_table_without_numbers_draws_no_bars(table, tmp_path, capsys):
    (tmp_path / "table.csv").write_text(table)
    files = str(tmp_path / "table.csv"), str(tmp_path / "x.png")
    assert "nothing to plot" in failing(capsys, *files, main=bars.main)
    assert not (tmp_path / "x.png").exists()


def test_a_film_has_what_is_simulated_beside_what_is_imagined(run, tmp_path, capsys):
    world, agent = worlds.find_world("counting"), mac.load(run)
    states, env = np.linspace(-1, 8, 50, dtype=np.float32)[:, None], CountingEnv()
    env.unwrapped, env.model, world.made = env, types.SimpleNamespace(nv=2), [env]
    env.set_state = lambda qpos, qvel: setattr(env, "steps", qpos + qvel.sum())
    env.render = lambda: np.full((16, 16, 3), env.steps, np.uint8)
    np.savez(tmp_path / "counted.npz", qpos=np.arange(100, 150), observations=states)
    agent.facts["data"] = "counted.npz"
    frames = np.array(imagine.film(agent, world, tmp_path, 6))[:, 0, (0, -1), 0]
    assert frames[:, 0].tolist() == [0, 3]
    state, goal = agent.prepare(np.zeros(1), np.ones(1))
    chunk = agent.best_of(state, goal, 32, generator())
    assert np.allclose(env.actions[0][:3], chunk[0].detach())
    for (_, shown), imagined in zip(frames, (state, agent.next_observation(state, chunk))):
        nearest = (agent.normalizer(torch.tensor(states)) - imagined).abs().argmin().item()
        assert shown == 100 + nearest
    assert "films are .gif" in failing(capsys, str(run), "x.png", main=imagine.main)


def test_recorded_episodes_are_whole_and_not_overwritten(recorded_run, capsys):
    path = str(recorded_run.parent / "reacher.npz")
    with np.load(path) as file:
        assert file["observations"].shape == (150, 10) and file["timeouts"].sum() == 3
        assert np.array_equal(file["next_observations"][:49], file["observations"][1:50])
    assert "must be a new .npz file" in failing(capsys, path, main=record.main)


def test_a_world_and_an_outcome_from_training_to_evaluation(tmp_path, capsys):
    run, program = str(tmp_path / "run"), str(HERE / "world.py")
    command = "--env line --width 32 --chunk 5 --steps 4 --batch-size 8 --save-dir"
    done = subprocess.run([sys.executable, program, *command.split(), run, "--eval-interval", "0"],
                          capture_output=True, text=True)
    assert done.returncode == 0 and "random walks" in done.stdout, done.stderr
    assert "--with FILE" in failing(capsys, run, main=evaluation.main)
    assert evaluation.main([run, "--with", program, "--episodes", "3"]) == 0
    world, agent = worlds.find_world("line"), mac.load(run)
    for states, actions, *_ in world.data("", None):  # which the simulator repeats
        world.reset(world.env, 1, 0)
        assert np.allclose([world.env.step(a)[0] for a in actions[:49]], states[1:50], atol=1e-5)
    batch = mac.ChunkDataset(world.data("", None)[0], [0], agent.config).sample(99, generator())
    agent.outcome.loss = lambda batch: {"success": batch.success}
    near = (batch.next_observation - batch.value_goal).abs()[:, 0] < 0.05
    assert torch.equal(agent.model_losses(batch)["success"], near.float()) and near.any()

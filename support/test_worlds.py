"""pytest: a simulator and data of one's own, from data to evaluation."""
import json
import pathlib
import re
import sys

import numpy as np
import pytest

import eval as evaluation
import mac
from support import worlds
from support.test_common import NET, failing, read_csv
from support.test_recordings import HIGH, LOW, OWN, own_data, write_hdf5

OWN_TINY = [*NET, "--chunk", "3", "--steps", "4", "--log-interval", "2", "--eval-interval", "0"]


def register(env_id, low, high, limit=12):
    """A simulator of one's own: x moves by the first action, whose box need not be symmetric; the
    task ends, badly, where x leaves (-8, 8). -> its class, which keeps the actions in `seen`"""
    import gymnasium

    class Slide(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,))
        action_space = gymnasium.spaces.Box(np.float32(low), np.float32(high))
        seen = []

        def reset(self, seed=None, options=None):
            super().reset(seed=seed)
            self.x = self.np_random.uniform(-1, 1, 3).astype(np.float32)
            return self.x.copy(), {}

        def step(self, action):
            self.seen.append(action)
            self.x[0] += action[0]
            return self.x.copy(), 1.0, bool(abs(self.x[0]) > 8), False, {}

    gymnasium.register(env_id, entry_point=Slide, max_episode_steps=limit)
    return Slide


@pytest.fixture(scope="session")
def slide(tmp_path_factory):
    """Episodes of Slide-v0 by random actions. -> file, class"""
    import gymnasium

    Slide = register("Slide-v0", LOW, HIGH)
    register("Hopper-v77", LOW, HIGH)
    env, rng, rows = gymnasium.make("Slide-v0"), np.random.default_rng(0), []
    for episode in range(20):
        observation, _ = env.reset(seed=episode)
        done = False
        while not done:
            action = rng.uniform(LOW, HIGH).astype(np.float32)
            following, reward, terminated, truncated, _ = env.step(action)
            rows.append((observation, action, reward, following, terminated, truncated))
            observation, done = following, terminated or truncated
    path = tmp_path_factory.mktemp("slide") / "slide.npz"
    names = "observations", "actions", "rewards", "next_observations", "terminals", "timeouts"
    np.savez(path, **{name: np.array(column) for name, column in zip(names, zip(*rows))})
    return path, Slide


def own_command(path, run, env_id="Slide-v0", *more):
    return ["--env", env_id, "--data", str(path), *OWN_TINY, "--save-dir", str(run), *more]


def test_a_simulator_of_ones_own_from_data_to_evaluation(slide, tmp_path, capsys):
    path, Slide = slide
    run, report = tmp_path / "run", tmp_path / "x.json"
    assert mac.main(own_command(path, run, "Slide-v0", "--eval-interval", "4", "--eval-episodes",
                                "3")) == 0
    assert float(read_csv(run / "train.csv")[-1]["termination"]) > 0
    row = read_csv(run / "eval.csv")[-1]
    assert row["success"] == row["stderr"] == "" and 3 <= float(row["length"]) <= 12
    assert row["return"] == row["length"]  # its reward is 1 a step
    agent = mac.load(run)
    assert agent.terminations and agent.facts["source"] == str(path)
    assert agent.facts["box"] == [LOW.tolist(), HIGH.tolist()]
    world = worlds.find_world("Slide-v0", data=str(path))
    training, _ = world.data(str(path), None)
    with np.load(path) as file:  # recorded actions are rescaled from the box, the agent's back
        recorded = file["actions"]
    index = (training.observations[0] == np.load(path)["observations"]).all(1).argmax()
    assert np.allclose(LOW + (training.actions[0] + 1) / 2 * (HIGH - LOW), recorded[index], atol=1e-5)
    world.reset(world.env, 1, 0)
    for action, expected in (([-1, -1], LOW), ([1, 1], HIGH), ([0, 0.5], [1, 7.5])):
        world.env.step(np.float32(action))
        assert np.allclose(Slide.seen[-1], expected, atol=1e-5)
    assert evaluation.main([str(run), "--episodes", "4", "--json", str(report)]) == 0
    assert json.loads(report.read_text())["overall"]["success"] is None


def test_without_terminations_and_with_d4rls_score(slide, tmp_path, capsys):
    run, report = tmp_path / "run", tmp_path / "x.json"
    assert mac.main(own_command(slide[0], run, "Hopper-v77", "--no-terminations")) == 0
    assert not mac.load(run).terminations and "termination" not in read_csv(run / "train.csv")[0]
    capsys.readouterr()
    assert evaluation.main([str(run), "--episodes", "3", "--json", str(report)]) == 0
    overall = json.loads(report.read_text())["overall"]
    assert np.isclose(overall["d4rl_score"],
                      100 * (overall["return"] + 20.272305) / (3234.3 + 20.272305))
    assert "normalised score: 0.9" in capsys.readouterr().out


@pytest.mark.parametrize("env", [[], ["--env", "Nowhere-v3"], ["--env", "no_such_module:Env-v0"]])
def test_data_without_a_simulator(env, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, flat = own_data(OWN * 4)
    np.savez("mine.npz", **flat | {"actions": flat["actions"] / 10})
    command = [*env, "--data", "mine.npz", "--seed", "3", *OWN_TINY, "--small", "--eval-interval",
               "2", "--steps"]
    assert mac.main([*command, "4"]) == 0
    assert ("cannot make" in capsys.readouterr().out) == bool(env)
    run = f"exp/{env[1] if env else 'mine'}-seed3"
    assert mac.load(run).act(np.zeros(3)).shape == (3, 2)
    assert not pathlib.Path(run, "eval.csv").exists()
    assert "no simulator" in failing(capsys, run, main=evaluation.main)
    assert mac.main([*command, "6", "--resume"]) == 0
    flat["actions"][7, 1] = 11.5  # beyond [-1, 1]
    np.savez("wide.npz", **flat)
    assert "actions[" in failing(capsys, "--data", "wide.npz", *OWN_TINY)


def test_an_id_without_a_time_limit_gets_one_and_says_so(tmp_path, capsys, monkeypatch):
    register("Endless-v0", [-1e-6] * 2, [1e-6] * 2, None)
    monkeypatch.setattr(worlds, "TIME_LIMIT", 9)
    world = worlds.find_world("Endless-v0", data="x.npz")
    world.reset(world.env, 1, 0)
    assert "Endless-v0 has no time limit: its episodes end after 9 steps" in capsys.readouterr().out
    ends = [world.env.step(np.zeros(2, np.float32))[2:4] for _ in range(9)]
    assert ends == [(False, False)] * 8 + [(False, True)]


def test_a_simulator_with_another_action_box_is_refused(tmp_path, capsys):
    """First there is none, so actions are taken to be in [-1, 1]; then there is one of [-2, 2]."""
    _, flat = own_data([(6, "timeouts")] * 5)
    np.savez(tmp_path / "x.npz", **flat | {"actions": flat["actions"] / 10})
    command = own_command(tmp_path / "x.npz", tmp_path / "run", "Late-v0")
    assert mac.main(command) == 0
    register("Late-v0", [-2, -2], [2, 2])
    error = failing(capsys, str(tmp_path / "run"), main=evaluation.main)
    assert "[-1, 1]" in error and "[[-2.0, -2.0], [2.0, 2.0]]" in error
    error = failing(capsys, *command, "--resume", "--steps", "9")
    assert "not those of this run" in error and "box" in error
    assert mac.load(tmp_path / "run").step == 4


@pytest.mark.parametrize("change", [
    lambda d: d["rewards"].__imul__(2), lambda d: d["actions"].__imul__(-1),
    lambda d: d.update(terminals=d["timeouts"], timeouts=d["terminals"])])
def test_resume_on_changed_data_of_the_same_name_is_refused(change, tmp_path, capsys):
    _, flat = own_data(OWN * 3)
    flat["actions"] /= 10
    np.savez(tmp_path / "x.npz", **flat)
    command = own_command(tmp_path / "x.npz", tmp_path / "run", "")
    assert mac.main(command) == 0
    change(flat)
    np.savez(tmp_path / "x.npz", **flat)
    assert "not those of this run" in failing(capsys, *command, "--resume", "--steps", "9")


@pytest.mark.parametrize("command, message", [
    ("--env cube-double-play-v0 --data x.npz", "cube-double-play-v0 has data of its own"),
    ("--env CartPole-v1 --data x.npz", "its action space is Discrete(2); only flat Box"),
    ("--env Slide-v0", "needs --data"),
    ("--env Slide-v0 --data none.npz", "none.npz: No such file"),
    ("--env Slide-v0 --data wide.npz", "actions[7, 1] is 11.5 as float32, not a number between"),
    ("--env Slide-v0 --data wide.h5", "actions[7, 1] is 11.5 as float32, not a number between"),
    ("--env Slide-v0 --data thin.npz", "observations has shape (20, 2)"),
    ("--data none.hdf5", "none.hdf5 as HDF5"), ("--data /proc/self", "0 episodes"),
    ("--data short.npz", "no trajectory of the training"),
    ("--data wide.npz --collect 3", "no scripted policy"),
    ("--data ~no-such-user/x.npz", "no home folder for ~no-such-user/x.npz: set --data"),
])
def test_bad_input_about_own_data_is_one_line(command, message, slide, tmp_path, capsys,
                                              monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, wide = own_data()
    wide["actions"][7, 1] = 11.5
    np.savez("wide.npz", **wide)
    write_hdf5("wide.h5", wide)
    np.savez("thin.npz", **own_data()[1] | {"observations": wide["observations"][:, :2]})
    short = own_data([(1, "timeouts")] * 9)[1]
    np.savez("short.npz", **short | {"actions": short["actions"] / 10})
    assert message in failing(capsys, *command.split(), *OWN_TINY, "--save-dir", "run")
    assert not list((tmp_path / "run").glob("[a-z]*"))
    monkeypatch.setitem(sys.modules, "h5py", None)
    if re.search("h5$", command):
        assert "pip install h5py" in failing(capsys, *command.split(), *OWN_TINY)

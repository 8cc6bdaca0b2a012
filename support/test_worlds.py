"""pytest: a simulator and data of one's own, from data to evaluation."""
import json
import pathlib

import numpy as np
import pytest

import eval as evaluation
import mac
from support import worlds
from support.test_common import NET, failing, read_csv
from support.test_recordings import HIGH, LOW, OWN, own_data

OWN_TINY = [*NET, "--chunk", "3", "--steps", "4", "--log-interval", "2", "--eval-interval", "0"]


def register(env_id, low=LOW, high=HIGH, limit=12):
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


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Work in a folder with own.npz, actions in LOW to HIGH, and small.npz, in [-1, 1]."""
    monkeypatch.chdir(tmp_path)
    _, flat = own_data(OWN * 3)
    np.savez("own.npz", **flat)
    flat["actions"] /= 10
    np.savez("small.npz", **flat)
    return flat


def test_a_simulator_of_ones_own_from_data_to_evaluation(own):
    Slide = register("Slide-v0")
    command = ["--env", "Slide-v0", "--data", "own.npz", *OWN_TINY, "--save-dir", "run"]
    assert mac.main([*command, "--eval-interval", "4", "--eval-episodes", "3"]) == 0
    assert float(read_csv(pathlib.Path("run/train.csv"))[-1]["termination"]) > 0
    row = read_csv(pathlib.Path("run/eval.csv"))[-1]
    assert row["success"] == row["stderr"] == "" and 3 <= float(row["length"]) <= 12
    assert row["return"] == row["length"]  # its reward is 1 a step
    agent, world = mac.load("run"), worlds.find_world("Slide-v0", data="own.npz")
    assert agent.terminations and agent.facts["box"] == [LOW.tolist(), HIGH.tolist()]
    training, _ = world.data("own.npz", None)  # actions are rescaled there, and back here
    index = (np.load("own.npz")["observations"] == training.observations[0]).all(1).argmax()
    world.reset(world.env, 1, 0)
    for action, expected in (([-1, -1], LOW), ([1, 1], HIGH), ([0, 0.5], [1, 7.5]),
                             (training.actions[0], np.load("own.npz")["actions"][index])):
        world.env.step(np.float32(action))
        assert np.allclose(Slide.seen[-1], expected, atol=1e-5)


def test_without_terminations_and_with_d4rls_score(own):
    register("Hopper-v77")
    assert mac.main(["--env", "Hopper-v77", "--data", "own.npz", *OWN_TINY, "--save-dir", "run",
                     "--no-terminations"]) == 0
    assert not mac.load("run").terminations
    assert "termination" not in read_csv(pathlib.Path("run/train.csv"))[0]
    assert evaluation.main(["run", "--episodes", "3", "--json", "x.json"]) == 0
    overall = json.loads(pathlib.Path("x.json").read_text())["overall"]
    assert overall["success"] is None and np.isclose(
        overall["d4rl_score"], 100 * (overall["return"] + 20.272305) / (3234.3 + 20.272305))


@pytest.mark.parametrize("env", [[], ["--env", "Nowhere-v3"], ["--env", "no_such_module:Env-v0"]])
def test_data_without_a_simulator(env, own, capsys):
    command = [*env, "--data", "small.npz", *OWN_TINY, "--eval-interval", "2", "--save-dir", "run"]
    assert mac.main(command) == 0 and mac.main([*command, "--steps", "6", "--resume"]) == 0
    assert ("cannot make" in capsys.readouterr().out) == bool(env)
    assert mac.load("run").act(np.zeros(3)).shape == (3, 2)
    assert not pathlib.Path("run", "eval.csv").exists()
    assert "no simulator" in failing(capsys, "run", main=evaluation.main)


def test_an_id_without_a_time_limit_gets_one_and_says_so(capsys):
    register("Endless-v0", [-1e-6] * 2, [1e-6] * 2, None)
    world = worlds.find_world("Endless-v0", data="x.npz")
    world.reset(world.env, 1, 0)
    assert "Endless-v0 has no time limit" in capsys.readouterr().out
    ends = [world.env.step(np.zeros(2, np.float32))[2:4] for _ in range(10_000)]
    assert set(ends[:-1]) == {(False, False)} and ends[-1] == (False, True)


def test_a_simulator_with_another_box_and_changed_data_are_refused(own, capsys):
    """First there is none, so actions are taken to be in [-1, 1]; then there is one of [-2, 2]."""
    command = ["--env", "Late-v0", "--data", "small.npz", *OWN_TINY, "--save-dir", "run"]
    assert mac.main(command) == 0
    for change in ({"rewards": 2 * own["rewards"]}, {"actions": -own["actions"]},
                   {"terminals": own["timeouts"], "timeouts": own["terminals"]}):
        np.savez("small.npz", **own | change)
        error = failing(capsys, *command, "--resume", "--steps", "9")
        assert "not those of this run" in error and "fingerprint" in error
    np.savez("small.npz", **own)
    register("Late-v0", [-2, -2], [2, 2])
    assert "[[-2.0, -2.0], [2.0, 2.0]]" in failing(capsys, "run", main=evaluation.main)
    assert "box" in failing(capsys, *command, "--resume", "--steps", "9")
    assert mac.load("run").step == 4


@pytest.mark.parametrize("command, message", [
    ("--env cube-double-play-v0 --data own.npz", "cube-double-play-v0 has data of its own"),
    ("--env CartPole-v1 --data own.npz", "Discrete(2); only flat Box"),
    ("--env Slide-v0", "needs --data"), ("--data none.npz", "none.npz: No such file"),
    ("--data own.npz", "not a number between -1.1 and 1.1"), ("--data /proc/self", "0 episodes"),
    ("--env Pendulum-v1 --data small.npz", "actions has shape (60, 2)"),
    ("--data small.npz --chunk 9", "no trajectory of the training"),
    ("--data small.npz --collect 3", "no scripted policy"),
    ("--data ~no-such-user/x.npz", "no home folder for ~no-such-user/x.npz: set --data")])
def test_bad_input_about_own_data_is_one_line(command, message, own, capsys):
    assert message in failing(capsys, *OWN_TINY, "--no-terminations", "--save-dir", "run",
                              *command.split())
    assert not pathlib.Path("run", "checkpoint.pt").exists()

"""pytest: a simulator and data of one's own, from data to evaluation, and a simulator's faults."""
import json
import pathlib
import threading

import numpy as np
import pytest

import eval as evaluation
import mac
from support import worlds
from support.test_common import NET, failing, read_csv
from support.test_recordings import HIGH, LOW, OWN, own_data

COMMAND = [*NET, "--chunk", "3", "--steps", "6", "--log-interval", "2", "--save-dir", "run"]
NO_EVALUATION = ["--eval-interval", "0"]


def register(env_id, low=LOW, high=HIGH, limit=12, **methods):
    """A simulator of one's own: x moves by the first action; the task ends, badly, where x leaves
    (-8, 8). It bears one thread only. `methods` take the place of its own. -> its class"""
    import gymnasium

    class Slide(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,))
        action_space = gymnasium.spaces.Box(np.float32(low), np.float32(high))

        def __init__(self, render_mode=None):
            made.append(threading.get_ident())
            self.seen = []

        def reset(self, seed=None, options=None):
            super().reset(seed=seed)
            self.x = self.np_random.uniform(-1, 1, 3).astype(np.float32)
            return self.x.copy(), {}

        def move(self, action):
            assert made == [threading.get_ident()]
            self.seen.append(action)
            self.x[0] += action[0]
            return self.x.copy(), 1.0, bool(abs(self.x[0]) > 8), False, {}

        step = move

    made = []
    gymnasium.registry.pop(env_id, None)
    gymnasium.register(env_id, type("Own", (Slide,), methods), max_episode_steps=limit)


@pytest.fixture(autouse=True)
def own(tmp_path, monkeypatch):
    """Work in a folder with own.npz, actions in LOW to HIGH, and small.npz, in [-1, 1]."""
    monkeypatch.chdir(tmp_path)
    _, flat = own_data(OWN * 3)
    np.savez("own.npz", **flat)
    flat["actions"] /= 10
    np.savez("small.npz", **flat)
    return flat


def test_a_simulator_of_ones_own_from_data_to_evaluation():
    register("Hopper-v77")
    command = ["--env", "Hopper-v77", "--data", "own.npz", *COMMAND]
    assert mac.main([*command, "--eval-interval", "3", "--eval-episodes", "3"]) == 0
    assert float(read_csv(pathlib.Path("run/train.csv"))[-1]["termination"]) > 0
    rows = [row for row in read_csv(pathlib.Path("run/eval.csv")) if row["task"] == "overall"]
    assert [row["step"] for row in rows] == ["3", "6"] and 3 <= float(rows[-1]["length"]) <= 12
    assert all(row["success"] == "" and row["return"] == row["length"] for row in rows)
    agent, world = mac.load("run"), worlds.find_world("Hopper-v77", data="own.npz")
    assert agent.terminations and agent.facts["box"] == [LOW.tolist(), HIGH.tolist()]
    register("Hopper-v77")
    assert evaluation.main(["run", "--episodes", "3", "--json", "x.json"]) == 0
    overall = json.loads(pathlib.Path("x.json").read_text())["overall"]
    assert overall["success"] is None and np.isclose(
        overall["d4rl_score"], 100 * (overall["return"] + 20.272305) / (3234.3 + 20.272305))
    register("Hopper-v77")
    training, _ = world.data("own.npz", None)  # actions are rescaled there, and back here
    index = (np.load("own.npz")["observations"] == training.observations[0]).all(1).argmax()
    world.reset(world.env, 1, 0)
    for action, expected in (([-1, -1], LOW), ([1, 1], HIGH), ([0, 0.5], [1, 7.5]),
                             (training.actions[0], np.load("own.npz")["actions"][index])):
        world.env.step(np.float32(action))
        assert np.allclose(world.env.unwrapped.seen[-1], expected, atol=1e-5)


@pytest.mark.parametrize("env", [[], ["--env", "no_such_module:Env-v0"]])
def test_data_without_a_simulator(env, capsys):
    command = [*env, "--data", "small.npz", *COMMAND, "--eval-interval", "2", "--no-terminations"]
    assert mac.main(command) == 0 and mac.main([*command, "--steps", "9", "--resume"]) == 0
    assert ("cannot make" in capsys.readouterr().out) == bool(env)
    assert mac.load("run").act(np.zeros(3)).shape == (3, 2) and not mac.load("run").terminations
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
    command = ["--env", "Late-v0", "--data", "small.npz", *COMMAND, *NO_EVALUATION]
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
    assert mac.load("run").step == 6


@pytest.mark.parametrize("command, message", [
    ("--env cube-double-play-v0 --data own.npz", "cube-double-play-v0 has data of its own"),
    ("--env CartPole-v1 --data own.npz", "Discrete(2); only flat Box"),
    ("--env Slide-v0", "needs --data"), ("--data none.npz", "none.npz: No such file"),
    ("--data own.npz", "not a number between -1.1 and 1.1"),
    ("--env Pendulum-v1 --data small.npz", "actions has shape (60, 2)"),
    ("--data small.npz --chunk 9 --no-terminations", "no trajectory of the training")])
def test_bad_input_about_own_data_is_one_line(command, message, capsys):
    assert message in failing(capsys, *COMMAND, *NO_EVALUATION, *command.split())
    assert not pathlib.Path("run", "checkpoint.pt").exists()


# ------------------------------------------------------------------------------ faults

OWN_RUN = ["--env", "Own-v0", "--data", "small.npz", *COMMAND, "--eval-interval", "2",
           "--eval-episodes", "2"]


def broken(self, action):
    raise ZeroDivisionError("two\nlines")


@pytest.mark.parametrize("fault, message", [
    ({"step": broken}, "(ZeroDivisionError: two lines); mend it"),
    ({"step": lambda self, action: (np.full(3, np.nan), 1.0, False, False, {})}, "nan"),
    ({"step": lambda self, action: (np.zeros(3), 1.0, False, {})}, "not enough values"),
    ({"reset": lambda self, **_: np.zeros(3, np.float32)}, "too many values"),
    ({"reset": lambda self, **_: (np.zeros(4, np.float32), {})}, "shape (4,)")])
def test_a_fault_of_the_simulator_is_one_line_before_training(fault, message, capsys):
    register("Own-v0", **fault)
    error = failing(capsys, *OWN_RUN)
    assert "simulator of Own-v0 failed" in error and message in error
    assert not list(pathlib.Path("run").glob("[a-z]*"))


def test_an_evaluation_that_fails_later_saves_the_run_and_says_how_to_go_on(capsys):
    def later(self, action):  # in the second evaluation
        return broken(self, action) if len(self.seen) > 15 else self.move(action)

    register("Own-v0", [-1, -1], [1, 1], 6, step=later)
    error = failing(capsys, *OWN_RUN)
    assert "ZeroDivisionError" in error and "--resume" in error and "--eval-interval 0" in error
    register("Own-v0", [-1, -1], [1, 1], 6, step=broken)
    failing(capsys, *OWN_RUN, "--resume")
    assert mac.load("run").step == 4
    assert mac.main([*OWN_RUN, "--resume", *NO_EVALUATION]) == 0 and mac.load("run").step == 6
    assert {row["step"] for row in read_csv(pathlib.Path("run/eval.csv"))} == {"2"}

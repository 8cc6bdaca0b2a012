"""pytest: a simulator and data of one's own, from data to evaluation, and a simulator's faults."""
import pathlib
import threading

import numpy as np
import pytest

import eval as evaluation
import mac
from support import worlds
from support.episodes import import_simulators
from support.test_common import NET, failing, read_csv
from support.test_recordings import HIGH, LOW, OWN, own_data

RUN = pathlib.Path("run")
OWN_RUN = [*NET, *("--env Own-v0 --data own.npz --chunk 3 --steps 6 --log-interval 2 "
                   "--save-dir run --eval-episodes 2 --eval-interval").split()]


def register(low=LOW, high=HIGH, limit=12, **methods):
    """Make Own-v0, a simulator of one thread that returns an array which it uses again: x moves by
    the first action, and the task ends, badly, beyond 8. `methods` take the place of its own."""
    _, gymnasium = import_simulators()

    class Slide(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,))
        action_space = gymnasium.spaces.Box(np.float32(low), np.float32(high))
        seen, x = [], np.zeros(3, np.float32)

        def reset(self, **_):
            self.x[:] = 0
            return self.x, {}

        def move(self, action):
            assert threading.current_thread() is threading.main_thread()
            self.seen.append(action)
            self.x[0] += action[0]
            return self.x, np.ones(1), np.bool_(abs(self.x[0]) > 8), False, {}

        step = move

    gymnasium.registry.pop("Own-v0", None)
    gymnasium.register("Own-v0", type("Own", (Slide,), methods), max_episode_steps=limit)


@pytest.fixture(autouse=True)
def own(tmp_path, monkeypatch):
    """Work in a folder with own.npz, of actions in [-1, 1]. -> its arrays"""
    monkeypatch.chdir(tmp_path)
    _, flat = own_data(OWN * 3)
    flat["actions"] /= 10
    np.savez("own.npz", **flat)
    return flat


def test_a_simulator_of_ones_own_from_data_to_evaluation(own, capsys):
    register()
    assert mac.main([*OWN_RUN, "3"]) == 0
    assert float(read_csv(RUN / "train.csv")[-1]["termination"]) > 0
    rows = [row for row in read_csv(RUN / "eval.csv") if row["task"] == "overall"]
    assert [row["step"] for row in rows] == ["3", "6"] and 3 <= float(rows[-1]["length"]) <= 12
    assert all(row["success"] == "" and row["return"] == row["length"] for row in rows)
    world = worlds.find_world("Own-v0", data="own.npz")
    training, _ = world.data("own.npz", None)  # actions are rescaled there, and back here
    index = (own["observations"] == training.observations[0]).all(1).argmax()
    world.reset(world.env, 1, 0)
    for action, expected in (([-1, -1], LOW), ([1, 1], HIGH), ([0, 0.5], [1, 7.5]),
                             (training.actions[0], own["actions"][index])):
        world.env.step(np.float32(action))
        assert np.allclose(world.env.unwrapped.seen[-1], expected, atol=1e-5)
    film = failing(capsys, "run", "--video", "x.gif", main=evaluation.main)
    assert "failed (TypeError: " in film and "render_mode" in film


def test_an_id_without_a_time_limit_gets_one_and_says_so(capsys):
    register(limit=None)
    world = worlds.find_world("Own-v0", data="x.npz")
    world.reset(world.env, 1, 0)
    assert "Own-v0 has no time limit" in capsys.readouterr().out
    ends = [world.env.step(np.float32([-0.5, 0]))[3] for _ in range(10_000)]  # x stays
    assert ends.index(True) == 9_999


def test_no_simulator_then_one_with_another_box_and_changed_data(own, capsys):
    """Where there is none, actions are taken to be in [-1, 1]; the one that comes has [-2, 2]."""
    resume = [*OWN_RUN, "2", "--resume", "--steps", "9"]
    import_simulators()[1].registry.pop("Own-v0", None)
    assert mac.main([*OWN_RUN, "2"]) == 0 and "cannot make" in capsys.readouterr().out
    assert mac.load("run").act(np.zeros(3)).shape == (3, 2) and not (RUN / "eval.csv").exists()
    assert "no simulator" in failing(capsys, "run", main=evaluation.main)
    for change in ({"rewards": 2 * own["rewards"]}, {"actions": -own["actions"]},
                   {"terminals": own["timeouts"], "timeouts": own["terminals"]}):
        np.savez("own.npz", **own | change)
        assert "the fingerprint was" in failing(capsys, *resume)
    np.savez("own.npz", **own)
    register([-2, -2], [2, 2])
    assert "[[-2.0, -2.0], [2.0, 2.0]]" in failing(capsys, "run", main=evaluation.main)
    assert "the box was" in failing(capsys, *resume)


def broken(self, action):
    raise ZeroDivisionError("two\nlines")


@pytest.mark.parametrize("method, fault, message", [
    ("step", broken, "(ZeroDivisionError: two lines); mend it"),
    ("step", lambda self, action: (np.full(3, np.nan), 1.0, False, False, {}), "nan"),
    ("step", lambda self, action: (np.zeros(3), 1.0, False, {}), "not enough values"),
    ("reset", lambda self, **_: np.zeros(3, np.float32), "failed")])
def test_a_fault_of_the_simulator_is_one_line_before_training(method, fault, message, capsys):
    register(**{method: fault})
    error = failing(capsys, *OWN_RUN, "2")
    assert "simulator of Own-v0 failed" in error and message in error
    assert not list(RUN.glob("[a-z]*"))


def test_an_evaluation_that_fails_later_saves_the_run_and_says_how_to_go_on(capsys):
    register([-1, -1], [1, 1], 6, step=lambda self, action: (  # in the second evaluation
        broken if len(self.seen) > 15 else type(self).move)(self, action))
    assert "and --resume, or" in failing(capsys, *OWN_RUN, "2") and mac.load("run").step == 4
    register([-1, -1], [1, 1], 6, step=broken)
    failing(capsys, *OWN_RUN, "2", "--resume")
    assert mac.main([*OWN_RUN, "0", "--resume"]) == 0 and mac.load("run").step == 6
    assert {row["step"] for row in read_csv(RUN / "eval.csv")} == {"2"}

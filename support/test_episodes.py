"""pytest: episodes are played as asked, and a simulator's faults are one line."""
import itertools
import math
import threading

import numpy as np
import pytest
import torch

import eval as evaluation
import mac
from support import episodes
from support.test_common import NET, Counting, CountingEnv, failing, read_csv
from support.test_recordings import own_data
from support.worlds import find_world


class Acting:
    """An agent whose chunk of four actions is 10 s, 10 s + 1 and so on in state s."""

    config, device = mac.Config(chunk=4, execute=1), torch.device("cpu")

    def __init__(self):
        self.asked = []

    def act(self, observation, goal, candidates, generator):
        self.asked.append((observation[:, 0].tolist(), goal[:, 0].tolist(), candidates))
        return 10 * observation[:, None] + np.arange(4)[None, :, None]  # (k, 4, 1)


@pytest.mark.parametrize("parallel", [1, 3])
@pytest.mark.parametrize("execute, expected", [
    (None, [0, 10, 20, 30, 40, 50, 60]), (3, [0, 1, 2, 30, 31, 32, 60]),
    (4, [0, 1, 2, 3, 40, 41, 42])])
def test_as_much_of_each_chunk_is_executed_as_asked(execute, expected, parallel):
    agent, world, steps = Acting(), Counting("counting"), []
    world.parallel = parallel
    results = episodes.play(world, agent, 2, execute=execute, candidates=5, on_step=lambda e: (
        steps.append((e.task, e.number, e.length))))
    assert results == {1: [(False, -3.5, 7)] * 2, 2: [(True, -3.5, 7)] * 2}
    assert len(world.made) == parallel
    assert [actions for env in world.made for actions in env.actions] == [expected] * 4
    assert sorted(steps) == sorted(itertools.product((1, 2), (0, 1), range(1, 8)))
    decisions = math.ceil(7 / (execute or 1))
    asked = [(goal, candidates) for _, goals, candidates in agent.asked for goal in goals]
    assert sorted(asked) == [(1, 5)] * 2 * decisions + [(2, 5)] * 2 * decisions


def test_episodes_are_repeatable_leave_training_noise_alone_and_stop():
    world = find_world("cube-single-play-v0")
    world.tasks = [4]
    torch.manual_seed(0)
    agent = mac.Agent(28, 5, world.columns, mac.Config(width=16, execute=10)).eval()
    state = torch.get_rng_state()

    def seen(seed):
        rows = []
        episodes.play(world, agent, 1, seed, stop=lambda: len(rows) == 40,
                      on_step=lambda e: rows.append([*e.observation, *e.goal]))
        return rows

    first = seen(3)
    assert torch.equal(torch.get_rng_state(), state)
    assert seen(3) == first and not np.allclose(seen(4), first)
    steps = []
    assert episodes.play(Counting("counting"), Acting(), 1, on_step=steps.append,
                         stop=lambda: len(steps) == 9) is None and len(steps) == 9


class Telling(CountingEnv):
    """One of its seventh steps in two tells of success, in task 2 none."""

    def step(self, action):
        *result, _ = super().step(action)
        told = [{"success": np.True_}, {"is_success": True}, {"is_success": False}, {}]
        return *result, told[len(self.actions) % 4] if (self.steps, self.task) == (7, 1) else {}


def test_success_that_is_told_only_sometimes_counts_as_none_elsewhere():
    world = Counting("counting")
    world.make = Telling
    results = episodes.play(world, Acting(), 4)
    assert [success for success, *_ in results[1]] == [True, False, None, True]
    assert [success for success, *_ in results[2]] == [None] * 4
    table = episodes.summarize(results)
    assert table["task1"] == {"success": 0.5, "stderr": 0.25, "return": -3.5, "return_stderr": 0,
                              "length": 7, "episodes": 4}
    assert table["task2"]["success"] == table["task2"]["stderr"] == 0
    assert table["overall"]["success"] == 0.25 and table["overall"]["episodes"] == 8
    assert episodes.headline(table["overall"]) == "success 25% ± 15%"
    silent = episodes.summarize({1: [(None, 1.0, 5), (None, 3.0, 7)]})["overall"]
    assert silent["success"] is silent["stderr"] is None and silent["length"] == 6
    assert episodes.headline(silent).startswith("return 2 ± 0.71")


def test_a_buffer_that_simulators_use_again_is_copied():
    buffer = np.zeros(1)

    class Reusing(CountingEnv):
        def step(self, action):
            observation, *rest = super().step(action)
            buffer[:] = observation + 100 * self.task
            return buffer, *rest

    class World(Counting):
        make, parallel = Reusing, 2

        def reset(self, env, task, seed):
            super().reset(env, task, seed)
            buffer[:] = 100 * task
            return buffer, np.full(1, task)

    agent = Acting()
    episodes.play(World("counting"), agent, 1)
    assert [states for states, *_ in agent.asked] == [[100 + i, 200 + i] for i in range(7)]


# ------------------------------------------------------------------------------ simulators' faults

def one_step(self, action):
    self.length += 1
    return np.full(3, self.length, np.float32), 1.0, False, False, {}


def register(env_id, step=one_step, reset=lambda self: (np.zeros(3, np.float32), {})):
    """Make a simulator with these methods. -> list of those made"""
    import gymnasium
    made = []

    class Simulator(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,))
        action_space = gymnasium.spaces.Box(np.float32([-9, -9]), np.float32([9, 9]))

        def __init__(self, render_mode=None):
            made.append(threading.get_ident())
            if len(made) > 1:
                raise RuntimeError("there may be one only")
            self.thread, self.total = made[0], 0

        def reset(self, seed=None, options=None):
            self.length = 0
            return reset(self)

        def step(self, action):
            assert threading.get_ident() == self.thread
            self.total += 1
            return step(self, action)

    gymnasium.registry.pop(env_id, None)
    gymnasium.register(env_id, entry_point=Simulator, max_episode_steps=6)
    return made


@pytest.fixture
def command(tmp_path):
    _, flat = own_data([(6, "timeouts")] * 5)
    np.savez(tmp_path / "x.npz", **flat | {"actions": flat["actions"] / 10})
    return ["--env", "Own-v0", "--data", str(tmp_path / "x.npz"), *NET, "--chunk", "3", "--steps",
            "6", "--eval-interval", "2", "--eval-episodes", "2", "--save-dir",
            str(tmp_path / "run")]


def raises(self, action):
    raise ZeroDivisionError("two\nlines")


@pytest.mark.parametrize("fault, message", [
    ({"step": lambda self, action: (np.full(3, np.nan), 1.0, False, False, {})}, "nan"),
    ({"step": raises}, "ZeroDivisionError: two lines"),
    ({"reset": lambda self: np.zeros(3, np.float32)}, "failed"),
    ({"reset": lambda self: (np.zeros(4, np.float32), {})}, "failed"),
    ({"reset": lambda self: (np.full(3, np.inf, np.float32), {})}, "inf"),
    ({"step": lambda self, action: (np.zeros(3, np.float32), 1.0, False, {})}, "failed"),
    ({"step": lambda self, action: (np.zeros(3, np.float32), "much", False, False, {})}, "much")])
def test_a_fault_of_the_simulator_is_one_line_before_training(fault, message, command, tmp_path,
                                                              capsys):
    register("Own-v0", **fault)
    error = failing(capsys, *command)
    assert "simulator of Own-v0 failed" in error and "before training" in error and message in error
    assert not list((tmp_path / "run").glob("[a-z]*"))


def test_a_single_simulator_of_one_thread_with_rewards_in_arrays_works(command, tmp_path, capsys):
    made = register("Own-v0", lambda self, action: (*one_step(self, action)[:1], np.ones(1), False,
                                                    np.bool_(False), {}))
    assert mac.main(command) == 0 and len(made) == 1
    rows = read_csv(tmp_path / "run" / "eval.csv")
    assert {(row["return"], row["length"], row["success"]) for row in rows} == {("6.0", "6.0", "")}
    assert [row["step"] for row in rows if row["task"] == "overall"] == ["2", "4", "6"]
    made.clear()
    assert evaluation.main([str(tmp_path / "run"), "--episodes", "7"]) == 0 and len(made) == 1


def test_an_evaluation_that_fails_later_saves_the_run_and_says_how_to_go_on(command, tmp_path,
                                                                            capsys):
    def fails_in_the_second(self, action):
        if self.total > 15 and self.length == 3:
            raise ZeroDivisionError("stuck")
        return one_step(self, action)

    register("Own-v0", fails_in_the_second)
    error = failing(capsys, *command)
    assert "ZeroDivisionError: stuck" in error and "--resume --eval-interval 0" in error
    run = tmp_path / "run"
    assert mac.load(run).step == 4 and read_csv(run / "eval.csv")[-1]["step"] == "2"
    made = register("Own-v0", raises)
    assert "before training" in failing(capsys, *command, "--resume")
    register("Own-v0", fails_in_the_second)
    made.clear()
    assert mac.main([*command, "--resume", "--eval-interval", "0"]) == 0
    assert mac.load(run).step == 6 and read_csv(run / "eval.csv")[-1]["step"] == "2"

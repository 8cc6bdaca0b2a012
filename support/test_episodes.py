"""pytest: episodes are played as asked."""
import math

import numpy as np
import pytest
import torch

import mac
from support import episodes
from support.test_common import Counting, CountingEnv
from support.worlds import find_world


class Acting:
    """An agent whose chunk of four actions is 10 s, 10 s + 1 and so on in state s."""

    config, device = mac.Config(chunk=4, execute=1), torch.device("cpu")

    def __init__(self):
        self.asked = []

    def act(self, observation, goal, candidates, generator):
        self.asked += [(number, candidates) for number in goal[:, 0].tolist()]
        return 10 * observation[:, None] + np.arange(4)[None, :, None]  # (k, 4, 1)


class Reusing(CountingEnv):
    """Observes its task, too, in an array that all environments use again."""

    seen = np.zeros(1)

    def step(self, action):
        observation, *rest = super().step(action)
        self.seen[:] = observation + 100 * self.task
        return self.seen, *rest


@pytest.mark.parametrize("parallel", [1, 3])
@pytest.mark.parametrize("execute, expected", [
    (None, [0, 10, 20, 30, 40, 50, 60]), (3, [0, 1, 2, 30, 31, 32, 60])])
def test_as_much_of_each_chunk_is_executed_as_asked(execute, expected, parallel):
    agent, world, steps = Acting(), Counting("counting"), []

    def reset(env, task, seed):
        Counting.reset(world, env, task, seed)
        env.seen[:] = 100 * task
        return env.seen, np.full(1, task)

    world.make, world.parallel, world.reset = Reusing, parallel, reset
    results = episodes.play(world, agent, 2, execute=execute, candidates=5, on_step=steps.append)
    assert results == {1: [(False, -3.5, 7)] * 2, 2: [(True, -3.5, 7)] * 2}
    assert sorted(actions for env in world.made for actions in env.actions) == [
        [1000 * task + action for action in expected] for task in (1, 1, 2, 2)]
    assert len(steps) == 28 and len(set(steps)) == 4 and len(world.made) == parallel
    assert sorted(agent.asked) == sorted(2 * math.ceil(7 / (execute or 1)) * [(1, 5), (2, 5)])


def test_episodes_are_repeatable_leave_training_noise_alone_and_stop():
    world = find_world("cube-single-play-v0")
    world.tasks = [4]
    torch.manual_seed(0)
    agent = mac.Agent(28, 5, world.columns, mac.Config(width=16, execute=10)).eval()
    state = torch.get_rng_state()

    def seen(seed):
        rows = []
        assert episodes.play(world, agent, 1, seed, stop=lambda: len(rows) == 40, on_step=lambda e:
                             rows.append([*e.observation, *e.goal])) is None and len(rows) == 40
        return rows

    first = seen(3)
    assert torch.equal(torch.get_rng_state(), state)
    assert seen(3) == first and not np.allclose(seen(4), first)


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
    assert [[success for success, *_ in results[task]] for task in (1, 2)] == [
        [True, False, None, True], [None] * 4]
    table = episodes.summarize(results)
    assert list(table["task1"].values()) == [0.5, 0.25, -3.5, 0, 7, 4]
    assert table["task2"]["success"] == 0 and table["overall"]["success"] == 0.25
    assert episodes.headline(table["overall"]) == "success 25% ± 15%"
    silent = episodes.summarize({1: [(None, 1.0, 5), (None, 3.0, 7)]})["overall"]
    assert silent["success"] is None and episodes.headline(silent) == "return 2 ± 0.71"

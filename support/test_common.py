"""What several test files share: equal circumstances, a world of one's own, one-line errors."""
import csv
import functools
import os
import pathlib
import signal

import numpy as np
import torch

import mac
from support import ogbench, worlds
from support.data import Trajectories
from support.episodes import World

HERE = pathlib.Path(mac.__file__).parent
# A shell starts its background jobs with signals ignored; what is tested here receives them.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
# Bits depend on the number of threads, and nets this small are not faster with two.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the programs that are started here,
os.environ["PYTHONPATH"] = str(HERE)  # and where they find mac.py

NET = ["--width", "16", "--batch-size", "8", "--device", "cpu"]
SINGLE = "cube-single-play-singletask-v0"


def read_csv(path):
    return list(csv.DictReader(path.read_text().splitlines()))


# One simulator per id for all tests: building one takes most of a short run's time.
build = functools.cache(lambda env_id: [ogbench.OGBench(env_id).make()])
ogbench.OGBench.envs = lambda self, count: build(self.env_id)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def failing(capsys, *command, status=2, main=mac.main):
    """Run a program in this process; -> its single line of error."""
    capsys.readouterr()
    assert main(list(command)) == status
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and error[0].startswith("error: "), error
    return error[0]


class CountingEnv:
    """Observes how many steps the episode has had; task 2 succeeds at the third, every episode ends
    with the seventh. Every environment keeps its actions, a list per episode."""

    def __init__(self):
        self.actions = []

    def step(self, action):
        self.steps += 1
        self.actions[-1].append(action.item())
        success = self.task == 2 and self.steps == 3
        return np.full(1, self.steps), -0.5, False, self.steps == 7, {"success": success}


class Counting(World):
    """A world of one's own: five episodes of counting, and CountingEnv."""

    knows, tasks, sizes, columns = staticmethod("counting".__eq__), [1, 2], (1, 1), [0]
    make = CountingEnv

    def reset(self, env, task, seed):
        env.task, env.steps = task, 0
        env.actions.append([])
        return np.zeros(1), np.full(1, task)

    def find(self, config):
        return "counted", "counting"

    def data(self, name, config):
        states = np.tile(np.arange(8, dtype=np.float32), 5)[:, None]
        counted = Trajectories(states, np.full((40, 1), 0.5, np.float32), np.arange(7, 40, 8),
                               np.zeros(40, np.float32), np.zeros(5, bool))
        return counted, counted


worlds.WORLDS.append(Counting)
COUNTING = ["--env", "counting", *NET, "--chunk", "3", "--eval-episodes", "1"]

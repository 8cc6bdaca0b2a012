"""A world and an outcome of your own: a point on a line that is to go to a place.

    python examples/world.py --env line --small --width 64 --chunk 5 --steps 1500
    python eval.py exp/line-seed0 --with examples/world.py
"""
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # where mac.py is
import mac
from support import worlds
from support.data import Trajectories
from support.episodes import World


class NearAgent(mac.Agent):
    """Success is to end near the goal. (By default it is to pass the very state of the data that
    was drawn as the goal.)"""

    def model_losses(self, batch):
        near = (batch.next_observation - batch.value_goal).abs()[:, 0] < 0.05
        return super().model_losses(batch._replace(success=near.float()))


class Point:
    """A simulator, with `step` as in gymnasium."""

    def step(self, action):
        self.place, self.left = self.place + 0.1 * action, self.left - 1
        near = abs(self.place[0] - self.goal[0]) < 0.05
        return self.place, 0.0, near, self.left == 0, {"success": near}


class Line(World):
    """What mac.py and eval.py ask of a world; support/episodes.py has the rest."""

    knows = "line".__eq__  # whether an id is one of this world
    tasks, sizes, columns = [1], (1, 1), [0]  # a goal is column 0 of an observation

    def make(self):
        return Point()

    def reset(self, env, task, seed):
        env.place, env.left = np.zeros(1), 50
        env.goal = np.random.default_rng(seed).uniform(-1, 1, 1)
        return env.place, env.goal

    def find(self, config):
        """-> the name of the data, for `data`, and a line that says where they come from"""
        return "walks", "random walks"

    def data(self, name, config):
        """-> Trajectories of training and of validation: 100 walks of 100 states each."""
        actions = np.random.default_rng(0).uniform(-1, 1, (2, 100, 10)).repeat(10, 2)
        places = np.float32(0.1 * (actions.cumsum(2) - actions))  # (2, 100, 100)
        ends, rewards = np.arange(99, 10_000, 100), np.zeros(10_000, np.float32)
        return [Trajectories(places[i].reshape(-1, 1), np.float32(actions[i]).reshape(-1, 1), ends,
                             rewards, np.zeros(100, bool)) for i in range(2)]


mac.AGENTS["flow"] = NearAgent  # by policy
worlds.WORLDS.append(Line)

if __name__ == "__main__":
    sys.exit(mac.main())

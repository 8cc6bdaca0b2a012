"""Worlds: the one that an id belongs to, and that of any gymnasium id with data of one's own."""
import functools
import pathlib

import numpy as np

from support import ogbench, recordings
from support.console import MacError, say
from support.episodes import World, faults, import_simulators

WORLDS = [ogbench.OGBench]  # asked in turn whether they know an id; add yours


def find_world(env_id, goal="task", data=""):
    """The world of an id, or of one's own `data`. Raises MacError."""
    for Kind in WORLDS:
        if Kind.knows(env_id):
            if data:
                raise MacError(f"--data: {env_id} has data of its own, see --dataset-dir")
            return Kind(env_id, goal)
    if data:
        return Gymnasium(env_id, goal, data)
    raise MacError(f"--env {env_id}: OGBench's ids are like cube-double-play-v0. Any other needs "
                   "--data, logged trajectories, or the file that defines it (eval.py --with FILE)")


class Gymnasium(World):
    """A task of one's own: logged data with rewards and, if gymnasium can make one of the id, a
    simulator. The agent's actions are in [-1, 1]; the recorded ones are in the simulator's box."""
    goal_conditioned, columns, pixels = False, [], 0

    @functools.cached_property
    def env(self):
        """The first environment; None, and no evaluations, if there is no such simulator."""
        if not self.env_id:
            return None
        _, gymnasium = import_simulators()
        with faults(self):
            try:
                return self.envs(1)[0]
            except (gymnasium.error.Error, ImportError) as error:
                say(f"WARNING: no evaluation: gymnasium cannot make {self.env_id!r} ({error})")

    @property
    def box(self):
        space = self.env and self.env.env.action_space
        return [space.low.tolist(), space.high.tolist()] if space else [-1, 1]

    @property
    def tasks(self):
        return [1] if self.env else []

    def make(self):
        _, gymnasium = import_simulators()
        env = gymnasium.make(self.env_id, **{"render_mode": "rgb_array"} if self.pixels else {})
        for space in (env.action_space, env.observation_space):
            if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1 or (
                    space is env.action_space and not space.is_bounded()):
                raise TypeError(f"its space {space} is not supported; flat Boxes are, of actions "
                                "bounded ones")
        if env.spec.max_episode_steps is None:
            say(f"{self.env_id} has no time limit: its episodes end after 10,000 steps")
            env = gymnasium.wrappers.TimeLimit(env, 10_000)
        return gymnasium.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))

    def reset(self, env, task, seed):
        observation, _ = env.reset(seed=seed)
        return observation, np.zeros(0)

    def find(self, config):
        return self.path, self.path

    def data(self, name, config):
        """-> training, validation: Trajectories. Raises MacError."""
        sizes = self.sizes if self.env else (None, None)
        return recordings.read_folder(pathlib.Path(self.path), sizes, *self.box)

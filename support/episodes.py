"""Episodes: what a world is, and episodes played in its simulators."""
import concurrent.futures
import contextlib
import itertools
import math
import os

import numpy as np
import torch

from support.console import MacError, Progress
from support.files import check


class World:
    """Where the tasks, the data and the simulator of an id come from. A world of your own also has
    `knows`, `tasks`, `columns`, `make`, `reset`, `find` and `data` (examples/world.py)."""
    goal_conditioned = True  # False: a reward fixes the task, goals have width 0
    scripted = False  # there are scripted policies to collect the data with
    parallel = 1  # environments that are stepped side by side, by threads
    family = ""  # the first word of OGBench's ids
    box = None  # [low, high] of the recorded actions, where they are rescaled to [-1, 1]
    pixels = 200  # side of a rendered image; set before the first environment is made

    def __init__(self, env_id, goal="task", data=""):
        self.env_id, self.goal, self.path, self.made = env_id, goal, data, []

    @property
    def env(self):
        """The first environment."""
        return self.envs(1)[0]

    @property
    def sizes(self):
        """O and A."""
        if not self.env:
            raise MacError(f"there is no simulator of {self.env_id!r}")
        return self.env.observation_space.shape[0], self.env.action_space.shape[0]

    def envs(self, count):
        """`count` environments; each is made once."""
        self.made += [self.make() for _ in range(count - len(self.made))]
        return self.made[:count]


def import_simulators():
    """-> ogbench, gymnasium; late, since importing this project starts nothing. Raises MacError."""
    # Without a choice dm_control looks for a display and warns when there is none.
    renderer = os.environ.setdefault("MUJOCO_GL", "disabled")
    import gymnasium
    try:
        import dm_control.mjcf  # noqa: F401 it loads the renderer, and so does mujoco
        import ogbench
    except Exception as error:  # mujoco raises many kinds if there is no such renderer
        raise MacError(f"OGBench does not start with MUJOCO_GL={renderer}: {error}") from error
    gymnasium.logger.min_level = gymnasium.logger.ERROR  # OGBench's action bounds are float64
    return ogbench, gymnasium


@contextlib.contextmanager
def faults(world):
    """What goes wrong in a simulator becomes a MacError, which says how to go on."""
    try:
        yield
    except Exception as error:
        raise MacError(f"the simulator of {world.env_id} failed ({type(error).__name__}: {error}); "
                       "mend it and --resume, or go on without evaluations (--eval-interval 0)"
                       ) from error


class Episode:
    """An episode under way, and the actions still to be executed of its current chunk."""

    def __init__(self, world, env, task, number, seed):
        self.world, self.env, self.task, self.number = world, env, task, number
        self.plan, self.reward, self.length, self.success, self.done = [], 0.0, 0, None, False
        state = np.random.SeedSequence((seed, task, number)).generate_state(1)
        with faults(world):
            observation, self.goal = world.reset(env, task, int(state[0]))
            self.observation = np.array(observation)  # a copy: simulators may use the array again

    def step(self):
        with faults(self.world):
            observation, reward, terminated, truncated, info = self.env.step(self.plan.pop(0))
            self.observation = np.array(observation)
            self.reward += float(np.asarray(reward).item())
            success = info.get("success", info.get("is_success"))  # the latter: stable-baselines3
        self.length += 1
        if success is not None:
            self.success = bool(self.success or success)
        self.done = terminated or truncated


def try_out(world, plays=True):
    """Make the simulator; reset and step it once if it `plays` later. Raises MacError."""
    for task in world.tasks[:int(plays)]:
        episode = Episode(world, world.env, task, 0, 0)
        first, episode.plan = episode.observation, [np.zeros(world.sizes[1], np.float32)]
        episode.step()
        for state in (first, episode.observation):
            with faults(world):
                check("the simulator", "observation", state, world.sizes[:1])


def play(world, agent, episodes, seed=0, execute=None, candidates=None,
         on_step=lambda episode: None, stop=lambda: False):
    """Run `episodes` episodes of every task. Each depends on (seed, task, episode) and the agent's
    noise alone, but in teleporting mazes. Environments that need a chunk share one call of `act`.
    Args: execute: actions of each chunk that are executed; candidates: N; on_step: called with
        each Episode after each of its steps; stop: asked before each step.
    Returns: {task: list of (success, return, length)}, or None after a stop; success is None in
        simulators that do not tell. Raises MacError."""
    execute = execute or agent.config.execute  # at most a whole chunk
    jobs = list(itertools.product(world.tasks, range(episodes)))
    generator = torch.Generator(agent.device).manual_seed(seed)
    results = {task: [] for task in world.tasks}
    bar = Progress(total=len(jobs), desc="playing", unit=" episodes", leave=False)
    with bar, concurrent.futures.ThreadPoolExecutor() as threads:
        envs = world.envs(min(world.parallel, len(jobs)))
        step_all = threads.map if world.parallel > 1 else map  # some bear one thread only
        active = [Episode(world, env, *jobs.pop(0), seed) for env in envs]
        while active and not stop():
            idle = [episode for episode in active if not episode.plan]
            if idle:
                chunks = agent.act(np.stack([e.observation for e in idle]),
                                   np.stack([e.goal for e in idle]), candidates, generator)
                for episode, chunk in zip(idle, chunks):
                    episode.plan = list(chunk[:execute])
            list(step_all(Episode.step, active))
            for i, episode in enumerate(active):
                on_step(episode)
                if episode.done:
                    results[episode.task].append((episode.success, episode.reward, episode.length))
                    active[i] = Episode(world, episode.env, *jobs.pop(0), seed) if jobs else None
                    bar.update()
            active = [episode for episode in active if episode]
    return None if active else results


def summarize(results):
    """{task: list of (success, return, length)} -> {"task1": row, ..., "overall": row} of means and
    standard errors. Success is None if no episode tells; if one does, the others had none."""
    rows = {f"task{task}": episodes for task, episodes in results.items()}
    rows["overall"] = sum(results.values(), [])
    known = any(success is not None for success, *_ in rows["overall"])
    table = {}
    for name, episodes in rows.items():
        success, total, length = zip(*episodes)
        rate = float(np.mean([bool(one) for one in success])) if known else None
        stderr = math.sqrt(rate * (1 - rate) / len(episodes)) if known else None
        table[name] = {"success": rate, "stderr": stderr, "return": float(np.mean(total)),
                       "return_stderr": float(np.std(total)) / math.sqrt(len(episodes)),
                       "length": float(np.mean(length)), "episodes": len(episodes)}
    return table


def headline(row):
    """A row of `summarize` in a few words."""
    if row["success"] is None:
        return f"return {row['return']:.5g} ± {row['return_stderr']:.2g}"
    return f"success {row['success']:.0%} ± {row['stderr']:.0%}"

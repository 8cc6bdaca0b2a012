"""OGBench: its ids, goals, simulator and files, and its play data, collected here."""
import functools
import http.client
import io
import itertools
import pathlib
import re
import socket
import tempfile
import zipfile

import numpy as np

from support.console import MacError, home, say
from support.data import data_files, flat_data
from support.episodes import World, import_simulators
from support.files import DAMAGE, check, in_processes, lock, read_arrays, write
from support.recordings import join, read_episodes

# The ids of state-based tasks. Which simulators there are, gymnasium says.
ID = re.compile(r"(cube|scene|puzzle|pointmaze|antmaze|humanoidmaze|antsoccer)(-\w+)?-"
                r"(play|noisy|navigate|stitch|explore)(-oraclerep|-singletask(-task[1-5])?)?-v0")
PLAY_NOISE, SHARD = 0.1, 100  # noise on the policies' plans in OGBench's data; episodes in a file
FLAGS = ("terminals", "timeouts", "truncations", "terminations", "dones")  # any ends a trajectory


class OGBench(World):
    """The tasks of an OGBench id. A goal is either the coordinates of an observation that the task
    is about ("task": the paper's; OGBench says oraclerep) or all of them ("observation")."""
    knows, parallel = ID.fullmatch, 5  # MuJoCo releases the interpreter while it steps

    def __init__(self, env_id, goal="task", data=""):
        super().__init__(env_id, goal)
        self.family, self.scripted = env_id.split("-")[0], "-play-" in env_id
        self.goal_conditioned = "singletask" not in env_id
        self.dataset = re.sub(r"-(singletask|oraclerep|task\d)", "", env_id)  # cube-double-play-v0
        if goal != "task" and env_id != self.dataset:
            raise MacError(f"--goal {goal}: {env_id} has no such goals; take {self.dataset}")

    @functools.cached_property
    def tasks(self):
        if self.goal_conditioned:
            return list(range(1, self.env.unwrapped.num_tasks + 1))
        self.env.reset()
        return [self.env.unwrapped.cur_task_id]

    @property
    def columns(self):
        """The coordinates of an observation that make it a goal; none without goals."""
        end = self.sizes[0]
        if not self.goal_conditioned:
            return []
        if self.goal == "observation":
            return list(range(end))
        if self.family == "cube":  # 19 of the arm, then 9 a cube, position first
            return [column for cube in range(19, end, 9) for column in range(cube, cube + 3)]
        return {"scene": [19, 20, 21, 29, 33, 36, 38],  # cube, two buttons, drawer, window
                "puzzle": list(range(20, end, 4)),  # whether each button is on
                "antsoccer": [15, 16]}.get(self.family, [0, 1])  # the ball; the ant itself

    def make(self):
        ogbench, gymnasium = import_simulators()
        try:
            env = ogbench.make_env_and_datasets(self.env_id, env_only=True, width=self.pixels,
                                                height=self.pixels)
        except gymnasium.error.Error as error:  # it names the nearest id
            raise MacError(f"--env {self.env_id}: {error}") from error
        base = env.unwrapped  # at a reset it draws actions from a space built, unseeded, each time
        base.__class__ = type("Seeded", (type(base),), {"action_space": base.action_space})
        return env

    def reset(self, env, task, seed):
        """Begin a task -> observation (O,), goal (G,) or the whole goal observation (O,)."""
        env.unwrapped.action_space.seed(seed)
        np.random.seed(seed)  # mazes draw the noise of a start from NumPy's global stream
        observation, info = env.reset(seed=seed, options={"task_id": task})
        return observation, info["goal"] if self.goal_conditioned else np.zeros(0)

    def find(self, config):
        """Collect the data set if `config.collect` says so; else take the file in the dataset
        folder, or download or collect it. -> name in that folder, source. Raises MacError."""
        folder, episodes = home(config.dataset_dir, "--dataset-dir"), config.collect
        path = folder / f"{self.dataset}.npz"
        (first, *_), (beside, *_) = data_files(path)
        advice = f"put {first.name} and {beside.name} into {folder}"
        if not episodes and first.exists() != beside.exists():
            raise MacError(f"one of two files is missing: {advice}")
        if not episodes and not first.exists():
            try:
                download(self.dataset, folder)
            except (*DAMAGE, http.client.HTTPException) as error:
                reason = f"the download of {self.dataset} failed ({error})"
                if not self.scripted:
                    raise MacError(f"{reason}; {advice}") from error
                episodes = 1000  # as many as OGBench has
                say(f"WARNING: {reason}\nWARNING: using {episodes} episodes collected with "
                    "OGBench's scripted policies instead (--collect N for another number)")
        if episodes:
            noise = config.collect_noise
            suffix = f"-collected{episodes}" + f"-noise{noise}" * (noise != PLAY_NOISE)
            path = path.with_stem(self.dataset + suffix)
            collect(path, self.dataset.replace("-play", ""), episodes, noise)
        source = f"{episodes} episodes of OGBench's scripted policies" if episodes else "OGBench"
        return path.name, f"{source} ({path.stem})"

    def data(self, name, config):
        """-> training, validation: Trajectories of what `find` named. Raises MacError."""
        path = home(config.dataset_dir, "--dataset-dir") / name
        rewards = "goals" if self.goal_conditioned else self.env_id  # rewards are of one task
        return flat_data(path, rewards, self.read, config)

    def read(self, path):
        """One of OGBench's files, checked. -> Trajectories. Raises MacError."""
        widths = dict(zip(("observations", "actions"), self.sizes))
        if not self.goal_conditioned:  # OGBench makes the rewards of the simulator's states
            widths["qpos"] = self.env.unwrapped.model.nq
            if self.family in ("scene", "puzzle"):
                widths["button_states"] = {"scene": 2}.get(self.family, (self.sizes[0] - 19) // 4)
        arrays = read_arrays(path, (*widths, *FLAGS))[""]
        flags = [key for key in FLAGS if key in arrays] or FLAGS[:1]
        for key in (*widths, *flags):
            if key not in arrays:
                raise MacError(f"{path}: has no array {key!r}")
        rows = len(np.atleast_1d(arrays["observations"]))
        for key in widths:
            arrays[key] = check(path, key, arrays[key], (rows, widths[key]))
        ends = [check(path, key, arrays.pop(key), (rows,)) for key in flags]
        arrays.update(rewards=np.zeros(rows, np.float32), timeouts=np.any(ends, axis=0))
        if not self.goal_conditioned:
            from ogbench.relabel_utils import relabel_dataset
            relabel_dataset(self.env_id, self.env, arrays)
        return join(read_episodes(path, arrays, *self.sizes))


def download(name, folder):
    """OGBench's own download, but a file gets its final name only if its zip checksums hold."""
    ogbench, _ = import_simulators()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
        socket.setdefaulttimeout(30)  # seconds without a byte
        ogbench.download_datasets([name], temporary)
        files = sorted(pathlib.Path(temporary).iterdir())
        if any(zipfile.ZipFile(file).testzip() for file in files):
            raise zipfile.BadZipFile("it arrived damaged")
        for file in files:
            file.replace(folder / file.name)


def collect(path, simulator, episodes, noise=PLAY_NOISE):
    """Collect training episodes, and a tenth as many for validation: the shards `path` lacks."""
    targets = {}  # file: seeds of its episodes
    for begin in range(0, episodes, SHARD):
        end = min(begin + SHARD, episodes)
        stem = f"{path.stem}-{begin // SHARD:03}"
        targets[path.with_stem(f"{stem}-val")] = [
            (0, 0, e) for e in range(begin // 10, max(end, begin + 10) // 10)]
        targets[path.with_stem(stem)] = [(0, 1, e) for e in range(begin, end)]
    if path.exists() or all(file.exists() for file in targets):
        return  # without waiting for a process that collects other data here
    with lock(path.parent, wait=True):  # a second process would collect the same
        targets = {file: seeds for file, seeds in targets.items() if not file.exists()}
        seeds = sum(targets.values(), [])
        collected = in_processes(functools.partial(collect_episode, simulator, noise), seeds,
                                 f"collecting {simulator}", " episodes")
        for file, seeds in targets.items():
            parts, buffer = list(itertools.islice(collected, len(seeds))), io.BytesIO()
            np.savez_compressed(buffer, **{
                key: np.concatenate([part[key] for part in parts]) for key in parts[0]})
            write(file, buffer.getbuffer())


def collect_episode(simulator, noise, seeds):
    """An episode of play -> dict of arrays (1001, ...), which depend on the arguments alone."""
    for attempt in range(100):
        data = run_oracle(simulator, noise, np.random.SeedSequence((*seeds, attempt)))
        _, y, z = data["qpos"][:, 14:17].T
        seen = (y < 0.29) & ((y > -0.3) | ((z >= 0.06) & (z <= 0.08)))  # or in the drawer
        if "scene" not in simulator or seen.all():  # as in OGBench's data
            return data
    raise MacError("100 episodes in a row lost the cube from view")


@functools.cache
def oracle_env(simulator, noise):
    """The environment in data collection mode and its oracle for each kind of task."""
    _, gymnasium = import_simulators()
    from ogbench.manipspace.oracles.plan import button_plan, cube_plan, drawer_plan, window_plan

    env = gymnasium.make(simulator, mode="data_collection", terminate_at_goal=False,
                         max_episode_steps=1001)
    given = {"env": env, "noise": noise, "noise_smoothing": 0.5}
    closed = {"gripper_always_closed": "puzzle" in simulator}
    return env, {"cube": cube_plan.CubePlanOracle(**given),
                 "button": button_plan.ButtonPlanOracle(**closed, **given),
                 "drawer": drawer_plan.DrawerPlanOracle(**given),
                 "window": window_plan.WindowPlanOracle(**given)}


def run_oracle(simulator, noise, seed_sequence):
    """One episode -> dict of arrays. The oracles draw from NumPy's global stream: seeded too."""
    env, oracles = oracle_env(simulator, noise)
    env_seed, np_seed = map(int, seed_sequence.generate_state(2))
    np.random.seed(np_seed)
    observation, info = env.reset(seed=env_seed)
    # How often cubes are stacked varies by episode and with the number of cubes.
    bounds = {"single": (0, 0), "double": (0, 0.25), "triple": (0.05, 0.35),
              "quadruple": (0.1, 0.5), "octuple": (0, 0.35)}
    stacking = np.random.uniform(*bounds.get(simulator.split("-")[1], (0.5, 0.5)))
    oracle = oracles[info["privileged/target_task"]]
    oracle.reset(observation, info)
    rows, done = [], False
    while not done:
        action = np.clip(oracle.select_action(observation, info), -1, 1)
        next_observation, _, terminated, truncated, info = env.step(action)
        done = terminated or truncated
        rows.append({"observations": observation, "actions": action, "terminals": done,
                     **{key[5:]: info[key] for key in info if key.startswith("prev_")}})
        if oracle.done:
            new_observation, new_info = env.unwrapped.set_new_target(p_stack=stacking)
            oracle = oracles[new_info["privileged/target_task"]]
            oracle.reset(new_observation, new_info)
        observation = next_observation
    types = {"terminals": bool, "button_states": np.int64}
    return {k: np.array([row[k] for row in rows], types.get(k, np.float32)) for k in rows[0]}

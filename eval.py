"""The world of MAC: simulators, the data that can be had from them, episodes, reports. mac.py takes
from here what training needs; run as a program it evaluates run folders:

    python eval.py exp/<run>                                  # success, return, length per task
    python eval.py exp/<run> --candidates 1                   # the cloned behaviour, without Q
    python eval.py exp/<run> --video out.gif                  # watch it (needs EGL or a display)
    python eval.py exp/<run> --plot                           # learning curve, from the CSV files
    python eval.py exp/<run1> exp/<run2> --model-error --plot # Figures 2 and 8 of the paper

To play needs the run folder alone, --plot its CSV files; the rest needs the dataset, too.
"""
import argparse
import concurrent.futures
import contextlib
import csv
import difflib
import fcntl
import functools
import http.client
import io
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import warnings
import zipfile
import zlib
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

# ----------------------------------------------------- what both programs need of a command line

class MacError(Exception):
    """A mistake of the user or a broken file: one line, exit status 2, nothing overwritten."""

    def __init__(self, message, status=2):
        super().__init__(message)
        self.status = status


def command(main):
    """`main(argv)` as a program: whatever the user has to know is one line, with a status."""
    @functools.wraps(main)
    def program(argv=None):
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")  # of a terminal that cannot print a ±
        try:
            return main(sys.argv[1:] if argv is None else argv) or 0
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            return 130
        except (MacError, OSError, MemoryError, RuntimeError) as error:
            text = str(error)
            if isinstance(error, RuntimeError) and not re.search("(out of|allocate) memory", text):
                raise
            if getattr(error, "filename", None):
                text = f"cannot use {error.filename}: {error.strerror}"
            print("error:", " ".join(text.split()), file=sys.stderr)
            return getattr(error, "status", 2)
    return program


def say(*words):
    """Print at once, above a progress bar. A reader that has gone (`| head`, a closed terminal)
    ends the printing, not the run."""
    try:
        tqdm.write(" ".join(words))
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Parser(argparse.ArgumentParser):
    """Underscores in flags are as good as dashes; a mistake is a MacError, which is one line."""

    def parse_args(self, argv):
        return super().parse_args([re.sub("^--[^=]+", lambda flag: flag[0].replace("_", "-"), word)
                                   for word in argv])

    def error(self, message):
        raise MacError(f"{message} (--help lists the flags)")


def number(kind, low, high=math.inf):
    """An argparse type: `kind` from `low` to `high`, which infinity is not."""
    def convert(text):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if low <= value <= high and value != math.inf:
                return value
        limit = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
        raise argparse.ArgumentTypeError(f"{text!r} is not a number ({kind.__name__}) {limit}")
    return convert


def home(text, flag):
    """A path that may begin with ~, from `flag`."""
    try:
        return pathlib.Path(text).expanduser()
    except RuntimeError as error:
        raise MacError(f"there is no home folder for {text}: set {flag}") from error


def lock(folder, name=".lock", wait=False):
    """Make the folder and hold it for this process; refuse or wait while another one does."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / name, "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            raise MacError(f"another process is training in {folder}") from None
        say(f"waiting for another process to end its work in {folder}")
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        pass  # a file system without locks
    for leftover in folder.glob(".*.tmp"):  # of a write that was killed
        leftover.unlink(missing_ok=True)
    return file


def write(path, data, keep=None):
    """Make `data` (bytes) the file at `path`, whole or not at all; what was there is first renamed
    to `keep`, if that is given. Raises MacError."""
    path = pathlib.Path(path).resolve()  # through a link: the link stays
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except OSError as error:
        raise MacError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_npz(path, arrays):
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write(path, buffer.getbuffer())


# -------------------------------------------------------------------------------------- worlds
# A world is where an id's tasks, data and episodes come from. WORLDS are asked in turn whether they
# `knows` an id; what the programs then use of a world are the members of OGBench.

# The state-based datasets that OGBench publishes or has scripted policies for.
DATASETS = [
    "cube-single,double,triple,quadruple-play,noisy", "cube-octuple-play", "scene-play,noisy",
    "puzzle-3x3,4x4,4x5,4x6-play,noisy", "pointmaze-medium,large,giant,teleport-navigate,stitch",
    "antmaze-medium,large,giant,teleport-navigate,stitch", "antmaze-medium,large,teleport-explore",
    "humanoidmaze-medium,large,giant-navigate,stitch", "antsoccer-arena,medium-navigate,stitch"]
PLAY_NOISE = 0.1  # on the plans of the policies that made its play data
VARIANTS = ["", "-oraclerep", "-singletask", *(f"-singletask-task{i}" for i in range(1, 6))]
OGBENCH_IDS = {"-".join(words) + variant + "-v0" for pattern in DATASETS for variant in VARIANTS
               for words in itertools.product(*(part.split(",") for part in pattern.split("-")))}


class Trajectories(NamedTuple):
    """Logged trajectories, laid end to end."""

    observations: np.ndarray  # (T, O); this and what follows float32
    actions: np.ndarray  # (T, A) in [-1, 1]; that of a trajectory's last state is never used
    ends: np.ndarray  # (K,) int64 index of each trajectory's last state, ascending
    rewards: np.ndarray  # (T,) of the actions; zeros where goals take their place
    terminated: np.ndarray  # (K,) where the task ended in that state, not just the recording
    limits: np.ndarray = None  # (2, O) minimum and maximum of the observations, where known


def find_world(env_id, goal="task", data=""):
    """The world of an id, or of one's own `data`. Raises MacError, with the nearest known ids."""
    for World in WORLDS:
        if World.knows(env_id):
            if data:
                raise MacError(f"--data: {env_id} has data of its own, see --dataset-dir")
            return World(env_id, goal)
    if data:
        return Gymnasium(env_id, data)
    near = difflib.get_close_matches(env_id, sorted(OGBENCH_IDS), 3, 0.4) or ["cube-double-play-v0"]
    raise MacError(f"--env: OGBench has no task {env_id!r}; did you mean {' or '.join(near)}? Any "
                   "other environment needs --data, logged trajectories of it")


def import_ogbench():
    """OGBench and gymnasium, imported late: reading this file as a module starts nothing."""
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


class OGBench:
    """The tasks of an OGBench id. With goal "task" a goal is those coordinates of the goal
    observation that the task is about (the paper's goals, which OGBench calls oraclerep), with
    "observation" all of them."""

    knows = OGBENCH_IDS.__contains__
    pixels = 200  # of a rendered image's side
    cache_dir = ""  # of the flat files; else they lie beside the data
    collect_noise = PLAY_NOISE  # of the scripted policies' plans

    def __init__(self, env_id, goal="task"):
        self.env_id, self.goal, self.family = env_id, goal, env_id.split("-")[0]
        self.fixed = "singletask" in env_id  # a reward fixes the task: there are no goals
        self.scripted = "-play-" in env_id  # OGBench has policies to collect the data with
        self.dataset = re.sub(r"-(singletask|oraclerep|task\d)", "", env_id)  # cube-double-play-v0
        if "oraclerep" in env_id and goal != "task":
            raise MacError(f"--goal {goal}: {env_id} has task goals; take {self.dataset}")

    def __reduce__(self):  # a process that this is sent to makes its own environment
        return one_world, (type(self), self.env_id, self.goal)

    @functools.cached_property
    def env(self):
        """One environment, which takes a second to build."""
        return self.make()

    @property
    def sizes(self):
        """O and A."""
        return self.env.observation_space.shape[0], self.env.action_space.shape[0]

    @functools.cached_property
    def tasks(self):
        if self.fixed:
            self.env.reset()
            return [self.env.unwrapped.cur_task_id]
        return list(range(1, self.env.unwrapped.num_tasks + 1))

    @property
    def columns(self):
        """The coordinates of an observation that make it a goal; none where the task is fixed."""
        end = self.sizes[0]
        if self.fixed:
            return []
        if self.goal == "observation":
            return list(range(end))
        if self.family == "cube":  # 19 of the arm, then 9 a cube, position first
            return [column for cube in range(19, end, 9) for column in range(cube, cube + 3)]
        return {"scene": [19, 20, 21, 29, 33, 36, 38],  # cube, two buttons, drawer, window
                "puzzle": list(range(20, end, 4)),  # whether each button is on
                "antsoccer": [15, 16]}.get(self.family, [0, 1])  # the ball; the ant itself

    def make(self):
        """An environment whose `reset` can be seeded: OGBench draws a few actions from an action
        space that it builds, unseeded, at each access, so here it is built once."""
        ogbench, _ = import_ogbench()
        env = ogbench.make_env_and_datasets(self.env_id, env_only=True, width=self.pixels,
                                            height=self.pixels)
        base = env.unwrapped
        base.__class__ = type("Seeded", (type(base),), {"action_space": base.action_space})
        return env

    def reset(self, env, task, seed):
        """Begin a task -> observation (O,), goal (G,) or whole goal observation (O,)."""
        env.unwrapped.action_space.seed(seed)
        np.random.seed(seed)  # mazes draw the noise of a start from NumPy's global stream
        observation, info = env.reset(seed=seed, options={"task_id": task})
        return observation, np.zeros(0) if self.fixed else info["goal"]

    def find(self, folder, collect, obtain=True):
        """The data set, a path for `data_files`: the collected one if `collect` says how many
        episodes, else OGBench's, which is downloaded or, failing that, collected too. Without
        `obtain` only what is in the folder already.
        -> path, where the data came from in a line, and the number of collected episodes."""
        name = f"{self.dataset}-collected{collect}" if collect else self.dataset
        if collect and self.collect_noise != PLAY_NOISE:
            name += f"-noise{self.collect_noise}"
        path = folder / f"{name}.npz"
        if folder.exists() and not folder.is_dir():
            raise MacError(f"--dataset-dir {folder}: that is a file")
        if obtain and collect:
            collect_data(path, self.dataset.replace("-play", ""), collect, noise=self.collect_noise)
        (first, *more), (beside, *_) = data_files(path)
        if first != path and not beside.exists():
            raise MacError(f"{first}: {beside.name} is not beside it, nor any other like it")
        if obtain and not collect and not (first.exists() and beside.exists()):
            try:
                download(self.dataset, folder)
            except (*DAMAGE, http.client.HTTPException) as error:
                reason = f"the download of {self.dataset} failed ({error})"
                if first.exists() or beside.exists() or not self.scripted:
                    raise MacError(f"{reason}; put {path.name} and {beside.name} into {folder}"
                                   ) from error
                say(f"WARNING: {reason}\nWARNING: using {COLLECTED_EPISODES} episodes collected "
                    "with OGBench's scripted policies instead (--collect N for another number)")
                return self.find(folder, COLLECTED_EPISODES)
        shown = f"{first.name} to {more[-1].name}" if more else first.name
        return path, (f"{collect} episodes collected with OGBench's scripted policies"
                      if collect else "OGBench's file") + f" ({shown})", collect

    def data(self, path):
        """Training and validation data. -> a pair of Trajectories"""
        return flat_data(self, path)

    def arrays(self, path):
        """A data file, checked. -> Trajectories"""
        observation, action = self.sizes
        widths = {"observations": observation, "actions": action}
        if self.fixed:  # OGBench makes the rewards of the simulator's states
            widths["qpos"] = self.env.unwrapped.model.nq
            if self.family in ("scene", "puzzle"):
                widths["button_states"] = {"scene": 2}.get(self.family, (observation - 19) // 4)
        data, ends = read_data(path, widths)
        if self.fixed:
            from ogbench.relabel_utils import relabel_dataset
            relabel_dataset(self.env_id, self.env, data)
        observations = data["observations"]
        nothing = np.zeros(len(observations), np.float32)  # takes no memory until written
        return Trajectories(observations, data["actions"], ends, data.get("rewards", nothing),
                            np.zeros(len(ends), bool),
                            np.stack([observations.min(0), observations.max(0)]))


@functools.cache
def one_world(World, env_id, goal):
    """A world in a process that reads many files: an environment takes a second to build."""
    return World(env_id, goal)


WORLDS = [OGBench]


class Gymnasium:
    """A task of one's own: logged data with rewards (`read_episodes`), and the simulator that
    gymnasium makes of the id. Without one there are no evaluations. The agent's actions are in
    [-1, 1] also where the simulator's are not: they are rescaled here, both ways."""

    fixed, scripted, family, columns, pixels = True, False, "gymnasium", [], 0

    def __init__(self, env_id, data):
        self.env_id, self.path = env_id, pathlib.Path(data)

    @functools.cached_property
    def env(self):
        """One environment; None if there is no such simulator."""
        if not self.env_id:
            return None
        _, gymnasium = import_ogbench()
        try:
            return self.make()
        except (gymnasium.error.Error, ImportError) as error:
            say(f"WARNING: no evaluation, for gymnasium cannot make {self.env_id!r} ({error})")

    @functools.cached_property
    def sizes(self):
        """O and A."""
        if self.env:
            return self.env.observation_space.shape[0], self.env.action_space.shape[0]
        training, _ = self.data(self.path)
        return training.observations.shape[1], training.actions.shape[1]

    @property
    def tasks(self):
        return [1] if self.env else []

    def make(self):
        _, gymnasium = import_ogbench()
        film = {"render_mode": "rgb_array"} if self.pixels else {}
        env = gymnasium.make(self.env_id, **film)
        for name, space in (("observation", env.observation_space), ("action", env.action_space)):
            if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1 or (
                    name == "action" and not space.is_bounded()):
                raise MacError(f"--env {self.env_id}: its {name} space is {space}; only flat Box "
                               "spaces, bounded ones of actions, are supported")
        return gymnasium.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))

    def reset(self, env, task, seed):
        observation, _ = env.reset(seed=seed)
        return observation, np.zeros(0)

    def find(self, folder, collect, obtain=True):
        return self.path, str(self.path), 0

    def data(self, path):
        """A file, or all .npz, .hdf5 and .h5 files of a folder; a tenth of the episodes, at least
        one, is validation, the same ones each time."""
        sizes, box = (None, None), (-1, 1)
        if self.env:
            sizes, box = self.sizes, (self.env.env.action_space.low, self.env.env.action_space.high)
        files, episodes = [path], []
        if path.is_dir():
            inside = *path.iterdir(), *(path / "data").glob("*")  # where Minari puts its own
            files = sorted(file for file in inside if file.suffix in (".npz", ".hdf5", ".h5"))
        for file in files:
            episodes += read_episodes(file, *sizes, *box)
            sizes = episodes[0][0].shape[1], episodes[0][1].shape[1]
        if len(episodes) < 2:
            raise MacError(f"{path}: {len(episodes)} episodes (.npz, .hdf5 or .h5); there must be "
                           "at least two, one of them for validation")
        order = np.random.default_rng(0).permutation(len(episodes))
        validation, training = np.split(order, [max(1, len(order) // 10)])
        return [join([episodes[i] for i in sorted(part)]) for part in (training, validation)]


# ------------------------------------------------------------------------------- data: files

# What reading a damaged .npz raises: its zip checksums are verified while it is read.
DAMAGE = (OSError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError)
END_KEYS = ("terminals", "timeouts", "truncations", "terminations", "dones")


def validation_file(path):
    """OGBench's name of the file of validation episodes beside a training file."""
    return path.with_name(path.name.replace(".npz", "-val.npz"))


def data_files(path):
    """The training files of the data set `path`, which are it or, where there is no such file, its
    shards <stem>-000.npz and so on, and the '-val' siblings of these. -> two lists, not empty"""
    shards = [file for file in sorted(path.parent.glob(f"{path.stem}-*.npz"))
              if re.fullmatch(r"-\d+", file.stem[len(path.stem):])]
    training = [path] if path.exists() or not shards else shards
    validation = [validation_file(file) for file in training]
    return training, [file for file in validation if file.exists()] or validation[:1]


def download(name, folder):
    """OGBench's own download, into a temporary folder: it renames a short file without
    complaint, so only a file whose zip checksums hold gets its final name."""
    ogbench, _ = import_ogbench()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
        socket.setdefaulttimeout(30)  # seconds without a byte; no other socket is opened here
        ogbench.download_datasets([name], temporary)
        files = sorted(pathlib.Path(temporary).iterdir())
        for file in files:
            if zipfile.ZipFile(file).testzip():
                raise zipfile.BadZipFile(f"{file.name} arrived damaged")
        for file in files:
            if not (folder / file.name).exists():  # what is there stays
                os.replace(file, folder / file.name)


def read_npz(path, names=()):
    """The arrays of an .npz file: those of `names` that it has, or all. Raises MacError."""
    name = "it"
    try:
        with np.load(path) as file:
            arrays = {}
            for name in [name for name in names or file if name in file]:
                arrays[name] = file[name]
            return arrays
    except OSError as error:
        raise MacError(f"cannot read {path}: {error.strerror or error}") from error
    except (*DAMAGE, ValueError, TypeError, RuntimeError) as error:  # of a flag: "encrypted"
        reason = str(error).split(". ")[0]  # without numpy's advice to unpickle it
        raise MacError(f"{path} is damaged or not such a file: {name} cannot be read ({reason}); "
                       "put a good copy in its place") from error


def numbers(path, key, array, shape, low=-np.inf, high=np.inf):
    """`array` as float32. Raises MacError, which names the file, the key and the index, unless it
    holds numbers of that shape (None: of any length) between `low` and `high`."""
    if array.dtype.kind not in "fiub" or len(array.shape) != len(shape) or any(
            asked not in (None, given) for asked, given in zip(shape, array.shape)):
        asked = str(shape).replace("None", "any")
        raise MacError(f"{path}: {key} has shape {array.shape} and type {array.dtype}; this "
                       f"environment and the other arrays ask for numbers, {asked}")
    with np.errstate(over="ignore"):  # what is too large for it is infinite
        array = array.astype(np.float32, copy=False)
    if array.size and not np.all((low < array.min(0)) & (array.max(0) < high)):
        index = tuple(np.argwhere(~((low < array) & (array < high)))[0].tolist())
        low, high = (np.broadcast_to(limit, array.shape)[index] for limit in (low, high))
        raise MacError(f"{path}: {key}{list(index)} is {array[index]} as float32, not a number "
                       f"between {low:g} and {high:g}")
    return array


def read_data(path, widths):
    """The arrays of a data file whose names and columns are `widths`, as float32, and the index of
    each trajectory's last state. Raises MacError."""
    arrays = read_npz(path, [*widths, *END_KEYS])
    ends = [key for key in END_KEYS if key in arrays]
    for key in [*widths, *(ends or END_KEYS[:1])]:
        if key not in arrays:
            raise MacError(f"{path}: has no array {key!r}")
    rows = arrays["observations"].shape[:1]
    for key, array in arrays.items():
        shape = (*rows, widths[key]) if key in widths else rows
        limit = 1.1 if key == "actions" else np.inf
        arrays[key] = numbers(path, key, array, shape, -limit, limit)
    end = np.flatnonzero(np.any([arrays.pop(key) for key in ends], axis=0))
    if not len(end) or end[-1] + 1 != rows[0]:
        raise MacError(f"{path}: {ends[0]}[{rows[0] - 1}] is not set: the last trajectory is cut "
                       "off")
    return arrays, end


# --------------------------------------------------------------------------- data: flat files

def flat_data(world, path):
    """The data set `path`, memory-mapped: reading its compressed files takes 6 s per million rows,
    and memory may not hold them. So they are read once, checked, and laid down as flat .npy files
    in a folder whose name stands for their names, sizes and times.
    -> Trajectories of training and validation. Raises MacError, also where there is no room."""
    place, result = path.parent / "flat" / path.stem, []
    if world.cache_dir:  # which may serve several folders
        place = home(world.cache_dir, "--cache-dir").joinpath(*path.parent.resolve().parts[1:],
                                                              path.stem)
    rewards = f"rewards-{world.env_id}"
    shapes = {name: (size,) for name, size in zip(("observations", "actions"), world.sizes)}
    shapes.update({rewards: ()} if world.fixed else {})
    # Read-only, and nobody writes: of a private, writable map all would have to fit in memory.
    warnings.filterwarnings("ignore", "The given NumPy array is not writable")
    for split, files in zip(("training", "validation"), data_files(path)):
        status = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        folder = place / f"{split}-{zlib.crc32(repr(status).encode()):08x}"
        if missing(folder, files, shapes):
            try:
                with lock(place, wait=True):  # a second process would lay down the same
                    lay_down(world, folder, files, shapes)
            except OSError as error:
                raise MacError(f"cannot lay the data down in {place}: {error.strerror or error}; "
                               "--cache-dir names another place") from error
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in shapes}
        ends, limits, total = [], [], len(arrays["actions"])
        for file in files:
            mark = json.loads(mark_of(folder, file, "observations").read_text())
            ends += [end + (ends[-1] + 1 if ends else 0) for end in mark["ends"]]
            limits.append(mark["limits"])
        limits = np.array(limits, np.float32)
        nothing = np.broadcast_to(np.float32(0), total)
        result.append(Trajectories(
            arrays["observations"], arrays["actions"], np.array(ends), arrays.get(rewards, nothing),
            np.zeros(len(ends), bool), np.stack([limits[:, 0].min(0), limits[:, 1].max(0)])))
    return result


def mark_of(folder, file, name):
    """The file that is there once array `name` of `file` is: its trajectories' ends, and minima and
    maxima of its observations."""
    return folder / f"{file.name}-{name}.json"


def missing(folder, files, shapes):
    """-> {file: names of its arrays that are not in `folder` yet}"""
    names = {file: [name for name in shapes if not (folder / f"{name}.npy").exists()
                    or not mark_of(folder, file, name).exists()] for file in files}
    return {file: names for file, names in names.items() if names}


def lay_down(world, folder, files, shapes):
    """Put what is missing of `files` into `folder`, over all cores."""
    for old in folder.parent.glob(folder.name[:-8] + "?" * 8):  # of files as they were
        if old != folder:
            shutil.rmtree(old, ignore_errors=True)  # a run that has mapped it keeps it
    folder.mkdir(exist_ok=True)
    rows = [max((array.size for array in read_npz(file, END_KEYS).values()), default=0)
            for file in files]  # `read_data` compares the other arrays
    begins, needed = dict(zip(files, np.cumsum([0, *rows]).tolist())), 0
    for name, shape in shapes.items():
        array, temporary = folder / f"{name}.npy", folder.parent / f".{name}.tmp"
        if not array.exists():  # it takes no room before it is written
            for file in files:  # of an array that somebody has removed
                mark_of(folder, file, name).unlink(missing_ok=True)
            np.lib.format.open_memmap(temporary, "w+", np.float32, (sum(rows), *shape))
            os.replace(temporary, array)
        needed += max(0, array.stat().st_size - 512 * array.stat().st_blocks)
    jobs = [(world, file, folder, begins[file] - sum(rows), names)
            for file, names in missing(folder, files, shapes).items()]
    free = shutil.disk_usage(folder).free
    say(f"laying {len(jobs)} of {len(files)} files down in {folder}: this takes "
        f"{needed / 1e9:.3g} of the {free / 1e9:.3g} GB that are free")
    if needed > free:
        raise OSError("No space left on device")
    shard = 16 * max(rows) * sum(world.sizes)  # bytes of one while it is read
    workers = min(cores(), len(jobs), host_memory() // (shard + 1)) if len(jobs) > 2 else 0
    in_processes(lay_down_file, jobs, workers, "laying down", "file")


def lay_down_file(world, file, folder, place, names):
    """Write arrays `names` of a file to their rows, which begin at `place`, from the end."""
    data = world.arrays(file)
    mark = json.dumps({"ends": data.ends.tolist(), "limits": data.limits.tolist()})
    for name in names:
        array = np.ascontiguousarray(getattr(data, name.split("-")[0]))
        with open(folder / f"{name}.npy", "r+b") as out:
            out.seek(place * array[:1].nbytes, os.SEEK_END)
            out.write(array)
            out.flush()
            os.fsync(out.fileno())
        write(mark_of(folder, file, name), mark.encode())


# --------------------------------------------------------------------------- data: one's own

TERMINALS, TIMEOUTS = ("terminals", "terminations"), ("timeouts", "truncations")
OWN_KEYS = ("observations", "actions", "rewards", "next_observations", *TERMINALS, *TIMEOUTS)


def read_episodes(path, observation_size, action_size, low, high):
    """The episodes of a file of one's own: .npz or HDF5 with D4RL's names, or Minari's HDF5. Sizes
    may be None; actions are rescaled from `low` and `high` (A,) to [-1, 1].

    An episode ends where the task does (`terminals`), where the recording stops (`timeouts`), and
    with the file. Its last state is in `next_observations`, or the one observation more that Minari
    has. Without either the last row stands for it: its action is not used, nor whether it ended.

    Returns: list of (states (L+1, O), actions (L, A), rewards (L,), whether the task ended).
    Raises: MacError, which names the file, the key and the index.
    """
    groups = {"": read_npz(path, OWN_KEYS)} if path.suffix == ".npz" else read_hdf5(path)
    low, high, episodes, lost = np.float32(low), np.float32(high), [], 0
    for group, arrays in groups.items():
        for key in OWN_KEYS[:3]:
            if key not in arrays:
                raise MacError(f"{path}: has no array '{group}{key}'")

        def read(key, *shape, **limits):
            return numbers(path, group + key, arrays[key], shape, **limits)

        slack = 0.05 * (high - low)
        actions = read("actions", None, action_size, low=low - slack, high=high + slack)
        actions = (actions - (low + high) / 2) / ((high - low) / 2)
        count = len(actions)
        more = arrays["observations"].shape[:1] == (count + 1,)
        states = read("observations", count + more, observation_size)
        rewards = read("rewards", count)
        known, following = more or "next_observations" in arrays, states[more:]
        if known and not more:
            following = read("next_observations", *states.shape)
        ended, stopped = (np.any([np.zeros(count), *(read(key, count) for key in keys
                                                     if key in arrays)], axis=0)
                          for keys in (TERMINALS, TIMEOUTS))
        if not count or not (more or (ended | stopped).any()):
            raise MacError(f"{path}: no episode ends in {group or 'it'}; 'terminals' is to be set "
                           "where the task ended, 'timeouts' where the recording stopped")
        if more and (ended | stopped)[:-1].any():
            raise MacError(f"{path}: {group}observations has a row more than actions, which only "
                           "a single episode may have")
        differ = (following[:-1] != states[1:count]).any(1) & ~(ended | stopped)[:-1]
        if known and differ.any():
            say(f"WARNING: {path}: in {differ.sum()} rows, the first {differ.argmax()}, "
                "next_observations is not the next row's observation: are ends missing, or rows "
                "out of order?")
        ends = np.unique([*np.flatnonzero(ended | stopped), count - 1]) + 1
        for begin, end in itertools.pairwise([0, *ends]):
            rows = slice(begin, end if known else end - 1)
            episodes.append((np.concatenate([states[rows], following[end - 1:end]]), actions[rows],
                             rewards[rows], known and ended[end - 1]))
            lost += ended[end - 1] and not known
    if lost:
        say(f"WARNING: {path} has no next_observations: the last states of {lost} episodes that "
            "terminated are not known, and that they did is not learned")
    return episodes


def read_hdf5(path):
    """The arrays of each of Minari's groups, {'episode_0/': ...}, or of a flat file, {'': ...}."""
    try:
        import h5py
    except ImportError:
        raise MacError(f"{path}: this needs h5py, if it is HDF5: pip install h5py") from None
    name = "it"
    try:
        with h5py.File(path) as file:
            names = [name for name in file if re.fullmatch(r"episode_\d+", name)]
            groups = {f"{name}/": {} for name in sorted(names, key=lambda name: int(name[8:]))}
            groups = groups or {"": {}}
            for group, arrays in groups.items():
                for name in OWN_KEYS:
                    if isinstance(file.get(group + name), h5py.Group):
                        raise MacError(f"{path}: {group}{name} is a group, as of a Dict space; "
                                       "only flat arrays are supported")
                    if group + name in file:
                        arrays[name] = file[group + name][()]
            return groups
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise MacError(f"cannot read {path} as HDF5 ({name}: {error})") from error


def join(episodes):
    """Trajectories of what `read_episodes` returns; their last states get actions of zeros."""
    states, actions, rewards, ended = zip(*episodes)
    ends = np.cumsum([len(array) for array in states]) - 1
    places = ends - np.arange(len(ends))  # of the zeros among the actions
    actions, rewards = (np.insert(np.concatenate(arrays), places, 0, axis=0)
                        for arrays in (actions, rewards))
    return Trajectories(np.concatenate(states), actions, ends, rewards, np.array(ended))


# -------------------------------------------------------------------------- data: collection

COLLECTED_EPISODES = 1000  # OGBench's size; a tenth as many again for validation


def collect_data(path, name, episodes, noise=PLAY_NOISE):
    """Collect `episodes` training and a tenth as many validation episodes of simulator `name`, with
    `noise` on the scripted policies' plans, into `path` and its '-val' sibling, or more than 1,000
    into shards of 1,000, where these are missing, over all cores; the same data for any number.
    The episodes of one shard wait in a folder beside it: an interrupted collection goes on."""
    parts = path.with_name(f".{path.stem}-episodes")
    size, shards = episodes if path.exists() else COLLECTED_EPISODES, [path]
    if episodes > size:
        shards = [path.with_name(f"{path.stem}-{i:03}.npz") for i in range(-(-episodes // size))]
    if all(file.exists() for shard in shards for file in (shard, validation_file(shard))):
        return
    with lock(path.parent, ".collecting", wait=True):  # a second process would collect the same
        for i, shard in enumerate(shards):
            begin, end = i * size, min((i + 1) * size, episodes)
            held = {validation_file(shard): range(begin // 10, max(end, begin + 10) // 10),
                    shard: range(begin, end)}  # in order of seeds
            jobs = {target: [(parts / f"{split}-{e}.npz", name, noise, (0, split, e))
                             for e in held[target]]
                    for split, target in enumerate(held) if not target.exists()}
            if jobs:
                parts.mkdir(exist_ok=True)
                every = sum(jobs.values(), [])
                count = min(cores(), len(every))
                say(f"collecting {len(every)} episodes of {name} in {count} processes")
                in_processes(collect_episode, every, count, "collecting", "episode")
            for target, group in jobs.items():
                arrays = [read_npz(file) for file, *_ in group]
                write_npz(target, {key: np.concatenate([a[key] for a in arrays])
                                   for key in arrays[0]})
            shutil.rmtree(parts, ignore_errors=True)


def host_memory():
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def in_processes(function, jobs, workers, doing, unit):
    """Call `function(*job)` for every job in `workers` processes, or here if that is 0."""
    if not workers:
        for job in tqdm(jobs, doing, unit=unit, disable=None):
            function(*job)
        return
    # Fresh interpreters: a fork of a process that has run torch's threads may hang.
    with concurrent.futures.ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), start_worker) as pool:
        try:
            done = [pool.submit(function, *job) for job in jobs]
            for future in tqdm(done, doing, unit=unit, disable=None):
                future.result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise MacError(f"a process was killed while {doing}, perhaps for want of memory: the "
                           "same command goes on with what it has") from error
        except BaseException:  # leaving the pool would wait for the jobs already begun
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise


def start_worker():
    """A worker leaves interrupts to its parent, and ends when the parent does, however it does."""
    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=follow, daemon=True).start()


def collect_episode(path, name, noise, seeds):
    """Put an episode of OGBench's play data by its scripted policies into `path`, unless it is
    there already: (1001, ...) arrays that depend on simulator `name`, `noise`, `seeds` alone."""
    if path.exists():
        return
    for attempt in range(100):
        data = run_oracle(name, noise, np.random.SeedSequence((*seeds, attempt)))
        if "scene" in name:  # as OGBench does: its cube stays in view, unless in the drawer
            _, y, z = data["qpos"][:, 14:17].T
            if ((y >= 0.29) | ((y <= -0.3) & ((z < 0.06) | (z > 0.08)))).any():
                continue
        return write_npz(path, data)
    raise RuntimeError("100 episodes in a row lost the cube from view")


@functools.cache
def oracle_env(name, noise):
    """The environment in data collection mode and its oracle for each kind of task."""
    _, gymnasium = import_ogbench()
    from ogbench.manipspace.oracles.plan import button_plan, cube_plan, drawer_plan, window_plan

    env = gymnasium.make(name, mode="data_collection", terminate_at_goal=False,
                         max_episode_steps=1001)
    given = {"env": env, "noise": noise, "noise_smoothing": 0.5}
    oracles = {
        "cube": cube_plan.CubePlanOracle(**given),
        "button": button_plan.ButtonPlanOracle(gripper_always_closed="puzzle" in name, **given),
        "drawer": drawer_plan.DrawerPlanOracle(**given),
        "window": window_plan.WindowPlanOracle(**given),
    }
    return env, oracles


def run_oracle(name, noise, seed_sequence):
    """One episode -> dict of arrays. The oracles draw from NumPy's global stream: seeded too."""
    env, oracles = oracle_env(name, noise)
    env_seed, np_seed = map(int, seed_sequence.generate_state(2))
    np.random.seed(np_seed)
    observation, info = env.reset(seed=env_seed)
    # How often cubes are stacked varies by episode and with the number of cubes.
    low, high = {"single": (0, 0), "double": (0, 0.25), "triple": (0.05, 0.35),
                 "quadruple": (0.1, 0.5), "octuple": (0, 0.35)}.get(name.split("-")[1], (0.5, 0.5))
    stacking = np.random.uniform(low, high)
    oracle = oracles[info["privileged/target_task"]]
    oracle.reset(observation, info)
    rows, done = [], False
    while not done:
        action = np.clip(oracle.select_action(observation, info), -1, 1)
        following, _, terminated, truncated, info = env.step(action)
        done = terminated or truncated
        rows.append({"observations": observation, "actions": action, "terminals": done,
                     **{key[5:]: info[key] for key in info if key.startswith("prev_")}})
        if oracle.done:
            new_observation, new_info = env.unwrapped.set_new_target(p_stack=stacking)
            oracle = oracles[new_info["privileged/target_task"]]
            oracle.reset(new_observation, new_info)
        observation = following
    dtypes = {"terminals": bool, "button_states": np.int64}
    return {key: np.array([row[key] for row in rows], dtypes.get(key, np.float32))
            for key in rows[0]}


# ------------------------------------------------------------------------------------ episodes

# Returns that D4RL calls 0 and 100.
D4RL_RETURNS = {"HalfCheetah": (-280.178953, 12135.0), "Hopper": (-20.272305, 3234.3),
                "Walker2d": (1.629008, 4592.3)}


class Evaluator:
    """Plays episodes of a world's tasks; environments are built once (a second each), and
    `environments` of them are stepped side by side."""

    def __init__(self, world, environments=5):
        self.world, self.envs, self.environments = world, [world.env], environments

    def play(self, agent, episodes, seed=0, execute=None, candidates=None,
             on_step=lambda episode: None, stop=lambda: False):
        """Run `episodes` episodes of every task, each a function of (seed, task, episode) and
        the agent's noise (teleporting mazes excepted: they draw from NumPy's global stream).
        All environments that need a chunk share one policy call; MuJoCo lets go of the
        interpreter, so threads step them in parallel. `on_step` sees each Episode after each of
        its steps.

        Returns: {task: list of (success, return, length)}, or None if `stop()` turned true;
        success is None in simulators that do not tell.
        """
        execute = execute or agent.config.execute  # at most a whole chunk
        jobs = list(itertools.product(self.world.tasks, range(episodes)))
        while len(self.envs) < min(self.environments, len(jobs)):
            self.envs.append(self.world.make())
        generator = torch.Generator(agent.device).manual_seed(seed)
        results = {task: [] for task in self.world.tasks}
        active = [Episode(self.world, env, *jobs.pop(0), seed) for env in self.envs if jobs]
        with concurrent.futures.ThreadPoolExecutor(cores()) as threads:
            while active and not stop():
                idle = [episode for episode in active if not episode.plan]
                if idle:
                    chunks = agent.act(np.stack([e.observation for e in idle]),
                                       np.stack([e.goal for e in idle]), candidates, generator)
                    for episode, chunk in zip(idle, chunks):
                        episode.plan = list(chunk[:execute])
                list(threads.map(Episode.step, active))
                for i, episode in enumerate(active):
                    on_step(episode)
                    if episode.done:
                        results[episode.task].append(
                            (episode.success, episode.reward, episode.length))
                        active[i] = (Episode(self.world, episode.env, *jobs.pop(0), seed)
                                     if jobs else None)
                active = [episode for episode in active if episode]
        return None if active else results


class Episode:
    """An episode under way and the actions still to be executed of its current chunk."""

    def __init__(self, world, env, task, number, seed):
        self.env, self.task, self.number = env, task, number
        self.plan, self.reward, self.length = [], 0.0, 0
        self.success, self.done = None, False
        state = np.random.SeedSequence((seed, task, number)).generate_state(1)
        self.observation, self.goal = world.reset(env, task, int(state[0]))

    def step(self):
        action = self.plan.pop(0)
        self.observation, reward, terminated, truncated, info = self.env.step(action)
        self.reward += float(reward)
        self.length += 1
        if "success" in info:
            self.success = bool(self.success or info["success"])
        self.done = terminated or truncated


def summarize(results):
    """{task: list of (success, return, length)} -> {"task1": {"success", "stderr", "return",
    "return_stderr", "length", "episodes"}, ..., "overall": ...}: means and their standard errors,
    of success the binomial one; None for success where it is not known."""
    rows = {f"task{task}": episodes for task, episodes in results.items()}
    rows["overall"] = [episode for episodes in results.values() for episode in episodes]
    table = {}
    for name, episodes in rows.items():
        success, total, length = zip(*episodes)
        rate = None if None in success else float(np.mean(success))
        stderr = None if rate is None else math.sqrt(rate * (1 - rate) / len(episodes))
        table[name] = {"success": rate, "stderr": stderr, "return": float(np.mean(total)),
                       "return_stderr": float(np.std(total)) / math.sqrt(len(episodes)),
                       "length": float(np.mean(length)), "episodes": len(episodes)}
    return table


def headline(row):
    """What a row of `summarize` says in a few words."""
    if row["success"] is None:
        return (f"return {row['return']:.5g} ± {row['return_stderr']:.2g}, "
                f"length {row['length']:.4g}")
    return f"success {row['success']:.0%} ± {row['stderr']:.0%}"


# -------------------------------------------------------------------------------------- report

def evaluate(run, agent, args):
    """Play episodes, print the table. -> the dictionary that --json writes"""
    config, world = agent.config, agent.config.world
    if args.video:
        world.pixels = args.video_size
    if not world.tasks:
        raise MacError(f"{run}: there is no simulator to play in")
    execute = min(args.execute or config.execute, config.chunk)
    candidates = args.candidates or config.eval_candidates
    episodes = args.episodes or config.eval_episodes
    frames = {task: [] for task in world.tasks}

    def record(episode):  # a third of the frames, about as fast as it happened
        if args.video and episode.number == 0 and (episode.length % 3 == 1 or episode.done):
            frames[episode.task].append(render(episode.env))

    results = Evaluator(world).play(agent, episodes, args.seed, execute, candidates, record)
    table = summarize(results)
    say(f"{run}: {config.env}, step {agent.step}, trained on {agent.data_source}")
    say(f"{config.policy} policy, best of {candidates}, {execute} of the {config.chunk} actions of "
        f"each chunk executed, seed {args.seed}, on {agent.device.type}")
    say(f"{'':8} {'success':>12} {'episodes':>9} {'return':>9} {'':8} {'length':>7}")
    for name, row in table.items():
        success = ("-" if row["success"] is None else
                   f"{row['success']:6.1%} ±{row['stderr']:5.1%}")
        say(f"{name:8} {success:>12} {row.pop('episodes'):9} {row['return']:9.1f} "
            f"±{row['return_stderr']:7.2g} {row['length']:7.1f}")
    simulator = config.env.split("-")[0]
    if simulator in D4RL_RETURNS:
        low, high = D4RL_RETURNS[simulator]
        score, error = (100 * x / (high - low) for x in (table["overall"]["return"] - low,
                                                         table["overall"]["return_stderr"]))
        table["overall"].update(d4rl_score=score)
        say(f"D4RL's normalised score: {score:.1f} ± {error:.1f} (D4RL's own is of -v2)")
    if args.video:
        write_video(args.video, sum(frames.values(), []))
    return {"env": config.env, "policy": config.policy, "step": agent.step, "seed": args.seed,
            "episodes": episodes, "execute": execute, "candidates": candidates,
            "overall": table.pop("overall"), "tasks": table}


@torch.no_grad()
def model_error(agent, dataset, steps, trajectories=2000):
    """Mean squared error of the dynamics model, in normalised units, along logged trajectories
    of `steps` environment steps whose recorded actions are replayed chunk by chunk.

    Args: dataset: a mac.ChunkDataset; up to `trajectories` evenly spaced starts of it are used.
    Returns: list of (environment steps, error), one per chunk, beginning with (0, 0).
    Raises: MacError if no trajectory is that long.
    """
    n, ends = agent.config.chunk, dataset.ends
    span, lengths = steps // n * n, ends.diff(prepend=ends.new_tensor([-1]))  # (K,) in states
    starts_up_to = (lengths - span).clamp(min=0).cumsum(0)  # (K,)
    total = int(starts_up_to[-1])
    if not total or steps < n:
        raise MacError(f"--model-error-steps {steps}: needs at least one chunk ({n} actions) and a "
                       f"trajectory of that length; the longest has {lengths.max() - 1} steps")
    pick = torch.linspace(0, total - 1, min(trajectories, total), dtype=torch.float64).long()
    k = torch.searchsorted(starts_up_to, pick, right=True)
    starts = ends[k] + 1 - span - (starts_up_to[k] - pick)
    prediction, errors = agent.normalizer(dataset.observations[starts]), [(0, 0.0)]
    for step in range(0, span, n):
        batch = agent.normalize(dataset.batch(starts + step, torch.Generator()))
        prediction = agent.next_observation(prediction, batch.chunk)
        errors.append((step + n, (prediction - batch.next_observation).square().mean().item()))
    return errors


def compare_model_errors(mac, args):
    """Print, write (RUN/model_error.csv) and, for --plot, draw the model error of every run."""
    curves = {}
    say("mean squared error of the dynamics model (normalised units, validation split)")
    for run in args.runs:
        agent = mac.load(run)
        n, dataset = agent.config.chunk, validation_of(mac, agent, agent.config.world, args)
        curve = model_error(agent, dataset, args.model_error_steps)
        text = "".join(f"{steps},{error}\n" for steps, error in [("steps", "mse"), *curve])
        write(run / "model_error.csv", text.encode())
        curves[f"n = {n}, {run}"] = curve[1:]
        shown = [point for point in curve[1:] if point[0] % 25 == 0] or curve[1:]
        say(f"n = {n}, {run}:", ", ".join(f"{s} steps {e:.4g}" for s, e in shown))
        if agent.config.terminations:
            generator = torch.Generator().manual_seed(0)
            batch = agent.fill(agent.normalize(dataset.sample(10_000, generator)), generator)
            ended = batch.terminated
            _, masks = agent.outcome.predict(batch.observation, batch.chunk, batch.value_goal)
            right = [(masks != ended)[ended == case].float() for case in (1, 0)]
            say(f"terminations: right of {len(right[0])} chunks with one {right[0].mean():.1%}, of "
                f"{len(right[1])} without {right[1].mean():.1%}")
    if args.plot is not None:
        with picture(args.plot or args.runs[0] / "model_error.png", 1) as (panel,):
            for label, curve in curves.items():
                panel.plot(*zip(*curve), marker="." if len(curve) < 30 else "", label=label)
            panel.set(xlabel="environment steps", ylabel="mean squared error", yscale="log")


@torch.no_grad()
def reach(agent, dataset, distance, count=5000):
    """What the networks say of logged states `distance` steps before a goal that the trajectory
    does reach or, where there are no goals, before its reward rises.

    Args: dataset: a mac.ChunkDataset; `count` random rows of it are tried.
    Returns: means of V, of Q of the logged chunk, of whether it is thought to succeed or of its
    reward, and, of up to 500 states, of the correlation over 16 proposals for a state of Q with
    what it is taught (Eq. 11), nan if that ranks none; None where no trajectory is that long.
    """
    generator, ends = torch.Generator().manual_seed(0), dataset.ends
    start = torch.randint(len(dataset.observations), (count,), generator=generator)
    if not len(agent.columns):
        rises = 1 + (dataset.rewards[1:] > dataset.rewards[:-1]).nonzero()[:, 0]
        rises = rises[~torch.isin(rises - 1, ends)]
        if not len(rises):
            return None
        start = rises[torch.randint(len(rises), (count,), generator=generator)] - distance
    last = ends[torch.searchsorted(ends, start)]
    fits = (start >= 0) & (start + max(distance + 1, agent.config.chunk) <= last)
    if not fits.any():
        return None
    batch = dataset.batch(start[fits], generator)
    goal = dataset.observations[start[fits] + distance][:, agent.columns]
    batch = agent.normalize(batch._replace(value_goal=goal))
    inputs = batch.observation, batch.chunk, batch.value_goal
    reward, mask = agent.outcome.predict(*inputs)
    outcome = 1 - mask if len(agent.columns) else reward
    few = inputs[0][:500], inputs[2][:500]
    chunks, q = agent.proposals(16, *few, generator)
    state, goal = (given[:, None].expand(-1, 16, -1) for given in few)
    taught = agent.model_q(state, chunks, goal)
    agreement = torch.cosine_similarity(q - q.mean(1, keepdim=True),
                                        taught - taught.mean(1, keepdim=True))
    agreement = agreement[taught.amin(1) < taught.amax(1)]  # there is nothing to rank elsewhere
    values = agent.value(inputs[0], inputs[2]), agent.q(*inputs), outcome, agreement
    return tuple(value.mean().item() for value in values)


def ideal(config, distance):
    """V of a path that meets its goal in `distance` steps: -1 for each chunk before that one."""
    n = config.chunk
    return -(1 - config.discount ** (distance // n * n)) / (1 - config.discount ** n)


def compare_reach(mac, args):
    """Print, write (RUN/reach.csv) and, for --plot, draw how far ahead V sees, beside the value of
    what was logged, the value of never getting there, and V where the tasks begin."""
    agent = mac.load(args.runs[0])
    world = agent.config.world
    dataset = validation_of(mac, agent, world, args)
    goals, rows, never = len(agent.columns) > 0, [], -1 / (1 - agent.discount)
    names = ["steps", "V", "Q", "success" if goals else "reward", "agreement"] + ["ideal"] * goals
    for distance in (0, 10, 20, 30, 50, 70, 100, 150, 200, 300, 400):
        means = reach(agent, dataset, distance)
        if means:  # the ideal is known of goals alone
            rows.append((distance, *means, *([ideal(agent.config, distance)] if goals else ())))
    begins = {}
    for task in world.tasks:
        begin = (agent.enter(*world.reset(world.env, task, seed)) for seed in range(10))
        begins[task] = agent.value(*map(torch.cat, zip(*begin))).mean().item()
    text = "".join(",".join(map(str, row)) + "\n" for row in [names, *rows])
    write(args.runs[0] / "reach.csv", text.encode())
    what = "a goal" if goals else "a rise of the reward"
    say(f"validation states some steps before {what}"
        + (f'; "never" is worth {never:.2f}' if goals else ""))
    say("".join(f"{name:>10}" for name in names))
    for row in rows:
        say(f"{row[0]:10}" + "".join(f"{number:10.2f}" for number in row[1:]))
    say("V where the tasks begin:", ", ".join(f"task{task} {value:.2f}"
                                              for task, value in begins.items()))
    if args.plot is None:
        return
    with picture(args.plot or args.runs[0] / "reach.png", 2) as panels:
        for index, name in enumerate(names[1:], 1):
            panel = panels[int(name in ("success", "reward", "agreement"))]
            panel.plot([row[0] for row in rows], [row[index] for row in rows],
                       "k--" if name == "ideal" else ".-", label=name)
        if goals:
            panels[0].axhline(never, color="gray", linestyle=":", label="never")
        for task, value in begins.items():
            panels[0].axhline(value, xmin=0.96, color="C3",
                              label="tasks' starts" * (task == world.tasks[0]))
        for panel in panels:
            panel.set(xlabel=f"environment steps before {what}")


def path_of(config, world, args):
    """The data that a run was trained on."""
    folder = home(args.dataset_dir or config.dataset_dir, "--dataset-dir")
    if args.dataset_dir and config.data:
        return folder
    return world.find(folder, config.collect, obtain=False)[0]


def validation_of(mac, agent, world, args):
    """The validation split of these data. -> mac.ChunkDataset"""
    path = path_of(agent.config, world, args)
    return mac.make_dataset(world.data(path)[1], agent.columns.tolist(), agent.config)


def compare_imagination(mac, args, steps=100):
    """100 steps as the simulator and as the model has them. As a picture: those normalised
    coordinates that vary most, with a recorded validation trajectory's actions and the agent's own.
    As a film of the latter: beside the simulator the logged states nearest to the model's."""
    agent = mac.load(args.runs[0])
    n, world, normal = agent.config.chunk, agent.config.world, agent.normalizer
    frames, film, count = [], args.imagine.endswith(".gif"), max(1, steps // n)
    if film:
        world.pixels = args.video_size
    if not world.tasks:
        raise MacError(f"{args.runs[0]}: there is no simulator to play in")
    env = world.env
    observation, goal = world.reset(env, world.tasks[0], args.seed)
    rollout = agent.imagine(*agent.enter(observation, goal),
                            torch.Generator().manual_seed(args.seed), count,
                            args.candidates or agent.config.eval_candidates)
    states, simulated = rollout.observations[:, 0], [observation]
    for t, action in enumerate(rollout.chunks.view(-1, world.sizes[1]).numpy()):
        if film and t % 3 == 0:
            frames.append(render(env))
        simulated.append(env.step(action)[0])
    if film:
        path = path_of(agent.config, world, args)
        places = {} if agent.config.data else read_npz(
            data_files(path)[0][0], ["observations", "qpos", "button_states"])  # a shard will do
        if "qpos" not in places:
            raise MacError(f"{path}: has no array 'qpos' to draw imagined states with")
        logged = torch.as_tensor(places.pop("observations"), dtype=torch.float32)
        world.reset(env, world.tasks[0], args.seed)  # colours of a success stay otherwise
        imagined = []
        for row in torch.cdist(states[:-1], normal(logged)).argmin(1).tolist():
            qpos, *buttons = (array[row] for array in places.values())
            env.unwrapped.set_state(qpos, np.zeros(env.unwrapped.model.nv), *buttons)
            imagined.append(render(env))
        return write_video(args.imagine, [np.concatenate([frame, imagined[3 * i // n]], 1)
                                          for i, frame in enumerate(frames)])
    data = validation_of(mac, agent, world, args)
    lengths = data.ends.diff(prepend=torch.tensor([-1]))  # in states
    last, rows = data.ends[lengths.argmax()], min(count, (lengths.max() - 1) // n) * n
    recorded = data.observations[last - rows:last + 1]
    replayed = [normal(recorded[:1])]
    for chunk in data.actions[last - rows:last].view(-1, 1, n * world.sizes[1]):
        replayed.append(agent.next_observation(replayed[-1], chunk))
    with picture(args.imagine, 2) as panels:
        for panel, title, truth, model in (
                (panels[0], "recorded actions", recorded, torch.cat(replayed)),
                (panels[1], "the agent's own", np.stack(simulated), states)):
            truth = normal(torch.as_tensor(truth, dtype=torch.float32))
            spread = truth.amax(0) - truth.amin(0)
            for color, column in enumerate(spread.argsort(descending=True)[:4].tolist()):
                panel.plot(truth[:, column], f"C{color}", label=f"observation[{column}]")
                panel.plot(np.arange(len(model)) * n, model[:, column], f"C{color}o", markersize=4)
            panel.set(title=f"{title}: simulator -, model o", xlabel="environment steps")


# ------------------------------------------------------------------------------------ pictures

def render(env):
    """An image of an environment. Raises MacError, which says what to set."""
    try:
        return env.render()
    except Exception as error:  # mujoco raises many kinds where there is no renderer
        raise MacError(f"cannot render with MUJOCO_GL={os.environ.get('MUJOCO_GL')} ({error}): "
                       "install EGL (libegl1) and set MUJOCO_GL=egl before the program starts"
                       ) from error


def write_video(path, frames):
    import imageio.v3  # comes with ogbench

    data = imageio.v3.imwrite("<bytes>", np.stack(frames), extension=".gif", duration=50, loop=0)
    write(path, data)
    say(f"wrote {path} ({len(frames)} frames)")


@contextlib.contextmanager
def picture(path, panels):
    """matplotlib's panels, side by side, to draw into; afterwards they are written to `path`."""
    try:
        import matplotlib.figure
    except ImportError:
        raise MacError("pictures need matplotlib: pip install matplotlib") from None
    figure = matplotlib.figure.Figure((4.5 * panels, 3.2), layout="tight")
    yield figure.subplots(1, panels, squeeze=False)[0]
    for panel in figure.axes:
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, format="png")
    write(path, buffer.getbuffer())
    say(f"wrote {path}")


def plot_curves(args):
    """Success (eval.csv) and losses (train.csv) over gradient steps."""
    with picture(args.plot or args.runs[0] / "curve.png", 2) as (success, losses):
        for run, style in zip(args.runs, itertools.cycle(("-", "--", ":", "-."))):
            rows = read_csv(run / "train.csv")
            if not rows or "step" not in rows[0]:
                raise MacError(f"{run / 'train.csv'} is not there or has no rows: nothing to plot")
            for color, name in enumerate(name for name in rows[0]
                                         if name != "step" and "_" not in name):
                kept = [row for row in rows if row.get(name)]  # blank in the warmup
                losses.plot(*[[float(row[key]) for row in kept] for key in ("step", name)], style,
                            color=f"C{color}", label=name if kept and run is args.runs[0] else None)
            rows = [row for row in read_csv(run / "eval.csv") if row["task"] == "overall"]
            known = all(row["success"] for row in rows)  # not so in one's own simulators
            keys = ("success", "stderr") if known else ("return", "return_stderr")
            steps, mean, error = [np.array([float(row[key]) for row in rows])
                                  for key in ("step", *keys)]
            success.plot(steps, mean, style, marker="o", label=run.name)
            success.fill_between(steps, mean - error, mean + error, alpha=0.2)
            success.set(xlabel="gradient steps", ylabel=keys[0])
        losses.set(xlabel="gradient steps", ylabel="loss", yscale="log")


def read_csv(path):
    text = path.read_text(errors="replace") if path.exists() else ""
    return list(csv.DictReader(text.splitlines()))


# -------------------------------------------------------------------------------- command line

def parse(argv):
    parser = Parser("eval.py", allow_abbrev=False, description="Evaluate runs of mac.py.")
    add, positive = parser.add_argument, number(int, 1)
    add("runs", nargs="+", metavar="RUN", type=pathlib.Path, help="run folder")
    add("--episodes", type=positive, help="per task (default: the run's setting)")
    add("--execute", type=positive, help="actions of each chunk executed (default: the run's)")
    add("--candidates", type=positive, help="N; 1 is the cloned behaviour (default: the run's)")
    add("--seed", type=number(int, 0, 2 ** 32 - 1), default=0, help="of episodes (default: 0)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="of played episodes")
    add("--video", metavar="OUT.gif", help="the first episode of each task")
    add("--video-size", type=number(int, 16, 2000), default=400, metavar="PIXELS",
        help="of the side of an OGBench film (default: 400)")
    add("--json", metavar="OUT.json", help="write the numbers of one run")
    other = parser.add_mutually_exclusive_group().add_argument
    other("--imagine", metavar="OUT", help="instead of playing the next 100 steps as the simulator "
        "and as the model has them: curves (.png) or a film (.gif)")
    add("--plot", nargs="?", const="", metavar="OUT.png", help="instead of playing draw the "
        "learning curve, or --model-error or --reach; default: into the (first) run folder")
    other("--model-error", action="store_true", help="instead of playing measure the model's")
    other("--reach", action="store_true", help="instead of playing print how far ahead V sees")
    add("--model-error-steps", type=positive, metavar="STEPS", default=100,
        help="how far to replay (default: 100)")
    add("--dataset-dir", help="for --model-error, --reach and --imagine, if the data have moved")
    args = parser.parse_args(argv)
    plays = not (args.model_error or args.reach or args.imagine or args.plot is not None)
    if (args.json or args.video) and not plays:
        raise MacError("--json and --video are of played episodes")
    if args.imagine and args.plot is not None:
        raise MacError("--imagine draws or films by itself: leave --plot out")
    if (args.json or args.video or args.imagine or args.reach) and len(args.runs) > 1:
        raise MacError("--json, --video, --imagine and --reach take a single run")
    for name, endings in ((args.json, ("",)), (args.video, (".gif",)), (args.plot, (".png",)),
                          (args.imagine, (".png", ".gif"))):  # before the work
        if name and not name.endswith(endings):
            raise MacError(f"cannot write {name}: the name must end in {' or '.join(endings)}")
        if name and (not os.access(pathlib.Path(name).absolute().parent, os.W_OK)
                     or os.path.exists(name) and not os.path.isfile(name)):  # as /dev/null
            raise MacError(f"cannot write {name}: name a file in a folder that is there and yours")
    return args


@command
@torch.no_grad()
def main(argv):
    args = parse(argv)
    import mac  # which imports this file: only a program needs both

    if args.video or (args.imagine or "").endswith(".gif"):  # before mujoco is imported
        os.environ.setdefault("MUJOCO_GL", "egl" if sys.platform == "linux" else "glfw")
    if args.model_error:
        compare_model_errors(mac, args)
    elif args.reach:
        compare_reach(mac, args)
    elif args.imagine:
        compare_imagination(mac, args)
    elif args.plot is not None:
        try:
            plot_curves(args)
        except (ValueError, KeyError, TypeError) as error:
            raise MacError(f"a CSV file of the run is damaged: {error!r}") from error
    else:
        for run in args.runs:
            report = evaluate(run, mac.load(run, mac.set_up_device(args.device)), args)
        if args.json:
            write(args.json, (json.dumps(report, indent=2) + "\n").encode())


if __name__ == "__main__":
    import eval  # the module that mac.py imports, not a second copy of it
    sys.exit(eval.main())

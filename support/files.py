"""Files: written whole or not at all, locked while in use, checked when read; worker processes."""
import concurrent.futures
import contextlib
import fcntl
import multiprocessing
import os
import pathlib
import re
import shutil
import signal
import threading
import zipfile
import zlib

import numpy as np

from support.console import MacError, Progress, optional, say

# What reading a damaged .npz raises. NumPy verifies the zip's checksums while it reads.
DAMAGE = (OSError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError)


@contextlib.contextmanager
def lock(folder, wait=False):
    """Make the folder and hold it; refuse, or wait, while another process does. If it refuses, a
    folder in which nothing was made is removed again. Raises MacError."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise MacError(f"another process is training in {folder}") from None
            say(f"waiting for another process to end its work in {folder}")
            fcntl.flock(held, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks
        for leftover in folder.glob(".*.tmp"):  # of a write that was killed
            leftover.unlink(missing_ok=True)
        try:
            yield
        finally:
            if not wait and [path.name for path in folder.iterdir()] == [".lock"]:
                shutil.rmtree(folder)


def write(path, data, keep=None):
    """Make `data` the file `path`, whole or not at all; `keep` names the old. Raises MacError."""
    path = pathlib.Path(path).resolve()  # a link stays a link
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


def read_arrays(path, names):
    """-> {"": {name: array}} of those `names` that an .npz or flat HDF5 file has, or {"episode_0/":
    {name: array}, ...} of Minari's groups. Raises MacError."""
    npz, name = path.suffix.lower() == ".npz", "it"
    opened = np.load if npz else optional("h5py", f"{path}: HDF5").File
    try:
        with opened(path) as file:
            groups = [key for key in file if not npz and re.fullmatch(r"episode_\d+", key)]
            groups.sort(key=lambda group: int(group[8:]))
            result = {f"{group}/": {} for group in groups} or {"": {}}
            for group, arrays in result.items():
                for name in [name for name in names if group + name in file]:
                    array = file[group + name]
                    if hasattr(array, "keys"):
                        raise MacError(f"{path}: {group}{name} is a group, as of a Dict space; "
                                       "only flat arrays are supported")
                    arrays[name] = np.asarray(array[()])
            return result
    except MacError:
        raise
    except OSError as error:
        hint = "; a program may still write it, or set HDF5_USE_FILE_LOCKING=FALSE"
        hint *= "lock" in str(error)
        raise MacError(f"cannot read {path}: {error.strerror or error}{hint}") from error
    except (*DAMAGE, ValueError, TypeError, RuntimeError) as error:  # RuntimeError: "encrypted"
        reason = str(error).split(". ")[0]  # without NumPy's advice to unpickle it
        raise MacError(f"{path} is damaged or not such a file: {name} cannot be read ({reason}); "
                       "put a good copy in its place") from error


def check(path, key, array, shape, low=-np.inf, high=np.inf):
    """-> `array` as float32, of `shape` (None: any), between `low` and `high`. Raises MacError."""
    if array.shape[1:] == (1,) and len(shape) == 1:
        array = array[:, 0]  # some writers store a column
    if array.dtype.kind not in "fiub" or len(array.shape) != len(shape) or any(
            asked not in (None, given) for asked, given in zip(shape, array.shape)):
        asked = str(shape).replace("None", "any")
        raise MacError(f"{path}: {key} has shape {array.shape} and type {array.dtype}, where the "
                       f"task asks for numbers, {asked}")
    with np.errstate(over="ignore"):  # a number too large for float32 becomes infinite
        array = array.astype(np.float32, copy=False)
    if array.size and not np.all((low < array.min(0)) & (array.max(0) < high)):
        index = tuple(np.argwhere(~((low < array) & (array < high)))[0].tolist())
        low, high = (np.broadcast_to(limit, array.shape)[index] for limit in (low, high))
        raise MacError(f"{path}: {key}{list(index)} is {array[index]} as float32, not a number "
                       f"between {low:g} and {high:g}")
    return array


def in_processes(function, jobs, doing, unit):
    """Yield function(job) for each of `jobs`, in order, worked on by all cores. Raises MacError."""
    say(f"{doing}: {len(jobs)}{unit} on all cores")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # Fresh interpreters: a fork of a process that has run torch's threads may hang.
    with concurrent.futures.ProcessPoolExecutor(
            min(cores, len(jobs)), multiprocessing.get_context("spawn"), follow_parent) as pool:
        futures = [pool.submit(function, job) for job in jobs]  # `map` would cancel them too early
        try:
            yield from (future.result() for future in Progress(futures, doing, unit=unit))
        except concurrent.futures.process.BrokenProcessPool as error:
            raise MacError(f"a process was lost while {doing}: too little memory, or a script of "
                           "yours without `if __name__ == '__main__':`?") from error
        except BaseException:  # leaving the pool would wait for the jobs already begun
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise


def follow_parent():
    """A worker leaves interrupts to its parent, and ends when the parent ends, even by SIGKILL."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end = multiprocessing.parent_process().join
    threading.Thread(target=lambda: (end(), os._exit(1)), daemon=True).start()

"""Data: every data set, however it comes, is checked and becomes `Trajectories`."""
import hashlib
import json
import os
import pathlib
import re
import shutil
import tempfile
import warnings
import zlib
from typing import NamedTuple

import numpy as np
import torch

from support.console import MacError, Progress, home
from support.files import check, lock, write


class Trajectories(NamedTuple):
    """Logged trajectories, laid end to end. Arrays are float32 unless they say otherwise."""
    observations: np.ndarray  # (T, O)
    actions: np.ndarray  # (T, A) in [-1, 1]; the action of a trajectory's last state is not used
    ends: np.ndarray  # (K,) int64 index of each trajectory's last state, ascending
    rewards: np.ndarray  # (T,) of the actions; zeros in goal-conditioned tasks
    terminated: np.ndarray  # (K,) bool: the task ended there, not only the recording
    limits: np.ndarray = None  # (2, O) minimum and maximum of the observations, if known


def fingerprint(data):
    """A text that tells Trajectories from others: sizes, ends and 10,000 of the rows are hashed."""
    some = slice(None, None, max(1, len(data.actions) // 10_000))
    digest = hashlib.sha256(repr([array.shape for array in data[:5]]).encode())
    for array in (data.ends, data.terminated, *(data[i][some] for i in (0, 1, 3))):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def data_files(path):
    """-> training files (`path` or, without it, <stem>-000.npz and so on) and their '-val' files"""
    shards = {int(match[1]): file for file in path.parent.glob(f"{path.stem}-*.npz")
              if (match := re.fullmatch(r"-(\d+)", file.stem[len(path.stem):]))}
    training = [path] if path.exists() or not shards else [shards[i] for i in sorted(shards)]
    validation = [file.with_stem(f"{file.stem}-val") for file in training]
    return training, [file for file in validation if file.exists()] or validation[:1]


def flat_data(path, name, read, config):
    """-> training, validation: Trajectories, memory-mapped. `read` takes 6 s per million rows, so
    flat copies are kept, by `name` and the files' names, sizes and times. Raises MacError."""
    place, result = home(config.cache_dir or path.parent / "flat", "--cache-dir"), []
    place /= f"{path.stem}-{zlib.crc32(os.fsencode(path.parent.resolve())):08x}"
    warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nobody writes
    for split, files in zip(("training", "validation"), data_files(path)):
        status = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        folder = place / f"{name}-{split}-{zlib.crc32(repr(status).encode()):08x}"
        try:
            with lock(place, wait=True):  # a second process would lay down the same
                result.append(map_flat(folder) or lay_down(files, folder, read))
        except OSError as error:
            raise MacError(f"cannot lay the data down in {place} ({error}): --cache-dir names "
                           "another place") from error
    return result


def lay_down(files, folder, read):
    """Lay the arrays of `files` end to end in `folder`, whole or not at all. -> Trajectories"""
    # Of files that changed, damaged, or cut short; a run that has mapped a file keeps it.
    for old in (*folder.parent.glob(folder.name[:-8] + "?" * 8), *folder.parent.glob(".part-*")):
        shutil.rmtree(old)
    ends, limits = [], []
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".part-") as part:
        part = pathlib.Path(part, folder.name)
        part.mkdir()
        for file in Progress(files, f"laying down in {folder}", unit=" files"):
            data = read(file)
            for name in ("observations", "actions", "rewards"):
                with open(part / name, "ab") as out:
                    np.ascontiguousarray(getattr(data, name), np.float32).tofile(out)
            ends += (data.ends + (ends[-1] + 1 if ends else 0)).tolist()
            limits += [data.observations.min(0), data.observations.max(0)]
        index = {"ends": ends, "sizes": [array.shape[1] for array in data[:2]],
                 "limits": [np.min(limits, 0).tolist(), np.max(limits, 0).tolist()]}
        for _ in range(2):  # the second time with what tells damage later
            write(part / "index.json", json.dumps(index).encode())
            index["fingerprint"] = fingerprint(map_flat(part))
        os.replace(part, folder)
    return map_flat(folder)


def map_flat(folder):
    """-> Trajectories, or None if `folder` is not there or not as it was laid down."""
    try:
        index = json.loads((folder / "index.json").read_text())
        rows, ends = index["ends"][-1] + 1, np.array(index["ends"])
        shapes = *((rows, size) for size in index["sizes"]), (rows,)
        arrays = [np.memmap(folder / name, np.float32, "r", shape=shape)
                  for name, shape in zip(("observations", "actions", "rewards"), shapes)]
    except (OSError, ValueError, KeyError):
        return None
    terminated, limits = np.zeros(len(ends), bool), np.float32(index["limits"])
    data = Trajectories(*arrays[:2], ends, arrays[2], terminated, limits)
    return data if index.get("fingerprint") in (None, fingerprint(data)) else None


def as_batch(name, given, *widths):
    """Finite numbers (width,) or (B, width) as a float32 tensor (B, width). Raises MacError."""
    if isinstance(given, torch.Tensor):
        given = given.detach().cpu()
        given = given.double() if given.is_floating_point() else given  # NumPy lacks bfloat16
    array = np.atleast_2d(given)
    width = array.shape[-1] if array.shape[-1] in widths else widths[0]
    return torch.tensor(np.ascontiguousarray(check("act", name, array, (None, width))))

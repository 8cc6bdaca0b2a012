"""pytest: files are written whole, locked and checked; worker processes end."""
import concurrent.futures
import errno
import os
import pathlib
import re
import resource
import signal
import subprocess
import sys
import time
import zipfile
from unittest import mock

import numpy as np
import pytest

from support import files
from support.console import MacError
from support.test_common import refuse


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path, kept = tmp_path / "x.bin", tmp_path / "kept"
    files.write(path, b"one" * 50)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    try:
        with pytest.raises(MacError, match="cannot write .*x.bin: File too large"):
            files.write(path, b"two" * 50, keep=kept)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_bytes() == b"one" * 50 and os.listdir(tmp_path) == ["x.bin"]
    (tmp_path / "link").symlink_to("x.bin")
    files.write(tmp_path / "link", b"three", keep=kept)
    assert kept.read_bytes() == b"one" * 50 and path.read_bytes() == b"three"
    assert (tmp_path / "link").is_symlink() and len(os.listdir(tmp_path)) == 3


def test_a_lock_refuses_or_waits_and_leaves_no_empty_folder(tmp_path, capsys):
    folder = tmp_path / "a" / "run"
    with files.lock(folder), pytest.raises(MacError, match=f"another process .* in {folder}"):
        with files.lock(folder):
            pass
    assert not folder.exists()
    with mock.patch.object(files.fcntl, "flock", refuse(errno.ENOLCK)), files.lock(folder):
        (folder / "made").touch()  # in a file system without locks
        (folder / ".torn.7.tmp").touch()  # of a write that was killed

    def wait():
        with files.lock(folder, wait=True):
            return [name for name in os.listdir(folder) if name != ".lock"]

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with files.lock(folder):
            waiting = pool.submit(wait)
            time.sleep(0.2)
            assert not waiting.done()
        assert waiting.result(5) == ["made"]
    assert f"waiting for another process to end its work in {folder}" in capsys.readouterr().out


def test_flipped_and_truncated_files_are_refused(tmp_path):
    rng, names, path = np.random.default_rng(0), ("a", "b"), tmp_path / "x.npz"
    np.savez_compressed(path, a=rng.normal(size=(40, 9)), b=rng.normal(size=40),
                        c=rng.normal(size=40), objects=np.array([{}], object))
    good = path.read_bytes()
    assert set(files.read_arrays(path, (*names, "missing"))[""]) == {"a", "b"}
    with pytest.raises(MacError, match=r"objects cannot be read \(Object arrays cannot be loaded"):
        files.read_arrays(path, ("objects",))
    with zipfile.ZipFile(path) as archive:  # the bytes of the arrays themselves
        spans = [(i.header_offset + 30 + len(i.filename) + 20, i.compress_size - 20)
                 for i in archive.infolist() if i.filename in ("a.npy", "b.npy")]
    damaged = [good[:n] for n in rng.integers(0, len(good), 10)]
    positions = [(p, 1 << rng.integers(8)) for start, length in spans
                 for p in start + rng.integers(0, length, 12)]
    for position, bit in [(good.index(b"PK\x01\x02") + 8, 1), *positions]:  # a flag: "encrypted"
        damaged.append(good[:position] + bytes([good[position] ^ bit]) + good[position + 1:])
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(MacError, match="x.npz is damaged or not such a file"):
            files.read_arrays(path, names)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.EIO, errno.ENOENT])
def test_a_file_that_cannot_be_read_is_not_called_damaged(number, monkeypatch):
    monkeypatch.setattr(np, "load", refuse(number))
    with pytest.raises(MacError, match=f"^cannot read x.npz: {os.strerror(number)}$"):
        files.read_arrays(pathlib.Path("x.npz"), ("a",))


A = np.arange(12, dtype=np.float32).reshape(4, 3)


@pytest.mark.parametrize("array, message", [
    (A.astype(str), "has shape (4, 3) and type <U"), (A + 0j, "and type complex64"),
    (A.astype(object), "type object"), (A[0, 0], "has shape () "), (A[:, 0], "has shape (4,) "),
    (A[:3], "has shape (3, 3) "), (A[:0], "has shape (0, 3) "), (A[:, :2], "numbers, (4, 3)"),
    (A[:, :, None], "has shape (4, 3, 1) "), (A * [1, np.nan, 1], "key[0, 1] is nan as float32"),
    (A.astype(float) * 1e39, "key[0, 1] is inf as float32, not a number between -1 and 11"),
    (A - [[0], [0], [9], [0]], "key[2, 0] is -3.0 as float32"), (A - np.inf, "key[0, 0] is -inf"),
    (A + [1, 0, 0], "key[3, 0] is 10.0 as float32, not a number between -1 and 10"),
    (A - [0, 0, 3], "key[0, 2] is -1.0 as float32, not a number between 0 and 12")])
def test_what_an_array_check_refuses_names_the_file_the_key_and_the_index(array, message):
    low, high = np.float32([-1, -1, 0]), np.float32([10, 11, 12])
    with pytest.raises(MacError, match="^x.npz: .*" + re.escape(message)):
        files.check("x.npz", "key", array, (4, 3), low, high)


@pytest.mark.parametrize("kind", ["bool", "i1", "u1", "i8", "f2", "f8", "longdouble", ">f4"])
def test_numbers_of_any_kind_are_the_same_numbers(kind):
    array = (A % 2).astype(kind)
    for given, shape in ((array, (4, 3)), (np.asfortranarray(array), (None, 3)),
                         (array[:, :1], (4,)), (array[:, :1], (None, 1)), (array[:0], (None, 3))):
        checked = files.check("x.npz", "key", given, shape)
        assert checked.dtype == np.float32 and len(checked.shape) == len(shape)
        assert np.array_equal(checked.reshape(given.shape), (A % 2)[:len(given), :given.shape[1]])


WORKERS = """
import os, pathlib, sys, time
from support import console, files
def work(name):
    if name == "die":
        os._exit(1)
    pathlib.Path(name).touch()
    time.sleep(0 if name == "done" else 60)
@console.command
def main(argv):
    list(files.in_processes(work, argv, "working", " x"))
if __name__ == "__main__":  # which its workers import too
    sys.exit(main())"""


def test_no_worker_outlives_its_parent_and_a_lost_one_is_one_line(tmp_path):
    """While the pipe that all of them hold is open, one of them is alive."""
    (tmp_path / "work.py").write_text(WORKERS)
    processes = {number: subprocess.Popen(
        [sys.executable, "work.py", *names], text=True, cwd=tmp_path, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE) for number, *names in (
            (signal.SIGINT, "2-0", "2-1", "2-2"), (signal.SIGKILL, "9-0", "9-1", "9-2"),
            (0, "done", "die"))}
    for number, process in processes.items():
        while number and not list(tmp_path.glob(f"{number}-*")):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        if number:
            process.send_signal(number)
        error = process.communicate(timeout=20)[1]
        assert process.returncode == {0: 2, signal.SIGINT: 130, signal.SIGKILL: -9}[number]
        line = {0: "error: a process was lost while working", signal.SIGINT: "stopped"}
        assert error.startswith(line.get(number, "")) and "Traceback" not in error
        assert number == signal.SIGKILL or error.count("\n") == 1  # multiprocessing warns there

"""pytest: files are written whole, locked and checked; worker processes end."""
import errno
import os
import re
import signal
import subprocess
import sys
import time
from unittest import mock

import numpy as np
import pytest

from support import files
from support.console import MacError
from support.test_common import HERE


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path, kept = tmp_path / "x.bin", tmp_path / "kept"
    files.write(path, b"one")
    for function in ("fsync", "replace"):
        with mock.patch.object(os, function, side_effect=OSError(errno.ENOSPC, "full")):
            with pytest.raises(MacError, match="cannot write .*x.bin: full"):
                files.write(path, b"two", keep=kept)
        assert path.read_bytes() == b"one" and os.listdir(tmp_path) == ["x.bin"]
    (tmp_path / "link").symlink_to("x.bin")
    files.write(tmp_path / "link", b"three", keep=kept)
    assert kept.read_bytes() == b"one" and path.read_bytes() == b"three"
    assert (tmp_path / "link").is_symlink() and len(os.listdir(tmp_path)) == 3


def test_flipped_and_truncated_files_are_refused(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "x.npz"
    np.savez_compressed(path, a=rng.normal(size=(40, 9)), b=np.array([{}], object), c=0)
    good = path.read_bytes()
    assert set(files.read_arrays(path, ("a", "missing"))[""]) == {"a"}
    with pytest.raises(MacError, match=r"b cannot be read \(Object arrays cannot be loaded"):
        files.read_arrays(path, ("b",))
    damaged = [good[:n] for n in rng.integers(0, len(good), 10)]
    encrypted = good.index(b"PK\x01\x02") + 8  # a flag of the first array in the zip's index
    for position in (encrypted, *rng.integers(100, 2000, 20)):  # and bytes of the array itself
        damaged.append(good[:position] + bytes([good[position] ^ 1]) + good[position + 1:])
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(MacError, match="x.npz is damaged or not such a file"):
            files.read_arrays(path, ("a",))
    with mock.patch.object(np, "load", side_effect=OSError(errno.EACCES, "not allowed")):
        with pytest.raises(MacError, match="^cannot read .*x.npz: not allowed$"):
            files.read_arrays(path, ("a",))  # that is not called damaged


A = np.arange(12, dtype=np.float32).reshape(4, 3)


@pytest.mark.parametrize("array, message", [
    (A.astype(str), "has shape (4, 3) and type <U"), (A[:, :2], "numbers, (4, 3)"),
    (A[0, 0], "has shape () "), (A * [1, np.nan, 1], "key[0, 1] is nan as float32"),
    (A.astype(float) * 1e39, "key[0, 1] is inf as float32, not a number between -1 and 11")])
def test_an_array_check_names_file_key_and_index_and_knows_numbers_of_any_kind(array, message):
    low, high = np.float32([-1, -1, 0]), np.float32([10, 11, 12])
    with pytest.raises(MacError, match="^x.npz: .*" + re.escape(message)):
        files.check("x.npz", "key", array, (4, 3), low, high)
    for kind in ("bool", "u1", "i8", "f2", "longdouble", ">f4"):
        given = (A % 2).astype(kind)
        for shape, expected in (((4, 3), A % 2), ((4,), A[:, 0] % 2)):
            checked = files.check("x.npz", "key", given[:, :3 if shape[1:] else 1], shape)
            assert checked.dtype == np.float32 and np.array_equal(checked, expected)


PROGRAM = """
import sys
from support import console, files
sys.exit(console.command(lambda jobs: list(files.in_processes(exec, jobs, "working", " x")))())"""


@pytest.mark.parametrize("number, end, status, line", [
    (0, "os._exit(1)", 2, "error: a process was lost while working"),
    (signal.SIGINT, "time.sleep(60)", 130, "stopped"), (signal.SIGKILL, "time.sleep(60)", -9, "")])
def test_no_worker_outlives_its_parent_and_ends_are_one_line(number, end, status, line, tmp_path):
    """While the pipe that all of them hold is open, one of them is alive."""
    job = f"import os, time\nopen({str(tmp_path / 'begun')!r}, 'w')\n"
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, job + end, job], text=True, cwd=HERE,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while process.poll() is None and not (tmp_path / "begun").exists():
        time.sleep(0.05)
    process.send_signal(number)  # 0 is none
    error = process.communicate(timeout=20)[1]
    assert process.returncode == status and error.startswith(line) and "Traceback" not in error
    assert number == signal.SIGKILL or error.count("\n") == 1  # multiprocessing warns there

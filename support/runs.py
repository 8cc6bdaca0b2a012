"""Runs: checkpoints, logs and signals, so that nothing is lost when a run is stopped or killed."""
import contextlib
import csv
import hashlib
import io
import os
import signal
import threading

import torch

from support.console import MacError, optional, say
from support.files import write


def save_checkpoint(folder, state):
    """Write folder/checkpoint.pt, with a SHA-256; the old becomes checkpoint-previous.pt."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.write(hashlib.sha256(buffer.getbuffer()).digest())
    write(folder / "checkpoint.pt", buffer.getbuffer(), folder / "checkpoint-previous.pt")


def load_checkpoint(folder):
    """The newest whole checkpoint of a run folder; code in it is never run. Raises MacError."""
    for path in (folder / "checkpoint.pt", folder / "checkpoint-previous.pt"):
        if path.exists():
            data = path.read_bytes()
            if hashlib.sha256(data[:-32]).digest() == data[-32:]:
                with must_fit(folder):
                    return torch.load(io.BytesIO(data[:-32]), "cpu", weights_only=True)
            say(f"WARNING: {path} is damaged")
    raise MacError(f"{folder} holds no checkpoint that is whole: is it a run folder of mac.py?")


@contextlib.contextmanager
def must_fit(folder):
    """Raises MacError where a checkpoint does not hold what is read from it."""
    try:
        yield
    except (MacError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # torch raises many kinds
        raise MacError(f"the checkpoint in {folder} is not one of this program as it is now; that "
                       f"of your own policy needs eval.py --with FILE: {error!r:.200}") from error


class Logs:
    """train.csv and eval.csv, and the same for TensorBoard; a run resumes with its checkpoint's."""

    def __init__(self, folder, texts=None, tensorboard=False):
        self.files, self.writer = {n: folder / f"{n}.csv" for n in ("train", "eval")}, None
        if tensorboard:  # hides what was written before; all rows are written again
            module = optional("torch.utils.tensorboard", "--tensorboard")
            self.writer = module.SummaryWriter(folder, purge_step=0)
        for name, file in self.files.items():
            text = (texts or {}).get(name, "")
            write(file, text.encode()) if text else file.unlink(missing_ok=True)
            for row in csv.DictReader(io.StringIO(text)):
                self.show(name, row)

    def add(self, name, rows):
        """Append dictionaries of equal keys, "step" among them, to train.csv or eval.csv."""
        with open(self.files[name], "a", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            if file.tell() == 0:
                table.writeheader()
            table.writerows(rows)
        for row in rows:
            self.show(name, row)

    def show(self, name, row):
        """Write the numbers of a row for TensorBoard."""
        group = f"{name}/{row['task']}" if "task" in row else name
        for key, value in row.items() if self.writer else ():
            if key not in ("step", "task") and value not in ("", None):
                self.writer.add_scalar(f"{group}/{key}", float(value), int(row["step"]))

    def texts(self):
        """-> {name: text of the file}"""
        return {n: file.read_text() if file.exists() else "" for n, file in self.files.items()}


class Stop:
    """While open, SIGINT, SIGTERM and the signals that schedulers send before they kill, SIGHUP and
    SIGUSR1, ask for a stop, by `signal`. A second one ends a single process at once."""

    def __init__(self, processes=1):
        self.signal, self.before, self.processes = 0, {}, processes

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # no other receives signals
            for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
                if signal.getsignal(signum) != signal.SIG_IGN:  # as nohup ignores SIGHUP
                    self.before[signum] = signal.signal(signum, self.handle)
        return self

    def __exit__(self, *_):
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def handle(self, signum, frame):
        self.signal = signum
        if self.processes > 1:  # torchrun says so, may repeat it, and kills after 30 seconds
            return
        for other in self.before:
            signal.signal(other, signal.SIG_DFL)
        try:
            os.write(2, b"\nstopping after this step; once more to quit at once\n")  # reentrant
        except OSError:  # the terminal has gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)

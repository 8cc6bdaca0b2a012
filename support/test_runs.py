"""pytest: a run that is stopped, killed or damaged loses nothing; logs, signals, both programs.

MAC_SLOW=1 pytest kills a run at fifty random moments, too.
"""
import contextlib
import fcntl
import itertools
import json
import os
import pty
import resource
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from unittest import mock

import imageio.v3
import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves

import eval as evaluation
import mac
from support import devices, files, runs, worlds
from support.console import MacError
from support.test_common import COUNTING, Counting, CountingEnv, failing, read_csv

SCHEDULE = ("--horizon 2 --candidates 2 --flow-steps 2 --log-interval 4 --eval-interval 0 "
            "--save-interval 5 --decay --warmup 0.25").split()


class Paid(Counting):
    """The same with a reward, in which tasks end."""

    knows, goal_conditioned, columns = staticmethod("paid".__eq__), False, []

    def reset(self, env, task, seed):
        return super().reset(env, task, seed)[0], np.zeros(0)

    def data(self, name, config):
        return 2 * [super().data(name, config)[0]._replace(
            rewards=np.arange(40, dtype=np.float32), terminated=np.arange(5) % 2 == 0)]


@pytest.fixture(autouse=True)
def paid(monkeypatch):
    monkeypatch.setattr(worlds, "WORLDS", [*worlds.WORLDS, Paid])


def command(folder, *more):
    return [*COUNTING, *SCHEDULE, "--save-dir", str(folder), "--steps", "60", *more]


def fingerprint(folder):
    """The bits that a run of the same settings must have at the same step, and its logs."""
    state = runs.load_checkpoint(folder)
    for name in ("config", "facts"):
        del state[name]
    return [leaf.numpy().tobytes() if isinstance(leaf, torch.Tensor) else leaf
            for leaf in tree_leaves(state)] + [path.read_text()
                                               for path in sorted(folder.glob("*.csv"))]


# ------------------------------------------------------------------------------ nothing lost

def ends_at(step, how):
    """mac.update, but it calls `how` in the middle of this step, counted from 1."""
    update, steps = mac.update, itertools.count(1)

    def ending(*given):
        if next(steps) == step:
            how()
        return update(*given)

    return mock.patch.object(mac, "update", ending)


class Killed(BaseException):
    """Ends a run as SIGKILL does, for this process."""


def kill():
    raise Killed


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("settings", [
    "--no-decay --warmup 0", "--eval-interval 7", "--env paid", "--window 9",
    "--policy centered --critic model", "--env paid --no-terminations --chunk-reward sum"])
def test_a_stopped_and_a_killed_run_resume_to_the_bits(settings, tmp_path):
    whole, ended = tmp_path / "whole", tmp_path / "ended"
    given = [*settings.split(), "--steps", "20"]
    assert mac.main(command(whole, *given)) == 0
    resume = command(ended, *given, "--resume")
    with ends_at(3, terminate):  # in the warmup, if there is one
        assert mac.main(resume) == 128 + signal.SIGTERM
    assert runs.load_checkpoint(ended)["step"] == 3
    with ends_at(11, kill), pytest.raises(Killed):  # of this process, after rows that are not saved
        mac.main(resume)
    last = int(read_csv(ended / "train.csv")[-1]["step"])
    assert 10 <= runs.load_checkpoint(ended)["step"] < last
    with open(ended / "train.csv", "a") as log:
        log.write("18,0.12")  # a torn line
    assert mac.main(resume) == 0
    assert fingerprint(ended) == fingerprint(whole)
    assert mac.main([*resume, "--save-interval", "7"]) == 0  # nothing is left to do
    assert fingerprint(ended) == fingerprint(whole)


def test_intervals_do_not_change_what_is_learned(tmp_path):
    folders = tmp_path / "plain", tmp_path / "other"
    others = ["--log-interval", "7", "--eval-interval", "6", "--save-interval", "3"]
    for folder, more in zip(folders, ([], others)):
        assert mac.main(command(folder, "--steps", "20", *more)) == 0
    one, other = map(runs.load_checkpoint, folders)
    assert all(torch.equal(value, other["agent"][name]) for name, value in one["agent"].items())
    assert all(map(torch.equal, one["generators"], other["generators"]))


PROGRAM = [sys.executable, "-c", "import sys, mac, support.test_common; sys.exit(mac.main())"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert mac.main(command(folder)) == 0
    return fingerprint(folder)


def interrupt(folder, ends):
    """Start and resume a process that ends by each of `ends`, (signal, delay after the first row of
    its log that is new), then let the run finish. -> fingerprint"""
    log, saved = folder / "train.csv", folder / "checkpoint.pt"
    for number, delay in ends:
        started = time.time()
        process = subprocess.Popen([*PROGRAM, *command(folder, "--save-interval", "1", "--resume")],
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        process.stdout.close()  # a reader that has gone is no reason to end, nor for a traceback
        while process.poll() is None:
            rows = log.read_text().count("\n") if log.exists() else 0
            if rows > 1 and saved.exists() and saved.stat().st_mtime > started:
                break
            time.sleep(0.002)
        time.sleep(delay)
        process.send_signal(number)
        error = process.communicate(timeout=20)[1]
        assert process.returncode in ((-9, 0) if number == signal.SIGKILL else (128 + number,))
        assert "Traceback" not in error and "\r" not in error, error  # and no bar
        assert runs.load_checkpoint(folder)["step"] > 0
    assert mac.main(command(folder, "--resume")) == 0
    assert not list(folder.glob(".*.tmp"))
    return fingerprint(folder)


def test_a_killed_process_resumes_to_the_bits(uninterrupted, tmp_path):
    assert interrupt(tmp_path, [(signal.SIGKILL, 0.03)]) == uninterrupted


@pytest.mark.skipif("MAC_SLOW" not in os.environ, reason="MAC_SLOW=1 runs it")
def test_other_signals_and_fifty_kills(uninterrupted, tmp_path):
    delays = np.random.default_rng(0).uniform(0, 0.15, (10, 5))
    others = signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT
    ends = [[(number, 0) for number in others],
            *([(signal.SIGKILL, delay) for delay in row] for row in delays)]
    for i, some in enumerate(ends):
        (tmp_path / str(i)).mkdir()
        assert interrupt(tmp_path / str(i), some) == uninterrupted


def test_a_run_whose_terminal_closes_stops_and_resumes_to_the_bits(uninterrupted, tmp_path):
    """Then the kernel sends SIGHUP, and every write to the terminal fails from there on."""
    child, terminal = pty.fork()
    if not child:
        os.execv(sys.executable, [*PROGRAM, *command(tmp_path, "--save-interval", "1")])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))  # so a bar shows
    log, shown = tmp_path / "train.csv", b""
    while not (log.exists() and log.read_text().count("\n") > 2):
        shown += os.read(terminal, 65536)  # fails if the run has ended
    os.close(terminal)
    late = threading.Timer(30, os.kill, (child, signal.SIGKILL))
    late.start()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGHUP
    late.cancel()
    assert b"\r" in shown and 0 < runs.load_checkpoint(tmp_path)["step"] < 60
    assert mac.main(command(tmp_path, "--resume")) == 0
    assert fingerprint(tmp_path) == uninterrupted


def test_a_first_signal_asks_for_a_stop_a_second_one_quits_and_ignored_ones_stay_so():
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        before = signal.getsignal(number)
        with runs.Stop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.signal
            os.kill(os.getpid(), number)
            assert stop.signal == number
            assert signal.getsignal(number) == signal.getsignal(signal.SIGINT) == signal.SIG_DFL
        assert signal.getsignal(number) is before
    with runs.Stop(processes=2) as stop:  # which torchrun may tell twice
        for _ in range(2):
            terminate()
        assert stop.signal == signal.SIGTERM
    signal.signal(signal.SIGHUP, ignored)


def test_a_signal_while_processes_agree_is_not_lost(tmp_path):
    gathered = devices.gathered

    def late(value):
        result = gathered(value)
        if value == 0 and runs.load_checkpoint(tmp_path)["step"] == 5 and not late.done:
            late.done = True
            terminate()
        return result

    late.done = False
    with mock.patch.object(devices, "gathered", late):
        assert mac.main(command(tmp_path, "--steps", "9")) == 128 + signal.SIGTERM


def test_training_in_a_thread_leaves_signals_alone(tmp_path):
    status, before = [], signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=lambda: status.append(
        mac.main(command(tmp_path, "--steps", "3"))))
    thread.start()
    thread.join()
    assert status == [0] and signal.getsignal(signal.SIGTERM) is before


# ------------------------------------------------------------------------------ checkpoints

def small_checkpoint(folder, step=1):
    runs.save_checkpoint(folder, {"step": step, "weights": torch.arange(100.0)})
    return folder / "checkpoint.pt"


def test_of_a_damaged_checkpoint_the_previous_one_takes_the_place(tmp_path, capsys):
    small_checkpoint(tmp_path, 1)
    path, rng = small_checkpoint(tmp_path, 2), np.random.default_rng(0)
    assert runs.load_checkpoint(tmp_path)["step"] == 2
    good = path.read_bytes()
    damaged = [good[:n] for n in rng.integers(0, len(good), 20)]
    for position in rng.integers(0, len(good), 200):
        flipped = bytearray(good)
        flipped[position] ^= 1 << rng.integers(8)
        damaged.append(bytes(flipped))
    for data in damaged:
        path.write_bytes(data)
        assert runs.load_checkpoint(tmp_path)["step"] == 1
        assert f"WARNING: {path} is damaged" in capsys.readouterr().out
    (tmp_path / "checkpoint-previous.pt").write_bytes(damaged[0])
    with pytest.raises(MacError, match="holds no checkpoint that is whole"):
        runs.load_checkpoint(tmp_path)


def test_a_checkpoint_that_carries_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    runs.save_checkpoint(tmp_path, {"step": Evil()})
    with pytest.raises(MacError, match="is not one of this program"):
        runs.load_checkpoint(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_disk_full_leaves_the_old_checkpoint(tmp_path):
    path = small_checkpoint(tmp_path, 1)
    before, limit = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    try:
        with pytest.raises(MacError, match="cannot write .*checkpoint.pt: File too large"):
            small_checkpoint(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize("log_interval, step", [("0", 7), ("6", 6)])  # by a checkpoint or a row
def test_a_number_that_is_not_finite_stops_with_status_3(log_interval, step, tmp_path, capsys):
    given = command(tmp_path, "--save-interval", "7", "--log-interval", log_interval, "--steps")
    assert mac.main([*given, "5"]) == 0
    good, update = (tmp_path / "checkpoint.pt").read_bytes(), mac.update

    def ruinous(agent, *rest):
        agent.value.output.weight.data[0, 0] = torch.inf
        return update(agent, *rest)

    with mock.patch.object(mac, "update", ruinous):
        error = failing(capsys, *given, "20", "--resume", status=3)
    assert f"is not finite at step {step}, the last checkpoint is of step 5" in error
    assert (tmp_path / "checkpoint.pt").read_bytes() == good


@pytest.mark.parametrize("steps", [5, 6, 7, 20])
def test_the_learning_rate_decays_after_a_warmup_that_other_steps_do_not_change(steps, tmp_path):
    seen, update = [], mac.update

    def spy(agent, optimizer, batch, generator, model_only):
        seen.append((round(optimizer.param_groups[0]["lr"].item() * 1e3, 4), model_only))
        if len(seen) == 4:
            terminate()
        return update(agent, optimizer, batch, generator, model_only)

    given = command(tmp_path, "--warmup", "0.5", "--learning-rate", "0.001", "--steps")
    with mock.patch.object(mac, "update", spy):
        assert mac.main([*given, "12"]) == 128 + signal.SIGTERM  # in its warmup of 6
        assert mac.main([*given, str(steps), "--resume"]) == 0
    assert seen == [(1, True)] * min(steps, 6) + [
        (round((steps - step) / (steps - 6), 4), False) for step in range(6, steps)]


# ------------------------------------------------------------------------------ run folders

@pytest.fixture
def run(tmp_path):
    assert mac.main(command(tmp_path / "run", "--steps", "4", "--log-interval", "2")) == 0
    return tmp_path / "run"


def test_what_resume_refuses_and_a_folder_is_neither_overwritten_nor_shared(run, tmp_path, capsys):
    before, resume = {file: file.read_bytes() for file in run.iterdir()}, command(run, "--resume")
    assert "already holds a run" in failing(capsys, *command(run))
    for more, message in (
            (["--width", "32"], "--width: this run has 16, not 32"), (["--seed", "5"], "--seed"),
            (["--env", "paid"], "--env: this run has counting, not paid"),
            (["--no-decay"], "--decay: this run has True"),
            (["--steps", "3"], "--steps 3: this run is at step 4")):
        assert message in failing(capsys, *resume, *more)
    with files.lock(run):
        assert "another process is training in" in failing(capsys, *resume)
    changed = Counting("counting").data("", None)[0]._replace(rewards=np.ones(40, np.float32))
    with mock.patch.object(Counting, "data", lambda *_: (changed, changed)):
        assert "are not those of this run: the fingerprint was" in failing(capsys, *resume)
    assert {file: file.read_bytes() for file in run.iterdir()} == before
    state = runs.load_checkpoint(run)
    for config, message in (({**state["config"], "width": 24}, "size mismatch"),
                            ({**state["config"], "nonsense": 1}, "nonsense"), (None, "TypeError")):
        runs.save_checkpoint(run, {**state, "config": config})
        error = failing(capsys, "--env", "counting", "--save-dir", str(run), "--resume")
        assert "is not one of this program" in error and message in error
    (tmp_path / "alien").mkdir()
    for name in ("train.csv", "config.json"):
        (tmp_path / "alien" / name).write_text("mine")
        assert "holds no checkpoint" in failing(capsys, *command(tmp_path / "alien", "--resume"))
        assert (tmp_path / "alien" / name).read_text() == "mine"


def test_the_settings_printed_are_those_kept(tmp_path, capsys):
    assert mac.main(command(tmp_path, "--steps", "2", "--execute", "9")) == 0
    kept = (tmp_path / "config.json").read_text()
    assert kept in capsys.readouterr().out
    agent, kept = mac.load(tmp_path), json.loads(kept)
    assert kept.pop("facts") == agent.facts and agent.facts["source"] == "counting"
    assert {**kept, "value_goals": (), "actor_goals": ()} == {
        **vars(agent.config), "value_goals": (), "actor_goals": ()} and kept["execute"] == 3


@pytest.mark.parametrize("end", [terminate, kill])
def test_resume_evaluates_again_at_the_checkpoints_step_and_without_a_bar(end, tmp_path, capsys):
    """A run ends in the middle of the second evaluation, whose step has been saved."""
    given = command(tmp_path, "--steps", "6", "--eval-interval", "2", "--save-interval", "5",
                    "--log-interval", "2", "--warmup", "0")
    evaluate = mac.Training.evaluate

    def interrupted(run, *how, **more):
        if run.step == 4:
            end()
        return evaluate(run, *how, **more)

    with mock.patch.object(mac.Training, "evaluate", interrupted), contextlib.suppress(Killed):
        assert mac.main(given) == 128 + signal.SIGTERM
    steps = lambda: [row["step"] for row in read_csv(tmp_path / "eval.csv")]  # noqa: E731
    assert runs.load_checkpoint(tmp_path)["step"] == 4 and steps() == ["2"] * 3
    capsys.readouterr()
    for _ in range(2):  # and once more at the end, which takes the place of the one before
        assert mac.main([*given, "--resume"]) == 0
        assert steps() == ["2"] * 3 + ["4"] * 3 + ["6"] * 3
    printed = capsys.readouterr()
    assert "\r" not in printed.out + printed.err and not printed.err
    assert [line.split(",")[0] for line in printed.out.splitlines()
            if line.startswith("step") and "steps/s" in line] == ["step 6/6"]


# ------------------------------------------------------------------------------ logs

def test_logs_hold_the_rows_of_their_checkpoint(tmp_path):
    logs = runs.Logs(tmp_path)
    for step in (10, 20):
        logs.add("train", [{"step": step, "loss": step / 2}])
    texts = logs.texts()
    assert texts == {"train": "step,loss\n10,5.0\n20,10.0\n", "eval": ""}
    logs.add("train", [{"step": 30, "loss": 15.0}])
    logs.add("eval", [{"step": 30, "task": "task1", "success": 1.0}])
    assert (tmp_path / "eval.csv").exists()
    assert runs.Logs(tmp_path, texts).texts() == texts and not (tmp_path / "eval.csv").exists()


def test_tensorboard_holds_the_numbers_of_the_csv_files_once(tmp_path, monkeypatch, capsys):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    given = command(tmp_path / "run", "--eval-interval", "2", "--log-interval", "1", "--warmup",
                    "0", "--tensorboard", "--steps")
    assert mac.main([*given, "2"]) == 0
    with ends_at(2, kill), pytest.raises(Killed):
        mac.main([*given, "4", "--resume"])
    for _ in range(2):  # the last evaluation is repeated
        assert mac.main([*given, "4", "--resume"]) == 0
    events = accumulator.EventAccumulator(str(tmp_path / "run")).Reload()
    for file, name, tag in (("train", "val_dynamics", "train/val_dynamics"),
                            ("eval", "length", "eval/task1/length")):
        rows = [row for row in read_csv(tmp_path / "run" / f"{file}.csv")
                if row.get("task", "task1") == "task1"]
        assert [(event.step, pytest.approx(event.value)) for event in events.Scalars(tag)] == [
            (int(row["step"]), float(row[name])) for row in rows]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    other = command(tmp_path / "other", "--tensorboard")
    assert "pip install tensorboard" in failing(capsys, *other)
    assert not (tmp_path / "other").exists()


# ------------------------------------------------------------------------------ both programs

@pytest.mark.parametrize("given, message", [
    ("--env cube-duble-play-v0", "cube-double"), ("--env zzz", "zzz"),
    ("--stepz 3", "unrecognized arguments: --stepz 3 (--help lists the flags)"),
    ("cube", "unrecognized arguments: cube"), ("--learning-rate nan", "--learning-rate: nan"),
    ("--steps x", "--steps: invalid int value: 'x'"), ("--seed -1", "--seed: -1 is not"),
    ("--value-goals 0 0 0 0", "--value-goals"), ("--resume --steps", "expected one argument"),
    ("--policy flw", "no 'flw' here, only flow, centered"), ("--device cuda", "sees no GPU"),
    ("--save-dir /proc/nowhere", "cannot use /proc/nowhere: No such file"),
    ("--save-dir ~no-such-user/run", "no home folder for ~no-such-user/run: set --save-dir"),
    ("--chunk 1001", "try a smaller --chunk"), ("--width 1000000", "memory"),
    ("--env antmaze-large-navigate-v0 --collect 3", "no scripted policy")])
def test_bad_input_is_one_line_and_status_2(given, message, tmp_path, capsys):
    if "cuda" in given and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert message in failing(capsys, *command(tmp_path / "run"), "--warmup", "0", *given.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given, message", [
    ("nowhere", "nowhere holds no checkpoint"), ("nowhere --episodes 0", "--episodes"),
    ("nowhere --plot", "nowhere/train.csv is not there or has no rows"),
    ("nowhere --jsn x", "unrecognized arguments: --jsn x"),
    ("nowhere --episode 5", "unrecognized arguments: --episode 5"),
    ("nowhere --json no/x.json", "cannot write no/x.json"),
    ("nowhere --json /dev/null", "cannot write /dev/null"),
    ("nowhere --plot x.pdf", "x.pdf: the name must end in .png"),
    ("nowhere --json x.json --plot", "--json and --video are of played episodes"),
    ("nowhere there --video x.gif", "--json and --video take a single run"),
    ("nowhere --with no.py", "--with no.py"), ("nowhere --video x.mp4", "must end in .gif"),
    ("nowhere --video x.gif --video-size 3", "--video-size")])
def test_bad_input_to_eval(given, message, capsys):
    if "--plot" in given:
        pytest.importorskip("matplotlib")
    assert message in failing(capsys, *given.split(), main=evaluation.main)


def test_a_learning_curve_of_a_damaged_log_is_one_line(run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    draw = [str(run), "--plot", str(tmp_path / "x.png")]
    assert evaluation.main(draw) == 0
    (run / "train.csv").write_bytes(b"\xff\xfe\n\n\x00,\n")
    assert "nothing to plot" in failing(capsys, *draw, main=evaluation.main)


def test_a_video_has_a_third_of_the_frames_of_each_tasks_first_episode(run, tmp_path, capsys,
                                                                       monkeypatch):
    film = [str(run), "--episodes", "2", "--video", str(tmp_path / "x.gif")]
    for image, message in ((None, "gives object"), (np.zeros((9, 9, 3)), "gives float64"), (
            NotImplementedError("no render_mode"), "cannot render with MUJOCO_GL")):
        render = mock.Mock(side_effect=[image])
        monkeypatch.setattr(CountingEnv, "render", lambda env: render(), raising=False)
        with mock.patch.object(evaluation.episodes, "play", side_effect=AssertionError):
            assert message in failing(capsys, *film, main=evaluation.main)
    assert not (tmp_path / "x.gif").exists()
    monkeypatch.setattr(CountingEnv, "render", lambda env: np.full(
        (9, 9, 3), 30 * env.steps + env.task, np.uint8))
    assert evaluation.main(film) == 0
    frames = imageio.v3.imread(tmp_path / "x.gif").astype(int)
    assert np.allclose(frames[:, 0, 0, 0], [31, 121, 211, 32, 122, 212], atol=1)

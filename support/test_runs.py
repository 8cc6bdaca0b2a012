"""pytest: a run that is stopped, killed or damaged loses nothing; logs, signals, both programs."""
import fcntl
import itertools
import json
import os
import pty
import resource
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
from unittest import mock

import imageio.v3
import numpy as np
import pytest
import torch

import eval as evaluation
import mac
from support import devices, files, runs
from support.console import MacError
from support.test_common import COUNTING, CountingEnv, failing, read_csv

SCHEDULE = ("--horizon 2 --candidates 2 --flow-steps 2 --log-interval 4 --eval-interval 0 "
            "--save-interval 5 --decay --warmup 0.25").split()


def command(folder, *more):
    return [*COUNTING, *SCHEDULE, "--save-dir", str(folder), "--steps", "60", *more]


def plain(value):
    """`value` with the bytes of tensors in their place, so that == compares it."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value.numpy().tobytes() if isinstance(value, torch.Tensor) else value


def bits_and_logs(folder):
    """What runs of the same settings must have in common at the same step."""
    state, logs = runs.load_checkpoint(folder), sorted(folder.glob("*.csv"))
    kept = [state[name] for name in ("step", "warmup_steps", "agent", "optimizer", "generators")]
    return plain(kept), [path.read_text() for path in logs]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert mac.main(command(folder)) == 0
    return bits_and_logs(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert mac.main(command(folder, "--steps", "4", "--log-interval", "2")) == 0
    return folder


class Killed(BaseException):
    """Ends a run as SIGKILL does, for this process."""


def kill(*_):
    raise Killed


def terminate(*_):
    signal.raise_signal(signal.SIGTERM)


def ends_at(count, how, owner=mac, name="update"):
    """The function of this name, but its call of this number, from 1, begins with how(...)."""
    function, calls = getattr(owner, name), itertools.count(1)

    def ending(*given, **more):
        if next(calls) == count:
            how(*given)
        return function(*given, **more)

    return mock.patch.object(owner, name, ending)


@pytest.mark.parametrize("settings, place, stop, loss", [
    ("--no-decay --warmup 0", (mac, "update"), 3, 6),
    ("--eval-interval 7", (mac, "update"), 3, 6),
    ("--eval-interval 7", (mac.Training, "evaluate"), 1, 2),
    ("--flow-noise 0.3 --critic model --window 9", (mac, "update"), 3, 6)])
def test_a_stopped_and_a_killed_run_resume_to_the_bits(settings, place, stop, loss, tmp_path):
    whole, ended = tmp_path / "whole", tmp_path / "ended"
    given = [*settings.split(), "--steps", "20"]
    assert mac.main(command(whole, *given)) == 0
    resume = command(ended, *given, "--resume")
    with ends_at(stop, terminate, *place):  # in the warmup, if there is one, or evaluating
        assert mac.main(resume) == 128 + signal.SIGTERM
    with ends_at(loss, kill, *place), pytest.raises(Killed):  # after rows that are not saved
        mac.main(resume)
    with open(ended / "train.csv", "a") as log:
        log.write("18,0.12")  # a torn line
    assert mac.main(resume) == mac.main(resume) == 0  # the second time nothing is left to do
    assert bits_and_logs(ended) == bits_and_logs(whole)


def test_intervals_do_not_change_what_is_learned(uninterrupted, tmp_path):
    assert mac.main(command(tmp_path, "--log-interval", "7", "--eval-interval", "25")) == 0
    assert bits_and_logs(tmp_path)[0] == uninterrupted[0]


# SIGHUP, after which no write to the terminal succeeds; or SIGKILL, with MAC_SLOW=1 at many moments
DELAYS = np.random.default_rng(0).uniform(0.01, 0.3, 20) if "MAC_SLOW" in os.environ else [0.05]


@pytest.mark.parametrize("delay", [None, *DELAYS])
def test_a_process_that_is_killed_or_loses_its_terminal_resumes(delay, uninterrupted, tmp_path):
    program = "import sys, mac, support.test_common; sys.exit(mac.main())"
    child, terminal = pty.fork()
    if not child:
        os.execv(sys.executable, [sys.executable, "-c", program,
                                  *command(tmp_path, "--save-interval", "1")])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))  # so a bar shows
    log, shown = tmp_path / "train.csv", b""
    while not (log.exists() and log.read_text().count("\n") > 2):
        shown += os.read(terminal, 65536)  # fails if the run has ended
    late = threading.Timer(delay or 30, os.kill, (child, signal.SIGKILL))
    late.start()
    if delay is None:
        os.close(terminal)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in ((-signal.SIGKILL, 0) if delay else (128 + signal.SIGHUP,))
    late.cancel()
    assert b"\r" in shown and runs.load_checkpoint(tmp_path)["step"] > 0
    assert mac.main(command(tmp_path, "--resume")) == 0
    assert bits_and_logs(tmp_path) == uninterrupted and not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_first_signal_asks_for_a_stop_a_second_one_quits_and_ignored_ones_stay_so(number):
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    before = signal.getsignal(number)
    with runs.Stop() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.signal
        signal.raise_signal(number)
        assert stop.signal == number
        assert signal.getsignal(number) == signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert signal.getsignal(number) is before
    signal.signal(signal.SIGHUP, ignored)
    with runs.Stop(processes=2):  # which torchrun may tell twice
        terminate()
        terminate()


def test_a_signal_while_processes_agree_is_not_lost(tmp_path):
    sent = []

    def gathered(value):
        if value == 0 and not sent:  # it comes after this process has said that there is none
            sent.append(terminate())
        return [value]

    with mock.patch.object(devices, "gathered", gathered):
        assert mac.main(command(tmp_path, "--steps", "3")) == 128 + signal.SIGTERM
    assert runs.load_checkpoint(tmp_path)["step"] == 1


def small_checkpoint(folder, step):
    runs.save_checkpoint(folder, {"step": step, "weights": torch.arange(100.0)})
    return folder / "checkpoint.pt"


def test_of_a_damaged_checkpoint_the_previous_one_takes_the_place(tmp_path, capsys):
    small_checkpoint(tmp_path, 1)
    path = small_checkpoint(tmp_path, 2)
    assert runs.load_checkpoint(tmp_path)["step"] == 2
    good = path.read_bytes()
    flips = (good[:i] + bytes([good[i] ^ 4]) + good[i + 1:] for i in range(0, len(good), 20))
    for damaged in (*flips, good[:-1], b""):
        path.write_bytes(damaged)
        assert runs.load_checkpoint(tmp_path)["step"] == 1
        assert f"WARNING: {path} is damaged" in capsys.readouterr().out


def test_a_checkpoint_that_carries_code_is_refused(tmp_path):
    class Evil:
        __reduce__ = mock.Mock(return_value=(os.mkdir, (str(tmp_path / "ran"),)))

    small_checkpoint(tmp_path, Evil())
    with pytest.raises(MacError, match="is not one of this program"):
        runs.load_checkpoint(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    path, limit = small_checkpoint(tmp_path, 1), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    with pytest.raises(MacError, match="cannot write .*checkpoint.pt: File too large"):
        small_checkpoint(tmp_path, 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert runs.load_checkpoint(tmp_path)["step"] == 1 and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("log_interval, step", [("0", 7), ("6", 6)])  # by a checkpoint or a row
def test_a_number_that_is_not_finite_stops_with_status_3(log_interval, step, tmp_path, capsys):
    given = command(tmp_path, "--save-interval", "7", "--log-interval", log_interval, "--steps")
    assert mac.main([*given, "5"]) == 0
    with ends_at(1, lambda agent, *_: agent.value.output.weight.data.fill_(torch.inf)):
        error = failing(capsys, *given, "20", "--resume", status=3)
    assert f"is not finite at step {step}, the last checkpoint is of step 5" in error
    assert runs.load_checkpoint(tmp_path)["step"] == 5


@pytest.mark.parametrize("steps, rate", [(7, 1e-3), (20, 1e-3 / 14)])
def test_a_decay_after_a_warmup_that_other_steps_do_not_change(steps, rate, tmp_path):
    given = command(tmp_path, *"--warmup 0.5 --log-interval 1 --learning-rate 0.001".split())
    with ends_at(4, terminate):  # in its warmup of 6
        assert mac.main([*given, "--steps", "12"]) == 128 + signal.SIGTERM
    assert mac.main([*given, "--steps", str(steps), "--resume"]) == 0
    rows, optimizer = read_csv(tmp_path / "train.csv"), runs.load_checkpoint(tmp_path)["optimizer"]
    assert [bool(row["critic"]) for row in rows] == [step >= 6 for step in range(steps)]
    assert np.isclose(optimizer["param_groups"][0]["lr"].item(), rate)  # of the last step


def test_what_resume_refuses_and_a_folder_is_neither_overwritten_nor_shared(run, tmp_path, capsys):
    run = shutil.copytree(run, tmp_path / "run")
    before, resume = {file: file.read_bytes() for file in run.iterdir()}, command(run, "--resume")
    assert "already holds a run" in failing(capsys, *command(run))
    for more, message in (("--width 32", "--width: this run has 16, not 32"),
                          ("--no-decay", "--decay: this run has True, not False"),
                          ("--steps 3", "--steps 3: this run is at step 4")):
        assert message in failing(capsys, *resume, *more.split())
    with files.lock(run):
        assert "another process is training in" in failing(capsys, *resume)
    assert {file: file.read_bytes() for file in run.iterdir()} == before
    state = runs.load_checkpoint(run)
    runs.save_checkpoint(run, {**state, "warmup_steps": 8})  # V would never be trained
    assert "its warmup takes 8" in failing(capsys, *resume, "--steps", "8")
    runs.save_checkpoint(run, {**state, "config": {**state["config"], "width": 24}})
    error = failing(capsys, "--env", "counting", "--save-dir", str(run), "--resume")
    assert "is not one of this program" in error and "size mismatch" in error


def test_the_settings_printed_are_those_kept(tmp_path, capsys):
    assert mac.main(command(tmp_path, "--steps", "2", "--execute", "9")) == 0
    text, agent = (tmp_path / "config.json").read_text(), mac.load(tmp_path)
    assert text in capsys.readouterr().out and agent.config.execute == 3  # of a chunk of 3
    kept = {**vars(agent.config), "terminations": True, "facts": agent.facts}
    assert not agent.config.terminations  # the data have none
    assert json.loads(text) == json.loads(json.dumps(kept))
    again = ["--env", "counting", "--save-dir", str(tmp_path), "--resume", "--execute", "9"]
    assert mac.main(again) == 0 and (tmp_path / "config.json").read_text() == text


def test_tensorboard_holds_the_numbers_of_the_csv_files_once(tmp_path, monkeypatch, capsys):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run, tag = tmp_path / "run", "eval/task1/length"
    given = command(run, *"--tensorboard --eval-interval 2 --log-interval 1 --warmup 0".split())
    assert mac.main([*given, "--steps", "2"]) == 0
    resume = [*given, "--steps", "4", "--resume"]
    with ends_at(2, kill), pytest.raises(Killed):
        mac.main(resume)
    assert mac.main(resume) == mac.main(resume) == 0  # the last evaluation is repeated
    events, rows = accumulator.EventAccumulator(str(run)).Reload(), read_csv(run / "train.csv")
    assert [(event.step, event.value) for event in events.Scalars("train/val_dynamics")] == [
        (int(row["step"]), pytest.approx(float(row["val_dynamics"]))) for row in rows]
    assert [(event.step, event.value) for event in events.Scalars(tag)] == [(2, 7), (4, 7)]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    error = failing(capsys, *command(tmp_path / "other", "--tensorboard"))
    assert "pip install tensorboard" in error and not (tmp_path / "other").exists()


@pytest.mark.parametrize("given, message", [
    ("--env zzz", "zzz"), ("--stepz 3", "unrecognized arguments: --stepz 3 (--help lists"),
    ("--width 1000000", "memory"), ("--policy flw", "no 'flw' here, only flow"),
    ("--tolerance 1 2", "--tolerance: this task has 1 goal coordinates"),
    ("--save-dir /proc/nowhere", "cannot use /proc/nowhere: No such file"),
    ("nowhere", "nowhere holds no checkpoint"), ("nowhere --episodes 0", "--episodes"),
    ("nowhere --with no.py", "no.py"), ("nowhere there --video x.gif", "single"),
    ("nowhere --json no/x.json", "cannot write no/x.json"),
    ("nowhere --json /dev/null", "cannot write /dev/null"),
    ("nowhere --json x --plot", "played episodes"), ("nowhere --plot x.pdf", "end in .png")])
def test_bad_input_is_one_line_and_status_2(given, message, tmp_path, capsys):
    if given.startswith("nowhere"):
        assert message in failing(capsys, *given.split(), main=evaluation.main)
    else:
        assert message in failing(capsys, *command(tmp_path / "run"), *given.split())
    assert not list(tmp_path.iterdir())


def test_a_learning_curve_and_one_of_a_damaged_log(run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    plot = ["--plot", str(tmp_path / "x.png")]
    assert evaluation.main([str(run), *plot]) == 0 and imageio.v3.imread(plot[1]).std() > 0
    for name, text in (("train", b"\xff\xfe\n\n\x00,\n"), ("eval", b"step,success\n1,1\n")):
        folder = shutil.copytree(run, tmp_path / name)
        (folder / f"{name}.csv").write_bytes(text)
        error = f"nothing to plot: {folder / name}.csv is missing or damaged"
        assert error in failing(capsys, str(folder), *plot, main=evaluation.main)


def test_a_film_has_a_third_of_the_frames_of_first_episodes(run, tmp_path, capsys, monkeypatch):
    film = [str(run), "--episodes", "2", "--video", str(tmp_path / "x.gif")]
    for image, message in ((np.zeros((9, 9, 3)), "gives float64"), (OSError(), "cannot render")):
        with (mock.patch.object(CountingEnv, "render", create=True, side_effect=[image]),
              mock.patch.object(evaluation.episodes, "play", side_effect=AssertionError)):
            assert message in failing(capsys, *film, main=evaluation.main)
    monkeypatch.setattr(CountingEnv, "render", lambda env: np.full(
        (9, 9, 3), 30 * env.steps + env.task, np.uint8), raising=False)
    assert evaluation.main(film) == 0
    frames = imageio.v3.imread(tmp_path / "x.gif")[:, 0, 0, 0].astype(int)
    assert np.allclose(frames, [31, 121, 211, 32, 122, 212], atol=1)


def test_d4rls_normalised_score(run, tmp_path, monkeypatch):
    monkeypatch.setitem(evaluation.D4RL_RETURNS, "counting", (-10.0, 90.0))
    report = tmp_path / "x.json"
    assert evaluation.main([str(run), "--episodes", "1", "--json", str(report)]) == 0
    overall = json.loads(report.read_text())["overall"]
    assert overall["return"] == -3.5 and np.isclose(overall["d4rl_score"], 6.5)


def test_a_renderer_that_is_missing_is_one_line(tmp_path):
    process = subprocess.run([sys.executable, mac.__file__, "--env", "cube-single-play-v0"],
                             cwd=tmp_path, env={**os.environ, "MUJOCO_GL": "foo"}, text=True,
                             capture_output=True)
    assert process.returncode == 2 and process.stderr.startswith("error: OGBench does not start")
    assert process.stderr.count("\n") == 1 and not list(tmp_path.glob("exp/*"))

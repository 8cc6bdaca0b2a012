"""pytest: a run that is stopped, killed or damaged loses nothing; logs, signals, both programs.

MAC_SLOW=1 pytest kills a run at fifty random moments.
"""
import concurrent.futures
import fcntl
import itertools
import json
import os
import pty
import resource
import shutil
import signal
import struct
import sys
import termios
import threading
from unittest import mock

import imageio.v3
import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves

import eval as evaluation
import mac
from support import devices, files, runs
from support.console import MacError
from support.test_common import COUNTING, Counting, CountingEnv, failing, read_csv

SCHEDULE = ("--horizon 2 --candidates 2 --flow-steps 2 --log-interval 4 --eval-interval 0 "
            "--save-interval 5 --decay --warmup 0.25").split()


def command(folder, *more):
    return [*COUNTING, *SCHEDULE, "--save-dir", str(folder), "--steps", "60", *more]


def bits_and_logs(folder):
    """What runs of the same settings must have in common at the same step."""
    state, logs = runs.load_checkpoint(folder), sorted(folder.glob("*.csv"))
    kept = [state[name] for name in ("step", "warmup_steps", "agent", "optimizer", "generators")]
    return [leaf.numpy().tobytes() if isinstance(leaf, torch.Tensor) else leaf
            for leaf in tree_leaves(kept)], [path.read_text() for path in logs]


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
    os.kill(os.getpid(), signal.SIGTERM)


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
    ("--policy centered --critic model --window 9", (mac, "update"), 3, 6)])
def test_a_stopped_and_a_killed_run_resume_to_the_bits(settings, place, stop, loss, tmp_path):
    whole, ended = tmp_path / "whole", tmp_path / "ended"
    given = [*settings.split(), "--steps", "20"]
    assert mac.main(command(whole, *given)) == 0
    resume = command(ended, *given, "--resume")
    with ends_at(stop, terminate, *place):
        assert mac.main(resume) == 128 + signal.SIGTERM
    assert runs.load_checkpoint(ended)["step"] in (3, 7)  # 3 is in the warmup, if there is one
    with ends_at(loss, kill, *place), pytest.raises(Killed):  # after rows that are not saved
        mac.main(resume)
    with open(ended / "train.csv", "a") as log:
        log.write("18,0.12")  # a torn line
    for more in ([], ["--save-interval", "7"]):  # the second time nothing is left to do
        assert mac.main([*resume, *more]) == 0
        assert bits_and_logs(ended) == bits_and_logs(whole)


def test_intervals_do_not_change_what_is_learned(uninterrupted, tmp_path):
    others = "--log-interval", "7", "--eval-interval", "25", "--save-interval", "9"
    assert mac.main(command(tmp_path, *others)) == 0
    assert bits_and_logs(tmp_path)[0] == uninterrupted[0]


SOME = np.random.default_rng(0).uniform(0, 0.15, 50 if "MAC_SLOW" in os.environ else 1)


@pytest.mark.parametrize("delay", [None, *SOME])
def test_a_process_that_loses_its_terminal_or_is_killed_resumes_to_the_bits(delay, uninterrupted,
                                                                            tmp_path):
    """SIGKILL after a delay; or the terminal closes: the kernel sends SIGHUP, and every write to
    the terminal fails from there on."""
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
    late.cancel()
    assert status in ((-signal.SIGKILL, 0) if delay else (128 + signal.SIGHUP,))
    assert b"\r" in shown and runs.load_checkpoint(tmp_path)["step"] > 0
    assert mac.main(command(tmp_path, "--resume")) == 0
    assert bits_and_logs(tmp_path) == uninterrupted and not list(tmp_path.glob(".*.tmp"))


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
    signal.signal(signal.SIGHUP, ignored)
    with runs.Stop(processes=2):  # which torchrun may tell twice
        terminate()
        terminate()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:  # threads cannot have signals
        assert not pool.submit(runs.Stop().__enter__).result().before


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
    path, rng = small_checkpoint(tmp_path, 2), np.random.default_rng(0)
    assert runs.load_checkpoint(tmp_path)["step"] == 2
    good = path.read_bytes()
    damaged = [good[:n] for n in rng.integers(0, len(good), 20)]
    for position in rng.integers(0, len(good), 100).tolist():
        damaged.append(good[:position] + bytes([good[position] ^ 4]) + good[position + 1:])
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

    small_checkpoint(tmp_path, Evil())
    with pytest.raises(MacError, match="is not one of this program"):
        runs.load_checkpoint(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, request):
    path, limit = small_checkpoint(tmp_path, 1), resource.getrlimit(resource.RLIMIT_FSIZE)
    request.addfinalizer(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    with pytest.raises(MacError, match="cannot write .*checkpoint.pt: File too large"):
        small_checkpoint(tmp_path, 2)
    assert runs.load_checkpoint(tmp_path)["step"] == 1 and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("log_interval, step", [("0", 7), ("6", 6)])  # by a checkpoint or a row
def test_a_number_that_is_not_finite_stops_with_status_3(log_interval, step, tmp_path, capsys):
    given = command(tmp_path, "--save-interval", "7", "--log-interval", log_interval, "--steps")
    assert mac.main([*given, "5"]) == 0
    good = (tmp_path / "checkpoint.pt").read_bytes()
    with ends_at(1, lambda agent, *_: agent.value.output.weight.data.fill_(torch.inf)):
        error = failing(capsys, *given, "20", "--resume", status=3)
    assert f"is not finite at step {step}, the last checkpoint is of step 5" in error
    assert (tmp_path / "checkpoint.pt").read_bytes() == good


@pytest.mark.parametrize("steps", [5, 7, 20])
def test_the_learning_rate_decays_after_a_warmup_that_other_steps_do_not_change(steps, tmp_path):
    seen, update = [], mac.update

    def spy(agent, optimizer, batch, generator, model_only):
        seen.append((round(optimizer.param_groups[0]["lr"].item() * 1e3, 4), model_only))
        return update(agent, optimizer, batch, generator, model_only)

    given = command(tmp_path, "--warmup", "0.5", "--learning-rate", "0.001", "--steps")
    with mock.patch.object(mac, "update", spy):
        with ends_at(4, terminate):  # in its warmup of 6
            assert mac.main([*given, "12"]) == 128 + signal.SIGTERM
        assert mac.main([*given, str(steps), "--resume"]) == 0
    assert seen == [(1, True)] * min(steps, 6) + [
        (round((steps - step) / (steps - 6), 4), False) for step in range(6, steps)]


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
    changed = Counting("counting").data("", None)[0]._replace(rewards=np.ones(40, np.float32))
    with mock.patch.object(Counting, "data", lambda *_: (changed, changed)):
        assert "are not those of this run: the fingerprint was" in failing(capsys, *resume)
    assert {file: file.read_bytes() for file in run.iterdir()} == before
    state = runs.load_checkpoint(run)
    for change, message in (({"width": 24}, "size mismatch"), ({"nonsense": 1}, "nonsense")):
        runs.save_checkpoint(run, {**state, "config": {**state["config"], **change}})
        error = failing(capsys, "--env", "counting", "--save-dir", str(run), "--resume")
        assert "is not one of this program" in error and message in error
    for path in run.glob("*.pt"):
        path.unlink()
    assert "holds no checkpoint" in failing(capsys, *resume)
    assert (run / "train.csv").read_bytes() == before[run / "train.csv"]


def test_the_settings_printed_are_those_kept(tmp_path, capsys):
    assert mac.main(command(tmp_path, "--steps", "2", "--execute", "9")) == 0
    text, agent = (tmp_path / "config.json").read_text(), mac.load(tmp_path)
    assert text in capsys.readouterr().out
    kept = json.loads(text)
    assert kept.pop("facts") == agent.facts and kept["execute"] == 3  # of a chunk of 3
    assert kept == json.loads(json.dumps(vars(agent.config)))


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
    ("--learning-rate nan", "--learning-rate: nan"), ("--width 1000000", "memory"),
    ("--policy flw", "no 'flw' here, only flow, centered"), ("--device cuda", "sees no GPU"),
    ("--save-dir /proc/nowhere", "cannot use /proc/nowhere: No such file")])
def test_bad_input_is_one_line_and_status_2(given, message, tmp_path, capsys):
    if "cuda" in given and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert message in failing(capsys, *command(tmp_path / "run"), *given.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given, message", [
    ("", "nowhere holds no checkpoint"), ("--episode 5", "unrecognized arguments: --episode 5"),
    ("--episodes 0", "--episodes"), ("--with no.py", "no.py"), ("there --video x.gif", "single"),
    ("--json no/x.json", "cannot write no/x.json"), ("--json /dev/null", "cannot write /dev/null"),
    ("--plot x.pdf", "x.pdf: the name must end in .png"), ("--json x --plot", "played episodes")])
def test_bad_input_to_eval(given, message, capsys):
    assert message in failing(capsys, "nowhere", *given.split(), main=evaluation.main)


def test_a_learning_curve_and_one_of_a_damaged_log(run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    plot = ["--plot", str(tmp_path / "x.png")]
    assert evaluation.main([str(run), *plot]) == 0 and imageio.v3.imread(plot[1]).std() > 0
    (tmp_path / "train.csv").write_bytes(b"\xff\xfe\n\n\x00,\n")
    assert "nothing to plot" in failing(capsys, str(tmp_path), *plot, main=evaluation.main)


def test_a_film_has_a_third_of_the_frames_of_each_tasks_first_episode(run, tmp_path, capsys,
                                                                      monkeypatch):
    film = [str(run), "--episodes", "2", "--video", str(tmp_path / "x.gif")]
    for image, message in ((np.zeros((9, 9, 3)), "gives float64"), (
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

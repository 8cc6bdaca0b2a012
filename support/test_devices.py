"""pytest: several processes are one, to the bits of two shares computed by hand."""
import concurrent.futures
import os
import runpy
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

import mac
from support import devices, runs
from support.test_common import COUNTING, HERE, Counting, read_csv

TWO = [*COUNTING, "--horizon", "2", "--candidates", "2", "--flow-steps", "2", "--eval-interval",
       "40", "--save-interval", "5", "--log-interval", "10", "--steps", "1000000", "--resume"]


def process():
    """mac.main, which leaves its first update's gradients and its last parameters for the tests."""
    folder, update, train = sys.argv[-1], mac.update, mac.Training.train

    def first_update(agent, optimizer, *rest):
        mac.update, result = update, update(agent, optimizer, *rest)
        if not os.path.exists(f"{folder}/gradients.pt") and not devices.RANK:
            torch.save([p.grad for p in agent.parameters() if p.requires_grad],
                       f"{folder}/gradients.pt")
        return result

    def whole_training(run, *rest):
        train(run, *rest)
        torch.save(run.agent.state_dict(), f"{folder}/parameters{devices.RANK}.pt")

    mac.update, mac.Training.train = first_update, whole_training
    sys.exit(mac.main())


def start(folder, command, **environment):
    program = [*command, "-c", "import support.test_devices as t; t.process()", *TWO, "--save-dir",
               str(folder)]
    return subprocess.Popen(program, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env={**os.environ, **environment})


def wait_for_rows(rows, folder, processes):
    log = folder / "train.csv"
    while not log.exists() or log.read_text().count("\n") <= rows:
        assert all(process.poll() is None for process in processes), processes[0].communicate()
        time.sleep(0.02)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The folder of a run of two processes one of which was killed, and which was then resumed
    until torchrun was told to stop after 50 updates or more."""
    folder = tmp_path_factory.mktemp("two")
    with socket.create_server(("localhost", 0)) as server:  # for a port that is free
        port = str(server.getsockname()[1])
    torchruns = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port,
                 "TORCHELASTIC_RUN_ID": "x"}
    first, second = (start(folder, [sys.executable], RANK=rank, **torchruns) for rank in "01")
    wait_for_rows(1, folder, [first, second])
    second.kill()
    _, error = first.communicate(timeout=60)
    second.communicate()
    assert first.returncode == 2 and error == ("error: another process of this run has ended: "
                                               "--resume goes on from the last checkpoint\n")
    assert 5 <= runs.load_checkpoint(folder)["step"] < 50
    torchrun = start(folder, [sys.executable, "-m", "torch.distributed.run", "--standalone",
                              "--nproc-per-node", "2", "--no-python", sys.executable])
    wait_for_rows(5, folder, [torchrun])
    torchrun.terminate()
    out, error = torchrun.communicate(timeout=60)
    assert torchrun.returncode and "error: " not in error
    for text in ("resuming at", "step 40: success", "stopped at step"):
        assert out.count(text) == 1
    return folder


def two_runs(monkeypatch):
    """The same as two runs in this process."""
    monkeypatch.setattr(devices, "PROCESSES", 2)
    settings, result = mac.settings(**mac.parse(TWO)[0]), []
    for rank in range(2):
        monkeypatch.setattr(devices, "RANK", rank)
        result.append(mac.Training(settings, torch.device("cpu"),
                                   *Counting("counting").data("", None), [0]))
    return result


def test_two_processes_killed_stopped_and_resumed_are_two_threads_left_alone(two_processes,
                                                                             monkeypatch):
    state, pair = runs.load_checkpoint(two_processes), two_runs(monkeypatch)
    meeting, shared = threading.Barrier(2, timeout=60), {}

    def average_gradients(optimizer):
        parameters = [p for p in optimizer.param_groups[0]["params"] if p.grad is not None]
        shared[optimizer] = [p.grad / 2 for p in parameters]
        meeting.wait()
        for p, ours, others in zip(parameters, *shared.values()):
            p.grad = ours + others
        meeting.wait()

    def train(run):
        step = run.make_step()
        for _ in range(state["step"]):
            step()

    monkeypatch.setattr(devices, "average_gradients", average_gradients)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(train, pair))
    assert state["step"] >= 50
    for rank, run in enumerate(pair):
        for saved in (state["agent"], torch.load(two_processes / f"parameters{rank}.pt")):
            assert all(torch.equal(value, saved[name])
                       for name, value in run.agent.state_dict().items())
        for index, moments in run.optimizer.state_dict()["state"].items():
            assert all(torch.equal(value, state["optimizer"]["state"][index][name])
                       for name, value in moments.items())
    streams = [generator.get_state() for run in pair for generator in run.generators]
    assert all(map(torch.equal, streams, state["generators"])) and len(state["generators"]) == 4
    steps = [int(row["step"]) for row in read_csv(two_processes / "train.csv")]
    assert steps == list(range(10, state["step"] + 1, 10))


def test_averaged_gradients_of_two_processes_are_the_whole_batchs(two_processes, monkeypatch):
    batches, noise = zip(*(run.generators for run in two_runs(monkeypatch)))
    run = two_runs(monkeypatch)[0]
    batch = mac.Batch(*map(torch.cat, zip(*(run.dataset.sample(4, half) for half in batches))))
    assert not torch.equal(batch.observation[:4], batch.observation[4:])

    def drawn_in_halves(draw):
        def drawn(rows, *rest, **given):
            return torch.cat([draw(rows // 2, *rest, generator=half) for half in noise])
        return drawn

    for name in ("randn", "rand"):
        monkeypatch.setattr(torch, name, drawn_in_halves(getattr(torch, name)))
    sum(run.agent.losses(batch, None)[0].values()).backward()
    gradients = [p.grad for p in run.agent.parameters() if p.requires_grad]
    averaged = torch.load(two_processes / "gradients.pt")
    assert len(averaged) == len(gradients)
    for ours, theirs in zip(gradients, averaged):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5 * ours.abs().max().item())


def test_processes_that_cannot_share_a_batch_are_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(devices, "PROCESSES", 2)
    for size in ("batch_size", "rollout_batch_size"):
        with pytest.raises(mac.MacError, match=f"2 processes cannot divide .*{size}.*9"):
            devices.share(**{"batch_size": 8, "rollout_batch_size": 0, size: 9})
    assert devices.share(batch_size=8, rollout_batch_size=0) == {"batch_size": 4,
                                                                 "rollout_batch_size": 0}


@pytest.mark.parametrize("size, run_id, expected", [
    ("2", None, (0, 1)), ("", None, (0, 1)), ("2", "x", (1, 2))])
def test_what_another_job_left_in_the_environment_is_not_torchruns(size, run_id, expected,
                                                                   monkeypatch):
    given = {"RANK": "1", "WORLD_SIZE": size, "MASTER_ADDR": "localhost"}
    for name, value in {**given, **({"TORCHELASTIC_RUN_ID": run_id} if run_id else {})}.items():
        monkeypatch.setenv(name, value)
    again = runpy.run_path(devices.__file__)
    assert (again["RANK"], again["PROCESSES"]) == expected


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_agent_is_the_same_whatever_the_default_type_and_on_each_device(device, tmp_path):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    given = [*COUNTING, "--steps", "2", "--eval-interval", "0", "--save-dir", str(tmp_path)]
    assert mac.main([*given, "--device", device]) == 0
    one = mac.load(tmp_path).act([1.0], [2.0], 1, torch.Generator().manual_seed(0))
    torch.set_default_dtype(torch.float64)
    try:
        other = mac.load(tmp_path).act([1.0], [2.0], 1, torch.Generator().manual_seed(0))
    finally:
        torch.set_default_dtype(torch.float32)
    assert one.dtype == other.dtype == np.float32 and np.allclose(one, other, atol=1e-6)
    assert mac.main([*given, "--steps", "4", "--resume", "--device", device]) == 0

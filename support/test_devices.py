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
from torch.utils._pytree import tree_leaves

import mac
from support import devices, runs
from support.test_common import COUNTING, HERE, Counting

TWO = [*COUNTING, "--horizon", "2", "--candidates", "2", "--flow-steps", "2", "--eval-interval",
       "20", "--save-interval", "5", "--log-interval", "5", "--steps", "1000000", "--resume"]


def process():
    """mac.main, which leaves each process's parameters."""
    train = mac.Training.train

    def whole_training(run, *rest):
        train(run, *rest)
        torch.save(run.agent.state_dict(), f"{sys.argv[-1]}/parameters{devices.RANK}.pt")

    mac.Training.train = whole_training
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
    for 25 updates or more, until torchrun was told to stop."""
    folder = tmp_path_factory.mktemp("two")
    with socket.create_server(("localhost", 0)) as server:  # for a port that is free
        port = str(server.getsockname()[1])
    given = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port,
             "TORCHELASTIC_RUN_ID": "x"}
    pair = [start(folder, [sys.executable], RANK=rank, **given) for rank in "01"]
    wait_for_rows(2, folder, pair)
    pair[1].kill()
    error = pair[0].communicate(timeout=60)[1]
    pair[1].communicate()
    assert pair[0].returncode == 2 and error == ("error: another process of this run has ended: "
                                                 "--resume goes on from the last checkpoint\n")
    step = runs.load_checkpoint(folder)["step"]
    assert step > 0
    torchrun = start(folder, [sys.executable, "-m", "torch.distributed.run", "--standalone",
                              "--nproc-per-node", "2", "--no-python", sys.executable])
    wait_for_rows(step // 5 + 5, folder, [torchrun])
    torchrun.terminate()
    out, error = torchrun.communicate(timeout=60)
    assert torchrun.returncode and "error: " not in error
    for text in (f"resuming at step {step}", f"step {step // 20 * 20 + 20}: success", "stopped at"):
        assert out.count(text) == 1
    return folder


def two_runs(monkeypatch, steps=0):
    """The same as two runs in this process, each in a thread."""
    monkeypatch.setattr(devices, "PROCESSES", 2)
    settings, pair = mac.settings(**mac.parse(TWO)[0]), []
    for rank in range(2):
        monkeypatch.setattr(devices, "RANK", rank)
        pair.append(mac.Training(settings, torch.device("cpu"),
                                 *Counting("counting").data("", None), [0]))
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
        for _ in range(steps):
            step()

    monkeypatch.setattr(devices, "average_gradients", average_gradients)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(train, pair))
    return pair


def test_two_processes_killed_stopped_and_resumed_are_two_threads_left_alone(two_processes,
                                                                             monkeypatch):
    state = runs.load_checkpoint(two_processes)
    pair = two_runs(monkeypatch, state["step"])
    for rank, run in enumerate(pair):
        agent, moments = run.agent.state_dict(), run.optimizer.state_dict()["state"]
        own = torch.load(two_processes / f"parameters{rank}.pt")
        for ours, saved in ((agent, own), (agent, state["agent"]),
                            (moments, state["optimizer"]["state"])):
            assert all(map(torch.equal, tree_leaves(ours), tree_leaves(saved)))
    streams = [generator.get_state() for run in pair for generator in run.generators]
    assert all(map(torch.equal, streams, state["generators"])) and len(state["generators"]) == 4


def test_averaged_gradients_are_the_whole_batchs(monkeypatch):
    averaged = [p.grad for p in two_runs(monkeypatch, 1)[0].agent.parameters() if p.requires_grad]
    batches, noise = zip(*(run.generators for run in two_runs(monkeypatch)))
    run = two_runs(monkeypatch)[0]
    batch = mac.Batch(*map(torch.cat, zip(*(run.dataset.sample(4, half) for half in batches))))
    assert not torch.equal(batch.observation[:4], batch.observation[4:])

    def drawn_in_halves(draw):
        return lambda rows, *rest, **given: torch.cat(
            [draw(rows // 2, *rest, generator=half) for half in noise])

    for name in ("randn", "rand"):
        monkeypatch.setattr(torch, name, drawn_in_halves(getattr(torch, name)))
    sum(run.agent.losses(batch, None)[0].values()).backward()
    gradients = [p.grad for p in run.agent.parameters() if p.requires_grad]
    for ours, theirs in zip(gradients, averaged, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5 * ours.abs().max().item())


def test_batches_are_shared_evenly_or_refused(monkeypatch):
    monkeypatch.setattr(devices, "PROCESSES", 2)
    assert devices.share(a=8, b=0) == {"a": 4, "b": 0}
    with pytest.raises(mac.MacError, match="2 processes cannot divide .*'b': 9"):
        devices.share(a=8, b=9)


@pytest.mark.parametrize("own, expected", [({}, (0, 1)), ({"TORCHELASTIC_RUN_ID": "x"}, (1, 2))])
def test_what_another_job_left_in_the_environment_is_not_torchruns(own, expected, monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", **own}.items():
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

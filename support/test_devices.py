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
from support.test_common import COUNTING, Counting

TWO = [*COUNTING, "--horizon", "2", "--candidates", "2", "--flow-steps", "2", "--eval-interval",
       "20", "--save-interval", "5", "--log-interval", "5", "--steps", "1000000", "--resume"]


def leaves(value):
    """The tensors in nested dictionaries and lists."""
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value
    return sum(map(leaves, items), []) if isinstance(value, (dict, list, tuple)) else []


def start(folder, command, **environment):
    program = "import sys, mac, support.test_common; sys.exit(mac.main())"
    return subprocess.Popen([*command, "-c", program, *TWO, "--save-dir", str(folder)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, **environment})


def wait_for_rows(rows, folder, processes):
    log = folder / "train.csv"
    while not log.exists() or log.read_text().count("\n") <= rows:
        assert all(process.poll() is None for process in processes), processes[0].communicate()
        time.sleep(0.02)


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


def test_two_processes_killed_stopped_and_resumed_are_two_threads_left_alone(tmp_path, monkeypatch):
    with socket.create_server(("localhost", 0)) as server:  # for a port that is free
        port = str(server.getsockname()[1])
    given = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port,
             "TORCHELASTIC_RUN_ID": "x"}
    pair = [start(tmp_path, [sys.executable], RANK=rank, **given) for rank in "01"]
    wait_for_rows(2, tmp_path, pair)
    pair[1].kill()
    (_, error), _ = (process.communicate(timeout=60) for process in pair)
    assert pair[0].returncode == 2 and error.startswith("error: another process of this run has")
    step = runs.load_checkpoint(tmp_path)["step"]
    torchrun = start(tmp_path, [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                "--nproc-per-node", "2", "--no-python", sys.executable])
    wait_for_rows(step // 5 + 5, tmp_path, [torchrun])
    torchrun.terminate()
    out, error = torchrun.communicate(timeout=60)
    assert torchrun.returncode and "error: " not in error
    for text in (f"resuming at step {step}", f"step {step // 20 * 20 + 20}: success", "stopped at"):
        assert out.count(text) == 1
    state = runs.load_checkpoint(tmp_path)
    pair = two_runs(monkeypatch, state["step"])
    for run in pair:  # process 1 is not saved, but its parameters had a part in each gradient
        for ours, saved in ((run.agent.state_dict(), state["agent"]),
                            (run.optimizer.state_dict()["state"], state["optimizer"]["state"])):
            assert all(map(torch.equal, leaves(ours), leaves(saved)))


def test_averaged_gradients_are_the_whole_batchs(monkeypatch):
    averaged = [p.grad for p in two_runs(monkeypatch, 1)[0].agent.parameters() if p.requires_grad]
    pair = two_runs(monkeypatch)
    (run, _), (batches, noise) = pair, zip(*(run.generators for run in pair))
    batch = mac.Batch(*map(torch.cat, zip(*(run.dataset.sample(4, half) for half in batches))))
    for name in ("randn", "rand"):  # are drawn in halves
        monkeypatch.setattr(torch, name, lambda rows, *rest, draw=getattr(torch, name), **_: (
            torch.cat([draw(rows // 2, *rest, generator=half) for half in noise])))
    sum(run.agent.losses(batch, None)[0].values()).backward()
    gradients = [p.grad for p in run.agent.parameters() if p.requires_grad]
    for ours, theirs in zip(gradients, averaged, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5 * ours.abs().max().item())


def test_an_uneven_batch_is_refused(monkeypatch):
    monkeypatch.setattr(devices, "PROCESSES", 2)
    with pytest.raises(mac.MacError, match="2 processes cannot divide .*'b': 9"):
        devices.share(a=8, b=9)


def test_what_another_job_left_in_the_environment_is_not_torchruns(monkeypatch):
    for name, value, expected in (("RANK", "1", (0, 1)), ("WORLD_SIZE", "2", (0, 1)),
                                  ("TORCHELASTIC_RUN_ID", "x", (1, 2))):
        monkeypatch.setenv(name, value)
        again = runpy.run_path(devices.__file__)
        assert (again["RANK"], again["PROCESSES"]) == expected


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_agent_is_the_same_whatever_the_default_type_and_on_each_device(device, tmp_path):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    given = [*COUNTING, "--eval-interval", "0", "--save-dir", str(tmp_path), "--device", device]
    assert mac.main([*given, "--steps", "2"]) == 0
    actions = []
    for kind in (torch.float64, torch.float32):  # the last is the usual one
        torch.set_default_dtype(kind)
        actions.append(mac.load(tmp_path).act([1.0], [2.0], 1, torch.Generator().manual_seed(0)))
    assert np.allclose(*actions, atol=1e-6) and actions[0].dtype == np.float32
    assert mac.main([*given, "--steps", "4", "--resume"]) == 0


@pytest.mark.parametrize("now", [1, 2])
@pytest.mark.parametrize("cost, quicker", [({1: 7, 2: 5}, 2), ({1: 5, 2: 9}, 1), ({1: 5, 2: 5}, 0)])
def test_the_quicker_number_of_threads_stays_unless_the_user_gave_one(now, cost, quicker,
                                                                      monkeypatch):
    clock, threads = [0], [now]
    monkeypatch.setattr(devices, "THREADS", 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: threads.__setitem__(0, count))
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def work():
        clock[0] += cost[threads[0]]
        return "losses"

    assert devices.choose_threads(work, torch.device("cpu")) == "losses" and threads == [now]
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert devices.choose_threads(work, torch.device("cpu")) == "losses"
    assert threads == [quicker or now]  # of two that are equally quick the one that there is

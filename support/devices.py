"""Devices: one or several of them, random streams, CUDA graphs, and the speed of an update."""
import contextlib
import copy
import datetime
import os
import sys
import time

import numpy as np
import torch
import torch.distributed as dist

from support.console import MacError

# Under torchrun this is process RANK of PROCESSES. Each computes the losses of its share of a batch
# with random streams of its own. Gradients are averaged, so parameters stay equal to the bit.
RANK, PROCESSES, THREADS = 0, 1, torch.get_num_threads()
if "TORCHELASTIC_RUN_ID" in os.environ:  # a RANK left over from another job does not count
    RANK, PROCESSES = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def set_up_device(name):
    """The device to train on; a GPU computes products in TF32. Raises MacError."""
    if name == "cuda" and not torch.cuda.is_available():
        raise MacError("--device cuda: PyTorch sees no GPU here; use --device cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    torch.set_float32_matmul_precision("high")
    if PROCESSES > 1:
        if int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count():
            raise MacError(f"--nproc-per-node: there are {torch.cuda.device_count()} GPUs here")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # from here on "cuda" means this one
    return torch.device("cuda")


def choose_threads(work, device):
    """-> work(). On a CPU it is timed with one thread and with all; the quicker number stays:
    beside another program, threads that wait for each other may be ten times slower than one."""
    result, now = work(), torch.get_num_threads()
    seconds = {1: 0, THREADS: 0, now: 0}
    if device.type == "cuda" or "OMP_NUM_THREADS" in os.environ:
        return result
    for count in [*seconds] * 3:
        torch.set_num_threads(count)
        start = time.perf_counter()
        work()
        seconds[count] += time.perf_counter() - start
    seconds[now] *= 0.9  # so that a small difference changes nothing
    torch.set_num_threads(min(seconds, key=seconds.get))
    return result


def device_of_data(device, *data):
    """Where Trajectories are kept: on `device`, or on the host if a GPU has too little room."""
    size = sum(array.nbytes for arrays in data for array in arrays[:5])
    if device.type == "cuda" and size > 0.6 * torch.cuda.mem_get_info(device)[0]:
        return torch.device("cpu")
    return device


def to_device(batch, device):
    """A NamedTuple of tensors on `device`, copied while the device works."""
    if batch[0].device.type == device.type:
        return batch
    return batch._make(x.pin_memory().to(device, non_blocking=True) for x in batch)


def make_generators(seed, *devices):
    """One generator for each device given, their streams independent of each other."""
    seeds = np.random.SeedSequence(seed).generate_state(len(devices))
    return [torch.Generator(d).manual_seed(int(s)) for d, s in zip(devices, seeds)]


@contextlib.contextmanager
def together():
    """Join torchrun's other processes, if there are any. Process 0 prints errors that all have."""
    if PROCESSES == 1:
        yield
        return
    if RANK:
        sys.stdout = open(os.devnull, "w")
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                            timeout=datetime.timedelta(days=1))  # process 0 collects, evaluates
    try:
        yield
    except Exception as error:
        if "gloo" not in str(error) and not (RANK and isinstance(error, MacError)):
            raise
        if not RANK:
            print("error: another process of this run has ended: --resume goes on from the last "
                  "checkpoint", file=sys.stderr, flush=True)
        os._exit(getattr(error, "status", 2))  # else PyTorch's threads may abort this one
    dist.destroy_process_group()


def gathered(value):
    """-> the `value` of every process. It takes the host about a millisecond, and no GPU's time."""
    values = [value] * PROCESSES
    if PROCESSES > 1:
        dist.all_gather_object(values, value)
    return values


def share(**sizes):
    """This process's part of batches of these sizes. Raises MacError."""
    if any(size % PROCESSES for size in sizes.values()):
        raise MacError(f"{PROCESSES} processes cannot divide {sizes} evenly")
    return {name: size // PROCESSES for name, size in sizes.items()}


def average_gradients(optimizer):
    """Average the gradients of all processes: losses are means, so this is the whole batch's."""
    if PROCESSES > 1:
        parameters = [p for p in optimizer.param_groups[0]["params"] if p.grad is not None]
        flat = torch.cat([p.grad.flatten() for p in parameters]) / PROCESSES
        dist.all_reduce(flat)
        for p, mean in zip(parameters, flat.split([p.numel() for p in parameters])):
            p.grad = mean.view_as(p)


def capture(step, batch, agent, optimizer, generator):
    """-> step(batch) as one CUDA graph: a single call launches hundreds of small kernels. PyTorch
    wants trial updates before a capture; they are undone in place, as the graph knows addresses."""
    place = batch._make(tensor.clone() for tensor in batch)  # the graph reads its batch here
    saved = copy.deepcopy((agent.state_dict(), optimizer.state_dict()))
    random_state = generator.get_state()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(place)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        result = step(place)
    agent.load_state_dict(saved[0])
    for index, state in optimizer.state_dict()["state"].items():
        for name, tensor in state.items():
            before = saved[1]["state"].get(index, {}).get(name)
            tensor.zero_() if before is None else tensor.copy_(before)
    generator.set_state(random_state)

    def replay(batch):
        for there, tensor in zip(place, batch):
            there.copy_(tensor)
        graph.replay()
        return result
    return replay


def benchmark(eager, step, device, updates):
    """-> dict: time of `step`, operations of `eager` (no CUDA graph), peak of a large product."""
    from torch.utils.flop_counter import FlopCounterMode

    def seconds(function, times):
        result = []
        for _ in range(3 + times):  # the first three do not count
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            result.append(time.perf_counter() - start)
        return result[3:]

    with FlopCounterMode(display=False) as counter:
        eager()
    times = seconds(step, updates)
    size = 8192 if device.type == "cuda" else 2048
    square = torch.randn(size, size, device=device)
    peak = 2 * size ** 3 / min(seconds(lambda: square @ square, 3))
    flops, median = counter.get_total_flops(), float(np.median(times))
    return {"ms_median": 1e3 * median, "ms_min": 1e3 * min(times), "gflop_per_update": flops / 1e9,
            "fraction_of_peak": flops / median / peak, "threads": torch.get_num_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(), "device": device.type}

"""pytest: each piece of mac.py against an independent computation; no download, no GPU needed.

MAC_SLOW=1 pytest runs the long sweep too (fifty kills at random moments, about 4 minutes).
"""
import concurrent.futures
import errno
import fcntl
import functools
import hashlib
import http.server
import importlib.util
import io
import json
import math
import os
import pathlib
import pty
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import textwrap
import threading
import time
import types
import zipfile
from unittest import mock

import imageio.v3
import numpy as np
import pytest
import torch

import eval as world
import mac

# A shell starts its background jobs with signals ignored; what is tested here receives them.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
# Bits depend on the number of threads, and nets this small are not faster with two.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the programs that are started here,

HERE = pathlib.Path(__file__).parent
os.environ["PYTHONPATH"] = str(HERE)  # and where they find mac.py
NET = ["--width", "16", "--batch-size", "8", "--device", "cpu"]
TINY = [*NET, "--collect", "1"]
SINGLE, DATA = "cube-single-play-singletask-v0", "cube-single-play-v0-collected1"


@pytest.fixture(autouse=True, scope="session")
def one_environment_per_id():
    """For what a world is asked about; building one takes most of a short run's time."""
    build = functools.cache(lambda env_id: world.OGBench(env_id).make())
    world.OGBench.env = property(lambda self: build(self.env_id))


def config(**settings):
    return mac.Config(**{"width": 16, "chunk": 3, "horizon": 4, "discount": 0.9,
                         "terminations": False, **settings})


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def refuse(number):
    """A function that fails as the system's do."""
    return mock.Mock(side_effect=OSError(number, os.strerror(number)))


# ------------------------------------------------------------------------------ the dataset

LENGTHS = (9, 3, 4, 12)  # states per trajectory; with n = 3 the second one is too short


def hand_made(lengths=LENGTHS, **settings):
    """A dataset whose observations and goals are the state's own index."""
    index = torch.arange(sum(lengths)).float()
    arrays = (index[:, None], torch.stack([index / 100, -index / 100], 1),
              torch.tensor(lengths).cumsum(0) - 1, torch.sin(index),
              torch.zeros(len(lengths), dtype=torch.bool))
    return mac.make_dataset(arrays, [0], config(**settings))


def trajectory_of(i):
    ends = np.cumsum(LENGTHS)
    k = int(np.searchsorted(ends, i, side="right"))
    return range(ends[k] - LENGTHS[k], ends[k])


def test_chunks_rewards_and_labels_by_brute_force():
    data, n = hand_made(), 3
    starts = [i for i in range(sum(LENGTHS)) if i + n in trajectory_of(i)]
    assert data.total_starts == len(starts)  # the last legal start of each included
    batch = data.batch(torch.tensor(starts), generator())
    for row, t in enumerate(starts):
        actions = [x for i in range(t, t + n) for x in (i / 100, -i / 100)]
        assert np.allclose(batch.chunk[row], actions)
        mean = sum(0.9 ** i * math.sin(t + i) for i in range(n)) / n
        assert np.isclose(batch.reward[row], mean)
        assert batch.observation[row] == t and batch.next_observation[row] == t + n
        goal = int(batch.value_goal[row])
        assert batch.success[row] == (t <= goal < t + n)
        assert int(batch.actor_goal[row]) in trajectory_of(t)


@pytest.mark.parametrize("odds", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1),
                                  (0.2, 0, 0.5, 0.3), (0, 0.5, 0, 0.5)])
def test_goal_distribution(odds):
    data, t, samples = hand_made(), 2, 40000
    total, end = sum(LENGTHS), trajectory_of(t)[-1]
    start, last = torch.full((samples,), t), torch.full((samples,), end)
    goals = data.sample_goals(start, last, odds, generator())
    expected = np.zeros(total)
    expected[t] += odds[0]
    for offset in range(1, end - t):
        expected[t + offset] += odds[1] * 0.9 ** (offset - 1) * 0.1
    expected[end] += odds[1] * 0.9 ** (end - t - 1)  # all longer offsets
    expected[t + 1:end + 1] += odds[2] / (end - t)
    expected += odds[3] / total
    frequency = torch.bincount(goals, minlength=total).numpy() / samples
    assert np.abs(frequency - expected).max() < 5 * 0.5 / samples ** 0.5


def test_normalizer():
    normalize, data = mac.Normalizer(3), torch.randn(50, 3) * torch.tensor([1.0, 100.0, 0.0]) + 5
    normalize.fit(data)
    low, high, columns = data.amin(0), data.amax(0), torch.tensor([2, 0])
    scaled = (data - (high + low) / 2) / ((high - low) / 2 + 1e-3)
    assert torch.allclose(normalize(data), scaled, atol=1e-5)
    assert torch.equal(normalize(data[:, columns], columns), normalize(data)[:, columns])


# ------------------------------------------------------------------------------ networks, flow

def test_mlp_against_numpy():
    net = mac.MLP(5, 2, 8)
    x = torch.randn(7, 5)
    h = x.numpy().astype(np.float64)
    for linear, norm in zip(net.hidden[0::3], net.hidden[2::3]):
        norm.weight.data.normal_(), norm.bias.data.normal_(), linear.bias.data.normal_()
        h = h @ linear.weight.detach().numpy().T + linear.bias.detach().numpy()
        h = h / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h ** 3)))
        h = (h - h.mean(1, keepdims=True)) / np.sqrt(h.var(1, keepdims=True) + 1e-6)
        h = h * norm.weight.detach().numpy() + norm.bias.detach().numpy()
    h = h @ net.output.weight.detach().numpy().T
    assert np.allclose(net(x[:, :2], x[:, 2:]).detach(), h, atol=1e-5)


@pytest.mark.parametrize("change", ["fifth layer", "no bias", "other activation", None])
def test_what_is_trained_is_what_is_used_whatever_a_reader_does(change):
    net, x = mac.MLP(5, None, 32), torch.randn(3, 4, 5)
    if change == "fifth layer":
        net.hidden.extend([torch.nn.Linear(32, 32), torch.nn.GELU("tanh")])
    elif change == "no bias":
        net.hidden[3].bias = None
    elif change == "other activation":
        net.hidden[1] = torch.nn.ReLU()
    with torch.no_grad():
        quick = net(x)
        with torch.autocast("cpu", torch.bfloat16):
            low = net(x)
    trained = net(x)
    assert trained.requires_grad and torch.equal(quick, trained) and quick.shape == (3, 4)
    assert torch.equal(quick, net.output(net.hidden(x)).squeeze(-1))
    assert low.dtype == torch.float32 and torch.allclose(low, quick, atol=0.1)


class Field(torch.nn.Module):
    """A velocity that is a plain function of x and t, and keeps what it was asked about."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, observation, goal, x, t):
        self.x, self.t = x, t
        return self.function(x, t)


def flow_policy(function=None, **settings):
    policy = mac.FlowPolicy(2, 1, 4, config(**settings))
    if function:
        policy.velocity = Field(function)
    return policy


def test_euler_on_fields_with_known_solutions():
    x_0 = torch.randn(6, 4).clamp(-1, 1) / 3
    grow = flow_policy(lambda x, t: x, flow_steps=10)  # dx/dt = x: Euler's (1 + 1/F)^F, not e
    assert torch.allclose(grow.flow(None, None, x_0), x_0 * 1.1 ** 10, atol=1e-5)
    assert torch.allclose(grow.flow(None, None, x_0, 5000), x_0 * math.e, atol=1e-2)
    clock = flow_policy(lambda x, t: t.expand_as(x))  # the sum of i / F^2 is (1 - 1/F) / 2
    assert torch.allclose(clock.flow(None, None, x_0, 8), x_0 + (1 - 1 / 8) / 2, atol=1e-6)
    assert torch.equal(clock.flow(None, None, x_0 + 9, 8), torch.ones(6, 4))


def test_flow_matching_target_and_path():
    policy, batch = flow_policy(lambda x, t: 0 * x), toy_batch(torch.randn(5, 4), 1, 2)
    loss, x_0 = policy.flow_loss(batch, generator(3)), torch.randn(5, 4, generator=generator(3))
    assert torch.allclose(loss, ((batch.chunk - x_0) ** 2).mean())
    t = policy.velocity.t
    assert torch.allclose(policy.velocity.x, x_0 + t * (batch.chunk - x_0), atol=1e-6)
    assert t.shape == (5, 1) and 0 <= t.min() and t.max() <= 1


def toy_batch(chunk, goal_width=0, observation_width=1):
    rows = len(chunk)
    observation, goal = torch.zeros(rows, observation_width), torch.zeros(rows, goal_width)
    zeros = torch.zeros(rows)  # the value goal is not the policy's affair
    return mac.Batch(observation, chunk, zeros, observation, zeros, goal + math.nan, goal, zeros,
                     torch.ones_like(chunk))


@pytest.mark.parametrize("kind, steps", [("flow", 500), ("centered", 300), ("gaussian", 500)])
def test_flow_keeps_two_modes_and_a_gaussian_does_not(kind, steps):
    torch.manual_seed(0)
    policy = mac.POLICIES[kind](1, 0, 1, config(width=32, flow_steps=10, eval_flow=True))
    if kind == "gaussian":  # from far off, but not so far that Adam remembers it for 1000 steps
        torch.nn.init.zeros_(policy.network.output.weight)
        torch.nn.init.constant_(policy.network.output.bias, 0.5)
    optimizer = torch.optim.Adam(policy.parameters(), 3e-3)
    noise = generator()
    for _ in range(steps):
        sign = torch.randint(0, 2, (256, 1), generator=noise) * 2.0 - 1
        chunk = 0.6 * sign + 0.05 * torch.randn(256, 1, generator=noise)
        optimizer.zero_grad()
        sum(policy.loss(toy_batch(chunk), noise).values()).backward()
        optimizer.step()
    policy.train(kind != "centered")  # whose distillation takes longer: there the flow itself
    with torch.no_grad():
        sample = policy.propose(torch.zeros(4000, 1), torch.zeros(4000, 0), noise)
    near = [(abs(sample - mode) < 0.2).float().mean() for mode in (-0.6, 0.6)]
    between = (abs(sample) < 0.3).float().mean()
    if kind != "gaussian":
        assert min(near) > 0.35 and between < 0.1
    else:  # one mode, with the moments of atanh of the data: 0 and about atanh(0.6) = 0.69
        x = torch.atanh(sample.clamp(-0.9999, 0.9999))
        assert abs(x.mean()) < 0.1 and 0.6 < x.std() < 0.8
        assert (near[0] - near[1]).abs() < 0.1 and between > 0.15


def test_distillation_fits_the_clipped_teacher_and_gives_it_no_gradient():
    policy = flow_policy(flow_steps=3)
    batch = toy_batch(torch.rand(6, 4) * 2 - 1, 1, 2)
    loss = policy.loss(batch, generator(1))["distill"]
    x = z = torch.randn(6, 4, generator=generator(1))
    with torch.no_grad():
        for i in range(3):
            t = torch.full((6, 1), i / 3)
            x = x + policy.velocity(batch.observation, batch.actor_goal, x, t) / 3
        difference = policy.one_step(batch.observation, batch.actor_goal, z) - x.clip(-1, 1)
    assert torch.allclose(loss, difference.square().mean(), atol=1e-6)
    loss.backward()
    assert all(p.grad is None for p in policy.velocity.parameters())
    assert all(p.grad is not None for p in policy.one_step.parameters())


# ------------------------------------------------------------------------------ the agent

def make_agent(goal=2, **settings):
    torch.manual_seed(1)
    return mac.make_agent(4, 2, list(range(goal)), config(**settings))


def test_best_of_n_is_the_arg_max():
    agent = make_agent()
    observation, goal = torch.randn(5, 4), torch.randn(5, 2)
    chosen = agent.best_of(7, observation, goal, generator(2))
    proposals = agent.policy.propose(observation[:, None].expand(5, 7, 4),
                                     goal[:, None].expand(5, 7, 2), generator(2))
    for b in range(5):
        scores = [agent.critic(observation[b], proposals[b, i], goal[b]).item() for i in range(7)]
        assert torch.equal(chosen[b], proposals[b, int(np.argmax(scores))])
        assert len(proposals[b].unique(dim=0)) == 7  # each candidate has a noise of its own
    assert proposals.abs().max() <= 1


@pytest.mark.parametrize("goal", [0, 2])
def test_without_a_critic_a_step_of_the_models_and_v_rank_proposals(goal):
    agent = make_agent(goal, critic="model")
    observation, target = torch.randn(5, 4), torch.randn(5, goal)
    chunks, q = agent.proposals(7, observation, target, generator(2))
    with torch.no_grad():
        inputs = observation[:, None].expand(5, 7, 4), chunks, target[:, None].expand(5, 7, goal)
        agent.outcome.output.bias.data -= agent.outcome(*inputs).median()  # both sides of 0
        chunks, q = agent.proposals(7, observation, target, generator(2))
        for b in range(5):
            for i in range(7):
                told = agent.outcome(observation[b], chunks[b, i], target[b]).item()
                following = observation[b] + agent.dynamics(observation[b], chunks[b, i])
                value = 0.9 ** 3 * agent.value(following, target[b]).item()
                expected = told + value if not goal else 0 if told > 0 else -1 + value
                assert np.isclose(q[b, i].item(), expected, atol=1e-5)
    assert not goal or 0 < (q == 0).float().mean() < 1
    chosen = agent.best_of(7, observation, target, generator(2))
    assert torch.equal(chosen, chunks[torch.arange(5), q.argmax(1)])
    losses = agent.value_losses(agent.imagine(observation, target, generator(2)))
    assert set(losses) == {"value"}
    assert not any(name.startswith("critic") for name in agent.state_dict())


def test_exact_proposals_come_from_the_flow_itself():
    agent = make_agent(flow_steps=3, eval_flow=True).eval()
    observation, goal = torch.randn(5, 4), torch.randn(5, 2)
    z = torch.randn(5, 1, 6, generator=generator(2))[:, 0]
    expected = agent.policy.flow(observation, goal, z, 3)
    chunk = agent.act(observation.numpy(), goal.numpy(), candidates=1, generator=generator(2))
    assert np.allclose(chunk.reshape(5, 6), expected.detach(), atol=1e-5)


def test_returns_against_plain_recursion_with_an_end_in_the_middle():
    rng = np.random.default_rng(0)
    rewards, masks = rng.normal(size=(4, 3)), np.ones((4, 3))
    masks[1, 0] = masks[0, 2] = masks[3, 2] = 0
    final = rng.normal(size=3)

    def value(k, b):
        return final[b] if k == 4 else rewards[k, b] + 0.7 * masks[k, b] * value(k + 1, b)

    result = mac.returns(*map(torch.tensor, (rewards, masks, final)), 0.7)
    expected = [[value(k, b) for b in range(3)] for k in range(4)]
    assert np.allclose(result, expected)
    assert np.isclose(result[0, 0], rewards[0, 0] + 0.7 * rewards[1, 0])  # nothing after the end


@pytest.mark.parametrize("goal", [0, 2])
def test_rollout_step_by_step(goal):
    agent = make_agent(goal)
    observation, goals = torch.randn(6, 4), torch.randn(6, goal)
    rollout = agent.imagine(observation, goals, generator(4))
    noise, state = generator(4), observation
    with torch.no_grad():
        for k in range(4):
            chunk = agent.best_of(8, state, goals, noise)
            output = agent.outcome(state, chunk, goals)
            success = (torch.sigmoid(output) > 0.5).float()
            reward, mask = (success - 1, 1 - success) if goal else (output, torch.ones(6))
            following = state + agent.dynamics(torch.cat([state, chunk], 1))
            for name, value in (("chunks", chunk), ("rewards", reward), ("masks", mask),
                                ("observations", state)):
                assert torch.allclose(getattr(rollout, name)[k], value, atol=1e-6), name
            state = following
    assert torch.allclose(rollout.observations[4], state, atol=1e-6)
    assert not rollout.chunks.requires_grad


@pytest.mark.parametrize("horizon", [1, 4])
def test_value_and_critic_targets(horizon):
    agent = make_agent(horizon=horizon)
    for p in agent.target_value.parameters():
        p.data.add_(0.05)  # so that the target network differs from the online one
    states, goals = torch.randn(6, 4), torch.randn(6, 2)
    chunks = agent.imagine(states, goals, generator(4)).chunks[0]
    with torch.no_grad():
        agent.outcome.output.bias -= agent.outcome(states, chunks, goals).median()  # some succeed
    rollout = agent.imagine(states, goals, generator(4))
    masks = rollout.masks
    assert 0 < masks[0].mean() < 1
    losses = agent.value_losses(rollout)
    gamma, s = 0.9 ** 3, rollout.observations
    with torch.no_grad():
        target = agent.target_value(s[-1], rollout.goals[0]).numpy()
        total = 0
        for k in reversed(range(horizon)):
            target = rollout.rewards[k].numpy() + gamma * masks[k].numpy() * target
            total += ((agent.value(s[k], rollout.goals[0]).numpy() - target) ** 2).mean() / horizon
        following = agent.value(s[1], rollout.goals[0])
        q_target = (rollout.rewards[0] + gamma * masks[0] * following).numpy()
        q = agent.critic(s[0], rollout.chunks[0], rollout.goals[0]).numpy()
    assert np.isclose(losses["value"].item(), total, rtol=1e-5)
    assert np.isclose(losses["critic"].item(), ((q - q_target) ** 2).mean(), rtol=1e-5)
    losses["critic"].backward()
    assert all(p.grad is None for p in agent.value.parameters())
    losses = agent.value_losses(rollout)
    losses["value"].backward()
    assert all(p.grad is None for p in agent.target_value.parameters())


@pytest.mark.parametrize("goal", [0, 2])
def test_model_losses(goal):
    agent = make_agent(goal)
    batch = mac.Batch(torch.randn(9, 4), torch.rand(9, 6), torch.randn(9), torch.randn(9, 4),
                      torch.randint(0, 2, (9,)).float(), torch.randn(9, goal), torch.randn(9, goal),
                      torch.zeros(9), torch.ones(9, 6))
    losses = agent.model_losses(batch)
    output = agent.outcome(batch.observation, batch.chunk, batch.value_goal)
    error = batch.observation + agent.dynamics(batch.observation, batch.chunk)
    assert torch.allclose(losses["dynamics"], ((error - batch.next_observation) ** 2).mean())
    if goal:
        p, y = torch.sigmoid(output), batch.success
        expected = -(y * p.log() + (1 - y) * (1 - p).log()).mean()
        assert torch.allclose(losses["success"], expected, atol=1e-6)
    else:
        assert torch.allclose(losses["reward"], ((output - batch.reward) ** 2).mean())


def chunk_data(goal=2, **settings):
    torch.manual_seed(2)
    arrays = (torch.randn(60, 4), torch.rand(60, 2) * 2 - 1, torch.tensor([19, 39, 59]),
              torch.randn(60), torch.zeros(3, dtype=torch.bool))
    return mac.make_dataset(arrays, list(range(goal)), config(**settings))


def test_raw_data_are_normalised_at_the_agents_door():
    agent, data = make_agent(), chunk_data()
    agent.normalizer.fit(data.observations * 3)
    batch = data.sample(8, generator())
    seen = {}
    agent.model_losses = lambda batch: seen.update(batch._asdict()) or {}
    agent.losses(batch, generator(), warmup=True)
    middle, scale = agent.normalizer.middle, agent.normalizer.scale
    for name in ("observation", "next_observation"):
        assert torch.equal(seen[name], (getattr(batch, name) - middle) / scale)
    for name in ("value_goal", "actor_goal"):
        assert torch.equal(seen[name], (getattr(batch, name) - middle[:2]) / scale[:2])
    assert torch.equal(seen["chunk"], batch.chunk)


def test_warmup_trains_the_models_and_the_policy_alone():
    agent = make_agent()
    before = {name: p.clone() for name, p in agent.named_parameters()}
    losses = mac.update(agent, mac.make_optimizer(agent), chunk_data().sample(8, generator()),
                        generator(), warmup=True)
    assert set(losses) == {"flow", "distill", "dynamics", "success"}
    changed = {name.split(".")[0] for name, p in agent.named_parameters()
               if (p != before[name]).any()}
    assert changed == {"policy", "dynamics", "outcome"}


def test_update_is_adam_on_the_sum_of_losses_and_moves_the_target():
    agent, twin = make_agent(), make_agent()
    for net in (agent, twin):
        net.target_value.output.bias.data.fill_(0.5)  # so that it is not V
    batch, optimizer = chunk_data().sample(16, generator()), mac.make_optimizer(agent)
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)  # of a step before, which is not to count
    mac.update(agent, optimizer, batch, generator(5))
    losses, _ = twin.losses(batch, generator(5))
    sum(losses.values()).backward()
    for (name, after), before in zip(agent.named_parameters(), twin.parameters()):
        if name.startswith("target"):
            continue
        step = before - 3e-4 * before.grad / (before.grad.abs() + 1e-8)  # Adam's first step
        assert torch.allclose(after, step, atol=1e-6), name
    for target, value, old in zip(agent.target_value.parameters(), twin.value.parameters(),
                                  twin.target_value.parameters()):  # towards V before the step
        assert torch.allclose(target, 0.995 * old + 0.005 * value, atol=1e-7)


@pytest.mark.parametrize("case", ["rb", "gc"])
def test_an_update_gives_the_published_codes_numbers(case, monkeypatch):
    """assets/published.npz holds what the authors' code printed of tiny networks with random
    weights: losses, rollout, returns, and every weight after one step of Adam and EMA."""
    with np.load(HERE / "assets" / "published.npz") as file:
        shared = {key: file[key].item() for key in file if "/" not in key}
        data = {key[3:]: torch.from_numpy(np.array(file[key])) for key in file if key[:2] == case}
    goal, noise = (3 if case == "gc" else 0), {}
    settings = mac.Config(width=16, chunk=shared["n"], horizon=shared["H"], flow_steps=10,
                          candidates=shared["N"], discount=shared["gamma"], ema_rate=shared["tau"],
                          learning_rate=shared["lr"], terminations=False)
    agent = mac.Agent(7, 2, list(range(goal)), settings)
    agent.normalize = lambda batch: batch  # theirs is normalised
    outcome = "success" if goal else "reward"
    nets = {"actor_flow": agent.policy.velocity, "actor_onestep_flow": agent.policy.one_step,
            "dynamics": agent.dynamics, outcome: agent.outcome, "critic": agent.critic,
            "value": agent.value, "target_value": agent.target_value}
    # Of these our inputs are in another order than theirs: state, chunk, goal.
    order = torch.cat([torch.arange(7), torch.arange(20) + 7 + goal, torch.arange(goal) + 7])
    permuted = {"critic": order, outcome: order}

    def published(when, name, net):
        """Pairs of a parameter of ours and its value there."""
        values = {key.rsplit("/", 2)[-2] + "/" + key.rsplit("/", 2)[-1]: value
                  for key, value in data.items() if key.startswith(f"{when}/{name}/")}
        assert len(values) == 18
        for i, linear in enumerate([*net.hidden[0::3], net.output]):
            yield linear.bias, values[f"Dense_{i}/bias"]
            kernel = values[f"Dense_{i}/kernel"].t()
            if i == 0 and name in permuted:
                kernel = kernel[:, permuted[name]]
            yield linear.weight, kernel
        for i, norm in enumerate(net.hidden[2::3]):
            yield norm.weight, values[f"LayerNorm_{i}/scale"]
            yield norm.bias, values[f"LayerNorm_{i}/bias"]

    with torch.no_grad():
        for name, net in nets.items():
            for mine, theirs in published("before", name, net):
                mine.copy_(theirs)
    given = {key[6:]: value for key, value in data.items() if key.startswith("batch/")}
    empty = torch.zeros(shared["B"], 0)
    batch = mac.Batch(given["observations"], given["actions"], given["rewards"],
                      given["next_observations"], 1 - given["masks"],
                      *((given["value_goals"], given["actor_goals"]) if goal else (empty, empty)),
                      torch.zeros(shared["B"]), torch.ones_like(given["actions"]))
    proposals = data["noise/rollout"].transpose(1, 2)  # (H, B, N, D)
    noise = [data["noise/distill"], data["noise/x_0"], *proposals]

    def drawn(*shape, **_):
        value = noise.pop(0)
        assert value.shape == torch.Size(shape[0] if len(shape) == 1 else shape)
        return value

    monkeypatch.setattr(torch, "randn", drawn)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: data["noise/t"])
    seen, imagine, returns = {}, agent.imagine, mac.returns
    agent.imagine = lambda *a: seen.setdefault("rollout", imagine(*a))
    monkeypatch.setattr(mac, "returns", lambda *a: seen.setdefault("returns", returns(*a)))
    losses = mac.update(agent, mac.make_optimizer(agent), batch, None)
    assert not noise
    for name in ("flow", "distill", "dynamics", outcome, "value", "critic"):
        assert torch.allclose(losses[name], data[f"loss/{name}_loss"], rtol=1e-4), name
    rollout = seen["rollout"]
    for mine, name in ((rollout.observations[:-1], "observations"), (rollout.chunks, "actions"),
                       (rollout.observations[1:], "next_observations"),
                       (rollout.rewards, "rewards"), (rollout.masks, "masks"),
                       (seen["returns"], "returns")):
        assert torch.allclose(mine, data[f"rollout/{name}"], rtol=1e-3, atol=1e-4), name
    for name, net in nets.items():
        for mine, theirs in published("after", name, net):
            assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-6), name


def test_rollout_batch_size_limits_the_rollouts_only():
    seen = []
    agent = make_agent(rollout_batch_size=5)
    agent.imagine = lambda *a: seen.append(a[0].shape) or mac.Agent.imagine(agent, *a)
    agent.losses(chunk_data().sample(16, generator()), generator())
    assert seen == [(5, 4)]


def test_bfloat16_changes_proposals_scores_and_rewards_only_a_little():
    full, low = make_agent(0, width=64), make_agent(0, width=64, precision="bfloat16")
    batch = chunk_data(0).sample(64, generator())
    a, b = (agent.losses(batch, generator())[0] for agent in (full, low))
    assert a["dynamics"] == b["dynamics"] and a["flow"] == b["flow"]
    assert all(value.dtype == torch.float32 for value in b.values())
    assert a["distill"] != b["distill"] and torch.allclose(a["distill"], b["distill"], rtol=0.05)
    rollout = low.imagine(batch.observation, batch.value_goal, generator())
    states, chunks = rollout.observations[:-1], rollout.chunks
    with torch.no_grad():
        assert torch.equal(rollout.observations[1], low.next_observation(states[0], chunks[0]))
        rewards, _ = low.outcome.predict(states, chunks, rollout.goals)
    assert rollout.rewards.dtype == torch.float32
    assert not torch.equal(rollout.rewards, rewards)
    assert torch.allclose(rollout.rewards, rewards, atol=0.05)
    low.critic.output.bias.data.fill_(-100)  # where bfloat16 knows only -100, -100.5, ...
    with mac.low_precision(low.config, states), torch.no_grad():
        q = low.critic(states, chunks, rollout.goals)
    assert len(q.unique()) > 40  # and not about a dozen


# ------------------------------------------------------------------------------ policies

def test_gaussian_log_likelihood():
    policy = mac.GaussianPolicy(2, 1, 4, config())
    observation, goal, chunk = torch.randn(9, 2), torch.randn(9, 1), torch.rand(9, 4) * 1.9 - 0.95
    batch = toy_batch(chunk, 1, 2)._replace(observation=observation, actor_goal=goal)
    mean, log_std = (x.detach().double().numpy() for x in policy.moments(observation, goal))
    a = chunk.double().numpy()  # density of tanh(x): that of x = atanh(a), over the slope of tanh
    z = (np.arctanh(a) - mean) / np.exp(log_std)
    log_p = -z ** 2 / 2 - log_std - np.log(2 * np.pi) / 2 - np.log(1 - a ** 2)
    assert np.isclose(policy.loss(batch, None)["likelihood"].item(), -log_p.mean(), rtol=1e-4)


def test_onestep_is_the_flow_policy_with_one_euler_step():
    flow, one = flow_policy(flow_steps=10), mac.OneStepPolicy(2, 1, 4, config())
    one.velocity.load_state_dict(flow.velocity.state_dict())
    observation, goal = torch.randn(9, 2), torch.randn(9, 1)
    z = torch.randn(9, 4, generator=generator(3))
    expected = (z + flow.velocity(observation, goal, z, torch.zeros(9, 1))).clamp(-1, 1)
    assert torch.equal(one.propose(observation, goal, generator(3)), expected)
    batch = toy_batch(torch.rand(3, 4), 1, 2)
    assert one.loss(batch, generator(4)) == {"flow": flow.flow_loss(batch, generator(4))}


def test_centered_flows_start_around_a_regression_that_they_do_not_move():
    policy = mac.CenteredPolicy(2, 1, 4, config())
    batch = toy_batch(torch.rand(6, 4) * 2 - 1, 1, 2)
    batch = batch._replace(taken=(torch.rand(6, 4) < 0.7).float())
    center = policy.center(batch.observation, batch.actor_goal)
    x_0 = policy.noise(batch.observation, batch.actor_goal, generator(3))
    assert torch.allclose(x_0, center + 0.3 * torch.randn(6, 4, generator=generator(3)))
    loss = policy.loss(batch, generator(4))
    error = ((center - batch.chunk) ** 2)[batch.taken == 1].sum() / 24
    assert torch.isclose(loss["center"], error) and set(loss) == {"center", "flow", "distill"}
    (loss["flow"] + loss["distill"]).backward()
    assert all(p.grad is None for p in policy.center.parameters())
    assert all(p.grad is not None for net in (policy.velocity, policy.one_step)
               for p in net.parameters())


def test_fql_gradient_reaches_the_one_step_policy_only():
    agent = make_agent(policy="fql", candidates=1, fql_alpha=0.3)
    batch, noise = chunk_data().sample(16, generator()), generator(7)
    plain, rollout = mac.Agent.losses(agent, batch, noise)
    states, goals = rollout.observations[:-1], rollout.goals
    z = torch.randn(4, 16, 6, generator=noise)
    q = agent.critic(states, agent.policy.one_step(states, goals, z).clamp(-1, 1), goals)
    extract = -q.mean() / q.abs().mean().item()  # over a number: no gradient goes through it
    gradients = torch.autograd.grad(extract, list(agent.policy.one_step.parameters()))
    losses, _ = agent.losses(batch, generator(7))
    assert torch.allclose(losses["distill"], 0.3 * plain["distill"])
    assert all(torch.equal(losses[name], plain[name]) for name in plain if name != "distill")
    assert torch.isclose(losses["extract"], extract)
    losses["extract"].backward()
    for p, gradient in zip(agent.policy.one_step.parameters(), gradients):
        assert torch.allclose(p.grad, gradient, rtol=1e-4, atol=1e-7) and gradient.any()
    assert {".".join(name.split(".")[:2]) for name, p in agent.named_parameters()
            if p.grad is not None} == {"policy.one_step"}


@pytest.mark.parametrize("policy", list(mac.POLICIES))
@pytest.mark.parametrize("chunk", [1, 5])
def test_every_policy_updates(policy, chunk):
    agent = make_agent(policy=policy, chunk=chunk)
    data = chunk_data(chunk=chunk)
    before = {name: p.clone() for name, p in agent.named_parameters()}
    losses = mac.update(agent, mac.make_optimizer(agent), data.sample(8, generator()), generator())
    assert all(value.isfinite() for value in losses.values())
    assert all((p != before[name]).any() for name, p in agent.named_parameters()
               if not name.startswith("target"))  # which was V's copy, and follows V as it was
    assert agent.act(np.zeros(4), np.zeros(2)).shape == (chunk, 2)


# ------------------------------------------------------------------------------ collected data

@pytest.fixture
def collected(monkeypatch):
    """The seeds of the episodes of each collection, which takes a while and makes two rows of
    each: the episode's number, of training ones plus 100."""
    seeds = []

    def collect(function, jobs, *_):
        time.sleep(0.1)
        seeds.append([given for *_, given in jobs])
        for file, *_, (_, split, i) in jobs:
            world.write_npz(file, {"x": np.full(2, split * 100 + i)})

    monkeypatch.setattr(world, "in_processes", collect)
    return seeds


@pytest.fixture
def one_process(monkeypatch):
    monkeypatch.setattr(world, "in_processes",
                        lambda function, jobs, *_: [function(*job) for job in jobs])


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """One collected training and one validation episode of cube-single."""
    folder = tmp_path_factory.mktemp("data")
    world.collect_data(folder / f"{DATA}.npz", "cube-single-v0", 1)
    return folder


def test_collection_is_the_same_in_one_process_and_loads_in_ogbench(data_dir, tmp_path,
                                                                    one_process):
    world.collect_data(tmp_path / f"{DATA}.npz", "cube-single-v0", 1)
    for name in (f"{DATA}.npz", f"{DATA}-val.npz"):
        with np.load(data_dir / name) as a, np.load(tmp_path / name) as b:
            assert sorted(a) == ["actions", "observations", "qpos", "qvel", "terminals"]
            assert all(np.array_equal(a[key], b[key]) for key in a)
            assert a["observations"].shape == (1001, 28) and np.abs(a["actions"]).max() <= 1
            assert a["terminals"].sum() == a["terminals"][-1] == 1
    ogbench, _ = world.import_ogbench()
    _, train, val = ogbench.make_env_and_datasets(
        SINGLE, dataset_path=str(data_dir / f"{DATA}.npz"), compact_dataset=True)
    assert train["valids"].sum() == 1000 and set(np.unique(train["rewards"])) <= {-1, 0}
    assert not np.array_equal(train["observations"], val["observations"])


def test_seeds_of_collected_episodes_and_scenes_that_never_succeed(
        tmp_path, monkeypatch, collected):
    training, validation = tmp_path / "data.npz", tmp_path / "data-val.npz"
    world.collect_data(training, "any", 25)
    mine = training.read_bytes() + b"mine"
    training.write_bytes(mine)
    validation.unlink()
    world.collect_data(training, "any", 25)  # only what is missing, nothing replaced
    some = [(0, 0, 0), (0, 0, 1)]  # a tenth for validation, whose stream comes first
    assert collected == [some + [(0, 1, i) for i in range(25)], some]
    assert training.read_bytes() == mine and validation.exists()
    monkeypatch.setattr(world, "run_oracle", lambda *_: {"qpos": np.full((3, 17), 0.3)})
    with pytest.raises(RuntimeError, match="lost the cube from view"):
        world.collect_episode(tmp_path / "scene.npz", "scene-v0", 0.1, (0, 0, 0))
    assert not (tmp_path / "scene.npz").exists()


def test_noise_on_the_collected_plans(data_dir, tmp_path, monkeypatch):
    """More of it makes the gripper's path rougher, and is in the file's name; 0.1 is OGBench's."""
    rougher = world.run_oracle("cube-single-v0", 0.3, np.random.SeedSequence(0))
    with np.load(data_dir / f"{DATA}.npz") as plain:
        paths = (episode["observations"][:, 12:15] for episode in (plain, rougher))
        roughness = [np.abs(np.diff(path, 3, axis=0)).mean() for path in paths]
    assert roughness[1] > 2 * roughness[0]
    given = []
    monkeypatch.setattr(world, "collect_data", lambda path, *_, noise: given.append((path, noise)))
    for noise in (0.1, 0.3, 0.30000001):
        mac.Config(env=SINGLE, collect_noise=noise).world.find(tmp_path, 5)
    name = "cube-single-play-v0-collected5"
    assert given == [(tmp_path / f"{name}.npz", 0.1), (tmp_path / f"{name}-noise0.3.npz", 0.3),
                     (tmp_path / f"{name}-noise0.30000001.npz", 0.30000001)]


def test_a_collection_takes_up_an_interrupted_one_and_keeps_what_it_cannot_open(tmp_path,
                                                                                one_process):
    parts = tmp_path / ".data-episodes"
    parts.mkdir()
    for name in ("0-0", "1-0"):
        np.savez(parts / f"{name}.npz", episode=np.full(3, int(name[0])))
    before = {path: path.read_bytes() for path in parts.iterdir()}
    (tmp_path / ".data.npz.7.tmp").write_bytes(b"torn")
    with mock.patch.object(np, "load", refuse(errno.EMFILE)), pytest.raises(
            world.MacError, match="cannot read .*/0-0.npz: Too many open files"):
        world.collect_data(tmp_path / "data.npz", "cube-single-v0", 1)
    assert all(path.read_bytes() == data for path, data in before.items())
    world.collect_data(tmp_path / "data.npz", "cube-single-v0", 1)
    assert np.load(tmp_path / "data-val.npz")["episode"].tolist() == [0, 0, 0]
    assert np.load(tmp_path / "data.npz")["episode"].tolist() == [1, 1, 1]
    assert sorted(p.name for p in tmp_path.iterdir()) == [".collecting", "data-val.npz",
                                                               "data.npz"]


def test_collections_side_by_side_do_not_take_each_others_files(tmp_path, collected):
    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        list(pool.map(lambda n: world.collect_data(tmp_path / f"data{n}.npz", "any", n),
                      (1, 2, 3, 3, 3)))
    assert sorted(map(len, collected)) == [2, 3, 4]  # one for validation
    assert len(list(tmp_path.iterdir())) == 7
    assert all(len(np.load(tmp_path / f"data{n}.npz")["x"]) == 2 * n for n in (1, 2, 3))


def test_no_worker_outlives_a_collection(tmp_path):
    """While the pipe that all of them hold is open, one of them is alive."""
    code = """
    import eval, pathlib, sys, time
    def episode(name):
        pathlib.Path(name).touch()
        time.sleep(60)
    def collect(argv):
        eval.in_processes(episode, [(name,) for name in argv], 2, "collecting", "episode")
    if __name__ == "__main__":  # which its workers import too
        sys.exit(eval.command(collect)())"""
    (tmp_path / "collect.py").write_text(textwrap.dedent(code))
    processes = {number: subprocess.Popen(
        [sys.executable, "collect.py", *(f"{number}-{i}" for i in range(4))], text=True,
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for number in (signal.SIGINT, signal.SIGKILL)}
    for number, process in processes.items():
        while len(list(tmp_path.glob(f"{number}-*"))) < 2:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(number)
        rest = process.communicate(timeout=30)[1]
        assert process.returncode == (130 if number == signal.SIGINT else -number)
        assert "Traceback" not in rest and len(list(tmp_path.glob(f"{number}-*"))) == 2


# ------------------------------------------------------------------------------ downloaded data

class Server(http.server.BaseHTTPRequestHandler):
    """Serves `files`; says the full length and sends only the first `cut` bytes."""

    files, cut = {}, None

    def do_GET(self):
        data = self.files.get(self.path.rsplit("/", 1)[1])
        self.send_response(200 if data else 404)
        self.send_header("Content-Length", str(len(data or b"")))
        self.end_headers()
        self.wfile.write((data or b"")[:self.cut])


@pytest.fixture
def server(monkeypatch):
    import ogbench.utils
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setattr(ogbench.utils, "DATASET_URL",
                            f"http://127.0.0.1:{running.server_port}")
        yield Server
        running.shutdown()


@pytest.mark.parametrize("cut, files", [(None, 2), (5000, 2), (None, 1), (None, 0)])
def test_download_whole_cut_short_or_gone(cut, files, server, tmp_path, monkeypatch, capsys):
    names = ["cube-single-play-v0.npz", "cube-single-play-v0-val.npz"]
    buffer, collected = io.BytesIO(), []
    np.savez_compressed(buffer, **arrays())
    server.files, server.cut = {name: buffer.getvalue() for name in names[:files]}, cut
    monkeypatch.setattr(world, "collect_data", lambda path, *_, **__: collected.append(path.name))
    folder, whole = tmp_path / "datasets", cut is None and files == 2
    _, source, count = world.find_world(SINGLE).find(folder, 0)
    assert count == (0 if whole else 1000)  # for --resume to find it again
    assert sorted(p.name for p in folder.iterdir()) == (sorted(names) if whole else [])
    assert collected == ([] if whole else ["cube-single-play-v0-collected1000.npz"])
    assert ("OGBench's file" if whole else "1000 episodes collected") in source
    assert ("the download of cube-single-play-v0 failed" in capsys.readouterr().out) != whole


@pytest.mark.parametrize("suffix", ["", "-val"])
def test_half_a_dataset_is_completed_or_refused_not_replaced(suffix, server, tmp_path, capsys):
    both = ("", "-val") if suffix == "" else ("-val", "")
    mine, other = (tmp_path / f"cube-single-play-v0{part}.npz" for part in both)
    mine.write_bytes(b"mine")
    server.files, server.cut = {}, None
    error = failing(capsys, "--env", SINGLE, "--dataset-dir", str(tmp_path), "--save-dir",
                    str(tmp_path / "run"))
    assert "put cube-single-play-v0.npz and cube-single-play-v0-val.npz into" in error
    np.savez(tmp_path / "data.npz", **arrays())
    data = (tmp_path / "data.npz").read_bytes()
    server.files = {mine.name: data, other.name: data}
    world.find_world(SINGLE).find(tmp_path, 0)
    assert mine.read_bytes() == b"mine" and other.read_bytes() == data


# ------------------------------------------------------------------------------ data files

def arrays(rows=40):
    rng = np.random.default_rng(0)
    data = {"observations": rng.normal(size=(rows, 28)), "actions": rng.uniform(-1, 1, (rows, 5)),
            "terminals": np.arange(rows) % 20 == 19, "qpos": rng.normal(size=(rows, 21)),
            "qvel": rng.normal(size=(rows, 20))}
    return {k: v.astype(bool if k == "terminals" else np.float32) for k, v in data.items()}


def put(key, index, value):
    return lambda data: data[key].__setitem__(index, value)


def replace(key, function):
    return lambda data: data.update({key: function(data[key])})


BAD_DATA = {
    "missing key": (lambda d: d.pop("actions"), "has no array 'actions'"),
    "missing qpos": (lambda d: d.pop("qpos"), "has no array 'qpos'"),
    "no ends": (lambda d: d.pop("terminals"), "has no array 'terminals'"),
    "text": (replace("actions", lambda a: a.astype(str)), "actions has shape (40, 5) and type <U"),
    "objects": (replace("terminals", lambda a: a.astype(object)), "terminals cannot be read"),
    "complex": (replace("actions", lambda a: a + 0j), "type complex64; "),
    "float64 beyond float32": (replace("observations", lambda a: np.full((40, 28), 1e39)),
                               "observations[0, 0] is inf as float32, not a number between"),
    "no axes": (replace("observations", lambda a: a[0, 0]), "observations has shape () "),
    "one axis": (replace("observations", lambda a: a[:, 0]), "observations has shape (40,) "),
    "two axes": (replace("terminals", lambda a: a[:, None]), "terminals has shape (40, 1) "),
    "fewer rows": (replace("actions", lambda a: a[:-3]), "actions has shape (37, 5) "),
    "no rows": (lambda d: d.update({k: v[:0] for k, v in d.items()}), "terminals[-1] is not set"),
    "wrong observation": (replace("observations", lambda a: a[:, :-1]), "for numbers, (40, 28)"),
    "wrong qpos": (replace("qpos", lambda a: a[:, :5]), "qpos has shape (40, 5)"),
    "nan": (put("observations", (7, 3), np.nan), "observations[7, 3] is nan"),
    "inf": (put("actions", (9, 1), -np.inf), "actions[9, 1] is -inf"),
    "nan in qpos": (put("qpos", (0, 0), np.nan), "qpos[0, 0] is nan"),
    "large action": (put("actions", (2, 4), -3.5),
                     "actions[2, 4] is -3.5 as float32, not a number between -1.1 and 1.1"),
    "no final terminal": (put("terminals", 39, False), "terminals[39] is not set"),
}


@pytest.fixture(scope="session")
def cube():
    return world.find_world(SINGLE)


@pytest.mark.parametrize("case", list(BAD_DATA))
def test_bad_data_names_the_file_the_key_and_the_index(case, tmp_path, cube):
    change, message = BAD_DATA[case]
    data = arrays()
    change(data)
    np.savez(tmp_path / "data.npz", **data)
    with pytest.raises(world.MacError, match=f"{tmp_path / 'data.npz'}.*{re.escape(message)}"):
        cube.arrays(tmp_path / "data.npz")


def move(old, new, keep=0):
    def change(data):
        data[new] = data[old].copy()
        data[old][:len(data[old]) - keep] = False
    return change


GOOD_DATA = {  # the same trajectories and numbers, said in another way
    "codes": lambda d: d.update(terminals=np.where(np.arange(40) == 39, 1, d["terminals"] * 2)),
    "minus one": lambda d: d.update(terminals=-d["terminals"].astype(int)),
    "255": lambda d: d.update(terminals=d["terminals"].astype("u1") * 255),
    "float16": lambda d: d.update(terminals=d["terminals"].astype(np.float16)),
    "timeouts": move("terminals", "timeouts", keep=1),
    "truncations": move("terminals", "truncations"),
    "dones alone": lambda d: d.update(dones=d.pop("terminals")),
    "an object that nobody reads": lambda d: d.update(info=np.array([{"ok": 0}] * 40, object)),
    "text that nobody reads": lambda d: d.update(note=np.array("by me")),
    "float64": lambda d: d.update(observations=d["observations"].astype(float)),
    "column order": lambda d: d.update(observations=np.asfortranarray(d["observations"])),
    **{f"actions of {kind}": lambda d, kind=kind: d.update(actions=(d["actions"] > 0).astype(kind))
       for kind in (bool, np.int8, np.uint8, np.int64, np.float16, np.longdouble)},
}


@pytest.mark.parametrize("case", list(GOOD_DATA))
def test_data_coded_in_another_way_are_the_same_data(case, tmp_path, cube):
    for name, change in (("plain", lambda d: None), ("other", GOOD_DATA[case])):
        data = arrays()
        if "actions of" in case:
            data["actions"] = (data["actions"] > 0).astype(np.float32)
        change(data)
        np.savez(tmp_path / f"{name}.npz", **data)
    plain, other = (cube.arrays(tmp_path / f"{name}.npz") for name in ("plain", "other"))
    assert plain[2].tolist() == [19, 39]
    assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(plain, other))
    assert mac.make_dataset(other, [], config()).sample(5, generator()).chunk.isfinite().all()


def test_flipped_and_truncated_data_is_refused(tmp_path, cube):
    path, rng = tmp_path / "data.npz", np.random.default_rng(0)
    np.savez_compressed(path, **arrays())
    cube.arrays(path)
    good = path.read_bytes()
    with zipfile.ZipFile(path) as archive:  # the bytes of the arrays themselves
        spans = [(i.header_offset + 30 + len(i.filename) + 20, i.compress_size - 20)
                 for i in archive.infolist() if i.filename != "qvel.npy"]  # which nobody reads
    damaged = [good[:n] for n in rng.integers(0, len(good), 10)]
    positions = [(p, 1 << rng.integers(8)) for start, length in spans
                 for p in start + rng.integers(0, length, 8)]
    for position, bit in [(good.index(b"PK\x01\x02") + 8, 1), *positions]:  # a flag: "encrypted"
        damaged.append(good[:position] + bytes([good[position] ^ bit]) + good[position + 1:])
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(world.MacError, match="data.npz is damaged"):
            cube.arrays(path)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.EIO, errno.ENOENT])
def test_a_file_that_cannot_be_read_is_not_called_damaged(number, tmp_path, cube, monkeypatch):
    monkeypatch.setattr(np, "load", refuse(number))
    with pytest.raises(world.MacError) as caught:
        cube.arrays(tmp_path / "data.npz")
    assert str(caught.value) == f"cannot read {tmp_path / 'data.npz'}: {os.strerror(number)}"


# ------------------------------------------------------------------------------ own data

# Actions of each episode and how it ended; the file ends before the last one does.
OWN = [(5, "terminals"), (1, "terminals"), (4, "timeouts"), (1, "timeouts"), (3, "terminals"),
       (6, None)]
LOW, HIGH = np.float32([-1, 0]), np.float32([3, 10])  # of actions


def own_data(episodes=OWN, seed=0):
    """Episodes as (states, actions, rewards, how it ended), and D4RL's flat arrays of them."""
    rng, result, flat = np.random.default_rng(seed), [], {key: [] for key in world.OWN_KEYS[:4]}
    flat.update(terminals=[], timeouts=[])
    for length, how in episodes:
        states = rng.normal(size=(length + 1, 3)).astype(np.float32)
        actions = rng.uniform(LOW, HIGH, (length, 2)).astype(np.float32)
        rewards = rng.normal(size=length).astype(np.float32)
        result.append((states, actions, rewards, how))
        for key, rows in zip(flat, (states[:-1], actions, rewards, states[1:])):
            flat[key].extend(rows)
        for key in ("terminals", "timeouts"):
            flat[key].extend([False] * (length - 1) + [how == key])
    return result, {key: np.array(rows) for key, rows in flat.items()}


def write_hdf5(path, arrays):
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        for key, array in arrays.items():
            file[key] = array


def own_file(form, folder):
    """The episodes of OWN as D4RL, Minari or NumPy users write them."""
    episodes, flat = own_data()
    if form == "npz":
        np.savez(folder / "x.npz", **flat, note="mine")
    elif form == "without next":
        flat.pop("next_observations")
        np.savez(folder / "x.npz", **flat)
    elif form == "D4RL":
        write_hdf5(folder / "x.hdf5", {**flat, "infos/qpos": flat["actions"], "metadata/n": 1})
    elif form == "Minari":  # eleven groups, so that 10 follows 9 and not 1
        groups = {}
        for i, (states, actions, rewards, how) in enumerate(episodes):
            last = np.arange(len(actions)) == len(actions) - 1
            groups |= {f"episode_{i + 5}/observations": states, f"episode_{i + 5}/rewards": rewards,
                       f"episode_{i + 5}/actions": actions, f"episode_{i + 5}/infos/x": last,
                       f"episode_{i + 5}/terminations": last & (how == "terminals"),
                       f"episode_{i + 5}/truncations": last & (how == "timeouts")}
        (folder / "data").mkdir()
        write_hdf5(folder / "data" / "x.hdf5", groups)
        return folder / "data" / "x.hdf5"
    elif form == "folder":
        for name, part in (("b", slice(10, None)), ("a", slice(10))):  # two episodes and half one
            np.savez(folder / f"{name}.npz", **{key: array[part] for key, array in flat.items()})
        return folder
    return next(folder.iterdir())


@pytest.mark.parametrize("form", ["npz", "without next", "D4RL", "Minari", "folder"])
def test_own_files_hold_the_same_episodes_however_written(form, tmp_path, capsys):
    path, episodes = own_file(form, tmp_path), own_data()[0]
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    read = [episode for file in files for episode in world.read_episodes(file, 3, 2, LOW, HIGH)]
    assert len(read) == len(episodes)
    for (states, actions, rewards, ended), (s, a, r, how) in zip(read, episodes):
        rows = len(a) - (form == "without next")
        assert np.array_equal(states, s[:rows + 1]) and np.array_equal(rewards, r[:rows])
        assert np.allclose(LOW + (actions + 1) / 2 * (HIGH - LOW), a[:rows], atol=1e-5)
        assert ended == (how == "terminals" and form != "without next")
    said = capsys.readouterr().out
    assert ("last states of 3 episodes" in said) == (form == "without next")
    assert "ends missing" not in said
    if form == "npz":
        _, flat = own_data()
        np.savez(path, **flat | {"terminals": flat["terminals"] & (np.arange(20) != 4)})
        world.read_episodes(path, 3, 2, LOW, HIGH)
        assert "in 1 rows, the first 4, next_observations is not" in capsys.readouterr().out


@pytest.mark.parametrize("n", [1, 3, 4])
def test_chunks_at_the_ends_of_episodes_by_brute_force(n, tmp_path):
    episodes = world.read_episodes(own_file("npz", tmp_path), 3, 2, LOW, HIGH)
    joined = world.join(episodes)
    data = mac.make_dataset(joined, [], config(chunk=n, chunk_reward="sum", terminations=True))
    begin, starts = 0, []
    for states, actions, rewards, ended in episodes:
        length = len(actions)
        legal = [t for t in range(length) if t + n <= length or ended]
        batch = data.batch(torch.tensor(legal, dtype=torch.long) + begin, generator())
        for row, t in enumerate(legal):
            taken = min(n, length - t)
            chunk = np.zeros((n, 2))
            chunk[:taken] = actions[t:t + taken]
            assert np.allclose(batch.chunk[row], chunk.flatten(), atol=1e-4)
            assert batch.taken[row].tolist() == [1] * 2 * taken + [0] * 2 * (n - taken)
            assert np.array_equal(batch.observation[row], states[t])
            assert np.array_equal(batch.next_observation[row], states[t + taken])
            total = sum(0.9 ** i * rewards[t + i] for i in range(taken))
            assert np.isclose(batch.reward[row], total, atol=1e-6)
            assert batch.terminated[row] == (ended and t + n >= length)
        starts += [begin + t for t in legal]
        begin += length + 1
    drawn = data.sample(3000, generator()).observation
    index = (drawn[:, None] == torch.as_tensor(joined.observations)).all(2).int().argmax(1)
    counts = torch.bincount(index, minlength=begin)
    assert data.total_starts == len(starts) and counts.sum() == counts[starts].sum()
    whole = mac.make_dataset(joined, [], config(chunk=n)).total_starts  # without padded chunks
    assert whole == sum(max(0, len(actions) + 1 - n) for _, actions, *_ in episodes) <= len(starts)
    assert (counts[starts] - 3000 / len(starts)).abs().max() < 5 * (3000 / len(starts)) ** 0.5


def test_the_split_is_by_episodes_and_the_same_each_time(tmp_path):
    for count in (2, 3, 40):
        _, flat = own_data([(4, "timeouts")] * count)
        np.savez(tmp_path / "x.npz", **flat)
        task = world.Gymnasium("", str(tmp_path / "x.npz"))
        low, high = flat["actions"].min(), flat["actions"].max()
        flat["actions"] = (flat["actions"] - low) / (high - low)
        np.savez(tmp_path / "x.npz", **flat)
        (training, validation), again = task.data(task.path), task.data(task.path)
        assert all(np.array_equal(a, b) for a, b in zip(training + validation, again[0] + again[1]))
        assert len(validation.ends) == max(1, count // 10)
        assert len(training.ends) + len(validation.ends) == count
        rows = np.concatenate([training.observations, validation.observations])
        states = np.concatenate([flat["observations"], flat["next_observations"][3::4]])
        assert sorted(map(tuple, rows)) == sorted(map(tuple, states))
    assert np.array_equal(validation.ends, np.arange(4, 20, 5))


def test_losses_do_not_see_actions_that_were_not_taken():
    batch = toy_batch(torch.rand(6, 4) * 2 - 1, 1, 2)
    taken = torch.arange(4) < torch.tensor([[4], [4], [2], [2], [3], [1]])
    batch = batch._replace(taken=taken.float())
    z, t = torch.randn(6, 4, generator=generator(3)), torch.zeros(6, 1)
    flow = flow_policy(lambda x, t: 0 * x + 0.5).flow_loss(batch, generator(3))
    assert torch.isclose(flow, ((batch.chunk - z - 0.5) ** 2)[batch.taken == 1].sum() / 24)
    policy = flow_policy(flow_steps=1)
    loss = policy.loss(batch, generator(3))
    s, g = batch.observation, batch.actor_goal
    error = policy.one_step(s, g, z) - (z + policy.velocity(s, g, z, t)).clamp(-1, 1)
    assert torch.isclose(loss["distill"], (error ** 2)[batch.taken == 1].sum() / 24)
    policy = mac.GaussianPolicy(2, 1, 4, config())
    changed = batch._replace(chunk=torch.where(batch.taken == 1, batch.chunk, 1.0))
    assert policy.loss(batch, None)["likelihood"] == policy.loss(changed, None)["likelihood"]


def test_models_are_not_told_of_an_end_by_what_follows_it():
    agent, seen = make_agent(0, terminations=True), {}
    batch = chunk_data(0).sample(9, generator())
    taken = torch.arange(6) < torch.arange(9)[:, None]
    batch = batch._replace(taken=taken.float(), chunk=batch.chunk * taken)
    agent.model_losses = lambda batch: seen.update(chunk=batch.chunk) or {}
    agent.losses(batch, generator(1), warmup=True)
    proposal = agent.policy.propose(agent.normalizer(batch.observation), batch.actor_goal,
                                    generator(1))
    assert torch.equal(seen["chunk"], torch.where(taken, batch.chunk, proposal))
    agent.config.terminations = False
    agent.losses(batch, generator(1), warmup=True)
    assert torch.equal(seen["chunk"], batch.chunk)


def test_a_termination_ends_the_imagined_rollout():
    agent = make_agent(0, terminations=True)
    assert type(agent.outcome) is mac.TerminationModel
    batch = chunk_data(0).sample(9, generator())
    batch = batch._replace(terminated=(torch.arange(9) % 2).float())
    losses = agent.model_losses(batch)
    reward, logit = agent.outcome(batch.observation, batch.chunk, batch.value_goal).unbind(-1)
    p, y = torch.sigmoid(logit), batch.terminated
    assert torch.isclose(losses["termination"], -(y * p.log() + (1 - y) * (1 - p).log()).mean())
    assert torch.isclose(losses["reward"], ((reward - batch.reward) ** 2).mean())
    agent.outcome.output.bias.data[1] = -logit.median()  # so that both happen
    predicted, masks = agent.outcome.predict(batch.observation, batch.chunk, batch.value_goal)
    assert torch.equal(predicted, reward) and torch.equal(masks, (logit <= logit.median()).float())
    assert 0 < masks.sum() < 9


@pytest.fixture(scope="session")
def slide(tmp_path_factory):
    """Episodes by random actions, recorded as the README does, of a simulator of one's own,
    Slide-v0: x moves by the first action, whose box is not symmetric; the task ends, badly, where
    x leaves (-8, 8)."""
    import gymnasium

    class Slide(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,))
        action_space = gymnasium.spaces.Box(LOW, HIGH)
        seen = []

        def reset(self, seed=None, options=None):
            super().reset(seed=seed)
            self.x = self.np_random.uniform(-1, 1, 3).astype(np.float32)
            return self.x.copy(), {}

        def step(self, action):
            self.seen.append(action)
            self.x[0] += action[0]
            return self.x.copy(), 1.0, bool(abs(self.x[0]) > 8), False, {}

    for name in ("Slide-v0", "Hopper-v77"):
        gymnasium.register(name, entry_point=Slide, max_episode_steps=12)
    env, rng, rows = gymnasium.make("Slide-v0"), np.random.default_rng(0), []
    for episode in range(20):
        observation, _ = env.reset(seed=episode)
        done = False
        while not done:
            action = rng.uniform(LOW, HIGH).astype(np.float32)
            following, reward, terminated, truncated, _ = env.step(action)
            rows.append((observation, action, reward, following, terminated, truncated))
            observation, done = following, terminated or truncated
    path = tmp_path_factory.mktemp("slide") / "slide.npz"
    names = (*world.OWN_KEYS[:4], "terminals", "timeouts")
    np.savez(path, **{name: np.array(column) for name, column in zip(names, zip(*rows))})
    return path, Slide.seen


OWN_TINY = [*NET, "--chunk", "3", "--steps", "4", "--log-interval", "2"]


def test_a_simulator_of_ones_own_from_data_to_evaluation(slide, tmp_path, capsys):
    path, seen = slide
    run = tmp_path / "run"
    assert mac.main(["--env", "Slide-v0", "--data", str(path), *OWN_TINY, "--eval-interval", "4",
                     "--eval-episodes", "3", "--save-dir", str(run)]) == 0
    rows = world.read_csv(run / "train.csv")
    assert len(rows) == 2 and float(rows[-1]["termination"]) > 0
    row = world.read_csv(run / "eval.csv")[-1]
    assert row["success"] == row["stderr"] == "" and 3 <= float(row["length"]) <= 12
    assert row["return"] == row["length"]  # its reward is 1 a step
    agent = mac.load(run)
    assert agent.config.terminations and agent.data_source == str(path)
    seen.clear()
    task = agent.config.world
    first = agent.act(*task.reset(task.env, 1, 0), 2, generator())[0]
    for action, expected in ((first, LOW + (first + 1) / 2 * (HIGH - LOW)), ([-1, -1], LOW),
                             ([1, 1], HIGH), ([0, 0], (LOW + HIGH) / 2)):
        task.env.step(np.float32(action))
        assert np.allclose(seen[-1], expected, atol=1e-5)
    capsys.readouterr()
    report = tmp_path / "x.json"
    assert world.main([str(run), "--episodes", "4", "--json", str(report)]) == 0
    assert json.loads(report.read_text())["overall"]["success"] is None
    assert world.main([str(run), "--model-error", "--model-error-steps", "6"]) == 0
    assert "terminations" in capsys.readouterr().out
    if importlib.util.find_spec("matplotlib"):
        assert world.main([str(run), "--plot"]) == 0
        assert world.main([str(run), "--imagine", str(tmp_path / "x.png")]) == 0


def test_the_readmes_recording_is_trained_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(readme_code("def controller").replace("range(300)", "range(3)"), {})
    with np.load("reacher.npz") as file:
        assert file["observations"].shape == (150, 10) and file["timeouts"].sum() == 3
        assert np.array_equal(file["next_observations"][:49], file["observations"][1:50])
    assert mac.main(["--env", "Reacher-v5", "--data", "reacher.npz", *OWN_TINY]) == 0
    assert not mac.load("exp/Reacher-v5-seed0").config.terminations


def test_without_terminations_and_with_d4rls_score(slide, tmp_path, capsys):
    command = ["--env", "Hopper-v77", "--data", str(slide[0]), *OWN_TINY, "--no-terminations",
               "--save-dir", str(tmp_path / "run"), "--eval-interval", "0"]
    assert mac.main(command) == 0
    assert type(mac.load(tmp_path / "run").outcome) is mac.RewardModel
    assert "termination" not in world.read_csv(tmp_path / "run" / "train.csv")[0]
    capsys.readouterr()
    report = tmp_path / "x.json"
    assert world.main([str(tmp_path / "run"), "--episodes", "3", "--json", str(report)]) == 0
    overall = json.loads(report.read_text())["overall"]
    assert np.isclose(overall["d4rl_score"],
                      100 * (overall["return"] + 20.272305) / (3234.3 + 20.272305))
    assert "normalised score: 0.9" in capsys.readouterr().out


@pytest.mark.parametrize("env", [[], ["--env", "Nowhere-v3"], ["--env", "no_such_module:Env-v0"]])
def test_data_without_a_simulator(env, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, flat = own_data(OWN * 4)
    flat["actions"] = flat["actions"] / 10
    np.savez("mine.npz", **flat)
    command = [*env, "--data", "mine.npz", "--seed", "3", *OWN_TINY, "--small", "--steps"]
    assert mac.main([*command, "4"]) == 0
    printed = capsys.readouterr().out
    assert ("cannot make" in printed) == bool(env)
    run = f"exp/{env[1] if env else 'mine'}-seed3"
    assert mac.load(run).act(np.zeros(3)).shape == (3, 2)
    assert not pathlib.Path(run, "eval.csv").exists()
    assert "no simulator" in failing(capsys, run, main=world.main)
    assert "no simulator" in failing(capsys, run, "--imagine", "x.png", main=world.main)
    assert mac.main([*command, "6", "--resume"]) == 0


BAD_OWN = {
    "no rewards": (lambda d: d.pop("rewards"), "has no array 'rewards'"),
    "no ends": (lambda d: [d.pop("terminals"), d.pop("timeouts")], "no episode ends in it"),
    "ends not set": (lambda d: d.update(terminals=d["terminals"] * 0, timeouts=d["timeouts"] * 0),
                     "no episode ends in it"),
    "a row more": (lambda d: d.update(observations=np.r_[d["observations"], [[0, 0, 0]]]),
                   "observations has a row more than actions"),
    "lengths": (lambda d: d.update(rewards=d["rewards"][:-1]), "rewards has shape (19,)"),
    "next": (lambda d: d.update(next_observations=d["next_observations"][:, :1]),
             "next_observations has shape (20, 1)"),
    "observation size": (lambda d: d.update(observations=d["observations"][:, :2]),
                         "observations has shape (20, 2)"),
    "action size": (lambda d: d.update(actions=d["actions"][:, :1]), "actions has shape (20, 1)"),
    "action range": (put("actions", (7, 1), 11.5), "actions[7, 1] is 11.5 as float32, not a number "
                     "between -0.5 and 10.5"),
    "nan": (put("observations", (4, 2), np.nan), "observations[4, 2] is nan"),
    "nan flag": (lambda d: d.update(terminals=d["terminals"] * np.nan), "terminals[0] is nan"),
    "text": (lambda d: d.update(rewards=d["rewards"].astype(str)), "rewards has shape (20,) and"),
    "empty": (lambda d: d.update({key: array[:0] for key, array in d.items()}), "no episode ends"),
    "one episode": (lambda d: d.update({key: array[:5] for key, array in d.items()}),
                    "1 episodes (.npz, .hdf5 or .h5); there must be at least two"),
    "short": (lambda d: d.update(own_data([(1, "timeouts")] * 9)[1]),
              "no trajectory of the training"),
}


@pytest.mark.parametrize("case", list(BAD_OWN))
@pytest.mark.parametrize("kind", ["npz", "hdf5"])
def test_bad_own_data_is_one_line(case, kind, slide, tmp_path, capsys):
    change, message = BAD_OWN[case]
    _, flat = own_data()
    change(flat)
    if kind == "npz":
        np.savez(tmp_path / "x.npz", **flat)
    elif case == "text":
        pytest.skip("HDF5 has no such arrays")
    else:
        write_hdf5(tmp_path / "x.hdf5", flat)
    error = failing(capsys, "--env", "Slide-v0", "--data", str(tmp_path / f"x.{kind}"), *OWN_TINY,
                    "--save-dir", str(tmp_path / "run"))
    assert message in error and (str(tmp_path) in error or case == "short")
    assert not list((tmp_path / "run").glob("[a-z]*"))


@pytest.mark.parametrize("command, message", [
    ("--env cube-double-play-v0 --data x.npz", "cube-double-play-v0 has data of its own"),
    ("--env CartPole-v1 --data x.npz", "its action space is Discrete(2); only flat Box"),
    ("--env Slide-v0", "Any other environment needs --data"),
    ("--env Slide-v0 --data x.npz", "x.npz: No such file"),
    ("--data x.hdf5", "x.hdf5 as HDF5"), ("--data bad.h5", "bad.h5 as HDF5"),
    ("--data dict.h5", "dict.h5: episode_0/observations is a group, as of a Dict space"),
    ("--data /proc/self", "0 episodes"), ("--data x.npz --collect 3", "no scripted policy"),
])
def test_bad_input_about_own_data(command, message, slide, tmp_path, capsys, monkeypatch):
    pytest.importorskip("h5py")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.h5").write_bytes(b"no HDF5")
    write_hdf5(tmp_path / "dict.h5", {"episode_0/observations/state": np.zeros((4, 3))})
    assert message in failing(capsys, *command.split(), *OWN_TINY, "--save-dir", "run")
    monkeypatch.setitem(sys.modules, "h5py", None)
    if "HDF5" in message:
        assert "pip install h5py" in failing(capsys, *command.split(), "--save-dir", "run")
# ------------------------------------------------------------------------------ shards, flat files

PARTS = ((25, 12, 31), (14,), (40, 13))  # states of each shard's trajectories; n = 10
MANY, ONE = "cube-single-play-v0-{:03}{}.npz", "cube-single-play-v0{}.npz"


def shard(i, cube, split=0):
    data = arrays(sum(PARTS[i]))
    data["observations"] = data["observations"] * (i + 1) + split
    data["actions"] *= np.float32(1 - i / 10)
    data["terminals"] = np.isin(np.arange(sum(PARTS[i])), np.cumsum(PARTS[i]) - 1)
    cube.env.reset()  # some of the rewards are those of a success
    data["qpos"][i::7, 14:17] = cube.env.unwrapped._data.mocap_pos[0]
    return data


@pytest.fixture
def shards(tmp_path, cube, monkeypatch):
    """A folder of three shards, the second without validation, and one of them in a single file;
    what is read of them is laid down in this process."""
    folders = tmp_path / "many", tmp_path / "one"
    for split, suffix in enumerate(("", "-val")):
        parts = {i: shard(i, cube, split) for i in range(3) if not (split and i == 1)}
        for folder in folders:
            folder.mkdir(exist_ok=True)
        for i, data in parts.items():
            np.savez(folders[0] / MANY.format(i, suffix), **data)
        np.savez(folders[1] / ONE.format(suffix), **{
            key: np.concatenate([data[key] for data in parts.values()]) for key in parts[0]})
    np.savez(folders[0] / "cube-single-play-v0-collected1.npz", nothing=0)  # of another data set
    monkeypatch.setattr(world, "cores", lambda: 0)
    return folders


def flat(folder, env_id=SINGLE, cache_dir=""):
    found = world.find_world(env_id)
    found.cache_dir = str(cache_dir)
    return found.data(found.find(folder, 0)[0])


def same(some, others):
    return all(np.array_equal(a, b) and a.dtype == b.dtype
               for pair in zip(some, others) for a, b in zip(*pair))


def test_ragged_shards_are_one_data_set(shards, cube, monkeypatch):
    monkeypatch.undo()  # in processes
    (training, validation), one = flat(shards[0]), flat(shards[1])
    assert same((training, validation), one) and len(validation.ends) == 5
    parts = [shard(i, cube) for i in range(3)]
    states, actions = (np.concatenate([part[key] for part in parts])
                       for key in ("observations", "actions"))
    rewards = []
    for part in parts:
        from ogbench.relabel_utils import relabel_dataset
        relabel_dataset(SINGLE, cube.env, part)
        rewards.extend(part["rewards"])
    assert np.array_equal(training.observations, states) and len(set(rewards)) == 2
    assert np.array_equal(training.actions, actions) and np.array_equal(training.rewards, rewards)
    lengths = sum(PARTS, ())
    assert training.ends.tolist() == (np.cumsum(lengths) - 1).tolist()
    assert np.array_equal(training.limits, [states.min(0), states.max(0)])
    for goal in mac.make_dataset(training, [19, 21], config(chunk=10)).sample(99, generator())[5:7]:
        assert (goal[:, None] == torch.tensor(states[:, [19, 21]])).all(2).any(1).all()
    run = mac.Run(config(chunk=10), torch.device("cpu"), cube, training, validation)
    middle, half = (states.max(0) + states.min(0)) / 2, (states.max(0) - states.min(0)) / 2
    assert np.allclose(run.agent.normalizer.middle, middle)
    assert np.allclose(run.agent.normalizer.scale, half + 1e-3)
    before = run.dataset.sample(50, generator())  # the second id of a data set adds no rewards
    rewardless = flat(shards[0], "cube-single-play-v0")[0]
    assert not rewardless.rewards.any() and np.array_equal(rewardless.actions, actions)
    again = mac.make_dataset(flat(shards[0])[0], [], config(chunk=10)).sample(50, generator())
    assert all(torch.equal(a, b) for a, b in zip(before, again))


def test_runs_on_shards_with_or_without_a_window_resume_to_the_bits_of_one_file(
        shards, tmp_path, one_environment, capsys, monkeypatch):
    monkeypatch.setattr(mac, "host_memory", lambda: 1000)  # less than the data take
    for more in ([], ["--window", "30"]):
        command = ["--env", SINGLE, *NET, "--eval-interval", "0", *more]
        folders = [tmp_path / f"{name}{len(more)}" for name in ("one", "many")]
        for data, folder, steps in ((1, 0, 9), (0, 1, 4), (0, 1, 9)):
            assert mac.main([*command, "--dataset-dir", str(shards[data]), "--steps", str(steps),
                             "--save-dir", str(folders[folder]), "--resume"]) == 0
        assert fingerprint(folders[0]) == fingerprint(folders[1])
        said = capsys.readouterr().out
        assert "data: 135 states, 1.78e-05 GB, kept on the host" in said
        assert said.count("WARNING: its memory is 1e-06 GB: a batch waits") == 3 - 3 * len(more[:1])
    assert fingerprint(tmp_path / "one0") != fingerprint(tmp_path / "one2")
    assert "--window: this run has 30, not 31" in failing(
        capsys, *command[:-1], "31", "--resume", "--save-dir", str(folders[1]))
    mac.load_checkpoint(folders[1])


def test_laying_down_goes_on_where_it_was_killed(shards, monkeypatch):
    names, read = [], world.read_data  # of the files of which more than the number of rows is read
    monkeypatch.setattr(world, "read_data",
                        lambda path, widths: names.append(path.name) or read(path, widths))
    killed = mock.Mock(wraps=os.fsync, side_effect=[mock.DEFAULT] * 8 + [KeyboardInterrupt])
    with mock.patch.object(os, "fsync", killed), pytest.raises(KeyboardInterrupt):
        flat(shards[0])  # of six arrays and marks per file
    with concurrent.futures.ThreadPoolExecutor(3) as pool:  # three at once: two of them wait
        results = list(pool.map(flat, [shards[0]] * 3))
    assert names == [MANY.format(*of) for of in (
        (0, ""), (1, ""), (1, ""), (2, ""), (0, "-val"), (2, "-val"))]
    one = flat(shards[1])
    with mock.patch.object(world, "read_npz", None):  # another start reads none of them
        assert all(same(result, one) for result in [*results, flat(shards[0])])


def test_changed_and_fewer_shards_are_laid_down_anew(shards, cube):
    before, first = flat(shards[0])[0], shards[0] / MANY.format(0, "")
    copy = np.array(before.observations)
    for change in ("same rows", "other rows", "one less"):
        data = shard(0, cube)
        if change == "same rows":
            data["actions"] /= 2
        if change == "other rows":
            data = {key: array[25:] for key, array in data.items()}
        if change == "one less":
            (shards[0] / MANY.format(2, "")).unlink()
        np.savez(first, **data)
        parts = [np.load(file) for file in world.data_files(shards[0] / ONE.format(""))[0]]
        training, _ = flat(shards[0])
        for key in ("observations", "actions"):
            assert np.array_equal(getattr(training, key), np.concatenate([p[key] for p in parts]))
        assert training.ends[-1] + 1 == sum(len(part["actions"]) for part in parts)
    assert np.array_equal(before.observations, copy)  # what another run has mapped stays
    assert len(list(shards[0].rglob("observations.npy"))) == 2  # and takes no disk after it
    next(shards[0].rglob("observations.npy")).unlink()  # to make room, but not its marks
    flat(shards[0], SINGLE.replace("v0", "task1-v0"))
    assert np.array_equal(flat(shards[0])[0].observations, training.observations)


def test_a_full_disk_and_a_folder_without_permission_are_one_line(shards, tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    mine = {file: file.read_bytes() for file in shards[0].iterdir()}
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    try:
        with pytest.raises(world.MacError, match="cannot .*many/flat.*: File too large"):
            flat(shards[0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    little = mock.Mock(return_value=types.SimpleNamespace(free=100))
    for module, name, function, reason in (
            (shutil, "disk_usage", little, "No space left on device"),
            (os, "fsync", refuse(errno.ENOSPC), "No space left on device"),
            (world, "lock", refuse(errno.EACCES), "Permission denied")):
        with mock.patch.object(module, name, function), pytest.raises(
                world.MacError, match=f"cannot lay .*many/flat.*: {reason}; --cache-dir names an"):
            flat(shards[0])
    result = flat(shards[0], cache_dir=tmp_path / "cache")
    assert same(result, flat(shards[0])) and same(flat(shards[1], cache_dir=tmp_path / "cache"),
                                                  result)  # each has a folder in it
    assert all(file.read_bytes() == data for file, data in mine.items())


def test_shards_without_validation_are_refused(shards, cube):
    for file in shards[0].glob("*-val.npz"):
        file.unlink()
    with pytest.raises(world.MacError, match="000.npz: cube-single-play-v0-000-val.npz is not"):
        cube.find(shards[0], 0)


def test_a_window_slides_through_all_data_in_order():
    data = hand_made((40, 2, 30, 50), chunk=3, window=20, value_goals=(0, 0, 0, 1))
    assert data.total_starts == 37 + 27 + 47
    legal = [i for i in range(122) if i + 3 < 40 or 42 <= i < 69 or 72 <= i < 119]
    seen = set()
    for step in (0, 1000, 1025, 2000, 2900, 3000, 4000, 5000, 5550):
        data.slide_window(step)
        first = step * 20 // 1000 % len(legal)
        batch = data.sample(2000, generator(step))
        rows = set(batch.observation[:, 0].int().tolist())
        assert rows == {(legal * 2)[first + i] for i in range(20)}
        goals = set(batch.value_goal[:, 0].int().tolist())
        assert goals == {(legal[first] + i) % 122 for i in range(20)}
        seen |= rows if step % 1000 == 0 else set()
    assert seen == set(legal)
    data = hand_made(window=10 ** 9)
    data.slide_window(7)
    assert (data.sample(2000, generator()).observation.unique().numel() == data.total_starts)


def test_nothing_is_kept_per_row_and_data_stay_on_the_host_if_a_gpu_has_no_room(monkeypatch):
    rows = 2 ** 40  # one number, seen as 4 TB
    states, rewards = torch.zeros(1, 1).expand(rows, 1), torch.zeros(1).expand(rows)
    arrays = (states, states, torch.arange(1, 5) * (rows // 4) - 1, rewards,
              torch.zeros(4, dtype=torch.bool))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80e9, 80e9))
    data = mac.make_dataset(arrays, [0], config(), torch.device("cuda"))
    assert data.sample(5, generator()).observation.shape == (5, 1)
    agent = mac.Agent(1, 1, [0], config())
    assert world.model_error(agent, data, 6)[-1][0] == 6


def test_a_large_collection_is_in_shards_that_are_collected_one_by_one(
        tmp_path, monkeypatch, collected):
    monkeypatch.setattr(world, "COLLECTED_EPISODES", 20)
    killed = mock.Mock(wraps=world.in_processes)
    killed.side_effect = [mock.DEFAULT, mock.DEFAULT, KeyboardInterrupt, mock.DEFAULT]
    monkeypatch.setattr(world, "in_processes", killed)
    path = tmp_path / "data.npz"
    with pytest.raises(KeyboardInterrupt):
        world.collect_data(path, "any", 45)
    assert [p.name for p in world.data_files(path)[0]] == ["data-000.npz", "data-001.npz"]
    for _ in range(2):  # the second time there is nothing to do
        world.collect_data(path, "any", 45)
    assert collected == [
        [(0, 0, i) for i in range(a // 10, max(b // 10, a // 10 + 1))]
        + [(0, 1, i) for i in range(a, b)] for a, b in ((0, 20), (20, 40), (40, 45))]
    training, validation = world.data_files(path)
    assert len(training) == len(validation) == 3 and len(list(tmp_path.iterdir())) == 7
    x = np.concatenate([np.load(file)["x"] for file in training])
    assert x.tolist() == np.repeat(100 + np.arange(45), 2).tolist()


# ------------------------------------------------------------------------------ worlds, settings

FAMILIES = ["cube-double-play", "scene-play", "puzzle-3x3-play",
            "pointmaze-medium-navigate", "antmaze-medium-navigate", "humanoidmaze-medium-navigate",
            "antsoccer-arena-navigate"]


@pytest.mark.parametrize("dataset", FAMILIES)
def test_goals_are_columns_of_the_observation(dataset):
    plain, oracle = (world.find_world(f"{dataset}{kind}-v0") for kind in ("", "-oraclerep"))
    assert plain.columns == oracle.columns
    from ogbench.relabel_utils import add_oracle_reps
    observation, goal = plain.reset(plain.env, 4, seed=3)
    assert goal.shape == observation.shape
    _, oracle_goal = oracle.reset(oracle.env, 4, seed=3)
    assert np.allclose(goal[plain.columns], oracle_goal, atol=1e-5)
    base = plain.env.unwrapped
    data = {"qpos": (base.data if hasattr(base, "data") else base._data).qpos[None].copy()}
    if plain.family in ("scene", "puzzle"):
        data["button_states"] = base._cur_button_states[None].copy()
    add_oracle_reps(dataset, plain.env, data)
    assert np.allclose(observation[plain.columns], data["oracle_reps"][0], atol=1e-5)
    plain.goal = "observation"
    assert plain.columns == list(range(plain.sizes[0]))


def test_ids_are_those_of_ogbenchs_datasets():
    _, gymnasium = world.import_ogbench()
    for env_id in world.OGBENCH_IDS:
        words = [word for word in env_id.split("-") if word != "oraclerep"]
        kind = next(i for i, word in enumerate(words) if word in (
            "play", "noisy", "navigate", "stitch", "explore"))
        assert "-".join(words[:kind] + words[kind + 1:]) in gymnasium.registry, env_id
    for env_id in ("pointmaze-large-explore-v0", "antmaze-giant-explore-v0", "cube-single-v0",
                   "cube-octuple-noisy-v0", "cube-single-play-singletask-task6-v0"):
        with pytest.raises(world.MacError, match="did you mean"):
            mac.Config(env=env_id)
    with pytest.raises(world.MacError, match="--goal observation"):
        world.find_world("cube-single-play-oraclerep-v0", "observation")


def test_settings_follow_the_environment():
    def settings(env, **given):
        c = mac.Config(env=env, **given)
        return c.width, c.batch_size, c.steps, c.candidates, c.actor_goals

    assert mac.Config() == mac.Config(env="cube-double-play-v0") and mac.Config().width == 1024
    cube, puzzle, maze = (0, 1, 0, 0), (0, 0.5, 0, 0.5), (0, 0, 1, 0)
    assert settings(SINGLE) == (512, 256, 10 ** 6, 8, cube)
    for env in ("cube-double-play-v0", "cube-double-play-oraclerep-v0"):
        assert settings(env) == (1024, 1024, 2 * 10 ** 6, 8, cube)
    assert settings("puzzle-3x3-play-oraclerep-v0") == (1024, 1024, 2 * 10 ** 6, 8, puzzle)
    assert settings("puzzle-4x5-play-oraclerep-v0") == (256, 1024, 2 * 10 ** 6, 32, puzzle)
    for env in ("humanoidmaze-giant-navigate-oraclerep-v0", "antsoccer-arena-navigate-v0"):
        assert settings(env)[-1] == maze
    assert settings("cube-double-play-v0", width=7)[0] == 7
    given, _, _ = mac.parse(["--env", SINGLE, "--small", "--no-eval-flow", "--eval_episodes=3",
                             "--chunk", "5"])
    small = mac.Config(**given)
    assert (small.eval_flow, small.decay, small.eval_episodes, small.execute) == (False, True, 3, 5)
    for env, noise, critic, execute in (
            ("cube-double-play-v0", 0.3, "model", 3),
            ("cube-double-play-oraclerep-v0", 0.3, "model", 3),
            ("cube-single-play-v0", 0.3, "model", 3), ("puzzle-3x3-play-v0", 0.3, "model", 3),
            ("scene-play-v0", 0.3, "model", 3), ("cube-triple-play-v0", 0.1, "network", 10),
            ("cube-double-play-singletask-v0", 0.1, "network", 10)):
        small = mac.Config(env=env, small=True)
        assert (small.collect_noise, small.critic, small.execute) == (noise, critic, execute)
    whole = mac.Config(env="cube-double-play-v0", small=True, goal="observation")
    assert (whole.critic, whole.collect) == ("network", 100)
    fql = mac.Config(env="cube-double-play-v0", policy="fql", small=True)
    assert (fql.candidates, fql.eval_candidates, fql.eval_flow, fql.fql_alpha) == (1, 1, False, 0.3)
    assert mac.Config(env=SINGLE, policy="fql").fql_alpha == 1


# ------------------------------------------------------------------------------ runs

def failing(capsys, *command, status=2, main=mac.main):
    """Run a program in this process; -> its single line of error."""
    capsys.readouterr()
    assert main(list(command)) == status
    error = [x for x in capsys.readouterr().err.splitlines() if "error" in x]
    assert len(error) == 1 and error[0].startswith("error: "), error
    return error[0]


SCHEDULE = ["--log-interval", "4", "--eval-interval", "0", "--save-interval", "5", "--decay",
            "--warmup", "0.25"]


def train_command(data_dir, folder, *more):
    return ["--env", SINGLE, *TINY, *SCHEDULE, "--dataset-dir", str(data_dir), "--save-dir",
            str(folder), "--steps", "60", *more]


@pytest.fixture(scope="session")
def trained(data_dir, tmp_path_factory):
    """A run of a few steps per id family."""
    runs = {}
    for kind in ("singletask-", "oraclerep-", ""):
        env = f"cube-single-play-{kind}v0"
        runs[env] = tmp_path_factory.mktemp("runs") / env
        assert mac.main(train_command(data_dir, runs[env], "--env", env, "--steps", "4",
                                      "--log-interval", "2")) == 0
    return runs


@pytest.fixture
def one_environment(monkeypatch):
    monkeypatch.setattr(world.Evaluator.__init__, "__defaults__", (1,))  # building one takes 1 s


def test_command_line_from_training_to_evaluation(trained, capsys, tmp_path, one_environment):
    for env, folder in trained.items():
        assert [row["step"] for row in world.read_csv(folder / "train.csv")] == ["2", "4"]
        assert json.loads((folder / "config.json").read_text())["env"] == env
        report = tmp_path / f"{env}.json"
        assert world.main([str(folder), "--episodes", "1", "--execute", "9", "--candidates",
                           "2", "--json", str(report)]) == 0
        result = json.loads(report.read_text())
        assert [result[key] for key in ("policy", "step", "seed", "execute", "candidates")] == [
            "flow", 4, 0, 9, 2]
        assert len(result["tasks"]) == (1 if "singletask" in env else 5)
        assert set(result["overall"]) == {"success", "stderr", "return", "return_stderr",
                                          "length"}
        printed = capsys.readouterr().out
        assert "overall" in printed and "collected" in printed


@pytest.mark.parametrize("policy, chunk", [("onestep", 25), ("gaussian", 1), ("fql", 10)])
def test_every_policy_from_the_command_line(policy, chunk, data_dir, tmp_path, capsys,
                                            one_environment):
    run = tmp_path / "run"
    assert mac.main(train_command(data_dir, run, "--policy", policy, "--chunk", str(chunk),
                                  "--steps", "8", "--warmup", "0.5")) == 0
    warmup, joint = world.read_csv(run / "train.csv")
    own = {"onestep": "flow", "gaussian": "likelihood", "fql": "extract"}[policy]
    assert joint[own] and joint["critic"] and not warmup["critic"]
    assert bool(warmup[own]) == (policy != "fql")  # there is no Q to climb yet
    assert world.main([str(run), "--episodes", "1"]) == 0
    assert f"{policy} policy, best of {1 if policy == 'fql' else 32}" in capsys.readouterr().out
    assert world.main([str(run), "--model-error", "--model-error-steps", "50"]) == 0
    steps = [int(row["steps"]) for row in world.read_csv(run / "model_error.csv")]
    assert steps == list(range(0, 51, chunk))


class CountingEnv:
    """Observes how many steps the episode has had; task 2 succeeds at the third, every episode ends
    with the seventh. Every environment keeps its actions, a list per episode."""

    def __init__(self):
        self.actions = []

    def step(self, action):
        self.steps += 1
        self.actions[-1].append(action.item())
        success = self.task == 2 and self.steps == 3
        return np.full(1, self.steps), -0.5, False, self.steps == 7, {"success": success}


class Counting:
    """A world of one's own: what the programs ask of one."""

    knows, tasks, make = staticmethod("counting".__eq__), [1, 2], CountingEnv
    scripted, family, dataset = False, "counting", "counting"
    sizes, columns, fixed, goal = (1, 1), [0], False, "task"

    def __init__(self, env_id="counting", goal="task"):
        self.env = CountingEnv()
        self.env.steps = self.env.task = 0

    def reset(self, env, task, seed):
        env.task, env.steps = task, 0
        env.actions.append([])
        return np.zeros(1), np.full(1, task)

    def find(self, folder, collect, obtain=True):
        return pathlib.Path("counted.npz"), "counting", 0

    def data(self, path):
        states = np.tile(np.arange(8, dtype=np.float32), 5)[:, None]
        return 2 * [world.Trajectories(states, np.ones((40, 1), np.float32) / 2,
                                       np.arange(7, 40, 8), np.zeros(40), np.zeros(5, bool))]


world.WORLDS.append(Counting)
COUNTING = ["--env", "counting", *NET, "--chunk", "3", "--eval-episodes", "1"]


@pytest.mark.parametrize("execute, expected", [
    (None, [0, 10, 20, 30, 40, 50, 60]), (3, [0, 1, 2, 30, 31, 32, 60]),
    (9, [0, 1, 2, 3, 40, 41, 42])])
def test_evaluation_executes_as_much_of_each_chunk_as_asked(execute, expected):
    agent, asked = make_agent(chunk=4, execute=1), []

    def act(observation, goal, candidates, generator):
        asked.extend((int(g), candidates) for g in goal[:, 0])
        return 10 * observation[:, None] + np.arange(4)[None, :, None]  # (k, 4, 1)

    agent.act = act
    evaluator = world.Evaluator(Counting(), environments=3)
    results = evaluator.play(agent, 2, execute=execute, candidates=5)
    assert results == {1: [(False, -3.5, 7)] * 2, 2: [(True, -3.5, 7)] * 2}
    assert [a for env in evaluator.envs for a in env.actions] == [expected] * 4
    decisions = math.ceil(7 / min(execute or 1, 4))
    assert sorted(asked) == [(1, 5)] * 2 * decisions + [(2, 5)] * 2 * decisions


def test_evaluation_is_repeatable_and_leaves_training_noise_alone(trained):
    agent = mac.load(trained["cube-single-play-v0"])
    evaluator = world.Evaluator(world.find_world("cube-single-play-v0"), environments=2)
    evaluator.world.tasks = [1, 4]
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = evaluator.play(agent, 1, seed=3, execute=10)
    assert torch.equal(torch.get_rng_state(), state)
    assert evaluator.play(agent, 1, seed=3, execute=10) == first
    assert evaluator.play(agent, 1, seed=3, stop=lambda: True) is None
    goals = [evaluator.world.reset(evaluator.envs[0], 4, 9)[1] for _ in range(2)]
    assert np.array_equal(*goals)


def readme_code(word):
    """The block of Python in the README that holds `word`."""
    blocks = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    return next(block for block in blocks if word in block)


def test_the_readmes_policy_outcome_and_world_from_a_file_of_ones_own(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(readme_code("class Line"))
    command = ("mine.py --env line --policy smooth --small --width 32 --chunk 5 --steps 40 "
               "--log-interval 20 --eval-interval 0 --save-dir run").split()
    process = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True,
                             text=True)
    assert process.returncode == 0, process.stderr
    assert "goals are columns [0]" in process.stdout
    assert len(world.read_csv(tmp_path / "run" / "train.csv")) == 2
    with pytest.MonkeyPatch.context() as patch:  # what the file registers is gone after the test
        patch.setattr(mac, "POLICIES", dict(mac.POLICIES))
        patch.setattr(mac, "OUTCOMES", dict(mac.OUTCOMES))
        patch.setattr(world, "WORLDS", list(world.WORLDS))
        mine = types.ModuleType("mine")
        exec((tmp_path / "mine.py").read_text(), mine.__dict__)
        agent = mac.load(tmp_path / "run")
        assert type(agent.policy) is mine.Smooth and type(agent.outcome) is mine.Near
        assert world.main([str(tmp_path / "run"), "--episodes", "3"]) == 0
    assert "overall" in capsys.readouterr().out
    states, actions, ends, rewards, *_ = mine.Line().data("")[0]
    assert len(states) == len(actions) == len(rewards) == ends[-1] + 1
    simulator = mine.Line()
    simulator.reset(simulator, 1, 0)
    simulator.goal += 9  # which it cannot meet
    assert np.allclose([simulator.step(a)[0] for a in actions[:49]], states[1:50], atol=1e-5)


def test_the_readmes_exported_program_acts_as_the_agent_does(trained):
    agent = mac.load(trained[SINGLE])
    agent.config.eval_flow = True  # as with --small
    names = {"torch": torch, "agent": agent}
    exec(readme_code("class Acting"), names)
    x, z = torch.linspace(-1, 1, 28), torch.randn(16, 50, generator=generator())
    chunk = names["program"].module()(x, torch.zeros(0), z).detach().view(10, 5)
    assert np.allclose(chunk, agent.act(x, None, 16, generator()), atol=1e-5)


def test_the_readmes_own_lines_and_the_candidates_behind_an_action(trained):
    code = readme_code("agent.candidates").replace("exp/cube-single-play-singletask-v0-seed0",
                                                   str(trained[SINGLE]))
    names = {}
    exec(code, names)
    assert names["chunk"].shape == (10, 5) and names["q"].shape == (1, 32)
    agent = mac.load(trained["cube-single-play-v0"])
    x, g = np.random.default_rng(0).normal(size=(3, 28)), np.ones((3, 3))
    chunks, q = agent.candidates(x, g, 7, generator(2))
    assert chunks.shape == (3, 7, 10, 5) and chunks.dtype == q.dtype == np.float32
    state, goal = (torch.tensor(v, dtype=torch.float32) for v in (x, g))
    state, goal = agent.normalizer(state), agent.normalizer(goal, agent.columns)
    for b in range(3):
        for i in range(7):
            score = agent.critic(state[b], torch.tensor(chunks[b, i]).flatten(), goal[b])
            assert np.isclose(score.item(), q[b, i], atol=1e-5)
    best = [chunks[b, q[b].argmax()] for b in range(3)]
    assert np.array_equal(agent.act(x, g, 7, generator(2)), best)


def test_tensorboard_holds_the_numbers_of_the_csv_files(tmp_path, monkeypatch, capsys):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    command = [*COUNTING, "--eval-interval", "2", "--log-interval", "1", "--tensorboard",
               "--save-dir", str(tmp_path / "run"), "--steps"]
    assert mac.main([*command, "2"]) == mac.main([*command, "4", "--resume"]) == 0
    events = accumulator.EventAccumulator(str(tmp_path / "run")).Reload()
    for file, name, tag in (("train", "val_dynamics", "train/val_dynamics"),
                            ("eval", "length", "eval/task1/length")):
        rows = [row for row in world.read_csv(tmp_path / "run" / f"{file}.csv")
                if row.get("task", "task1") == "task1"]
        values = {event.step: event.value for event in events.Scalars(tag)}
        assert values == pytest.approx({int(row["step"]): float(row[name]) for row in rows})
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    command[-2] = str(tmp_path / "other")
    assert "pip install tensorboard" in failing(capsys, *command, "2")
    assert [path.name for path in (tmp_path / "other").iterdir()] == [".lock"]


def test_imagined_futures(trained, tmp_path):
    agent = mac.load(trained["cube-single-play-v0"])
    state, goal = torch.randn(1, 28), torch.randn(1, 3)
    rollout = agent.imagine(state, goal, generator(2), 4, 32)
    chosen = agent.best_of(32, state, goal, generator(2))
    assert torch.allclose(rollout.chunks[0], chosen) and len(rollout.observations) == 5
    if importlib.util.find_spec("matplotlib"):
        assert world.main([str(trained[SINGLE]), "--imagine", str(tmp_path / "x.png")]) == 0
        assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


def test_films_and_rendering_where_there_is_a_renderer_or_none(trained, cube, tmp_path,
                                                               monkeypatch):
    cube.reset(cube.env, 2, 0)
    if os.environ["MUJOCO_GL"] == "disabled":  # as it is where nobody has chosen
        with pytest.raises(world.MacError, match="MUJOCO_GL=disabled .* set MUJOCO_GL=egl before"):
            world.render(cube.env)
    monkeypatch.delenv("MUJOCO_GL")
    code = ("import eval; eval.compare_imagination.__defaults__ = (30,)\n"  # steps
            f"eval.main([{str(trained[SINGLE])!r}, '--imagine', 'x.gif', '--video-size', '32'])")
    process = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                             text=True)
    if "cannot render" in process.stderr or "OGBench does not start" in process.stderr:
        pytest.skip("no EGL here")
    assert process.returncode == 0, process.stderr
    assert imageio.v3.imread(tmp_path / "x.gif").shape == (10, 32, 64, 3)


def test_a_video_has_a_third_of_the_frames_of_each_tasks_first_episode(tmp_path, monkeypatch):
    shade = lambda env: np.full((9, 9, 3), 30 * env.steps + env.task, np.uint8)  # noqa: E731
    monkeypatch.setattr(CountingEnv, "render", shade, raising=False)
    run, film = str(tmp_path / "run"), str(tmp_path / "x.gif")
    assert mac.main([*COUNTING, "--steps", "1", "--eval-interval", "0", "--save-dir", run]) == 0
    assert world.main([run, "--episodes", "2", "--video", film]) == 0
    frames = imageio.v3.imread(film).astype(int)
    assert np.allclose(frames[:, 0, 0, 0], [31, 121, 211, 32, 122, 212], atol=1)
    if importlib.util.find_spec("matplotlib"):  # trajectories of less than 100 steps, too
        assert world.main([run, "--imagine", str(tmp_path / "x.png")]) == 0


def test_model_error_against_a_plain_loop(trained, data_dir):
    agent = mac.load(trained[SINGLE])
    n = agent.config.chunk
    with np.load(data_dir / f"{DATA}-val.npz") as file:
        states, actions = file["observations"], file["actions"]
    data = mac.make_dataset((states, actions, np.array([1000]), np.zeros(1001), np.array([False])),
                            [], agent.config)
    curve = world.model_error(agent, data, 30, trajectories=5)
    errors = np.zeros(4)
    for t in np.linspace(0, 970, 5).astype(int):
        state = agent.normalizer(torch.tensor(states[t]))
        for k in range(3):
            chunk = torch.tensor(actions[t + k * n:t + (k + 1) * n]).flatten()
            state = state + agent.dynamics(state, chunk.clamp(-1 + 1e-5, 1 - 1e-5)).detach()
            truth = agent.normalizer(torch.tensor(states[t + (k + 1) * n]))
            errors[k + 1] += ((state - truth) ** 2).mean().item() / 5
    assert [step for step, _ in curve] == [0, 10, 20, 30]
    assert np.allclose([e for _, e in curve], errors, rtol=1e-4)


@pytest.mark.parametrize("goal", [0, 1])
@pytest.mark.parametrize("distance", [0, 2, 5, 20])
def test_reach_is_measured_at_that_distance_within_a_trajectory(goal, distance):
    data, columns = hand_made(), torch.arange(goal)
    data.columns, data.rewards = columns, torch.zeros(28)
    data.rewards[[8, 14, 21, 22]] = torch.tensor([-1.0, 1, 1, 2])  # it rises at 14, 21, 22
    agent = types.SimpleNamespace(
        columns=columns, config=data.config, normalize=lambda batch: batch,
        value=lambda s, g: g[:, 0] - s[:, 0] if goal else s[:, 0],
        q=lambda s, chunk, g: 100 * chunk[:, 0],
        proposals=lambda count, s, g, generator: (None, torch.arange(count).expand(len(s), -1) - s),
        model_q=lambda s, chunk, g: torch.arange(16.0) ** 2 * (s[..., 0] % 2),  # flat if even
        outcome=types.SimpleNamespace(
            predict=lambda s, chunk, g: (s[:, 0], (s[:, 0] % 2 == 0).float())))
    result = world.reach(agent, data, distance)
    starts = [t for t in range(28) if max(t + distance + 1, t + 3) in trajectory_of(t)]
    if not goal:
        starts = [t - distance for t in (14, 21, 22) if t - distance in starts]
    if not starts:
        assert result is None
        return
    tolerance = 0.5 if goal or len(starts) > 1 else 1e-4  # of a mean over random rows
    assert np.isclose(result[0], distance if goal else np.mean(starts), atol=tolerance * (not goal))
    assert np.isclose(result[1], np.mean(starts), atol=tolerance)
    assert np.isclose(result[2], np.mean(np.array(starts) % 2 if goal else starts), atol=tolerance)
    agreement = np.corrcoef(np.arange(16), np.arange(16) ** 2)[0, 1]
    assert np.isclose(result[3], agreement if any(t % 2 for t in starts) else np.nan, atol=1e-5,
                      equal_nan=True)


@pytest.mark.parametrize("distance", [0, 1, 3, 4, 5, 6, 7, 20])
def test_ideal_of_reach_is_the_return_until_a_chunk_meets_the_goal(distance):
    total, begin = 0.0, 0
    while distance not in range(begin, begin + 3):
        total, begin = total - 0.9 ** begin, begin + 3
    assert np.isclose(world.ideal(config(chunk=3, discount=0.9), distance), total)


@pytest.mark.parametrize("n, steps, expected", [
    (1, 6, [0, 1, 4, 9, 16, 25, 36]), (3, 6, [0, 9, 36]), (4, 7, [0, 16])])
def test_model_error_stays_within_trajectories(n, steps, expected):
    data = hand_made((9, 3, 14), chunk=n)
    data.observations[9:] += 1000  # a crossing would show
    data.observations[12:] += 1000
    agent = mac.Agent(1, 2, [0], config(chunk=n))
    agent.next_observation = lambda state, chunk: state  # so the error is the steps squared
    curve = world.model_error(agent, data, steps)
    assert [step for step, _ in curve] == list(range(0, steps + 1, n))
    assert np.allclose([error for _, error in curve], expected)
    with pytest.raises(world.MacError, match="needs at least one chunk"):
        world.model_error(agent, data, 16)


def test_reach_of_a_run_with_goals(trained, capsys):
    run = trained["cube-single-play-v0"]
    assert world.main([str(run), "--reach"]) == 0
    names, *rows = (line.split(",") for line in (run / "reach.csv").read_text().splitlines())
    assert names == ["steps", "V", "Q", "success", "agreement", "ideal"]
    assert len(rows) == 11 and np.isfinite(np.array(rows, float)[:, :4]).all()
    assert "V where the tasks begin: task1" in capsys.readouterr().out


def test_pictures(trained, tmp_path):
    pytest.importorskip("matplotlib")
    run = str(trained[SINGLE])
    (trained[SINGLE] / "eval.csv").write_text("step,task,success,stderr\n4,overall,0.5,0.1\n")
    assert world.main([run, "--model-error", "--plot", str(tmp_path / "error.png")]) == 0
    assert world.main([run, "--reach", "--plot", str(tmp_path / "reach.png")]) == 0
    assert world.main([run, run, "--plot", str(tmp_path / "curve.png")]) == 0
    (trained[SINGLE] / "eval.csv").unlink()
    assert world.main([run, "--plot", str(tmp_path / "losses.png")]) == 0
    assert [path.read_bytes()[:4] for path in tmp_path.iterdir()] == [b"\x89PNG"] * 4


def test_load_gives_an_agent_for_other_programs(trained, cube):
    agent = mac.load(trained["cube-single-play-oraclerep-v0"])
    many = agent.act(np.zeros((4, 28)), np.zeros((4, 3)))
    assert many.shape == (4, 10, 5) and many.dtype == np.float32 and np.abs(many).max() <= 1
    observation, goal = cube.reset(cube.env, task=2, seed=0)  # as the README has it
    assert goal.shape == (0,)
    assert mac.load(trained[SINGLE]).act(observation, goal).shape == (10, 5)
    x, g = np.linspace(-1, 1, 28), np.array([1, 2, 3])
    whole = np.r_[np.zeros(19), g, np.zeros(6)]  # a goal observation: it takes columns 19 to 21
    chunks = [agent.act(observation, goal, 4, generator()) for observation, goal in (
        (x, g), (x.tolist(), g.tolist()), (torch.tensor(x), torch.tensor(g)), (x, whole),
        (x.astype(np.float32), g.astype(np.int8)), (torch.tensor(x, requires_grad=True), g),
        (x[::-1].copy()[::-1], g), (x.astype(np.longdouble), g), (x.astype(">f8"), g),
        (x, torch.tensor(g).bfloat16()))]
    assert chunks[0].shape == (10, 5)
    assert all(np.allclose(chunk, chunks[0], atol=1e-6) for chunk in chunks)
    for observation, goal, message in (
            (x[:-1], g, "observation has shape .27,.* takes 28"),
            (x[:, None], g[:, None], "takes 28"), (x[None, None], g[None, None], "takes 28"),
            (x, None, "goal has shape .1, 0.* takes 3"), (np.zeros((4, 28)), g, "1 goals for 4 o"),
            (np.where(x > 0.99, np.nan, x), g, "observation is not finite at .0, 27"),
            (x * 1e39, g, "observation is not finite"), (x, [1, 2, float("inf")], "goal is not"),
            (["a"] * 28, g, "observation has shape"), (x + 1j, g, "complex"),
            (torch.tensor(x + 1j), g, "complex"), (x.astype(object), g, "object"),
            ([[1.0], [1, 2]], g, "inhomogeneous")):
        with pytest.raises(ValueError, match=message):
            agent.act(observation, goal)
    with pytest.raises(ValueError, match="0 candidates"):
        agent.act(x, g, candidates=0)


def test_import_starts_nothing(tmp_path):
    code = ("import sys, mac, eval, threading; assert not {'ogbench', 'mujoco', 'matplotlib'} & "
            "set(sys.modules); assert threading.active_count() == 1")
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True)
    assert result.returncode == 0 and not result.stdout and not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------ speed

def test_flops_per_update_against_a_hand_count(capsys):
    assert mac.main(["--env", SINGLE, "--width", "32", "--batch-size", "16", "--benchmark", "2",
                     "--device", "cpu"]) == 0
    report = json.loads(capsys.readouterr().out)
    O, D, W, B, N, H, S = 28, 50, 32, 16, 8, 10, 10

    def forward(inputs, outputs):
        return 2 * (inputs * W + 3 * W * W + W * outputs)

    def train(inputs, outputs):  # forward, gradient of weights, gradient of all inputs but x
        return 3 * forward(inputs, outputs) - 2 * inputs * W

    rollout = H * B * (N * (forward(O + D, D) + forward(O + D, 1))
                       + forward(O + D, 1) + forward(O + D, O))
    teacher = S * B * forward(O + D + 1, D)
    losses = B * (train(O + D + 1, D) + train(O + D, D) + train(O + D, O) + 2 * train(O + D, 1)
                  + H * train(O, 1)) + B * forward(O, 1)
    taught = B * forward(O, 1)
    assert report["gflop_per_update"] * 1e9 == rollout + teacher + losses + taught
    assert report["device"] == "cpu" and report["ms_min"] <= report["ms_median"]
    assert np.isclose(report["fraction_of_peak"], report["gflops"] / report["peak_gflops"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("goal, host, settings", [
    (0, False, {}), (2, False, {}), (0, True, {}), (2, True, {}),
    (0, False, {"precision": "bfloat16"}), (0, False, {"policy": "fql"})])
def test_cuda_graph_agrees_with_eager_updates(goal, host, settings):
    """Through a warmup and after it, with a changing learning rate and validation in between."""
    device, results, data = torch.device("cuda"), [], chunk_data(goal)
    given = world.Trajectories(data.observations, data.actions, data.ends, data.rewards,
                               data.terminated)
    for graphed in (False, True):
        tiny, columns = config(batch_size=16, **settings), list(range(goal))
        run = mac.Run(tiny, device, types.SimpleNamespace(sizes=(4, 2), columns=columns), given,
                      given)
        if host:
            run.dataset = data
            run.generators = mac.make_generators(0, torch.device("cpu"), device)
        losses = []
        for warmup in (True, False):
            def eager():
                batch = mac.to_device(run.dataset.sample(16, run.generators[0]), device)
                return mac.update(run.agent, run.optimizer, batch, run.generators[1], warmup)

            step = run.make_step(warmup) if graphed else eager
            for i in range(1, 5):
                run.optimizer.param_groups[0]["lr"].fill_(3e-4 / i)
                losses.append({name: value.item() for name, value in step().items()})
                with torch.no_grad():
                    batch = mac.to_device(data.sample(8, generator()), device)
                    run.agent.losses(batch, torch.Generator(device).manual_seed(0))
        results.append((losses, [p.detach().cpu() for p in run.agent.parameters()],
                        [g.get_state() for g in run.generators]))
    (losses, parameters, states), (others, other_parameters, other_states) = results
    assert losses[0] != losses[1] and len(losses) == len(others) == 8
    assert all(a == pytest.approx(b, rel=1e-4) for a, b in zip(losses, others))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(parameters, other_parameters))
    assert all(torch.equal(a, b) for a, b in zip(states, other_states))


# ------------------------------------------------------------------------------ nothing lost

def fingerprint(folder):
    """Parameters, target, Adam's state and generators as one text."""
    state = mac.load_checkpoint(folder)

    def text(value):
        if isinstance(value, dict):
            return str({str(key): text(value[key]) for key in sorted(value, key=str)})
        if isinstance(value, (list, tuple)):
            return str([text(item) for item in value])
        return (hashlib.sha256(value.numpy().tobytes()).hexdigest()
                if isinstance(value, torch.Tensor) else repr(value))

    return text([state[key] for key in ("step", "agent", "optimizer", "generators")])


def counting_command(folder, *more):
    """A run that a process begins soon, since it needs no simulator."""
    return [*COUNTING, *SCHEDULE, "--save-dir", str(folder), "--steps", "100", *more]


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """The same run twice, the second with other intervals."""
    folders = tmp_path_factory.mktemp("plain"), tmp_path_factory.mktemp("intervals")
    others = ["--log-interval", "7", "--eval-interval", "30", "--save-interval", "3"]
    for folder, more in zip(folders, ([], others)):
        assert mac.main(counting_command(folder, *more)) == 0
    return folders


def test_intervals_do_not_change_what_is_learned(uninterrupted):
    assert fingerprint(uninterrupted[0]) == fingerprint(uninterrupted[1])


PROGRAM = [sys.executable, "-c", "import sys, mac, test_mac; sys.exit(mac.main())"]


def interrupt(folder, interruptions, reference):
    """Start and resume a run that ends by each of `interruptions`, (signal, delay after the first
    new row of its log), then let it finish: nothing may differ from `reference`."""
    log, saved = folder / "train.csv", folder / "checkpoint.pt"
    command = counting_command(folder, "--save-interval", "1", "--resume")
    for number, delay in interruptions:
        started = time.time()
        process = subprocess.Popen([*PROGRAM, *command], text=True, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE)
        process.stdout.close()  # a reader that has gone is no reason to end, nor for a traceback
        while process.poll() is None:  # until it has logged a step that is its own
            rows = log.read_text().count("\n") if log.exists() else 0
            if rows > 1 and saved.exists() and saved.stat().st_mtime > started:
                break
            time.sleep(0.002)
        time.sleep(delay)
        process.send_signal(number)
        error = process.communicate(timeout=20)[1]
        assert process.returncode in ((-9, 0) if number == signal.SIGKILL else (128 + number,))
        assert "Traceback" not in error and "\r" not in error, error  # and no bar
        assert mac.load_checkpoint(folder)["step"] > 0
    assert mac.main(command) == 0
    assert fingerprint(folder) == fingerprint(reference)
    assert log.read_bytes() == (reference / "train.csv").read_bytes()
    assert not list(folder.glob(".*.tmp"))


def test_a_killed_run_resumes_to_the_bits(uninterrupted, tmp_path):
    interrupt(tmp_path, [(signal.SIGKILL, 0.03)], uninterrupted[0])


@pytest.mark.skipif("MAC_SLOW" not in os.environ, reason="MAC_SLOW=1 runs it")
def test_other_signals_and_fifty_kills(uninterrupted, tmp_path):
    stops = [[(number, 0) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1,
                                         signal.SIGINT)]] + [
        [(signal.SIGKILL, delay) for delay in np.random.default_rng(i).uniform(0, 0.15, 5)]
        for i in range(10)]
    for i, interruptions in enumerate(stops):
        (tmp_path / str(i)).mkdir()
        interrupt(tmp_path / str(i), interruptions, uninterrupted[0])


def test_a_run_whose_terminal_closes_stops_as_by_a_signal_and_resumes_to_the_bits(uninterrupted,
                                                                                  tmp_path):
    """Then the kernel sends SIGHUP, and every write to the terminal fails from there on."""
    command = counting_command(tmp_path, "--save-interval", "1")
    child, terminal = pty.fork()
    if not child:
        os.execv(sys.executable, [*PROGRAM, *command])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))  # so a bar shows
    log = tmp_path / "train.csv"
    while not (log.exists() and log.read_text().count("\n") > 2):
        assert os.read(terminal, 65536)  # fails if the run has ended
    os.close(terminal)
    late = threading.Timer(30, os.kill, (child, signal.SIGKILL))
    late.start()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGHUP
    late.cancel()
    assert 0 < mac.load_checkpoint(tmp_path)["step"] < 100
    assert mac.main([*command, "--resume"]) == 0
    assert fingerprint(tmp_path) == fingerprint(uninterrupted[0])
    assert (tmp_path / "train.csv").read_bytes() == (uninterrupted[0] / "train.csv").read_bytes()


def test_a_first_signal_asks_for_a_stop_a_second_one_quits_and_ignored_ones_stay_so():
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        before = signal.getsignal(number)
        with mac.Stop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop()
            os.kill(os.getpid(), number)
            assert stop() and stop.signal == number
            assert signal.getsignal(number) == signal.getsignal(signal.SIGINT) == signal.SIG_DFL
        assert signal.getsignal(number) is before
    signal.signal(signal.SIGHUP, ignored)


def test_training_in_a_thread_leaves_signals_alone(data_dir, tmp_path):
    status, before = [], signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=lambda: status.append(mac.main(
        train_command(data_dir, tmp_path, "--steps", "3"))))
    thread.start()
    thread.join()
    assert status == [0] and signal.getsignal(signal.SIGTERM) is before


# ------------------------------------------------------------------------------ several processes

TWO = [*COUNTING, "--horizon", "2", "--candidates", "2", "--flow-steps", "2", "--eval-interval",
       "40", "--save-interval", "5", "--log-interval", "10", "--steps", "1000000", "--resume"]


def process():
    """What each process of `two` runs: mac.main in the Counting world, which leaves its first
    update's gradients and its last parameters for the tests."""
    folder = sys.argv[sys.argv.index("--save-dir") + 1]
    update, train = mac.update, mac.Run.train

    def first_update(agent, optimizer, *rest):
        mac.update, result = update, update(agent, optimizer, *rest)
        torch.save([p.grad for p in agent.parameters() if p.requires_grad],
                   f"{folder}/gradients.pt")
        return result

    def whole_training(run, *rest):
        train(run, *rest)
        torch.save(run.agent.state_dict(), f"{folder}/parameters{mac.RANK}.pt")

    mac.update, mac.Run.train = first_update, whole_training
    sys.exit(mac.main())


def start_two(folder, torchrun=False):
    """-> two processes that train together, or torchrun's alone"""
    program = [sys.executable, "-c", "import test_mac; test_mac.process()", *TWO, "--save-dir",
               str(folder)]
    if torchrun:
        program = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   "--nproc-per-node", "2", "--no-python", *program]
    with socket.create_server(("localhost", 0)) as server:  # for a port that is free
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(server.getsockname()[1])}
    given = [{}] if torchrun else [{"RANK": str(rank), "WORLD_SIZE": "2", **address}
                                   for rank in range(2)]
    return [subprocess.Popen(program, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             text=True, env={**os.environ, **settings})
            for settings in given]


def wait_for_rows(rows, folder, processes):
    log = folder / "train.csv"
    while not log.exists() or log.read_text().count("\n") <= rows:
        assert all(process.poll() is None for process in processes), processes[0].communicate()
        time.sleep(0.02)


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory):
    """The folder of a run of two processes one of which was killed, and which was then resumed
    until torchrun was told to stop after 50 updates or more."""
    folder = tmp_path_factory.mktemp("two")
    first, second = start_two(folder)
    wait_for_rows(1, folder, [first, second])
    second.kill()
    _, error = first.communicate(timeout=60)
    second.communicate()
    assert first.returncode == 2 and error == ("error: another process of this run has ended: "
                                               "--resume goes on from the last checkpoint\n")
    assert 5 <= mac.load_checkpoint(folder)["step"] < 50
    torchrun, = start_two(folder, torchrun=True)
    wait_for_rows(5, folder, [torchrun])
    torchrun.terminate()
    out, error = torchrun.communicate(timeout=60)
    assert torchrun.returncode and "error: " not in error
    for text in ("resuming at", "step 40: success", "stopped at step"):
        assert out.count(text) == 1
    return folder


def two_runs(monkeypatch):
    """The same as two runs in this process."""
    monkeypatch.setattr(mac, "PROCESSES", 2)
    given, _, _ = mac.parse(TWO)
    settings = mac.Config(**given, terminations=False)  # as `train` finds: the data have none
    data, runs = Counting().data(None), []
    for rank in range(2):
        monkeypatch.setattr(mac, "RANK", rank)
        runs.append(mac.Run(settings, torch.device("cpu"), Counting(), *data))
    return runs


def test_two_processes_killed_stopped_and_resumed_are_two_threads_left_alone(two_processes,
                                                                             monkeypatch):
    state, runs = mac.load_checkpoint(two_processes), two_runs(monkeypatch)
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

    monkeypatch.setattr(mac, "average_gradients", average_gradients)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(train, runs))
    assert state["step"] >= 50
    for rank, run in enumerate(runs):
        for saved in (state["agent"], torch.load(two_processes / f"parameters{rank}.pt")):
            assert all(torch.equal(value, saved[name])
                       for name, value in run.agent.state_dict().items())
        for index, moments in run.optimizer.state_dict()["state"].items():
            assert all(torch.equal(value, state["optimizer"]["state"][index][name])
                       for name, value in moments.items())
    streams = [generator.get_state() for run in runs for generator in run.generators]
    assert all(map(torch.equal, streams, state["generators"])) and len(state["generators"]) == 4
    steps = [int(row["step"]) for row in world.read_csv(two_processes / "train.csv")]
    assert steps == list(range(10, state["step"] + 1, 10))


def test_averaged_gradients_of_two_processes_are_the_whole_batchs(two_processes, monkeypatch):
    data, noise = zip(*(run.generators for run in two_runs(monkeypatch)))
    run = two_runs(monkeypatch)[0]
    batch = mac.Batch(*map(torch.cat, zip(*(run.dataset.sample(4, half) for half in data))))
    assert not torch.equal(batch.observation[:4], batch.observation[4:])

    def drawn_in_halves(draw):
        def drawn(*shape, generator, device):
            rows, *rest = shape[0] if isinstance(shape[0], torch.Size) else shape
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


def test_processes_that_cannot_share_a_batch_are_refused(monkeypatch):
    monkeypatch.setattr(mac, "PROCESSES", 2)
    for name in ("batch", "rollout_batch"):
        with pytest.raises(world.MacError, match="2 processes cannot divide"):
            mac.share(config(**{f"{name}_size": 9}))


def small_checkpoint(folder, step=1):
    mac.save_checkpoint(folder, {"step": step, "weights": torch.arange(100.0)})
    return folder / "checkpoint.pt"


def test_of_a_damaged_checkpoint_the_previous_one_takes_the_place(tmp_path, capsys):
    small_checkpoint(tmp_path, 1)
    path, rng = small_checkpoint(tmp_path, 2), np.random.default_rng(0)
    assert mac.load_checkpoint(tmp_path)["step"] == 2
    good = path.read_bytes()
    damaged = [good[:n] for n in rng.integers(0, len(good), 20)]
    for position in rng.integers(0, len(good), 200):
        flipped = bytearray(good)
        flipped[position] ^= 1 << rng.integers(8)
        damaged.append(bytes(flipped))
    for data in damaged:
        path.write_bytes(data)
        assert mac.load_checkpoint(tmp_path)["step"] == 1
        assert f"WARNING: {path} is damaged" in capsys.readouterr().out
    (tmp_path / "checkpoint-previous.pt").write_bytes(damaged[0])
    with pytest.raises(world.MacError, match="holds no checkpoint that is whole"):
        mac.load_checkpoint(tmp_path)


def test_a_checkpoint_that_carries_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    mac.save_checkpoint(tmp_path, {"step": Evil()})
    with pytest.raises(world.MacError, match="is not one of this program"):
        mac.load_checkpoint(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_disk_full_leaves_the_old_checkpoint(tmp_path):
    path = small_checkpoint(tmp_path, 1)
    before = path.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    try:
        with pytest.raises(world.MacError, match="cannot write .*checkpoint.pt: File too large"):
            small_checkpoint(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_logs_drop_a_torn_line_and_rows_after_the_checkpoint(tmp_path):
    path = tmp_path / "train.csv"
    for step in (10, 20, 30):
        mac.add_to_log(path, [{"step": step, "loss": step / 2}])
    whole = path.read_text()
    path.write_text(whole + "40,2")
    mac.cut_log(path, lambda step: step <= 20)
    assert path.read_text() == "step,loss\n10,5.0\n20,10.0\n"
    mac.add_to_log(path, [{"step": 30, "loss": 15.0}])
    assert path.read_text() == whole
    path.write_text("step,lo")
    mac.cut_log(path, lambda step: True)
    mac.add_to_log(path, [{"step": 1, "loss": 2}])
    assert path.read_text() == "step,loss\n1,2\n"


def test_a_loss_that_is_not_finite_stops_with_status_3(data_dir, tmp_path, capsys):
    command = train_command(data_dir, tmp_path, "--steps", "10", "--log-interval", "0")
    assert mac.main(command) == 0
    good = (tmp_path / "checkpoint.pt").read_bytes()
    state = mac.load_checkpoint(tmp_path)
    state["agent"]["value.hidden.0.weight"][0, 0] = float("nan")
    mac.save_checkpoint(tmp_path, state)
    (tmp_path / "checkpoint-previous.pt").write_bytes(good)
    error = failing(capsys, *command, "--steps", "20", "--resume", status=3)
    assert "is not finite at step 15" in error and "value" in error
    assert (tmp_path / "checkpoint-previous.pt").read_bytes() == good


def test_what_resume_refuses(trained, data_dir, tmp_path, capsys):
    folder, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(trained[SINGLE], folder)
    command = train_command(data_dir, folder, "--steps", "4", "--log-interval", "2", "--resume")
    alien = tmp_path / "alien"
    alien.mkdir()
    for name in ("train.csv", "config.json"):
        (alien / name).write_text("mine")
        assert "holds no checkpoint" in failing(capsys, *train_command(data_dir, alien, "--resume"))
        assert all(path.read_text() == "mine" for path in alien.glob("[a-z]*"))
    before = (folder / "config.json").read_bytes()
    assert "--steps 3: this run is at step 4" in failing(capsys, *command, "--steps", "3")
    assert (folder / "config.json").read_bytes() == before
    other.mkdir()
    for suffix in ("", "-val"):  # the validation episode in the place of the training one
        shutil.copy(data_dir / f"{DATA}-val.npz", other / f"{DATA}{suffix}.npz")
    assert "not those of this run" in failing(capsys, *command, "--dataset-dir", str(other))
    (folder / "train.csv").write_bytes(b"\xff\xfe\n\n\x00,\n")
    assert "train.csv is damaged" in failing(capsys, *command, "--steps", "6")
    failing(capsys, str(folder), "--plot", str(tmp_path / "x.png"), main=world.main)
    (folder / "train.csv").unlink()
    assert mac.main([*command, "--steps", "6"]) == 0
    state = mac.load_checkpoint(folder)
    state["config"]["width"] = 24
    mac.save_checkpoint(folder, state)
    error = failing(capsys, "--env", SINGLE, "--dataset-dir", str(data_dir), "--save-dir",
                    str(folder), "--resume")
    assert "is not one of this program" in error and "size mismatch" in error


@pytest.mark.parametrize("steps", [5, 6, 7, 20])
def test_the_learning_rate_decays_after_a_warmup_that_other_steps_do_not_change(
        steps, data_dir, tmp_path, monkeypatch):
    seen, update = [], mac.update

    def spy(agent, optimizer, batch, generator, warmup):
        seen.append((round(optimizer.param_groups[0]["lr"].item() * 1e3, 4), warmup))
        if len(seen) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(agent, optimizer, batch, generator, warmup)

    monkeypatch.setattr(mac, "update", spy)
    monkeypatch.setattr(mac, "timed", lambda *_: [0])  # of another agent
    command = train_command(data_dir, tmp_path, "--warmup", "0.5", "--learning-rate", "0.001",
                            "--log-interval", "3", "--steps")
    assert mac.main([*command, "12"]) == 128 + signal.SIGTERM  # in its warmup of 6
    assert mac.main([*command, str(steps), "--resume"]) == 0
    assert seen == [(1, True)] * min(steps, 6) + [
        (round((steps - step) / (steps - 6), 4), False) for step in range(6, steps)]


def test_a_renderer_that_is_missing_is_one_line(tmp_path):
    process = subprocess.run([sys.executable, HERE / "mac.py", "--env", SINGLE], cwd=tmp_path,
                             env={**os.environ, "MUJOCO_GL": "foo"}, capture_output=True, text=True)
    assert process.returncode == 2 and process.stderr.startswith("error: OGBench does not start")
    assert process.stderr.count("\n") == 1


def test_the_settings_printed_are_those_kept_also_after_a_failed_download(
        data_dir, tmp_path, monkeypatch, capsys):
    def collect(path, name, episodes, noise):
        for suffix in ("", "-val"):
            shutil.copy(data_dir / f"{DATA}{suffix}.npz", f"{path.parent}/{path.stem}{suffix}.npz")

    monkeypatch.setattr(world, "download", mock.Mock(side_effect=OSError("no network")))
    monkeypatch.setattr(world, "collect_data", collect)
    run = tmp_path / "run"
    assert mac.main(train_command(tmp_path, run, "--steps", "2", "--collect", "0")) == 0
    kept = (run / "config.json").read_text()
    assert kept in capsys.readouterr().out and json.loads(kept)["collect"] == 1000
    assert mac.load(run).config.collect == 1000


def test_resume_evaluates_again_at_the_checkpoints_step_and_without_a_bar(tmp_path, capsys):
    """A stop in the middle of the second evaluation, whose step has been saved."""
    command = [*COUNTING, "--steps", "6", "--eval-interval", "2", "--save-interval", "2",
               "--log-interval", "2", "--save-dir", str(tmp_path)]
    evaluate = mac.Run.evaluate

    def interrupted(run, *how):
        if run.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(run, *how)

    with mock.patch.object(mac.Run, "evaluate", interrupted):
        assert mac.main(command) == 128 + signal.SIGTERM
    steps = lambda: [row["step"] for row in world.read_csv(tmp_path / "eval.csv")]  # noqa: E731
    assert mac.load_checkpoint(tmp_path)["step"] == 4 and steps() == ["2"] * 3
    capsys.readouterr()
    for _ in range(2):  # and once more at the end, which takes the place of the one before
        assert mac.main([*command, "--resume"]) == 0
        assert steps() == ["2"] * 3 + ["4"] * 3 + ["6"] * 3
    printed = capsys.readouterr()
    assert "\r" not in printed.out + printed.err and not printed.err
    assert [line.split(",")[0] for line in printed.out.splitlines()
            if line.startswith("step") and "steps/s" in line] == ["step 6/6"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_resuming_on_a_device_goes_on_with_its_decaying_rate(device, data_dir, tmp_path):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    log, runs = mac.Run.log, (tmp_path / "whole", tmp_path / "stopped")
    commands = [train_command(data_dir, run, "--device", device, "--warmup", "0.1") for run in runs]
    assert mac.main(commands[0]) == 0

    def interrupted(run, folder):
        os.kill(os.getpid(), signal.SIGTERM)
        return log(run, folder)

    with mock.patch.object(mac.Run, "log", interrupted):  # at steps 4, in the warmup,
        for _ in range(2):
            assert mac.main([*commands[1], "--resume"]) == 128 + signal.SIGTERM
    assert mac.load_checkpoint(runs[1])["step"] == 8  # and after it
    assert mac.main([*commands[1], "--resume"]) == 0
    one, other = (mac.load_checkpoint(run) for run in runs)
    rates = [state["optimizer"]["param_groups"][0]["lr"].item() for state in (one, other)]
    assert rates[0] == rates[1] < 3e-4 / 40
    for name, value in one["agent"].items():
        assert torch.allclose(value, other["agent"][name], atol=1e-5), name


def test_a_run_folder_is_neither_overwritten_nor_shared(trained, data_dir, capsys):
    folder = trained[SINGLE]
    before = {p: p.read_bytes() for p in folder.iterdir()}
    same = train_command(data_dir, folder)
    assert "already holds a run" in failing(capsys, *same)
    assert "--width: this run has 16, not 32" in failing(capsys, *same, "--resume", "--width", "32")
    assert "--seed" in failing(capsys, *same, "--resume", "--seed", "5")
    error = failing(capsys, *same, "--resume", "--collect", "2")
    assert "--collect: this run has 1, not 2" in error
    with world.lock(folder):
        assert "another process" in failing(capsys, *same, "--resume")
    assert {p: p.read_bytes() for p in folder.iterdir()} == before


@pytest.mark.parametrize("command, message", [
    ("--env cube-duble-play-v0", "did you mean cube-double-play-v0"),
    ("--env zzz", "did you mean cube-double-play-v0?"),
    ("--policy fql --critic model", "--critic model: --policy fql climbs Q, a network"),
    ("--policy fql --critic model --benchmark 1", "climbs Q, a network"),
    ("--stepz 3", "unrecognized arguments: --stepz 3 (--help lists the flags)"),
    ("cube", "unrecognized arguments: cube"),
    ("--learning-rate inf", "--learning-rate: 'inf' is not a number (float) of at least 0"),
    ("--steps 0", "--steps: '0' is not a number (int) of at least 1"),
    ("--steps x", "--steps: 'x'"), ("--seed 4294967296", "(int) from 0 to 4294967295"),
    ("--batch-size 0", "--batch-size"), ("--candidates 0", "--candidates"),
    ("--discount 1.5", "--discount"), ("--seed -1", "--seed"),
    ("--value-goals nan 0 0 0", "--value-goals"), ("--value-goals 1 -1 0 0", "--value-goals"),
    ("--value-goals 0 0 0 0", "--value-goals"),
    ("--policy flw", "invalid choice: 'flw'"), ("--device cuda", "sees no GPU"),
    ("--save-dir /proc/nowhere", "cannot use /proc/nowhere: No such file"),
    ("--save-dir /proc", "cannot use /proc/.lock: "),
    ("--save-dir ~no-such-user/run", "no home folder for ~no-such-user/run: set --save-dir"),
    ("--dataset-dir ~no-such-user", "no home folder for ~no-such-user: set --dataset-dir"),
    ("--chunk 1001", "no trajectory of the training"), ("--width 1000000", "memory"),
    ("--dataset-dir /dev/null", "--dataset-dir /dev/null: that is a file"),
    ("--env antmaze-large-navigate-v0 --collect 3", "no scripted policy"),
    ("--resume --steps", "expected one argument"),
])
def test_bad_input_is_one_line_and_status_2(command, message, data_dir, tmp_path, capsys):
    if "cuda" in command and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    base = train_command(data_dir, tmp_path / "run", "--warmup", "0")
    assert message in failing(capsys, *base, *command.split())
    assert not list(tmp_path.rglob("*.csv"))


@pytest.mark.parametrize("command, message", [
    ("nowhere", "nowhere holds no checkpoint"), ("nowhere --episodes 0", "--episodes"),
    ("nowhere --plot", "nowhere/train.csv is not there or has no rows"),
    ("nowhere --jsn x", "unrecognized arguments: --jsn x"),
    ("nowhere --episode 5", "unrecognized arguments: --episode 5"),
    ("nowhere --json no/x.json", "cannot write no/x.json"),
    ("nowhere --json /dev/null", "cannot write /dev/null"),
    ("nowhere --plot x.pdf", "x.pdf: the name must end in .png"),
    ("nowhere --reach --model-error", "--model-error: not allowed with argument --reach"),
    ("nowhere --imagine x.png --plot", "leave --plot out"),
    ("nowhere --json x.json --plot", "--json and --video are of played episodes"),
    ("nowhere there --video x.gif", "--imagine and --reach take a single run"),
    ("nowhere --imagine x.mp4", "must end in .png or .gif"),
    ("nowhere --video x.gif --video-size 3", "--video-size"),
    ("nowhere --video x.mp4", "must end in .gif"),
])
def test_bad_input_to_eval(command, message, capsys):
    if "--plot" in command:
        pytest.importorskip("matplotlib")
    assert message in failing(capsys, *command.split(), main=world.main)

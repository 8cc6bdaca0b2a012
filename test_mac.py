"""The method on tiny configurations, each piece against an independent computation, and one smoke
run of both command lines. `pytest test_mac.py` needs no simulator, no data and no GPU."""
import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import eval as evaluation
import mac
from support import devices
from support.console import MacError, flag
from support.data import Trajectories
from support.test_common import COUNTING, HERE, Counting, generator, read_csv


def config(**settings):
    return mac.Config(**{"width": 16, "chunk": 3, "horizon": 4, "discount": 0.9, **settings})


def between(values):
    """A threshold in the widest gap around the median, where no rounding carries a value across."""
    quarter = values.numel() // 4
    values = values.flatten().sort().values[quarter:-quarter]
    i = int(values.diff().argmax())
    return (values[i] + values[i + 1]) / 2


# -------------------------------------------------------------------------------- data

LENGTHS = (9, 3, 4, 12)  # states per trajectory; with n = 3 the second one is too short


def hand_made(lengths=LENGTHS, ended=None, **settings):
    """A dataset whose observations and goals are the state's own index."""
    index = torch.arange(sum(lengths)).float()
    data = Trajectories(index[:, None], torch.stack([index / 100, -index / 100], 1),
                        torch.tensor(lengths).cumsum(0) - 1, torch.sin(index),
                        torch.tensor(ended or [False] * len(lengths)))
    return mac.ChunkDataset(data, [0], config(**settings))


@pytest.mark.parametrize("n", [1, 3, 4, 6])
@pytest.mark.parametrize("kind, near", [("mean", ()), ("sum", (2,))])
def test_chunks_rewards_and_labels_by_brute_force(n, kind, near):
    """Also at the ends of trajectories: where the task ended, chunks are padded."""
    lengths = (*LENGTHS, 6, 2, 5, 2, 4, 7)
    ended = [False] * 4 + [True, True, False, False, True, False]
    data = hand_made(lengths, ended, chunk=n, chunk_reward=kind, tolerance=near)
    starts, begin = [], 0
    for length, end in zip(lengths, ended):
        last = begin + length - 1
        legal = [t for t in range(begin, last) if t + n <= last or end]
        batch = data.batch(torch.tensor(legal, dtype=torch.long), generator())
        for row, t in enumerate(legal):
            taken = min(n, last - t)
            actions = [x for i in range(t, t + taken) for x in (i / 100, -i / 100)]
            assert np.allclose(batch.chunk[row], actions + [0, 0] * (n - taken))
            assert batch.valid[row].tolist() == [1] * 2 * taken + [0] * 2 * (n - taken)
            total = sum(0.9 ** i * math.sin(t + i) for i in range(taken))
            assert np.isclose(batch.reward[row], total / n if kind == "mean" else total, atol=1e-6)
            assert batch.observation[row] == t and batch.next_observation[row] == t + taken
            assert batch.termination[row] == (end and t + n >= last)
            ahead = batch.value_goal[row] - t
            assert batch.success[row] == (0 <= ahead <= min(n - 1, last - t) or
                                          bool(near) and abs(ahead) <= 2)
            assert begin <= batch.actor_goal[row] <= last
        starts += legal
        begin += length
    assert data.total_starts == len(starts)  # the last legal start of each included
    drawn = data.sample(3000, generator())
    counts = torch.bincount(drawn.observation[:, 0].long(), minlength=begin)
    assert counts.sum() == counts[starts].sum()
    assert (counts[starts] - 3000 / len(starts)).abs().max() < 5 * (3000 / len(starts)) ** 0.5
    whole = hand_made(lengths, ended, chunk=n, terminations=False)  # without padded chunks
    assert whole.total_starts == sum(max(0, length - n) for length in lengths) <= len(starts)
    assert not whole.sample(99, generator()).termination.any()
    with pytest.raises(MacError, match=f"no trajectory with the {n} actions"):
        hand_made((n, n), chunk=n)


@pytest.mark.parametrize("odds", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1),
                                  (0.2, 0, 0.5, 0.3), (0, 0.5, 0, 0.5)])
def test_goal_distribution(odds):
    data, t, samples = hand_made(), 2, 40000
    total, end = sum(LENGTHS), LENGTHS[0] - 1  # t is in the first trajectory
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


def test_a_window_slides_through_all_data_in_order():
    data = hand_made((40, 2, 30, 50), window=20, value_goals=(0, 0, 0, 1))
    assert data.total_starts == 37 + 27 + 47
    legal = [i for i in range(122) if i + 3 < 40 or 42 <= i < 69 or 72 <= i < 119]
    seen = set()
    for step in (0, 1000, 1025, 2000, 2900, 3000, 4000, 5000, 5550):
        first = step * 20 // 1000 % len(legal)
        batch = data.sample(2000, generator(step), step)
        rows = set(batch.observation[:, 0].int().tolist())
        assert rows == {(legal * 2)[first + i] for i in range(20)}
        goals = set(batch.value_goal[:, 0].int().tolist())
        assert goals == {(legal[first] + i) % 122 for i in range(20)}
        seen |= rows if step % 1000 == 0 else set()
    assert seen == set(legal)
    data = hand_made(window=10 ** 9)
    assert len(data.sample(2000, generator(), 7).observation.unique()) == data.total_starts


def test_nothing_is_kept_per_row_and_data_stay_on_the_host_if_a_gpu_has_no_room(monkeypatch):
    rows = 2 ** 40  # one number, seen as 4 TB
    states = torch.zeros(1, 1).expand(rows, 1)
    many = Trajectories(states, states, torch.arange(1, 5) * (rows // 4) - 1,
                        torch.zeros(1).expand(rows), torch.zeros(4, dtype=torch.bool))
    data = mac.ChunkDataset(many, [0], config())
    assert data.sample(5, generator()).observation.shape == (5, 1)
    size = 2 * sum(array.nbytes for array in many[:5])
    for memory, place in ((80e9, "cpu"), (size / 0.61, "cpu"), (size / 0.59, "cuda")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (memory, memory))
        assert devices.device_of_data(torch.device("cuda"), many, many).type == place


# ------------------------------------------------------------------------------ networks, policies

def test_mlp_against_numpy():
    net = mac.MLP(5, 2, 8)
    x = torch.randn(7, 5)
    h = x.numpy().astype(np.float64)
    for linear, norm in zip(net.hidden[0::3], net.hidden[2::3]):
        for parameter in (norm.weight, norm.bias, linear.bias):
            parameter.data.normal_()
        h = h @ linear.weight.detach().numpy().T + linear.bias.detach().numpy()
        h = h / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h ** 3)))
        h = (h - h.mean(1, keepdims=True)) / np.sqrt(h.var(1, keepdims=True) + 1e-6)
        h = h * norm.weight.detach().numpy() + norm.bias.detach().numpy()
    h = h @ net.output.weight.detach().numpy().T
    assert len(net.hidden) == 12 and np.allclose(net(x[:, :2], x[:, 2:]).detach(), h, atol=1e-5)


def flow_policy(velocity=None, **settings):
    """A policy whose velocity may be a plain function of x and t."""
    policy = mac.FlowPolicy(2, 1, 4, config(**settings))
    if velocity:
        policy.velocity.forward = lambda observation, goal, x, t: velocity(x, t)
    return policy


def toy_batch(chunk, padded=False, sizes=(2, 1)):
    """Rows of zeros with these chunks, of which the ends may be padding."""
    observation, goal = (torch.zeros(len(chunk), size) for size in sizes)
    zeros, valid = torch.zeros(len(chunk)), torch.ones_like(chunk)
    if padded:
        valid = (torch.arange(4) < torch.tensor([[4], [4], [2], [2], [3], [1]])).float()
    return mac.Batch(observation, chunk, zeros, observation, zeros,
                     goal + math.nan, goal, zeros, valid)  # a policy ignores the value goal


def test_euler_on_fields_with_known_solutions():
    x_0 = torch.randn(6, 4).clamp(-1, 1) / 3
    grow = flow_policy(lambda x, t: x, flow_steps=10)  # dx/dt = x: Euler's (1 + 1/F)^F, not e
    assert torch.allclose(grow.flow(None, None, x_0), x_0 * 1.1 ** 10, atol=1e-5)
    assert torch.allclose(grow.flow(None, None, x_0, 5000), x_0 * math.e, atol=1e-2)
    clock = flow_policy(lambda x, t: t.expand_as(x))  # the sum of i / F^2 is (1 - 1/F) / 2
    assert torch.allclose(clock.flow(None, None, x_0, 8), x_0 + (1 - 1 / 8) / 2, atol=1e-6)
    assert torch.equal(clock.flow(None, None, x_0 + 9, 8), torch.ones(6, 4))


@pytest.mark.parametrize("padded, sigma, center", [(0, 1, 0), (1, 1, 0), (1, 0.3, 0), (1, 0.3, 1)])
def test_flow_matching_target_and_path(padded, sigma, center):
    seen, batch = {}, toy_batch(torch.rand(6, 4) * 2 - 1, padded)
    policy = flow_policy(lambda x, t: seen.update(x=x, t=t) or x + 0.5, flow_noise=sigma,
                         center=center)
    losses = policy.flow_losses(batch, generator(3))
    mean = policy.center(batch.observation, batch.actor_goal).detach() if center else 0
    x_0, kept = sigma * torch.randn(6, 4, generator=generator(3)) + mean, batch.valid == 1
    error = (batch.chunk - x_0 - seen["x"] - 0.5)[kept]  # padding does not count
    assert torch.isclose(losses["flow"], error.square().sum() / 24)
    if center:  # is regressed; the flow gives it no gradient
        assert torch.isclose(losses["center"], (batch.chunk - mean)[kept].square().sum() / 24)
        assert not losses["flow"].requires_grad
    t = seen["t"]
    assert torch.allclose(seen["x"], x_0 + t * (batch.chunk - x_0), atol=1e-6)
    assert t.shape == (6, 1) and 0 <= t.min() and t.max() <= 1


@pytest.mark.parametrize("sigma", [1.0, 0.3])
def test_a_flow_keeps_two_modes(sigma):
    torch.manual_seed(0)
    policy = mac.FlowPolicy(1, 0, 1, config(width=32, eval_flow=True, flow_noise=sigma))
    optimizer = torch.optim.Adam(policy.parameters(), 3e-3, fused=True)
    noise, no_goal = generator(), torch.zeros(0)
    for _ in range(500):
        sign = torch.randint(0, 2, (256, 1), generator=noise) * 2.0 - 1
        chunk = 0.6 * sign + 0.05 * torch.randn(256, 1, generator=noise)
        optimizer.zero_grad()
        sum(policy.loss(toy_batch(chunk, sizes=(1, 0)), noise).values()).backward()
        optimizer.step()
    for training in (True, False):  # the distillation; the flow itself
        policy.train(training)
        with torch.no_grad():
            sample = policy.decode(torch.zeros(1), no_goal, torch.randn(4000, 1, generator=noise))
        near = [(abs(sample - mode) < 0.2).float().mean() for mode in (-0.6, 0.6)]
        assert min(near) > 0.35 and (abs(sample) < 0.3).float().mean() < 0.1


@pytest.mark.parametrize("padded, sigma, center", [(0, 1, 0), (1, 1, 0), (1, 0.7, 0), (1, 0.7, 1)])
def test_distillation_fits_the_clipped_teacher_and_gives_it_no_gradient(padded, sigma, center):
    policy = flow_policy(flow_steps=3, eval_flow=True, flow_noise=sigma, center=center)
    batch = toy_batch(torch.rand(6, 4) * 2 - 1, padded)
    loss, z = policy.loss(batch, generator(1))["distill"], torch.randn(6, 4, generator=generator(1))
    mean = policy.center(batch.observation, batch.actor_goal) if center else 0
    x = x_0 = sigma * z + mean
    with torch.no_grad():
        for i in range(3):
            t = torch.full((6, 1), i / 3)
            x = x + policy.velocity(batch.observation, batch.actor_goal, x, t) / 3
        chunk = policy.one_step(batch.observation, batch.actor_goal, x_0)
    difference = chunk - x.clip(-1, 1)
    assert x.abs().max() > 1  # so that the clip shows
    assert torch.allclose(loss, difference[batch.valid == 1].square().sum() / 24, atol=1e-6)
    loss.backward()
    assert all(p.grad is None for p in policy.velocity.parameters())
    assert all(p.grad is not None for p in policy.one_step.parameters())
    for training, expected in ((True, chunk), (False, x)):
        proposal = policy.train(training).decode(batch.observation, batch.actor_goal, z[None])[0]
        assert torch.allclose(proposal, expected.clip(-1, 1), atol=1e-6)


# ------------------------------------------------------------------------------ the agent

def make_agent(goal=2, terminations=False, **settings):
    torch.manual_seed(1)
    return mac.Agent(4, 2, list(range(goal)), config(terminations=terminations, **settings))


def trajectories(terminated=False):
    torch.manual_seed(2)
    return Trajectories(torch.randn(60, 4), torch.rand(60, 2) * 2 - 1, torch.tensor([19, 39, 59]),
                        torch.randn(60), torch.full((3,), terminated))


def chunk_data(goal=2, **settings):
    return mac.ChunkDataset(trajectories(), list(range(goal)), config(**settings))


def make_uncertain(agent, *inputs):
    """Shift the last logit of the outcome so that it is positive for some of the inputs only."""
    with torch.no_grad():
        agent.outcome.output.bias[-1] -= between(agent.outcome(*inputs)[..., -1])


@pytest.mark.parametrize("near", [(0.5,), (0.5, 2.0)])
def test_a_tolerance_is_of_all_coordinates_or_of_one_each(near):
    batch, exact = (chunk_data(value_goals=(0, 0, 0, 1), tolerance=tolerance).sample(
        999, generator()) for tolerance in (near, ()))
    off = (batch.observation[:, :2] - batch.value_goal).abs()
    met = (off[:, 0] <= near[0]) & (off[:, 1] <= near[-1])
    assert torch.equal(batch.success, (met | (exact.success == 1)).float())
    assert exact.success.sum() < batch.success.sum() < 300


@torch.no_grad()
@pytest.mark.parametrize("goal, settings", [
    (0, {}), (2, {}), (2, {"eval_flow": True, "flow_steps": 3}), (0, {"critic": "model"}),
    (2, {"critic": "model"})])
def test_act_chooses_the_candidate_that_q_ranks_first(goal, settings):
    """Q is the critic's or, without one, a step of the models and V; the candidates come from one
    step or, as is more exact, from the flow itself."""
    agent = make_agent(goal, **settings).eval()
    policy, critic = agent.policy, agent.critic
    agent.normalizer.fit(torch.randn(50, 4) * 3 + 1)
    x, g = torch.randn(5, 4), torch.randn(5, goal)
    states, goals = agent.prepare(x, g)
    assert torch.equal(states, agent.normalizer(x))
    assert torch.equal(goals, agent.normalizer(g, agent.columns))
    s, g_many = (t[:, None].expand(5, 7, -1) for t in (states, goals))
    z = torch.randn(5, 7, 6, generator=generator(2))
    proposals = policy.one_step(s, g_many, z).clamp(-1, 1)
    if agent.config.eval_flow:
        proposals = policy.flow(s, g_many, z, 3)
    if not critic:
        make_uncertain(agent, s, proposals, g_many)
    chunks, q = agent.candidates(x, g, 7, generator(2))
    assert chunks.shape == (5, 7, 3, 2) and chunks.dtype == q.dtype == np.float32
    assert np.allclose(chunks.reshape(5, 7, 6), proposals, atol=1e-6)
    assert all(len(candidates.unique(dim=0)) == 7 for candidates in proposals)  # noise of its own
    scores = np.zeros((5, 7))
    for b, i in np.ndindex(5, 7):
        inputs = states[b], proposals[b, i], goals[b]
        following = states[b] + agent.dynamics(*inputs[:2])
        value = 0.9 ** 3 * agent.value(following, goals[b]).item()
        told = agent.outcome(*inputs).item()
        expected = told + value if not goal else 0 if told > 0 else -1 + value
        scores[b, i] = critic(*inputs).item() if critic else expected
    assert np.allclose(q, scores, atol=1e-5)
    best = chunks[np.arange(5), scores.argmax(1)]
    assert np.array_equal(agent.act(x, g if goal else None, 7, generator(2)), best)
    chosen = agent.best_of(states, goals, 7, generator(2))
    assert np.array_equal(chosen.unflatten(1, (3, 2)), best)
    assert agent.candidates(x, g)[1].shape == (5, 32)  # --eval-candidates
    if not critic:
        assert not goal or 0 < (q == 0).mean() < 1
        assert set(agent.value_losses(agent.imagine(states, goals, generator(2)))) == {"value"}
        assert not any(name.startswith("critic") for name in agent.state_dict())


def test_returns_against_plain_recursion_with_an_end_in_the_middle():
    rng = np.random.default_rng(0)
    rewards, masks = rng.normal(size=(4, 3)), np.ones((4, 3))
    masks[1, 0] = masks[0, 2] = masks[3, 2] = 0
    final = rng.normal(size=3)

    def value(k, b):
        return final[b] if k == 4 else rewards[k, b] + 0.7 * masks[k, b] * value(k + 1, b)

    result = mac.returns(*map(torch.tensor, (rewards, masks, final)), 0.7)
    assert np.allclose(result, [[value(k, b) for b in range(3)] for k in range(4)])
    assert np.isclose(result[0, 0], rewards[0, 0] + 0.7 * rewards[1, 0])  # nothing after the end


@pytest.mark.parametrize("goal", [0, 2])
def test_rollout_step_by_step(goal):
    agent = make_agent(goal)
    observation, goals = torch.randn(6, 4), torch.randn(6, goal)
    rollout = agent.imagine(observation, goals, generator(4))
    noise, state = generator(4), observation
    with torch.no_grad():
        for k in range(4):
            chunk = agent.best_of(state, goals, 8, noise)
            output = agent.outcome(state, chunk, goals)[:, 0]
            success = (torch.sigmoid(output) > 0.5).float()
            reward, mask = (success - 1, 1 - success) if goal else (output, torch.ones(6))
            following = state + agent.dynamics(torch.cat([state, chunk], 1))
            for name, value in (("chunks", chunk), ("rewards", reward), ("masks", mask),
                                ("observations", state)):
                assert torch.allclose(getattr(rollout, name)[k], value, atol=1e-6), name
            state = following
    assert torch.allclose(rollout.observations[4], state, atol=1e-6)
    assert not rollout.chunks.requires_grad and rollout.goal is goals
    longer = agent.imagine(observation, goals, generator(4), horizon=6, candidates=32)
    assert len(longer.chunks) == 6 and len(longer.observations) == 7
    with torch.no_grad():
        chosen = agent.best_of(observation, goals, 32, generator(4))
    assert torch.allclose(longer.chunks[0], chosen)


@pytest.mark.parametrize("horizon", [1, 4])
def test_value_and_critic_targets(horizon):
    agent = make_agent(horizon=horizon)
    for p in agent.target_value.parameters():
        p.data.add_(0.05)  # so that the target network differs from the online one
    states, goals = torch.randn(6, 4), torch.randn(6, 2)
    chunks = agent.imagine(states, goals, generator(4)).chunks[0]
    make_uncertain(agent, states, chunks, goals)
    rollout = agent.imagine(states, goals, generator(4))
    losses = agent.value_losses(rollout)
    gamma, s, masks = 0.9 ** 3, rollout.observations, rollout.masks
    assert 0 < masks[0].mean() < 1
    with torch.no_grad():
        target, total = agent.target_value(s[-1], goals).numpy(), 0
        for k in reversed(range(horizon)):
            target = rollout.rewards[k].numpy() + gamma * masks[k].numpy() * target
            total += ((agent.value(s[k], goals).numpy() - target) ** 2).mean() / horizon
        q_target = (rollout.rewards[0] + gamma * masks[0] * agent.value(s[1], goals)).numpy()
        q = agent.critic(s[0], rollout.chunks[0], goals).numpy()
    assert np.isclose(losses["value"].item(), total, rtol=1e-5)
    assert np.isclose(losses["critic"].item(), ((q - q_target) ** 2).mean(), rtol=1e-5)
    losses["critic"].backward()
    assert all(p.grad is None for p in agent.value.parameters())
    agent.value_losses(rollout)["value"].backward()
    assert all(p.grad is None for p in agent.target_value.parameters())


@pytest.mark.parametrize("goal, terminations", [(0, False), (2, False), (0, True)])
def test_model_losses(goal, terminations):
    agent = make_agent(goal, terminations)
    batch = chunk_data(goal).sample(9, generator())
    batch = batch._replace(success=(torch.arange(9) % 2).float(),
                           termination=(torch.arange(9) % 3).clamp(max=1).float())
    following = batch.observation + agent.dynamics(batch.observation, batch.chunk)
    expected = {"dynamics": (following - batch.next_observation).square().mean()}
    outputs = agent.outcome(batch.observation, batch.chunk, batch.value_goal).unbind(-1)
    for name, output in zip(agent.outcome.names, outputs):
        p, y = torch.sigmoid(output), batch.success if name == "success" else batch.termination
        expected[name] = -(y * p.log() + (1 - y) * (1 - p).log()).mean()
        if name == "reward":
            expected[name] = (output - batch.reward).square().mean()
    losses = agent.model_losses(batch)
    assert set(losses) == set(expected) and len(losses) == (3 if terminations else 2)
    assert all(torch.allclose(losses[name], expected[name], atol=1e-6) for name in losses)


@torch.no_grad()
def test_a_termination_ends_the_imagined_rollout():
    agent = make_agent(0, terminations=True)
    inputs = torch.randn(9, 4), torch.rand(9, 6), torch.zeros(9, 0)
    make_uncertain(agent, *inputs)
    reward, logit = agent.outcome(*inputs).unbind(-1)
    predicted, masks = agent.outcome.predict(*inputs)
    assert torch.equal(predicted, reward) and torch.equal(masks, (logit <= 0).float())
    assert 0 < masks.sum() < 9


@pytest.mark.parametrize("in_data, wanted, goal, names", [
    (True, True, 0, ("reward", "termination")), (False, True, 0, ("reward",)),
    (True, False, 0, ("reward",)), (True, True, 2, ("success",))])
def test_terminations_are_learned_when_the_data_have_them(in_data, wanted, goal, names):
    given = trajectories(in_data)
    run = mac.Training(config(batch_size=8, terminations=wanted), torch.device("cpu"), given,
                       trajectories(True), list(range(goal)))
    assert run.agent.outcome.names == names
    for data in (run.dataset, run.validation):
        assert data.total_starts == 3 * (19 if in_data and wanted else 17)
    losses = run.make_step()()
    assert all(losses[name] > 0 for name in names) and ("termination" in losses) == (len(names) > 1)


@pytest.mark.parametrize("terminations", [False, True])
def test_models_see_scaled_data_and_are_not_told_of_an_end_by_what_follows_it(terminations):
    seen, columns = {}, [2, 0]
    agent = mac.Agent(4, 2, columns, config(terminations=terminations))
    states = torch.randn(60, 4) * torch.tensor([1.0, 100.0, 0.0, 1.0]) + 5
    agent.normalizer.fit(states)
    middle = (states.amax(0) + states.amin(0)) / 2
    scale = (states.amax(0) - states.amin(0)) / 2 + 1e-3
    data = trajectories()._replace(observations=states)
    batch = mac.ChunkDataset(data, columns, config()).sample(9, generator())
    valid = torch.arange(6) < torch.arange(9)[:, None]
    batch = batch._replace(valid=valid.float(), chunk=batch.chunk * valid)
    agent.model_losses = lambda batch: seen.update(batch._asdict()) or {}
    agent.losses(batch, generator(1), model_only=True)
    for name in ("observation", "next_observation"):
        assert torch.allclose(seen[name], (getattr(batch, name) - middle) / scale, atol=1e-5)
    for name in ("value_goal", "actor_goal"):
        expected = (getattr(batch, name) - middle[columns]) / scale[columns]
        assert torch.allclose(seen[name], expected, atol=1e-5)
    with torch.no_grad():
        z = torch.randn(batch.chunk.shape, generator=generator(1))
        proposal = agent.policy.decode(seen["observation"], seen["actor_goal"], z)
    filled = torch.where(valid, batch.chunk, proposal)
    assert torch.equal(seen["chunk"], filled if terminations else batch.chunk)


def test_rollout_batch_size_limits_the_rollouts_only():
    batch = chunk_data().sample(16, generator())
    losses, rollout = make_agent(rollout_batch_size=5).losses(batch, generator())
    others, whole = make_agent().losses(batch, generator())
    assert rollout.chunks.shape == (4, 5, 6) and whole.chunks.shape == (4, 16, 6)
    assert [name for name in losses if losses[name] != others[name]] == ["value", "critic"]


@pytest.mark.parametrize("chunk", [1, 5])
@pytest.mark.parametrize("model_only", [False, True])
def test_an_update_trains_all_and_a_warmup_models_and_policy_alone(chunk, model_only):
    agent = make_agent(chunk=chunk)
    batch = chunk_data(chunk=chunk).sample(8, generator())
    before = {name: p.clone() for name, p in agent.named_parameters()}
    losses = mac.update(agent, mac.make_optimizer(agent), batch, generator(), model_only)
    assert all(value.isfinite() for value in losses.values())
    assert not model_only or set(losses) == {"flow", "distill", "dynamics", "success"}
    trained = {"policy", "dynamics", "outcome"} | (set() if model_only else {"critic", "value"})
    for name, p in agent.named_parameters():  # the target was V's copy, and follows V as it was
        assert (p != before[name]).any() == (name.split(".")[0] in trained), name
    assert agent.act(np.zeros(4), np.zeros(2)).shape == (chunk, 2)


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
        if not name.startswith("target"):
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
    goal = 3 if case == "gc" else 0
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

    def published(when, name):
        """The parameters of a network there, by our names."""
        state = {}
        for key, value in data.items():
            if key.startswith(f"{when}/{name}/"):
                layer, i, kind = re.split("[_/]", key)[-3:]
                place = f"hidden.{3 * int(i) + 2 * (layer == 'LayerNorm')}" if i < "4" else "output"
                state[f"{place}.{'bias' if kind == 'bias' else 'weight'}"] = value.t()
        if name in ("critic", outcome):
            state["hidden.0.weight"] = state["hidden.0.weight"][:, order]
        return state

    for name, net in nets.items():
        net.load_state_dict(published("before", name))
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
    r = seen["rollout"]
    for mine, name in ((r.observations[:-1], "observations"), (r.chunks, "actions"),
                       (r.observations[1:], "next_observations"), (r.rewards, "rewards"),
                       (r.masks, "masks"), (seen["returns"], "returns")):
        assert torch.allclose(mine, data[f"rollout/{name}"], rtol=1e-3, atol=1e-4), name
    for name, net in nets.items():
        for key, theirs in published("after", name).items():
            assert torch.allclose(net.state_dict()[key], theirs, rtol=1e-4, atol=1e-6), (name, key)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("goal, host, settings", [
    (0, False, {}), (2, False, {}), (0, True, {}), (2, True, {}),
    (2, False, {"flow_noise": 0.3, "center": True, "critic": "model"})])
def test_cuda_graph_agrees_with_eager_updates(goal, host, settings):
    """Through a warmup and after it, with a changing learning rate and validation in between."""
    device, results, columns = torch.device("cuda"), [], list(range(goal))
    tiny, data = config(batch_size=16, **settings), trajectories()
    on_host = mac.ChunkDataset(data, columns, tiny)
    for graphed in (False, True):
        run, losses = mac.Training(tiny, device, data, data, columns), []
        if host:
            run.dataset = on_host
            run.generators = devices.make_generators(0, torch.device("cpu"), device)
        batches, noise = run.generators
        for model_only in (True, False):
            step = run.make_step(model_only) if graphed else lambda: mac.update(
                run.agent, run.optimizer, run.draw(batches), noise, model_only)
            for i in range(1, 5):
                run.optimizer.param_groups[0]["lr"].fill_(3e-4 / i)
                losses.append({name: value.item() for name, value in step().items()})
                batch = devices.to_device(on_host.sample(8, generator()), device)
                with torch.no_grad():
                    run.agent.losses(batch, torch.Generator(device).manual_seed(0))
        results.append((losses, [p.detach().cpu() for p in run.agent.parameters()],
                        [g.get_state() for g in run.generators]))
    (losses, parameters, states), (others, other_parameters, other_states) = results
    assert losses[0] != losses[1] and len(losses) == len(others) == 8
    assert all(a == pytest.approx(b, rel=1e-4) for a, b in zip(losses, others))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(parameters, other_parameters))
    assert all(torch.equal(a, b) for a, b in zip(states, other_states))


@pytest.fixture(scope="module")
def agent():
    """It takes 28 numbers, of which 19 to 21 are the goal, and gives 5 per action."""
    agent = mac.Agent(28, 5, [19, 20, 21], config(chunk=10)).eval()
    agent.normalizer.fit(torch.randn(100, 28) * 3 + 1)
    return agent


X, G = np.linspace(-1, 1, 28), np.array([1, 2, 3])


@pytest.mark.parametrize("observation, goal", [
    (X.tolist(), G.tolist()), (torch.tensor(X), torch.tensor(G)),
    (X, np.r_[np.zeros(19), G, np.zeros(6)]), (X.astype(np.float32), G.astype(np.int8)),
    (torch.tensor(X, requires_grad=True), G), (X[::-1].copy()[::-1], G),
    (X.astype(np.longdouble), G), (X.astype(">f8"), G), (X, torch.tensor(G).bfloat16())])
def test_act_takes_numbers_of_any_type_and_whole_goal_observations(observation, goal, agent):
    chunk = agent.act(X, G, 4, generator())
    assert chunk.shape == (10, 5) and chunk.dtype == np.float32 and np.abs(chunk).max() <= 1
    assert np.allclose(agent.act(observation, goal, 4, generator()), chunk, atol=1e-6)


@pytest.mark.parametrize("observation, goal, message", [
    (X[:-1], G, "observation has shape .1, 27.*any, 28"), (X[:, None], G[:, None], "any, 28"),
    (X[None, None], G[None, None], "any, 28"), (X, None, "goal has shape .1, 0.*any, 3"),
    (np.zeros((4, 28)), G, "1 goals for 4 o"), (X * 1e39, G, "observation.0, 0. is -inf"),
    (np.where(X > 0.99, np.nan, X), G, "observation.0, 27. is nan"),
    (X, [1, 2, math.inf], "goal.0, 2. is inf"), (["a"] * 28, G, "observation has shape"),
    (X + 1j, G, "complex"), (torch.tensor(X + 1j), G, "complex"),
    (X.astype(object), G, "object"), ([[1.0], [1, 2]], G, "inhomogeneous")])
def test_act_refuses_other_shapes_and_what_is_not_a_number(observation, goal, message, agent):
    with pytest.raises(ValueError, match=message):
        agent.act(observation, goal)
    with pytest.raises(ValueError, match="0 candidates"):
        agent.act(X, G, candidates=0)


# ------------------------------------------------------------------------------ command lines

def test_settings_follow_the_environment():
    assert mac.settings() == mac.settings(env="cube-double-play-v0")
    cube, puzzle, maze = (0, 1, 0, 0), (0, 0.5, 0, 0.5), (0, 0, 1, 0)
    for env, *expected in (
            ("cube-single-play-singletask-v0", 512, 256, 10 ** 6, 8, cube),
            ("cube-double-play-v0", 1024, 1024, 2 * 10 ** 6, 8, cube),
            ("cube-double-play-oraclerep-v0", 1024, 1024, 2 * 10 ** 6, 8, cube),
            ("puzzle-3x3-play-oraclerep-v0", 1024, 1024, 2 * 10 ** 6, 8, puzzle),
            ("puzzle-4x5-play-oraclerep-v0", 256, 1024, 2 * 10 ** 6, 32, puzzle),
            ("humanoidmaze-giant-navigate-oraclerep-v0", 1024, 1024, 2 * 10 ** 6, 8, maze),
            ("antsoccer-arena-navigate-v0", 1024, 1024, 2 * 10 ** 6, 8, maze)):
        c = mac.settings(env=env)
        assert [c.width, c.batch_size, c.steps, c.candidates, c.actor_goals] == expected
    assert mac.settings(env="cube-double-play-v0", width=7).width == 7
    given, resume, updates = mac.parse("--env cube-single-play-singletask-v0 --small "
                                       "--no-eval-flow --eval_episodes=3 --chunk 5".split())
    small = mac.settings(**given)
    assert (small.eval_flow, small.decay, small.eval_episodes, small.execute) == (False, True, 3, 5)
    assert not resume and not updates
    for env, goal, *expected in (
            ("cube-double-play", "task", 1000, 0.3, True, 0.99, 0),
            ("cube-double-play-oraclerep", "task", 1000, 0.3, True, 0.99, 0),
            ("puzzle-4x4-play-oraclerep", "task", 300, 0.3, False, 0.99, 1),
            ("cube-double-play", "observation", 100, 1, False, 0.99, 0),
            ("cube-double-play-singletask-task3", "task", 1000, 0.3, True, 0.995, 0),
            ("cube-triple-play", "task", 100, 1, False, 0.99, 0),
            ("scene-play", "task", 500, 0.3, False, 0.995, 7),
            ("scene-play-singletask", "task", 300, 1, False, 0.995, 0)):
        c = mac.settings(env=f"{env}-v0", small=True, goal=goal)
        assert [c.collect, c.flow_noise, c.center, c.discount, len(c.tolerance)] == expected


def test_a_task_with_a_reward_has_no_goals():
    with pytest.raises(MacError, match="--goal observation: .* take scene-play-v0"):
        mac.settings(env="scene-play-singletask-v0", goal="observation")


@pytest.mark.parametrize("name, bad", [
    ("learning_rate", math.inf), ("learning_rate", -1e-3), ("learning_rate", math.nan),
    ("steps", 0), ("chunk", 0), ("horizon", 0), ("flow_steps", 0), ("width", 0), ("batch_size", 0),
    ("candidates", 0), ("eval_candidates", 0), ("execute", 0), ("eval_episodes", 0),
    ("rollout_batch_size", -1), ("save_interval", -1), ("window", -1), ("collect", -1),
    ("collect", 3), ("discount", 1.5), ("discount", 1.0), ("discount", 0), ("warmup", 1),
    ("ema_rate", 1.1), ("seed", -1), ("seed", 2 ** 32), ("value_goals", (math.nan, 0, 0, 0)),
    ("value_goals", (1, -1, 0, 0)), ("actor_goals", (0, 0, 0, 0)), ("policy", "flw"),
    ("tolerance", (-1,))])
def test_a_bad_value_is_an_error_that_names_the_flag(name, bad):
    with pytest.raises(MacError, match=f"^{flag(name)}: "):
        mac.settings(env="antmaze-large-navigate-v0", **{name: bad})  # nobody can collect there


def test_every_setting_is_a_flag_with_a_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        mac.main(["--help"])
    printed = " ".join(capsys.readouterr().out.partition("options:")[2].split())
    for name in vars(mac.Config()):  # values and defaults follow, which are no help
        values = r"(, --no-\S+)?( X)*( \[X \.\.\.\])?( \{\S+\})? (?!X )\w"
        assert re.search(flag(name) + values, printed), name


def test_both_command_lines_and_an_agent_for_other_programs(tmp_path, capsys, monkeypatch):
    run, report, seen, update = tmp_path / "run", tmp_path / "report.json", [], mac.update

    def spy(agent, optimizer, batch, generator, model_only=False):
        seen.append((round(optimizer.param_groups[0]["lr"].item() * 1e3, 4), model_only))
        return update(agent, optimizer, batch, generator, model_only)

    monkeypatch.setattr(mac, "update", spy)
    given = "--steps 12 --warmup 0.5 --decay --learning-rate 1e-3 --log-interval 6".split()
    assert mac.main([*COUNTING, *given, "--eval-interval", "12", "--save-dir", str(run)]) == 0
    assert seen == [(1, True)] * 6 + [  # then the learning rate falls
        (round((12 - step) / (12 - 6), 4), False) for step in range(6, 12)]
    assert "step 12: success 50%" in capsys.readouterr().out
    warmup, joint = read_csv(run / "train.csv")
    assert (warmup["step"], warmup["critic"], joint["step"]) == ("6", "", "12")
    assert all(np.isfinite(float(value)) for value in joint.values())
    assert json.loads((run / "config.json").read_text())["env"] == "counting"
    assert evaluation.main([str(run), "--episodes", "1", "--execute", "9", "--candidates", "2",
                            "--device", "cpu", "--json", str(report)]) == 0
    result = json.loads(report.read_text())
    assert [result[key] for key in ("policy", "step", "seed", "execute", "candidates")] == [
        "flow", 12, 0, 3, 2]  # no more than a chunk is executed
    assert [task["success"] for task in result["tasks"].values()] == [0, 1]
    assert result["overall"] == {"success": 0.5, "stderr": pytest.approx(0.125 ** 0.5), "length": 7,
                                 "return": -3.5, "return_stderr": 0}
    assert "overall" in capsys.readouterr().out
    agent = mac.load(run)
    assert agent.step == 12 and agent.act(np.zeros(1), np.ones(1)).shape == (3, 1)


def test_flops_per_update_against_a_hand_count(capsys, monkeypatch):
    for name, value in (("sizes", (28, 5)), ("columns", [])):  # as in cube-single
        monkeypatch.setattr(Counting, name, value)
    given = "--width 32 --batch-size 16 --chunk 10 --benchmark 2"
    assert mac.main([*COUNTING, *given.split()]) == 0
    report = json.loads(capsys.readouterr().out)
    o, D, W, B, N, H, S = 28, 50, 32, 16, 8, 10, 10

    def forward(inputs, outputs):
        return 2 * (inputs * W + 3 * W * W + W * outputs)

    def train(inputs, outputs):  # forward, gradient of weights, gradient of all inputs but x
        return 3 * forward(inputs, outputs) - 2 * inputs * W

    rollout = H * B * (N * (forward(o + D, D) + forward(o + D, 1))
                       + forward(o + D, 1) + forward(o + D, o))
    teacher = S * B * forward(o + D + 1, D)
    learned = train(o + D + 1, D) + train(o + D, D) + train(o + D, o) + 2 * train(o + D, 1)
    values = H * train(o, 1) + 2 * forward(o, 1)  # the latter: targets of V and of Q
    assert report["gflop_per_update"] * 1e9 == rollout + teacher + B * (learned + values)
    assert report["device"] == "cpu" and report["ms_min"] <= report["ms_median"]
    assert 0 < report["fraction_of_peak"] < 1


def test_import_starts_nothing(tmp_path):
    code = (f"import sys, threading; sys.path.insert(0, {str(HERE)!r}); import mac, eval; "
            "assert not {'ogbench', 'gymnasium', 'mujoco', 'matplotlib'} & set(sys.modules); "
            "assert threading.active_count() == 1")
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True)
    assert not (result.returncode or result.stdout or list(tmp_path.iterdir())), result.stderr

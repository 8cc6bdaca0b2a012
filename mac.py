"""MAC: scalable offline model-based RL with action chunks (ICLR 2026), in one file.

    python mac.py --env cube-double-play-v0                       # the paper's settings
    python mac.py --env cube-single-play-singletask-v0 --small    # minutes on a laptop CPU
    python eval.py exp/<run>                                      # success table; --video, --plot

The algorithm, and the function of each step (equation numbers are the paper's):

    1. ChunkDataset.sample    draw (s_t, a_{t:t+n}, r, s_{t+n}) and goals from the logged data
    2. FlowPolicy.loss        clone the behaviour by flow matching (7); distil it to one step (8)
    3. Agent.model_losses     regress the chunk's outcome: next state (5), reward or success (6)
    4. Agent.imagine          roll H chunks out in the model (9), each the best of N by Q (4)
    5. Agent.value_losses     regress V on the H-chunk returns (10), Q on one chunk + V (11)
    6. update                 one Adam step on the sum of all losses; target V follows by EMA

Shapes: B batch, N candidates, H rollout length in chunks, n chunk length, O observation,
A action, G goal (0 where the task is fixed), D = n A the flattened chunk; T dataset states.

Where this file follows the authors' published code rather than the paper's text:
    - the noised chunk is (1-u) z + u a: Eq. 7 has the two swapped, its own text does not;
    - the dynamics network predicts the change of state;
    - in reward-based tasks a chunk's reward is the *mean* of its n discounted rewards, not the
      sum: V and Q are 1/n of the paper's, the arg max is the same (`--chunk-reward sum`);
    - losses are means over coordinates, where the paper writes sums;
    - at test time only the first action of a chunk is executed (`--execute`).
Where it differs from that code (README.md has the whole list): a chunk may start anywhere that
leaves n actions and a state (the published sampler drops some), the success model is trained with
cross-entropy, and V is evaluated only where a target needs it.
"""
from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import copy
import csv
import dataclasses
import difflib
import functools
import hashlib
import http.client
import io
import json
import math
import multiprocessing
import os
import pathlib
import platform
import re
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

try:
    import fcntl  # POSIX only; without it two processes can share a run folder unnoticed
except ImportError:
    fcntl = None


# ==========================================================================================
# Part I: the method. It computes on the tensors that it is handed, wherever they came from.
# ==========================================================================================

# ---------------------------------------------------------------------------- configuration


def setting(default, help, **kwargs):
    """A configuration field; `help` and `kwargs` also make its command line flag."""
    return dataclasses.field(default=default, metadata={"help": help, **kwargs})


@dataclasses.dataclass
class Config:
    """Every setting. Defaults are the paper's for reward-based tasks (Tables 7 and 8); what
    else follows from the environment's id is in `preset`."""

    env: str = setting("cube-double-play-v0", "OGBench dataset id")
    seed: int = setting(0, "seed of parameters, batches and noise", low=0, high=2 ** 32 - 1)
    steps: int = setting(1_000_000, "gradient steps; goal-conditioned 2M", low=1)
    device: str = setting("auto", "where to train", choices=("auto", "cpu", "cuda"))
    small: bool = setting(False, "laptop preset (SMALL below in mac.py): collected data, minutes")
    # the method
    chunk: int = setting(10, "n: actions in a chunk", low=1)
    horizon: int = setting(10, "H: chunks in an imagined rollout", low=1)
    candidates: int = setting(8, "N: proposals per decision in training", low=1)
    eval_candidates: int = setting(32, "N at test time", low=1)
    execute: int = setting(1, "actions of each chunk executed at test time", low=1)
    flow_steps: int = setting(10, "F: Euler steps of the flow policy", low=1)
    eval_flow: bool = setting(False, "at test time sample from the flow, not its distillation")
    policy: str = setting("flow", "behaviour policy (Tables 3, 15)",
                          choices=("flow", "onestep", "gaussian", "fql"))
    fql_alpha: float = setting(1.0, "weight of distillation in --policy fql (Table 11)", low=0)
    discount: float = setting(0.999, "gamma per environment step", low=0.001,
                              high=0.999999)
    chunk_reward: str = setting("mean", "a chunk's reward: mean or sum of its n rewards",
                                choices=("mean", "sum"))
    value_goals: tuple = setting((0.2, 0.0, 0.5, 0.3), "odds that a value goal is the current "
                                 "/ a geometric / a uniform future / a random state (Table 6)")
    actor_goals: tuple = setting((0.0, 1.0, 0.0, 0.0), "the same for actor goals (puzzle: half "
                                 "geometric, half random; mazes: uniform future)")
    # networks and optimisation
    width: int = setting(512, "hidden units in each of the 4 layers; goal-conditioned 1024", low=1)
    batch_size: int = setting(256, "chunks per gradient step; goal-conditioned 1024", low=1)
    rollout_batch_size: int = setting(0, "rollouts per step; 0: from the whole batch", low=0)
    learning_rate: float = setting(3e-4, "Adam's step size", low=0)
    warmup: float = setting(0.0, "share of the steps, at the beginning, that train models and "
                            "policy alone, without rollouts", low=0, high=0.99)
    decay: bool = setting(False, "after the warmup, let the learning rate fall linearly to zero")
    ema_rate: float = setting(0.005, "target V moves this much per step", low=0, high=1)
    precision: str = setting("float32", "of proposals, their scores, imagined rewards and the "
                             "flow to distil; bfloat16 is quicker only on hardware that has it",
                             choices=("float32", "bfloat16"))
    # data, logs, files
    dataset_dir: str = setting("~/.ogbench/data", "folder of the .npz files")
    collect: int = setting(0, "train on this many collected episodes instead of OGBench's file",
                           low=0)
    save_dir: str = setting("", "run folder; default exp/<env>-seed<seed>")
    log_interval: int = setting(1000, "steps between rows of train.csv; 0: never", low=0)
    eval_interval: int = setting(100_000, "steps between evaluations; 0: none at all", low=0)
    save_interval: int = setting(10_000, "steps between checkpoints; 0: only the last", low=0)
    eval_episodes: int = setting(15, "episodes per task in an evaluation", low=1)

    def __post_init__(self):
        self.value_goals, self.actor_goals = tuple(self.value_goals), tuple(self.actor_goals)


# ---------------------------------------------------------------------------- chunk dataset


class Batch(NamedTuple):
    """A batch of B chunks; observations and goals are normalised."""

    observation: torch.Tensor  # (B, O) s_t
    chunk: torch.Tensor  # (B, D) a_t ... a_{t+n-1}
    reward: torch.Tensor  # (B,) mean or sum of gamma^i r_{t+i}
    next_observation: torch.Tensor  # (B, O) s_{t+n}
    success: torch.Tensor  # (B,) 1 where the value goal's index lies in [t, t+n)
    value_goal: torch.Tensor  # (B, G)
    actor_goal: torch.Tensor  # (B, G)

    def to(self, device):
        if self.observation.device.type == device.type:
            return self
        return Batch(*(x.pin_memory().to(device, non_blocking=True) for x in self))


class Normalizer(nn.Module):
    """Scales each coordinate to [-1, 1] by the data's minimum and maximum (the published code:
    the half range is enlarged by 1e-3, so that a constant coordinate does not divide by 0)."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("middle", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))

    def fit(self, data):  # (T, width)
        low, high = data.amin(0), data.amax(0)
        self.middle.copy_((low + high) / 2)
        self.scale.copy_((high - low) / 2 + 1e-3)

    def forward(self, x):
        return (x - self.middle) / self.scale


class ChunkDataset:
    """Trajectories laid end to end, from which batches of action chunks are drawn.

    Args:
        observations: (T, O) and goals: (T, G), normalised; goals[i] is state i seen as a goal.
        actions: (T, A); the action of a trajectory's last state is never used.
        rewards: (T,)
        last: (T,) index of the last state of each state's trajectory.
    """

    def __init__(self, observations, goals, actions, rewards, last, config):
        self.observations, self.goals, self.last = observations, goals, last
        self.actions = actions.clamp(-1 + 1e-5, 1 - 1e-5)  # as the published code does
        self.rewards, self.config = rewards, config
        index = torch.arange(len(last), device=last.device)
        # Every start that leaves n actions and a state n steps later, the last one included.
        self.starts = index[index + config.chunk <= last]
        self.offsets = torch.arange(config.chunk, device=last.device)
        weights = config.discount ** self.offsets
        self.reward_weights = weights / config.chunk if config.chunk_reward == "mean" else weights

    def sample(self, batch_size, generator):
        """B chunks, uniform over all legal starts. -> Batch"""
        device = self.starts.device
        pick = torch.randint(len(self.starts), (batch_size,), generator=generator, device=device)
        return self.batch(self.starts[pick], generator)

    def batch(self, start, generator):
        """The chunks that begin at `start` (B,), with goals drawn by `generator`. -> Batch"""
        steps = start[:, None] + self.offsets  # (B, n)
        value_goal = self.sample_goals(start, self.config.value_goals, generator)  # (B,)
        actor_goal = self.sample_goals(start, self.config.actor_goals, generator)  # (B,)
        ahead = value_goal - start
        return Batch(
            observation=self.observations[start],
            chunk=self.actions[steps].flatten(1),
            reward=(self.rewards[steps] * self.reward_weights).sum(1),
            next_observation=self.observations[start + self.config.chunk],
            success=((ahead >= 0) & (ahead < self.config.chunk)).float(),
            value_goal=self.goals[value_goal],
            actor_goal=self.goals[actor_goal],
        )

    def sample_goals(self, start, odds, generator):
        """Indices (B,) of goal states: with `odds` (current, geometric, uniform, random) the
        state itself, one Geom(1 - gamma) steps ahead or uniform over the rest of the trajectory
        (neither beyond its end), or any state of the dataset."""
        size, device = len(start), start.device
        kind, u, v = torch.rand(3, size, generator=generator, device=device)
        left = self.last[start] - start
        geometric = (torch.log(u) / math.log(self.config.discount)).floor() + 1
        geometric = start + torch.minimum(geometric, left.float()).long()
        uniform = start + 1 + torch.minimum((v * left).long(), left - 1)
        anywhere = torch.randint(len(self.last), (size,), generator=generator, device=device)
        current, near, future, _ = np.cumsum(odds)
        goal = torch.where(kind < future, uniform, anywhere)
        goal = torch.where(kind < near, geometric, goal)
        return torch.where(kind < current, start, goal)


# ---------------------------------------------------------------------------- networks


class MLP(nn.Module):
    """Four hidden layers of Linear, GELU, LayerNorm, then Linear (Appendix A.1). Inputs are
    concatenated: where there is no goal, a goal of width 0 is concatenated like any other."""

    def __init__(self, inputs, outputs, width):
        super().__init__()
        layers = []
        for fan_in in (inputs, width, width, width):
            layers += [nn.Linear(fan_in, width), nn.GELU("tanh"), nn.LayerNorm(width, eps=1e-6)]
        self.hidden, self.output = nn.Sequential(*layers), nn.Linear(width, outputs)
        for layer in (*self.hidden, self.output):
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, *inputs):
        x = run_hidden(self.hidden, torch.cat(inputs, -1))  # self.hidden(...), quicker on CPUs
        # Never in low precision: values between -64 and -128 are 0.5 apart in bfloat16.
        with torch.autocast(x.device.type, enabled=False):
            return self.output(x.float())


class ScalarMLP(MLP):
    """An MLP with one output, whose axis is dropped: (..., inputs) -> (...)."""

    def __init__(self, inputs, width):
        super().__init__(inputs, 1, width)

    def forward(self, *inputs):
        return super().forward(*inputs).squeeze(-1)


class RewardModel(ScalarMLP):
    """Predicts a chunk's reward; the task never ends (Eq. 6, reward-based tasks)."""

    def loss(self, batch):
        prediction = self(batch.observation, batch.chunk, batch.value_goal)
        return {"reward": F.mse_loss(prediction, batch.reward)}

    def predict(self, observation, chunk, goal):
        """-> reward (...), mask (...): 1 where the rollout goes on."""
        reward = self(observation, chunk, goal)
        return reward, torch.ones_like(reward)


class SuccessModel(ScalarMLP):
    """Predicts whether a chunk meets the goal; reward is -1 until then, and the rollout ends
    there (Appendix A.1, goal-conditioned tasks)."""

    def loss(self, batch):
        logit = self(batch.observation, batch.chunk, batch.value_goal)
        return {"success": F.binary_cross_entropy_with_logits(logit, batch.success)}

    def predict(self, observation, chunk, goal):
        """-> reward (...), mask (...): 1 where the rollout goes on."""
        success = (self(observation, chunk, goal) > 0).float()  # a logit above 0 is p > 0.5
        return success - 1, 1 - success


# ---------------------------------------------------------------------------- policies
# Each has the same two methods. `loss` gives the update a dictionary of losses; `rollout` is None
# in the warmup, and only FQL looks at it and at the critic. `propose` gives the best-of-N a chunk
# (..., D) in [-1, 1] for each row of observation (..., O) and goal (..., G); `exact` matters only
# where there is a distillation to bypass. A velocity is called with observation, goal, x (..., D)
# and t (..., 1).


def flow_matching_loss(velocity, x_1, observation, goal, generator):
    """Eq. 7: regress the velocity x_1 - x_0 at a random point of the straight line from noise
    x_0 to data x_1 (B, D)."""
    x_0 = torch.randn(x_1.shape, generator=generator, device=x_1.device)
    t = torch.rand(len(x_1), 1, generator=generator, device=x_1.device)
    x_t = (1 - t) * x_0 + t * x_1
    return F.mse_loss(velocity(observation, goal, x_t, t), x_1 - x_0)


def euler(velocity, x_0, observation, goal, steps):
    """Follow the velocity field from x_0 (..., D) at t = 0 to t = 1 in equal Euler steps."""
    x = x_0
    for i in range(steps):
        t = torch.full_like(x[..., :1], i / steps)
        x = x + velocity(observation, goal, x, t) / steps
    return x


class FlowPolicy(nn.Module):
    """MAC's policy: a flow of F steps (Eq. 7), distilled to a network of one (Eq. 8)."""

    def __init__(self, observation_size, goal_size, chunk_size, config):
        super().__init__()
        self.config, self.chunk_size = config, chunk_size
        inputs = observation_size + goal_size + chunk_size
        self.velocity = MLP(inputs + 1, chunk_size, config.width)
        self.one_step = MLP(inputs, chunk_size, config.width)

    def noise(self, observation, generator):
        return torch.randn(*observation.shape[:-1], self.chunk_size, generator=generator,
                           device=observation.device)

    def loss(self, batch, rollout, critic, generator):
        observation, goal = batch.observation, batch.actor_goal
        z = self.noise(observation, generator)
        with torch.no_grad(), low_precision(self.config, z):
            teacher = self.flow(observation, goal, z)
        return {
            "flow": flow_matching_loss(self.velocity, batch.chunk, observation, goal, generator),
            "distill": F.mse_loss(self.one_step(observation, goal, z), teacher),
        }

    def flow(self, observation, goal, z):
        return euler(self.velocity, z, observation, goal, self.config.flow_steps).clamp(-1, 1)

    def propose(self, observation, goal, generator, exact=False):
        """From the one-step network or, if `exact`, from the flow that it imitates."""
        z = self.noise(observation, generator)
        if exact:
            return self.flow(observation, goal, z)
        return self.one_step(observation, goal, z).clamp(-1, 1)


class OneStepPolicy(FlowPolicy):
    """Ablation (Table 15): flow matching alone, followed in a single Euler step. The paper says no
    more than that its one-step policy is trained by the flow matching loss."""

    def __init__(self, *sizes_and_config):
        super().__init__(*sizes_and_config)
        del self.one_step

    def loss(self, batch, rollout, critic, generator):
        return {"flow": flow_matching_loss(self.velocity, batch.chunk, batch.observation,
                                           batch.actor_goal, generator)}

    def propose(self, observation, goal, generator, exact=False):
        z = self.noise(observation, generator)
        return euler(self.velocity, z, observation, goal, steps=1).clamp(-1, 1)


class GaussianPolicy(nn.Module):
    """Ablation (Table 3, "Gau"): a = tanh(x), x ~ N(mu(s), sigma(s)^2), by maximum likelihood
    (Appendix A.1). That sigma is diagonal and bounded is this file's choice."""

    def __init__(self, observation_size, goal_size, chunk_size, config):
        super().__init__()
        self.network = MLP(observation_size + goal_size, 2 * chunk_size, config.width)

    def moments(self, observation, goal):
        mean, log_std = self.network(observation, goal).chunk(2, -1)
        return mean, log_std.clamp(-5, 2)  # the usual range; keeps the likelihood bounded

    def log_likelihood(self, chunk, observation, goal):
        """log p(a | s), summed over coordinates. (B, D) -> (B,)"""
        mean, log_std = self.moments(observation, goal)
        x = torch.atanh(chunk)  # finite: dataset actions are clipped to the open interval
        z = (x - mean) / log_std.exp()
        log_normal = -0.5 * z.square() - log_std - 0.5 * math.log(2 * math.pi)
        return (log_normal - torch.log1p(-chunk.square())).sum(-1)

    def loss(self, batch, rollout, critic, generator):
        likelihood = self.log_likelihood(batch.chunk, batch.observation, batch.actor_goal)
        return {"likelihood": -likelihood.mean() / batch.chunk.shape[-1]}

    def propose(self, observation, goal, generator, exact=False):
        mean, log_std = self.moments(observation, goal)
        z = torch.randn(mean.shape, generator=generator, device=mean.device)
        return torch.tanh(mean + log_std.exp() * z)


class FQLPolicy(FlowPolicy):
    """Ablation (Table 3, "FQL"): the one-step network also climbs Q by gradient, at the imagined
    states and with their goals. `make_config` gives it one candidate: no rejection sampling."""

    def loss(self, batch, rollout, critic, generator):
        losses = super().loss(batch, rollout, critic, generator)
        losses["distill"] = self.config.fql_alpha * losses["distill"]
        if rollout is None:
            return losses
        states = rollout.observations[:-1]  # (H, B, O)
        chunk = self.propose(states, rollout.goals, generator)  # (H, B, D)
        # Q's gradient is to reach the chunk, not Q itself.
        frozen = {name: p.detach() for name, p in critic.named_parameters()}
        q = torch.func.functional_call(critic, frozen, (states, chunk, rollout.goals))  # (H, B)
        # Over its own scale: alpha then weighs the same for any task's values.
        return {**losses, "extract": -q.mean() / q.abs().mean().detach()}


POLICIES = {"flow": FlowPolicy, "onestep": OneStepPolicy, "gaussian": GaussianPolicy,
            "fql": FQLPolicy}


# ---------------------------------------------------------------------------- the agent


class Rollout(NamedTuple):
    """Imagined trajectories of H chunks, without gradient."""

    observations: torch.Tensor  # (H+1, B, O)
    chunks: torch.Tensor  # (H, B, D)
    rewards: torch.Tensor  # (H, B)
    masks: torch.Tensor  # (H, B) 0 where the goal is met, 1 elsewhere
    goals: torch.Tensor  # (H, B, G) the same along a rollout


def low_precision(config, tensor):
    """Where no gradient is needed, --precision may lower that of the networks' hidden layers."""
    return torch.autocast(tensor.device.type, torch.bfloat16, config.precision == "bfloat16")


def returns(rewards, masks, final_value, discount):
    """R_k = r_k + discount m_k R_{k+1}, with R_H the value of the last state (Eq. 10).

    Args: rewards, masks: (H, B); final_value: (B,); discount: per chunk. -> (H, B)
    """
    result, following = [], final_value
    for reward, mask in zip(reversed(rewards), reversed(masks)):
        following = reward + discount * mask * following
        result.append(following)
    return torch.stack(result[::-1])


class Agent(nn.Module):
    """The networks of MAC and what they compute together.

    Args: observation_size, goal_size, action_size: O, G (0: a reward fixes the task) and A.
    """

    def __init__(self, observation_size, goal_size, action_size, config):
        super().__init__()
        self.config, self.sizes = config, (observation_size, goal_size, action_size)
        chunk_size = config.chunk * action_size
        self.normalize_observation = Normalizer(observation_size)
        self.normalize_goal = Normalizer(goal_size)
        self.policy = POLICIES[config.policy](observation_size, goal_size, chunk_size, config)
        self.dynamics = MLP(observation_size + chunk_size, observation_size, config.width)
        Outcome = SuccessModel if goal_size else RewardModel
        self.outcome = Outcome(observation_size + chunk_size + goal_size, config.width)
        self.critic = ScalarMLP(observation_size + chunk_size + goal_size, config.width)
        self.value = ScalarMLP(observation_size + goal_size, config.width)
        self.target_value = copy.deepcopy(self.value).requires_grad_(False)

    def next_observation(self, observation, chunk):
        """The model's s_{t+n}: (..., O), (..., D) -> (..., O)"""
        return observation + self.dynamics(observation, chunk)

    def best_of(self, candidates, observation, goal, generator, exact=False):
        """Eq. 4: of N proposals the one that Q ranks first. (B, O), (B, G) -> (B, D)"""
        observation = observation[:, None].expand(-1, candidates, -1)  # (B, N, O)
        goal = goal[:, None].expand(-1, candidates, -1)  # (B, N, G)
        chunks = self.policy.propose(observation, goal, generator, exact)  # (B, N, D)
        if candidates == 1:
            return chunks[:, 0]
        best = self.critic(observation, chunks, goal).argmax(1)  # (B,)
        return chunks.gather(1, best[:, None, None].expand(-1, 1, chunks.shape[-1]))[:, 0]

    @torch.no_grad()
    def imagine(self, observation, goal, generator):
        """Eq. 9: H chunks in the model from every observation (B, O) at once. -> Rollout

        --precision spares the dynamics: their errors add up along a rollout."""
        observations, chunks = [observation], []
        for _ in range(self.config.horizon):
            with low_precision(self.config, observation):
                chunk = self.best_of(self.config.candidates, observation, goal, generator)
            observation = self.next_observation(observation, chunk)
            observations.append(observation)
            chunks.append(chunk)
        observations, chunks = torch.stack(observations), torch.stack(chunks)
        goals = goal.expand(len(chunks), *goal.shape)  # (H, B, G)
        with low_precision(self.config, observation):
            rewards, masks = self.outcome.predict(observations[:-1], chunks, goals)  # (H, B)
        return Rollout(observations, chunks, rewards, masks, goals)

    def model_losses(self, batch):
        """Eq. 5 and 6, on logged chunks."""
        prediction = self.next_observation(batch.observation, batch.chunk)
        return {"dynamics": F.mse_loss(prediction, batch.next_observation),
                **self.outcome.loss(batch)}

    def value_losses(self, rollout):
        """Eq. 10 for all H states of each rollout, Eq. 11 for its first chunk."""
        discount = self.config.discount ** self.config.chunk
        states, goals = rollout.observations, rollout.goals
        with torch.no_grad():
            target = returns(rollout.rewards, rollout.masks,
                             self.target_value(states[-1], goals[0]), discount)  # (H, B)
        value = self.value(states[:-1], goals)  # (H, B)
        # The online V(s_1): already computed above, unless the rollout is a single chunk.
        next_value = value[1] if len(value) > 1 else self.value(states[1], goals[0])
        target_q = rollout.rewards[0] + discount * rollout.masks[0] * next_value.detach()  # (B,)
        q = self.critic(states[0], rollout.chunks[0], goals[0])
        return {"value": F.mse_loss(value, target), "critic": F.mse_loss(q, target_q)}

    def losses(self, batch, generator, warmup=False):
        """All losses, which are added with weight one, and the rollout.

        During the warmup there is none (it is None): neither V nor Q is trained.
        """
        rollout, value_losses = None, {}
        if not warmup:
            some = slice(self.config.rollout_batch_size or None)  # 0: the whole batch
            rollout = self.imagine(batch.observation[some], batch.value_goal[some], generator)
            value_losses = self.value_losses(rollout)
        policy_losses = self.policy.loss(batch, rollout, self.critic, generator)
        return {**policy_losses, **self.model_losses(batch), **value_losses}, rollout

    @torch.no_grad()
    def act(self, observation, goal=None, candidates=None, generator=None):
        """Choose chunks for raw (not normalised) observations.

        Args:
            observation: (B, O) or (O,) array; goal: (B, G) or (G,) alike, or None where G = 0.
            candidates: N; default `eval_candidates`; 1 is the cloned behaviour.
        Returns: (B, n, A) or (n, A) float32 array, in [-1, 1].
        Raises: ValueError if a width is not what the agent was trained with, or B differs.
        """
        device = self.normalize_observation.middle.device
        single = np.ndim(observation) == 1
        goal = np.zeros(np.shape(observation)[:-1] + (0,)) if goal is None else goal
        inputs = []
        for name, given, width in zip(("observation", "goal"), (observation, goal), self.sizes):
            given = torch.as_tensor(np.asarray(given), dtype=torch.float32, device=device)
            if given.shape[-1:] != (width,):
                raise ValueError(f"{name} has shape {tuple(given.shape)}; this agent takes "
                                 f"{width} numbers per {name}")
            inputs.append(given[None] if single else given)
        if inputs[0].shape[:-1] != inputs[1].shape[:-1]:
            raise ValueError(f"goal has shape {np.shape(goal)}, observation "
                             f"{np.shape(observation)}: one goal per observation")
        chunk = self.best_of(candidates or self.config.eval_candidates,
                             self.normalize_observation(inputs[0]),
                             self.normalize_goal(inputs[1]), generator,
                             exact=self.config.eval_flow)
        chunk = chunk.view(len(chunk), self.config.chunk, self.sizes[2]).cpu().numpy()
        return chunk[0] if single else chunk


def update(agent, optimizer, batch, generator, warmup=False):
    """One step of Algorithm 1. -> dict of losses and of statistics (0-dimensional tensors)"""
    losses, rollout = agent.losses(batch, generator, warmup)
    optimizer.zero_grad()
    sum(losses.values()).backward()
    optimizer.step()
    with torch.no_grad():
        torch._foreach_lerp_(list(agent.target_value.parameters()),
                             list(agent.value.parameters()), agent.config.ema_rate)
    metrics = {name: loss.detach() for name, loss in losses.items()}
    return metrics if warmup else {**metrics, "rollout_reward": rollout.rewards.mean()}


# ==========================================================================================
# Part II: running it. Data, evaluation, checkpoints, speed, training loop, command line.
# ==========================================================================================

INFO_KEYS = ("qpos", "qvel", "button_states")  # what rewards and oracle goals are made from
COLLECTED_EPISODES = 1000  # OGBench's size; a tenth as many again for validation
EPISODE_STEPS = 1001


class MacError(Exception):
    """A mistake of the user or a broken file: one line, exit status 2, nothing overwritten."""

    status = 2

    def __init__(self, message):
        super().__init__(" ".join(line.strip() for line in message.splitlines()))


class Diverged(MacError):
    """A loss or parameter became NaN or infinite."""

    status = 3


# ---------------------------------------------------------------------------- environments


def split_id(env_id):
    """'cube-double-play-singletask-task1-v0' -> the id of its environment without the dataset
    type ('cube-double-v0') and the name of its dataset ('cube-double-play-v0')."""
    words = [w for w in env_id.split("-")
             if w not in ("singletask", "oraclerep") and not (w[:4] == "task" and w[4:].isdigit())]
    return "-".join(words[:-2] + words[-1:]), "-".join(words)


def import_ogbench():
    """OGBench and gymnasium, imported late: reading this file as a module starts nothing."""
    # Without a choice dm_control looks for a display and warns when there is none; eval.py
    # chooses a renderer before it comes here.
    renderer = os.environ.setdefault("MUJOCO_GL", "disabled")
    import gymnasium
    try:
        import mujoco  # noqa: F401 it loads the renderer, and raises many kinds if there is none
        import ogbench
    except Exception as error:
        raise MacError(f"OGBench does not start with MUJOCO_GL={renderer} ({error}); unset "
                       "it to go without rendering, or install what it names (EGL: libegl1)"
                       ) from error

    gymnasium.logger.min_level = gymnasium.logger.ERROR  # OGBench's action bounds are float64
    return ogbench, gymnasium


def check_id(env_id):
    """Raise MacError, with the nearest known ids, unless OGBench has this state-based task."""
    _, gymnasium = import_ogbench()
    manipulation, maze = ("play", "noisy"), ("navigate", "stitch", "explore")
    types = {"cube": manipulation, "scene": manipulation, "puzzle": manipulation, "antmaze": maze,
             "humanoidmaze": maze, "pointmaze": maze, "antsoccer": maze}
    known = set()
    for words in (name.split("-") for name in gymnasium.registry):
        place = words.index("singletask") if "singletask" in words else -1
        for kind in types.get(words[0], ()):
            known.add("-".join(words[:place] + [kind] + words[place:]))
            if place == -1:
                known.add("-".join(words[:-1] + [kind, "oraclerep"] + words[-1:]))
    if env_id not in known:
        near = difflib.get_close_matches(env_id, sorted(known), 3, 0.4)
        raise MacError(f"--env: OGBench has no task {env_id!r}; "
                       f"did you mean {' or '.join(near or ['cube-double-play-v0'])}?")


def is_scripted(env_id):
    """Whether OGBench has scripted policies to collect the dataset of this task with."""
    return env_id.split("-")[0] in ("cube", "scene", "puzzle") and "-play-" in env_id


def make_env(env_id):
    """An OGBench environment whose `reset` can be seeded: OGBench draws a few actions from an
    action space that it builds, unseeded, at each access, so here it is built once."""
    ogbench, _ = import_ogbench()
    env = ogbench.make_env_and_datasets(env_id, env_only=True)
    base = env.unwrapped
    fixed = {"action_space": base.action_space}
    base.__class__ = type(type(base).__name__, (type(base),), fixed)
    return env


def reset(env, task, seed):
    """Begin `task` (1 to 5) -> observation (O,), goal (G,), of width 0 where the task is fixed."""
    env.unwrapped.action_space.seed(seed)
    np.random.seed(seed)  # mazes draw the noise of a start from NumPy's global stream
    observation, info = env.reset(seed=seed, options={"task_id": task})
    return observation, np.zeros(0) if is_fixed(env) else info["goal"]


def is_fixed(env):
    """Whether a reward fixes the environment's task: then it has no goal."""
    return env.unwrapped._reward_task_id is not None


# ---------------------------------------------------------------------------- data: collection


def collect_episode(name, seed, split, episode):
    """One episode of OGBench's play data by its scripted policies; a function of the arguments
    alone. -> dict of (1001, ...) arrays"""
    for attempt in range(100):
        data = run_oracle(name, np.random.SeedSequence((seed, split, episode, attempt)))
        if "scene" not in name:
            return data
        # As OGBench does: the cube of a scene must stay in view unless it is in the drawer.
        _, y, z = data["qpos"][:, 14:17].T
        if not ((y >= 0.29) | ((y <= -0.3) & ((z < 0.06) | (z > 0.08)))).any():
            return data
    raise RuntimeError("100 episodes in a row lost the cube from view")


@functools.cache
def oracle_env(name):
    """The environment in data collection mode and its oracle for each kind of task."""
    _, gymnasium = import_ogbench()
    from ogbench.manipspace.oracles.plan import button_plan, cube_plan, drawer_plan, window_plan

    env = gymnasium.make(name, mode="data_collection", terminate_at_goal=False,
                         max_episode_steps=EPISODE_STEPS)
    noise = {"env": env, "noise": 0.1, "noise_smoothing": 0.5}
    oracles = {
        "cube": cube_plan.CubePlanOracle(**noise),
        "button": button_plan.ButtonPlanOracle(gripper_always_closed="puzzle" in name, **noise),
        "drawer": drawer_plan.DrawerPlanOracle(**noise),
        "window": window_plan.WindowPlanOracle(**noise),
    }
    return env, oracles


def run_oracle(name, seed_sequence):
    """One episode; the oracles draw from NumPy's global stream, so that is seeded too."""
    env, oracles = oracle_env(name)
    env_seed, np_seed = map(int, seed_sequence.generate_state(2))
    np.random.seed(np_seed)
    observation, info = env.reset(seed=env_seed)
    # How often cubes are stacked varies by episode and with the number of cubes.
    low, high = {"single": (0, 0), "double": (0, 0.25), "triple": (0.05, 0.35),
                 "quadruple": (0.1, 0.5), "octuple": (0, 0.35)}.get(name.split("-")[1], (0.5, 0.5))
    stacking = np.random.uniform(low, high)
    oracle = oracles[info["privileged/target_task"]]
    oracle.reset(observation, info)
    steps, done = collections.defaultdict(list), False
    while not done:
        action = np.clip(oracle.select_action(observation, info), -1, 1)
        following, _, terminated, truncated, info = env.step(action)
        done = terminated or truncated
        row = {"observations": observation, "actions": action, "terminals": done}
        row.update({key: info["prev_" + key] for key in INFO_KEYS if "prev_" + key in info})
        for key, value in row.items():
            steps[key].append(value)
        if oracle.done:
            new_observation, new_info = env.unwrapped.set_new_target(p_stack=stacking)
            oracle = oracles[new_info["privileged/target_task"]]
            oracle.reset(new_observation, new_info)
        observation = following
    dtypes = {"terminals": bool, "button_states": np.int64}
    return {key: np.array(values, dtypes.get(key, np.float32)) for key, values in steps.items()}


def start_worker():
    """A worker leaves interrupts to its parent, and ends when the parent does, however it does."""
    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=follow, daemon=True).start()


def collect_to(path, *episode):
    """Collect an episode into a file of its own, unless an earlier collection already did."""
    if not path.exists():
        arrays = collect_episode(*episode)
        with atomic_write(path) as file:
            np.savez(file, **arrays)


def collect(path, name, episodes, workers=None, seed=0):
    """Collect `episodes` training and a tenth as many validation episodes of environment `name`
    into `path` and its '-val' sibling, over all cores; the same data for any `workers`. Episodes
    wait in a folder beside them, so that an interrupted collection goes on where it was."""
    parts = path.with_name(f".{path.stem}-episodes")
    with lock(parts, wait=True):  # a second process would collect the same
        if not (path.exists() and validation_file(path).exists()):
            collect_parts(parts, path, name, episodes, workers, seed)
        shutil.rmtree(parts, ignore_errors=True)  # gone already if another process was first


def collect_parts(parts, path, name, episodes, workers, seed):
    """The work of `collect`, of which `parts` keeps the episodes that are done."""
    counts = {"-val": max(1, episodes // 10), "": episodes}
    files = {suffix: [parts / f"{seed}{suffix}-{i}.npz" for i in range(n)]
             for suffix, n in counts.items()}
    jobs = [(file, name, seed, split, i) for split, group in enumerate(files.values())
            for i, file in enumerate(group)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = min(workers or cores, len(jobs))
    # Fresh interpreters: a fork of a process that has run torch's threads may hang.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, start_worker) as pool:
        done = [pool.submit(collect_to, *job) for job in jobs]
        try:
            for future in tqdm(done, f"collecting {name}", unit="episode"):
                future.result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise MacError("a process of the collection was killed, perhaps for want of memory: "
                           "the same command goes on with what it has") from error
        except BaseException:  # leaving the pool would wait for the episodes already begun
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise
    for target, group in zip((validation_file(path), path), files.values()):
        data = [read_arrays(file) for file in group]
        arrays = {key: np.concatenate([episode[key] for episode in data]) for key in data[0]}
        with atomic_write(target) as file:
            np.savez_compressed(file, **arrays)


def read_arrays(path):
    try:
        with np.load(path) as file:
            return dict(file)
    except (*DAMAGE, ValueError) as error:
        path.unlink(missing_ok=True)
        raise MacError(f"{path} was damaged and is deleted: run the same command again") from error


# ---------------------------------------------------------------------------- data: files
# find_data -> load_data -> to_tensors -> make_dataset: a path, arrays, tensors, chunks.


# What reading a damaged .npz raises: its zip checksums are verified while it is read.
DAMAGE = (OSError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError)


def find_data(config, obtain=True):
    """The path of the training file (its sibling '-val.npz' is validation): the collected one if
    --collect asks for it, else OGBench's, which is downloaded or, failing that, collected too;
    then `config.collect` becomes what was collected, so that --resume finds it again. Without
    `obtain` only what is in the folder already.
    -> path, one line that says where the data came from. Raises MacError."""
    folder = pathlib.Path(config.dataset_dir).expanduser()
    environment, name = split_id(config.env)
    official = folder / f"{name}.npz"
    validation = validation_file(official)
    if obtain:
        make_folder(folder)
    if not config.collect:
        there = [file.exists() for file in (official, validation)]
        try:
            if obtain and not all(there):
                download(name, folder)
            return official, f"OGBench's file {official.name}"
        except (*DAMAGE, http.client.HTTPException, MacError) as error:
            reason = f"the download of {name} failed: {error}"
            if any(there):
                raise MacError(f"{reason}; {folder} holds only one of {official.name} and "
                               f"{validation.name}: put the other beside it") from error
            if not is_scripted(config.env):
                raise MacError(f"{reason}; there is no scripted policy to collect it with: put "
                               f"{official.name} and {validation.name} into {folder}") from error
        config.collect = COLLECTED_EPISODES
        print(f"WARNING: {reason}\nWARNING: using {config.collect} episodes collected with "
              "OGBench's scripted policies instead (--collect N for another number)", flush=True)
    collected = folder / f"{name}-collected{config.collect}.npz"
    if obtain and not (collected.exists() and validation_file(collected).exists()):
        collect(collected, environment, config.collect)
    return collected, (f"{config.collect} episodes collected with OGBench's scripted policies "
                       f"({collected.name})")


def validation_file(path):
    """OGBench's name of the file of validation episodes beside a training file."""
    return path.with_name(path.name.replace(".npz", "-val.npz"))


def download(name, folder):
    """OGBench's own download, into a temporary folder: it renames a short file without
    complaint, so only a file whose zip checksums hold gets its final name."""
    ogbench, _ = import_ogbench()
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(30)  # seconds without a byte
        try:
            ogbench.download_datasets([name], temporary)
        finally:
            socket.setdefaulttimeout(timeout)
        training = pathlib.Path(temporary) / f"{name}.npz"
        files = (validation_file(training), training)
        for file in files:
            with zipfile.ZipFile(file) as archive:
                if archive.testzip():
                    raise MacError(f"{file.name} arrived damaged")
        for file in files:
            if not (folder / file.name).exists():  # what is there stays
                os.replace(file, folder / file.name)


def available_memory():
    """Bytes this machine can still give, or None where it does not say."""
    try:
        with open("/proc/meminfo") as file:
            return next(int(x.split()[1]) * 1024 for x in file if x.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def check_memory(paths):
    """Raise MacError if the arrays of these .npz files will not fit in memory."""
    size = 0
    for path in paths:
        with contextlib.suppress(*DAMAGE), zipfile.ZipFile(path) as archive:
            size += sum(item.file_size for item in archive.infolist())
    needed, available = 2 * size, available_memory()  # the arrays as read, and normalised
    if available is not None and needed > available:
        raise MacError(f"{paths[0].name} needs about {needed / 1e9:.1f} GB of memory and "
                       f"{available / 1e9:.1f} GB are free: use a smaller dataset (--collect N)")


def check_file(path, widths, chunk):
    """Raise MacError, naming the file, key and index, unless it is undamaged and holds what OGBench
    writes: arrays of these `widths` ({key: columns, or None for a vector}; observations come
    first) and a trajectory longer than `chunk`."""
    try:
        with np.load(path) as file:
            missing = [key for key in widths if key not in file]
            if missing:
                raise MacError(f"{path}: has no array {missing[0]!r}")
            rows = None
            for key in sorted(file, key=(*widths, *file).index):  # the others, to verify them
                try:
                    array = file[key]
                except ValueError as error:  # an array of Python objects, or a broken header
                    raise MacError(f"{path}: {key} cannot be read: {error}") from error
                rows = len(array) if rows is None and array.ndim else rows
                wrong = key in widths and find_fault(key, array, rows, widths[key], chunk)
                if wrong:
                    raise MacError(f"{path}: {wrong}")
    except FileNotFoundError as error:
        raise MacError(f"{path} is not there: put it there, or set --dataset-dir") from error
    except (*DAMAGE, ValueError) as error:
        raise MacError(f"{path} is damaged ({error}): delete it and run again") from error


def find_fault(key, array, rows, width, chunk):
    """What is wrong with an array of a data file, or None."""
    if array.dtype.kind not in "fiub":
        return f"{key} holds {array.dtype}, not numbers"
    if array.ndim != (2 if width else 1):
        return f"{key} has shape {array.shape}"
    if len(array) != rows:
        return f"{key} has {len(array)} rows where observations has {rows}"
    if width and array.shape[1] != width:
        return f"{key} has {array.shape[1]} columns; this environment's has {width}"
    # Reductions without temporaries of the array's size; an index only for the message.
    if array.dtype.kind == "f" and not np.isfinite(array.sum(dtype=np.float64)):
        bad = np.argwhere(~np.isfinite(array))
        if len(bad):
            return f"{key}{bad[0].tolist()} is {array[tuple(bad[0])]}"
    if key == "actions" and rows and max(array.max(), -array.min()) > 1.1:
        bad = np.argwhere(np.abs(array) > 1.1)[0]
        return f"actions{bad.tolist()} is {array[tuple(bad)]}, outside [-1, 1]"
    if key == "terminals":
        if not rows or not array[-1]:
            return f"terminals[{rows - 1}] is not set: the last trajectory is cut off"
        if np.diff(np.flatnonzero(array), prepend=-1).max() <= chunk:
            return f"no trajectory is longer than a chunk ({chunk} actions)"
    return None


def load_data(config, path, env):
    """The checked file and its validation sibling as OGBench loads them (rewards relabelled,
    oracle goals added). -> two dicts of arrays"""
    ogbench, _ = import_ogbench()
    paths = [path, validation_file(path)]
    base = env.unwrapped
    observation_size, action_size = env_sizes(env)
    widths = {"observations": observation_size, "actions": action_size, "terminals": None}
    if "singletask" in config.env or "oraclerep" in config.env:  # made from the simulator's state
        widths["qpos"] = base.model.nq
        if hasattr(base, "_cur_button_states"):
            widths["button_states"] = len(base._cur_button_states)
    check_memory(paths)
    for item in paths:
        check_file(item, widths, config.chunk)
    return ogbench.make_env_and_datasets(config.env, dataset_path=str(path), compact_dataset=True,
                                         dataset_only=True, cur_env=env)


def env_sizes(env):
    """O and A of an environment."""
    return env.observation_space.shape[0], env.action_space.shape[0]


def to_tensors(data, env_id):
    """OGBench's dict -> observations (T, O), goals (T, G), actions (T, A), rewards (T,) and
    last (T,), not yet normalised, on the host. The three id families differ here alone."""
    observations = torch.from_numpy(data["observations"])
    if "singletask" in env_id:
        goals = torch.zeros(len(observations), 0)
    elif "oraclerep" in env_id:
        goals = torch.from_numpy(data["oracle_reps"])
    else:
        goals = observations
    ends = np.flatnonzero(data["valids"] == 0)  # each trajectory's last state
    last = torch.from_numpy(ends[np.searchsorted(ends, np.arange(len(observations)))])
    rewards = torch.from_numpy(data.get("rewards", np.zeros(len(observations), np.float32)))
    return observations, goals, torch.from_numpy(data["actions"]), rewards, last


def make_dataset(agent, tensors, device):
    """The chunk dataset of `tensors` (from `to_tensors`), normalised by the agent (still on the
    host), on `device`, or on the host if it would fill over half of the device's memory."""
    observations, goals, actions, rewards, last = tensors
    whole = goals is observations  # then one array serves as both
    observations = agent.normalize_observation(observations)
    goals = observations if whole else agent.normalize_goal(goals)
    if device.type == "cuda":
        # A set, since observations and goals may be one tensor.
        size = sum(t.nbytes for t in {observations, goals, actions, rewards, last})
        if size > torch.cuda.mem_get_info(device)[1] / 2:
            print(f"the dataset ({size / 1e9:.1f} GB) stays in host memory", flush=True)
            device = torch.device("cpu")
    observations = observations.to(device)
    goals = observations if whole else goals.to(device)
    return ChunkDataset(observations, goals, actions.to(device), rewards.to(device),
                        last.to(device), agent.config)


# ---------------------------------------------------------------------------- evaluation


class Evaluator:
    """Plays episodes of an environment's tasks; environments are built once (a second each).

    Args: env_id: an OGBench id; environments: how many are stepped side by side.
    """

    def __init__(self, env_id, environments=5):
        self.env_id = env_id
        self.envs = [make_env(env_id)]
        self.environments = environments
        base = self.envs[0].unwrapped
        fixed = is_fixed(self.envs[0])
        self.tasks = [base._reward_task_id] if fixed else list(range(1, base.num_tasks + 1))

    def play(self, agent, episodes, seed=0, execute=None, candidates=None,
             on_step=lambda episode: None, stop=lambda: False):
        """Run `episodes` episodes of every task, each a function of (seed, task, episode) and
        the agent's noise (teleporting mazes excepted: they draw from NumPy's global stream).
        All environments that need a chunk share one policy call; MuJoCo lets go of the
        interpreter, so threads step them in parallel. `on_step` sees each Episode after each of
        its steps.

        Returns: {task: list of (success, return, length)}, or None if `stop()` turned true.
        """
        execute = min(execute or agent.config.execute, agent.config.chunk)
        jobs = collections.deque((t, e) for t in self.tasks for e in range(episodes))
        while len(self.envs) < min(self.environments, len(jobs)):
            self.envs.append(make_env(self.env_id))
        device = agent.normalize_observation.middle.device
        generator = torch.Generator(device).manual_seed(seed)
        results = {task: [] for task in self.tasks}
        active = [Episode(env, *jobs.popleft(), seed) for env in self.envs if jobs]
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
            while active and not stop():
                idle = [episode for episode in active if not episode.plan]
                if idle:
                    chunks = agent.act(np.stack([e.observation for e in idle]),
                                       np.stack([e.goal for e in idle]), candidates, generator)
                    for episode, chunk in zip(idle, chunks):
                        episode.plan = list(chunk[:execute])
                list(threads.map(Episode.step, active))
                for i, episode in enumerate(active):
                    on_step(episode)
                    if episode.done:
                        results[episode.task].append(
                            (episode.success, episode.reward, episode.length))
                        active[i] = Episode(episode.env, *jobs.popleft(), seed) if jobs else None
                active = [episode for episode in active if episode]
        return None if active else results


class Episode:
    """An episode under way and the actions still to be executed of its current chunk."""

    def __init__(self, env, task, number, seed):
        self.env, self.task, self.number = env, task, number
        self.plan, self.reward, self.length = [], 0.0, 0
        self.success = self.done = False
        state = np.random.SeedSequence((seed, task, number)).generate_state(1)
        self.observation, self.goal = reset(env, task, int(state[0]))

    def step(self):
        action = self.plan.pop(0)
        self.observation, reward, terminated, truncated, info = self.env.step(action)
        self.reward += float(reward)
        self.length += 1
        self.success = self.success or bool(info["success"])
        self.done = terminated or truncated


def summarize(results):
    """{task: list of (success, return, length)} -> {"task1": {"success", "stderr", "return",
    "length", "episodes"}, ..., "overall": ...}; the standard error is binomial."""
    rows = {f"task{task}": episodes for task, episodes in results.items()}
    rows["overall"] = [episode for episodes in results.values() for episode in episodes]
    table = {}
    for name, episodes in rows.items():
        success, total, length = np.mean(episodes, 0).tolist()
        stderr = math.sqrt(success * (1 - success) / len(episodes))
        table[name] = {"success": success, "stderr": stderr, "return": total, "length": length,
                       "episodes": len(episodes)}
    return table


# ---------------------------------------------------------------------------- nothing lost
# Files are replaced whole or not at all, and a checkpoint proves that it is undamaged.


@contextlib.contextmanager
def atomic_write(path, keep=None):
    """A binary file that becomes `path` only when it is complete and on the disk; what was at
    `path` is first renamed to `keep`, if that is given."""
    path = pathlib.Path(path).resolve()  # through a link: the link stays
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # some systems cannot sync a folder
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except OSError as error:
        raise MacError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(path):
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MacError(f"cannot create the folder {path}: {error.strerror}") from error


def write_json(path, value):
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


def save_checkpoint(folder, state):
    """Write folder/checkpoint.pt: torch.save's bytes and their SHA-256. The one that was there
    becomes checkpoint-previous.pt; whenever this is cut short, one of the two is whole."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with atomic_write(folder / "checkpoint.pt", folder / "checkpoint-previous.pt") as file:
        file.write(buffer.getbuffer())
        file.write(hashlib.sha256(buffer.getbuffer()).digest())


def load_checkpoint(folder, device="cpu"):
    """The newest checkpoint of a run folder. Raises MacError if there is none, or if it is
    damaged; code in it is never run (`weights_only`)."""
    path, previous = folder / "checkpoint.pt", folder / "checkpoint-previous.pt"
    if not path.exists() and previous.exists():
        path = previous  # a save was cut short between its two renames
    try:
        data = path.read_bytes()
    except OSError as error:
        raise MacError(f"cannot read {path}: {error.strerror}") from error
    if hashlib.sha256(data[:-32]).digest() != data[-32:]:
        advice = "there is no earlier one; train anew in another --save-dir"
        if path != previous and previous.exists():
            advice = f"delete it to go on from {previous.name}"
        raise MacError(f"{path} is damaged: {advice}")
    try:
        return torch.load(io.BytesIO(data[:-32]), device, weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is not a checkpoint
        raise MacError(f"{path} is not a checkpoint of this program") from error


def load(run, device="cpu"):
    """The trained agent of a run folder, for use outside these scripts:
    `mac.load("exp/...").act(observation, goal)`. Its `step` and `data_source` (a line that says
    where the data came from) tell what it is. Raises MacError."""
    checkpoint = load_checkpoint(pathlib.Path(run), device)
    with must_fit(run):
        agent = Agent(*checkpoint["sizes"], Config(**checkpoint["config"])).to(device)
        agent.load_state_dict(checkpoint["agent"])
        agent.step, agent.data_source = checkpoint["step"], checkpoint["data"]
    return agent.eval()


@contextlib.contextmanager
def must_fit(run):
    """Raises MacError where a checkpoint does not hold what is read from it."""
    try:
        yield
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        first = " ".join(str(error).splitlines()[:2])  # of a line per parameter
        raise MacError(f"the checkpoint in {run} is of other settings or of another version of "
                       f"this program ({type(error).__name__}: {first})") from error


def lock(folder, wait=False):
    """Make the folder and hold it for this process; refuse or wait while another one does."""
    make_folder(folder)
    try:
        file = open(folder / ".lock", "w")
    except OSError as error:
        raise MacError(f"cannot write in {folder}: {error.strerror}") from error
    if fcntl:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MacError(f"another process is training in {folder}") from None
        except OSError:
            pass  # a file system without locks
    for leftover in folder.glob(".*.tmp"):  # of a save that was killed
        leftover.unlink()
    return file


class Log:
    """A CSV file that can be continued: rows after `step` and a torn last line are dropped."""

    def __init__(self, path, step):
        self.path, self.fields = path, None
        if path.exists():
            lines = path.read_text(errors="replace").splitlines(keepends=True)
            kept = [line for line in lines[1:] if line.endswith("\n")
                    and line.split(",")[0].isdigit() and int(line.split(",")[0]) <= step]
            if lines and lines[0].endswith("\n"):
                self.fields = lines[0].strip().split(",")
                if self.fields[0] != "step":
                    raise MacError(f"{path} is damaged: move it away, the run goes on without it")
            with atomic_write(path) as file:
                file.write("".join(lines[:1] + kept if self.fields else []).encode())

    def write(self, rows):
        try:
            with open(self.path, "a", newline="") as file:
                writer = csv.DictWriter(file, self.fields or list(rows[0]), lineterminator="\n")
                if not self.fields:
                    writer.writeheader()
                    self.fields = writer.fieldnames
                writer.writerows(rows)
        except OSError as error:
            raise MacError(f"cannot write {self.path}: {error.strerror}") from error

    def has(self, step):
        """Whether it holds rows of this step."""
        if not self.path.exists():
            return False
        with open(self.path, newline="") as file:
            return any(int(row["step"]) == step for row in csv.DictReader(file))


class Stop:
    """While open, SIGINT and SIGTERM ask for a stop (`stop()` turns true); a second one ends the
    process at once."""

    def __enter__(self):
        self.signal = None
        self.before = {number: signal.signal(number, self.handle)
                       for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number, frame):
        self.signal = number
        for other in self.before:
            signal.signal(other, signal.SIG_DFL)
        os.write(2, b"\nstopping after this step; once more to quit at once\n")  # reentrant

    def __call__(self):
        return self.signal is not None


# ---------------------------------------------------------------------------- speed


# oneDNN's product with an activation, as PyTorch's own compiler uses it: FUSED(x, weight, bias,
# activation, its scalars, its variant). Tried on x86 alone, so None elsewhere.
FUSED = None
if torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64"):
    FUSED = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def run_hidden(layers, x):
    """The hidden layers of an MLP. Without gradient on a CPU, oneDNN applies GELU to each tile of
    a product while it is in the cache, where PyTorch's own tanh GELU is a slow second pass."""
    if (FUSED is None or torch.is_grad_enabled() or x.is_cuda
            or not isinstance(layers[1], nn.GELU)):  # changed by a reader
        return layers(x)
    dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else x.dtype
    x = x.to(dtype)
    layer = iter(layers)
    for linear, gelu, norm in zip(layer, layer, layer):  # three at a time; slices build modules
        x = FUSED(x, linear.weight.to(dtype), linear.bias.to(dtype), "gelu", [], gelu.approximate)
        x = F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    return x


def make_optimizer(agent):
    """One Adam for all networks. The step size is a tensor, so that a CUDA graph sees it change."""
    parameters = [p for p in agent.parameters() if p.requires_grad]
    cuda = parameters[0].is_cuda
    rate = torch.tensor(agent.config.learning_rate, device=parameters[0].device)
    return torch.optim.Adam(parameters, rate, fused=True, capturable=cuda)


def make_step(agent, optimizer, dataset, data_generator, noise_generator, warmup=False):
    """A function of no arguments that draws a batch, does one update and returns its losses."""
    config, device = agent.config, agent.normalize_observation.middle.device

    def sample():
        return dataset.sample(config.batch_size, data_generator).to(device)

    def step():
        return update(agent, optimizer, sample(), noise_generator, warmup)

    if device.type != "cuda":
        return step
    if dataset.starts.device == device:
        return capture(step, agent, optimizer, (data_generator, noise_generator))
    # The data stay on the host: only the update is a graph, which reads a batch at a fixed place.
    static = dataset.sample(config.batch_size, torch.Generator()).to(device)  # any batch
    graph = capture(lambda: update(agent, optimizer, static, noise_generator, warmup), agent,
                    optimizer, (noise_generator,))

    def copy_and_replay():
        torch._foreach_copy_(list(static), list(sample()))
        return graph()
    return copy_and_replay


def capture(step, agent, optimizer, generators):
    """`step` as one CUDA graph: its hundreds of small kernels are launched by a single call.
    The trial updates that PyTorch wants before a capture are undone, in place since the graph
    knows addresses, so that the graph starts where the eager step would."""
    saved = copy.deepcopy((agent.state_dict(), optimizer.state_dict()))
    states = [generator.get_state() for generator in generators]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        result = step()
    with torch.no_grad():
        agent.load_state_dict(saved[0])
        for index, state in optimizer.state_dict()["state"].items():
            for name, tensor in state.items():
                before = saved[1]["state"].get(index, {}).get(name)
                tensor.zero_() if before is None else tensor.copy_(before)
    for generator, state in zip(generators, states):
        generator.set_state(state)

    def replay():
        graph.replay()
        return result
    replay.alive = step  # and with it the tensors whose addresses the graph knows
    return replay


def benchmark(config, updates):
    """Time `updates` updates, such as follow a warmup, on random data of the environment's shape.
    -> dict, for one line of JSON; the peak is that of a large fp32 (on a GPU: TF32) matrix product
    in the same process (`precision` lowers a part of the update only, so with bfloat16 the ratio
    may pass 1)."""
    from torch.utils.flop_counter import FlopCounterMode

    env = make_env(config.env)
    observation, action = env_sizes(env)
    goal = len(reset(env, 1, 0)[1])
    device = set_up_device(config.device)
    torch.manual_seed(config.seed)
    agent = Agent(observation, goal, action, config)
    states = torch.arange(20 * EPISODE_STEPS)
    tensors = (torch.randn(len(states), observation), torch.randn(len(states), goal),
               torch.rand(len(states), action) * 2 - 1, -torch.ones(len(states)),
               (states // EPISODE_STEPS + 1) * EPISODE_STEPS - 1)
    dataset = make_dataset(agent, tensors, device)
    agent.to(device)
    generators = make_generators(0, dataset.starts.device, device)

    def fused_flops(x, weight, *_, **__):  # the counter does not know oneDNN's fused product
        return 2 * math.prod(x) * weight[0]

    custom = {FUSED: fused_flops} if FUSED else None
    with FlopCounterMode(display=False, custom_mapping=custom) as counter:
        batch = dataset.sample(config.batch_size, generators[0]).to(device)
        update(agent, make_optimizer(agent), batch, generators[1])
    flops = counter.get_total_flops()
    step = make_step(agent, make_optimizer(agent), dataset, *generators)
    times = timed(step, updates, device)
    memory = peak_memory(device)
    size = 8192 if device.type == "cuda" else 2048
    square = torch.randn(size, size, device=device)
    peak = 2 * size ** 3 / min(timed(lambda: square @ square, 40, device))
    achieved = flops / statistics.median(times)
    return {"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "precision": config.precision, "threads": torch.get_num_threads(), "updates": updates,
            "ms_median": 1e3 * statistics.median(times), "ms_min": 1e3 * min(times),
            "ms_max": 1e3 * max(times), "gflop_per_update": flops / 1e9,
            "gflops": achieved / 1e9, "peak_gflops": peak / 1e9,
            "fraction_of_peak": achieved / peak, "peak_memory_mb": memory / 1e6}


def timed(function, times, device):
    """Seconds of each of `times` calls, after 3 that are not counted."""
    result = []
    for i in range(3 + times):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        result.append(time.perf_counter() - start)
    return result[3:]


def peak_memory(device):
    """Bytes: the device's allocator's peak, on a CPU that of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# ---------------------------------------------------------------------------- training loop


def set_up_device(name):
    """The device to train on, with fast fp32 matrix products switched on: TF32 on a GPU; on a CPU
    oneDNN's, unless it would round to bfloat16 there (some CPUs do, so it is tried)."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    elif name == "cuda" and not torch.cuda.is_available():
        raise MacError("--device cuda: PyTorch sees no GPU here; use --device cpu")
    torch.set_float32_matmul_precision("high" if name == "cuda" else "medium")
    if name == "cpu":
        x = torch.rand(256, 256, generator=torch.Generator().manual_seed(0))
        if ((x @ x).double() / (x.double() @ x.double()) - 1).abs().max() > 1e-5:
            torch.set_float32_matmul_precision("highest")
    return torch.device(name)


def make_generators(seed, *devices):
    """One generator per device given, their streams independent of each other. Batches, training
    noise and validation have one each, as has an evaluation, so that how often one logs or
    evaluates does not change what is learned."""
    seeds = np.random.SeedSequence(seed).generate_state(len(devices))
    return [torch.Generator(d).manual_seed(int(s)) for d, s in zip(devices, seeds)]


class Run:
    """A training run: the networks, their files and what is done between updates."""

    def __init__(self, config, folder, agent, dataset, validation, evaluator, stop):
        self.config, self.folder, self.agent, self.stop = config, folder, agent, stop
        self.validation, self.evaluator = validation, evaluator
        self.device = agent.normalize_observation.middle.device
        self.optimizer = make_optimizer(agent)
        self.generators = make_generators(config.seed, dataset.starts.device, self.device)
        self.warmup_steps = int(config.warmup * config.steps)
        self.step, self.saved, self.status = 0, 0, {}

    def restore(self):
        """Continue from the folder's checkpoint, if it got as far as having one."""
        if not any(self.folder.glob("checkpoint*.pt")):
            return
        state = load_checkpoint(self.folder, self.device)
        for name, fitted in self.agent.state_dict().items():
            if name.startswith("normalize") and not torch.equal(fitted, state["agent"][name]):
                raise MacError(f"the data are not those that {self.folder} was trained on: check "
                               "--dataset-dir")
        if state["step"] > self.config.steps:
            raise MacError(f"--steps {self.config.steps}: {self.folder} is at step {state['step']}")
        self.step = self.saved = state["step"]
        # More --steps do not make a warmup longer; the first checkpoints did not hold its length.
        self.warmup_steps = state.get("warmup_steps", self.warmup_steps)
        print(f"resuming at step {self.step} of {self.config.steps}", flush=True)
        self.agent.load_state_dict(state["agent"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.optimizer.param_groups[0]["capturable"] = self.device.type == "cuda"
        devices = [generator.device for generator in self.generators]
        others = make_generators((self.config.seed, self.step), *devices)
        for generator, fresh, saved in zip(self.generators, others, state["generators"]):
            if len(saved) == len(generator.get_state()):
                generator.set_state(saved.cpu())
            else:
                print("another device than before: a random stream starts anew", flush=True)
                generator.set_state(fresh.get_state())

    def open_logs(self):
        self.train_log = Log(self.folder / "train.csv", self.step)
        self.eval_log = Log(self.folder / "eval.csv", self.step)

    def due(self, interval):
        return interval and (self.step % interval == 0 or self.step == self.config.steps)

    def evaluation_due(self):
        """Not in the warmup: there is nothing to evaluate yet."""
        return self.step > self.warmup_steps and self.due(self.config.eval_interval)

    def after_update(self, losses):
        """Log, save and evaluate, each if its time has come."""
        self.step += 1
        if self.due(self.config.log_interval):
            self.log(losses)
        if self.due(self.config.save_interval):
            self.save(losses)
        if self.evaluation_due():
            self.evaluate()

    def log(self, losses):
        """A row of train.csv: this step's losses and those of a fixed validation batch."""
        now = self.check_finite(losses)
        generators = make_generators(0, self.validation.starts.device, self.device)
        batch = self.validation.sample(self.config.batch_size, generators[0]).to(self.device)
        with torch.no_grad():
            validation, _ = self.agent.losses(batch, generators[1])
        row = {name: now.get(name, "") for name in (*validation, "rollout_reward")}
        row.update({f"val_{name}": value.item() for name, value in validation.items()})
        self.train_log.write([{"step": self.step, **row}])
        self.status.update({name: f"{now[name]:.3g}" for name in ("dynamics", "value", "critic")
                            if name in now})

    def check_finite(self, losses):
        """The losses as numbers. Raises Diverged if one of them or a parameter is not finite."""
        row = {name: value.item() for name, value in losses.items()}
        bad = [name for name, value in row.items() if not math.isfinite(value)]
        bad += [f"parameter {name}" for name, parameter in self.agent.named_parameters()
                if not parameter.isfinite().all()]
        if bad:
            kept = f"the checkpoint of step {self.saved} is kept" if self.saved else "nothing saved"
            raise Diverged(f"{bad[0]} is not finite at step {self.step}: training stopped, {kept}; "
                           "try a smaller --learning-rate in a new --save-dir")
        return row

    def evaluate(self):
        """Rows of eval.csv: every task and overall."""
        results = self.evaluator.play(self.agent, self.config.eval_episodes, self.config.seed,
                                      stop=self.stop)
        if results is None:
            return  # stopped on the way; --resume begins with this evaluation
        table = summarize(results)
        self.eval_log.write([{"step": self.step, "task": name, **row}
                             for name, row in table.items()])
        overall = table["overall"]
        self.status["success"] = f"{overall['success']:.0%}"
        tqdm.write(f"step {self.step}: success {overall['success']:.0%} ± {overall['stderr']:.0%} "
                   f"({overall['episodes']} episodes, {self.config.execute} of each chunk "
                   f"executed, N = {self.config.eval_candidates})")

    def save(self, losses):
        self.check_finite(losses)
        save_checkpoint(self.folder, {
            "step": self.step, "warmup_steps": self.warmup_steps, "sizes": self.agent.sizes,
            "data": self.agent.data_source, "config": dataclasses.asdict(self.config),
            "agent": self.agent.state_dict(), "optimizer": self.optimizer.state_dict(),
            "generators": [generator.get_state() for generator in self.generators]})
        self.saved = self.step

    def final_table(self, episodes=50):
        """MAC beside cloning (one candidate of the same networks), both ways to execute."""
        each = max(1, episodes // len(self.evaluator.tasks))
        name = "MAC" if self.config.policy == "flow" else self.config.policy
        for candidates, label in ((self.config.eval_candidates, name), (1, "cloning")):
            if label == "cloning" and (self.config.eval_candidates == 1 or name == "fql"):
                return  # it is the row above, or not cloning
            for execute in sorted({self.config.chunk, 1}, reverse=True):
                results = self.evaluator.play(self.agent, each, 1 + self.config.seed, execute,
                                              candidates, stop=self.stop)
                if results is None:
                    return
                row = summarize(results)["overall"]
                print(f"{label:8} N = {candidates:2}, {execute:2} of each chunk executed: "
                      f"success {row['success']:4.0%} ± {row['stderr']:3.0%} "
                      f"({row['episodes']} episodes)", flush=True)


def prepare(config, device, env):
    """The data, found, checked, loaded and normalised. -> agent on `device`, training and
    validation dataset. Raises MacError."""
    path, source = find_data(config)
    print(f"data: {source}", flush=True)
    data, validation = (to_tensors(d, config.env) for d in load_data(config, path, env))
    torch.manual_seed(config.seed)
    observations, goals, actions = data[:3]
    agent = Agent(observations.shape[1], goals.shape[1], actions.shape[1], config)
    agent.data_source = source
    agent.normalize_observation.fit(observations)
    agent.normalize_goal.fit(goals)
    datasets = [make_dataset(agent, t, device) for t in (data, validation)]
    return agent.to(device), *datasets


def train(config, folder, resume):
    """Train in `folder` until `config.steps`, a signal or an error. -> exit status"""
    device = set_up_device(config.device)
    evaluator = Evaluator(config.env)
    agent, dataset, validation = prepare(config, device, evaluator.envs[0])
    with Stop() as stop:
        run = Run(config, folder, agent, dataset, validation, evaluator, stop)
        if resume:
            with must_fit(folder):
                run.restore()
        run.open_logs()
        settings = {**dataclasses.asdict(config), "data": agent.data_source}
        write_json(folder / "config.json", settings)
        if run.step and run.evaluation_due() and not run.eval_log.has(run.step):
            run.evaluate()  # it was interrupted
        rate = run.optimizer.param_groups[0]["lr"]
        with tqdm(total=config.steps, initial=run.step, desc=config.env, smoothing=0.05) as bar:
            phase = None
            while run.step < config.steps and not stop():
                warmup = run.step < run.warmup_steps
                if warmup != phase:
                    phase = warmup
                    step = make_step(agent, run.optimizer, dataset, *run.generators, warmup)
                if config.decay:
                    left = (config.steps - run.step) / (config.steps - run.warmup_steps)
                    rate.fill_(config.learning_rate * min(1, left))
                losses = step()
                run.after_update(losses)
                bar.set_postfix(run.status, refresh=False)
                bar.update()
        if run.step > run.saved:
            run.save(losses)
        if config.small and config.eval_interval and not stop():
            print("playing the episodes of the final table", flush=True)
            run.final_table()
        if stop():
            rest = "goes on" if run.step < config.steps else "makes the table"
            print(f"stopped at step {run.step}; the same command with --resume {rest}")
            return 128 + stop.signal
    print(f"trained {run.step} steps; now: python eval.py {folder}")
    return 0


# ---------------------------------------------------------------------------- command line


def preset(env, small):
    """The settings that depend on the environment (Tables 6-8) or on --small."""
    family = env.split("-")[0]
    settings = {}
    if "singletask" not in env:
        settings = {"batch_size": 1024, "width": 1024, "steps": 2_000_000}
    if "puzzle-4x5" in env:  # 20 ways to go on need more candidates, which a smaller net pays
        settings.update(candidates=32, width=256)
    if family == "puzzle":
        settings["actor_goals"] = (0.0, 0.5, 0.0, 0.5)
    elif family.endswith("maze") or family == "antsoccer":
        settings["actor_goals"] = (0.0, 0.0, 1.0, 0.0)
    if small:
        settings.update(SMALL)
        if not is_scripted(env):
            del settings["collect"]  # only OGBench's file will do
    return settings


# Found by measurement on two cores. The value function is learned in few steps, so it looks less
# far ahead and its target moves faster; until the models are good, rollouts would be wasted; and
# the distillation is still coarse at the end, so the flow itself proposes at test time.
SMALL = {"width": 256, "batch_size": 256, "rollout_batch_size": 64, "horizon": 5, "candidates": 4,
         "eval_candidates": 16, "flow_steps": 3, "eval_flow": True, "discount": 0.99,
         "ema_rate": 0.02, "learning_rate": 1e-3, "decay": True, "steps": 16_000, "warmup": 0.5,
         "collect": 100, "execute": 10, "log_interval": 250, "eval_interval": 2000,
         "eval_episodes": 20, "save_interval": 2000}
# What --resume may change. Of these the parameters at a given step depend only on `steps`, which
# sets the length of a decay, and on `device`, whose noise is another.
MAY_CHANGE = {"steps", "device", "log_interval", "eval_interval", "save_interval",
              "eval_episodes", "dataset_dir", "save_dir"}


class Parser(argparse.ArgumentParser):
    """Underscores in flags are as good as dashes; a mistake is a MacError, which is one line."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def parse_args(self, argv=None):
        argv = [re.sub("^--[^=]+", lambda flag: flag[0].replace("_", "-"), word)
                for word in (sys.argv[1:] if argv is None else argv)]
        given, unknown = self.parse_known_args(argv)
        if unknown:
            flags = re.findall(r"--[\w-]+", self.format_usage())
            near = difflib.get_close_matches(unknown[0], flags, 1)
            self.error(f"unknown argument {unknown[0]!r}; " + (
                f"the nearest flag is {near[0]}" if near else "--help lists the flags"))
        return given

    def error(self, message):
        raise MacError(message)


def number(kind, low, high=math.inf):
    """An argparse type: `kind` from `low` to `high`."""
    def convert(text):
        value = kind(text)
        if not (low <= value <= high and math.isfinite(value)):
            bounds = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text} is not {bounds}")
        return value
    convert.__name__ = kind.__name__  # argparse names it in its message
    return convert


def parse(argv):
    """-> the settings given as flags, --resume, --benchmark"""
    parser = Parser("mac.py", description="Train MAC: offline model-based RL with action chunks. "
                    "Defaults are the paper's for reward-based tasks; others follow from --env.")
    for field in dataclasses.fields(Config):
        rules, kind = dict(field.metadata), type(field.default)
        low, high = rules.pop("low", None), rules.pop("high", math.inf)
        if kind is bool:
            rules["action"] = argparse.BooleanOptionalAction  # --no-... undoes a preset's
        elif kind is tuple:
            rules.update(type=float, nargs=len(field.default), metavar="P")
        elif "choices" not in rules:
            rules.update(type=kind if low is None else number(kind, low, high), metavar="X")
        if field.default != "":
            rules["help"] += f" (default: {'off' if kind is bool else field.default})"
        parser.add_argument(f"--{field.name.replace('_', '-')}", default=argparse.SUPPRESS, **rules)
    parser.add_argument("--resume", action="store_true", help="continue the run of this folder")
    parser.add_argument("--benchmark", type=number(int, 1), metavar="K",
                        help="time K updates, print one line of JSON and exit")
    given = vars(parser.parse_args(argv))
    return given, given.pop("resume"), given.pop("benchmark")


def make_config(given):
    """The resolved configuration: defaults, then presets, then the flags given."""
    env = given.get("env", Config.env)
    check_id(env)
    settings = {**preset(env, given.get("small", False)), **given}
    policy = settings.get("policy", Config.policy)
    if policy == "fql":  # its one-step network is what climbs Q
        extract = {"candidates": 1, "eval_candidates": 1, "eval_flow": False,
                   "fql_alpha": 0.3 if "cube-double" in env else 1.0}  # Table 11
        settings.update({**extract, **given})
    flow, fixed = policy in ("flow", "fql"), "singletask" in env
    reads = {"fql_alpha": policy == "fql", "eval_flow": flow, "flow_steps": flow,
             "chunk_reward": fixed, "value_goals": not fixed, "actor_goals": not fixed}
    for name in (name for name, read in reads.items() if not read):
        if name in given:
            raise MacError(f"--{name.replace('_', '-')}: a run of {env} with --policy {policy} "
                           "does not use it; leave it out")
        settings.pop(name, None)  # a preset's
    config = Config(**settings)
    for key in ("value_goals", "actor_goals"):
        odds = getattr(config, key)
        if not (min(odds) >= 0 and abs(sum(odds) - 1) < 1e-6):
            raise MacError(f"--{key.replace('_', '-')}: {odds} are not four odds that add up to 1")
    if config.collect and not is_scripted(env):
        raise MacError(f"--collect: OGBench has no scripted policy for {env}; put the files of "
                       f"{split_id(env)[1]} into {config.dataset_dir} and leave --collect out")
    if given.get("rollout_batch_size", 0) > config.batch_size:
        raise MacError(f"--rollout-batch-size: a batch has {config.batch_size} states, not "
                       f"{config.rollout_batch_size}")
    if given.get("execute", 1) > config.chunk:
        raise MacError(f"--execute: chunks have {config.chunk} actions, not {config.execute}")
    config.rollout_batch_size = min(config.rollout_batch_size, config.batch_size)
    config.execute = min(config.execute, config.chunk)
    return config


def resumed(config, folder, given):
    """The saved configuration of a run with what may change taken from the flags given."""
    try:
        saved = json.loads((folder / "config.json").read_text())
        old = Config(**{f.name: saved.get(f.name, f.default) for f in dataclasses.fields(Config)})
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise MacError(f"{folder / 'config.json'} cannot be read ({error}): put it back, or begin "
                       "anew in another --save-dir") from error
    for name in given:
        before, now = getattr(old, name), getattr(config, name)
        if name in MAY_CHANGE:
            setattr(old, name, now)
        elif before != now:
            raise MacError(f"--{name.replace('_', '-')}: this run has {before}, not {now}; "
                           "leave the flag out or use another --save-dir")
    return old


def main(argv=None):
    try:
        given, resume, updates = parse(argv)
        config = make_config(given)
        if updates:
            print(json.dumps(benchmark(config, updates)))
            return 0
        folder = pathlib.Path(config.save_dir or f"exp/{config.env}-seed{config.seed}").expanduser()
        with lock(folder):
            exists = any(any(folder.glob(name)) for name in ("*.json", "*.csv", "checkpoint*.pt"))
            if exists and not resume:
                raise MacError(f"{folder} already holds a run: --resume continues it, --save-dir "
                               "or --seed starts another")
            if exists:
                config = resumed(config, folder, given)
            elif resume:
                print(f"{folder} holds no run to resume: starting one", flush=True)
            print(json.dumps(dataclasses.asdict(config), indent=2), flush=True)
            return train(config, folder, exists)
    except MacError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print("stopped before the first step; what was collected is kept", file=sys.stderr)
        return 130


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends a collection's workers, too
    sys.exit(main())

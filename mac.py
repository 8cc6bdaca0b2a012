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
A action, G goal (0 where the task is fixed), D = n A the flattened chunk; T dataset states,
K trajectories.

Where this file follows the authors' published code rather than the paper's text:
    - the noised chunk is (1-u) z + u a: Eq. 7 has the two swapped, its own text does not;
    - the dynamics network predicts the change of state;
    - in reward-based tasks a chunk's reward is the *mean* of its n discounted rewards, not the
      sum: V and Q are 1/n of the paper's, the arg max is the same (`--chunk-reward sum`);
    - losses are means over coordinates, where the paper writes sums;
    - at test time only the first action of a chunk is executed (`--execute`).
Where it differs from that code (README.md has the whole list): a chunk may start anywhere that
leaves n actions and a state (the published sampler drops some), and V is evaluated only where a
target needs it.
"""
from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import dataclasses
import hashlib
import io
import json
import math
import os
import pathlib
import resource
import signal
import statistics
import sys
import threading
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from eval import (Evaluator, MacError, Parser, command, find_world, home, lock, number, say,
                  summarize, validation_file, write)


# ============== Part I: the method. It computes on the tensors that it is handed. ==============
# -------------------------------------------------------------------------------- settings

POLICIES, AGENTS, OUTCOMES = {}, {}, {}  # what --policy and --outcome choose from; add yours


def setting(default, help, **rules):
    """A field of Config: its value where no preset has another, its flag's help and rules."""
    return dataclasses.field(default=None, metadata={"default": default, "help": help, **rules})


@dataclasses.dataclass
class Config:
    """Every setting. Defaults are the paper's for reward-based tasks (Tables 7 and 8); what is
    not given and follows from others (`presets`) is filled in when a Config is made."""

    env: str = setting("cube-double-play-v0", "OGBench dataset id")
    seed: int = setting(0, "seed of parameters, batches and noise", low=0, high=2 ** 32 - 1)
    steps: int = setting(1_000_000, "gradient steps; goal-conditioned 2M", low=1)
    device: str = setting("auto", "where to train", choices=("auto", "cpu", "cuda"))
    small: bool = setting(False, "laptop preset (SMALL in mac.py): collected data, minutes")
    # the method
    chunk: int = setting(10, "n: actions in a chunk", low=1)
    horizon: int = setting(10, "H: chunks in an imagined rollout", low=1)
    candidates: int = setting(8, "N: proposals per decision in training", low=1)
    eval_candidates: int = setting(32, "N at test time", low=1)
    execute: int = setting(1, "actions of each chunk executed at test time", low=1)
    flow_steps: int = setting(10, "F: Euler steps of the flow policy", low=1)
    eval_flow: bool = setting(False, "at test time sample from the flow, not its distillation")
    policy: str = setting("flow", "behaviour policy (Tables 3, 15)", choices=POLICIES)
    fql_alpha: float = setting(1.0, "weight of distillation in --policy fql (Table 11)", low=0)
    outcome: str = setting("reward", "learned of a chunk; with goals: success", choices=OUTCOMES)
    discount: float = setting(0.999, "gamma per environment step", low=0.001, high=0.999999)
    chunk_reward: str = setting("mean", "of its n rewards", choices=("mean", "sum"))
    goal: str = setting("task", "the coordinates that make a goal: those that the task is about, "
                        "or the whole observation", choices=("task", "observation"))
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
    precision: str = setting("float32", "of proposals, their scores, imagined rewards and the flow "
                             "to distil", choices=("float32", "bfloat16"))
    # data, logs, files
    dataset_dir: str = setting("~/.ogbench/data", "folder of the .npz files")
    collect: int = setting(0, "train on this many episodes, collected here", low=0)
    save_dir: str = setting("", "run folder; default exp/<env>-seed<seed>")
    log_interval: int = setting(1000, "steps between rows of train.csv; 0: never", low=0)
    eval_interval: int = setting(100_000, "steps between evaluations; 0: none at all", low=0)
    save_interval: int = setting(10_000, "steps between checkpoints; 0: only the last", low=0)
    eval_episodes: int = setting(15, "episodes per task in an evaluation", low=1)

    def __post_init__(self):
        defaults = {field.name: field.metadata["default"] for field in dataclasses.fields(self)}
        self.env = self.env or defaults["env"]
        for name, value in {**defaults, **presets(self)}.items():
            if getattr(self, name) is None:
                setattr(self, name, value)


# --------------------------------------------------------------------------- chunk dataset


class Batch(NamedTuple):
    """B logged chunks, raw until the agent normalises them (`Agent.normalize`)."""

    observation: torch.Tensor  # (B, O) s_t
    chunk: torch.Tensor  # (B, D) a_t ... a_{t+n-1}
    reward: torch.Tensor  # (B,) mean or sum of gamma^i r_{t+i}
    next_observation: torch.Tensor  # (B, O) s_{t+n}
    success: torch.Tensor  # (B,) 1 where the value goal's index lies in [t, t+n)
    value_goal: torch.Tensor  # (B, G)
    actor_goal: torch.Tensor  # (B, G)


class ChunkDataset:
    """Trajectories laid end to end, from which batches of action chunks are drawn. The arrays
    stay as they are, raw and uncopied; an index is kept of the trajectories, not of the rows.

    Args:
        observations: (T, O)
        actions: (T, A); the action of a trajectory's last state is never used.
        ends: (K,) index of each trajectory's last state, ascending.
        rewards: (T,), or None where goals take their place.
        columns: (G,) the coordinates of an observation that make it a goal.
    """

    def __init__(self, observations, actions, ends, rewards, columns, config):
        self.observations, self.actions, self.ends = observations, actions, ends
        self.columns, self.config = columns, config
        if rewards is None:
            rewards = observations.new_zeros(1).expand(len(observations))  # takes no memory
        self.rewards = rewards
        begins = F.pad(ends[:-1] + 1, (1, 0))
        # Every start that leaves n actions and a state n steps later, the last one included.
        starts = (ends - begins + 1 - config.chunk).clamp(min=0)  # (K,)
        self.starts_up_to = starts.cumsum(0)  # (K,) in this trajectory and those before it
        self.total_starts = int(self.starts_up_to[-1])
        self.offsets = torch.arange(config.chunk, device=ends.device)
        weights = config.discount ** self.offsets
        self.reward_weights = weights / config.chunk if config.chunk_reward == "mean" else weights

    def sample(self, batch_size, generator):
        """B chunks, uniform over all legal starts. -> Batch"""
        pick = torch.randint(self.total_starts, (batch_size,), generator=generator,
                             device=self.ends.device)
        k = torch.searchsorted(self.starts_up_to, pick, right=True)  # the trajectory picked
        start = self.ends[k] + 1 - self.config.chunk - (self.starts_up_to[k] - pick)
        return self.batch(start, generator)

    def batch(self, start, generator):
        """The chunks that begin at `start` (B,), with goals drawn by `generator`. -> Batch"""
        last = self.ends[torch.searchsorted(self.ends, start)]  # (B,)
        value_goal = self.sample_goals(start, last, self.config.value_goals, generator)  # (B,)
        actor_goal = self.sample_goals(start, last, self.config.actor_goals, generator)  # (B,)
        ahead = value_goal - start
        steps = (start[:, None] + self.offsets).flatten()  # (B n,)
        actions = self.actions.index_select(0, steps)  # (B n, A); quicker than self.actions[steps]
        rewards = self.rewards.index_select(0, steps).view(len(start), -1)  # (B, n)
        return Batch(
            observation=self.observations.index_select(0, start),
            # Clipped as in the published code: a tanh reaches neither end.
            chunk=actions.view(len(start), -1).clamp(-1 + 1e-5, 1 - 1e-5),
            reward=(rewards * self.reward_weights).sum(1),
            next_observation=self.observations.index_select(0, start + self.config.chunk),
            success=((ahead >= 0) & (ahead < self.config.chunk)).float(),
            value_goal=self.observations[value_goal[:, None], self.columns],
            actor_goal=self.observations[actor_goal[:, None], self.columns],
        )

    def sample_goals(self, start, last, odds, generator):
        """Indices (B,) of goal states: with `odds` (current, geometric, uniform, random) the
        state itself, one Geom(1 - gamma) steps ahead or uniform over the rest of the trajectory
        (neither beyond its end, `last`), or any state of the dataset."""
        kind, u, v = torch.rand(3, len(start), generator=generator, device=start.device)
        left = last - start
        geometric = (torch.log(u) / math.log(self.config.discount)).floor() + 1
        geometric = start + torch.minimum(geometric, left.float()).long()
        uniform = start + 1 + torch.minimum((v * left).long(), left - 1)
        anywhere = torch.randint(len(self.observations), (len(start),), generator=generator,
                                 device=start.device)
        current, near, future, _ = np.cumsum(odds)
        goal = torch.where(kind < future, uniform, anywhere)
        goal = torch.where(kind < near, geometric, goal)
        return torch.where(kind < current, start, goal)


# -------------------------------------------------------------------------------- networks


class Normalizer(nn.Module):
    """Scales each coordinate to [-1, 1] by the data's minimum and maximum."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("middle", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))

    def fit(self, data):  # (T, width)
        low, high = data.amin(0), data.amax(0)
        self.middle.copy_((low + high) / 2)
        self.scale.copy_((high - low) / 2 + 1e-3)  # not 0 (as in the published code)

    def forward(self, x, columns=slice(None)):
        """x (..., width), or (..., G) if it holds only those `columns` (G,)."""
        return (x - self.middle[columns]) / self.scale[columns]


class MLP(nn.Module):
    """Four hidden layers of Linear, GELU, LayerNorm, then Linear (Appendix A.1), of concatenated
    inputs (a goal may have width 0) -> (..., outputs), or (...) if `outputs` is None."""

    def __init__(self, inputs, outputs, width):
        super().__init__()
        layers = []
        for fan_in in (inputs, width, width, width):
            layers += [nn.Linear(fan_in, width), nn.GELU("tanh"), nn.LayerNorm(width, eps=1e-6)]
        self.hidden, self.output = nn.Sequential(*layers), nn.Linear(width, outputs or 1)
        self.scalar = outputs is None
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, *inputs):
        x = self.hidden(torch.cat(inputs, -1))
        # Never in low precision: values between -64 and -128 are 0.5 apart in bfloat16.
        with torch.autocast(x.device.type, enabled=False):
            x = self.output(x.float())
        return x.squeeze(-1) if self.scalar else x


class RewardModel(MLP):
    """Predicts a chunk's reward; the task never ends (Eq. 6, reward-based tasks)."""

    def loss(self, batch):
        prediction = self(batch.observation, batch.chunk, batch.value_goal)
        return {"reward": F.mse_loss(prediction, batch.reward)}

    def predict(self, observation, chunk, goal):
        """-> reward (...), mask (...): 1 where the rollout goes on."""
        reward = self(observation, chunk, goal)
        return reward, torch.ones_like(reward)


class SuccessModel(MLP):
    """Predicts whether a chunk meets the goal; reward is -1 until then, and the rollout ends
    there (Appendix A.1, goal-conditioned tasks)."""

    def loss(self, batch):
        logit = self(batch.observation, batch.chunk, batch.value_goal)
        return {"success": F.binary_cross_entropy_with_logits(logit, batch.success)}

    def predict(self, observation, chunk, goal):
        success = (self(observation, chunk, goal) > 0).float()  # a logit above 0 is p > 0.5
        return success - 1, 1 - success


OUTCOMES.update(reward=RewardModel, success=SuccessModel)


# ----------------------------------------------------------------------------- flow policy


def flow_matching_loss(velocity, x_1, observation, goal, generator):
    """Eq. 7: regress the velocity x_1 - x_0 at a random point of the straight line from noise
    x_0 to data x_1 (B, D). A velocity is called with observation, goal, x (..., D), t (..., 1)."""
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


def low_precision(config, tensor):
    """Where no gradient is needed, --precision may lower that of the networks' hidden layers."""
    return torch.autocast(tensor.device.type, torch.bfloat16, config.precision == "bfloat16")


class FlowPolicy(nn.Module):
    """MAC's policy: a flow of F steps (Eq. 7), distilled to a network of one (Eq. 8). A policy
    has `loss`, which gives a dictionary of losses, and `propose`."""

    reads = {"flow_steps", "eval_flow"}  # settings that not every policy has a use for

    def __init__(self, observation_size, goal_size, chunk_size, config):
        super().__init__()
        self.config, self.chunk_size = config, chunk_size
        inputs = observation_size + goal_size + chunk_size
        self.velocity = MLP(inputs + 1, chunk_size, config.width)
        self.one_step = MLP(inputs, chunk_size, config.width)

    def noise(self, observation, generator):
        return torch.randn(*observation.shape[:-1], self.chunk_size, generator=generator,
                           device=observation.device)

    def flow(self, observation, goal, z):
        return euler(self.velocity, z, observation, goal, self.config.flow_steps).clamp(-1, 1)

    def loss(self, batch, generator):
        observation, goal = batch.observation, batch.actor_goal
        z = self.noise(observation, generator)
        with torch.no_grad(), low_precision(self.config, z):
            teacher = self.flow(observation, goal, z)
        return {
            "flow": flow_matching_loss(self.velocity, batch.chunk, observation, goal, generator),
            "distill": F.mse_loss(self.one_step(observation, goal, z), teacher),
        }

    def propose(self, observation, goal, generator):
        """A chunk (..., D) in [-1, 1] for each row of observation (..., O) and goal (..., G)."""
        return self.one_step(observation, goal, self.noise(observation, generator)).clamp(-1, 1)

    def propose_by_flow(self, observation, goal, generator):
        """The same from the flow that the one-step network imitates (--eval-flow)."""
        return self.flow(observation, goal, self.noise(observation, generator))


POLICIES.update(flow=FlowPolicy)


# ------------------------------------------------------------------------------- the agent


class Rollout(NamedTuple):
    """Imagined trajectories of H chunks, without gradient."""

    observations: torch.Tensor  # (H+1, B, O)
    chunks: torch.Tensor  # (H, B, D)
    rewards: torch.Tensor  # (H, B)
    masks: torch.Tensor  # (H, B) 0 where the goal is met, 1 elsewhere
    goals: torch.Tensor  # (H, B, G) the same along a rollout


def returns(rewards, masks, final_value, discount):
    """R_k = r_k + discount m_k R_{k+1}, with R_H the value of the last state (Eq. 10).
    (H, B), (H, B), (B,), the discount of a chunk -> (H, B)"""
    result, following = [], final_value
    for reward, mask in zip(reversed(rewards), reversed(masks)):
        following = reward + discount * mask * following
        result.append(following)
    return torch.stack(result[::-1])


class Agent(nn.Module):
    """The networks of MAC and what they compute together, of normalised observations and goals:
    raw ones enter by `losses` and `act`. `columns` are the G coordinates of an observation that
    make it a goal: none where a reward fixes the task."""

    def __init__(self, observation_size, action_size, columns, config):
        super().__init__()
        self.config, self.sizes = config, (observation_size, action_size)
        goal_size, chunk_size = len(columns), config.chunk * action_size
        self.register_buffer("columns", torch.tensor(columns, dtype=torch.long))
        self.normalizer = Normalizer(observation_size)
        self.policy = POLICIES[config.policy](observation_size, goal_size, chunk_size, config)
        self.dynamics = MLP(observation_size + chunk_size, observation_size, config.width)
        inputs = observation_size + chunk_size + goal_size
        self.outcome = OUTCOMES[config.outcome](inputs, None, config.width)
        self.critic = MLP(inputs, None, config.width)
        self.value = MLP(observation_size + goal_size, None, config.width)
        self.target_value = copy.deepcopy(self.value).requires_grad_(False)

    @property
    def device(self):
        return self.columns.device

    def normalize(self, batch):
        return batch._replace(
            observation=self.normalizer(batch.observation),
            next_observation=self.normalizer(batch.next_observation),
            value_goal=self.normalizer(batch.value_goal, self.columns),
            actor_goal=self.normalizer(batch.actor_goal, self.columns))

    def next_observation(self, observation, chunk):
        """The model's s_{t+n}: (..., O), (..., D) -> (..., O)"""
        return observation + self.dynamics(observation, chunk)

    def best_of(self, candidates, observation, goal, generator, propose=None):
        """Eq. 4: of N proposals the one that Q ranks first. (B, O), (B, G) -> (B, D)"""
        observation = observation[:, None].expand(-1, candidates, -1)  # (B, N, O)
        goal = goal[:, None].expand(-1, candidates, -1)  # (B, N, G)
        chunks = (propose or self.policy.propose)(observation, goal, generator)  # (B, N, D)
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
        """All losses of a raw batch, which are added with weight one, and the rollout, which is
        None during the warmup: neither V nor Q is trained there."""
        batch, rollout, value_losses = self.normalize(batch), None, {}
        if not warmup:
            some = slice(self.config.rollout_batch_size or None)  # 0: the whole batch
            rollout = self.imagine(batch.observation[some], batch.value_goal[some], generator)
            value_losses = self.value_losses(rollout)
        policy_losses = self.policy.loss(batch, generator)
        return {**policy_losses, **self.model_losses(batch), **value_losses}, rollout

    @torch.no_grad()
    def act(self, observation, goal=None, candidates=None, generator=None):
        """Choose chunks for raw (not normalised) observations (B, O) or a single one (O,).

        Args: goal: (B, G) or (B, O), of which it takes the columns, or without B; None where G
            is 0. candidates: N, by default `eval_candidates`; 1 is the cloned behaviour.
        Returns: (B, n, A) or (n, A) float32 array, in [-1, 1].
        Raises: ValueError for other shapes and for numbers that are not finite.
        """
        observation = rows("observation", observation, self.device, self.sizes[0])
        several = observation.shape[:-1]  # (B,) or ()
        goal = np.zeros((*several, 0)) if goal is None else goal
        goal = rows("goal", goal, self.device, len(self.columns), self.sizes[0])
        if goal.shape[:-1] != several:
            raise ValueError(f"goal has shape {tuple(goal.shape)} where observations have "
                             f"{tuple(several)}: one goal per observation")
        observation, goal = torch.atleast_2d(observation), torch.atleast_2d(goal)
        if goal.shape[1] != len(self.columns):
            goal = goal[:, self.columns]
        propose = self.policy.propose_by_flow if self.config.eval_flow else None
        chunk = self.best_of(candidates or self.config.eval_candidates,
                             self.normalizer(observation), self.normalizer(goal, self.columns),
                             generator, propose)
        return chunk.view(*several, self.config.chunk, self.sizes[1]).cpu().numpy()


def update(agent, optimizer, batch, generator, warmup=False):
    """One step of Algorithm 1. -> dict of losses and of statistics (0-dimensional tensors)"""
    losses, rollout = agent.losses(batch, generator, warmup)
    optimizer.zero_grad()
    sum(losses.values()).backward()
    with torch.no_grad():  # before V's step, as in the published code
        for target, value in zip(agent.target_value.parameters(), agent.value.parameters()):
            target.lerp_(value, agent.config.ema_rate)
    optimizer.step()
    metrics = {name: loss.detach() for name, loss in losses.items()}
    return metrics if warmup else {**metrics, "rollout_reward": rollout.rewards.mean()}


# ================= Part II: ablations, presets, files, speed, training, flags ==================
# ------------------------------------------------------------------------------- ablations


class OneStepPolicy(FlowPolicy):
    """Ablation (Table 15): flow matching alone, followed in a single Euler step. The paper says no
    more than that its one-step policy is trained by the flow matching loss."""

    reads = set()

    def __init__(self, *sizes_and_config):
        super().__init__(*sizes_and_config)
        del self.one_step

    def loss(self, batch, generator):
        return {"flow": flow_matching_loss(self.velocity, batch.chunk, batch.observation,
                                           batch.actor_goal, generator)}

    def propose(self, observation, goal, generator):
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

    def loss(self, batch, generator):
        likelihood = self.log_likelihood(batch.chunk, batch.observation, batch.actor_goal)
        return {"likelihood": -likelihood.mean() / batch.chunk.shape[-1]}

    def propose(self, observation, goal, generator):
        mean, log_std = self.moments(observation, goal)
        z = torch.randn(mean.shape, generator=generator, device=mean.device)
        return torch.tanh(mean + log_std.exp() * z)


class FQLAgent(Agent):
    """Ablation (Table 3, "FQL"): instead of rejection sampling (one candidate) the one-step
    network also climbs Q by gradient, at the imagined states and with their goals."""

    reads = {"fql_alpha"}

    @staticmethod
    def presets(config):
        return {"candidates": 1, "eval_candidates": 1, "eval_flow": False,
                "fql_alpha": 0.3 if "cube-double" in config.env else 1.0}  # Table 11

    def losses(self, batch, generator, warmup=False):
        losses, rollout = super().losses(batch, generator, warmup)
        losses["distill"] = self.config.fql_alpha * losses["distill"]
        if rollout is None:
            return losses, rollout
        states = rollout.observations[:-1]  # (H, B, O)
        chunk = self.policy.propose(states, rollout.goals, generator)  # (H, B, D)
        # Q's gradient is to reach the chunk, not Q itself.
        frozen = {name: p.detach() for name, p in self.critic.named_parameters()}
        q = torch.func.functional_call(self.critic, frozen, (states, chunk, rollout.goals))
        # Over its own scale: alpha then weighs the same for any task's values.
        return {**losses, "extract": -q.mean() / q.abs().mean().detach()}, rollout


POLICIES.update(onestep=OneStepPolicy, gaussian=GaussianPolicy, fql=FlowPolicy)
AGENTS.update(fql=FQLAgent)


# --------------------------------------------------------------------------------- presets

# Found by measurement on two cores. The value function is learned in few steps, so it looks less
# far ahead and its target moves faster; until the models are good, rollouts would be wasted; and
# the distillation is still coarse at the end, so the flow itself proposes at test time.
SMALL = {"width": 256, "batch_size": 256, "rollout_batch_size": 64, "horizon": 5, "candidates": 4,
         "eval_candidates": 16, "flow_steps": 3, "eval_flow": True, "discount": 0.99,
         "ema_rate": 0.02, "learning_rate": 1e-3, "decay": True, "steps": 16_000, "warmup": 0.5,
         "collect": 100, "execute": 10, "log_interval": 250, "eval_interval": 2000,
         "eval_episodes": 20, "save_interval": 2000}


def presets(config):
    """What the environment (Tables 6 to 8), --small and the policy decide, the latter first."""
    world, policy = find_world(config.env, config.goal or "task"), config.policy or "flow"
    settings = {}
    if not world.fixed:
        settings = {"batch_size": 1024, "width": 1024, "steps": 2_000_000, "outcome": "success"}
    if "puzzle-4x5" in config.env:  # 20 ways to go on need more candidates; a smaller net pays
        settings.update(candidates=32, width=256)
    if world.family == "puzzle":
        settings["actor_goals"] = (0.0, 0.5, 0.0, 0.5)
    elif world.family in ("pointmaze", "antmaze", "humanoidmaze", "antsoccer"):
        settings["actor_goals"] = (0.0, 0.0, 1.0, 0.0)
    if config.small:
        settings.update(SMALL)
    if not world.scripted:
        settings.pop("collect", None)  # only a file will do
    settings.update(AGENTS[policy].presets(config) if policy in AGENTS else {})
    return {name: value for name, value in settings.items() if name not in unread(policy, world)}


def unread(policy, world):
    """The settings that a run with this policy in this world has no use for."""
    reads = [getattr(part, "reads", set()) for part in (POLICIES[policy], AGENTS.get(policy))]
    unread = {"fql_alpha", "eval_flow", "flow_steps"}.difference(*reads)
    return unread | ({"value_goals", "actor_goals", "goal"} if world.fixed else {"chunk_reward"})


def check(config, given):
    """Raise MacError if the flags given make no sense together."""
    def refuse(name, why):
        raise MacError(f"--{name.replace('_', '-')}: {why}")

    world = find_world(config.env, config.goal)
    for name in unread(config.policy, world) & given.keys():
        refuse(name, f"a run of {config.env} with --policy {config.policy} does not use it; "
               "leave it out")
    for name in ("value_goals", "actor_goals"):
        odds = getattr(config, name)
        if not (min(odds) >= 0 and abs(sum(odds) - 1) < 1e-6):
            refuse(name, f"{odds} are not four odds that add up to 1")
    if config.outcome == "success" and world.fixed:
        refuse("outcome", f"{config.env} has no goals to meet")
    if config.outcome == "reward" and not world.fixed:
        refuse("outcome", f"{config.env} has goals in the place of rewards")
    if config.collect and not world.scripted:
        refuse("collect", f"OGBench has no scripted policy for {config.env}; put the files of "
               f"{world.dataset} into {config.dataset_dir} and leave --collect out")
    for name, limit, what in (("rollout_batch_size", config.batch_size, "a batch has {} states"),
                              ("execute", config.chunk, "chunks have {} actions")):
        if getattr(config, name) > limit and name in given:
            refuse(name, f"{what.format(limit)}, not {getattr(config, name)}")
        setattr(config, name, min(getattr(config, name), limit))


# ----------------------------------------------------------------------- agents, data, files


def rows(name, given, device, *widths):
    """`given`, numbers of shape (width,) or (B, width), as a float32 tensor. Raises
    ValueError, naming it, if it is anything else or not finite."""
    if isinstance(given, torch.Tensor):
        given = given.detach().cpu()
        given = given.float() if given.dtype == torch.bfloat16 else given  # which NumPy lacks
    try:
        given = np.asarray(given)
    except ValueError as error:
        raise ValueError(f"{name} is not an array of numbers: {error}") from error
    if given.dtype.kind not in "fiub" or given.ndim not in (1, 2) \
            or given.shape[-1] not in widths:
        raise ValueError(f"{name} has shape {given.shape} and type {given.dtype}; this agent "
                         f"takes {widths[0]} numbers per {name}")
    with np.errstate(over="ignore"):  # what is too large for it is infinite
        given = torch.tensor(given.astype(np.float32, "C"), device=device)  # from any strides
    bad = (~given.isfinite()).nonzero()
    if len(bad):
        raise ValueError(f"{name}{bad[0].tolist()} is {given[tuple(bad[0])].item()}")
    return given


def to_device(batch, device):
    if batch.observation.device.type == device.type:
        return batch
    return Batch(*(x.pin_memory().to(device, non_blocking=True) for x in batch))


def make_agent(observation_size, action_size, columns, config):
    return AGENTS.get(config.policy, Agent)(observation_size, action_size, columns, config)


def make_dataset(arrays, columns, config, device=torch.device("cpu")):
    """The chunk dataset of a world's `arrays` on `device`, or on the host if it would fill more
    than half of the memory that the device has left."""
    tensors = [None if array is None else torch.as_tensor(array) for array in arrays]
    if device.type == "cuda":
        size = sum(tensor.nbytes for tensor in tensors if tensor is not None)
        if size > torch.cuda.mem_get_info(device)[0] / 2:
            say(f"the dataset ({size / 1e9:.1f} GB) stays in host memory")
            device = torch.device("cpu")
    tensors = [None if tensor is None else tensor.to(device) for tensor in tensors]
    return ChunkDataset(*tensors, torch.tensor(columns, dtype=torch.long, device=device), config)


def save_checkpoint(folder, state):
    """Write folder/checkpoint.pt: torch.save's bytes and their SHA-256. The one that was there
    becomes checkpoint-previous.pt; whenever this is cut short, one of the two is whole."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.write(hashlib.sha256(buffer.getbuffer()).digest())
    write(folder / "checkpoint.pt", buffer.getbuffer(), folder / "checkpoint-previous.pt")


def load_checkpoint(folder, device="cpu"):
    """The newest checkpoint of a run folder. Raises MacError if there is none, or if it is
    damaged; code in it is never run (`weights_only`)."""
    path, previous = folder / "checkpoint.pt", folder / "checkpoint-previous.pt"
    if not path.exists() and previous.exists():
        path = previous  # a save was cut short between its two renames
    data = path.read_bytes()
    if hashlib.sha256(data[:-32]).digest() != data[-32:]:
        advice = "there is no earlier one; train anew in another --save-dir"
        if path != previous and previous.exists():
            advice = f"move it away to go on from {previous.name}"
        raise MacError(f"{path} is damaged: {advice}")
    with must_fit(folder):
        return torch.load(io.BytesIO(data[:-32]), device, weights_only=True)


@contextlib.contextmanager
def must_fit(folder):
    """Raises MacError where a checkpoint does not hold what is read from it."""
    try:
        yield
    except (MacError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # torch raises many kinds
        first = " ".join(str(error).splitlines()[:2])  # of a line per parameter
        raise MacError(f"the checkpoint in {folder} is not one of this version of this program "
                       f"({type(error).__name__}: {first})") from error


def load(run, device="cpu"):
    """The trained agent of a run folder, for use outside these scripts:
    `mac.load("exp/...").act(observation, goal)`. Its `step` and `data_source` (a line that says
    where the data came from) tell what it is. Raises MacError or OSError."""
    checkpoint = load_checkpoint(pathlib.Path(run), device)
    with must_fit(run):
        agent = make_agent(*checkpoint["sizes"], Config(**checkpoint["config"])).to(device)
        agent.load_state_dict(checkpoint["agent"])
        agent.step, agent.data_source = checkpoint["step"], checkpoint["data"]
    return agent.eval()


def cut_log(path, keep):
    """Cut a CSV file back to its whole lines whose step satisfies `keep`."""
    if path.exists():
        head, *lines = path.read_text(errors="replace").splitlines(keepends=True) or [""]
        if head.endswith("\n") and not head.startswith("step,"):
            raise MacError(f"{path} is damaged: move it away, the run goes on without it")
        kept = [line for line in lines if line.endswith("\n") and line.split(",")[0].isdigit()
                and keep(int(line.split(",")[0]))]
        write(path, "".join([head, *kept] if head.endswith("\n") else []).encode())


def add_to_log(path, rows):
    """Append dictionaries of equal keys to a CSV file, whose first line names them."""
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(rows)


class Stop:
    """While open, SIGINT, SIGTERM and what schedulers send before they kill, SIGHUP and SIGUSR1,
    ask for a stop (`stop()` turns true); a second one ends the process at once."""

    def __enter__(self):
        self.signal, self.before = None, {}
        if threading.current_thread() is threading.main_thread():  # no other receives signals
            for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
                if signal.getsignal(signum) != signal.SIG_IGN:  # as nohup ignores SIGHUP
                    self.before[signum] = signal.signal(signum, self.handle)
        return self

    def __exit__(self, *_):
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def handle(self, signum, frame):
        self.signal = signum
        for other in self.before:
            signal.signal(other, signal.SIG_DFL)
        try:
            os.write(2, b"\nstopping after this step; once more to quit at once\n")  # reentrant
        except OSError:  # the terminal has gone, and with it whoever read what is printed
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)

    def __call__(self):
        return self.signal is not None


# ----------------------------------------------------------------------------------- speed


def set_up_device(name):
    """The device to train on; on a GPU with TF32 matrix products."""
    if name == "cuda" and not torch.cuda.is_available():
        raise MacError("--device cuda: PyTorch sees no GPU here; use --device cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        torch.set_float32_matmul_precision("high")
    return torch.device(name)


def make_optimizer(agent):
    """One Adam for all networks. The step size is a tensor, so that a CUDA graph sees it change."""
    parameters = [p for p in agent.parameters() if p.requires_grad]
    rate = torch.tensor(agent.config.learning_rate, device=agent.device)
    return torch.optim.Adam(parameters, rate, fused=True, capturable=agent.device.type == "cuda")


def make_generators(seed, *devices):
    """One generator per device given, their streams independent of each other. Batches, training
    noise and validation have one each, as has an evaluation, so that how often one logs or
    evaluates does not change what is learned."""
    seeds = np.random.SeedSequence(seed).generate_state(len(devices))
    return [torch.Generator(d).manual_seed(int(s)) for d, s in zip(devices, seeds)]


def make_step(agent, optimizer, dataset, data_generator, noise_generator, warmup=False):
    """A function of no arguments that draws a batch, does one update and returns its losses."""
    config, device = agent.config, agent.device

    def sample():
        return to_device(dataset.sample(config.batch_size, data_generator), device)

    def step():
        return update(agent, optimizer, sample(), noise_generator, warmup)

    if device.type != "cuda":
        return step
    if dataset.ends.device.type == "cuda":
        return capture(step, agent, optimizer, (data_generator, noise_generator))
    # The data stay on the host: only the update is a graph, which reads a batch at a fixed place.
    static = to_device(dataset.sample(config.batch_size, torch.Generator()), device)  # any batch
    graph = capture(lambda: update(agent, optimizer, static, noise_generator, warmup), agent,
                    optimizer, (noise_generator,))

    def copy_and_replay():
        for place, tensor in zip(static, sample()):
            place.copy_(tensor)
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


def timed(function, times, device):
    """Seconds of each of `times` calls, after 3 that are not counted."""
    result = []
    for _ in range(3 + times):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        result.append(time.perf_counter() - start)
    return result[3:]


def benchmark(config, updates):
    """Time `updates` updates, such as follow a warmup, on random data of the environment's shape.
    -> dict, for one line of JSON; the peak is that of a large fp32 (on a GPU: TF32) matrix product
    in the same process (`precision` lowers a part of the update only, so with bfloat16 the ratio
    may pass 1)."""
    from torch.utils.flop_counter import FlopCounterMode

    world, device = find_world(config.env, config.goal), set_up_device(config.device)
    torch.manual_seed(config.seed)
    agent = make_agent(*world.sizes, world.columns, config).to(device)
    observation, action = world.sizes
    arrays = (torch.randn(20_000, observation), torch.rand(20_000, action) * 2 - 1,
              torch.arange(999, 20_000, 1000), -torch.ones(20_000))
    dataset = make_dataset(arrays, world.columns, config, device)
    generators = make_generators(0, dataset.ends.device, device)
    with FlopCounterMode(display=False) as counter:
        batch = to_device(dataset.sample(config.batch_size, generators[0]), device)
        update(agent, make_optimizer(agent), batch, generators[1])
    flops = counter.get_total_flops()
    step = make_step(agent, make_optimizer(agent), dataset, *generators)
    times = timed(step, updates, device)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # of the process
    memory *= 1 if sys.platform == "darwin" else 1024
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated()
    size = 8192 if device.type == "cuda" else 2048
    square = torch.randn(size, size, device=device)
    peak = 2 * size ** 3 / min(timed(lambda: square @ square, 40, device))
    achieved = flops / statistics.median(times)
    return {"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "precision": config.precision, "threads": torch.get_num_threads(), "updates": updates,
            "ms_median": 1e3 * statistics.median(times), "ms_min": 1e3 * min(times),
            "ms_max": 1e3 * max(times), "gflop_per_update": flops / 1e9,
            "gflops": achieved / 1e9, "peak_gflops": peak / 1e9,
            "fraction_of_peak": achieved / peak, "peak_memory_mb": memory / 1e6}


# -------------------------------------------------------------------------------- training


class Diverged(MacError):
    """A loss or parameter became NaN or infinite."""

    status = 3


class Run:
    """A training run: what it consists of, and what is done between its updates."""

    def __init__(self, config, folder, agent, dataset, validation, evaluator, stop):
        self.config, self.folder, self.agent, self.dataset = config, folder, agent, dataset
        self.validation, self.evaluator, self.stop = validation, evaluator, stop
        self.device = agent.device
        self.optimizer = make_optimizer(agent)
        self.generators = make_generators(config.seed, dataset.ends.device, self.device)
        self.warmup_steps = int(config.warmup * config.steps)
        self.step, self.saved, self.status, self.losses = 0, 0, {}, {}

    def restore(self, state):
        """Continue from a checkpoint. More --steps than it was made with do not make the warmup
        longer; on another device than it was made on, a random stream begins anew."""
        with must_fit(self.folder):
            for name, fitted in self.agent.state_dict().items():
                if name.startswith("normalizer") and not torch.equal(fitted.cpu(),
                                                                     state["agent"][name]):
                    raise MacError(f"the data are not those that {self.folder} was trained on: "
                                   "check --dataset-dir")
            self.step = self.saved = state["step"]
            self.warmup_steps = state["warmup_steps"]
            self.agent.load_state_dict(state["agent"])
            self.optimizer.load_state_dict(state["optimizer"])
            group = self.optimizer.param_groups[0]  # the checkpoint was read to the host
            group.update(capturable=self.device.type == "cuda", lr=group["lr"].to(self.device))
            devices = [generator.device for generator in self.generators]
            self.generators = make_generators((self.config.seed, self.step), *devices)
            for generator, saved in zip(self.generators, state["generators"]):
                if len(saved) == len(generator.get_state()):
                    generator.set_state(saved.cpu())
        say(f"resuming at step {self.step} of {self.config.steps}")

    def due(self, interval):
        return interval and (self.step % interval == 0 or self.step == self.config.steps)

    def train(self):
        """Update until `config.steps` or a signal. Saving and evaluating stand before the update
        that they come before, so the loop runs once more than there are updates."""
        config, rate = self.config, self.optimizer.param_groups[0]["lr"]
        bar = tqdm(total=config.steps, initial=self.step, desc=config.env, smoothing=0.05,
                   disable=not sys.stderr.isatty())
        started, first_step, phase = time.time(), self.step, None
        with bar:
            while True:
                if self.step > self.saved and self.due(config.save_interval):
                    self.save()
                if self.step > self.warmup_steps and self.due(config.eval_interval):
                    self.evaluate()
                if self.step == config.steps or self.stop():
                    break
                warmup = self.step < self.warmup_steps
                if warmup != phase:
                    phase = warmup
                    do_update = make_step(self.agent, self.optimizer, self.dataset,
                                          *self.generators, warmup)
                if config.decay:
                    left = (config.steps - self.step) / max(1, config.steps - self.warmup_steps)
                    rate.fill_(config.learning_rate * (1 if warmup else left))
                self.losses = do_update()
                self.step += 1
                bar.update()
                if self.due(config.log_interval):
                    self.log()
                    bar.set_postfix(self.status, refresh=False)
                    if bar.disable:  # no terminal
                        speed = (self.step - first_step) / (time.time() - started)
                        left = tqdm.format_interval((config.steps - self.step) / speed)
                        say(f"step {self.step}/{config.steps}, {speed:.1f} steps/s, {left} left,",
                            ", ".join(map(" ".join, self.status.items())))
        if self.step > self.saved:
            self.save()

    def log(self):
        """A row of train.csv: this step's losses and those of a fixed validation batch."""
        now = self.check_finite()
        generators = make_generators(0, self.validation.ends.device, self.device)
        batch = self.validation.sample(self.config.batch_size, generators[0])
        with torch.no_grad():
            validation, _ = self.agent.losses(to_device(batch, self.device), generators[1])
        row = {name: now.get(name, "") for name in (*validation, "rollout_reward")}
        row.update({f"val_{name}": value.item() for name, value in validation.items()})
        add_to_log(self.folder / "train.csv", [{"step": self.step, **row}])
        self.status.update({name: f"{now[name]:.3g}" for name in ("dynamics", "value", "critic")
                            if name in now})

    def check_finite(self):
        """The losses as numbers. Raises Diverged if one of them or a parameter is not finite."""
        row = {name: value.item() for name, value in self.losses.items()}
        bad = [name for name, value in row.items() if not math.isfinite(value)]
        bad += [f"parameter {name}" for name, parameter in self.agent.named_parameters()
                if not parameter.isfinite().all()]
        if bad:
            kept = f"the checkpoint of step {self.saved} is kept" if self.saved else "nothing saved"
            raise Diverged(f"{bad[0]} is not finite at step {self.step}: training stopped, {kept}; "
                           "try a smaller --learning-rate in a new --save-dir")
        return row

    def play(self, name, episodes, seed, execute, candidates):
        """Play episodes of every task and say how they went. -> `summarize`'s table, or None if a
        signal came on the way"""
        results = self.evaluator.play(self.agent, episodes, seed, execute, candidates,
                                      stop=self.stop)
        if results is None:
            return None
        table = summarize(results)
        row = table["overall"]
        say(f"{name}: success {row['success']:.0%} ± {row['stderr']:.0%} ({row['episodes']} "
            f"episodes, {execute} of each chunk executed, N = {candidates})")
        return table

    def evaluate(self):
        """Rows of eval.csv: every task and overall. After a stop --resume begins with them."""
        config = self.config
        table = self.play(f"step {self.step}", config.eval_episodes, config.seed, config.execute,
                          config.eval_candidates)
        if table:
            add_to_log(self.folder / "eval.csv", [{"step": self.step, "task": name, **row}
                                                  for name, row in table.items()])
            self.status["success"] = f"{table['overall']['success']:.0%}"

    def final_table(self, episodes=50):
        """MAC beside cloning (one candidate of the same networks), both ways to execute."""
        config = self.config
        each = max(1, episodes // len(self.evaluator.world.tasks))
        name = "MAC" if config.policy == "flow" else config.policy
        for candidates, name in {1: "cloning", config.eval_candidates: name}.items():
            for execute in sorted({config.chunk, 1}):
                if not self.stop():
                    self.play(name, each, 1 + config.seed, execute, candidates)

    def save(self):
        self.check_finite()
        save_checkpoint(self.folder, {
            "step": self.step, "warmup_steps": self.warmup_steps,
            "sizes": (*self.agent.sizes, self.agent.columns.tolist()),
            "data": self.agent.data_source, "config": dataclasses.asdict(self.config),
            "agent": self.agent.state_dict(), "optimizer": self.optimizer.state_dict(),
            "generators": [generator.get_state() for generator in self.generators]})
        self.saved = self.step

    def say_where(self):
        """The device and, on a CPU, how long the run will take: some updates of a copy, timed."""
        if self.device.type == "cuda":
            return say(f"device: {torch.cuda.get_device_name()}")
        agent = copy.deepcopy(self.agent)
        generators = make_generators(0, self.dataset.ends.device, self.device)
        step = make_step(agent, make_optimizer(agent), self.dataset, *generators)
        hours = min(timed(step, 2, self.device)) * (self.config.steps - self.step) / 3600
        say(f"device: CPU, {torch.get_num_threads()} threads, "
            f"{torch.backends.cpu.get_cpu_capability()}; this takes up to {hours:.1f} hours" +
            ("" if self.config.small else ", --small minutes") +
            (f"; this PyTorch is made for CUDA {torch.version.cuda}, but finds no GPU that it can "
             "use" if torch.version.cuda else ""))


def train(config, folder, checkpoint):
    """Train in `folder` until `config.steps`, a signal or an error. -> exit status"""
    device = set_up_device(config.device)
    world = find_world(config.env, config.goal)
    path, source, config.collect = world.find(home(config.dataset_dir, "--dataset-dir"),
                                              config.collect)
    settings = json.dumps({**dataclasses.asdict(config), "data": source}, indent=2)
    say(settings)
    arrays, validation = (world.arrays(file, config.chunk) for file in
                          (path, validation_file(path)))
    torch.manual_seed(config.seed)
    agent = make_agent(*world.sizes, world.columns, config)
    agent.data_source = source
    agent.normalizer.fit(torch.as_tensor(arrays[0]))
    agent.to(device)
    datasets = [make_dataset(a, world.columns, config, device) for a in (arrays, validation)]
    if world.columns:
        say(f"goals are columns {world.columns} of the observation")
    with Stop() as stop:
        run = Run(config, folder, agent, *datasets, Evaluator(world), stop)
        if checkpoint:
            run.restore(checkpoint)
        cut_log(folder / "train.csv", lambda step: step <= run.step)
        cut_log(folder / "eval.csv", lambda step: step < run.step)
        write(folder / "config.json", (settings + "\n").encode())
        run.say_where()
        run.train()
        if config.small and config.eval_interval and not stop():
            run.final_table()
        if stop():
            rest = "goes on" if run.step < config.steps else "makes the table"
            say(f"stopped at step {run.step}; the same command with --resume {rest}")
            return 128 + stop.signal
    say(f"trained {run.step} steps; now: python eval.py {folder}")


# ---------------------------------------------------------------------------- command line


# What --resume may change. Of these the parameters at a given step depend only on `steps`, which
# sets the length of a decay, and on `device`, whose noise is another.
MAY_CHANGE = {"steps", "device", "log_interval", "eval_interval", "save_interval",
              "eval_episodes", "dataset_dir", "save_dir"}


def parse(argv):
    """-> the settings given as flags, --resume, --benchmark"""
    parser = Parser("mac.py", allow_abbrev=False, description="Train MAC: offline model-based RL "
                    "with action chunks. Defaults are the paper's for reward-based tasks; others "
                    "follow from --env.")
    for field in dataclasses.fields(Config):
        rules = dict(field.metadata)
        default = rules.pop("default")
        low, high = rules.pop("low", None), rules.pop("high", math.inf)
        if isinstance(default, bool):
            rules["action"] = argparse.BooleanOptionalAction  # --no-... undoes a preset's
        elif isinstance(default, tuple):
            rules.update(type=float, nargs=len(default), metavar="P")
        elif "choices" not in rules:
            rules.update(type=str if low is None else number(type(default), low, high), metavar="X")
        if default != "":
            rules["help"] += f" (default: {'off' if default is False else default})"
        parser.add_argument(f"--{field.name.replace('_', '-')}", **rules)
    parser.add_argument("--resume", action="store_true", help="continue the run of this folder")
    parser.add_argument("--benchmark", type=number(int, 1), metavar="K",
                        help="time K updates, print one line of JSON and exit")
    given = vars(parser.parse_args(argv))
    resume, updates = given.pop("resume"), given.pop("benchmark")
    given = {name: tuple(value) if isinstance(value, list) else value
             for name, value in given.items() if value is not None}
    return given, resume, updates


def resumed(saved, config, given):
    """The configuration of a checkpoint with what may change taken from the flags given."""
    for name in given:
        before, now = saved["config"][name], getattr(config, name)
        if name in MAY_CHANGE:
            saved["config"][name] = now
        elif before != now:
            raise MacError(f"--{name.replace('_', '-')}: this run has {before}, not {now}; "
                           "leave the flag out or use another --save-dir")
    if saved["step"] > saved["config"]["steps"]:
        raise MacError(f"--steps {config.steps}: this run is at step {saved['step']}")
    return Config(**saved["config"])


@command
def main(argv):
    given, resume, updates = parse(argv)
    config = Config(**given)
    check(config, given)
    if updates:
        return say(json.dumps(benchmark(config, updates)))
    folder = home(config.save_dir or f"exp/{config.env}-seed{config.seed}", "--save-dir")
    with lock(folder):
        checkpoint = None
        exists = any(any(folder.glob(name)) for name in ("*.json", "*.csv", "checkpoint*.pt"))
        if exists and not resume:
            raise MacError(f"{folder} already holds a run: --resume continues it, --save-dir "
                           "or --seed starts another")
        if any(folder.glob("checkpoint*.pt")):
            checkpoint = load_checkpoint(folder)
            with must_fit(folder):
                config = resumed(checkpoint, config, given)
        elif resume:
            say(f"{folder} holds no checkpoint to resume from: starting at step 0")
        return train(config, folder, checkpoint)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends a collection's workers, too
    sys.exit(main())

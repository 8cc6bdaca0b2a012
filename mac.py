"""MAC: scalable offline model-based RL with action chunks (ICLR 2026), in one file.

    python mac.py --env cube-double-play-v0                       # the paper's settings
    python mac.py --env cube-single-play-singletask-v0 --small    # minutes on a laptop CPU
    torchrun --nproc-per-node 8 mac.py --env cube-double-play-v0  # the same on eight GPUs
    python eval.py exp/<run>                                      # success table; --video, --plot

The algorithm, and the function of each step (equation numbers are the paper's):

    1. ChunkDataset.sample    draw (s_t, a_{t:t+n}, r, s_{t+n}) and goals from the logged data
    2. FlowPolicy.loss        clone the behaviour by flow matching (7); distil it to one step (8)
    3. Agent.model_losses     regress the chunk's outcome: next state (5), reward or success (6)
    4. Agent.imagine          roll H chunks out in the model (9), each the best of N by Q (4)
    5. Agent.value_losses     regress V on the H-chunk returns (10), Q on one chunk + V (11)
    6. update                 one optimizer step on the sum of all losses; target V follows by EMA

Shapes: B batch, N candidates, H rollout length in chunks, n chunk length, O observation,
A action, G goal (0 where the task is fixed), D = n A the flattened chunk; T dataset states,
K trajectories. Networks see observations and goals scaled to [-1, 1]; batches and `act` take
them raw.

Where this file follows the authors' published code rather than the paper's text:
    - the noised chunk is (1-u) z + u a: Eq. 7 has the two swapped, its own text does not;
    - the dynamics network predicts the change of state;
    - in reward-based tasks a chunk's reward is the *mean* of its n discounted rewards, not the
      sum: V and Q are 1/n of the paper's, the arg max is the same (`--chunk-reward sum`);
    - losses are means over coordinates, where the paper writes sums;
    - a chunk succeeds if the goal's index lies in it, learned by cross-entropy; the teacher of
      the distillation is clamped to [-1, 1]; target V follows V as it was before the step;
    - at test time only the first action of a chunk is executed (`--execute`).
Where it differs from that code: README.md, "Where it differs".
"""
import argparse
import contextlib
import copy
import csv
import dataclasses
import datetime
import hashlib
import io
import json
import math
import mmap
import os
import pathlib
import resource
import signal
import sys
import threading
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributions import Normal, TanhTransform, TransformedDistribution
from tqdm import tqdm

from eval import (PLAY_NOISE, Evaluator, MacError, Parser, Trajectories, command, find_world,
                  headline, home, host_memory, lock, number, say, summarize, write)


# ================ Part I: the method, from logged tensors to one step of training ================
# -------------------------------------------------------------------------------- settings

POLICIES = {}  # what --policy chooses from; add yours


def setting(default, help, **rules):
    """A field of Config: its value where no preset has another, its flag's help and rules."""
    return dataclasses.field(default=None, metadata={"default": default, "help": help, **rules})


@dataclasses.dataclass
class Config:
    """Every setting. Defaults are the paper's for reward-based tasks (Tables 6 to 8); what is
    not given and follows from others (`presets`) is filled in when a Config is made."""

    env: str = setting("cube-double-play-v0", "OGBench dataset id; with --data any of gymnasium's")
    data: str = setting("", "own trajectories: .npz, .hdf5 or a folder of them (README)")
    seed: int = setting(0, "seed of parameters, batches and noise", low=0, high=2 ** 32 - 1)
    steps: int = setting(1_000_000, "gradient steps; goal-conditioned 2M", low=1)
    device: str = setting("auto", "where to train", choices=("auto", "cpu", "cuda"))
    small: bool = setting(False, "laptop preset (SMALL in mac.py): collected data, a quarter "
                          "of an hour; two cubes with goals over an hour")
    # the method
    chunk: int = setting(10, "n: actions in a chunk", low=1)
    horizon: int = setting(10, "H: chunks in an imagined rollout", low=1)
    candidates: int = setting(8, "N: proposals per decision in training", low=1)
    eval_candidates: int = setting(32, "N at test time", low=1)
    execute: int = setting(1, "actions of each chunk executed at test time", low=1)
    flow_steps: int = setting(10, "F: Euler steps of the flow policy", low=1)
    eval_flow: bool = setting(False, "at test time sample from the flow, not its distillation")
    policy: str = setting("flow", "of the behaviour (Tables 3, 15; centered: not in the paper)",
                          choices=POLICIES)
    critic: str = setting("network", "where Q comes from: a network or, not in the paper, at once "
                          "from what that is taught, the right side of Eq. 11",
                          choices=("network", "model"))
    fql_alpha: float = setting(1.0, "weight of distillation in --policy fql (Table 11)", low=0)
    discount: float = setting(0.999, "gamma per environment step", low=0.001, high=0.999999)
    chunk_reward: str = setting("mean", "a chunk's reward, of its n discounted ones",
                                choices=("mean", "sum"))
    terminations: bool = setting(True, "learn where the task ends, if the data have such ends")
    goal: str = setting("task", "what a goal consists of", choices=("task", "observation"))
    value_goals: tuple = setting((0.2, 0.0, 0.5, 0.3), "odds that a value goal is the current / "
                                 "a geometric / a uniform future / a random state", low=0)
    actor_goals: tuple = setting((0.0, 1.0, 0.0, 0.0), "the same for actor goals", low=0)
    # networks and optimisation
    width: int = setting(512, "hidden units in each of the 4 layers; goal-conditioned 1024", low=1)
    batch_size: int = setting(256, "chunks per gradient step; goal-conditioned 1024", low=1)
    rollout_batch_size: int = setting(0, "states of a batch that are rolled out; 0: all", low=0)
    learning_rate: float = setting(3e-4, "step size of Adam", low=0)
    warmup: float = setting(0.0, "share of the steps, at first, without V and Q", low=0, high=0.99)
    decay: bool = setting(False, "after the warmup, let the learning rate fall linearly to zero")
    ema_rate: float = setting(0.005, "target V moves this much per step", low=0, high=1)
    precision: str = setting("float32", "of hidden layers where no gradient is needed",
                             choices=("float32", "bfloat16"))
    # data, logs, files
    dataset_dir: str = setting("~/.ogbench/data", "folder of the .npz files")
    cache_dir: str = setting("", "folder of their flat copies; default: flat/ beside the data")
    collect: int = setting(0, "train on this many episodes, collected here", low=0)
    collect_noise: float = setting(PLAY_NOISE, "on the plans of the scripted policies; with more "
                                   "the data show how to recover; OGBench's have 0.1", low=0)
    window: int = setting(0, "for data larger than memory: draw from this many transitions at a "
                          "time, a window that slides through the data; 0: from all", low=0)
    save_dir: str = setting("", "run folder; default exp/<env>-seed<seed>")
    tensorboard: bool = setting(False, "write the numbers of the .csv files for TensorBoard too")
    log_interval: int = setting(1000, "steps between rows of train.csv; 0: never", low=0)
    eval_interval: int = setting(100_000, "steps between evaluations; 0: none at all", low=0)
    save_interval: int = setting(10_000, "steps between checkpoints; 0: only first and last", low=0)
    eval_episodes: int = setting(15, "episodes per task in an evaluation", low=1)

    def __post_init__(self):
        given = {name: value for name, value in vars(self).items() if value is not None}
        if given.get("data"):
            given.setdefault("env", "")
        defaults = {field.name: field.metadata["default"] for field in dataclasses.fields(self)}
        vars(self).update(defaults | given)
        vars(self).update(presets(self) | given)
        self.execute = min(self.execute, self.chunk)
        self.data = self.data and os.path.abspath(home(self.data, "--data"))
        if self.critic == "model" and self.policy in AGENTS:
            raise MacError(f"--critic model: --policy {self.policy} climbs Q, a network")
        if self.collect and not self.world.scripted:
            raise MacError(f"--collect: there is no scripted policy for {self.env!r}")

    @property
    def world(self):
        world = find_world(self.env, self.goal, self.data)
        world.cache_dir, world.collect_noise = self.cache_dir, self.collect_noise
        return world


# --------------------------------------------------------------------------- chunk dataset

class Batch(NamedTuple):
    """B logged chunks, raw until the agent normalises them (`Agent.normalize`)."""

    observation: torch.Tensor  # (B, O) s_t
    chunk: torch.Tensor  # (B, D) a_t ... a_{t+n-1}
    reward: torch.Tensor  # (B,) mean or sum of gamma^i r_{t+i}
    next_observation: torch.Tensor  # (B, O) s_{t+n}, or the state in which the task ended
    success: torch.Tensor  # (B,) 1 where the value goal's index lies in [t, t+n)
    value_goal: torch.Tensor  # (B, G) of outcomes, rollouts, V and Q: may be any state of the data
    actor_goal: torch.Tensor  # (B, G) of the cloned policy: mostly what its trajectory reached
    terminated: torch.Tensor  # (B,) 1 where the task ended within the chunk
    taken: torch.Tensor  # (B, D) 1 for actions taken, 0 for the zeros after the task's end


class ChunkDataset:
    """Trajectories laid end to end, from which batches of action chunks are drawn. The arrays
    stay as they are, raw and uncopied; an index is kept of the trajectories, not of the rows.

    Args:
        observations, actions, ends, rewards, terminated: tensors of eval.py's `Trajectories`
        columns: (G,) the coordinates of an observation that make it a goal.
    """

    def __init__(self, observations, actions, ends, rewards, terminated, columns, config):
        self.observations, self.actions, self.rewards = observations, actions, rewards
        self.ends, self.columns, self.config = ends, columns, config
        self.terminated = terminated & config.terminations
        begins = F.pad(ends[:-1] + 1, (1, 0))
        # A chunk may start wherever n actions and a state follow, the last such place included;
        # where the task ended, in its last n - 1 states too: `taken` says how far the chunk got.
        self.last_starts = ends - torch.where(self.terminated, 1, config.chunk)  # (K,)
        count = (self.last_starts - begins + 1).clamp(min=0)  # (K,) starts of each trajectory
        self.starts_up_to = count.cumsum(0)  # (K,) in this trajectory and those before it
        self.total_starts = int(self.starts_up_to[-1])
        if not self.total_starts:
            raise MacError("no trajectory of the training or of the validation data has the "
                           f"{config.chunk} actions of a chunk: try a smaller --chunk")
        window = config.window or len(observations)  # 0: all
        self.first_start, self.window_starts = 0, min(window, self.total_starts)  # drawn from
        self.first_state, self.window_states = 0, min(window, len(observations))  # random goals
        self.offsets = torch.arange(config.chunk, device=ends.device)
        weights = config.discount ** self.offsets
        self.reward_weights = weights / config.chunk if config.chunk_reward == "mean" else weights

    def slide_window(self, step):
        """Of data larger than memory draw from `config.window` successive starts and states. The
        window slides through the data, over and over, by its own length in 1,000 steps (where the
        published code goes to the next million)."""
        first = torch.tensor([step * self.config.window // 1000 % self.total_starts],
                             device=self.ends.device)
        self.first_start, self.first_state = first, self.start(first)

    def start(self, pick):
        """The states (B,) that legal starts number `pick` (B,) are."""
        k = torch.searchsorted(self.starts_up_to, pick, right=True)  # the trajectory picked
        return self.last_starts[k] + 1 - (self.starts_up_to[k] - pick)

    def sample(self, batch_size, generator):
        """B chunks, uniform over all legal starts, or those in the window. -> Batch"""
        pick = torch.randint(self.window_starts, (batch_size,), generator=generator,
                             device=self.ends.device)
        return self.batch(self.start((pick + self.first_start) % self.total_starts), generator)

    def batch(self, start, generator):
        """The chunks that begin at `start` (B,), with goals drawn by `generator`. -> Batch"""
        n, k = self.config.chunk, torch.searchsorted(self.ends, start)  # (B,) the trajectories
        last = self.ends[k]  # (B,)
        value_goal = self.sample_goals(start, last, self.config.value_goals, generator)  # (B,)
        actor_goal = self.sample_goals(start, last, self.config.actor_goals, generator)  # (B,)
        ahead = value_goal - start
        rows = start[:, None] + self.offsets  # (B, n)
        taken = (rows < last[:, None]).float()  # (B, n)
        rows = torch.minimum(rows, last[:, None]).flatten()  # (B n,)
        actions = self.actions.index_select(0, rows)  # (B n, A); quicker than self.actions[rows]
        rewards = self.rewards.index_select(0, rows).view(taken.shape) * taken  # (B, n)
        taken = taken.repeat_interleave(actions.shape[1], 1)  # (B, D)
        states = torch.cat([start, torch.minimum(start + n, last), value_goal, actor_goal])
        states = self.observations.index_select(0, states).unflatten(0, (4, -1))  # (4, B, O)
        return Batch(
            observation=states[0],
            # Clipped as in the published code: a tanh reaches neither end.
            chunk=actions.view(taken.shape).clamp(-1 + 1e-5, 1 - 1e-5) * taken,
            reward=(rewards * self.reward_weights).sum(1),
            next_observation=states[1],
            success=((ahead >= 0) & (ahead < n)).float(),
            value_goal=states[2].index_select(1, self.columns),
            actor_goal=states[3].index_select(1, self.columns),
            terminated=(self.terminated[k] & (start + n >= last)).float(),
            taken=taken,
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
        anywhere = torch.randint(self.window_states, (len(start),), generator=generator,
                                 device=start.device)
        anywhere = (anywhere + self.first_state) % len(self.observations)
        current, near, future, _ = np.cumsum(odds) / sum(odds)  # the odds up to each
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
        self.scale.copy_((high - low) / 2 + 1e-3)  # the published code's, which keeps it from 0

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
                nn.init.zeros_(layer.bias)

    def forward(self, *inputs):
        x = self.hidden(torch.cat(inputs, -1))
        # Never in low precision: values between -64 and -128 are 0.5 apart in bfloat16.
        with torch.autocast(x.device.type, enabled=False):
            x = self.output(x.float())
        return x.squeeze(-1) if self.scalar else x


class RewardModel(MLP):
    """Predicts a chunk's reward; the task never ends (Eq. 6, OGBench's reward-based tasks)."""

    def loss(self, batch):
        prediction = self(batch.observation, batch.chunk, batch.value_goal)
        return {"reward": F.mse_loss(prediction, batch.reward)}

    def predict(self, observation, chunk, goal):
        """-> reward (...), mask (...): 1 where the return goes on."""
        reward = self(observation, chunk, goal)
        return reward, torch.ones_like(reward)


class TerminationModel(MLP):
    """Predicts a chunk's reward and whether the task ends within it: there the return ends, too.
    For data with such ends; the published code has no such model."""

    def __init__(self, inputs, outputs, width):
        super().__init__(inputs, 2, width)  # a reward and a logit

    def loss(self, batch):
        reward, logit = self(batch.observation, batch.chunk, batch.value_goal).unbind(-1)
        return {"reward": F.mse_loss(reward, batch.reward),
                "termination": F.binary_cross_entropy_with_logits(logit, batch.terminated)}

    def predict(self, observation, chunk, goal):
        reward, logit = self(observation, chunk, goal).unbind(-1)
        return reward, (logit <= 0).float()  # a logit above 0 is p > 0.5


class SuccessModel(MLP):
    """Predicts whether a chunk meets the goal; reward is -1 until then, and the return ends
    there (Appendix A.1, goal-conditioned tasks)."""

    def loss(self, batch):
        logit = self(batch.observation, batch.chunk, batch.value_goal)
        return {"success": F.binary_cross_entropy_with_logits(logit, batch.success)}

    def predict(self, observation, chunk, goal):
        success = (self(observation, chunk, goal) > 0).float()
        return success - 1, 1 - success


OUTCOMES = {"reward": RewardModel, "termination": TerminationModel, "success": SuccessModel}


# ----------------------------------------------------------------------------- flow policy

def low_precision(config, tensor):
    """In training --precision lowers that of hidden layers where no gradient is needed: for a
    rollout's proposals, their scores and rewards, and for the flow that is to be distilled."""
    return torch.autocast(tensor.device.type, torch.bfloat16, config.precision == "bfloat16")


class FlowPolicy(nn.Module):
    """MAC's policy: a flow of F steps (Eq. 7), distilled to a network of one (Eq. 8). A policy
    has `loss`, which gives a dictionary of losses, and `propose`."""

    def __init__(self, observation_size, goal_size, chunk_size, config):
        super().__init__()
        self.config, self.chunk_size = config, chunk_size
        inputs = observation_size + goal_size + chunk_size
        self.velocity = MLP(inputs + 1, chunk_size, config.width)
        self.one_step = MLP(inputs, chunk_size, config.width)

    def noise(self, observation, goal, generator):
        """Where flows start: z (..., D)."""
        return torch.randn(*observation.shape[:-1], self.chunk_size, generator=generator,
                           device=observation.device)

    def flow(self, observation, goal, z, steps=None):
        """Follow the velocity from noise z (..., D) at u = 0 to u = 1 in F equal Euler steps."""
        x, steps = z, steps or self.config.flow_steps
        for i in range(steps):
            u = torch.full_like(x[..., :1], i / steps)
            x = x + self.velocity(observation, goal, x, u) / steps
        return x.clamp(-1, 1)

    def flow_loss(self, batch, generator):
        """Eq. 7: regress the velocity a - z at a random point of the straight line from noise z to
        the chunk a, both (B, D), where actions were taken."""
        observation, goal, a = batch.observation, batch.actor_goal, batch.chunk
        z = self.noise(observation, goal, generator)
        u = torch.rand(len(a), 1, generator=generator, device=a.device)
        velocity = self.velocity(observation, goal, (1 - u) * z + u * a, u)
        return F.mse_loss(batch.taken * velocity, batch.taken * (a - z))

    def loss(self, batch, generator):
        observation, goal = batch.observation, batch.actor_goal
        z = self.noise(observation, goal, generator)
        with torch.no_grad(), low_precision(self.config, z):
            teacher = self.flow(observation, goal, z)
        chunk = self.one_step(observation, goal, z)
        return {"flow": self.flow_loss(batch, generator),
                "distill": F.mse_loss(batch.taken * chunk, batch.taken * teacher)}

    def propose(self, observation, goal, generator):
        """A chunk (..., D) in [-1, 1] for each row of observation (..., O) and goal (..., G)."""
        z = self.noise(observation, goal, generator)
        if self.config.eval_flow and not self.training:  # of the two the finer, and the slower
            return self.flow(observation, goal, z)
        return self.one_step(observation, goal, z).clamp(-1, 1)


# ------------------------------------------------------------------------------- the agent

class Rollout(NamedTuple):
    """Imagined trajectories of H chunks, without gradient."""

    observations: torch.Tensor  # (H+1, B, O)
    chunks: torch.Tensor  # (H, B, D)
    rewards: torch.Tensor  # (H, B)
    masks: torch.Tensor  # (H, B) 0 where the goal is met or the task ends, 1 elsewhere
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
    raw ones enter by `losses` and `enter`. `columns` are the G coordinates of an observation that
    make it a goal: none where a reward fixes the task."""

    def __init__(self, observation_size, action_size, columns, config):
        super().__init__()
        self.config, self.sizes = config, (observation_size, action_size)
        self.discount = config.discount ** config.chunk  # of a whole chunk
        goal_size, chunk_size = len(columns), config.chunk * action_size
        self.register_buffer("columns", torch.tensor(columns, dtype=torch.long))
        self.normalizer = Normalizer(observation_size)
        self.policy = POLICIES[config.policy](observation_size, goal_size, chunk_size, config)
        self.dynamics = MLP(observation_size + chunk_size, observation_size, config.width)
        inputs = observation_size + chunk_size + goal_size
        outcome = "success" if columns else "termination" if config.terminations else "reward"
        self.outcome = OUTCOMES[outcome](inputs, None, config.width)
        self.critic = MLP(inputs, None, config.width) if config.critic == "network" else None
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

    @torch.no_grad()
    def fill(self, batch, generator):
        """After the task's end a chunk is zeros, by which the models could tell that it ended.
        The policy's proposal takes their place, as it does in rollouts."""
        proposal = self.policy.propose(batch.observation, batch.actor_goal, generator)
        return batch._replace(chunk=torch.where(batch.taken == 1, batch.chunk, proposal))

    def next_observation(self, observation, chunk):
        """The model's s_{t+n}: (..., O), (..., D) -> (..., O)"""
        return observation + self.dynamics(observation, chunk)

    def q(self, observation, chunk, goal):
        """Q of chunks (..., D): the critic's or, with `--critic model`, `model_q`'s."""
        return (self.critic or self.model_q)(observation, chunk, goal)

    def model_q(self, observation, chunk, goal):
        """`q_target` of a step that is taken in the models."""
        reward, mask = self.outcome.predict(observation, chunk, goal)
        return self.q_target(reward, mask, self.next_observation(observation, chunk), goal)

    def q_target(self, reward, mask, following, goal):
        """What the critic is taught of a chunk (Eq. 11): its reward, and V where it leads."""
        return reward + self.discount * mask * self.value(following, goal)

    def proposals(self, count, observation, goal, generator):
        """N chunks of the policy for every state, and their Q. -> (B, N, D), (B, N)"""
        if count < 1:
            raise ValueError(f"{count} candidates, where at least one is needed")
        observation = observation[:, None].expand(-1, count, -1)  # (B, N, O)
        goal = goal[:, None].expand(-1, count, -1)  # (B, N, G)
        chunks = self.policy.propose(observation, goal, generator)
        return chunks, self.q(observation, chunks, goal)

    def best_of(self, count, observation, goal, generator):
        """Eq. 4: of N proposals the one that Q ranks first. (B, O), (B, G) -> (B, D)"""
        chunks, q = self.proposals(count, observation, goal, generator)
        return chunks.take_along_dim(q.argmax(1)[:, None, None], 1)[:, 0]

    @torch.no_grad()
    def imagine(self, observation, goal, generator, horizon=None, candidates=None):
        """Eq. 9: H chunks in the model from every observation (B, O) at once, also past a goal,
        where `returns` cuts. -> Rollout"""
        observations, chunks = [observation], []
        for _ in range(horizon or self.config.horizon):
            with low_precision(self.config, observation):
                chunk = self.best_of(candidates or self.config.candidates, observation, goal,
                                     generator)
            # In full precision: the errors of dynamics add up along a rollout.
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
        states, goals = rollout.observations, rollout.goals
        with torch.no_grad():
            target = returns(rollout.rewards, rollout.masks,
                             self.target_value(states[-1], goals[0]), self.discount)  # (H, B)
        losses = {"value": F.mse_loss(self.value(states[:-1], goals), target)}
        if self.critic:
            with torch.no_grad():
                target = self.q_target(rollout.rewards[0], rollout.masks[0], states[1], goals[0])
            q = self.critic(states[0], rollout.chunks[0], goals[0])  # (B,)
            losses["critic"] = F.mse_loss(q, target)
        return losses

    def losses(self, batch, generator, warmup=False):
        """All losses of a raw batch, which are added with weight one, and the rollout, which is
        None during the warmup: neither V nor Q is trained there."""
        batch = self.normalize(batch)
        if self.config.terminations:
            batch = self.fill(batch, generator)
        losses = {**self.policy.loss(batch, generator), **self.model_losses(batch)}
        if warmup:
            return losses, None
        first = slice(self.config.rollout_batch_size or None)  # 0: the whole batch
        # With value goals, of the policy too, although it is cloned with actor goals.
        rollout = self.imagine(batch.observation[first], batch.value_goal[first], generator)
        return {**losses, **self.value_losses(rollout)}, rollout

    def enter(self, observation, goal=None):
        """An observation and its goal, or a batch of them, as `act` takes them.
        -> normalised tensors (B, O), (B, G) on the agent's device. Raises ValueError."""
        observation = rows("observation", observation, self.sizes[0])
        goal = np.zeros((len(observation), 0)) if goal is None else goal
        goal = rows("goal", goal, len(self.columns), self.sizes[0])
        if len(goal) != len(observation):
            raise ValueError(f"{len(goal)} goals for {len(observation)} observations")
        observation, goal = observation.to(self.device), goal.to(self.device)
        if goal.shape[1] != len(self.columns):
            goal = goal[:, self.columns]
        return self.normalizer(observation), self.normalizer(goal, self.columns)

    @torch.no_grad()
    def candidates(self, observation, goal=None, count=None, generator=None):
        """What `act` chooses from, for raw observations (B, O) and goals (B, G), or (B, O) whose
        columns it takes: N = `count` chunks, by default `eval_candidates`, and their Q.
        -> float32 arrays (B, N, n, A) and (B, N). Raises ValueError as `act` does."""
        count = self.config.eval_candidates if count is None else count
        chunks, q = self.proposals(count, *self.enter(observation, goal), generator)
        return chunks.unflatten(-1, (self.config.chunk, -1)).cpu().numpy(), q.cpu().numpy()

    def act(self, observation, goal=None, candidates=None, generator=None):
        """Choose chunks for raw (not normalised) observations (B, O) or a single one (O,).

        Args: goal: as many, of width G or O; None where G is 0. candidates: N; 1 is cloning.
        Returns: (B, n, A) or (n, A) float32 array, in [-1, 1].
        Raises: ValueError for other shapes and for numbers that are not finite.
        """
        chunks, q = self.candidates(observation, goal, candidates, generator)
        best = chunks[np.arange(len(q)), q.argmax(1)]
        return best[0] if np.ndim(observation) == 1 else best


def update(agent, optimizer, batch, generator, warmup=False):
    """One step of Algorithm 1. -> dict of losses and of statistics (0-dimensional tensors)"""
    losses, rollout = agent.losses(batch, generator, warmup)
    optimizer.zero_grad()
    sum(losses.values()).backward()
    average_gradients(optimizer)  # with those of torchrun's other processes, if there are any
    with torch.no_grad():  # before V's step, as in the published code
        for target, value in zip(agent.target_value.parameters(), agent.value.parameters()):
            target.lerp_(value, agent.config.ema_rate)
    optimizer.step()
    metrics = {name: loss.detach() for name, loss in losses.items()}
    return metrics if warmup else {**metrics, "rollout_reward": rollout.rewards.mean()}


# ============== Part II: ablations, presets, data, files, speed, training, flags ===============
# ------------------------------------------------------------------------------- ablations

class OneStepPolicy(FlowPolicy):
    """Ablation (Table 15): flow matching alone, followed in a single Euler step. The paper says no
    more than that its one-step policy is trained by the flow matching loss."""

    def __init__(self, *sizes_and_config):
        super().__init__(*sizes_and_config)
        del self.one_step

    def loss(self, batch, generator):
        return {"flow": self.flow_loss(batch, generator)}

    def propose(self, observation, goal, generator):
        z = self.noise(observation, goal, generator)
        return self.flow(observation, goal, z, steps=1)


class CenteredPolicy(FlowPolicy):
    """Not in the paper: flows start at x_0 ~ N(mu(s, g), 0.3^2 I), with mu learned by regression,
    not at N(0, I). Small networks are then precise in a fraction of the updates."""

    def __init__(self, observation_size, goal_size, chunk_size, config):
        super().__init__(observation_size, goal_size, chunk_size, config)
        self.center = MLP(observation_size + goal_size, chunk_size, config.width)

    def noise(self, observation, goal, generator):
        center = self.center(observation, goal).detach()
        return center + 0.3 * super().noise(observation, goal, generator)

    def loss(self, batch, generator):
        center = self.center(batch.observation, batch.actor_goal)
        return {"center": F.mse_loss(batch.taken * center, batch.taken * batch.chunk),
                **super().loss(batch, generator)}


class GaussianPolicy(nn.Module):
    """Ablation (Table 3, "Gau"): a = tanh(x), x ~ N(mu(s), sigma(s)^2), by maximum likelihood
    (Appendix A.1). That sigma is diagonal and bounded is this file's choice."""

    def __init__(self, observation_size, goal_size, chunk_size, config):
        super().__init__()
        self.network = MLP(observation_size + goal_size, 2 * chunk_size, config.width)

    def moments(self, observation, goal):
        mean, log_std = self.network(observation, goal).chunk(2, -1)
        return mean, log_std.clamp(-5, 2)  # the usual range; keeps the likelihood bounded

    def loss(self, batch, generator):
        mean, log_std = self.moments(batch.observation, batch.actor_goal)
        # Not validated: that would wait for a GPU. Clipped chunks are in the open interval, the
        # proposals that stand where no action was taken need not be.
        normal = Normal(mean, log_std.exp(), validate_args=False)
        policy = TransformedDistribution(normal, TanhTransform(), validate_args=False)
        return {"likelihood": -(batch.taken * policy.log_prob(batch.taken * batch.chunk)).mean()}

    def propose(self, observation, goal, generator):
        mean, log_std = self.moments(observation, goal)
        z = torch.randn(mean.shape, generator=generator, device=mean.device)
        return torch.tanh(mean + log_std.exp() * z)


class FQLAgent(Agent):
    """Ablation (Table 3, "FQL"): instead of rejection sampling (one candidate) the one-step
    network also climbs Q by gradient, at the imagined states and with their goals."""

    @staticmethod
    def presets(config):
        return {"candidates": 1, "eval_candidates": 1, "eval_flow": False, "critic": "network",
                "fql_alpha": 0.3 if "cube-double" in config.env else 1.0}  # Table 11

    def losses(self, batch, generator, warmup=False):
        losses, rollout = super().losses(batch, generator, warmup)
        losses["distill"] = self.config.fql_alpha * losses["distill"]
        if rollout is None:
            return losses, rollout
        states = rollout.observations[:-1]  # (H, B, O)
        chunk = self.policy.propose(states, rollout.goals, generator)  # (H, B, D)
        # Q's gradient is to reach the chunk, not Q itself.
        fixed = {name: p.detach() for name, p in self.critic.named_parameters()}
        q = torch.func.functional_call(self.critic, fixed, (states, chunk, rollout.goals))
        # Over its own scale: alpha then weighs the same for any task's values.
        return {**losses, "extract": -q.mean() / q.abs().mean().detach()}, rollout


POLICIES.update(flow=FlowPolicy, centered=CenteredPolicy, onestep=OneStepPolicy,
                gaussian=GaussianPolicy, fql=FlowPolicy)
AGENTS = {"fql": FQLAgent}  # of policies that change more than proposals, with their presets


def make_agent(observation_size, action_size, columns, config):
    return AGENTS.get(config.policy, Agent)(observation_size, action_size, columns, config)


# --------------------------------------------------------------------------------- presets

# Found by measurement on two cores. The value function is learned in few steps, so it looks less
# far ahead and its target moves faster; until the models are good, rollouts would be wasted; and
# the distillation is still coarse at the end, so the flow itself proposes at test time.
SMALL = {"width": 256, "batch_size": 256, "rollout_batch_size": 64, "horizon": 5, "candidates": 4,
         "eval_candidates": 16, "flow_steps": 3, "eval_flow": True, "discount": 0.99,
         "ema_rate": 0.02, "learning_rate": 1e-3, "decay": True, "steps": 16_000, "warmup": 0.5,
         "collect": 100, "execute": 10, "log_interval": 250, "eval_interval": 2000,
         "eval_episodes": 20, "save_interval": 2000}
# Goals need more. In play data the gripper is hardly ever beside a cube that it is about to take,
# so nothing teaches small networks to mend their aim: noisier plans do. And a critic learned in so
# few steps does not tell the proposals for a state apart. (The rest by measurement.)
SMALL_WITH_GOALS = {"collect_noise": 0.3, "policy": "centered", "critic": "model",
                    "learning_rate": 3e-3, "warmup": 0.6, "horizon": 6, "execute": 3,
                    "value_goals": (0.1, 0.7, 0.2, 0.0)}
SMALL_SIZES = {"cube-single": {"collect": 200, "steps": 15_000},  # the ids this is for
               "cube-double": {"collect": 1000, "steps": 50_000, "eval_interval": 10_000,
                               "eval_episodes": 10},
               "puzzle-3x3": {"collect": 300, "steps": 25_000},
               "scene": {"collect": 150, "steps": 20_000}}


def presets(config):
    """What the environment (Tables 6 to 8), --small and the policy decide, each over the former."""
    world, settings = config.world, {}
    if not world.fixed:
        settings.update(batch_size=1024, width=1024, steps=2_000_000)
    if "puzzle-4x5" in config.env:  # 20 ways to go on need more candidates, a smaller net pays
        settings.update(candidates=32, width=256)
    if world.family == "puzzle":
        settings["actor_goals"] = (0.0, 0.5, 0.0, 0.5)
    elif world.family in ("pointmaze", "antmaze", "humanoidmaze", "antsoccer"):
        settings["actor_goals"] = (0.0, 0.0, 1.0, 0.0)
    if config.small:
        settings.update(SMALL)
        if world.scripted and not world.fixed and config.goal == "task":
            for name, size in SMALL_SIZES.items():
                if config.env.startswith(name):
                    settings.update(SMALL_WITH_GOALS, **size)
        if not world.scripted:
            del settings["collect"]  # only a file will do
    if config.policy in AGENTS:
        settings.update(AGENTS[config.policy].presets(config))
    return settings


# ------------------------------------------------------------------------------------ data

def rows(name, given, *widths):
    """`given`, numbers of any real type, of shape (width,) or (B, width), as a float32 tensor
    (B, width). Raises ValueError, naming it, if it is anything else or not finite."""
    if isinstance(given, torch.Tensor):
        given = given.detach().cpu()
        given = given.double() if given.is_floating_point() else given  # NumPy lacks bfloat16
    array = np.asarray(given)
    if array.dtype.kind not in "fiub" or array.ndim not in (1, 2) or array.shape[-1] not in widths:
        raise ValueError(f"{name} has shape {array.shape} and type {array.dtype}; this agent takes "
                         f"{widths[0]} numbers per {name}")
    with np.errstate(over="ignore"):  # what is too large for it is infinite
        array = np.atleast_2d(array).astype(np.float32, "C")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} is not finite at {np.argwhere(~np.isfinite(array))[0].tolist()}")
    return torch.from_numpy(array)


def make_dataset(arrays, columns, config, device=torch.device("cpu")):
    """The chunk dataset of Trajectories on `device`, or on the host, where a batch is drawn while
    the device works, if it would fill more than 0.6 of the memory that the device has left."""
    tensors = [*map(torch.as_tensor, arrays[:5]), torch.tensor(columns, dtype=torch.long)]
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if sum(tensor.nbytes for tensor in tensors) > 0.6 * free:
            device = torch.device("cpu")
    return ChunkDataset(*(tensor.to(device) for tensor in tensors), config)


def to_device(batch, device):
    if batch.observation.device.type == device.type:
        return batch
    return Batch(*(x.pin_memory().to(device, non_blocking=True) for x in batch))


# ----------------------------------------------------------------------------------- files

def save_checkpoint(folder, state):
    """Write folder/checkpoint.pt: torch.save's bytes and their SHA-256. The one that was there
    becomes checkpoint-previous.pt; whenever this is cut short, one of the two is whole."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.write(hashlib.sha256(buffer.getbuffer()).digest())
    write(folder / "checkpoint.pt", buffer.getbuffer(), folder / "checkpoint-previous.pt")


def load_checkpoint(folder, device="cpu"):
    """The newest whole checkpoint of a run folder; code in it is never run (`weights_only`).
    Raises MacError if there is none."""
    for path in (folder / "checkpoint.pt", folder / "checkpoint-previous.pt"):
        if path.exists():
            data = path.read_bytes()
            if hashlib.sha256(data[:-32]).digest() == data[-32:]:
                with must_fit(folder):
                    return torch.load(io.BytesIO(data[:-32]), device, weights_only=True)
            say(f"WARNING: {path} is damaged")
    raise MacError(f"{folder} holds no checkpoint that is whole: is it a run folder of mac.py?")


@contextlib.contextmanager
def must_fit(folder):
    """Raises MacError where a checkpoint does not hold what is read from it."""
    try:
        yield
    except (MacError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # torch raises many kinds
        first = " ".join(str(error).splitlines()[:2])  # of a line per parameter
        raise MacError(f"the checkpoint in {folder} is not one of this program as it is now "
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


def add_to_log(path, rows, writer=None):
    """Append dictionaries of equal keys to a CSV file, whose first line names them, and the
    numbers in them to TensorBoard."""
    with open(path, "a", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        if file.tell() == 0:
            table.writeheader()
        table.writerows(rows)
    for row in rows if writer else ():
        group = f"{path.stem}/{row['task']}" if "task" in row else path.stem
        for name, value in row.items():
            if isinstance(value, (int, float)) and name != "step":
                writer.add_scalar(f"{group}/{name}", value, row["step"])


def open_tensorboard(folder, step):
    """The writer of --tensorboard, which hides what an interrupted run wrote after `step`."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MacError("--tensorboard needs tensorboard: pip install tensorboard") from None
    return SummaryWriter(folder, purge_step=step + 1)


# ----------------------------------------------------------------------------------- speed

def set_up_device(name):
    """The device to train on; on a GPU with TF32 matrix products."""
    if name == "cuda" and not torch.cuda.is_available():
        raise MacError("--device cuda: PyTorch sees no GPU here; use --device cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        torch.set_float32_matmul_precision("high")
        if PROCESSES > 1:  # from here on "cuda" means this one
            index, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if index >= count:
                raise MacError(f"--nproc-per-node: there are {count} GPUs here, one a process")
            torch.cuda.set_device(index)
    return torch.device(name)


def make_optimizer(agent):
    """One for all networks. The step size is a tensor, so that a CUDA graph sees it change."""
    parameters = [p for p in agent.parameters() if p.requires_grad]
    rate = torch.tensor(agent.config.learning_rate, device=agent.device)
    return torch.optim.Adam(parameters, rate, fused=True, capturable=agent.device.type == "cuda")


def make_generators(seed, *devices):
    """One generator per device given, their streams independent of each other. Batches and
    training noise have one each, validation and evaluation others, so that how often one logs or
    evaluates does not change what is learned."""
    seeds = np.random.SeedSequence(seed).generate_state(len(devices))
    return [torch.Generator(d).manual_seed(int(s)) for d, s in zip(devices, seeds)]


def capture(step, agent, optimizer, generator):
    """`step` as one CUDA graph: its hundreds of small kernels are launched by a single call.
    The trial updates that PyTorch wants before a capture are undone, in place since the graph
    knows addresses, so that the graph starts where the eager step would."""
    saved = copy.deepcopy((agent.state_dict(), optimizer.state_dict()))
    random_state = generator.get_state()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        result = step()
    agent.load_state_dict(saved[0])
    for index, state in optimizer.state_dict()["state"].items():
        for name, tensor in state.items():
            before = saved[1]["state"].get(index, {}).get(name)
            tensor.zero_() if before is None else tensor.copy_(before)
    generator.set_state(random_state)
    return graph, result


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


def benchmark(config, device, updates):
    """Time `updates` updates, such as follow a warmup, on random data of the environment's shape.
    -> dict, for one line of JSON. Under torchrun an update is all processes', floating-point
    operations are those of one. The peak is that of a large fp32 (on a GPU: TF32) matrix product
    in the same process; as `precision` lowers a part of the update, the ratio may pass 1."""
    from torch.utils.flop_counter import FlopCounterMode

    world, config.terminations = config.world, False
    arrays = Trajectories(
        torch.randn(20_000, world.sizes[0]), torch.rand(20_000, world.sizes[1]) * 2 - 1,
        torch.tensor([19_999]), -torch.ones(20_000), torch.tensor([False]))
    run = Run(config, device, world, arrays, arrays)
    with FlopCounterMode(display=False) as counter:
        batch = to_device(run.dataset.sample(run.agent.config.batch_size, run.generators[0]),
                          device)
        update(run.agent, run.optimizer, batch, run.generators[1])
    times = timed(run.make_step(), updates, device)
    averaging = timed(lambda: average_gradients(run.optimizer), updates, device)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # of the process
    memory *= 1 if sys.platform == "darwin" else 1024
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated()
    size = 8192 if device.type == "cuda" else 2048
    square = torch.randn(size, size, device=device)
    peak = 2 * size ** 3 / min(timed(lambda: square @ square, 10, device))
    flops, median = counter.get_total_flops(), float(np.median(times))
    return {"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "precision": config.precision, "threads": torch.get_num_threads(), "updates": updates,
            "ms_median": 1e3 * median, "ms_min": 1e3 * min(times), "ms_max": 1e3 * max(times),
            "gflop_per_update": flops / 1e9, "gflops": flops / median / 1e9,
            "peak_gflops": peak / 1e9, "fraction_of_peak": flops / median / peak,
            "peak_memory_mb": memory / 1e6, "processes": PROCESSES,
            "all_reduce_share": float(np.median(averaging)) / median}


# ----------------------------------------------------------------------- several processes

# Under torchrun this is process RANK of PROCESSES. Each computes the losses of its share of every
# batch, by random streams of its own; as gradients are averaged, parameters, equal at the start,
# stay so to the bit. What is done once, process 0 does.
RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@contextlib.contextmanager
def together():
    """Join torchrun's other processes, if there are any. Of their errors the first is printed:
    the others are the same, or that a process has gone."""
    if PROCESSES == 1:
        yield
        return
    if RANK:
        sys.stdout = open(os.devnull, "w")
    store, *_ = next(dist.rendezvous("env://"))
    # By gloo they agree, on the host, so that no GPU waits. A day is for what process 0 does while
    # the others wait: it collects data, it evaluates. That one has died is noticed at once.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                            store=store, rank=RANK, world_size=PROCESSES,
                            timeout=datetime.timedelta(days=1))
    try:
        yield
    except Exception as error:
        if store.add("failed", 1) > 1:
            sys.exit(getattr(error, "status", 2))
        if "gloo" in str(error):
            raise MacError("another process of this run has ended: --resume goes on from the last "
                           "checkpoint") from error
        raise
    dist.destroy_process_group()


def gathered(value):
    """The `value` of every process, for all of which this waits."""
    values = [value] * PROCESSES
    if PROCESSES > 1:
        dist.all_gather_object(values, value)
    return values


def share(config):
    """The configuration of one process, whose batches are its part. Raises MacError."""
    batch, rollout = config.batch_size, config.rollout_batch_size
    if batch % PROCESSES or rollout % PROCESSES:
        raise MacError(f"{PROCESSES} processes cannot divide --batch-size {batch} and "
                       f"--rollout-batch-size {rollout} evenly")
    return dataclasses.replace(config, batch_size=batch // PROCESSES,
                               rollout_batch_size=rollout // PROCESSES)


def average_gradients(optimizer):
    """Over all processes, at once. A loss is a mean, so those of the shares average to the whole
    batch's (but FQL's `extract`, whose scale is each share's own)."""
    if PROCESSES > 1:
        parameters = [p for p in optimizer.param_groups[0]["params"] if p.grad is not None]
        flat = torch.cat([p.grad.flatten() for p in parameters]) / PROCESSES
        dist.all_reduce(flat)
        for p, mean in zip(parameters, flat.split([p.numel() for p in parameters])):
            p.grad = mean.view_as(p)


# -------------------------------------------------------------------------------- training

class Stop:
    """While open, SIGINT, SIGTERM and what schedulers send before they kill, SIGHUP and SIGUSR1,
    ask for a stop (`stop()` turns true); a second one ends a single process at once."""

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
        if PROCESSES > 1:  # torchrun says so, may repeat it, and kills what lives 30 seconds later
            return
        for other in self.before:
            signal.signal(other, signal.SIG_DFL)
        try:
            os.write(2, b"\nstopping after this step; once more to quit at once\n")  # reentrant
        except OSError:  # the terminal has gone, and with it whoever read what is printed
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)

    def __call__(self):
        return self.signal is not None

    def agreed(self):
        """Whether any process was asked to, so that all stop after the same step. It is asked
        before each, which takes the host less than a millisecond and no GPU's time."""
        signum = torch.tensor(self.signal or 0)
        if PROCESSES > 1:
            dist.all_reduce(signum, dist.ReduceOp.MAX)
        if signum:
            self.signal = int(signum)
        return bool(signum)


class Run:
    """A training run on Trajectories: agent, data, optimizer, random streams, and what is done
    between updates."""

    def __init__(self, config, device, world, training, validation):
        self.config, self.device = config, device
        torch.manual_seed(config.seed)
        # The agent's configuration is this process's share of every batch, the run's the whole.
        self.agent = make_agent(training.observations.shape[1], training.actions.shape[1],
                                world.columns, share(config))
        limits = training.observations if training.limits is None else training.limits
        self.agent.normalizer.fit(torch.as_tensor(limits))  # then the data need not be read
        self.agent.to(device)
        self.dataset, self.validation = (make_dataset(arrays, world.columns, config, device)
                                         for arrays in (training, validation))
        self.optimizer = make_optimizer(self.agent)
        # NumPy takes (seed, 0) for seed: a single process has the streams of its seed alone.
        self.generators = make_generators((config.seed, RANK), self.dataset.ends.device, device)
        self.warmup_steps = int(config.warmup * config.steps)
        self.step, self.saved, self.losses, self.headline, self.writer = 0, 0, {}, None, None

    def restore(self, state):
        """Continue from a checkpoint. More --steps than it was made with do not make the warmup
        longer; on another device than it was made on, or by more processes than made it, a random
        stream begins anew."""
        for name, fitted in self.agent.normalizer.state_dict().items():
            if not torch.equal(fitted.cpu(), state["agent"][f"normalizer.{name}"]):
                raise MacError("the data are not those of this run: check --dataset-dir")
        self.agent.load_state_dict(state["agent"])
        self.optimizer.load_state_dict(state["optimizer"])
        group = self.optimizer.param_groups[0]  # the checkpoint was read to the host
        group.update(capturable=self.device.type == "cuda", lr=group["lr"].to(self.device))
        for generator, saved in zip(self.generators, state["generators"][2 * RANK:]):
            if len(saved) == len(generator.get_state()):
                generator.set_state(saved)
        self.step, self.warmup_steps = state["step"], state["warmup_steps"]
        self.saved = self.step
        say(f"resuming at step {self.step} of {self.config.steps}")

    def make_step(self, warmup=False):
        """A function of no arguments that draws a batch, does one update, returns its metrics."""
        data, noise = self.generators

        def sample(stream):
            if self.config.window:
                self.dataset.slide_window(self.step)
            return to_device(self.dataset.sample(self.agent.config.batch_size, stream), self.device)

        if self.device.type != "cuda":
            return lambda: update(self.agent, self.optimizer, sample(data), noise, warmup)
        # The graph reads its batch from fixed tensors; for its trial they are filled from another
        # stream.
        place = sample(torch.Generator(data.device))
        graph, result = capture(lambda: update(self.agent, self.optimizer, place, noise, warmup),
                                self.agent, self.optimizer, noise)

        def step():
            for there, tensor in zip(place, sample(data)):
                there.copy_(tensor)
            graph.replay()
            return result
        return step

    def due(self, interval):
        return interval and (self.step % interval == 0 or self.step == self.config.steps)

    def train(self, folder, evaluator, stop):
        """Update until `config.steps` or a signal. Saving and evaluating stand before the update
        that they come before, so the loop runs once more than there are updates."""
        config, rate, phase = self.config, self.optimizer.param_groups[0]["lr"], None
        plain = RANK > 0 or not sys.stderr.isatty()  # then a line per log interval
        bar = tqdm(total=config.steps, initial=self.step, smoothing=0.05, unit=" steps",
                   file=open(os.devnull, "w") if plain else sys.stderr, bar_format="step "
                   "{n_fmt}/{total_fmt}, {rate_fmt}, {remaining} left{postfix}")
        while True:
            if self.step > self.saved and self.due(config.save_interval):
                self.save(folder)
            if self.step > self.warmup_steps and self.due(config.eval_interval):
                table = self.evaluate(evaluator, stop, config.eval_episodes, config.seed,
                                      config.execute, config.eval_candidates)
                if table:
                    add_to_log(folder / "eval.csv", [{"step": self.step, "task": name, **row}
                                                     for name, row in table.items()], self.writer)
            if self.step == config.steps or stop.agreed():
                break
            warmup = self.step < self.warmup_steps
            if warmup != phase:
                phase, do_update = warmup, self.make_step(warmup)
            if config.decay:
                left = (config.steps - self.step) / max(1, config.steps - self.warmup_steps)
                rate.fill_(config.learning_rate * min(1, left))
            self.losses = do_update()
            self.step += 1
            bar.update()
            if self.due(config.log_interval):
                bar.set_postfix_str(self.log(folder), refresh=False)
                if plain:
                    say(str(bar))
        bar.close()
        if self.step > self.saved:
            self.save(folder)

    def log(self, folder):
        """A row of train.csv: this step's losses (process 0's) and those of a fixed validation
        batch. -> the numbers worth watching"""
        self.check_finite()
        if RANK:
            return ""
        generators = make_generators(0, self.validation.ends.device, self.device)
        batch = self.validation.sample(self.agent.config.batch_size, generators[0])
        with torch.no_grad():
            validation, _ = self.agent.losses(to_device(batch, self.device), generators[1])
        now = {name: value.item() for name, value in self.losses.items()}
        row = {name: now.get(name, "") for name in (*validation, "rollout_reward")}
        row.update({f"val_{name}": value.item() for name, value in validation.items()})
        add_to_log(folder / "train.csv", [{"step": self.step, **row}], self.writer)
        status = [f"{name} {now[name]:.3g}" for name in ("dynamics", "value", "critic")
                  if name in now]
        return ", ".join(status + ([self.headline] if self.headline else []))

    def check_finite(self):
        """Raises MacError, status 3, if a loss or a parameter of any process is not finite."""
        values = {**self.losses, **dict(self.agent.named_parameters())}
        for names in gathered([name for name in values if not values[name].isfinite().all()]):
            if names:
                raise MacError(f"{names[0]} is not finite at step {self.step}: training stopped, "
                               f"the last checkpoint is of step {self.saved}; try a smaller "
                               "--learning-rate in a new --save-dir", status=3)

    def evaluate(self, evaluator, stop, episodes, seed, execute, candidates):
        """Play episodes of every task, say how they went -> the table of `summarize`, empty after
        a stop: --resume begins with this evaluation then. Only process 0 plays."""
        if RANK:
            return {}
        results = evaluator.play(self.agent.eval(), episodes, seed, execute, candidates, stop=stop)
        self.agent.train()
        if results is None:
            return {}
        table = summarize(results)
        self.headline = headline(table["overall"])
        say(f"step {self.step}: {self.headline} ({table['overall']['episodes']} episodes, "
            f"{execute} of each chunk executed, N = {candidates})")
        return table

    def save(self, folder):
        self.check_finite()
        generators = gathered([generator.get_state() for generator in self.generators])
        if RANK == 0:
            save_checkpoint(folder, {
                "step": self.step, "warmup_steps": self.warmup_steps,
                "sizes": (*self.agent.sizes, self.agent.columns.tolist()),
                "data": self.agent.data_source, "config": dataclasses.asdict(self.config),
                "agent": self.agent.state_dict(), "optimizer": self.optimizer.state_dict(),
                "generators": sum(generators, [])})
        self.saved = self.step


def train(config, device, folder, checkpoint):
    """Train in `folder` until `config.steps`, a signal or an error. -> exit status"""
    world = config.world
    # Only process 0 looks, which may mean to download or to collect.
    found = None if RANK else world.find(home(config.dataset_dir, "--dataset-dir"), config.collect)
    path, source, config.collect = gathered(found)[0]
    training, validation = world.data(path)
    config.terminations = config.terminations and bool(training.terminated.any())
    if not world.tasks:
        config.eval_interval = 0
    settings = json.dumps({**dataclasses.asdict(config), "data": source}, indent=2)
    say(settings)
    if world.columns:
        say(f"goals are columns {world.columns} of the observation")
    if device.type == "cuda":
        say(f"device: {torch.cuda.get_device_name()}")
    else:
        run = Run(config, device, world, training, validation)  # for a trial: another follows
        seconds = min(timed(run.make_step(), 2, device))
        left = config.steps - (checkpoint or {"step": 0})["step"]
        hours, minutes = divmod(left * seconds / 60, 60)
        say(f"device: CPU, {torch.get_num_threads()} threads, "
            f"{torch.backends.cpu.get_cpu_capability()}; updates take up to {hours:.0f} hours "
            f"{minutes:.0f} minutes"
            + ("" if config.small else ", --small minutes to over an hour"))
    run = Run(config, device, world, training, validation)
    run.agent.data_source = source
    data = run.dataset
    size = (data.observations.nbytes + data.actions.nbytes) / 1e9
    place, memory = "GPU" if data.ends.is_cuda else "host", host_memory() / 1e9
    say(f"data: {len(data.actions):,} states, {size:.3g} GB, kept on the {place}")
    if place == "host" and size > memory and not config.window:
        say(f"WARNING: its memory is {memory:.3g} GB: a batch waits for the disk, a tenth of a "
            "second and more; --window 1000000 draws from a million states at a time")
        for array in training[:2]:
            if isinstance(array, np.memmap):  # else 128 KB are read around each row: 6 s a batch
                array.base.madvise(mmap.MADV_RANDOM)
    with Stop() as stop:
        if checkpoint:
            with must_fit(folder):
                run.restore(checkpoint)
        if config.tensorboard and RANK == 0:
            run.writer = open_tensorboard(folder, run.step)
        if not checkpoint:
            run.save(folder)  # first, so that the folder of a run always holds a checkpoint
        if RANK == 0:
            cut_log(folder / "train.csv", lambda step: step <= run.step)
            cut_log(folder / "eval.csv", lambda step: step < run.step)
            write(folder / "config.json", (settings + "\n").encode())
        evaluator = Evaluator(world)
        run.train(folder, evaluator, stop)
        if config.small and config.eval_interval:  # and of the behaviour, N = 1, to compare
            for candidates in sorted({1, config.eval_candidates}):
                for execute in sorted({1, config.execute}) if not stop() else ():
                    run.evaluate(evaluator, stop, max(1, 50 // len(world.tasks)), config.seed + 1,
                                 execute, candidates)
        if stop.agreed():
            say(f"stopped at step {run.step}; the same command with --resume goes on")
            return 128 + stop.signal
    say(f"trained {run.step} steps" + (f"; now: python eval.py {folder}" if world.tasks else ""))


# ---------------------------------------------------------------------------- command line

# What --resume may change. Of these only `steps`, which sets the length of a decay, and `device`,
# whose noise is another, have an effect on the parameters at a given step.
MAY_CHANGE = {"steps", "device", "log_interval", "eval_interval", "save_interval",
              "eval_episodes", "data", "dataset_dir", "cache_dir", "save_dir", "tensorboard"}
# What a run may have been started with, although the data found decided otherwise.
LEFT_TO_THE_DATA = {("terminations", True), ("collect", 0)}


def parse(argv):
    """-> the settings given as flags, --resume, --benchmark"""
    parser = Parser("mac.py", allow_abbrev=False, description="Train MAC: offline model-based RL "
                    "with action chunks. Defaults are the paper's for reward-based tasks; others "
                    "follow from --env.")
    for field in dataclasses.fields(Config):
        rules = dict(field.metadata)
        default = rules.pop("default")
        low, high = rules.pop("low", None), rules.pop("high", math.inf)
        kind = float if isinstance(default, tuple) else type(default)
        if isinstance(default, bool):
            rules["action"] = argparse.BooleanOptionalAction  # --no-... undoes a preset's
        elif "choices" not in rules:
            rules.update(type=str if low is None else number(kind, low, high), metavar="X")
        if isinstance(default, tuple):
            rules["nargs"] = len(default)
        if default != "":
            named = {False: "off", True: "on"} if isinstance(default, bool) else {}
            rules["help"] += f" (default: {named.get(default, default)})"
        parser.add_argument(f"--{field.name.replace('_', '-')}", **rules)
    parser.add_argument("--resume", action="store_true", help="continue the run of this folder")
    parser.add_argument("--benchmark", type=number(int, 1), metavar="K",
                        help="time K updates, print one line of JSON and exit")
    given = vars(parser.parse_args(argv))
    resume, updates = given.pop("resume"), given.pop("benchmark")
    given = {name: tuple(value) if isinstance(value, list) else value
             for name, value in given.items() if value is not None}
    for name, value in given.items():
        if isinstance(value, tuple) and not sum(value):
            parser.error(f"argument --{name.replace('_', '-')}: one of the odds must not be 0")
    return given, resume, updates


def resumed(saved, config, given):
    """The configuration of a checkpoint with what may change taken from the flags given."""
    for name in given:
        before, now = saved["config"][name], getattr(config, name)
        if name in MAY_CHANGE:
            saved["config"][name] = now
        elif before != now and (name, now) not in LEFT_TO_THE_DATA:
            raise MacError(f"--{name.replace('_', '-')}: this run has {before}, not {now}; "
                           "leave the flag out or use another --save-dir")
    if saved["step"] > saved["config"]["steps"]:
        raise MacError(f"--steps {config.steps}: this run is at step {saved['step']}")
    return Config(**saved["config"])


@command
@together()
def main(argv):
    given, resume, updates = parse(argv)
    config = Config(**given)
    if updates:
        return say(json.dumps(benchmark(config, set_up_device(config.device), updates)))
    name = config.env or pathlib.Path(config.data).stem
    folder = home(config.save_dir or f"exp/{name}-seed{config.seed}", "--save-dir")
    with lock(folder) if RANK == 0 else contextlib.nullcontext():
        exists = any(any(folder.glob(name)) for name in ("*.json", "*.csv", "checkpoint*.pt"))
        if exists and not resume:
            raise MacError(f"{folder} already holds a run: --resume continues it, --save-dir "
                           "or --seed starts another")
        checkpoint = load_checkpoint(folder) if exists else None
        if exists:
            with must_fit(folder):
                config = resumed(checkpoint, config, given)
        elif resume:
            say(f"{folder} holds no checkpoint to resume from: starting at step 0")
        share(config)  # an error now rather than after a collection
        return train(config, set_up_device(config.device), folder, checkpoint)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends a collection's workers, too
    sys.exit(main())

"""MAC: scalable offline model-based RL with action chunks (ICLR 2026), in one file.

    python mac.py --env cube-double-play-v0                       # the paper's settings
    python mac.py --env cube-single-play-singletask-v0 --small    # minutes on a laptop CPU
    python eval.py exp/<run>                                      # success table; --video, --plot

The algorithm, and the function of each step (equation numbers are the paper's):

    1. ChunkDataset.sample    draw (s_t, a_{t:t+n}, r, s_{t+n}) and goals from the logged data
    2. FlowPolicy.loss        clone the behaviour by flow matching (7); distil it to one step (8)
    3. Agent.model_losses     learn what a chunk brings: next state (5), reward (6) or success (A.1)
    4. Agent.imagine          roll H chunks out in the model (9), each the best of N by Q (4)
    5. Agent.value_losses     regress V on the H-chunk returns (10), Q on one chunk + V (11)
    6. update                 target V by EMA, one optimizer step on the sum of all losses

Shapes: B batch, N candidates (Algorithm 1 has M), H rollout length in chunks, n chunk length,
O observation, A action, G goal (0 in reward-based tasks), D = n A the flattened chunk, K
trajectories. a_{t:t+n} are the n actions from a_t on. z is noise of N(0, I), x_0 the beginning of
the flow (u = 0). Networks see states and goals scaled to [-1, 1]; `Agent.normalize` does it.

Main points where this file follows the authors' code, as the paper differs or is silent:
    - the noised chunk is (1-u) z + u a: Eq. 7 swaps z and a, the text below it does not;
    - the dynamics network predicts the change of state;
    - in reward-based tasks a chunk's reward is the *mean* of its n discounted rewards, not the
      sum (`--chunk-reward sum`), so V and Q are 1/n of the paper's; the arg max is the same;
    - losses are means over coordinates, where the paper writes sums, and all networks take a step
      at once, where Algorithm 1 takes them in turn;
    - a chunk succeeds if the goal's index is in [t, t+n); proposals and the teacher of the
      distillation are clamped to [-1, 1]; target V moves towards V as it was before the step;
    - at test time only the first action of a chunk is executed (`--execute`).
Where it differs from that code: README.md, "Where it differs".
"""
import contextlib
import copy
import dataclasses
import json
import math
import pathlib
import signal
import sys
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from support import console, data, devices, episodes, files, runs
from support.console import MacError, say
from support.worlds import find_world


# -------------------------------------------------------------------------------- settings

LARGEST = 2 ** 32 - 1  # a setting without bounds of its own here is from 0 to this
BOUNDS = {"discount": (0.001, 0.999999), "warmup": (0, 0.99), "ema_rate": (0, 1), **dict.fromkeys(
    ("steps", "chunk", "horizon", "candidates", "eval_candidates", "execute", "flow_steps", "width",
     "batch_size", "eval_episodes"), (1, LARGEST))}


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting; its comment is the help of its flag. Defaults are those of Tables 7 and 8, the
    odds of goals Table 6's for cubes. An option that is off, 0 or empty is not in the paper.
    `settings` (below) changes what depends on the task or --small."""

    env: str = "cube-double-play-v0"  # OGBench id; with --data a gymnasium id
    data: str = ""  # own trajectories: .npz, .hdf5 or a folder of them (README)
    seed: int = 0  # seed of training and of evaluations
    steps: int = 1_000_000  # gradient steps; goal-conditioned 2M
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where to train
    small: bool = False  # laptop preset (SMALL in mac.py): small networks, collected data
    # the method
    chunk: int = 10  # n: actions in a chunk
    horizon: int = 10  # H: chunks in an imagined rollout
    candidates: int = 8  # N: proposals per decision in training
    eval_candidates: int = 32  # N at test time
    execute: int = 1  # actions of each chunk that are executed at test time
    flow_steps: int = 10  # F: Euler steps of the flow policy
    flow_noise: float = 1.0  # standard deviation of the noise where the flow begins; 1 in the paper
    center: bool = False  # let the flow begin around a chunk that a further network regresses
    eval_flow: bool = False  # at test time propose by the flow itself, not by its distillation
    policy: str = "flow"  # behaviour policy, by its name in POLICIES
    critic: Literal["network", "model"] = "network"  # model: Q = Eq. 11's target (not in the paper)
    discount: float = 0.999  # gamma per environment step
    chunk_reward: Literal["mean", "sum"] = "mean"  # of n discounted rewards; unused with goals
    terminations: bool = True  # learn terminations, if the data have any (not in the paper)
    goal: Literal["task", "observation"] = "task"  # a goal: a task's coordinates, or a whole state
    value_goals: tuple = (0.2, 0.0, 0.5, 0.3)  # odds of V's and Q's goals: the current state, a
                           # later one (geometric), a later one (uniform), any state of the data
    actor_goals: tuple = (0.0, 1.0, 0.0, 0.0)  # the same for the goals of the behaviour policy
    tolerance: tuple = ()  # a chunk succeeds also if it begins within this distance of the goal:
                           # one number, or one for each goal coordinate, in raw units
    # networks and optimisation
    width: int = 512  # hidden units in each of the 4 layers; goal-conditioned 1024, puzzle-4x5 256
    batch_size: int = 256  # chunks per gradient step; goal-conditioned 1024
    rollout_batch_size: int = 0  # states of a batch that are rolled out; 0: all
    learning_rate: float = 3e-4  # step size of Adam
    warmup: float = 0.0  # V and Q are not trained in this first fraction of the steps
    decay: bool = False  # after the warmup, let the learning rate fall linearly to zero
    ema_rate: float = 0.005  # target V moves this much towards V per step
    # data, logs, files
    dataset_dir: str = "~/.ogbench/data"  # folder of the .npz files
    cache_dir: str = ""  # folder of their flat copies; default: flat/ beside the data
    collect: int = 0  # train on this many episodes, collected here by scripted policies
    collect_noise: float = 0.1  # noise on the plans of scripted policies; 0.1 in OGBench's data
    window: int = 0  # draw from a sliding window of this many chunks; 0: from all
    save_dir: str = ""  # run folder; default exp/<env>-seed<seed>
    tensorboard: bool = False  # write the numbers of the .csv files for TensorBoard too
    log_interval: int = 1000  # steps between rows of train.csv; 0: never
    eval_interval: int = 100_000  # steps between evaluations after the warmup; 0: none at all
    save_interval: int = 10_000  # steps between checkpoints; 0: only first, last and at evaluations
    eval_episodes: int = 15  # episodes per task in an evaluation

    def __post_init__(self):
        for name, value in vars(self).items():
            low, high = BOUNDS.get(name, (0, LARGEST))
            for number in value if isinstance(value, tuple) else (value,):
                if not isinstance(number, str) and not low <= number <= high:
                    raise MacError(f"{console.flag(name)}: {number} is not from {low} to {high}")
            if name.endswith("goals") and not sum(value):
                raise MacError(f"{console.flag(name)}: the odds are all 0")


# --------------------------------------------------------------------------- chunk dataset

class Batch(NamedTuple):
    """B logged chunks, raw until the agent normalises them (`Agent.normalize`)."""
    observation: torch.Tensor  # (B, O) s_t
    chunk: torch.Tensor  # (B, D) a_t ... a_{t+n-1}, clipped to (-1, 1) as in the published code
    reward: torch.Tensor  # (B,) mean or sum of gamma^i r_{t+i}
    next_observation: torch.Tensor  # (B, O) s_{t+n}, or the state in which the task ended
    success: torch.Tensor  # (B,) 1: the value goal's index is in [t, t+n), or s_t is near it
    value_goal: torch.Tensor  # (B, G) for outcomes, rollouts, V and Q: may be any state
    actor_goal: torch.Tensor  # (B, G) for cloning: often a later state of the trajectory
    termination: torch.Tensor  # (B,) 1 where the task ended within the chunk
    valid: torch.Tensor  # (B, D) 1 for logged actions, 0 for padding after the task's end


class ChunkDataset:
    """support.data.Trajectories, from which batches of action chunks are drawn. Arrays stay raw and
    are not copied on a CPU. Starts are counted by trajectory, not listed. `columns` lists
    the G coordinates of an observation that form a goal."""

    def __init__(self, trajectories, columns, config, device="cpu"):
        arrays = [torch.as_tensor(array).to(device) for array in trajectories[:5]]
        self.observations, self.actions, self.ends, self.rewards, terminated = arrays
        self.columns = torch.tensor(columns, dtype=torch.long, device=device)
        self.config, self.terminated = config, terminated & config.terminations
        begins = F.pad(self.ends[:-1] + 1, (1, 0))
        # A chunk may start wherever n actions and a state follow, the last such place included.
        # If the task ended, it may also start in the last n - 1 steps; the rest is then padding.
        self.last_starts = self.ends - torch.where(self.terminated, 1, config.chunk)  # (K,)
        # (K,) starts in the trajectories up to this one, its own included
        self.starts_up_to = (self.last_starts - begins + 1).clamp(min=0).cumsum(0)
        self.total_starts = int(self.starts_up_to[-1])
        if not self.total_starts:
            raise MacError("the training or validation data have no trajectory with the "
                           f"{config.chunk} actions of a chunk: try a smaller --chunk")
        self.offsets = torch.arange(config.chunk, device=device)
        self.tolerance = torch.tensor(config.tolerance, device=device)
        weights = config.discount ** self.offsets
        self.reward_weights = weights / config.chunk if config.chunk_reward == "mean" else weights

    def start(self, pick):
        """State indices (B,) of the legal starts numbered `pick` (B,)."""
        k = torch.searchsorted(self.starts_up_to, pick, right=True)  # the trajectory picked
        return self.last_starts[k] - (self.starts_up_to[k] - 1 - pick)  # back from its last one

    def sample(self, batch_size, generator, step=0):
        """B chunks, uniform over all legal starts or, with --window, over those in a window, which
        moves through the data by its own length in 1,000 steps. -> Batch"""
        window, device = self.config.window or self.total_starts, self.ends.device
        first = torch.tensor([step * self.config.window // 1000 % self.total_starts], device=device)
        pick = torch.randint(min(window, self.total_starts), (batch_size,), generator=generator,
                             device=device)
        start = self.start((pick + first) % self.total_starts)
        return self.batch(start, generator, self.start(first) if self.config.window else 0)

    def batch(self, start, generator, first_state=0):
        """The chunks that begin at `start` (B,), with goals drawn by `generator`. -> Batch"""
        n, k = self.config.chunk, torch.searchsorted(self.ends, start)  # (B,) the trajectories
        last = self.ends[k]  # (B,)
        value_goal = self.sample_goals(start, last, self.config.value_goals, generator, first_state)
        actor_goal = self.sample_goals(start, last, self.config.actor_goals, generator, first_state)
        ahead = value_goal - start  # (B,)
        success = (ahead >= 0) & (ahead < n) & (value_goal <= last)  # (B,)
        rows = start[:, None] + self.offsets  # (B, n)
        valid = (rows < last[:, None]).float()  # (B, n)
        rows = torch.minimum(rows, last[:, None]).flatten()  # (B n,)
        actions = self.actions.index_select(0, rows)  # (B n, A); quicker than self.actions[rows]
        rewards = self.rewards.index_select(0, rows).view(valid.shape) * valid  # (B, n)
        valid = valid.repeat_interleave(actions.shape[1], 1)  # (B, D)
        states = torch.cat([start, torch.minimum(start + n, last), value_goal, actor_goal])
        states = self.observations.index_select(0, states).unflatten(0, (4, -1))  # (4, B, O)
        goal = states[2].index_select(1, self.columns)  # (B, G)
        if len(self.tolerance):
            off = (states[0].index_select(1, self.columns) - goal).abs()
            success = success | (off <= self.tolerance).all(1)
        return Batch(
            observation=states[0],
            chunk=actions.view(valid.shape).clamp(-1 + 1e-5, 1 - 1e-5) * valid,
            reward=(rewards * self.reward_weights).sum(1),
            next_observation=states[1],
            success=success.float(),
            value_goal=goal,
            actor_goal=states[3].index_select(1, self.columns),
            termination=(self.terminated[k] & (start + n >= last)).float(),
            valid=valid,
        )

    def sample_goals(self, start, last, odds, generator, first_state=0):
        """Indices (B,) of goal states. `odds` are of four kinds of goal: the state itself; the
        state k ~ Geom(1 - gamma) steps ahead, at most `last`; a uniformly drawn later state, at
        most `last`; any state of the data or window. `last` is the end of the trajectory."""
        kind, u, v = torch.rand(3, len(start), generator=generator, device=start.device)
        left = last - start
        geometric = (torch.log(u) / math.log(self.config.discount)).floor() + 1
        geometric = start + torch.minimum(geometric, left.float()).long()
        uniform = start + 1 + torch.minimum((v * left).long(), left - 1)
        count = len(self.observations)
        random = torch.randint(min(self.config.window or count, count), (len(start),),
                               generator=generator, device=start.device)
        random = (random + first_state) % count
        up_to_current, up_to_geometric, up_to_uniform, _ = np.cumsum(odds) / sum(odds)
        goal = torch.where(kind < up_to_uniform, uniform, random)
        goal = torch.where(kind < up_to_geometric, geometric, goal)
        return torch.where(kind < up_to_current, start, goal)


# -------------------------------------------------------------------------------- networks

class Normalizer(nn.Module):
    """Scales the data's minimum and maximum to (nearly) -1 and 1."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("middle", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))

    def fit(self, data):  # (rows, width)
        low, high = data.amin(0), data.amax(0)
        self.middle.copy_((low + high) / 2)
        self.scale.copy_((high - low) / 2 + 1e-3)  # as in the published code; never 0

    def forward(self, x, columns=slice(None)):
        """x (..., width); or (..., G), which holds only the `columns` (G,)."""
        return (x - self.middle[columns]) / self.scale[columns]


class MLP(nn.Module):
    """Four times Linear, GELU, LayerNorm, then Linear (A.1, Table 8). Inputs are broadcast to the
    same rows and concatenated. -> (..., outputs), or (...) if `outputs` is None."""

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
        rows = torch.broadcast_shapes(*(x.shape[:-1] for x in inputs))
        x = self.output(self.hidden(torch.cat([x.expand(*rows, -1) for x in inputs], -1)))
        return x.squeeze(-1) if self.scalar else x


class Outcome(MLP):
    """Predicts what a chunk brings, an output for each of `names`: ("reward",) (Eq. 6), ("reward",
    "termination") if tasks end in the data, or ("success",) (A.1). All but rewards are logits."""

    def __init__(self, inputs, names, width):
        super().__init__(inputs, len(names), width)
        self.names = names

    def loss(self, batch):
        """Squared error of the reward, cross-entropy of the others. -> {name: loss}"""
        outputs, losses = self(batch.observation, batch.chunk, batch.value_goal), {}
        for name, output in zip(self.names, outputs.unbind(-1)):
            loss = F.mse_loss if name == "reward" else F.binary_cross_entropy_with_logits
            losses[name] = loss(output, getattr(batch, name))
        return losses

    def predict(self, observation, chunk, goal):
        """-> reward (...), mask (...): 0 where the goal is met or the task ends, 1 elsewhere. With
        goals the reward is success - 1. A logit above 0 is p > 0.5."""
        output, *termination = self(observation, chunk, goal).unbind(-1)
        if "success" in self.names:
            success = (output > 0).float()
            return success - 1, 1 - success
        return output, (termination[0] <= 0).float() if termination else torch.ones_like(output)


# ----------------------------------------------------------------------------- behaviour policies

class Policy(nn.Module):
    """Subclasses define `loss(batch, generator)` -> {name: loss} and `decode(observation, goal,
    z)`: noise z (..., D) -> chunks in [-1, 1]. Rows broadcast: (B, 1, O), (B, 1, G), (B, N, D)."""

    def __init__(self, observation_size, goal_size, chunk_size, config):
        super().__init__()
        self.config, self.chunk_size = config, chunk_size

    def noise(self, observation, generator):
        """z (..., D) from N(0, I) for each row of observation (..., O)."""
        return torch.randn(*observation.shape[:-1], self.chunk_size, generator=generator,
                           device=observation.device, dtype=observation.dtype)


class FlowPolicy(Policy):
    """The behaviour policy: a flow of F steps (Eq. 7), distilled to a one-step network (Eq. 8)."""

    def __init__(self, observation_size, goal_size, chunk_size, config):
        super().__init__(observation_size, goal_size, chunk_size, config)
        inputs = observation_size + goal_size
        self.velocity = MLP(inputs + chunk_size + 1, chunk_size, config.width)
        self.one_step = MLP(inputs + chunk_size, chunk_size, config.width)
        self.center = MLP(inputs, chunk_size, config.width) if config.center else None

    def begin(self, observation, goal, z):
        """x_0 (..., D) from noise z; --center adds the chunk that `self.center` predicts."""
        x_0 = self.config.flow_noise * z
        return x_0 + self.center(observation, goal).detach() if self.center else x_0

    def flow(self, observation, goal, x_0, steps=None):
        """Follow the velocity from x_0 (..., D), u = 0, to u = 1 in F (or `steps`) Euler steps."""
        x, steps = x_0, steps or self.config.flow_steps
        for i in range(steps):
            u = torch.full_like(x[..., :1], i / steps)
            x = x + self.velocity(observation, goal, x, u) / steps
        return x.clamp(-1, 1)

    def flow_losses(self, batch, generator):
        """Eq. 7: fit the velocity at (1-u) x_0 + u a, u ~ U[0, 1], to a - x_0 (x_0, a: (B, D)).
        Padding has no error. With --center, `self.center` is fitted to a."""
        observation, goal, a, valid = batch.observation, batch.actor_goal, batch.chunk, batch.valid
        x_0 = self.begin(observation, goal, self.noise(observation, generator))
        u = torch.rand(len(a), 1, generator=generator, device=a.device, dtype=a.dtype)
        velocity = self.velocity(observation, goal, (1 - u) * x_0 + u * a, u)
        losses = {"flow": F.mse_loss(valid * velocity, valid * (a - x_0))}
        if self.center:
            losses["center"] = F.mse_loss(valid * self.center(observation, goal), valid * a)
        return losses

    def loss(self, batch, generator):
        """Eq. 7, and Eq. 8: fit one_step(x_0) to where the flow from x_0 ends, but at padding."""
        observation, goal = batch.observation, batch.actor_goal
        x_0 = self.begin(observation, goal, self.noise(observation, generator))
        with torch.no_grad():
            teacher = self.flow(observation, goal, x_0)
        chunk = self.one_step(observation, goal, x_0)
        return {**self.flow_losses(batch, generator),
                "distill": F.mse_loss(batch.valid * chunk, batch.valid * teacher)}

    def decode(self, observation, goal, z):
        x_0 = self.begin(observation, goal, z)
        if self.config.eval_flow and not self.training:  # the flow is more exact, and slower
            return self.flow(observation, goal, x_0)
        return self.one_step(observation, goal, x_0).clamp(-1, 1)


POLICIES = {"flow": FlowPolicy}  # --policy; add yours
AGENTS = {}  # --policy: a subclass of Agent, if it needs one


# ------------------------------------------------------------------------------- the agent

class Rollout(NamedTuple):
    """Imagined trajectories of H chunks, without gradient."""
    observations: torch.Tensor  # (H+1, B, O)
    chunks: torch.Tensor  # (H, B, D)
    rewards: torch.Tensor  # (H, B)
    masks: torch.Tensor  # (H, B) 0 where the goal is met or the task ends, 1 elsewhere
    goal: torch.Tensor  # (B, G) the same along a rollout


def returns(rewards, masks, final_value, chunk_discount):
    """Eq. 10, cut by masks m: R_k = r_k + gamma^n m_k R_{k+1}, R_H the value of the last state.
    (H, B), (H, B), (B,), gamma^n -> (H, B)"""
    value, result = final_value, []
    for reward, mask in zip(reversed(rewards), reversed(masks)):
        value = reward + chunk_discount * mask * value
        result.append(value)
    return torch.stack(result[::-1])


class Agent(nn.Module):
    """The networks of MAC and what they compute. Methods take normalised observations and goals
    unless they say "raw". `columns` lists the G coordinates of an observation that form a goal,
    none in reward-based tasks. `config.terminations` is off if the data have no terminations."""
    presets = {}  # settings that a subclass needs

    def __init__(self, observation_size, action_size, columns, config):
        super().__init__()
        self.config, self.sizes = config, (observation_size, action_size)
        self.chunk_discount = config.discount ** config.chunk
        goal_size, chunk_size = len(columns), config.chunk * action_size
        self.register_buffer("columns", torch.tensor(columns, dtype=torch.long))
        self.normalizer = Normalizer(observation_size)
        self.policy = POLICIES[config.policy](observation_size, goal_size, chunk_size, config)
        self.dynamics = MLP(observation_size + chunk_size, observation_size, config.width)
        inputs = observation_size + chunk_size + goal_size
        names = ("success",) if columns else ("reward", "termination")[:1 + config.terminations]
        self.outcome = Outcome(inputs, names, config.width)
        self.critic = MLP(inputs, None, config.width) if config.critic == "network" else None
        self.value = MLP(observation_size + goal_size, None, config.width)
        self.target_value = copy.deepcopy(self.value).requires_grad_(False)

    @property
    def device(self):
        return self.columns.device

    def normalize(self, batch):
        """A raw Batch, scaled."""
        return batch._replace(
            observation=self.normalizer(batch.observation),
            next_observation=self.normalizer(batch.next_observation),
            value_goal=self.normalizer(batch.value_goal, self.columns),
            actor_goal=self.normalizer(batch.actor_goal, self.columns))

    @torch.no_grad()
    def fill(self, batch, generator):
        """Replace padding by the policy's proposal: zeros would show that the task ends."""
        z = self.policy.noise(batch.observation, generator)
        proposal = self.policy.decode(batch.observation, batch.actor_goal, z)
        return batch._replace(chunk=torch.where(batch.valid == 1, batch.chunk, proposal))

    def next_observation(self, observation, chunk):
        """The model's s_{t+n} (Eq. 5): (..., O), (..., D) -> (..., O)"""
        return observation + self.dynamics(observation, chunk)

    def q_target(self, reward, mask, next_observation, goal):
        """The target of Q: r + gamma^n m V(s_{t+n}) (Eq. 11, cut by the mask m)."""
        return reward + self.chunk_discount * mask * self.value(next_observation, goal)

    def model_q(self, observation, chunk, goal):
        """`q_target` as the models predict it."""
        reward, mask = self.outcome.predict(observation, chunk, goal)
        return self.q_target(reward, mask, self.next_observation(observation, chunk), goal)

    def q(self, observation, chunk, goal):
        """Q of chunks (..., D): the critic's or, with `--critic model`, `model_q`."""
        return (self.critic or self.model_q)(observation, chunk, goal)

    def proposals(self, observation, goal, count, generator):
        """For each state N = `count` chunks of the policy, and their Q. -> (B, N, D), (B, N)"""
        count = self.config.eval_candidates if count is None else count
        if count < 1:
            raise ValueError(f"{count} candidates, where at least one is needed")
        observation, goal = observation[:, None], goal[:, None]  # (B, 1, O), (B, 1, G)
        z = self.policy.noise(observation.expand(-1, count, -1), generator)  # (B, N, D)
        chunks = self.policy.decode(observation, goal, z)
        return chunks, self.q(observation, chunks, goal)

    def best_of(self, observation, goal, count, generator):
        """Eq. 4: the one of N proposals that Q ranks first. (B, O), (B, G) -> (B, D)"""
        chunks, q = self.proposals(observation, goal, count, generator)
        return chunks.take_along_dim(q.argmax(1)[:, None, None], 1)[:, 0]

    @torch.no_grad()
    def imagine(self, observation, goal, generator, horizon=None, candidates=None):
        """Eq. 9: H chunks in the model from every observation (B, O) at once. Rollouts go on past a
        met goal or the task's end, but masks cut their returns there. -> Rollout"""
        observations, chunks, count = [observation], [], candidates or self.config.candidates
        for _ in range(horizon or self.config.horizon):
            chunks.append(self.best_of(observations[-1], goal, count, generator))
            observations.append(self.next_observation(observations[-1], chunks[-1]))
        observations, chunks = torch.stack(observations), torch.stack(chunks)
        rewards, masks = self.outcome.predict(observations[:-1], chunks, goal)  # (H, B)
        return Rollout(observations, chunks, rewards, masks, goal)

    def model_losses(self, batch):
        """Eq. 5, and Eq. 6 or success (A.1), on the batch's chunks."""
        prediction = self.next_observation(batch.observation, batch.chunk)
        return {"dynamics": F.mse_loss(prediction, batch.next_observation),
                **self.outcome.loss(batch)}

    def value_losses(self, rollout):
        """Eq. 10 for the H states at which chunks begin, Eq. 11 for each rollout's first chunk."""
        states, goal = rollout.observations, rollout.goal
        final = self.target_value(states[-1], goal)  # no gradient: `target_value` requires none
        target = returns(rollout.rewards, rollout.masks, final, self.chunk_discount)  # (H, B)
        losses = {"value": F.mse_loss(self.value(states[:-1], goal), target)}
        if self.critic:
            with torch.no_grad():
                target = self.q_target(rollout.rewards[0], rollout.masks[0], states[1], goal)
            q = self.critic(states[0], rollout.chunks[0], goal)  # (B,)
            losses["critic"] = F.mse_loss(q, target)
        return losses

    def losses(self, batch, generator, model_only=False):
        """-> the losses of a raw batch, whose sum is minimised, and the rollout. With `model_only`
        (the warmup) V and Q are left alone, and the rollout is None."""
        batch = self.normalize(batch)
        if self.config.terminations:
            batch = self.fill(batch, generator)
        losses = {**self.policy.loss(batch, generator), **self.model_losses(batch)}
        if model_only:
            return losses, None
        first = slice(self.config.rollout_batch_size or None)  # 0: the whole batch
        # Rollouts use value goals. The policy gets them too, but it was cloned with actor goals.
        rollout = self.imagine(batch.observation[first], batch.value_goal[first], generator)
        return {**losses, **self.value_losses(rollout)}, rollout

    def prepare(self, observation, goal=None):
        """A raw observation and its goal, or a batch of them, as `act` takes them.
        -> normalised tensors (B, O), (B, G) on the agent's device. Raises ValueError."""
        observation = data.as_batch("observation", observation, self.sizes[0]).to(self.device)
        goal = np.zeros((len(observation), 0)) if goal is None else goal
        goal = data.as_batch("goal", goal, len(self.columns), self.sizes[0]).to(self.device)
        if len(goal) != len(observation):
            raise ValueError(f"{len(goal)} goals for {len(observation)} observations")
        if goal.shape[1] != len(self.columns):
            goal = goal[:, self.columns]
        return self.normalizer(observation), self.normalizer(goal, self.columns)

    @torch.no_grad()
    def candidates(self, observation, goal=None, count=None, generator=None):
        """The N = `count` chunks (default `eval_candidates`) that `act` chooses from, and their Q,
        for raw observations and goals. -> arrays (B, N, n, A), (B, N). Raises ValueError."""
        chunks, q = self.proposals(*self.prepare(observation, goal), count, generator)
        return chunks.unflatten(-1, (self.config.chunk, -1)).cpu().numpy(), q.cpu().numpy()

    @torch.no_grad()
    def act(self, observation, goal=None, candidates=None, generator=None):
        """Choose chunks for raw observations (B, O) or (O,). Goals are (B, G), or (B, O), whose
        `columns` are taken, or None where G is 0. `candidates` is N, by default
        `eval_candidates`; 1 is cloning. -> (B, n, A) or (n, A) float32 array, in [-1, 1]. Raises
        ValueError for other shapes and for numbers that are not finite."""
        chunk = self.best_of(*self.prepare(observation, goal), candidates, generator)
        chunk = chunk.unflatten(-1, (self.config.chunk, -1)).cpu().numpy()
        return chunk[0] if np.ndim(observation) == 1 else chunk


def make_optimizer(agent):
    """One Adam for all networks. The step size is a tensor, so that a CUDA graph sees it change."""
    parameters = [p for p in agent.parameters() if p.requires_grad]
    rate = torch.tensor(agent.config.learning_rate, device=agent.device)
    return torch.optim.Adam(parameters, rate, fused=True, capturable=agent.device.type == "cuda")


def update(agent, optimizer, batch, generator, model_only=False):
    """One step of Algorithm 1. -> {name: loss}; after the warmup also the rollouts' reward"""
    losses, rollout = agent.losses(batch, generator, model_only)
    optimizer.zero_grad()
    sum(losses.values()).backward()
    devices.average_gradients(optimizer)  # with torchrun's other processes, if there are any
    with torch.no_grad():  # before V's step, as in the published code
        for target, value in zip(agent.target_value.parameters(), agent.value.parameters()):
            target.lerp_(value, agent.config.ema_rate)
    optimizer.step()
    metrics = {name: loss.detach() for name, loss in losses.items()}
    return metrics if model_only else {**metrics, "rollout_reward": rollout.rewards.mean()}


# --------------------------------------------------- training: the method itself ends here

class Training:
    """A training run. Validation and evaluation have random streams of their own."""

    def __init__(self, config, device, training, validation, columns):
        self.config, self.device = config, device
        torch.manual_seed(config.seed)
        # The agent's config has this process's share of a batch, and terminations only if data do.
        config = dataclasses.replace(
            config, terminations=config.terminations and bool(training.terminated.any()),
            **devices.share(batch_size=config.batch_size,
                            rollout_batch_size=config.rollout_batch_size))
        self.agent = AGENTS.get(config.policy, Agent)(
            training.observations.shape[1], training.actions.shape[1], columns, config)
        limits = training.observations if training.limits is None else training.limits
        self.agent.normalizer.fit(torch.as_tensor(limits))
        self.agent.to(device)
        place = devices.device_of_data(device, training, validation)
        self.dataset, self.validation = (ChunkDataset(trajectories, columns, config, place)
                                         for trajectories in (training, validation))
        self.optimizer = make_optimizer(self.agent)
        self.generators = devices.make_generators((config.seed, devices.RANK), place, device)
        self.warmup_steps = int(config.warmup * config.steps)
        self.step, self.saved, self.losses, self.logs = 0, 0, {}, None
        devices.choose_threads(self.validate, device)  # by the time that a validation takes

    def restore(self, checkpoint):
        """Continue from a checkpoint. A random stream whose device changed begins anew."""
        self.agent.load_state_dict(checkpoint["agent"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        group = self.optimizer.param_groups[0]  # its learning rate is still on the CPU
        group.update(capturable=self.device.type == "cuda", lr=group["lr"].to(self.device))
        mine = checkpoint["generators"][2 * devices.RANK:]  # two of each process
        for generator, saved in zip(self.generators, mine):
            if len(saved) == len(generator.get_state()):
                generator.set_state(saved)
        self.step = self.saved = checkpoint["step"]
        self.warmup_steps = checkpoint["warmup_steps"]
        say(f"resuming at step {self.step} of {self.config.steps}")

    def draw(self, generator):
        batch = self.dataset.sample(self.agent.config.batch_size, generator, self.step)
        return devices.to_device(batch, self.device)

    def make_step(self, model_only=False):
        """-> a function that draws a batch, updates (on a GPU by a CUDA graph), returns metrics"""
        batches, noise = self.generators

        def step(batch):
            return update(self.agent, self.optimizer, batch, noise, model_only)

        if self.device.type == "cuda":
            trial = self.draw(torch.Generator(batches.device))  # not from the run's stream
            step = devices.capture(step, trial, self.agent, self.optimizer, noise)
        return lambda: step(self.draw(batches))

    def due(self, interval):
        return interval and (self.step % interval == 0 or self.step == self.config.steps)

    def train(self, folder, world, facts, stop):
        """Save and evaluate if due, then update, until `config.steps` or a stop."""
        config, rate, phase = self.config, self.optimizer.param_groups[0]["lr"], None
        bar = console.Progress(total=config.steps, initial=self.step, smoothing=0.05,
                               unit=" steps", interval=math.inf, bar_format="step "
                               "{n_fmt}/{total_fmt}, {rate_fmt}, {remaining} left{postfix}")
        while True:
            evaluates = self.step > self.warmup_steps and self.due(config.eval_interval)
            if self.step > self.saved and (self.due(config.save_interval) or evaluates):
                self.save(folder, facts)
            if evaluates and world.tasks:
                self.evaluate(world, stop, config.eval_episodes, config.seed, config.execute,
                              config.eval_candidates, log=True)
            signum = max(devices.gathered(stop.signal))  # all processes stop after the same step
            if self.step == config.steps or signum:
                stop.signal = signum or stop.signal
                break
            model_only = self.step < self.warmup_steps
            if model_only != phase:
                phase, began, do_update = model_only, self.step, self.make_step(model_only)
            if config.decay:
                left = (config.steps - self.step) / (config.steps - self.warmup_steps)
                rate.fill_(config.learning_rate * min(1, left))
            self.losses = do_update()
            self.step += 1
            bar.update()
            if self.due(config.log_interval):
                self.log(bar)
            if bar.plain and (self.due(config.log_interval) or self.step == began + 10):
                say(str(bar))  # also after ten updates, to show this phase's speed
        bar.close()
        if self.step > self.saved:
            self.save(folder, facts)

    @torch.no_grad()
    def validate(self):
        """-> the losses of a fixed validation batch"""
        generators = devices.make_generators(0, self.validation.ends.device, self.device)
        batch = self.validation.sample(self.agent.config.batch_size, generators[0])
        return self.agent.losses(devices.to_device(batch, self.device), generators[1])[0]

    def log(self, bar):
        """A row of train.csv: losses (process 0's) of this step and of a fixed validation batch."""
        self.check_finite()
        if devices.RANK:
            return
        validation = devices.choose_threads(self.validate, self.device)
        now = {name: value.item() for name, value in self.losses.items()}
        row = {name: now.get(name, "") for name in (*validation, "rollout_reward")}
        row.update({f"val_{name}": value.item() for name, value in validation.items()})
        self.logs.add("train", [{"step": self.step, **row}])
        watched = [name for name in ("dynamics", "value", "critic") if name in now]
        bar.set_postfix_str(", ".join(f"{name} {now[name]:.3g}" for name in watched), refresh=False)

    def check_finite(self):
        """Raises MacError, status 3, if a loss or a parameter of any process is not finite."""
        values = {**self.losses, **dict(self.agent.named_parameters())}
        bad = [name for name in values if not values[name].isfinite().all()]
        if bad := sum(devices.gathered(bad), []):
            raise MacError(f"{bad[0]} is not finite at step {self.step}, the last checkpoint is of "
                           f"step {self.saved}; start anew with a smaller --learning-rate", 3)

    def evaluate(self, world, stop, count, seed, execute, candidates, log=False):
        """Process 0 plays `count` episodes of every task; --resume repeats it after a stop."""
        if devices.RANK:
            return
        results = episodes.play(world, self.agent.eval(), count, seed, execute, candidates,
                                stop=lambda: stop.signal)
        self.agent.train()
        if results is None:
            return
        table = episodes.summarize(results)
        say(f"step {self.step}: {episodes.headline(table['overall'])} "
            f"({table['overall']['episodes']} episodes, {execute} of each chunk executed, "
            f"N = {candidates})")
        if log:
            self.logs.add("eval", [{"step": self.step, "task": name, **row}
                                   for name, row in table.items()])

    def save(self, folder, facts):
        self.check_finite()
        generators = devices.gathered([generator.get_state() for generator in self.generators])
        if devices.RANK == 0:
            runs.save_checkpoint(folder, {
                "step": self.step, "warmup_steps": self.warmup_steps, "facts": facts,
                "config": dataclasses.asdict(self.config), "logs": self.logs.texts(),
                "agent": self.agent.state_dict(), "optimizer": self.optimizer.state_dict(),
                "generators": sum(generators, [])})
        self.saved = self.step


def train(config, folder, checkpoint=None):
    """Train in `folder` until `config.steps` or a signal. -> exit status. Raises MacError."""
    device = devices.set_up_device(config.device)
    world = find_world(config.env, config.goal, config.data)
    episodes.try_out(world, config.eval_interval > 0)
    goal_size = len(world.columns)
    if config.tolerance and not (goal_size and len(config.tolerance) in (1, goal_size)):
        raise MacError(f"--tolerance: this task has {goal_size} goal coordinates; give a number "
                       "for each, or one for all")
    if checkpoint:
        name, source = checkpoint["facts"]["data"], checkpoint["facts"]["source"]
    else:  # only process 0 looks: it may have to download or to collect
        name, source = devices.gathered(None if devices.RANK else world.find(config))[0]
    training, validation = world.data(name, config)
    # Facts of the data and the simulator. A run resumes only if they are the same.
    facts = {"sizes": [array.shape[1] for array in training[:2]], "columns": world.columns,
             "terminations": bool(training.terminated.any()), "box": world.box,
             "fingerprint": data.fingerprint(training), "data": name, "source": source}
    for fact, before in (checkpoint["facts"] if checkpoint else {}).items():
        if facts[fact] != before:
            raise MacError("the data or the simulator are not those of this run: the "
                           f"{fact} was {before} and is {facts[fact]}")
    description = json.dumps({**dataclasses.asdict(config), "facts": facts}, indent=2)
    say(description)
    run = Training(config, device, training, validation, world.columns)
    say(f"training on {device.type}, {torch.backends.cpu.get_cpu_capability()}")
    with runs.Stop(devices.PROCESSES) as stop:
        if checkpoint:
            with runs.must_fit(folder):
                run.restore(checkpoint)
        if devices.RANK == 0:
            run.logs = runs.Logs(folder, checkpoint and checkpoint["logs"], config.tensorboard)
            files.write(folder / "config.json", (description + "\n").encode())
        if not checkpoint:
            run.save(folder, facts)  # first, so that the folder of a run always holds a checkpoint
        run.train(folder, world, facts, stop)
        if config.small and config.eval_interval and world.tasks and not stop.signal:
            count = max(1, 50 // len(world.tasks))
            say(f"closing evaluations, each of {count * len(world.tasks)} episodes:")
            for candidates in sorted({1, config.eval_candidates}):  # N = 1 is cloning, to compare
                for execute in sorted({1, config.execute}):
                    run.evaluate(world, stop, count, config.seed + 1, execute, candidates)
        if stop.signal:
            say(f"stopped at step {run.step}; to go on, add --resume")
            return 128 + stop.signal
    say(f"trained {run.step} steps" + (f"; now: python eval.py {folder}" if world.tasks else ""))


def load(run, device="cpu"):
    """The agent of a run folder, with its `step` and the `facts` of `train`. Raises MacError."""
    checkpoint = runs.load_checkpoint(pathlib.Path(run))
    with runs.must_fit(run):
        config, facts = Config(**checkpoint["config"]), checkpoint["facts"]
        config = dataclasses.replace(config, terminations=config.terminations
                                     and facts["terminations"])
        agent = AGENTS.get(config.policy, Agent)(*facts["sizes"], facts["columns"], config)
        agent.load_state_dict(checkpoint["agent"])
        agent.step, agent.facts = checkpoint["step"], facts
    return agent.float().to(device).eval()  # float32, also if the default is float64


def benchmark(config, updates):
    """Time updates on random data of the environment's shape. -> dict, for one line of JSON"""
    device = devices.set_up_device(config.device)
    world = find_world(config.env, config.goal, config.data)
    states, actions = (torch.rand(20_000, size) * 2 - 1 for size in world.sizes)
    random = data.Trajectories(states, actions, torch.tensor([19_999]), -torch.ones(20_000),
                               torch.tensor([False]))
    run = Training(config, device, random, random, world.columns)
    batches, noise = run.generators
    return devices.benchmark(lambda: update(run.agent, run.optimizer, run.draw(batches), noise),
                             run.make_step(), device, updates)


# -------------------------------------------------------------------- presets, command line

# Tuned on two cores. V has few steps to learn: smaller discount and horizon, larger EMA rate.
# Rollouts in bad models are wasted: warmup. Coarse distillation: at test time the flow proposes.
SMALL = {"width": 256, "batch_size": 256, "rollout_batch_size": 64, "horizon": 5, "candidates": 4,
         "eval_candidates": 16, "flow_steps": 3, "eval_flow": True, "discount": 0.99,
         "ema_rate": 0.02, "learning_rate": 1e-3, "decay": True, "steps": 16_000, "warmup": 0.5,
         "execute": 10, "log_interval": 250, "eval_interval": 2000, "eval_episodes": 20,
         "save_interval": 2000}
# OGBench's scripts hardly ever miss a grasp, so their data show no corrections. Noisier scripts
# miss, and correct. In these tasks a critic has too few steps to learn how to rank proposals.
COMMON = {"collect_noise": 0.3, "critic": "model"}
# From smaller noise, for two cubes around a regressed chunk, a flow learns to aim in fewer steps.
AIM = {**COMMON, "flow_noise": 0.3, "learning_rate": 3e-3, "execute": 3}
CUBES = {**AIM, "warmup": 0.6, "horizon": 6, "value_goals": (0.1, 0.7, 0.2, 0.0)}
# Long tasks. With a discount of 0.99, pressing a button in scene costs more than it gains later.
LONG = {"discount": 0.995, "horizon": 10}
# One button of many is the right one: many candidates. V learns from goals that are near.
PUZZLE = {**AIM, "collect": 300, "steps": 24_000, "warmup": 0.4, "candidates": 16,
          "tolerance": (0.5,), "value_goals": (0.1, 0.8, 0.1, 0.0)}
SMALL_TASKS = {  # key: how the id begins
    "cube-single-play-v0": {**CUBES, "collect": 200, "steps": 15_000},
    "cube-double-play-v0": {**CUBES, "center": True, "collect": 1000, "steps": 50_000,
                            "eval_interval": 10_000, "eval_episodes": 10},
    "cube-double-play-singletask": {**AIM, **LONG, "center": True, "collect": 1000, "warmup": 0.6,
                                    "steps": 20_000, "learning_rate": 1e-2, "flow_steps": 5},
    # V is worth learning only when the policy aims well: a long warmup, a large learning rate.
    # Tolerances: the cube 2 cm (a task may begin 1 cm off), two buttons, the drawer, the window.
    "scene-play-v0": {**AIM, **LONG, "collect": 500, "steps": 64_000, "warmup": 0.7,
                      "learning_rate": 1e-2, "flow_steps": 5, "value_goals": (0.2, 0.35, 0.35, 0.1),
                      "tolerance": (0.2, 0.2, 0.2, 0.5, 0.5, 0.36, 0.3)},
    "scene-play-singletask": {**COMMON, **LONG, "collect": 300, "steps": 24_000},
    "puzzle-3x3-play-v0": {**PUZZLE, "flow_noise": 1.0, "critic": "network"},  # the paper's do, too
    "puzzle-4x4-play-v0": PUZZLE}


def settings(**given):
    """The Config of the settings given. What is not given comes from the `presets` of the policy's
    Agent, else from --small, else from the paper (Tables 6 to 8). Raises MacError."""
    if given.get("data"):
        given = {"env": "", **given, "data": str(console.home(given["data"], "--data").absolute())}
    asked = Config(**given)
    world, result = find_world(asked.env, asked.goal, asked.data), {}
    if world.goal_conditioned:
        result.update(batch_size=1024, width=1024, steps=2_000_000)
    if "puzzle-4x5" in asked.env:  # 20 buttons need more candidates; a smaller net pays for them
        result.update(candidates=32, width=256)
    if world.family == "puzzle":
        result["actor_goals"] = (0.0, 0.5, 0.0, 0.5)
    elif world.family in ("pointmaze", "antmaze", "humanoidmaze", "antsoccer"):
        result["actor_goals"] = (0.0, 0.0, 1.0, 0.0)
    if asked.small:
        result.update(SMALL, collect=100 if world.scripted else 0)
        for name, task in (SMALL_TASKS if asked.goal == "task" else {}).items():
            if asked.env.replace("-oraclerep", "").startswith(name):
                result.update(task)
    result.update(AGENTS.get(asked.policy, Agent).presets, **given)
    config = Config(**result)
    if config.policy not in POLICIES:
        raise MacError(f"--policy: there is no {config.policy!r} here, only {', '.join(POLICIES)}")
    if config.collect and not world.scripted:
        raise MacError(f"--collect: there is no scripted policy for {config.env!r}")
    return dataclasses.replace(config, execute=min(config.execute, config.chunk))


# What --resume may change; a new `device`, or `steps` with --decay, gives other final parameters.
MAY_CHANGE = {"steps", "device", "log_interval", "eval_interval", "save_interval",
              "eval_episodes", "data", "dataset_dir", "cache_dir", "save_dir", "tensorboard"}


def parse(argv):
    """-> the settings given as flags, --resume, --benchmark"""
    parser = console.Parser("mac.py", allow_abbrev=False, description="Train MAC (see README.md).")
    console.add_flags(parser, Config)
    parser.add_argument("--resume", action="store_true", help="continue a run in --save-dir")
    parser.add_argument("--benchmark", type=int, default=0, metavar="K", help="time K updates")
    given = vars(parser.parse_args(argv))
    return given, given.pop("resume"), given.pop("benchmark")


@console.command
@devices.together()
def main(argv):
    given, resume, updates = parse(argv)
    config = settings(**given)
    if updates:
        return say(json.dumps(benchmark(config, updates)))
    if config.tensorboard:
        console.optional("torch.utils.tensorboard", "--tensorboard")
    name = config.env or pathlib.Path(config.data).stem
    folder = console.home(config.save_dir or f"exp/{name}-seed{config.seed}", "--save-dir")
    with files.lock(folder) if devices.RANK == 0 else contextlib.nullcontext():
        exists = any(any(folder.glob(name)) for name in ("*.json", "*.csv", "checkpoint*.pt"))
        if exists and not resume:
            raise MacError(f"{folder} already holds a run: --resume it, or give another --save-dir")
        if not exists:
            return train(config, folder)
        checkpoint = runs.load_checkpoint(folder)
        with runs.must_fit(folder):
            config = settings(**{**checkpoint["config"], **given})
        for name, was in checkpoint["config"].items():
            if name not in MAY_CHANGE and was != (now := getattr(config, name)):
                raise MacError(f"{console.flag(name)}: this run has {was}, not {now}; use another "
                               "--save-dir")
        if config.steps < max(checkpoint["step"], checkpoint["warmup_steps"] + 1):
            raise MacError(f"--steps {config.steps}: this run is at step {checkpoint['step']}, and "
                           f"its warmup takes {checkpoint['warmup_steps']}")
        return train(config, folder, checkpoint)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that worker processes end, too
    sys.exit(main())

"""The paper's ablations (Tables 3 and 15). A policy of your own is made alike: a class, its name in
mac.POLICIES, and mac.main, which takes all flags of mac.py.

    python examples/ablations.py --policy gaussian --env … --small --save-dir exp/gaussian
    python eval.py exp/gaussian --with examples/ablations.py
"""
import dataclasses
import pathlib
import sys

import torch
from torch.distributions import Normal, TanhTransform, TransformedDistribution

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # where mac.py is
import mac


class OneStepPolicy(mac.FlowPolicy):
    """Table 15: flow matching alone, followed in a single Euler step. The paper says no more than
    that its one-step policy is trained by the flow matching loss."""

    def __init__(self, *sizes_and_config):
        super().__init__(*sizes_and_config)
        del self.one_step

    def loss(self, batch, generator):
        return self.flow_losses(batch, generator)

    def decode(self, observation, goal, z):
        return self.flow(observation, goal, self.begin(observation, goal, z), steps=1)


class GaussianPolicy(mac.Policy):
    """Table 3, "Gau": a = tanh(x), x ~ N(mu(s), sigma(s)^2), by maximum likelihood (Appendix A.1).
    That sigma is diagonal and bounded is this file's choice."""

    def __init__(self, observation_size, goal_size, chunk_size, config):
        super().__init__(observation_size, goal_size, chunk_size, config)
        self.network = mac.MLP(observation_size + goal_size, 2 * chunk_size, config.width)

    def moments(self, observation, goal):
        mean, log_std = self.network(observation, goal).chunk(2, -1)
        return mean, log_std.clamp(-5, 2)  # the usual range; keeps the likelihood bounded

    def loss(self, batch, generator):
        mean, log_std = self.moments(batch.observation, batch.actor_goal)
        # Not validated: that would wait for a GPU, and proposals at padding may not be in (-1, 1).
        normal = Normal(mean, log_std.exp(), validate_args=False)
        policy = TransformedDistribution(normal, TanhTransform(), validate_args=False)
        return {"likelihood": -(batch.valid * policy.log_prob(batch.valid * batch.chunk)).mean()}

    def decode(self, observation, goal, z):
        mean, log_std = self.moments(observation, goal)
        return torch.tanh(mean + log_std.exp() * z)


class FQLAgent(mac.Agent):
    """Table 3, "FQL": the one-step network also climbs Q by its gradient at the imagined states,
    with their goal; instead of that there is no rejection sampling: one candidate."""

    presets = {"candidates": 1, "eval_candidates": 1, "eval_flow": False, "critic": "network"}

    def losses(self, batch, generator, model_only=False):
        losses, rollout = super().losses(batch, generator, model_only)
        default = 0.3 if "cube-double" in self.config.env else 1.0  # Table 11
        losses["distill"] = (self.config.fql_alpha or default) * losses["distill"]
        if rollout is None:
            return losses, rollout
        states = rollout.observations[:-1]  # (H, B, O)
        chunk = self.policy.decode(states, rollout.goal, self.policy.noise(states, generator))
        # Q's gradient is to reach the chunk, not Q itself.
        fixed = {name: p.detach() for name, p in self.critic.named_parameters()}
        q = torch.func.functional_call(self.critic, fixed, (states, chunk, rollout.goal))
        # Divided by its own scale: alpha then weighs the same for any task's values.
        return {**losses, "actor": -q.mean() / q.abs().mean().detach()}, rollout


@dataclasses.dataclass(frozen=True)
class Config(mac.Config):
    fql_alpha: float = 0.0  # weight of distillation in --policy fql; 0: that of Table 11

    def __post_init__(self):
        super().__post_init__()
        if self.policy == "fql" and self.critic == "model":
            raise mac.MacError("--critic model: --policy fql climbs Q, a network")


mac.Config = Config  # with one flag more
mac.POLICIES.update(onestep=OneStepPolicy, gaussian=GaussianPolicy, fql=mac.FlowPolicy)
mac.AGENTS["fql"] = FQLAgent

if __name__ == "__main__":
    sys.exit(mac.main())

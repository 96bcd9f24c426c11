"""Changes of the reward that belong to a method rather than to a task."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from polopt.core.part import Part, part
from polopt.core.rollout import Rollout


@part("reward", "kl-penalty")
@dataclass(frozen=True)
class KLPenalty(Part):
    """step_reward_t -= beta * (log pi_old,t - log pi_ref,t): the KL to a frozen model inside the reward (k1, per step).

    Summed over a trajectory it is the sequence log-ratio, so R_i = r_i - beta * sum_t (...). Masked steps get 0.
    """

    beta: float = 0.05
    model: str = "ref"

    gives = frozenset({"step_reward"})

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"logp", f"logp/{self.model}"}) if self.beta else frozenset()

    def __call__(self, rollout: Rollout) -> Rollout:
        if "step_reward" not in rollout:
            rollout = rollout.with_columns(step={"step_reward": torch.zeros(rollout.n_steps, device=rollout.device)})
        if not self.beta:
            return rollout
        before = rollout["step_reward"]
        gap = torch.where(rollout.mask, rollout.logp - rollout[f"logp/{self.model}"], 0.0)
        return rollout.with_columns(step={"step_reward": before.to(gap) - self.beta * gap})


@part("reward", "clip")
@dataclass(frozen=True)
class ClipReward(Part):
    """r_i <- clip(r_i, low, high), before anything is subtracted from it."""

    low: float = -10.0
    high: float = 10.0

    needs = frozenset({"reward"})

    def __call__(self, rollout: Rollout) -> Rollout:
        return rollout.with_columns(trajectory={"reward": rollout.reward.clamp(self.low, self.high)})

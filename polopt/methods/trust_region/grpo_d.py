"""GRPO-D: dynamic KL, OThink-MR1 (Liu et al. 2025, arXiv:2503.16081).

beta(p) = b_mid - (b_mid - b_min) p / w for p <= w, else b_min + (b_max - b_min) (p - w) / (1 - w),
b_mid = (b_min + b_max) / 2, p the share of training that is over, w = 0.3: from the middle down, then up to the top;
R = R_acc + a R_format (`--reward.weights format=a`);  A_i = (R_i - mean_g) / (std_g + eps);
L = (1/M) sum_i (1/|o_i|) sum_t [ -min(rho_t A_i, clip(rho_t, 1 - low, 1 + high) A_i) + beta(p) k3_t ].

b_min = 0.04, b_max = 0.1 as in the paper's counting task (geometry: 0, 0.02), a = 1. Its text has beta start small and
grow; its formula, followed here, begins at b_mid. beta is set anew for every rollout. The clip range and the kind of
deviation, which the paper leaves open, are those of GRPO here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from polopt.core.errors import UsageError
from polopt.core.part import Part, part
from polopt.core.registry import method
from polopt.core.rollout import Rollout
from polopt.methods.base.grpo import grpo
from polopt.regularizers.kl import KL


@part("controller", "dynamic-kl")
@dataclass(frozen=True)
class DynamicKL(Part):
    """beta(p) from ``low`` and ``high``, [low, high], into ``coefficient``; p is the statistic ``progress`` in [0, 1].

    From (low + high) / 2 to low at p = ``turn``, then to high at p = 1. Raises UsageError for a turn outside (0, 1).
    """

    low: float = 0.04
    high: float = 0.1
    turn: float = 0.3
    coefficient: str = "regularizer.beta"

    def __post_init__(self) -> None:
        if not 0 < self.turn < 1:
            raise UsageError(f"dynamic-kl turns at a share of the training in (0, 1), got {self.turn}")

    def __call__(self, statistics: Mapping[str, float]) -> dict[str, float]:
        progress = statistics.get("progress", 0.0)
        if progress <= self.turn:
            beta = (self.low + self.high) / 2 - (self.high - self.low) / 2 * progress / self.turn
        else:
            beta = self.low + (self.high - self.low) * (progress - self.turn) / (1 - self.turn)
        return {self.coefficient: beta}


@part("reward", "weighted-rewards")
@dataclass(frozen=True)
class WeightedRewards(Part):
    """R = sum_k w_k r^k, [M], w_k from ``weights`` by name, 1 where they do not say; NaN where an r^k with w_k is."""

    weights: Mapping[str, float] = field(default_factory=dict)

    needs = frozenset({"reward/*"})

    def __call__(self, rollout: Rollout) -> Rollout:
        terms = [w * r for name, r in rollout.rewards.items() if (w := self.weights.get(name, 1.0))]
        if not terms:
            raise UsageError("weighted-rewards gives every reward the weight 0; leave one of them a weight")
        return rollout.with_columns(trajectory={"reward": torch.stack(terms).sum(0)})


grpo_d = method(
    "grpo-d",
    grpo,
    seed="205",
    paper="arXiv:2503.16081",
    task="worksheet",
    reward=WeightedRewards({"format": 1.0, "length": 0.0}),
    regularizer=KL(beta=0.07),
    controller=DynamicKL(),
)

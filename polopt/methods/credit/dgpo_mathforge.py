"""DGPO of MathForge: harder questions weigh more (Dai et al. 2026, "Harder Is Better", arXiv:2601.20614).

Question s with G rewards r_i and accuracy acc_s (mean of the correctness reward alone); B_v questions have spread:
DGAE: A_i = (r_i - mean_s) / MAD_s, MAD_s = (1/G) sum_j |r_j - mean_s|, so that sum_i |A_i| = G at every pass rate p
(GRPO: 2 G sqrt(p (1 - p)));  DQW: lambda_s = B_v exp(-acc_s / T) / sum_valid exp(-acc / T), over the whole batch;
L = (1/Z) sum_valid lambda_s sum_i sum_t l_it, Z their number of steps.

Questions without spread leave before the loss (filter): Z is the token mean's count. MQR, the data half, draws harder
versions of a question, where its column ``reformulations`` has some (`polopt.curricula.reformulations`). From the
official code: eps, and that a valid question of accuracy 0 counts as solved. `--weight.column` names the correctness.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.aggregations import TokenMean
from polopt.core.part import Part, part
from polopt.core.registry import method
from polopt.core.rollout import Rollout
from polopt.core.segments import segment_softmax, segment_sum
from polopt.curricula.reformulations import Reformulations
from polopt.methods.base.dapo import DynamicSampling
from polopt.methods.base.grpo import grpo


@part("advantage", "group-mad")
@dataclass(frozen=True)
class GroupMAD(Part):
    """A_i = n (R_i - mean_g) / (sum_j |R_j - mean_g| + eps), [M], n valid returns; equal or invalid ones give 0."""

    eps: float = 1e-4

    needs = frozenset({"reward"})

    def __call__(self, rollout: Rollout) -> Float[Tensor, " trajectory"]:
        centred = rollout.group_center(rollout.trajectory_return)
        total = segment_sum(centred.abs(), rollout.group, rollout.n_groups) + self.eps
        scale = rollout.group_count(rollout.trajectory_return) / torch.where(total > 0, total, 1.0)
        return scale[rollout.group] * centred


@part("weight", "difficulty")
@dataclass(frozen=True)
class Difficulty(Part):
    """lambda_s [M], 1 where the returns do not vary; acc_s the mean of ``column``, 1 where 0; ``temperature`` is T."""

    temperature: float = 2.0
    column: str = "score"

    unit = "batch"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"reward", self.column})

    def __call__(self, rollout: Rollout) -> Float[Tensor, " trajectory"]:
        valid = rollout.group_std(rollout.trajectory_return) > 0
        accuracy = rollout.group_mean(rollout[self.column])
        easiness = torch.where(accuracy == 0, 1.0, accuracy) / self.temperature
        share = segment_softmax(-easiness, torch.zeros_like(valid, dtype=torch.int64), 1, mask=valid)
        return torch.where(valid, valid.sum() * share, torch.ones_like(share))[rollout.group]


dgpo_mathforge = method(
    "dgpo-mathforge",
    grpo,
    seed="023",
    paper="arXiv:2601.20614",
    curriculum=Reformulations(),
    filter=DynamicSampling(column="reward", rounds=1),
    advantage=GroupMAD(),
    weight=Difficulty(),
    aggregation=TokenMean(),
)

"""Stratified GRPO: compare with trajectories of the same structure (Zhu et al. 2025, arXiv:2510.06214).

A group's trajectories fall into strata by structure, by default the number of environment answers (search or tool
calls) that they used. In R_i - mean_g = (R_i - mean_k) + (mean_k - mean_g) the second term, the cross-stratum bias,
says nothing about trajectory i within its stratum k.

A_SAN,i = (R_i - mean_k) / (std_k + eps), 0 in a stratum of one or of equal rewards;
A_GN,i = (R_i - mean_g) / (std_g + eps);  A_i = alpha A_SAN,i + (1 - alpha) A_GN,i.

With alpha = 1 every stratum sums to 0, so that nothing teaches which structure is better: only 1 - alpha does. In no
available source, settled here: alpha 0.8 (community code: 0.5 and 1), eps 1e-6, the population standard deviation
(which makes the abstract's unit variance in each stratum exact).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from polopt.core.errors import UsageError
from polopt.core.part import Part, part
from polopt.core.registry import method
from polopt.core.rollout import Rollout
from polopt.core.segments import segment_max
from polopt.methods.base.grpo import grpo
from polopt.rollouts.turns import Turns


@part("advantage", "stratified")
@dataclass(frozen=True)
class Stratified(Part):
    """A_i = alpha zscore_stratum(R_i) + (1 - alpha) zscore_group(R_i), [M]; an invalid return gives 0.

    Trajectories of a group with equal labels are a stratum. ``strata`` names the labels: a trajectory column, or a step
    column whose largest value over the trainable steps counts; those above ``cap`` are pooled with it. Raises
    UsageError for an alpha outside [0, 1].
    """

    alpha: float = 0.8
    strata: str = "turn"
    cap: int | None = None
    eps: float = 1e-6
    unbiased: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"alpha is {self.alpha}; it blends the two advantages and must lie in [0, 1]")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"reward", self.strata})

    def __call__(self, rollout: Rollout) -> Float[Tensor, " trajectory"]:
        label = self.labels(rollout) if self.cap is None else self.labels(rollout).clamp(max=self.cap)
        kinds, kind = torch.unique(label, return_inverse=True)
        strata = Rollout(rollout.lengths, rollout.group * len(kinds) + kind)
        within = strata.group_zscore(rollout.trajectory_return, eps=self.eps, unbiased=self.unbiased)
        overall = rollout.group_zscore(rollout.trajectory_return, eps=self.eps, unbiased=self.unbiased)
        return self.alpha * within + (1 - self.alpha) * overall

    def labels(self, rollout: Rollout) -> Shaped[Tensor, " trajectory"]:
        """The structural label of each trajectory, before pooling."""
        label = rollout[self.strata]
        if rollout.level(self.strata) == "step":
            return segment_max(label.float(), rollout.trajectory, len(rollout.lengths), mask=rollout.mask, empty=0.0)
        return label


stratified_grpo = method(
    "stratified-grpo",
    grpo,
    seed="162",
    paper="arXiv:2510.06214",
    rollout=Turns(environment="calculator"),
    advantage=Stratified(),
)

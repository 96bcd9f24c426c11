"""Likelihood of the best answer of a group, less a share of that of its worst."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from polopt.core.errors import UsageError
from polopt.core.loss import Evaluation, Loss, per_group
from polopt.core.part import Part, part
from polopt.core.rollout import Rollout
from polopt.core.segments import segment_max, segment_mean, segment_min


@part("objective", "best-of-n")
@dataclass(frozen=True)
class BestOfN(Part):
    """l_g = -log pi(y_b) + negative log pi(y_w), b and w the members of the group with the highest and lowest value.

    ``column`` [M] holds the values: a label, or a score. log pi(y) is the sum over the trainable steps; of several best
    (or worst) answers the mean. Where all values are equal these are the same answers. With ``negative`` 0 it imitates
    the best answer alone. Answers without a trainable step or with an invalid (NaN) value take no part; a group without
    others has the loss 0, and counts in the mean over groups. Raises UsageError for a ``negative`` outside [0, inf).
    """

    column: str = "label"
    negative: float = 0.0

    unit = "group"

    def __post_init__(self) -> None:
        if not 0 <= self.negative < math.inf:
            raise UsageError(f"best-of-n: negative must be at least 0, got {self.negative}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.column})

    def __call__(self, evaluation: Evaluation, rollout: Rollout) -> Loss:
        value, group, count = rollout[self.column].to(evaluation.logp), rollout.group, rollout.n_groups
        valid = (rollout.active_lengths > 0) & ~value.isnan()
        likelihood = rollout.sum_steps(evaluation.logp)

        def of(those: Bool[Tensor, " trajectory"]) -> Float[Tensor, " group"]:
            return segment_mean(likelihood, group, count, mask=those)

        best = of(valid & (value == segment_max(value, group, count, mask=valid)[group]))
        worst = of(valid & (value == segment_min(value, group, count, mask=valid)[group]))
        share = 1 / max(rollout.counts.groups, 1.0)
        metrics = {"logps__chosen": best.detach().sum() * share, "logps__rejected": worst.detach().sum() * share}
        return per_group(self.negative * worst - best if self.negative else -best, **metrics)

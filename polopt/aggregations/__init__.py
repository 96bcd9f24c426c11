"""From a loss per step to the loss of a batch; the counts are those of the whole batch, whatever piece is at hand."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from polopt.core.part import Part, part
from polopt.core.rollout import Rollout


@part("aggregation", "token-mean")
@dataclass(frozen=True)
class TokenMean(Part):
    """L = (1/N) sum_i sum_t l_it, N the trainable steps of the batch: every step weighs the same."""

    def __call__(self, losses: Float[Tensor, " step"], rollout: Rollout) -> Float[Tensor, ""]:
        return losses.sum() / max(rollout.counts.steps, 1.0)


@part("aggregation", "sequence-mean")
@dataclass(frozen=True)
class SequenceMean(Part):
    """L = (1/M) sum_i (1/|y_i|) sum_t l_it: every trajectory weighs the same, whatever its length."""

    unit = "trajectory"

    def __call__(self, losses: Float[Tensor, " step"], rollout: Rollout) -> Float[Tensor, ""]:
        # One weighted sum over all steps: cheaper than sums by trajectory, forward and backward.
        share = rollout.active_lengths.clamp_min(1).to(losses).reciprocal() / max(rollout.counts.trajectories, 1.0)
        return (rollout.kept(losses) * rollout.spread(share)).sum()


@part("aggregation", "sequence-sum")
@dataclass(frozen=True)
class SequenceSum(Part):
    """L = (1/M) sum_i sum_t l_it: with l = -A log pi, the gradient of the expected return."""

    def __call__(self, losses: Float[Tensor, " step"], rollout: Rollout) -> Float[Tensor, ""]:
        return losses.sum() / max(rollout.counts.trajectories, 1.0)


@part("aggregation", "fixed-length")
@dataclass(frozen=True)
class FixedLength(Part):
    """L = (1/M) sum_i (1/L_max) sum_t l_it, L_max a constant: ``length``, or the run's completion budget when None.

    Never the longest response of the batch, which would bring the length bias back. Liu et al. 2025, arXiv:2503.20783.
    """

    length: int | None = None

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"limit"}) if self.length is None else frozenset()

    def __call__(self, losses: Float[Tensor, " step"], rollout: Rollout) -> Float[Tensor, ""]:
        divisor = rollout.spread(rollout["limit"]) if self.length is None else self.length
        return (losses / divisor).sum() / max(rollout.counts.trajectories, 1.0)

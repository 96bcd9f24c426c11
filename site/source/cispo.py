"""CISPO: clipped importance-sampling weights (MiniMax 2025, MiniMax-M1, arXiv:2506.13585).

w_t = sg[clip(rho_t, floor, cap)];  L = -(1/N) sum_i sum_t w_t A_i log pi_t, A_i the group z-score.
The weight is bounded, not the gradient: every step keeps learning. The paper and verl write the cap as 1 + eps_high
and do not state its value; the default cap 5 is TRL's recommendation, with no lower bound. The loss value means
nothing, only its gradient does.
"""

from __future__ import annotations

from dataclasses import dataclass

from polopt.aggregations import TokenMean
from polopt.core.loss import Evaluation, Loss, per_step
from polopt.core.part import Part, part
from polopt.core.registry import method
from polopt.core.rollout import Rollout
from polopt.methods.base.grpo import grpo
from polopt.objectives.ratio import clip_metrics, log_ratio


@part("objective", "clipped-weight")
@dataclass(frozen=True)
class ClippedWeight(Part):
    """l_t = -sg[clip(rho_t, floor, cap)] A_t log pi(a_t); dl/dlogp_t = -clip(rho_t) A_t. arXiv:2506.13585, Eq. 4-5."""

    cap: float = 5.0
    floor: float = 0.0

    needs = frozenset({"logp", "advantage"})
    vanishes_with = "advantage"

    def __call__(self, evaluation: Evaluation, rollout: Rollout) -> Loss:
        ratio = log_ratio(evaluation, rollout).exp().detach()
        weight = ratio.clamp(self.floor, self.cap)
        metrics = clip_metrics(ratio, rollout.advantage, 1 - self.floor, self.cap - 1, rollout)
        return per_step(-weight * rollout.advantage * evaluation.logp, **metrics)


cispo = method(
    "cispo",
    grpo,
    seed="base",
    paper="arXiv:2506.13585",
    objective=ClippedWeight(),
    aggregation=TokenMean(),
)

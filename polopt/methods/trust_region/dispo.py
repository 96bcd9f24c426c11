"""DISPO: separate weight bounds for right and wrong responses (Karaman et al. 2026, arXiv:2602.00983).

w_t = sg[clip(rho_t, 1 - low+, 1 + high+)] where A_i > 0, sg[clip(rho_t, 1 - low-, 1 + high-)] where A_i < 0;
L = -(1/N) sum_i sum_t w_t A_i log pi_t, N = sum_i |y_i|, A_i the group z-score.
CISPO with a bound for each of four regimes. On right responses a weight above 1 explores (entropy rises), one below 1
distils (entropy falls); either wears the policy out where it is unbounded. On wrong ones weights above 1 unlearn
confident mistakes and small weights let go of what is unlikely already, so that tight bounds do harm: a bound says how
far the weight may go. "Right" is A > 0, which is the same for a right-or-wrong reward and a group z-score.

Neither code nor the full text of the paper was to be had: equation and bounds (right [0.8, 11], wrong [0, 101]) are
those of two descriptions that agree. The rest is DAPO's, to which the paper compares: its filter, its length penalty,
its 16 minibatches per rollout. A single step of weight near 100 can rule a batch; clip the gradient norm.
"""

from __future__ import annotations

from dataclasses import dataclass

from polopt.core.loss import Evaluation, Loss, per_step
from polopt.core.method import Schedule
from polopt.core.part import Part, part
from polopt.core.registry import method
from polopt.core.rollout import Rollout
from polopt.methods.base.dapo import dapo
from polopt.objectives.ratio import clip_by_sign, log_ratio


@part("objective", "decoupled-weight")
@dataclass(frozen=True)
class DecoupledWeight(Part):
    """l_t = -sg[w_t] A_t log pi(a_t), w_t the ratio within bounds that depend on the sign of A_t, as above.

    dl/dlogp_t = -w_t A_t: every step keeps a gradient. Logged are the shares of steps whose weight is at a bound.
    arXiv:2602.00983.
    """

    positive_low: float = 0.2
    positive_high: float = 10.0
    negative_low: float = 1.0
    negative_high: float = 100.0

    needs = frozenset({"logp", "advantage"})
    vanishes_with = "advantage"

    def __call__(self, evaluation: Evaluation, rollout: Rollout) -> Loss:
        ratio = log_ratio(evaluation, rollout).exp().detach()
        weight = clip_by_sign(
            ratio,
            rollout.advantage,
            (1 - self.positive_low, 1 + self.positive_high),
            (1 - self.negative_low, 1 + self.negative_high),
        )
        return per_step(
            -weight * rollout.advantage * evaluation.logp,
            clip_ratio__low_mean=rollout.batch_mean((weight > ratio).to(ratio)),
            clip_ratio__high_mean=rollout.batch_mean((weight < ratio).to(ratio)),
        )


dispo = method(
    "dispo",
    dapo,
    seed="074",
    paper="arXiv:2602.00983",
    objective=DecoupledWeight(),
    schedule=Schedule(minibatches=16),
)

"""TOPR: tapered off-policy REINFORCE (Le Roux et al. 2025, arXiv:2503.14286).

Off-policy, log pi of a negative response falls without end, and a clip stops most gradients. TOPR reinforces positives
as in supervised learning, and lets go of a negative as far as the policy no longer produces it:
w_i = sg[clip(rho_i, 1, 1)] if R_i >= 0, sg[clip(rho_i, 0, 1)] if R_i < 0;    rho_i = pi(y_i) / mu(y_i), R_i = +-1 - c
L = -(1/M) sum_i w_i R_i (1/|y_i|) sum_t log pi_t, mu the policy that generated the data; the theory has no 1/|y_i|.
The baseline c acts as a choice of data: of a share p of positives, p(1 - c) / (p(1 - c) + (1 - p)(1 + c)) is left, best
at 0.1 to 0.2. There is no code by the authors; one epoch of 16 minibatches stands for theirs over a data set. Variants
elsewhere with a geometric mean, a ratio per token or group-normalised advantages are other methods.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.core.loss import Evaluation, Loss, per_step
from polopt.core.method import Schedule
from polopt.core.part import Part, part
from polopt.core.registry import method
from polopt.core.rollout import Rollout
from polopt.methods.base.grpo import grpo
from polopt.objectives.ratio import MAX_LOG_RATIO, clip_by_sign


@part("advantage", "signed-reward")
@dataclass(frozen=True)
class SignedReward(Part):
    """A_i = r_i - baseline, [M]; r_i is 1 for a return above ``threshold``, else -1 (None: the return); invalid: 0."""

    baseline: float = 0.0
    threshold: float | None = 0.5

    needs = frozenset({"reward"})

    def __call__(self, rollout: Rollout) -> Float[Tensor, " trajectory"]:
        given = rollout.trajectory_return
        signed = given if self.threshold is None else 2 * (given > self.threshold).to(given) - 1
        return torch.where(given.isnan(), 0.0, signed - self.baseline)


@part("objective", "tapered-reinforce")
@dataclass(frozen=True)
class TaperedReinforce(Part):
    """l_t = -sg[w_i] A_i log pi(a_t), w_i = clip(rho_i, a+, b+) if A_i >= 0, clip(rho_i, a-, b-) if A_i < 0.

    (a+, b+), (a-, b-) are ``positive`` and ``negative``: (1, 1), (0, 0) learns from positives only, twice (1, 1) is
    REINFORCE without correction, twice (0, inf) importance-weighted, twice (0, 1) truncated. arXiv:2503.14286, Eq. 7.
    """

    positive: tuple[float, float] = (1.0, 1.0)
    negative: tuple[float, float] = (0.0, 1.0)

    needs = frozenset({"logp", "advantage"})
    unit = "trajectory"
    vanishes_with = "advantage"

    def __call__(self, evaluation: Evaluation, rollout: Rollout) -> Loss:
        gap = rollout.sum_steps(evaluation.logp.detach() - rollout.logp)
        # Bounded above only: a negative that the policy has forgotten must lose all of its weight.
        ratio = rollout.spread(gap.clamp(max=MAX_LOG_RATIO).exp())
        weight = clip_by_sign(ratio, rollout.advantage, self.positive, self.negative)
        return per_step(-weight * rollout.advantage * evaluation.logp, weight__mean=rollout.batch_mean(weight))


topr = method(
    "topr",
    grpo,
    seed="207",
    paper="arXiv:2503.14286",
    advantage=SignedReward(),
    objective=TaperedReinforce(),
    schedule=Schedule(minibatches=16),
)

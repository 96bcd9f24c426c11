"""RLOO: REINFORCE on whole responses with a leave-one-out baseline (Ahmadian et al. 2024, arXiv:2402.14740).

R_i = r_i - beta * sum_t (log pi_old,t - log pi_ref,t);  A_i = R_i - mean of the other members of its group;
rho_i = exp(sum_t (log pi_t - log pi_old,t));
L = -(1/M) sum_i min(rho_i A_i, clip(rho_i, 1 - low, 1 + high) A_i).
A response is one action: the ratio is the product over its steps. Defaults of TRL's trainer (beta 0.05, clip 0.2);
the leave-one-out estimator is Kool et al. 2019.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from polopt.advantages.group import LeaveOneOut
from polopt.core.loss import Evaluation, Loss, per_trajectory
from polopt.core.part import Part, part
from polopt.core.registry import method
from polopt.core.rollout import Rollout
from polopt.methods.base.reinforce import reinforce
from polopt.objectives.ratio import MAX_LOG_RATIO, clip_metrics
from polopt.rewards.shaping import KLPenalty


@part("objective", "sequence-surrogate")
@dataclass(frozen=True)
class SequenceSurrogate(Part):
    """l_i = -min(rho_i A_i, clip(rho_i, 1 - low, 1 + high) A_i), rho_i = exp(sum_t (log pi_t - log pi_old,t)), [M].

    A_i is the mean advantage of the trajectory's steps. dl_i/dlogp_t = -rho_i A_i on every step of an unclipped
    trajectory, else 0.
    """

    low: float = 0.2
    high: float = 0.2

    needs = frozenset({"logp", "advantage"})
    unit = "trajectory"
    vanishes_with = "advantage"

    def __call__(self, evaluation: Evaluation, rollout: Rollout) -> Loss:
        advantage = rollout.mean_steps(rollout.advantage)
        gap = torch.where(rollout.mask, evaluation.logp - rollout.logp, 0.0)
        ratio = rollout.sum_steps(gap).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        gain = torch.minimum(ratio * advantage, ratio.clamp(1 - self.low, 1 + self.high) * advantage)
        metrics = clip_metrics(rollout.spread(ratio.detach()), rollout.advantage, self.low, self.high, rollout)
        return per_trajectory(-gain, **metrics)


rloo = method(
    "rloo",
    reinforce,
    seed="base",
    paper="arXiv:2402.14740",
    reward=KLPenalty(beta=0.05),
    advantage=LeaveOneOut(),
    objective=SequenceSurrogate(),
)

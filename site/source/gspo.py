"""GSPO: group sequence policy optimisation (Zheng et al. 2025, arXiv:2507.18071).

s_i = exp((1/|y_i|) sum_t (log pi_t - log pi_old,t));
L = -(1/M) sum_i min(s_i A_i, clip(s_i, 1 - low, 1 + high) A_i), A_i the group z-score.
The bounds (3e-4, 4e-4) are far below those of a step's ratio because s_i concentrates near 1; a large clipped share is
normal. Four minibatches per rollout as in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from polopt.core.loss import Evaluation, Loss, per_step
from polopt.core.method import Schedule
from polopt.core.part import Part, part
from polopt.core.registry import method
from polopt.core.rollout import Rollout
from polopt.methods.base.grpo import grpo
from polopt.objectives.ratio import MAX_LOG_RATIO, clip_metrics


@part("objective", "geometric-sequence-surrogate")
@dataclass(frozen=True)
class GeometricSequenceSurrogate(Part):
    """l_t = -min(s_t A_t, clip(s_t, 1 - low, 1 + high) A_t), s_t = sg[s_i] * pi(a_t) / sg[pi(a_t)].

    Every step carries the value s_i and the gradient s_i dlogp_t, so that with a constant advantage and the mean over
    steps then trajectories it equals the sequence form, and advantages per step are allowed. arXiv:2507.18071.
    """

    low: float = 3e-4
    high: float = 4e-4

    needs = frozenset({"logp", "advantage"})
    unit = "trajectory"
    vanishes_with = "advantage"

    def __call__(self, evaluation: Evaluation, rollout: Rollout) -> Loss:
        advantage = rollout.advantage
        logp = evaluation.logp
        gap = rollout.mean_steps(torch.where(rollout.mask, logp.detach() - rollout.logp, 0.0))
        sequence_ratio = rollout.spread(gap.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp())
        ratio = sequence_ratio * torch.where(rollout.mask, logp - logp.detach(), 0.0).exp()
        gain = torch.minimum(ratio * advantage, ratio.clamp(1 - self.low, 1 + self.high) * advantage)
        return per_step(-gain, **clip_metrics(sequence_ratio, advantage, self.low, self.high, rollout))


gspo = method(
    "gspo",
    grpo,
    seed="base",
    paper="arXiv:2507.18071",
    objective=GeometricSequenceSurrogate(),
    schedule=Schedule(minibatches=4),
)

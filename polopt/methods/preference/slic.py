"""SLiC-HF: sequence likelihood calibration with human feedback (Zhao et al. 2023, arXiv:2305.10425).

L = mean over pairs of max(0, delta - log pi(w) + log pi(l)) - lambda log pi(w),
log pi(y) the sum over steps; no reference. The hinge stops pushing where the winner leads by the margin delta, the
cross-entropy of the winner stands for a KL penalty. delta = 1, lambda = 0.1. The hinge of DPO's implicit rewards is
`--objective hinge` on dpo.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.core.part import part
from polopt.core.registry import method
from polopt.methods.preference.dpo import dpo
from polopt.objectives.preference import Sides, WithoutReference


@part("objective", "slic")
@dataclass(frozen=True)
class SLiC(WithoutReference):
    """l = max(0, margin - beta (log pi(w) - log pi(l))) - nll log pi(w). arXiv:2305.10425, Eq. 1 and section 3.

    ``per_step`` takes log-probs per step, |y| being the number of steps, in both terms.
    """

    beta: float = 1.0
    margin: float = 1.0
    nll: float = 0.1
    per_step: bool = False

    def score(
        self, ratio: Float[Tensor, " trajectory"], length: Float[Tensor, " trajectory"]
    ) -> Float[Tensor, " trajectory"]:
        return ratio / length if self.per_step else ratio

    def terms(self, score: Sides) -> Float[Tensor, " pair"]:
        return torch.relu(self.margin - self.beta * score.gap) - self.nll * score.winner


slic = method("slic", dpo, seed="base", paper="arXiv:2305.10425", objective=SLiC(), models={})

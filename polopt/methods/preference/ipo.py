"""IPO: identity preference optimisation (Azar et al. 2023, arXiv:2310.12036).

Where preferences are certain, DPO's gap h grows without bound and the reference no longer holds the policy. IPO
maximises P(win) itself under the same KL, which regresses the gap on a finite target:
L = mean over pairs of (h - 1 / (2 tau))^2,  h = s_w / |w| - s_l / |l|,
tau being ``beta``. s are sums of log-ratios to the reference; the paper writes h without the lengths, the form of its
theory (`--objective.per-step false`), the authors' results are with them (a note in TRL).
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from polopt.core.part import part
from polopt.core.registry import method
from polopt.methods.preference.dpo import dpo
from polopt.objectives.preference import DivergenceLoss, Sides


@part("objective", "ipo")
@dataclass(frozen=True)
class IPO(DivergenceLoss):
    """l = (h - 1 / (2 beta))^2, h the gap of log-ratios per step, or of sums. arXiv:2310.12036, Eq. 17."""

    per_step: bool = True

    def score(
        self, ratio: Float[Tensor, " trajectory"], length: Float[Tensor, " trajectory"]
    ) -> Float[Tensor, " trajectory"]:
        made = super().score(ratio, length)
        return made / length if self.per_step else made

    def terms(self, score: Sides) -> Float[Tensor, " pair"]:
        return (score.gap - 0.5 / self.beta).square()


ipo = method("ipo", dpo, seed="base", paper="arXiv:2310.12036", objective=IPO())

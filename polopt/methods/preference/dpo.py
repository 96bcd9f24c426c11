"""DPO: direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290).

The optimum of E[r] - beta KL(pi || pi_ref) is pi* ~ pi_ref exp(r / beta), so that r = beta log pi*/pi_ref + const: the
Bradley-Terry likelihood of preferences is a loss of the policy alone. For a winner w and a loser l of one prompt
h = s_w - s_l,  s_i = sum_t log pi(a_t) - log pi_ref(a_t);
L = mean over pairs of -(1 - eps) log sigma(beta h) - eps log sigma(-beta h).
Every step of a winner has the gradient -beta sigma(-beta h), every step of a loser its opposite (eps = 0). eps is the
label smoothing of conservative DPO (Mitchell 2023, ericmitchell.ai/cdpo.pdf).
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from polopt.aggregations import TokenMean
from polopt.core.part import part
from polopt.core.registry import method
from polopt.curricula.uniform import Uniform
from polopt.models import Snapshot
from polopt.objectives.preference import DivergenceLoss, Sides, check_smoothing, smoothed
from polopt.rollouts.dataset import Dataset
from polopt.updates.gradient_step import GradientStep


@part("objective", "dpo")
@dataclass(frozen=True)
class DPO(DivergenceLoss):
    """l_wl = -(1 - eps) log sigma(beta h) - eps log sigma(-beta h), h = g(s_w) - g(s_l), g = s for the reverse KL.

    eps is ``label_smoothing``, the probability that a label is wrong, in [0, 1/2]. arXiv:2305.18290, Eq. 7.
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_smoothing(self.name, self.label_smoothing)

    def terms(self, score: Sides) -> Float[Tensor, " pair"]:
        return smoothed(self.beta * score.gap, self.label_smoothing)


dpo = method(
    "dpo",
    seed="208",
    paper="arXiv:2305.18290",
    curriculum=Uniform(),
    rollout=Dataset(),
    objective=DPO(),
    aggregation=TokenMean(),
    models={"ref": Snapshot()},
    update=GradientStep(),
)

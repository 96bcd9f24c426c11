"""CPO: contrastive preference optimisation (Xu et al. 2024, arXiv:2401.08417).

DPO with a uniform reference, which needs no forward pass of its own, and behaviour cloning of the winner for an anchor:
L = mean over pairs of -log sigma(beta (log pi(w) - log pi(l))) + alpha NLL,
log pi(y) the sum over steps, NLL the mean of -log pi over all steps of the winners of the batch (TRL's and the authors'
code; the paper's -log pi(w) is `--objective.cpo.sequence-nll 1 --objective.sft.coefficient 0`). alpha = 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from polopt.core.part import part
from polopt.core.registry import method
from polopt.methods.preference.dpo import dpo
from polopt.objectives.pair_losses import ChosenNLL
from polopt.objectives.preference import Sides, WithoutReference, check_smoothing, smoothed


@part("objective", "cpo")
@dataclass(frozen=True)
class CPO(WithoutReference):
    """l = -(1 - eps) log sigma(beta h) - eps log sigma(-beta h) - sequence_nll log pi(w), h = log pi(w) - log pi(l).

    eps is ``label_smoothing``, in [0, 1/2]. arXiv:2401.08417, Eq. 3 and 5.
    """

    label_smoothing: float = 0.0
    sequence_nll: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_smoothing(self.name, self.label_smoothing)

    def terms(self, score: Sides) -> Float[Tensor, " pair"]:
        return smoothed(self.beta * score.gap, self.label_smoothing) - self.sequence_nll * score.winner


cpo = method("cpo", dpo, seed="base", paper="arXiv:2401.08417", objective=CPO() + ChosenNLL(), models={})

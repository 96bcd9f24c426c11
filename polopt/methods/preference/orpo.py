"""ORPO: monolithic preference optimisation without a reference model (Hong et al. 2024, arXiv:2403.07691).

Supervised learning of the winner raises the loser too; a penalty on the odds keeps it down. With m_i the mean log-prob
of an answer per step and o_i = m_i - log(1 - exp(m_i)) its log-odds,
L = NLL - lambda mean over pairs of log sigma(o_w - o_l),
NLL the mean of -log pi over all steps of the winners (TRL adds those of their prompts, which are no actions here; the
paper's mean of -m_w is `--objective.orpo.sequence-nll 1 --objective.sft.coefficient 0`). lambda, ``beta``, is 0.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from polopt.core.part import part
from polopt.core.registry import method
from polopt.methods.preference.dpo import dpo
from polopt.objectives.pair_losses import ChosenNLL
from polopt.objectives.preference import Sides, WithoutReference


@part("objective", "orpo")
@dataclass(frozen=True)
class ORPO(WithoutReference):
    """l = -beta log sigma(o_w - o_l) - sequence_nll m_w, o = m - log(1 - exp(m)). arXiv:2403.07691, Eq. 4, 6 and 7.

    An answer that is certain (m = 0) counts as of mean log-prob ``-smallest``, where its odds are still finite.
    """

    sequence_nll: float = 0.0
    smallest: float = 1e-7

    def score(
        self, ratio: Float[Tensor, " trajectory"], length: Float[Tensor, " trajectory"]
    ) -> Float[Tensor, " trajectory"]:
        return ratio / length

    def terms(self, score: Sides) -> Float[Tensor, " pair"]:
        odds = self._log_odds(score.winner) - self._log_odds(score.loser)
        return -self.beta * F.logsigmoid(odds) - self.sequence_nll * score.winner

    def _log_odds(self, mean: Float[Tensor, " pair"]) -> Float[Tensor, " pair"]:
        mean = mean.clamp(max=-self.smallest)
        # Each form only where it keeps its digits, and where no infinity of the other can reach the gradient.
        near, far = mean.clamp(min=-math.log(2)), mean.clamp(max=-math.log(2))
        rest = torch.where(mean > -math.log(2), (-near.expm1()).log(), (-far.exp()).log1p())
        return mean - rest


orpo = method("orpo", dpo, seed="base", paper="arXiv:2403.07691", objective=ORPO() + ChosenNLL(), models={})

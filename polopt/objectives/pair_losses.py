"""Further losses of pairs that share DPO's implicit reward: one term each, for ``--objective NAME``.

h = s_w - s_l with s the sum of log-ratios to the reference over an answer's steps (`polopt.objectives.preference`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from polopt.core.errors import UsageError
from polopt.core.loss import Evaluation, Loss, per_step, total
from polopt.core.part import Part, part
from polopt.core.rollout import Rollout
from polopt.objectives.preference import (
    DivergenceLoss,
    PairLoss,
    Pairs,
    Sides,
    check_smoothing,
    pair_metrics,
    smoothed,
)


@part("objective", "hinge")
@dataclass(frozen=True)
class Hinge(DivergenceLoss):
    """l = max(0, 1 - beta h): the hinge-norm loss of RSO (Liu et al. 2023, arXiv:2309.06657, Eq. 9)."""

    def terms(self, score: Sides) -> Float[Tensor, " pair"]:
        return torch.relu(1 - self.beta * score.gap)


@part("objective", "sigmoid-norm")
@dataclass(frozen=True)
class SigmoidNorm(DivergenceLoss):
    """l = -log sigma(beta (s_w / |w| - s_l / |l|)): DPO of log-ratios per step.

    Length-normalised DPO of Tulu 3 (Lambert et al. 2024, arXiv:2411.15124, section 5.1.1).
    """

    def score(
        self, ratio: Float[Tensor, " trajectory"], length: Float[Tensor, " trajectory"]
    ) -> Float[Tensor, " trajectory"]:
        return super().score(ratio, length) / length

    def terms(self, score: Sides) -> Float[Tensor, " pair"]:
        return smoothed(self.beta * score.gap, 0.0)


@part("objective", "exo-pair")
@dataclass(frozen=True)
class ExoPair(DivergenceLoss):
    """l = KL(q || p), q = (sigma(beta h), sigma(-beta h)), p = (1 - eps, eps) the labels' own distribution.

    Efficient exact optimisation for two answers (Ji et al. 2024, arXiv:2402.00856, Eq. 16). eps is
    ``label_smoothing``, in (0, 1/2].
    """

    label_smoothing: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_smoothing(self.name, self.label_smoothing)
        if not self.label_smoothing:
            raise UsageError("exo-pair: label_smoothing must be above 0, the loss of a certain label is infinite")

    def terms(self, score: Sides) -> Float[Tensor, " pair"]:
        gap, wrong = self.beta * score.gap, self.label_smoothing
        won, lost = F.logsigmoid(gap), F.logsigmoid(-gap)
        return won.exp() * (won - math.log1p(-wrong)) + lost.exp() * (lost - math.log(wrong))


@part("objective", "nca-pair")
@dataclass(frozen=True)
class NcaPair(PairLoss):
    """l = -log sigma(beta s_w) - (log sigma(-beta s_w) + log sigma(-beta s_l)) / 2.

    Noise-contrastive alignment of two answers (Chen et al. 2024, arXiv:2402.05369, Eq. 12).
    """

    def terms(self, score: Sides) -> Float[Tensor, " pair"]:
        won, lost = self.beta * score.winner, self.beta * score.loser
        return -F.logsigmoid(won) - 0.5 * (F.logsigmoid(-won) + F.logsigmoid(-lost))


@part("objective", "bco-pair")
@dataclass(frozen=True)
class BcoPair(PairLoss):
    """l = -log sigma(beta s_w) - log sigma(-beta s_l): a classifier of each answer by itself, without BCO's shift.

    Binary classifier optimisation (Jung et al. 2024, arXiv:2404.04656).
    """

    def terms(self, score: Sides) -> Float[Tensor, " pair"]:
        return -F.logsigmoid(self.beta * score.winner) - F.logsigmoid(-self.beta * score.loser)


@part("objective", "sppo-hard")
@dataclass(frozen=True)
class SppoHard(PairLoss):
    """l = (s_w - 1/(2 beta))^2 + (s_l + 1/(2 beta))^2: P(win) is 1 for the winner and 0 for the loser.

    Self-play preference optimisation with hard labels (Wu et al. 2024, arXiv:2405.00675, Eq. 4.7).
    """

    def terms(self, score: Sides) -> Float[Tensor, " pair"]:
        target = 0.5 / self.beta
        return (score.winner - target).square() + (score.loser + target).square()


@part("objective", "apo-zero")
@dataclass(frozen=True)
class ApoZero(PairLoss):
    """l = 1 - sigma(beta s_w) + sigma(beta s_l), for winners better than what the policy writes.

    Anchored preference optimisation (D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 7).
    """

    def terms(self, score: Sides) -> Float[Tensor, " pair"]:
        return torch.sigmoid(-self.beta * score.winner) + torch.sigmoid(self.beta * score.loser)


@part("objective", "apo-down")
@dataclass(frozen=True)
class ApoDown(PairLoss):
    """l = sigma(beta s_w) + 1 - sigma(beta h), for winners worse than what the policy writes.

    Anchored preference optimisation (D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 8).
    """

    def terms(self, score: Sides) -> Float[Tensor, " pair"]:
        return torch.sigmoid(self.beta * score.winner) + torch.sigmoid(-self.beta * score.gap)


@part("objective", "discopop")
@dataclass(frozen=True)
class DiscoPop(DivergenceLoss):
    """l = (1 - m) (-log sigma(x)) + m exp(-x), x = beta h, m = sigma(x / tau): the log-ratio modulated loss.

    Found by search (Lu et al. 2024, arXiv:2406.08414, Eq. 5); tau = 0.05 there.
    """

    tau: float = 0.05

    def terms(self, score: Sides) -> Float[Tensor, " pair"]:
        gap = self.beta * score.gap
        modulation = torch.sigmoid(gap / self.tau)
        return -F.logsigmoid(gap) * (1 - modulation) + torch.exp(-gap) * modulation


@part("objective", "aot")
@dataclass(frozen=True)
class Aot(PairLoss):
    """l_k = -log sigma(beta (a_(k) - b_(k))), a the gaps log pi(w) - log pi(l), b the reference's, both sorted.

    The k-th smallest gap of the policy is compared with the k-th smallest of the reference over all P pairs of the
    batch: first-order stochastic dominance by optimal transport (Melnyk et al. 2024, arXiv:2406.05882, paired). Mean
    over the pairs of the batch, smoothed by ``label_smoothing``.
    """

    label_smoothing: float = 0.0

    unit = "batch"  # type: ignore[assignment]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_smoothing(self.name, self.label_smoothing)

    def __call__(self, evaluation: Evaluation, rollout: Rollout) -> Loss:
        pairs = Pairs.of(rollout)
        score, logp = self.scores(evaluation, rollout)
        upper, lower = self.compared(Sides(score[pairs.winner], score[pairs.loser]), Sides(*_both(pairs, logp)))
        terms = smoothed(self.beta * (upper.sort().values - lower.sort().values), self.label_smoothing)
        return total(terms.sum() / max(len(terms), 1), **pair_metrics(pairs, self.beta * score, logp))

    def compared(self, score: Sides, logp: Sides) -> tuple[Float[Tensor, " pair"], Float[Tensor, " pair"]]:
        """What is sorted and should be larger, and what should be smaller."""
        return logp.gap, (logp.gap - score.gap).detach()


@part("objective", "aot-unpaired")
@dataclass(frozen=True)
class AotUnpaired(Aot):
    """l_k = -log sigma(beta (s_w,(k) - s_l,(k))): the k-th smallest log-ratio of the winners against the losers'.

    The unpaired form of `Aot` (Melnyk et al. 2024, arXiv:2406.05882).
    """

    def compared(self, score: Sides, logp: Sides) -> tuple[Float[Tensor, " pair"], Float[Tensor, " pair"]]:
        return score.winner, score.loser


@part("objective", "sft")
@dataclass(frozen=True)
class ChosenNLL(Part):
    """l_t = -coefficient * log pi(a_t) on the steps of ``mask/chosen``, the answers to imitate; no gradient elsewhere.

    With the aggregation ``token-mean`` the mean over all those steps of the batch. A term of several preference losses,
    and by itself supervised learning of demonstrations and winners.
    """

    coefficient: float = 1.0

    needs = frozenset({"mask/chosen"})
    mask = "mask/chosen"

    def __call__(self, evaluation: Evaluation, rollout: Rollout) -> Loss:
        return per_step(-self.coefficient * evaluation.logp, nll=rollout.batch_mean(-evaluation.logp.detach()))


def _both(pairs: Pairs, values: Float[Tensor, " trajectory"]) -> tuple[Tensor, Tensor]:
    return values[pairs.winner], values[pairs.loser]

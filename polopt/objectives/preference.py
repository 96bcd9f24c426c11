"""Losses of preferred against other answers: pairs within groups, log-ratios of sequences, what is logged.

The implicit reward of an answer is beta s, s = sum_t log pi(a_t) - log pi_ref(a_t) over its trainable steps. A pair is
a winner w and a loser l of one group, label_w > label_l; a list of n answers with different labels has n (n - 1) / 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from polopt.core.errors import UsageError
from polopt.core.loss import Evaluation, Loss, per_group
from polopt.core.part import Part
from polopt.core.rollout import Rollout
from polopt.core.segments import segment_mean, segment_pairs

Divergence = Literal["reverse-kl", "forward-kl", "js", "alpha"]


def answered(rollout: Rollout) -> Bool[Tensor, " trajectory"]:
    """Answers that can be preferred to others: those with a trainable step and a label that is not NaN."""
    return (rollout.active_lengths > 0) & ~rollout["label"].isnan()


def sequence_log_ratio(
    evaluation: Evaluation, rollout: Rollout, model: str | None = "ref"
) -> Float[Tensor, " trajectory"]:
    """s_i = sum_t log pi(a_t) - log m(a_t) over the trainable steps; without a model m = 1: log pi(y_i)."""
    logp = evaluation.logp if model is None else evaluation.logp - rollout[f"logp/{model}"]
    return rollout.sum_steps(logp)


@dataclass(frozen=True, eq=False)
class Pairs:
    """P pairs of a rollout: places of ``winner`` and ``loser`` [P] among its trajectories."""

    rollout: Rollout
    winner: Int[Tensor, " pair"]
    loser: Int[Tensor, " pair"]

    @classmethod
    def of(cls, rollout: Rollout) -> Pairs:
        """Every pair of answers of one group with different labels."""
        first, second = segment_pairs(rollout.group, rollout.n_groups, mask=answered(rollout))
        better = rollout["label"][first] > rollout["label"][second]
        return cls(rollout, first[better], second[better])

    @cached_property
    def group(self) -> Int[Tensor, " pair"]:
        """Group of each pair."""
        return self.rollout.group[self.winner]

    def mean(self, values: Float[Tensor, " pair"]) -> Float[Tensor, " group"]:
        """Mean over the pairs of each group; 0 for a group without any, which counts in a mean over groups."""
        return segment_mean(values, self.group, self.rollout.n_groups)

    def share(self, values: Float[Tensor, " pair"]) -> Float[Tensor, ""]:
        """This piece's share of the batch's mean over groups of the mean over their pairs."""
        return self.mean(values.detach()).sum() / max(self.rollout.counts.groups, 1.0)


def pair_metrics(
    pairs: Pairs, reward: Float[Tensor, " trajectory"], logp: Float[Tensor, " trajectory"]
) -> dict[str, Tensor]:
    """What TRL logs of pairs: implicit rewards and log-probs of both sides, how often and by how much the winner leads.

    Two equal rewards are no success.
    """
    won, lost = reward[pairs.winner], reward[pairs.loser]
    return {
        "rewards__chosen": pairs.share(won),
        "rewards__rejected": pairs.share(lost),
        "rewards__accuracies": pairs.share((won > lost).to(won.dtype)),
        "rewards__margins": pairs.share(won - lost),
        "logps__chosen": pairs.share(logp[pairs.winner]),
        "logps__rejected": pairs.share(logp[pairs.loser]),
    }


@dataclass(frozen=True, eq=False)
class Sides:
    """One vector [P] for the winners of the pairs and one for the losers."""

    winner: Float[Tensor, " pair"]
    loser: Float[Tensor, " pair"]

    @property
    def gap(self) -> Float[Tensor, " pair"]:
        """Winner minus loser."""
        return self.winner - self.loser


@dataclass(frozen=True)
class PairLoss(Part):
    """L_g = mean over the pairs of a group of `terms`; the batch's loss is the mean over its groups.

    A subclass gives the terms of a pair from the `score` of its two answers, which is s_i, a function of it and of the
    number of steps, and the implicit reward over beta. ``model`` is the reference; without one s_i = log pi(y_i).
    Raises UsageError for a ``beta`` that is not above 0.
    """

    beta: float = 0.1

    unit = "group"

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise UsageError(f"{self.name}: beta must be above 0, got {self.beta}")

    @property
    def model(self) -> str | None:
        """The model of which the log-probs are subtracted."""
        return "ref"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"label"} if self.model is None else {"label", f"logp/{self.model}"})

    def __call__(self, evaluation: Evaluation, rollout: Rollout) -> Loss:
        pairs = self.pairs(rollout)
        score, logp = self.scores(evaluation, rollout)
        terms = self.terms(Sides(score[pairs.winner], score[pairs.loser]))
        return per_group(pairs.mean(terms), **pair_metrics(pairs, self.beta * score, logp))

    def pairs(self, rollout: Rollout) -> Pairs:
        """The pairs that the loss is of."""
        return Pairs.of(rollout)

    def scores(
        self, evaluation: Evaluation, rollout: Rollout
    ) -> tuple[Float[Tensor, " trajectory"], Float[Tensor, " trajectory"]]:
        """The score and the log-prob of every answer."""
        logp = sequence_log_ratio(evaluation, rollout, None)
        ratio = logp if self.model is None else sequence_log_ratio(evaluation, rollout, self.model)
        return self.score(ratio, rollout.active_lengths.clamp_min(1).to(ratio)), logp

    def score(
        self, ratio: Float[Tensor, " trajectory"], length: Float[Tensor, " trajectory"]
    ) -> Float[Tensor, " trajectory"]:
        """What is compared, from s_i and the number of trainable steps |y_i|."""
        return ratio

    def terms(self, score: Sides) -> Float[Tensor, " pair"]:
        """The loss of each pair."""
        raise NotImplementedError


@dataclass(frozen=True)
class WithoutReference(PairLoss):
    """A `PairLoss` of log-probs: s_i = log pi(y_i), no reference is held or evaluated."""

    @property
    def model(self) -> str | None:
        return None


@dataclass(frozen=True)
class DivergenceLoss(PairLoss):
    """A `PairLoss` whose score is g(s), g = f' of an f-divergence to the reference (Wang et al. 2023).

    reverse-kl: s; forward-kl: 1 - exp(-s); js: log 2 + log sigma(s); alpha: (exp((alpha - 1) s) - 1) / (alpha - 1),
    which is s for alpha = 1 and forward-kl for alpha = 0. arXiv:2309.16240, section 3. With ``reference_free``
    log pi_ref is 0: no reference is held or evaluated.
    """

    reference_free: bool = False
    divergence: Divergence = "reverse-kl"
    alpha: float = 0.5

    @property
    def model(self) -> str | None:
        return None if self.reference_free else "ref"

    def score(
        self, ratio: Float[Tensor, " trajectory"], length: Float[Tensor, " trajectory"]
    ) -> Float[Tensor, " trajectory"]:
        match self.divergence:
            case "forward-kl":
                return -torch.expm1(-ratio)
            case "js":
                return math.log(2) + F.logsigmoid(ratio)
            case "alpha" if self.alpha != 1:
                power = self.alpha - 1
                return torch.expm1((power * ratio).clamp(max=MAX_EXPONENT)) / power
            case _:
                return ratio


def smoothed(gap: Float[Tensor, " pair"], wrong: float | Float[Tensor, " pair"]) -> Float[Tensor, " pair"]:
    """-(1 - eps) log sigma(x) - eps log sigma(-x): the logistic loss where a label is wrong with probability eps."""
    return -(1 - wrong) * F.logsigmoid(gap) - wrong * F.logsigmoid(-gap)


def check_smoothing(name: str, wrong: float) -> None:
    """Raise UsageError for a label smoothing that is no probability in [0, 1/2]."""
    if not 0 <= wrong <= 0.5:
        raise UsageError(f"{name}: label_smoothing is a probability in [0, 1/2], got {wrong}")


MAX_EXPONENT = 80.0
"""exp(80) is finite in float32; TRL's bound on the exponent of the alpha divergence."""

"""Losses of ranked lists, from the implicit rewards s_i = beta log pi/pi_ref of a list's answers.

A list is a group; its labels psi are comparable within it alone. Each part's value is a sum within a list, and the
batch's loss the mean over its lists; answers without a trainable step or with a NaN label are left out. Equal labels
are no pair. For two answers the logistic loss and list-mle are DPO's, the hinge is SLiC's. arXiv:2402.01878.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from polopt.core.errors import UsageError
from polopt.core.loss import Evaluation, Loss, per_group
from polopt.core.part import Part, part
from polopt.core.rollout import Rollout
from polopt.core.segments import segment_log_softmax, segment_logsumexp, segment_sum
from polopt.objectives.preference import Pairs, answered, pair_metrics, sequence_log_ratio


@dataclass(frozen=True)
class ListLoss(Part):
    """A loss of each list from the scores s = beta log pi/pi_ref [M]; `of_list` gives it.

    Raises UsageError for a beta that is not above 0.
    """

    beta: float = 0.05

    needs = frozenset({"label", "logp/ref"})
    unit = "group"

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise UsageError(f"{self.name}: beta must be above 0, got {self.beta}")

    def __call__(self, evaluation: Evaluation, rollout: Rollout) -> Loss:
        pairs = Pairs.of(rollout)
        score = self.beta * sequence_log_ratio(evaluation, rollout)
        metrics = pair_metrics(pairs, score, sequence_log_ratio(evaluation, rollout, None))
        return per_group(self.of_list(score, pairs), **metrics)

    def of_list(self, score: Float[Tensor, " trajectory"], pairs: Pairs) -> Float[Tensor, " group"]:
        """The loss of each group from the scores and the pairs of different labels."""
        raise NotImplementedError


@part("objective", "list-pairwise")
@dataclass(frozen=True)
class ListPairwise(ListLoss):
    """Sum over the pairs of a list of log(1 + exp(-h)) (DPO's) or max(0, 1 - h) (SLiC's), h = s_w - s_l."""

    loss: Literal["logistic", "hinge"] = "logistic"

    def of_list(self, score: Float[Tensor, " trajectory"], pairs: Pairs) -> Float[Tensor, " group"]:
        gap = score[pairs.winner] - score[pairs.loser]
        terms = F.softplus(-gap) if self.loss == "logistic" else (1 - gap).clamp_min(0)
        return segment_sum(self.weight(score, pairs) * terms, pairs.group, pairs.rollout.n_groups)

    def weight(self, score: Float[Tensor, " trajectory"], pairs: Pairs) -> Float[Tensor, " pair"]:
        """What each pair counts: 1."""
        return torch.ones_like(score[pairs.winner])


@part("objective", "list-mle")
@dataclass(frozen=True)
class ListMLE(ListLoss):
    """-sum_i log(exp s_i / (exp s_i + sum over j with psi_j < psi_i of exp s_j)): Plackett-Luce by falling label."""

    def of_list(self, score: Float[Tensor, " trajectory"], pairs: Pairs) -> Float[Tensor, " group"]:
        rollout = pairs.rollout
        own = answered(rollout).nonzero().flatten()
        place = torch.cat([own, pairs.winner])
        rivals = torch.cat([score[own], score[pairs.loser]])
        total = segment_logsumexp(rivals, place, rollout.n_trajectories)
        return segment_sum((total - score)[own], rollout.group[own], rollout.n_groups)


@part("objective", "list-softmax")
@dataclass(frozen=True)
class ListSoftmax(ListLoss):
    """-sum_i (psi_i / sum psi) log softmax(s)_i; 0 for a list whose labels are all 0. Labels must be at least 0."""

    def of_list(self, score: Float[Tensor, " trajectory"], pairs: Pairs) -> Float[Tensor, " group"]:
        rollout, kept = pairs.rollout, answered(pairs.rollout)
        label, group = rollout["label"].to(score)[kept], rollout.group[kept]
        if bool((label < 0).any()):
            raise UsageError(f"{self.name}: labels must be at least 0, got {float(label.min()):g}")
        total = segment_sum(label, group, rollout.n_groups)
        share = label / total.where(total > 0, 1.0)[group]
        return -segment_sum(share * segment_log_softmax(score[kept], group, rollout.n_groups), group, rollout.n_groups)


@part("objective", "list-pointwise")
@dataclass(frozen=True)
class ListPointwise(ListLoss):
    """sum_i (psi_i - s_i)^2."""

    def of_list(self, score: Float[Tensor, " trajectory"], pairs: Pairs) -> Float[Tensor, " group"]:
        rollout, kept = pairs.rollout, answered(pairs.rollout)
        error = (rollout["label"].to(score) - score)[kept].square()
        return segment_sum(error, rollout.group[kept], rollout.n_groups)

"""SRPO: self-improving robust preference optimisation (Choi et al. 2024, arXiv:2406.01660).

A generator pi(y|x) and an improver pi'(y'|y, x) of a draft y, one network under two prompts, play
min_pi max_pi' E[p(y2 beats y1)] - beta KL(pi' || pi_ref) + beta KL(pi || pi_ref),  y1 ~ pi, y2 ~ pi'(.|y1).
The solution does not depend on who wrote the pairs. With g(y) and r(y'|y) the sums of log-ratios to the reference of
generator and improver, it satisfies for every pair
p(y2 beats y1) = 1/2 + beta [r(y2|y1) - r(y1|y1)] = 1/2 + beta/2 [g(y2) - g(y1) + r(y2|y1) - r(y1|y2)].
Regressing the label of (w, l) on both, in both orders:
L' = 1/2 {(1/2 - beta [r(w|l) - r(l|l)])^2 + (1/2 - beta [r(w|w) - r(l|w)])^2}   (improver),
L  = (1/2 - beta/2 [g(w) - g(l) + r(w|l) - r(l|w)])^2   (robust),   total (1 - alpha) L + alpha L'.

Settled: the factors of L and L' follow from the objective (the paper's scale of one against the other, which would be
another alpha, could not be checked); beta 0.1 and alpha 1/2 are suggestions. `--rollout.rounds 5` revises held-out
answers. Start from a policy that has seen the template: the copies l|l and w|w carry the improver's normaliser.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.core.errors import UsageError
from polopt.core.loss import Evaluation, Loss, per_group
from polopt.core.part import Part, part
from polopt.core.registry import method
from polopt.core.rollout import Rollout
from polopt.core.segments import segment_count, segment_mean
from polopt.methods.preference.dpo import dpo
from polopt.objectives.preference import Pairs, answered, pair_metrics, sequence_log_ratio
from polopt.rollouts.drafts import NO_DRAFT, DraftedPairs


@part("objective", "self-improving")
@dataclass(frozen=True)
class SelfImproving(Part):
    """(1 - alpha) L + alpha L' of each group that holds all six sequences of a pair; 0 for others.

    ``label`` is 1 for w and 0 for l, ``draft`` that of the draft and -1 without one. Raises UsageError for a beta that
    is not above 0 or an alpha outside [0, 1].
    """

    beta: float = 0.1
    alpha: float = 0.5

    needs = frozenset({"label", "draft", "logp/ref"})
    unit = "group"

    def __post_init__(self) -> None:
        if not (0 < self.beta < math.inf and 0 <= self.alpha <= 1):
            raise UsageError(f"beta must be above 0 and alpha in [0, 1], got {self.beta} and {self.alpha}")

    def __call__(self, evaluation: Evaluation, rollout: Rollout) -> Loss:
        ratio, draft = sequence_log_ratio(evaluation, rollout), rollout["draft"]
        six, whole = self.sequences(ratio, rollout)
        lost, l_l, l_w, won, w_l, w_w = six.unbind(1)
        improver = (0.5 - self.beta * (w_l - l_l)).square() + (0.5 - self.beta * (w_w - l_w)).square()
        robust = (0.5 - self.beta / 2 * (won - lost + w_l - l_w)).square()
        loss = torch.where(whole, (1 - self.alpha) * robust + self.alpha / 2 * improver, 0.0)
        # What is logged of pairs is the generator's.
        every = Pairs.of(rollout)
        first = (draft[every.winner] == NO_DRAFT) & (draft[every.loser] == NO_DRAFT)
        pairs = Pairs(rollout, every.winner[first], every.loser[first])
        metrics = pair_metrics(pairs, self.beta * ratio, sequence_log_ratio(evaluation, rollout, None))
        share = torch.where(whole, self.beta * (w_l - l_l), 0.0).detach().sum() / max(rollout.counts.groups, 1.0)
        return per_group(loss, **metrics, improver__margin=share)

    @staticmethod
    def sequences(ratio: Float[Tensor, " trajectory"], rollout: Rollout) -> tuple[Float[Tensor, "group 6"], Tensor]:
        """g(l), r(l|l), r(l|w), g(w), r(w|l), r(w|w) of each group, and whether it has them all."""
        label, draft, size = rollout["label"], rollout["draft"], 6 * rollout.n_groups
        known = answered(rollout) & ((label == 0) | (label == 1)) & (draft >= NO_DRAFT) & (draft <= 1)
        place = 6 * rollout.group + 3 * (label == 1).long() + draft.long() + 1
        found = segment_mean(ratio, place, size, mask=known).view(-1, 6)
        return found, (segment_count(place, size, mask=known) > 0).view(-1, 6).all(1)


srpo_selfimproving = method(
    "srpo-selfimproving",
    dpo,
    seed="055",
    paper="arXiv:2406.01660",
    rollout=DraftedPairs(),
    objective=SelfImproving(),
)

"""DNO: direct Nash optimisation, by win rates of batches of answers (Rosset et al. 2024, arXiv:2404.03715).

Soft policy iteration with the win rate as reward, r_t(y) = P(y beats pi_t): pi_{t+1} ~ pi_t exp(r_t / eta); the mixture
of pi_1 .. pi_T goes to a Nash equilibrium. A step is fitted by a contrastive loss with pi_t as the reference,
z = eta [log pi/pi_t (y) - log pi/pi_t (y')], q = sigma(r_t(y) - r_t(y')) (Eq. 8-9, ``dno-soft``):
L = -mean over pairs of q log sigma(z) + (1 - q) log sigma(-z).
In practice (DNO-Prct, this recipe) only pairs with a large margin train and q = 1: DPO with beta = eta and reference
pi_t. A judge gives each of K = 5 answers and a gold one 1 to 6 points: a winner has at least 5, its loser at least 2
less, 1 less if the winner is the policy's own; all such pairs train, an own answer that beats gold too. Of the
iteration before 30% as many come again, 15% of the one before that, and so on.

Points are 1 + 5 score, the score of the verifier; win rates of a judge in its place: `--reward judge-pairwise
--filter.column win`. The gold answer is the best that an example brings, if any. Settled: history is of whole groups
(prompts); answers are drawn at temperature 0.7 and top-p 0.95, log-probs are those of temperature 1. An iteration is
one batch, take a large one (`--prompts 256`). Left out: negatives by repeated n-grams, and "alpha", which the paper
does not define. The equations' recipe: `--reward judge-scores --objective dno-soft`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from polopt.core.loss import Evaluation, Loss, per_group
from polopt.core.method import Schedule
from polopt.core.part import part
from polopt.core.registry import method
from polopt.core.rollout import Rollout
from polopt.core.segments import segment_pairs
from polopt.filters.points import Points
from polopt.methods.preference.dpo import DPO, dpo
from polopt.models import Snapshot
from polopt.objectives.preference import PairLoss, Pairs, pair_metrics
from polopt.rollouts.batched import Batched

ROUNDING = 1e-5
"""What float32 may take from a difference of points."""


@part("objective", "dno")
@dataclass(frozen=True)
class DNO(DPO):
    """DPO on pairs whose winner has ``least`` points, the loser ``margin`` less: ``own_margin`` if the winner is no
    gold answer (column ``gold``, where there is one). Points are the labels. arXiv:2404.03715, Algorithm 2.
    """

    least: float = 5.0
    margin: float = 2.0
    own_margin: float = 1.0

    def pairs(self, rollout: Rollout) -> Pairs:
        every, points = super().pairs(rollout), rollout["label"]
        won, lost = points[every.winner], points[every.loser]
        gold = rollout["gold"].bool() if "gold" in rollout else torch.zeros_like(points).bool()
        wanted = torch.where(gold[every.winner], self.margin, self.own_margin) - ROUNDING
        good = (won >= self.least - ROUNDING) & (won - lost >= wanted)
        return Pairs(rollout, every.winner[good], every.loser[good])


@part("objective", "dno-soft")
@dataclass(frozen=True)
class SoftDNO(PairLoss):
    """l = -q log sigma(z) - (1 - q) log sigma(-z) of all pairs of a group, q = sigma(win_i - win_j) constant.

    eta is ``beta``. Answers without a trainable step or a valid win rate are in no pair.
    """

    beta: float = 0.8

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"win", "logp/ref"})

    def __call__(self, evaluation: Evaluation, rollout: Rollout) -> Loss:
        win = rollout["win"]
        valid = (rollout.active_lengths > 0) & ~win.isnan()
        i, j = segment_pairs(rollout.group, rollout.n_groups, mask=valid)
        pairs, (score, logp) = Pairs(rollout, i, j), self.scores(evaluation, rollout)
        q, z = torch.sigmoid(win[i] - win[j]), self.beta * (score[i] - score[j])
        terms: Float[Tensor, " pair"] = -q * F.logsigmoid(z) - (1 - q) * F.logsigmoid(-z)
        right = win[i] > win[j]
        led = Pairs(rollout, i[right], j[right])
        return per_group(pairs.mean(terms), **pair_metrics(led, self.beta * score, logp))


dno = method(
    "dno",
    dpo,
    seed="014",
    paper="arXiv:2404.03715",
    rollout=Batched(temperature=0.7, top_p=0.95, policy_temperature=1.0),
    filter=Points(),
    objective=DNO(beta=0.1),
    models={"ref": Snapshot(every=1)},
    schedule=Schedule(minibatches=4),
)

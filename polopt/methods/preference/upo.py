"""UPO: iterative DPO on the pairs that a second estimator is sure of (Wang et al. 2024, arXiv:2409.11212).

A reward model that ranks the policy's answers certifies its own mistakes. An independent estimator of which of two
answers is better is asked T times under dropout, p_t = P_t(w beats l). What the passes disagree about is
B_j = H(mean_t p_t) - mean_t H(p_t), 0 to log 2; pair j of n candidates has P_j = (1 - B_j)^mu / sum_k (1 - B_k)^mu.
Pairs on which most passes contradict the reward go; a share of the others is drawn without replacement by P. With
h = s_w - s_l against the policy at the start of the iteration,
L = mean over pairs of [-(1 - a_j) log sigma(beta h) - a_j log sigma(-beta h) - lambda log pi(y_w) / |y_w|].

The estimator is by default a head on the policy's own state that learns from the run's rewards; one trained apart is
`--slots.reward model-estimator --reward.model FOLDER`.

Settled: the printed a_j = 1 / (P_j + 1) is above 1/2, which trains on reversed labels. ``smoothing`` "relative",
a_j = (1 - P_j / max P) / 2, is ours, for the text's intent; "none" is the released code, which has no mu and no NLL
term either. That term is printed with the sign of a penalty. Passes that are split evenly contradict nothing (released
code). mu = lambda = 1 are ours. Pairs of earlier iterations are not trained on again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.core.errors import UsageError
from polopt.core.loss import Evaluation, Loss, per_group
from polopt.core.method import Schedule
from polopt.core.part import Stateful, part
from polopt.core.registry import method
from polopt.core.rollout import Rollout
from polopt.filters.draws import as_groups, halves, weighted_draw
from polopt.methods.preference.dpo import dpo
from polopt.models import Snapshot
from polopt.objectives.preference import PairLoss, Pairs, Sides, pair_metrics, smoothed
from polopt.rewards.estimators import HeadEstimator
from polopt.rewards.uncertainty import information_gain, pair_chances
from polopt.rollouts.groups import Groups

Smoothing = Literal["none", "relative", "paper"]


def reliability(gain: Float[Tensor, " pair"], mu: float) -> Float[Tensor, " pair"]:
    """P_j = (1 - B_j)^mu / sum_k (1 - B_k)^mu."""
    return (mu * torch.log1p(-gain)).softmax(0)


def label_smoothing(chance: Float[Tensor, " pair"], mode: Smoothing) -> Float[Tensor, " pair"]:
    """a_j from P_j: 0, (1 - P_j / max P) / 2, or 1 / (P_j + 1)."""
    if mode == "none" or not len(chance):
        return torch.zeros_like(chance)
    return 1 / (chance + 1) if mode == "paper" else (1 - chance / chance.max()) / 2


@part("filter", "certain-pairs")
@dataclass(frozen=True)
class CertainPairs(Stateful):
    """Of the pairs of the better half of a group by ``score`` with the others the reliable ones, as groups of two.

    A random share ``candidates`` of them is estimated; of those without contradiction the share ``kept`` is drawn by P.
    Trajectory column ``smoothing`` [M]: a_j of the pair. State: the number of batches, which with ``seed`` decides.
    """

    mu: float = 1.0
    candidates: float = 0.25
    kept: float = 0.5
    smoothing: Smoothing = "relative"
    seed: int = 0
    batches: int = field(default=0, init=False, compare=False)

    needs = frozenset({"score", "estimates"})
    gives = frozenset({"label", "mask/chosen", "smoothing"})
    state = ("batches",)

    def __post_init__(self) -> None:
        if not (0 < self.candidates <= 1 and 0 < self.kept <= 1 and self.mu >= 0):
            raise UsageError(
                f"certain-pairs: candidates and kept are shares in (0, 1] and mu is at least 0, got {self.candidates}, "
                f"{self.kept} and {self.mu}"
            )

    def __call__(self, rollout: Rollout) -> Rollout:
        generator = torch.Generator().manual_seed(hash((self.seed, self.batches)) % 2**62)
        self.remember(batches=self.batches + 1)
        winner, loser = halves(rollout, rollout["score"])
        seen = weighted_draw(torch.ones(len(winner)), math.ceil(self.candidates * len(winner)), generator)
        winner, loser = winner[seen.to(winner)], loser[seen.to(loser)]
        passes = pair_chances(rollout["estimates"].T, winner, loser)
        chance = reliability(information_gain(passes), self.mu)
        agrees = (passes[..., 0] >= 0.5).double().mean(0) >= 0.5
        drawn = weighted_draw(chance * agrees, math.ceil(self.kept * int(agrees.sum())), generator)
        smoothing = label_smoothing(chance, self.smoothing)[drawn].repeat_interleave(2)
        return as_groups(rollout, winner[drawn], loser[drawn]).with_columns(trajectory={"smoothing": smoothing})


@part("objective", "upo")
@dataclass(frozen=True)
class SmoothedDPO(PairLoss):
    """l_j = -(1 - a_j) log sigma(beta h) - a_j log sigma(-beta h) - ``nll`` log pi(y_w) / |y_w|, a = ``smoothing``."""

    nll: float = 1.0

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"smoothing"}

    def __call__(self, evaluation: Evaluation, rollout: Rollout) -> Loss:
        pairs = Pairs.of(rollout)
        score, logp = self.scores(evaluation, rollout)
        wrong = rollout["smoothing"][pairs.winner]
        imitation = -rollout.mean_steps(evaluation.logp)[pairs.winner]
        terms = smoothed(self.beta * Sides(score[pairs.winner], score[pairs.loser]).gap, wrong) + self.nll * imitation
        logged = {"smoothing": pairs.share(wrong), "nll": pairs.share(imitation)}
        return per_group(pairs.mean(terms), **logged, **pair_metrics(pairs, self.beta * score, logp))


upo = method(
    "upo",
    dpo,
    seed="115",
    paper="arXiv:2409.11212",
    rollout=Groups(),
    reward=HeadEstimator(),
    filter=CertainPairs(),
    objective=SmoothedDPO(),
    models={"ref": Snapshot(every=1)},
    schedule=Schedule(epochs=3),
)

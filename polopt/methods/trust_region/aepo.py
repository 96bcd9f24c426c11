"""AEPO: arbitrary entropy policy optimisation (Wang et al. 2025, arXiv:2510.08141).

grad J = grad J_GRPO + alpha E_{o ~ pi^T}[R(o) grad log pi(o)], R in {0, 1}, pi^T = softmax(logits / T), log pi at
temperature 1 and no importance weight between the two: at one state, with every sample kept, it moves the logits along
pi^T - pi, which raises the entropy for T > 1 and lowers it for T < 1.
T = 1.2 where H <= H0, else 0.8, H the mean entropy of the iteration before (0 at first).

As in the authors' code (597358816/AEPO): a quarter of the prompts is answered once more at T; of these responses those
with a group z-score above 0.05 are kept, at most n_max = 60 per 2,560 ordinary ones and half as many (rounded down)
where H > H0; they get A = 1 and train in place of as many ordinary ones, the first of the batch. One loss for all,
L = -(1/N) sum_t min(rho_t A_i, clip(rho_t, 0.8, 1.2) A_i) with dual clip 3, four minibatches: alpha is the share of
the tempered responses. `--advantage.alpha` sets it instead, as in the equation: their gradient is then
-alpha / (K |o_i|) per step, K their number. H is the mean entropy of the ordinary responses' steps, exactly; the code
estimates it by -log pi over what trains, tempered responses included. `--controller.linear true` is the smoother rule
of later revisions, T = clip(1 + H0 - H, 0.8, 1.2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.advantages.group import GroupZScore
from polopt.aggregations import TokenMean
from polopt.controllers import TargetEntropy
from polopt.core.method import Schedule
from polopt.core.part import Part, part
from polopt.core.registry import method
from polopt.core.rollout import Rollout, Source, Unit
from polopt.methods.base.grpo import grpo
from polopt.objectives.clipped_surrogate import ClippedSurrogate
from polopt.rollouts.tempered import TemperedGroups


@part("filter", "tempered-positives")
@dataclass(frozen=True)
class TemperedPositives(Part):
    """Keeps the first n tempered responses with z-score > ``threshold``; masks as many ordinary ones, the first.

    n = min(ceil(most * M), their number), M the ordinary responses; its half, rounded down, where ``gap`` < 0. What is
    masked stays in its group, whose z-scores are those of all that was sampled.
    """

    most: float = 60 / 2560
    gap: float = 0.5
    threshold: float = 0.05

    needs = frozenset({"reward", "source"})

    def __call__(self, rollout: Rollout) -> Rollout:
        tempered = rollout["source"] == Source.TEMPERED
        good = tempered & (GroupZScore(eps=1e-6)(rollout) > self.threshold)
        count = min(math.ceil(self.most * int((~tempered).sum())), int(good.sum()))
        count = count // 2 if self.gap < 0 else count
        gone = ~tempered & ((~tempered).cumsum(0) <= count)
        rollout = rollout.with_columns(step={"mask": rollout.mask & ~rollout.spread(gone)})
        return rollout.select(~tempered | (good & (good.cumsum(0) <= count)))


@part("advantage", "tempered-reinforce")
@dataclass(frozen=True)
class TemperedReinforce(Part):
    """A_i = 1 on tempered responses, the z-score (sample deviation, 1e-6) of its group on others; [N].

    With ``alpha``, A = alpha N / (K |o_i|) on the K tempered responses that train, N all steps. Invalid rewards: 0.
    """

    alpha: float | None = None

    needs = frozenset({"reward", "source"})

    @property
    def unit(self) -> Unit:  # type: ignore[override]
        return "step" if self.alpha is None else "batch"

    def __call__(self, rollout: Rollout) -> Float[Tensor, " step"]:
        tempered, credit = rollout["source"] == Source.TEMPERED, GroupZScore(eps=1e-6)(rollout)
        lengths = rollout.active_lengths.to(credit)
        trains = tempered & ~rollout.trajectory_return.isnan() & (lengths > 0)
        value = torch.ones_like(credit)
        if self.alpha is not None:
            value = self.alpha * rollout.counts.steps / (trains.sum() * lengths).clamp_min(1)
        return rollout.spread(torch.where(tempered, value * trains, credit))


aepo = method(
    "aepo",
    grpo,
    seed="158",
    paper="arXiv:2510.08141",
    rollout=TemperedGroups(),
    filter=TemperedPositives(),
    advantage=TemperedReinforce(),
    objective=ClippedSurrogate(dual=3.0),
    aggregation=TokenMean(),
    controller=TargetEntropy(),
    schedule=Schedule(minibatches=4),
)

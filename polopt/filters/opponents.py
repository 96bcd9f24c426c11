"""Opponents leave once the others are measured by them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from polopt.core.part import Part, part
from polopt.core.rollout import Rollout
from polopt.core.segments import segment_mean, segment_pairs
from polopt.rewards.judges import beaten_by


@part("filter", "against-opponents")
@dataclass(frozen=True)
class AgainstOpponents(Part):
    """win_i = mean over the opponents j of its group of P(i beats j), from a judge's table; the opponents go.

    An estimate of E_{y' ~ mu}[P(y_i beats y')], mu the law of the opponents (column ``opponent``). Invalid comparisons
    take no part; an answer without a valid one has NaN.
    """

    needs = frozenset({"beats", "member", "opponent"})

    def __call__(self, rollout: Rollout) -> Rollout:
        opponent = rollout["opponent"].bool()
        i, j = segment_pairs(rollout.group, rollout.n_groups)
        met = opponent[j] & ~opponent[i]
        chance = beaten_by(rollout, i[met], j[met])
        win = segment_mean(chance, i[met], rollout.n_trajectories, mask=~chance.isnan(), empty=torch.nan)
        return rollout.with_columns(trajectory={"win": win}).select(~opponent)

"""Choosing among pairs: draws by weight, and pairs as groups of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from polopt.core.rollout import Level, Rollout
from polopt.core.segments import segment_count, segment_pairs, segment_rank
from polopt.filters.preferences import with_labels


def weighted_draw(weight: Float[Tensor, " item"], count: int, generator: torch.Generator) -> Int[Tensor, " drawn"]:
    """``count`` items without replacement, one after the other with the chance weight / (weight of what is left).

    Ascending; items of weight 0 are never drawn, so that there may be fewer. By the largest keys log(u) / weight, u
    uniform (Efraimidis and Spirakis 2006).
    """
    uniform = torch.rand(len(weight), generator=generator, dtype=torch.float64).to(weight.device)
    possible = weight > 0
    key = (uniform.log() / weight.double()).masked_fill(~possible, -torch.inf)
    return key.topk(min(count, int(possible.sum()))).indices.sort().values


def as_groups(rollout: Rollout, winner: Int[Tensor, " pair"], loser: Int[Tensor, " pair"]) -> Rollout:
    """Each pair as a group of two, labels 1 and 0; an answer of several pairs is there as often.

    Group columns are those of the group that the pair is of.
    """
    made = rollout.select(torch.stack([winner, loser], 1).flatten())
    of_groups = {name: values[rollout.group[winner]] for name, values in rollout.columns.get("group", {}).items()}
    columns: dict[Level, Mapping[str, Tensor]] = {**made.columns, "group": of_groups}
    group = torch.arange(len(winner), device=winner.device).repeat_interleave(2)
    label = torch.tensor([1.0, 0.0], device=winner.device).repeat(len(winner))
    return with_labels(dataclasses.replace(made, group=group, columns=columns), label)


def halves(rollout: Rollout, score: Float[Tensor, " trajectory"]) -> tuple[Int[Tensor, " pair"], Int[Tensor, " pair"]]:
    """All pairs of a group with a winner in the better half by score (n / 2 rounded up), a loser in the other half.

    Members without a valid score or a trainable step take no part, nor do pairs of equal scores.
    """
    group, count = rollout.group, rollout.n_groups
    valid = ~score.isnan() & (rollout.active_lengths > 0)
    rank = segment_rank(-score, group, count, mask=valid, method="ordinal")
    better = 2 * rank <= segment_count(group, count, mask=valid)[group] + 1
    i, j = segment_pairs(group, count, mask=valid)
    pair = better[i] & ~better[j] & (score[i] > score[j])
    return i[pair], j[pair]

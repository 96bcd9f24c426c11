"""Values of the states between which the steps of a chain or a tree lie, from the rewards of what was sampled there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from polopt.core.part import Part, part
from polopt.core.rollout import Rollout
from polopt.core.segments import segment_count, segment_mean, segment_std


def state_values(
    reward: Float[Tensor, " sample"],
    sampled: Int[Tensor, " sample"],
    parent: Int[Tensor, " edge"],
    child: Int[Tensor, " edge"],
    size: int,
) -> Float[Tensor, " state"]:
    """V of states 0 .. size-1: mean reward of the samples of a state, or else the mean of its children's values.

    Invalid (NaN) rewards and values leave a mean over the others; a state without any has the value NaN. ``child`` has
    each state at most once.
    """
    here = segment_count(sampled, size) > 0
    values = _mean(reward, sampled, size)
    # Each pass settles the states one level further up.
    for _ in range(size):
        before = values
        values = torch.where(here, values, _mean(values[child], parent, size))
        if torch.equal(values.nan_to_num(torch.inf), before.nan_to_num(torch.inf)):
            break
    return values


def _mean(values: Tensor, index: Tensor, size: int) -> Tensor:
    valid = ~values.isnan()
    some = segment_count(index, size, mask=valid) > 0
    return torch.where(some, segment_mean(values, index, size, mask=valid), torch.nan)


@part("reward", "segment-values")
@dataclass(frozen=True)
class SegmentValues(Part):
    """Step columns ``value/start`` and ``value/end``: V of the states between which a step lies, NaN where unknown.

    V(state) is the mean reward of the trajectories that sample it (column ``state``: the probes of a cut; an answer at
    its own end), and otherwise, as in a tree, the mean of the values of the states to which its segments lead.
    ``value/spread`` is the population standard deviation of the latter. arXiv:2505.23564.
    """

    needs = frozenset({"reward", "state", "segment/start", "segment/end"})
    gives = frozenset({"value/start", "value/end", "value/spread"})

    def __call__(self, rollout: Rollout) -> Rollout:
        start, end, sampled = rollout["segment/start"], rollout["segment/end"], rollout["state"]
        states, place = torch.unique(torch.cat([start, end, sampled]), return_inverse=True)
        start, end, sampled = place.split([len(start), len(end), len(sampled)])
        size = len(states)
        known = (states[start] >= 0) & (states[end] >= 0)
        child, first = torch.unique(end[known], return_inverse=True)
        parent = torch.empty_like(child).index_copy(0, first, start[known])
        values = state_values(rollout.reward, sampled, parent, child, size)
        below = values[child]
        spread = segment_std(below, parent, size, unbiased=False, mask=~below.isnan())
        return rollout.with_columns(
            step={"value/start": values[start], "value/end": values[end], "value/spread": spread[start]}
        )

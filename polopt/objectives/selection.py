"""Which steps of a batch are picked out: the largest by some measure, by lot where it does not decide."""

from __future__ import annotations

from typing import Final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from polopt.core.rollout import Rollout
from polopt.policies.sampling import uniforms

_MIXED: Final = 0.6180339887498949


def lottery(rollout: Rollout) -> Float[Tensor, " step"]:
    """A number in [0, 1) per step, a hash of its log-prob when sampled, its advantage and its place.

    A draw by it depends neither on the order of trajectories nor on how the batch is cut, and repeats in every epoch.
    """
    start = rollout.lengths.cumsum(0) - rollout.lengths
    place = torch.arange(rollout.n_steps, device=rollout.device) - start[rollout.trajectory]
    return uniforms((rollout.logp.double() + _MIXED * rollout.advantage.double()).view(torch.int64), place)


def chosen(
    rollout: Rollout,
    candidates: Bool[Tensor, " step"],
    share: float,
    by: Float[Tensor, " step"] | None = None,
) -> Bool[Tensor, " step"]:
    """The max(1, floor(share N)) candidates of largest ``by``, N the steps of the whole batch; all if they are fewer.

    Ties go by `lottery`; without ``by`` it alone decides, which is a draw without replacement.
    """
    count = max(1, int(share * rollout.counts.steps))
    places = candidates.nonzero().flatten()
    places = places[lottery(rollout)[places].argsort(stable=True)]
    if by is not None:
        places = places[by[places].argsort(descending=True, stable=True)]
    return torch.zeros_like(candidates).index_fill(0, places[:count], True)

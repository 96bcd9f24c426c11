"""The importance weight of a whole trajectory, from its sampling policy to that of the update's start."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.core.part import Part, part
from polopt.core.rollout import Rollout


def log_weight(rollout: Rollout) -> Float[Tensor, " trajectory"]:
    """log w_i = sum_t log pi(a_it) - log mu(a_it) over the steps that train, mu the policy that sampled; [M].

    pi is the policy with which the iteration starts (``logp/start``), so that w is a constant of the iteration.
    """
    return rollout.sum_steps(torch.where(rollout.mask, rollout["logp/start"] - rollout.logp, 0.0))


@part("weight", "truncated-sequence")
@dataclass(frozen=True)
class TruncatedSequence(Part):
    """min(w_i, ``cap``), [M], w_i the product of the ratios of a trajectory's steps (`log_weight`); 1 on fresh data."""

    cap: float = 8.0

    needs = frozenset({"logp", "logp/start"})

    def __call__(self, rollout: Rollout) -> Float[Tensor, " trajectory"]:
        return log_weight(rollout).exp().clamp(max=self.cap)

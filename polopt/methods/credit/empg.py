"""EMPG: entropy-modulated policy gradients for multi-turn agents (Wang et al. 2025, arXiv:2509.09265).

For a softmax policy E||grad_z log pi||^2 = 1 - sum_a pi(a)^2 grows with the entropy: sure decisions hardly learn. The
group z-score A_i of a trajectory is therefore modulated by the mean entropy H_j of each decision step j (a turn):
h_j = (H_j - min H) / (max H - min H + 1e-8);  g_j = exp(-k h_j) / (mean exp(-k h) + 1e-8);  f_j = exp(-k' h_j);
A_j = A_i g_j + zeta f_{j+1}, no bonus for the last turn;  A_j <- A_j - mean A.
Extremes and means are over all turns of the batch, each turn counting once. The objective is GRPO's, unchanged.
Constants of the authors' listing (project page). A group of equal rewards keeps the bonus, as in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.core.part import Part, part
from polopt.core.registry import method
from polopt.core.rollout import Rollout
from polopt.core.segments import segment_mean, segment_shift
from polopt.methods.base.grpo import grpo
from polopt.rollouts.turns import Turns


@part("advantage", "entropy-modulated")
@dataclass(frozen=True)
class EntropyModulated(Part):
    """A_j = A_i g_j + zeta f_{j+1} - mean [N], the same on every step of decision step j; arXiv:2509.09265, Eq. 7-12.

    Decision steps are the runs of equal ``segment``, a step column, within a trajectory; None takes every step for one.
    A_i is the group z-score of the returns, H_j the mean ``entropy`` (nats) of the trainable steps of j. Masked steps
    and invalid returns take no part and get 0. ``center`` is the last subtraction; ``eps`` keeps equal H at h = 0.
    """

    k: float = 1.0
    k_future: float = 1.0
    zeta: float = 0.1
    center: bool = True
    segment: str | None = "turn"
    eps: float = 1e-8

    unit = "batch"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"reward", "entropy"} | ({self.segment} if self.segment else set()))

    def __call__(self, rollout: Rollout) -> Float[Tensor, " step"]:
        returns, trajectory = rollout.trajectory_return, rollout.trajectory
        mask = rollout.mask & rollout.spread(~returns.isnan())
        if not bool(mask.any()):
            return torch.zeros_like(rollout["entropy"])
        segment, owner = (first := self._first(rollout, mask)).cumsum(0) - 1, trajectory[first]
        entropy = segment_mean(rollout["entropy"], segment, len(owner), mask=mask)
        scaled = (entropy - entropy.min()) / (entropy.max() - entropy.min() + self.eps)
        gain = (-self.k * scaled).exp()
        gain = gain / (gain.mean() + self.eps)
        clarity = segment_shift((-self.k_future * scaled).exp(), owner, by=1)
        advantage = rollout.group_zscore(returns)[owner] * gain + self.zeta * clarity
        advantage = advantage - advantage.mean() if self.center else advantage
        return torch.where(mask, advantage[segment], 0.0)

    def _first(self, rollout: Rollout, mask: Tensor) -> Tensor:
        """Whether a step opens a decision step: its trajectory's first, or of another value than the one before it."""
        if self.segment is None:
            return mask
        value = rollout[self.segment].double()
        return mask & (value != segment_shift(value, rollout.trajectory, by=-1, fill=torch.nan, mask=mask))


empg = method(
    "empg",
    grpo,
    seed="002",
    paper="arXiv:2509.09265",
    rollout=Turns(environment="calculator"),
    advantage=EntropyModulated(),
)

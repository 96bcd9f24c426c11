"""ASPO: advantage shaping for earlier tool calls in tool-integrated reasoning (Lin and Xu 2025, arXiv:2508.19201).

An early-call bonus in the reward fails in a group z-score: where all are right it alone decides, at full size, and half
of the right answers are pushed down. Here the reward stays and the advantage A_i (group z-score) gets a bounded bias:
A_i + clip(delta (p_i - mean_E p) / mean_E |y|, -k |A_i|, k |A_i|) for i in E, A_i for all others.
E: members of the group that are right and called the tool; p_i: steps that the policy wrote up to its first call; |y_i|
all that it wrote. delta < 0 favours early calls, 0 < k < 1 keeps the sign of A_i. arXiv:2508.19201, Eq. 2.

Two settings are published: delta -2, k 0.7 (conservative, the default) and delta -2.5, k 0.9 (aggressive). The legends
of the paper's figures have (-1.5, 0.7) and (-2, 0.9) instead; its text is followed. There is no code by the authors:
that "right" means a positive score and the bound k |A_i| (the paper's k A_i where A_i >= 0) are those of a third-party
recipe for verl, which counts p_i to the start of the call; with calls of one length the two biases are equal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.advantages.group import GroupZScore
from polopt.core.part import part
from polopt.core.registry import method
from polopt.core.rollout import Rollout
from polopt.core.segments import segment_max, segment_mean
from polopt.methods.base.grpo import grpo
from polopt.rollouts.turns import Turns


@part("advantage", "early-call")
@dataclass(frozen=True)
class EarlyCall(GroupZScore):
    """A_i + clip(delta (u_i - mean_E u), -k |A_i|, k |A_i|) for i in E, else A_i = group z-score; [M].

    u_i = p_i / mean_E |y| from the step column ``turn`` (answers of the environment before a step), or any trajectory
    column ``feature``, NaN where it does not apply. E: ``score`` above 0, a valid return, and a call (a feature).
    """

    delta: float = -2.0
    k: float = 0.7
    feature: str | None = None

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"reward", "score", self.feature or "turn"})

    def __call__(self, rollout: Rollout) -> Float[Tensor, " trajectory"]:
        base = super().__call__(rollout)
        right = (rollout["score"] > 0) & ~rollout.trajectory_return.isnan()
        if self.feature is not None:
            used = ~rollout[self.feature].isnan()
            behaviour = rollout[self.feature].to(base)
        else:
            length = rollout.active_lengths.to(base)
            used = (segment_max(rollout["turn"].to(base), rollout.trajectory, rollout.n_trajectories) > 0) & (
                length > 0
            )
            before = rollout.sum_steps((rollout["turn"] == 0).to(base))
            behaviour = before / self._mean(rollout, length, right & used)
        ours = right & used
        gap = behaviour - self._mean(rollout, behaviour, ours)
        bound = self.k * base.abs()
        return base + torch.where(ours, (self.delta * gap).clamp(-bound, bound), 0.0)

    def _mean(self, rollout: Rollout, values: Tensor, of: Tensor) -> Tensor:
        """Mean over the group's members in E, [M]; 1 where there is none."""
        return segment_mean(values, rollout.group, rollout.n_groups, mask=of, empty=1.0)[rollout.group]


aspo = method(
    "aspo",
    grpo,
    seed="061",
    paper="arXiv:2508.19201",
    rollout=Turns(environment="calculator"),
    advantage=EarlyCall(),
)

"""GD2PO: leave out responses whose rewards contradict each other (Liu et al. 2026, arXiv:2606.16771).

GDPO adds the z-scores a_ik of the rewards, so that a response that is good in one respect and bad in another ends near
zero and teaches the noise that is left. GD2PO drops it, and scales a prompt by the share of its responses that stay:

conflict_i = [some a_ik > delta] and [some a_ik < -delta];    s_i = sum_k a_ik / (sum_k |a_ik| + eps_s)
keep_i = not conflict_i ("hard"), or not (conflict_i and |s_i| < tau) ("snr")
c_g = responses kept / responses of the group;    pre_i = keep_i c_g sum_k a_ik
A_i = (pre_i - mean) / sqrt(var + 1e-8) over the steps of the kept responses, 0 for the others.

tau is 0.8, that of the authors' launch scripts, where their configuration files have 0.2. c_g comes before the
whitening, which would undo a common scale, and can turn the sign of a kept response of little weight. Where two rewards
are strictly opposed nothing is kept. With one reward nothing conflicts. The authors weigh all rewards alike; here a_ik
is multiplied by the weight of its reward (`--reward NAME@w`), 1 where none is given. The authors multiply the a_ik by
the length before they take signs and ratios; it cancels in both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from polopt.core.errors import UsageError
from polopt.core.part import Part, part
from polopt.core.registry import method
from polopt.core.rollout import Rollout
from polopt.methods.credit.gdpo_multireward import gdpo_multireward, reward_scores


@part("advantage", "conflict-filter")
@dataclass(frozen=True)
class ConflictFilter(Part):
    """Sum of the z-scores of the rewards, of responses without (severe) conflict, times c_g, whitened; [N].

    ``mode`` and ``tau`` as in the file's equations, ``whiten`` off leaves pre_i. A reward that does not vary in a group
    causes no conflict; an invalid trajectory gets 0 and does not count in c_g. arXiv:2606.16771. Raises UsageError for
    a tau outside [0, 1].
    """

    mode: Literal["snr", "hard"] = "snr"
    tau: float = 0.8
    whiten: bool = True
    eps: float = 1e-6
    delta: float = 1e-8
    ratio_eps: float = 1e-8

    needs = frozenset({"reward", "reward/*"})
    unit = "batch"

    def __post_init__(self) -> None:
        if not 0 <= self.tau <= 1:
            raise UsageError(f"tau bounds a ratio and must lie in [0, 1], got {self.tau}")

    def __call__(self, rollout: Rollout) -> Float[Tensor, " step"]:
        weights = rollout.reward_weights
        scores = torch.stack([weights[name] * score for name, score in reward_scores(rollout, self.eps).items()])
        dropped, invalid = self.dropped(rollout, scores), rollout.reward.isnan()
        share = rollout.group_mean((~dropped).to(scores).masked_fill(invalid, torch.nan))
        scaled = (scores.sum(0) * share[rollout.group]).masked_fill(dropped | invalid, torch.nan)
        steps = rollout.spread(scaled)
        return rollout.whiten(steps) if self.whiten else steps.nan_to_num(0.0)

    def dropped(self, rollout: Rollout, scores: Float[Tensor, "reward trajectory"]) -> Bool[Tensor, " trajectory"]:
        """The responses that do not teach."""
        conflict = (scores > self.delta).any(0) & (scores < -self.delta).any(0)
        if self.mode == "hard":
            return conflict
        ratio = scores.sum(0).abs() / (scores.abs().sum(0) + self.ratio_eps)
        return conflict & (ratio < self.tau)


gd2po = method("gd2po", gdpo_multireward, seed="022", paper="arXiv:2606.16771", advantage=ConflictFilter())

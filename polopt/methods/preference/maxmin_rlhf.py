"""MaxMin-RLHF: serve the group of users that is worst off (Chakraborty et al. 2024, arXiv:2402.08925).

K reward models r_k, one per taste, found by expectation-maximisation over the users' comparisons
(`polopt.rewards.mixtures`). The policy maximises the egalitarian objective
max_pi min_k F_k(pi),  F_k(pi) = E[r_k(x, y)] - beta KL(pi || pi_ref):
at iteration t, k_t = argmin_k of the batch's mean reward (the KL is common to all k), and PPO updates on r_{k_t}.
No gradient flows through the argmin.

Settled: the official script takes the minimum per sample, reward_n = min_k r_k(x_n, y_n), which is below the group
minimum (``mode`` "sample"); the default is the stated objective. Eight epochs are the script's; its early stop at a KL
of 0.1 is left out. The rewards must share a scale, or the argmin is that of the smaller numbers (not in the paper):
`--reward model:FOLDER` standardises each by its training answers. ``eta`` is our smooth variant, for an argmin that
swings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from polopt.core.errors import UsageError
from polopt.core.method import Schedule
from polopt.core.part import Part, part
from polopt.core.registry import method
from polopt.core.rollout import Rollout
from polopt.methods.base.ppo import ppo
from polopt.rewards.shaping import KLPenalty


@part("reward", "maxmin")
@dataclass(frozen=True)
class MaxMin(Part):
    """reward_i = r_k(i) of the named rewards [M]: k the one with the least mean over the batch, or over its own sample.

    ``mode`` "group": one k for the batch, the first of equals; with ``eta`` the mean over k with the weights
    softmax_k(-eta mean_k). "sample": k(i) = argmin_k r_k(i). The weights of the total are not read. A trajectory
    without a valid reward enters no mean; its reward is NaN where that of a model that is read is. Gives ``worst`` [M],
    the place of k in the order of the rewards' names (of the largest weight, with ``eta``).
    """

    mode: Literal["group", "sample"] = "group"
    eta: float | None = None

    needs = frozenset({"reward/*"})
    gives = frozenset({"worst"})

    def __post_init__(self) -> None:
        if self.eta is not None and (self.mode == "sample" or not self.eta >= 0):
            raise UsageError(f"maxmin: eta is for mode group and at least 0, got {self.eta} with mode {self.mode!r}")

    def __call__(self, rollout: Rollout) -> Rollout:
        rewards = torch.stack([value for _, value in sorted(rollout.rewards.items())])
        mean = rewards.nanmean(1)
        if self.mode == "sample":
            # The least of some is not the least of all: NaN wins.
            worst, reward = rewards.nan_to_num(torch.inf).argmin(0), rewards.amin(0)
        else:
            least = int(mean.nan_to_num(torch.inf).argmin())
            worst, reward = torch.full_like(rollout.lengths, least), rewards[least]
            if self.eta is not None:
                reward = ((-self.eta * mean).softmax(0)[:, None] * rewards).sum(0)
        return rollout.with_columns(trajectory={"reward": reward.clone(), "worst": worst})


maxmin_rlhf = method(
    "maxmin-rlhf",
    ppo,
    seed="197",
    paper="arXiv:2402.08925",
    reward=MaxMin() | KLPenalty(beta=0.05),
    schedule=Schedule(epochs=8),
)

"""Advantages of a trajectory relative to its group, constant over its steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.core.part import Part, part
from polopt.core.rollout import Rollout


@part("advantage", "group-zscore")
@dataclass(frozen=True)
class GroupZScore(Part):
    """A_i = (R_i - mean_g) / (std_g + eps), the standardised return of a trajectory within its group.

    Returns [M], sample standard deviation (n - 1) unless ``unbiased`` is off. Equal returns, a group of one and an
    invalid (NaN) return give exactly 0. ``eps`` keeps a nearly equal group finite (1e-4 in TRL, 1e-6 in verl).
    Shao et al. 2024, arXiv:2402.03300, section 4.1.
    """

    eps: float = 1e-4
    unbiased: bool = True

    needs = frozenset({"reward"})

    def __call__(self, rollout: Rollout) -> Float[Tensor, " trajectory"]:
        return rollout.group_zscore(rollout.trajectory_return, eps=self.eps, unbiased=self.unbiased)


@part("advantage", "group-center")
@dataclass(frozen=True)
class GroupCenter(Part):
    """A_i = R_i - mean_g, [M]; equal returns, a group of one and an invalid return give exactly 0.

    Liu et al. 2025, arXiv:2503.20783.
    """

    needs = frozenset({"reward"})

    def __call__(self, rollout: Rollout) -> Float[Tensor, " trajectory"]:
        return rollout.group_center(rollout.trajectory_return)


@part("advantage", "leave-one-out")
@dataclass(frozen=True)
class LeaveOneOut(Part):
    """A_i = R_i - mean of the other valid returns of its group = n / (n - 1) * (R_i - mean_g), [M].

    A group with a single valid return has nothing to compare and gives 0. ``normalize`` standardises over the batch,
    (A - mean) / (std + 1e-4). Kool et al. 2019; Ahmadian et al. 2024, arXiv:2402.14740.
    """

    normalize: bool = False

    needs = frozenset({"reward"})

    def __call__(self, rollout: Rollout) -> Float[Tensor, " trajectory"]:
        returns = rollout.trajectory_return
        count = rollout.group_count(returns)[rollout.group]
        advantage = rollout.group_center(returns) * count / (count - 1).clamp_min(1)
        if not self.normalize:
            return advantage
        return rollout.as_one_group.group_zscore(torch.where(returns.isnan(), returns, advantage), eps=1e-4)

"""D3S: the rollouts of largest advantage variance and their decisive steps (Wang et al. 2025, arXiv:2509.22115).

A_i is the group z-score over everything that was sampled, never normalised again;
S = argmax over subsets of N rollouts of Var({A_i : i in S}), of the whole batch or of each query;
M_it = [|A_it| H_it is among the ceil(K n) largest of the n steps of S];
[N, K] = (1 - p) [N_0, K_0] + p [N_1, K_1], p the share of the budget that is spent;
L = -(1/Z) sum_{i in S} sum_t M_it min(rho_it A_i, clip(rho_it, 1 - low, 1 + high) A_i), Z = sum M.

Selection follows the advantage: with another `--advantage` it selects by that. The paper compares selection within a
query and across queries, one in place of the other: `scope`. Its public text leaves open the ratios, Z, the rounding
and whose entropy is meant: here N goes from 25% to 75% of the trainable rollouts (rounded), K from 20% to 80% of their
steps (upwards), H is the sampling policy's, which costs no pass, and ties go to the first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from polopt.aggregations import TokenMean
from polopt.controllers import LinearSchedule
from polopt.core.errors import UsageError
from polopt.core.part import Part, part
from polopt.core.registry import method
from polopt.core.rollout import Rollout
from polopt.methods.base.grpo import grpo


def most_varied(values: Float[Tensor, " item"], count: int) -> Int[Tensor, " kept"]:
    """Places of the ``count`` values of largest population variance around their own mean, O(n log n).

    Some optimum is the k smallest with the count - k largest; all k are tried by prefix sums in float64.
    """
    order = values.argsort(stable=True)
    sorted_values = values[order].detach().cpu().double()
    centred = sorted_values - sorted_values.mean()
    sums = torch.nn.functional.pad(torch.stack([centred, centred.square()]).cumsum(1), (1, 0))
    low = torch.arange(count + 1)
    mean, square = (sums[:, low] + sums[:, -1:] - sums[:, len(values) - count + low]) / count
    best = int((square - mean.square()).argmax())
    return torch.cat([order[:best], order[len(values) - count + best :]])


@part("weight", "dual-level")
@dataclass(frozen=True)
class DualLevel(Part):
    """Leaves in ``mask`` the share ``steps`` of largest |A| H in the share ``rollouts`` of largest advantage variance.

    A rollout's advantage is the mean over its steps. ``scope`` selects over the batch or in each query (group) by
    itself. ``normalizer`` "all" counts every step of the selected rollouts in the token mean: those left out have
    weight 0 instead. arXiv:2509.22115. Raises UsageError for a share outside (0, 1].
    """

    rollouts: float = 0.25
    steps: float = 0.2
    scope: Literal["batch", "query"] = "batch"
    normalizer: Literal["kept", "all"] = "kept"

    needs = frozenset({"advantage", "entropy"})
    gives = frozenset({"mask"})
    unit = "batch"

    def __post_init__(self) -> None:
        if not (0 < self.rollouts <= 1 and 0 < self.steps <= 1):
            raise UsageError(f"dual-level keeps shares in (0, 1], got rollouts {self.rollouts}, steps {self.steps}")

    def __call__(self, rollout: Rollout) -> dict[str, Tensor]:
        selected = rollout.spread(self.select(rollout)) & rollout.mask
        key = torch.where(selected, rollout.advantage.abs() * rollout["entropy"], -1.0)
        kept = torch.zeros_like(selected)
        kept[key.argsort(descending=True, stable=True)[: math.ceil(self.steps * int(selected.sum()))]] = True
        mask = kept if self.normalizer == "kept" else selected
        return {"mask": mask, "weight": kept.to(key.dtype)}

    def select(self, rollout: Rollout) -> Tensor:
        """Which trajectories [M] are in S; only those with a step that trains can be."""
        advantage = rollout.mean_steps(rollout.advantage)
        chosen = torch.zeros_like(advantage, dtype=torch.bool)
        owner = torch.zeros_like(rollout.group) if self.scope == "batch" else rollout.group
        for pool in range(int(owner.max()) + 1):
            members = ((owner == pool) & (rollout.active_lengths > 0)).nonzero().flatten()
            if len(members):
                count = max(1, int(self.rollouts * len(members) + 0.5))
                chosen[members[most_varied(advantage[members], count)]] = True
        return chosen


d3s = method(
    "d3s",
    grpo,
    seed="016",
    paper="arXiv:2509.22115",
    weight=DualLevel(),
    aggregation=TokenMean(),
    controller=LinearSchedule(
        start={"weight.rollouts": 0.25, "weight.steps": 0.2},
        end={"weight.rollouts": 0.75, "weight.steps": 0.8},
    ),
)

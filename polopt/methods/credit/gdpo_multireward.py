"""GDPO: normalise each of several rewards by itself (Liu et al. 2026, arXiv:2601.05242).

A group z-score of the sum of rewards gives different combinations the same advantage: of two responses with totals
(0, 1) or (0, 2) the better one gets 0.7071 either way. GDPO normalises first and adds afterwards:

a_ik = (r_ik - mean_g r_k) / (std_g r_k + eps)                         (Eq. 4, sample std)
S_i = sum_k w_k a_ik                                                   (Eq. 5 and 7)
A_i = (S_i - mean_batch S) / (std_batch S + eps)                       (Eq. 6; mean_batch S = 0, as it is in each group)

Eq. 6 keeps the scale from growing with the number of rewards. As in the authors' TRL code (eps 1e-4) it is left out for
a single reward, which makes the method GRPO; they count a reward that does not apply (NaN) as 0, here it is in no mean
and adds nothing. Only w_k sets the importance of a reward, its scale cancels: `--reward NAME@w`, or `weights`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.core.errors import UsageError
from polopt.core.part import Part, part
from polopt.core.registry import method
from polopt.core.rollout import Rollout
from polopt.methods.base.grpo import grpo


def reward_scores(rollout: Rollout, eps: float) -> dict[str, Float[Tensor, " trajectory"]]:
    """a_ik by name of the reward; exactly 0 where it is the same in the whole group or NaN. Eq. 4.

    A trajectory whose total is invalid gets 0 and is in no mean. Raises UsageError for rewards of steps.
    """
    if "step_reward" in rollout:
        raise UsageError(
            "normalising each reward by itself would undo the scale of rewards of single steps; leave out the part that"
            " gives them (a KL to the reference can be a regularizer: --regularizer kl)"
        )
    total = rollout.reward
    valid = {name: torch.where(total.isnan(), total, values) for name, values in rollout.rewards.items()}
    return {name: rollout.group_zscore(values, eps=eps) for name, values in valid.items()}


@part("advantage", "decoupled-zscore")
@dataclass(frozen=True)
class DecoupledZScore(Part):
    """A = normalise_batch(sum_k w_k a_ik), a_ik the z-score of reward k in its group; an invalid trajectory gets 0.

    ``batch``: "rollout" is Eq. 6, [M]; "token" is (S - mean) / sqrt(var + 1e-8) over the trainable steps, [N], as in
    the authors' verl code (eps 1e-6 there); "off" is S. A reward that ``weights`` does not name has the run's weight.
    arXiv:2601.05242. Raises UsageError for a weight of a reward that the run does not have.
    """

    weights: Mapping[str, float] | None = None
    batch: Literal["rollout", "token", "off"] = "rollout"
    eps: float = 1e-4

    needs = frozenset({"reward", "reward/*"})
    unit = "batch"

    def __call__(self, rollout: Rollout) -> Float[Tensor, " trajectory_or_step"]:
        scores = reward_scores(rollout, self.eps)
        weights: dict[str, float | Tensor] = {**rollout.reward_weights, **(self.weights or {})}
        if unknown := sorted(set(weights) - set(scores)):
            raise UsageError(f"there is no reward {unknown[0]!r} to weigh; the run has {', '.join(sorted(scores))}")
        total = torch.stack([weights[name] * score for name, score in scores.items()]).sum(0)
        if self.batch == "off" or len(scores) == 1:
            return total
        valid = torch.where(rollout.reward.isnan(), rollout.reward, total)
        if self.batch == "token":
            return rollout.whiten(rollout.spread(valid))
        # The mean is 0 by construction; what rounding leaves of it would move what is exactly 0.
        return total / (rollout.as_one_group.group_std(valid) + self.eps)


@part("reward", "conditioned")
@dataclass(frozen=True)
class ConditionedReward(Part):
    """r_easy <- r_easy * [r_hard >= threshold], NaN where r_hard is: for an easy reward that crowds out a hard one.

    ``weight`` is that of the easy reward in the total, which changes too. arXiv:2601.05242, Eq. 8; defaults: its length
    reward for right answers.
    """

    easy: str = "length"
    hard: str = "correct"
    threshold: float = 1.0
    weight: float = 1.0

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"reward", f"reward/{self.easy}", f"reward/{self.hard}"})

    def __call__(self, rollout: Rollout) -> Rollout:
        before, hard = rollout[f"reward/{self.easy}"], rollout[f"reward/{self.hard}"]
        after = torch.where(hard.isnan(), hard, torch.where(hard >= self.threshold, before, torch.zeros_like(before)))
        total = rollout.reward + self.weight * (after.nan_to_num(0.0) - before.nan_to_num(0.0))
        return rollout.with_columns(trajectory={f"reward/{self.easy}": after, "reward": total})


gdpo_multireward = method(
    "gdpo-multireward",
    grpo,
    seed="024",
    paper="arXiv:2601.05242",
    task="worksheet",
    advantage=DecoupledZScore(),
)

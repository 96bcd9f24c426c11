"""MA-RLHF: PPO whose credit runs over macro actions of several tokens (Chai et al. 2024, arXiv:2410.02743).

Macro action k is the run of tokens b_k, ..., b_{k+1} - 1. Values and rewards are pooled, GAE runs over the macro
actions, and all tokens of one share its advantage and the target of their values:
V_k = sum_j sigma_j v_{b_k + j}, R_k likewise;  delta_k = R_k + gamma V_{k+1} - V_k, V = 0 after the last;
A_k = delta_k + gamma lambda A_{k+1};  Ret_k = A_k + V_k; the losses are PPO's with A_t = A_k and Ret_t = Ret_k.
n = 1 is PPO, one macro action for the whole answer a bandit (`--advantage.n none`).

The paper adds up the rewards of a macro action; its code pools them like the values, which divides the KL penalty by
n_k: the default here, `--advantage.reward-pool sum` is the paper. The code keeps the score undiluted by making the last
token a macro action of its own, and takes perplexities from the reference model. Where T - 1 is a multiple of n it
inserts an empty macro action before the last token; that is mended. As in its scripts: one pass per rollout, the score
clipped to +-2.5, no whitening. They average over one response at a time (`--aggregation sequence-mean`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from polopt.advantages.macro import MacroActions, Pool, shares
from polopt.core.method import Schedule
from polopt.core.part import part
from polopt.core.registry import method
from polopt.core.rollout import Rollout
from polopt.core.segments import segment_cumsum, segment_is_last, segment_sum
from polopt.methods.base.ppo import GAE, ppo
from polopt.rewards.shaping import ClipReward, KLPenalty


@part("advantage", "macro-gae")
@dataclass(frozen=True)
class MacroGAE(GAE, MacroActions):
    """PPO's GAE with macro actions for steps; gives ``advantage`` and ``return`` [N], the same on all steps of one.

    ``pool`` is sigma: ``equal``, ``unit`` (1 on the last step) or ``position`` (1 / (j + 1), normalised).
    ``reward_pool``: ``pooled`` by sigma as in the code, or the ``sum`` of gamma^j r as in the paper. The boundaries are
    those of `polopt.advantages.macro.MacroActions`. An invalid reward gives advantage 0 and return v_t.
    """

    pool: Pool = "equal"
    reward_pool: Literal["pooled", "sum"] = "pooled"
    whiten: bool = False

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return GAE.needs | self.columns

    def __call__(self, rollout: Rollout) -> dict[str, Tensor]:
        mask, value = rollout.mask, torch.where(rollout.mask, rollout["value"], 0.0)
        starts = self.starts(rollout)
        macro, owner = (starts.cumsum(0) - 1).clamp_min(0), rollout.trajectory[starts]
        if not len(owner):
            return {"advantage": value, "return": value}
        last = segment_is_last(rollout.trajectory, rollout.n_trajectories, mask=mask)
        reward = torch.where(last, rollout.spread(rollout.reward.nan_to_num(0.0)), 0.0)
        if "step_reward" in rollout:
            reward = reward + torch.where(mask, rollout["step_reward"], 0.0)
        within = segment_cumsum(torch.ones_like(value), macro, len(owner), mask=mask, exclusive=True)
        share = shares(macro, within, mask, len(owner), self.pool)
        weight = share if self.reward_pool == "pooled" else self.gamma**within
        pooled = {
            "value": segment_sum(share * value, macro, len(owner), mask=mask),
            "step_reward": segment_sum(weight * reward, macro, len(owner), mask=mask),
        }
        # Macro actions are the steps of a shorter rollout, whose score is in their rewards; what is invalid stays so.
        having, place = torch.unique(owner, return_inverse=True)
        invalid = rollout.reward.isnan()
        score = torch.where(invalid[having], torch.nan, torch.zeros_like(rollout.reward[having]))
        short = Rollout.from_arrays(place, rollout.group[having], step=pooled, trajectories={"reward": score})
        made = super().__call__(short)
        valid = mask & ~rollout.spread(invalid)
        fallback = {"advantage": torch.zeros_like(value), "return": value}
        return {name: torch.where(valid, made[name][macro], other) for name, other in fallback.items()}


ma_rlhf = method(
    "ma-rlhf",
    ppo,
    seed="167",
    paper="arXiv:2410.02743",
    reward=ClipReward(-2.5, 2.5) | KLPenalty(beta=0.05),
    advantage=MacroGAE(),
    schedule=Schedule(epochs=1),
)

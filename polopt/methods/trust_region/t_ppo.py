"""T-PPO: truncated PPO, which learns from partial responses (Fan et al. 2025, arXiv:2506.15050).

A response of l steps so far, values V(s_0) .. V(s_{l-1}):  delta_t = r_t + gamma V(s_{t+1}) - V(s_t),
A_t = sum_k (gamma lambda)^k delta_{t+k} (EGAE), with V(s_l) := V(s_{l-1}) where it is unfinished and 0 where it ended.
An iteration samples at most a window per response; what is unfinished goes on in the next one, ended responses make
room for new prompts. The policy trains on the steps of this window (PPO's clip, mean over them), the critic on all
steps of the responses that ended, towards G_t = sum_k gamma^k r_{t+k}: 0.5 (V - G)^2, mean over them.

There is no official code. From the abstract and the public reviews of the submission: the value at the cut, the critic
on ended responses only, all newly generated tokens for the policy, a window of a third of the budget (8K of 24K), 16
mini-batches per iteration (512 of 8192 responses). Assumed: lambda 0.95, clip 0.2, no whitening; steps of earlier
windows do not train again; no last steps of unfinished responses are left out. The paper's critic is a network of its
own with a rate of its own; here it is a head on the policy's trunk, whose loss has the coefficient 0.1 of `ppo`. Before
the critic has learnt something, unfinished responses teach next to nothing. With gamma 1 the step before a cut has
A = 0: as windows start with the response, that is always the same place (`--rollout.window` moves it).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from polopt.core.method import Schedule
from polopt.core.part import part
from polopt.core.registry import method
from polopt.core.rollout import Rollout
from polopt.methods.base.ppo import GAE, ClippedValueLoss, ppo
from polopt.objectives.clipped_surrogate import ClippedSurrogate
from polopt.rollouts.windows import Windows


@part("advantage", "egae")
@dataclass(frozen=True)
class EGAE(GAE):
    """GAE in which ``cut`` times its last value stands for the value after an ``unfinished`` trajectory; 1 is EGAE.

    ``advantage`` [N] on the steps of this window, ``return`` [N] = G_t on those of ``mask/critic``; an invalid reward
    gives 0 and V_t.
    """

    whiten: bool = False
    cut: float = 1.0

    needs = GAE.needs | {"unfinished", "mask/critic"}

    def __call__(self, rollout: Rollout) -> dict[str, Tensor]:
        after = self.cut * rollout.at_last_step(rollout["value"])
        # gamma V(s_l) enters delta_{l-1} as a reward does.
        goes_on = rollout["unfinished"].bool() & ~rollout.reward.isnan()
        reward = torch.where(goes_on, self.gamma * after, rollout.reward)
        advantage = GAE.__call__(self, rollout.with_columns(trajectory={"reward": reward}))["advantage"]
        # With lambda 1, A_t + V_t is the sum of the rewards to come.
        plain = replace(self, lam=1.0, whiten=False)
        return {"advantage": advantage, "return": GAE.__call__(plain, rollout.under("mask/critic"))["return"]}


@part("objective", "ended-value")
@dataclass(frozen=True)
class EndedValueLoss(ClippedValueLoss):
    """l_t = coefficient / 2 * (V_t - G_t)^2 on the steps of ``mask/critic``, averaged over those of the whole batch."""

    width: float | None = None

    mask = "mask/critic"


t_ppo = method(
    "t-ppo",
    ppo,
    seed="032",
    paper="arXiv:2506.15050",
    rollout=Windows(),
    reward=None,
    advantage=EGAE(),
    objective=ClippedSurrogate() + EndedValueLoss(),
    schedule=Schedule(minibatches=16),
)

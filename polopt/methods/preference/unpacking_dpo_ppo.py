"""Unpacking DPO and PPO: the exact PPO that a factorial study compares (Ivison et al. 2024, arXiv:2406.09279).

S_i = gain RM(y_i) + bias, replaced by -10 where the answer does not end by itself;
R_t = -k (log pi_old,t - log pi_ref,t), plus S_i at the last step, k = 0.05;
delta_t = R_t + V_{t+1} - V_t, V = 0 past the end;  A_t = delta_t + 0.95 A_{t+1};  return = A + V;
A <- (A - mean) / sqrt(var + 1e-6) over the steps of the batch, var with n - 1;
L = mean over steps of max(-A rho, -A clip(rho, 0.8, 1.2)) + 0.1 / 2 max((V - ret)^2, (V_old + clip(V - V_old, +-0.2)
- ret)^2): one pass over the answers in 8 minibatches, one answer per prompt (`--group 1`).
The cells of the study cross it with DPO (beta 0.1), preference data, reward models and prompts, in one budget; the
order of effects is the data, then PPO over DPO, larger reward models, prompts of the test's own domain.

The authors' code begins the value model, a network of its own, at the reward model, and anneals the rate; here the
critic is a head on the policy's trunk. In the small world the score is the task's. `polopt study unpacking-dpo-ppo`
compares the cells.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from polopt.core.method import Schedule
from polopt.core.part import Part, part
from polopt.core.registry import method
from polopt.core.rollout import Rollout
from polopt.methods.base.ppo import GAE, ppo
from polopt.rewards.shaping import KLPenalty


@part("reward", "ended-score")
@dataclass(frozen=True)
class EndedScore(Part):
    """``reward`` <- gain r_i + bias, or ``missing`` for an answer that a length limit cut; an invalid (NaN) one stays.

    What the tasks' own ``score`` tells remains. arXiv:2406.09279, appendix on PPO's details.
    """

    gain: float = 1.0
    bias: float = 0.0
    missing: float = -10.0

    needs = frozenset({"reward", "truncated"})

    def __call__(self, rollout: Rollout) -> Rollout:
        reward = rollout.reward
        cut = rollout["truncated"].bool() & ~reward.isnan()
        score = torch.where(cut, self.missing, self.gain * reward + self.bias)
        return rollout.with_columns(trajectory={"reward": score})


unpacking_dpo_ppo = method(
    "unpacking-dpo-ppo",
    ppo,
    seed="084",
    paper="arXiv:2406.09279",
    reward=EndedScore() | KLPenalty(beta=0.05),
    advantage=GAE(eps=1e-6),
    schedule=Schedule(minibatches=8),
)

"""PPO: clipped surrogate with a critic and generalised advantage estimation (Schulman et al. 2017, arXiv:1707.06347).

r_t = -beta * (log pi_old,t - log pi_ref,t), plus the score on the last step;
delta_t = r_t + gamma V_{t+1} - V_t, V after the last step = 0;
A_t = delta_t + gamma lambda A_{t+1};  Ret_t = A_t + V_t;
A <- whiten(A) over the batch;  L = clipped surrogate + c_v * clipped value loss, both token means.
GAE: Schulman et al. 2015, arXiv:1506.02438. Language models: Ouyang et al. 2022, arXiv:2203.02155.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from polopt.aggregations import TokenMean
from polopt.core.loss import Evaluation, Loss, per_step
from polopt.core.method import Schedule
from polopt.core.part import Part, part
from polopt.core.registry import method
from polopt.core.rollout import Rollout, Unit
from polopt.core.segments import segment_is_last, segment_reverse_scan, segment_shift
from polopt.methods.base.reinforce import reinforce
from polopt.objectives.clipped_surrogate import ClippedSurrogate
from polopt.rewards.shaping import KLPenalty


@part("advantage", "gae")
@dataclass(frozen=True)
class GAE(Part):
    """A_t = delta_t + gamma lam A_{t+1}, delta_t = r_t + gamma V_{t+1} - V_t; gives ``advantage`` and ``return`` [N].

    r_t is ``step_reward`` plus, on the last trainable step, the trajectory's ``reward``; V_t is the value of the prefix
    before step t and 0 after the last step, also where a length limit cut the trajectory. The return A_t + V_t is taken
    before whitening, whose variance (over n - 1 unless ``unbiased`` is off) has ``eps`` added. Masked steps are
    skipped; a trajectory with an invalid reward gets advantage 0 and return V_t. arXiv:1506.02438, Eq. 16.
    """

    gamma: float = 1.0
    lam: float = 0.95
    whiten: bool = True
    eps: float = 1e-8
    unbiased: bool = True

    needs = frozenset({"reward", "value"})
    gives = frozenset({"return"})

    @property
    def unit(self) -> Unit:  # type: ignore[override]
        return "batch" if self.whiten else "step"

    def __call__(self, rollout: Rollout) -> dict[str, Tensor]:
        trajectory, count, mask = rollout.trajectory, rollout.n_trajectories, rollout.mask
        value = torch.where(mask, rollout["value"], 0.0)
        last = segment_is_last(trajectory, count, mask=mask)
        reward = torch.where(last, rollout.spread(rollout.reward.nan_to_num(0.0)), 0.0)
        if "step_reward" in rollout:
            reward = reward + torch.where(mask, rollout["step_reward"], 0.0)
        delta = reward + self.gamma * segment_shift(value, trajectory, mask=mask) - value
        advantage = segment_reverse_scan(delta, self.gamma * self.lam, trajectory, count, mask=mask)
        valid = rollout.spread(~rollout.reward.isnan()) & mask
        advantage = torch.where(valid, advantage, 0.0)
        returns = advantage + value
        if self.whiten:
            # Steps of invalid trajectories take no part in the statistics.
            advantage = rollout.whiten(torch.where(valid, advantage, torch.nan), eps=self.eps, unbiased=self.unbiased)
        return {"advantage": advantage, "return": returns}


@part("objective", "clipped-value")
@dataclass(frozen=True)
class ClippedValueLoss(Part):
    """l_t = coefficient / 2 * max((V_t - Ret_t)^2, (clip(V_t, V_old,t - width, V_old,t + width) - Ret_t)^2).

    ``width`` None is the plain squared error. Ret and V_old are constants.
    """

    coefficient: float = 0.1
    width: float | None = 0.2

    needs = frozenset({"value", "return"})
    evaluates = frozenset({"value"})

    def __call__(self, evaluation: Evaluation, rollout: Rollout) -> Loss:
        value, target, old = evaluation.value, rollout["return"], rollout["value"]
        error = (value - target).square()
        if self.width is not None:
            near = torch.minimum(torch.maximum(value, old - self.width), old + self.width)
            error = torch.maximum(error, (near - target).square())
        return per_step(
            self.coefficient * 0.5 * error, value__error=rollout.batch_mean((value - target).detach().square())
        )


ppo = method(
    "ppo",
    reinforce,
    seed="base",
    paper="arXiv:1707.06347",
    reward=KLPenalty(beta=0.05),
    advantage=GAE(),
    objective=ClippedSurrogate() + ClippedValueLoss(),
    aggregation=TokenMean(),
    schedule=Schedule(epochs=4),
)

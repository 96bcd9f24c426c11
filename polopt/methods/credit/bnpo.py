"""BNPO: Beta normalization policy optimisation (Xiao et al. 2025, arXiv:2506.02864).

REINFORCE with a mean baseline takes r - p, p the success rate of the prompt; GRPO divides by sqrt(p (1 - p)) whatever
the rates of the batch are. BNPO fits Beta(a, b) to them by their moments and divides by a Beta density in p:

c = m (1 - m) / v - 1,  a = c m,  b = c (1 - m),  m and v the mean and sample variance of the p_q over prompts q
alpha = max(1, 1 + a/3),  beta = max(1, 1 + b/3)
A_i = (r_i - p_q) / f(p_q; alpha, beta),  f(p) = p^(alpha-1) (1-p)^(beta-1) / B(alpha, beta),  1/f at most 1e6

With score and normalised reward uncorrelated and p ~ Beta(a, b), these two minimise the variance of the gradient. f = 1
(alpha = beta = 1) is REINFORCE, 3/2 each pi/8 times GRPO. The scale of A moves with the fit from batch to batch. Clip
bounds, dual clip and the sum over steps are the authors' code's. A prompt with a single response teaches nothing and
enters the fit with its reward (their code: with 0). Where no two prompts differ in p there is nothing to fit and alpha
= beta = 1, as they have it for a single prompt. TRL's `loss_type="bnpo"` is something else: a mean over tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.aggregations import SequenceSum
from polopt.core.part import Part, part
from polopt.core.registry import method
from polopt.core.rollout import Rollout
from polopt.methods.base.grpo import grpo
from polopt.objectives.clipped_surrogate import ClippedSurrogate

LEAST_VARIANCE = 1e-6
"""Of success rates that differ: the density of others would be too narrow to compute."""


def optimal_density(rates: Float[Tensor, " prompt"]) -> tuple[float, float]:
    """(alpha, beta) by the moments of the prompts' success rates in [0, 1]; (1, 1) where there is nothing to fit."""
    if len(rates) < 2 or float(rates.var()) < LEAST_VARIANCE:
        return 1.0, 1.0
    mean = float(rates.mean())
    concentration = mean * (1 - mean) / float(rates.var()) - 1
    return max(1.0, 1 + concentration * mean / 3), max(1.0, 1 + concentration * (1 - mean) / 3)


@part("advantage", "beta-normalized")
@dataclass(frozen=True)
class BetaNormalized(Part):
    """A_i = min(1/f(p_g; alpha, beta), cap) (r_i - p_g), [M]; groups of equal rewards and invalid rewards give 0.

    Rewards between ``low`` and ``high`` are scaled to [0, 1]; the range is widened to hold those of the batch.
    ``alpha`` and ``beta`` fix the density, which is fitted where they are None. ``decompose``: the mean over the named
    rewards of their A, each with its own fit and times its weight in the run. The code's comments advise a tighter
    ``cap``. arXiv:2506.02864.
    """

    alpha: float | None = None
    beta: float | None = None
    decompose: bool = False
    low: float = 0.0
    high: float = 1.0
    cap: float = 1e6

    unit = "batch"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"reward", "reward/*"}) if self.decompose else frozenset({"reward"})

    def __call__(self, rollout: Rollout) -> Float[Tensor, " trajectory"]:
        total = rollout.trajectory_return
        if not self.decompose:
            return self.normalized(rollout, total)
        weights = rollout.reward_weights
        named = {name: torch.where(total.isnan(), total, reward) for name, reward in rollout.rewards.items()}
        credit = [weights[name] * self.normalized(rollout, reward) for name, reward in named.items()]
        return torch.stack(credit).mean(0)

    def normalized(self, rollout: Rollout, reward: Float[Tensor, " trajectory"]) -> Float[Tensor, " trajectory"]:
        """A of one reward."""
        known = reward[~reward.isnan()].tolist()
        low, high = min([self.low, *known]), max([self.high, *known])
        reward = (reward - low) / (high - low)
        rate = rollout.group_mean(reward).clamp(0, 1)
        alpha, beta = optimal_density(rate[rollout.group_count(reward) > 0])
        alpha, beta = self.alpha or alpha, self.beta or beta
        shape = rate.new_tensor([alpha, beta, alpha + beta]).lgamma()
        log_f = torch.xlogy(rate.new_tensor(alpha - 1), rate) + torch.special.xlog1py(rate.new_tensor(beta - 1), -rate)
        weight: Tensor = (shape[0] + shape[1] - shape[2] - log_f).exp().clamp(max=self.cap)
        return weight[rollout.group] * rollout.group_center(reward)


bnpo = method(
    "bnpo",
    grpo,
    seed="088",
    paper="arXiv:2506.02864",
    advantage=BetaNormalized(),
    objective=ClippedSurrogate(low=0.2, high=0.28, dual=10.0),
    aggregation=SequenceSum(),
)

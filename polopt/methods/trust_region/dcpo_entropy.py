"""DCPO: distribution-centric policy optimisation, entropy held on policy (Li et al. 2026, arXiv:2601.12730).

J = J_GRPO + alpha E_{o ~ pi_old}[ (pi_old^T / pi_old) R grad log pi ]: a REINFORCE term on right responses whose
expectation is moved to the policy at temperature T by a ratio per step, so that nothing is sampled at another one.
T = 1.2 where H <= H0, else 0.8, H the mean entropy of the iteration before (0 at first);
w_t = pi_old^T(o_t) / pi_old(o_t), not truncated;  p = share of the responses with score > 0.05;
alpha = a / (1 + a), a = min(|H0 - H|, 0.1) / p;  A'_it = (1 - alpha) A_i + alpha 1[score_i > 0.05] w_t;
L = -(1/N) sum_t min(rho_t A'_it, clip(rho_t, 0.8, 1.2) A'_it), with dual clip 3; rho = pi / pi_old at temperature 1.

All as in the authors' code (597358816/DCPO), A with sample deviation and 1e-6, H0 = 0.5 as in its script, four
minibatches (128 of 512 prompts each). Where no response is right, which divides by zero there, alpha is 0 here. H is
the mean of exact step entropies; the code estimates it by -log pi over the trained steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.advantages.group import GroupZScore
from polopt.aggregations import TokenMean
from polopt.controllers import TargetEntropy
from polopt.core.method import Schedule
from polopt.core.part import Part, part
from polopt.core.policy import at_temperature
from polopt.core.registry import method
from polopt.core.rollout import Rollout
from polopt.methods.base.grpo import grpo
from polopt.objectives.clipped_surrogate import ClippedSurrogate


@part("advantage", "distribution-centric")
@dataclass(frozen=True)
class DistributionCentric(Part):
    """A'_t = (1 - alpha) A_i + alpha [score_i > threshold] w_t, [N]; w_t = pi^T(a_t) / pi(a_t), A the group z-score.

    alpha = a / (1 + a), a = min(|gap|, cap) / p, p the share of the valid responses above the threshold; 0 where there
    is none. Responses with an invalid reward get 0.
    """

    temperature: float = 1.2
    gap: float = 0.5
    cap: float = 0.1
    threshold: float = 0.05

    unit = "batch"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"reward", "score", "logp", at_temperature("logp", self.temperature)})

    def alpha(self, share: float) -> float:
        """Weight of the REINFORCE term where this share of the responses is right."""
        a = min(abs(self.gap), self.cap) / share if share else 0.0
        return a / (1 + a)

    def __call__(self, rollout: Rollout) -> Float[Tensor, " step"]:
        valid = ~rollout.trajectory_return.isnan()
        right = valid & (rollout["score"] > self.threshold)
        alpha = self.alpha(float(right.sum()) / max(int(valid.sum()), 1))
        tempered = rollout[at_temperature("logp", self.temperature)]
        ratio = torch.where(rollout.mask, tempered - rollout.logp, 0.0).exp()
        group = rollout.spread(GroupZScore(eps=1e-6)(rollout))
        return (1 - alpha) * group + alpha * torch.where(rollout.spread(right), ratio, 0.0)


dcpo_entropy = method(
    "dcpo-entropy",
    grpo,
    seed="006",
    paper="arXiv:2601.12730",
    advantage=DistributionCentric(),
    objective=ClippedSurrogate(dual=3.0),
    aggregation=TokenMean(),
    controller=TargetEntropy(temperature="advantage.temperature", gap="advantage.gap"),
    schedule=Schedule(minibatches=4),
)

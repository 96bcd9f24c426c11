"""Divergence of the policy from a frozen model, in the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.core.loss import Evaluation, Loss, per_step
from polopt.core.part import Part, part
from polopt.core.rollout import Rollout
from polopt.objectives.ratio import MAX_LOG_RATIO

Estimator = Literal["k1", "k2", "k3"]


def kl_estimate(gap: Float[Tensor, " step"], estimator: Estimator) -> Float[Tensor, " step"]:
    """One-sample estimates of KL(pi || ref) from u = log ref - log pi: k1 = -u, k2 = u^2 / 2, k3 = exp(u) - u - 1.

    At one step, on samples of pi: k1 and k3 are unbiased in value; in gradient, differentiated through log pi of that
    step, k2 is, k1 has expectation 0 and k3 gives the gradient of KL(ref || pi). Over a response none of them gives
    the gradient of the KL between responses; a KL inside the reward does. Schulman 2020, "Approximating KL divergence".
    """
    match estimator:
        case "k1":
            return -gap
        case "k2":
            return gap.square() / 2
        case "k3":
            # expm1 keeps the small differences that matter when the two policies are close.
            return torch.expm1(gap.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)) - gap


@part("regularizer", "kl")
@dataclass(frozen=True)
class KL(Part):
    """l_t = beta * k(log pi_ref,t - log pi_t), per step, ``model`` naming the frozen model.

    k3 (the default, as in GRPO) is never negative; dk3/dlogp = 1 - exp(u). Shao et al. 2024, arXiv:2402.03300, Eq. 4.
    """

    beta: float = 0.04
    estimator: Estimator = "k3"
    model: str = "ref"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({f"logp/{self.model}"}) if self.beta else frozenset()

    def __call__(self, evaluation: Evaluation, rollout: Rollout) -> Loss:
        if not self.beta:
            return per_step(torch.zeros_like(evaluation.logp))
        gap = torch.where(rollout.mask, rollout[f"logp/{self.model}"] - evaluation.logp, 0.0)
        kl = kl_estimate(gap, self.estimator)
        metric = "kl" if self.model == "ref" else f"kl/{self.model}"
        return per_step(self.beta * kl, **{metric: rollout.batch_mean(kl.detach())})

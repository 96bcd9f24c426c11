"""A penalty on the KL above a threshold, stronger where the policy is sure of itself."""

from __future__ import annotations

from dataclasses import dataclass

from polopt.core.loss import Evaluation, Loss, total
from polopt.core.part import Part, part
from polopt.core.rollout import Rollout


@part("regularizer", "entropy-gated-kl")
@dataclass(frozen=True)
class EntropyGatedKL(Part):
    """strength max(k - threshold, 0)^2 g,  k = decay average + (1 - decay) KL,  g = max(0.5, floor / (H + 0.1)).

    KL = mean_t(log pi_t - log pi_model,t) over the batch's steps, signed: tokens less likely than under the model take
    from it. H is the mean entropy of the policy that sampled, nats. ``average``, ``threshold`` (both set by
    `polopt.controllers.KLThreshold`) and H are constants, so that dpenalty/dKL = 2 strength (1 - decay) (k - threshold)
    g above the threshold. Not ``differentiable``: a number without gradient. Logs ``penalty`` and ``penalty/kl``. Maity
    2026, arXiv:2602.04651.
    """

    threshold: float = 0.45
    average: float = 0.0
    decay: float = 0.9
    strength: float = 0.1
    floor: float = 2.0
    differentiable: bool = True
    model: str = "ref"

    unit = "batch"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"entropy", f"logp/{self.model}"})

    def __call__(self, evaluation: Evaluation, rollout: Rollout) -> Loss:
        kl = rollout.batch_mean(evaluation.logp - rollout[f"logp/{self.model}"])
        k = self.decay * self.average + (1 - self.decay) * kl
        gate = (self.floor / (rollout.batch_mean(rollout["entropy"]) + 0.1)).clamp_min(0.5)
        penalty = self.strength * (k - self.threshold).clamp_min(0).square() * gate
        return total(penalty if self.differentiable else penalty.detach(), penalty=penalty, penalty__kl=kl)

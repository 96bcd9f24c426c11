"""One optimizer step, shortened where it would move the policy too far."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from polopt.core.part import Part, part
from polopt.core.update import Step
from polopt.updates.gradient_step import descend


@part("update", "kl-scaled")
@dataclass(frozen=True)
class KLScaled(Part):
    """`polopt.updates.gradient_step.GradientStep` at min(1, max_kl / KL) times the learning rate.

    KL is that of the whole step, tried out and taken back (`Step.preview`); about quadratic in the rate, so that the
    step that is made stays well below ``max_kl``, nats per step. Costs two forward passes over the batch and a copy of
    parameters and moments. Logs ``update/preview_kl`` and ``update/rate_share``. Maity 2026, arXiv:2602.04651.
    """

    max_kl: float = 0.5
    max_norm: float = 1.0

    def __call__(self, step: Step) -> dict[str, float]:
        metrics = step.gradient()
        if not step.finite or all(parameter.grad is None for parameter in step.parameters):
            return descend(step, metrics, self.max_norm)
        norm = torch.nn.utils.clip_grad_norm_(step.parameters, self.max_norm)
        kl = step.preview() if torch.isfinite(norm) else 0.0
        share = min(1.0, self.max_kl / kl) if kl > 0 else 1.0
        metrics = descend(step, {**metrics, "update/preview_kl": kl, "update/rate_share": share}, math.inf, share)
        return {**metrics, "grad_norm": float(norm)} if step.finite else metrics

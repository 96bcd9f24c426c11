"""One optimizer step along the gradient of the batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from polopt.core.part import Part, part
from polopt.core.update import Step


@part("update", "gradient-step")
@dataclass(frozen=True)
class GradientStep(Part):
    """g <- grad L(batch), scaled to norm ``max_norm`` where it is longer, then one optimizer step.

    A loss or gradient that is not finite changes nothing and is counted; a batch without a gradient changes nothing.
    Logs ``loss`` and ``grad_norm`` (before clipping).
    """

    max_norm: float = 1.0

    def __call__(self, step: Step) -> dict[str, float]:
        return descend(step, step.gradient(), self.max_norm)


def descend(step: Step, metrics: dict[str, float], max_norm: float, scale: float = 1.0) -> dict[str, float]:
    """Clip the gradient of the step and go along it at ``scale`` times the learning rate; adds ``grad_norm``.

    Nothing moves where the loss or the gradient is not finite, or where there is no gradient.
    """
    if not step.finite:
        return metrics
    if all(parameter.grad is None for parameter in step.parameters):
        # Nothing to learn from: no step, so that neither moments nor weight decay move.
        return {**metrics, "grad_norm": 0.0}
    norm = torch.nn.utils.clip_grad_norm_(step.parameters, max_norm)
    if not torch.isfinite(norm):
        step.reject(f"the gradient norm is {float(norm)}")
        return metrics
    step.apply(scale)
    return {**metrics, "grad_norm": float(norm)}

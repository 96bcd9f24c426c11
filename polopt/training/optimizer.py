"""AdamW, its learning-rate course, and its state as plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import Parameter

from polopt.core.errors import UsageError


def make_optimizer(
    parameters: Sequence[Parameter], lr: float, *, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters; matrices decay, vectors (norms, biases) do not."""
    matrices = [p for p in parameters if p.ndim > 1]
    vectors = [p for p in parameters if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, fused=True)


def learning_rate(base: float, course: str, *, fraction: float, step: int, warmup: int) -> float:
    """base * min(1, (step + 1) / (warmup + 1)) * course(fraction of the budget that is spent)."""
    rise = min(1.0, (step + 1) / (warmup + 1))
    match course:
        case "linear":
            fall = 1.0 - fraction
        case "cosine":
            fall = 0.5 * (1.0 + math.cos(math.pi * fraction))
        case _:
            fall = 1.0
    return base * rise * fall


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The same rate for every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Moments and step counts by the parameter's index; the settings belong to the run's configuration."""
    return {str(index): dict(values) for index, values in optimizer.state_dict()["state"].items()}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Restore `optimizer_state`.

    Raises UsageError when the saved moments do not fit the parameters.
    """
    now = optimizer.state_dict()
    shapes = [tuple(p.shape) for group in optimizer.param_groups for p in group["params"]]
    for index, values in state.items():
        if int(index) >= len(shapes) or tuple(values["exp_avg"].shape) != shapes[int(index)]:
            raise UsageError(f"the checkpoint's optimizer state does not fit the policy (parameter {index})")
    now["state"] = {int(index): dict(values) for index, values in state.items()}
    optimizer.load_state_dict(now)

"""TRL's own loss without a model: its `_compute_loss` runs as it is on log-probs that the caller chooses."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class OneProcess:
    """What TRL's trainers ask of an accelerator."""

    num_processes = 1
    sync_gradients = True

    def gather(self, values: Tensor) -> Tensor:
        """The values of all processes."""
        return values

    gather_for_metrics = gather

    def reduce(self, values: Tensor, reduction: str = "sum") -> Tensor:
        """The values of all processes, reduced."""
        return values


def bare_trainer(trainer: type, logp: Tensor, limit: int, **settings: Any) -> Any:
    """A trainer that was never set up, whose forward pass gives ``logp`` [M, T]; ``limit`` is its completion budget.

    ``settings`` replace its attributes; ``delta`` is its two-sided clip.
    """
    made: Any = object.__new__(trainer)
    attributes: dict[str, Any] = {
        "aux_loss_enabled": False,
        "loss_type": "grpo",
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "use_vllm": False,
        "beta": 0.0,
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "importance_sampling_level": "token",
        "current_gradient_accumulation_steps": 1,
        "max_completion_length": limit,
        "_entropy_bonus_enabled": False,
        "accelerator": OneProcess(),
        "model": SimpleNamespace(training=True),
        "_metrics": {"train": defaultdict(list)},
        "args": SimpleNamespace(
            use_bias_correction_kl=False,
            delta=settings.pop("delta", None),
            sapo_temperature_pos=1.0,
            sapo_temperature_neg=1.05,
            steps_per_generation=1,
        ),
        "_get_per_token_logps_and_entropies": lambda *_, **__: (logp, torch.zeros_like(logp), None),
    }
    for name, value in {**attributes, **settings}.items():
        object.__setattr__(made, name, value)
    return made


def loss(made: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """The loss of a `bare_trainer`; ``inputs`` are TRL's, prompts apart, which do not matter."""
    token = torch.zeros_like(inputs["completion_mask"])
    prompt = {"prompt_ids": token[:, :1], "prompt_mask": token[:, :1], "completion_ids": token}
    found: Tensor = type(made)._compute_loss(made, made.model, {**prompt, **inputs})
    return found

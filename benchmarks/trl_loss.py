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
    device = torch.device("cpu")

    def gather(self, values: Tensor) -> Tensor:
        """The values of all processes."""
        return values

    gather_for_metrics = gather

    def reduce(self, values: Tensor, reduction: str = "sum") -> Tensor:
        """The values of all processes, reduced."""
        return values


def bare(trainer: type, **attributes: Any) -> Any:
    """A trainer that was never set up, with these attributes."""
    made: Any = object.__new__(trainer)
    for name, value in attributes.items():
        object.__setattr__(made, name, value)
    return made


def bare_trainer(trainer: type, logp: Tensor, limit: int, **settings: Any) -> Any:
    """A trainer that was never set up, whose forward pass gives ``logp`` [M, T]; ``limit`` is its completion budget.

    ``settings`` replace its attributes; ``delta`` is its two-sided clip.
    """
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
    return bare(trainer, **{**attributes, **settings})


def loss(made: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """The loss of a `bare_trainer`; ``inputs`` are TRL's, prompts apart, which do not matter."""
    token = torch.zeros_like(inputs["completion_mask"])
    prompt = {"prompt_ids": token[:, :1], "prompt_mask": token[:, :1], "completion_ids": token}
    found: Tensor = type(made)._compute_loss(made, made.model, {**prompt, **inputs})
    return found


# --- preferences ----------------------------------------------------------------------------------------------------


def outputs(logp: Tensor) -> SimpleNamespace:
    """What TRL's trainers read of a forward pass whose log-probs of the given tokens are ``logp`` [rows, T]."""
    nothing = torch.zeros_like(logp)
    return SimpleNamespace(log_probs=logp, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())


def sequences(mask: Tensor) -> dict[str, Tensor]:
    """Inputs of a trainer: a prompt of one token, then as many as the mask [rows, T] has, padded on the right."""
    whole = torch.cat([torch.ones_like(mask[:, :1]), mask], dim=1).long()
    completion = torch.cat([torch.zeros_like(mask[:, :1]), mask], dim=1).long()
    return {"input_ids": torch.zeros_like(whole), "attention_mask": whole, "completion_mask": completion}


def pair_loss(trainer: type, logp: Tensor, ref: Tensor, mask: Tensor, **settings: Any) -> Tensor:
    """The loss of TRL's `DPOTrainer` on log-probs [2 P, T] of P winners and then their losers; see ``loss_type``."""
    half = len(logp) // 2
    masked = torch.where(mask.bool(), ref, 0.0).sum(1)
    attributes: dict[str, Any] = {
        "aux_loss_enabled": False,
        "ld_alpha": None,
        "precompute_ref_logps": True,
        "loss_types": [settings.pop("loss_type", "sigmoid")],
        "loss_weights": [1.0],
        "beta": 0.1,
        "label_smoothing": 0.0,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "use_weighting": False,
        "args": SimpleNamespace(discopop_tau=settings.pop("discopop_tau", 0.05)),
        "accelerator": OneProcess(),
        "_metrics": {"train": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    made = bare(trainer, **{**attributes, **settings})
    made.model = SimpleNamespace(training=True)
    inputs = {**sequences(mask), "ref_chosen_logps": masked[:half], "ref_rejected_logps": masked[half:]}

    def model(**_: Any) -> SimpleNamespace:
        # TRL's model gives 0 where the labels are ignored.
        return outputs(torch.where(mask.bool(), logp, 0.0))

    found: Tensor = type(made)._compute_loss(made, model, inputs, False)
    return found


def single_loss(
    trainer: type,
    logp: Tensor,
    ref: Tensor,
    mask: Tensor,
    label: Tensor,
    others: tuple[Tensor, Tensor, Tensor],
    **settings: Any,
) -> Tensor:
    """The loss of TRL's `KTOTrainer` on log-probs [M, T]; ``others`` are log-probs, those of the reference and the mask
    of the answers to other prompts.
    """
    theirs, their_ref, their_mask = others
    attributes: dict[str, Any] = {
        "aux_loss_enabled": False,
        "loss_type": "kto",
        "calculate_KL": True,
        "precompute_ref_logps": True,
        "beta": 0.1,
        "desirable_weight": 1.0,
        "undesirable_weight": 1.0,
        "accelerator": OneProcess(),
        "_metrics": {"train": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    made = bare(trainer, **{**attributes, **settings})
    made.model = SimpleNamespace(training=True)
    mismatched = {f"KL_{name}": value for name, value in sequences(their_mask).items()}
    # What tells the two forward passes apart.
    mismatched["KL_input_ids"] = mismatched["KL_input_ids"] + 1
    inputs = {
        **sequences(mask),
        **mismatched,
        "label": label,
        "ref_logps": torch.where(mask.bool(), ref, 0.0).sum(1),
        "ref_KL_logps": torch.where(their_mask.bool(), their_ref, 0.0).sum(1),
    }

    def model(input_ids: Tensor, **_: Any) -> SimpleNamespace:
        if bool(input_ids.any()):
            return outputs(torch.where(their_mask.bool(), theirs, 0.0))
        return outputs(torch.where(mask.bool(), logp, 0.0))

    found: Tensor = type(made)._compute_loss(made, model, inputs, False)
    return found


def concatenated_loss(trainer: type, logp: Tensor, mask: Tensor, **settings: Any) -> Tensor:
    """The loss of TRL's `ORPOTrainer` or `CPOTrainer` on log-probs [2 P, T] of P winners and then their losers.

    Both read logits: of two tokens, the first of which has the wanted log-prob.
    """
    given = sequences(mask)
    kept = torch.where(mask.bool(), logp, -1.0)
    two = torch.stack([kept, torch.log(-torch.expm1(kept))], dim=-1)
    logits = torch.cat([two, torch.zeros_like(two[:, :1])], dim=1)
    labels = given["input_ids"].masked_fill(given["completion_mask"] == 0, -100)
    attributes: dict[str, Any] = {
        "aux_loss_enabled": False,
        "is_encoder_decoder": False,
        "padding_value": 0,
        "pad_token_id": 0,
        "loss_type": "sigmoid",
        "beta": 0.1,
        "label_smoothing": 0.0,
        "simpo_gamma": 0.5,
        "cpo_alpha": 1.0,
        "alpha": 0.0,
        "accelerator": OneProcess(),
        "concatenated_inputs": lambda *_, **__: {
            "concatenated_input_ids": given["input_ids"],
            "concatenated_attention_mask": given["attention_mask"],
            "concatenated_labels": labels,
        },
    }
    made = bare(trainer, **{**attributes, **settings})
    batch = {"chosen_labels": labels[: len(labels) // 2]}
    found, _ = type(made).get_batch_loss_metrics(made, lambda *_, **__: SimpleNamespace(logits=logits), batch)
    result: Tensor = found
    return result

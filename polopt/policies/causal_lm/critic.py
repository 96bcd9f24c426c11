"""A value head on the final hidden state of a language model, sharing its trunk."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from polopt.core.errors import UsageError
from polopt.policies.values import initial_values

FILE: Final = "critic.safetensors"


class ValueHead(nn.Module):
    """V_k = w_k . h + b_k in float32, for each of ``heads`` heads.

    A single head starts at zero, so that values are 0 whatever the trunk. Several start at random, always the same:
    normal weights (`polopt.policies.values.initial_values`) over sqrt(hidden size), since equal heads would stay equal.
    """

    def __init__(self, hidden_size: int, heads: int = 1) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, heads, dtype=torch.float32)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        if heads > 1:
            with torch.no_grad():
                self.linear.weight.copy_(initial_values(heads, hidden_size) / hidden_size**0.5)

    @property
    def heads(self) -> int:
        """How many values there are."""
        return self.linear.out_features

    def forward(self, hidden: Float[Tensor, "position hidden"], head: int = 1) -> Float[Tensor, " position"]:
        """Values by one head, numbered from 1."""
        # A sum of many small terms whose rounding would be the error of the value: float32 also under autocast.
        with torch.autocast(hidden.device.type, enabled=False):
            own = slice(head - 1, head)
            return torch.nn.functional.linear(hidden.float(), self.linear.weight[own], self.linear.bias[own])[:, 0]


def save_critic(head: ValueHead, folder: Path) -> None:
    """Write the head beside the model as ``critic.safetensors``."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in head.state_dict().items()}
    save_file(tensors, folder / FILE)


def saved_heads(folder: Path) -> int:
    """How many value heads `save_critic` wrote. Raises UsageError naming the file when it is missing or damaged."""
    path = folder / FILE
    if not path.is_file():
        raise UsageError(f"{folder} holds no critic: {FILE} is missing")
    try:
        return len(load_file(path)["linear.bias"])
    except (SafetensorError, KeyError) as error:
        raise UsageError(f"{path} is no critic: {error}") from error


def load_critic(head: ValueHead, folder: Path) -> None:
    """Load what `save_critic` wrote. Raises UsageError naming the file when it is missing or of another size."""
    path = folder / FILE
    if not path.is_file():
        raise UsageError(f"{folder} holds no critic: {FILE} is missing")
    tensors = load_file(path)
    expected = {name: tuple(value.shape) for name, value in head.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    if found != expected:
        raise UsageError(f"{path} holds a critic of shapes {found}, this model needs {expected}")
    head.load_state_dict(tensors)

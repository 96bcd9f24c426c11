"""A value head on the final hidden state of a language model, sharing its trunk."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from polopt.core.errors import UsageError

FILE: Final = "critic.safetensors"


class ValueHead(nn.Module):
    """V = w . h + b in float32, with w and b zero at first, so that values start at 0 whatever the trunk."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1, dtype=torch.float32)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Float[Tensor, "position hidden"]) -> Float[Tensor, " position"]:
        # A sum of many small terms whose rounding would be the error of the value: float32 also under autocast.
        with torch.autocast(hidden.device.type, enabled=False):
            return torch.nn.functional.linear(hidden.float(), self.linear.weight, self.linear.bias).squeeze(-1)


def save_critic(head: ValueHead, folder: Path) -> None:
    """Write the head beside the model as ``critic.safetensors``."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in head.state_dict().items()}
    save_file(tensors, folder / FILE)


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

"""How the value heads of a critic start where there are several."""

from __future__ import annotations

from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor

INITIAL_SPREAD: Final = 0.2
"""Standard deviation of the values of several heads at first: small beside rewards of variance 1, and not 0."""


def initial_values(*shape: int) -> Float[Tensor, "..."]:
    """Normal numbers of standard deviation `INITIAL_SPREAD`, the same ones every time, in float32.

    Heads that start equal get equal gradients and stay equal, so that a minimum of them would be one of them.
    """
    return INITIAL_SPREAD * torch.randn(shape, generator=torch.Generator().manual_seed(0))

"""Several value heads of one critic: how they start, and the value on which they agree."""

from __future__ import annotations

import math
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


def soft_minimum(values: Float[Tensor, "head item"], softness: float) -> Float[Tensor, " item"]:
    """-a log[(1/K) sum_k exp(-V_k / a)] over the K heads, a the ``softness``: between the smallest and the mean."""
    return -softness * ((-values / softness).logsumexp(0) - math.log(len(values)))

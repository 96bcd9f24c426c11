"""Standardising by everything that was seen so far."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from jaxtyping import Float
from torch import Tensor

START: Final = {"count": 1e-4, "mean": 0.0, "variance": 1.0}
"""Moments of almost nothing: the first batch outweighs them."""


def with_batch(moments: Mapping[str, float], values: Float[Tensor, " item"]) -> dict[str, float]:
    """The moments of all values so far and these (NaN left out), by Chan's formula; ``variance`` per value.

    A batch brings in its sample variance (n - 1), as in the official code of SAFE; a single value none. With no valid
    value the moments stay as they are.
    """
    valid = values[~values.isnan()].double()
    n = len(valid)
    if not n:
        return dict(moments)
    gap, every = float(valid.mean()) - moments["mean"], moments["count"] + n
    own = float(valid.var()) * n if n > 1 else 0.0
    total = moments["variance"] * moments["count"] + own + gap**2 * moments["count"] * n / every
    return {"count": every, "mean": moments["mean"] + gap * n / every, "variance": total / every}


def standardised(moments: Mapping[str, float], values: Float[Tensor, " item"]) -> Float[Tensor, " item"]:
    """(v - mean) / (sqrt(variance) + 1e-8)."""
    return (values - moments["mean"]) / (math.sqrt(moments["variance"]) + 1e-8)

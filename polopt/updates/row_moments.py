"""Adam's direction for some rows of a matrix, from moments that are kept for the rows seen so far only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from jaxtyping import Float, Int
from torch import Tensor

CHUNK: Final = 2**23
"""Numbers [c, K, D] of gradients that are held at once."""

Moments = Mapping[str, Any]
"""``count`` of steps, ``rows`` [V'] seen so far (ascending), ``first`` and ``second`` moments [V', D]; or empty."""


@dataclass(frozen=True)
class RowAdam:
    """m' = beta1 m + (1 - beta1) g, s' = beta2 s + (1 - beta2) g^2, t' = t + 1, of each row of a gradient;
    u = [m' / (1 - beta1^t')] / (sqrt(s' / (1 - beta2^t')) + eps).

    Kingma and Ba 2014, arXiv:1412.6980, with one count for all rows. Rows that were never seen have moments 0.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def direction(
        self, moments: Moments, ids: Int[Tensor, "*rows"], gradient: Float[Tensor, "*rows hidden"]
    ) -> Float[Tensor, "*rows hidden"]:
        """u for each of these gradients alone; the moments stay as they are. Rows may come several times."""
        first, second = self._next(moments, ids, gradient)
        count = int(moments.get("count", 0)) + 1
        return (first / (1 - self.beta1**count)) / ((second / (1 - self.beta2**count)).sqrt() + self.eps)

    def advance(
        self, moments: Moments, ids: Int[Tensor, " row"], gradient: Float[Tensor, "row hidden"]
    ) -> dict[str, Any]:
        """The moments after a step along the gradient of these rows, each of them once; others keep theirs."""
        rows = torch.unique(ids if not moments else torch.cat([moments["rows"], ids]))
        first, second = _gathered(moments, rows, gradient)
        at = torch.searchsorted(rows, ids)
        first[at], second[at] = self._next(moments, ids, gradient)
        return {"count": moments.get("count", 0) + 1, "rows": rows, "first": first, "second": second}

    def moved(
        self,
        moments: Moments,
        ids: Int[Tensor, "step top"],
        slopes: Float[Tensor, "step top"],
        hidden: Float[Tensor, "step hidden"],
    ) -> Float[Tensor, "step top"]:
        """u h of each step, g = slopes h^T being the gradient of that step alone in the rows ``ids``."""
        moved = torch.empty_like(slopes)
        size = max(1, CHUNK // max(1, slopes.shape[1] * hidden.shape[1]))
        for start in range(0, len(slopes), size):
            at = slice(start, start + size)
            h = hidden[at]
            moved[at] = (self.direction(moments, ids[at], slopes[at, :, None] * h[:, None]) @ h[:, :, None])[..., 0]
        return moved

    def advance_by_mean(
        self,
        moments: Moments,
        ids: Int[Tensor, "step top"],
        slopes: Float[Tensor, "step top"],
        hidden: Float[Tensor, "step hidden"],
    ) -> dict[str, Any]:
        """`advance` along the mean of each row's gradients slopes h^T over the steps that have the row."""
        seen, owner, times = torch.unique(ids, return_inverse=True, return_counts=True)
        # A sparse product [V', N] x [N, D]: nothing of size [N, K, D] is made.
        step = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)
        places = torch.stack([owner.flatten(), step.flatten()])
        values, shape = (slopes / times[owner]).flatten(), (len(seen), len(ids))
        share = torch.sparse_coo_tensor(places, values, shape, check_invariants=False)
        return self.advance(moments, seen, share @ hidden)

    def _next(self, moments: Moments, ids: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        first, second = _gathered(moments, ids, gradient)
        first = first.mul_(self.beta1).add_(gradient, alpha=1 - self.beta1)
        return first, second.mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)


def _gathered(moments: Moments, ids: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Both moments of these rows, [*rows, D], copies."""
    shape = (*ids.shape, like.shape[-1])
    if not moments or not len(moments["rows"]):
        return like.new_zeros(shape), like.new_zeros(shape)
    rows = moments["rows"]
    place = torch.searchsorted(rows, ids.contiguous()).clamp(max=len(rows) - 1)
    unknown = (rows[place] != ids)[..., None]
    return moments["first"][place].masked_fill_(unknown, 0.0), moments["second"][place].masked_fill_(unknown, 0.0)

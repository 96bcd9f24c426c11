"""The only segment reductions and scans of the library.

A segment is the set of items that carry one id: the steps of a trajectory, the trajectories of a group. Every function
takes the items packed in one vector ``values`` [item] and their segment ids ``index`` [item] in ``0 .. size - 1``.

What holds for all of them:

- Ids need not be sorted. Where order matters (scans, shifts, ties) it is the order of appearance within the segment.
- An item whose ``mask`` is False is as good as absent: its value may be NaN or infinite, its id may be anything, and
  neither the result nor any gradient depends on it. What an item-wise function returns *for* it is documented there.
- An unmasked NaN spoils its own segment and no other.
- float16, bfloat16 and float32 give float32; float64 gives float64. Sums accumulate in float64.
- A segment without unmasked items gives the documented neutral value, with zero gradient.
- No loop over items or segments: at most O(log longest segment) vector passes. Results on a CPU are deterministic.

``ValueError`` if lengths differ or an unmasked id lies outside ``0 .. size - 1``.
"""

from __future__ import annotations

import math
from typing import Any, Literal, cast

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

__all__ = [
    "run_sum",
    "segment_count",
    "segment_cumsum",
    "segment_is_first",
    "segment_is_last",
    "segment_log_softmax",
    "segment_logsumexp",
    "segment_max",
    "segment_mean",
    "segment_min",
    "segment_pairs",
    "segment_quantile",
    "segment_rank",
    "segment_reverse_scan",
    "segment_shift",
    "segment_softmax",
    "segment_std",
    "segment_sum",
    "segment_var",
    "spread",
]


# Reductions: [item] -> [segment]


def segment_count(
    index: Int[Tensor, "item"], size: int, *, mask: Bool[Tensor, "item"] | None = None
) -> Float[Tensor, "segment"]:
    """Number of unmasked items of each segment, as float32."""
    index = _kept(index, _positions(index, size, mask))
    return _count(index, size).to(torch.float32)


def segment_sum(
    values: Float[Tensor, "item"],
    index: Int[Tensor, "item"],
    size: int,
    *,
    mask: Bool[Tensor, "item"] | None = None,
) -> Float[Tensor, "segment"]:
    """sum_i x_i over each segment; an empty segment gives 0."""
    values, index = _select(values, index, size, mask)
    return _accumulate(values, index, size).to(values.dtype)


def run_sum(values: Float[Tensor, "item"], lengths: Int[Tensor, "segment"]) -> Float[Tensor, "segment"]:
    """`segment_sum` of segments that lie one after the other, ``lengths`` items each: several times as fast.

    ``ValueError`` if the lengths do not add up to the items.
    """
    if values.dim() != 1 or int(lengths.sum()) != values.numel():
        raise ValueError(f"lengths add up to {int(lengths.sum())}, but the values have shape {list(values.shape)}")
    wide = values.to(_accumulator(values))
    summed = torch.segment_reduce(wide, "sum", lengths=lengths, unsafe=True)
    return summed if values.dtype == torch.float64 else summed.to(torch.float32)


def segment_mean(
    values: Float[Tensor, "item"],
    index: Int[Tensor, "item"],
    size: int,
    *,
    mask: Bool[Tensor, "item"] | None = None,
    empty: float = 0.0,
) -> Float[Tensor, "segment"]:
    """(1/n) sum_i x_i over each segment; equal values give exactly that value; an empty segment gives ``empty``."""
    values, index = _select(values, index, size, mask)
    mean, count = _mean(values, index, size)
    return mean.masked_fill(count == 0, empty).to(values.dtype)


def segment_var(
    values: Float[Tensor, "item"],
    index: Int[Tensor, "item"],
    size: int,
    *,
    unbiased: bool = True,
    mask: Bool[Tensor, "item"] | None = None,
    empty: float = 0.0,
) -> Float[Tensor, "segment"]:
    """sum_i (x_i - mean)^2 / (n - 1), or / n with ``unbiased=False``, in two passes.

    One item gives 0, equal values give exactly 0, an empty segment gives ``empty``.
    """
    values, index = _select(values, index, size, mask)
    var, count = _var(values, index, size, unbiased)
    return var.masked_fill(count == 0, empty).to(values.dtype)


def segment_std(
    values: Float[Tensor, "item"],
    index: Int[Tensor, "item"],
    size: int,
    *,
    unbiased: bool = True,
    mask: Bool[Tensor, "item"] | None = None,
    empty: float = 0.0,
) -> Float[Tensor, "segment"]:
    """Square root of :func:`segment_var`. Where the spread is 0, so is the gradient."""
    values, index = _select(values, index, size, mask)
    var, count = _var(values, index, size, unbiased)
    flat = var == 0
    std = var.masked_fill(flat, 1.0).sqrt().masked_fill(flat, 0.0)  # sqrt has an infinite slope at 0
    return std.masked_fill(count == 0, empty).to(values.dtype)


def segment_max(
    values: Float[Tensor, "item"],
    index: Int[Tensor, "item"],
    size: int,
    *,
    mask: Bool[Tensor, "item"] | None = None,
    empty: float = -math.inf,
) -> Float[Tensor, "segment"]:
    """max_i x_i over each segment; an empty segment gives ``empty``. Tied maxima share the gradient equally."""
    values, index = _select(values, index, size, mask)
    return _extreme(values, index, size, "amax", empty)


def segment_min(
    values: Float[Tensor, "item"],
    index: Int[Tensor, "item"],
    size: int,
    *,
    mask: Bool[Tensor, "item"] | None = None,
    empty: float = math.inf,
) -> Float[Tensor, "segment"]:
    """min_i x_i over each segment; an empty segment gives ``empty``. Tied minima share the gradient equally."""
    values, index = _select(values, index, size, mask)
    return _extreme(values, index, size, "amin", empty)


def segment_logsumexp(
    values: Float[Tensor, "item"],
    index: Int[Tensor, "item"],
    size: int,
    *,
    mask: Bool[Tensor, "item"] | None = None,
) -> Float[Tensor, "segment"]:
    """log sum_i exp(x_i) over each segment.

    A segment that is empty or all -inf gives -inf, with zero gradient.
    """
    values, index = _select(values, index, size, mask)
    return _logsumexp(values, index, size)


def segment_quantile(
    values: Float[Tensor, "item"],
    index: Int[Tensor, "item"],
    size: int,
    q: float,
    *,
    mask: Bool[Tensor, "item"] | None = None,
    empty: float = 0.0,
) -> Float[Tensor, "segment"]:
    """Quantile ``q`` in [0, 1] of each segment, linear between order statistics: x_(k) at q = (k - 1) / (n - 1).

    Differentiable in the one or two order statistics used. A NaN in a segment makes its quantile NaN; an empty segment
    gives ``empty``. ``ValueError`` if q lies outside [0, 1].
    """
    if not 0.0 <= q <= 1.0:
        raise ValueError(f"quantile q={q} lies outside [0, 1]")
    values, index = _select(values, index, size, mask)
    order = _value_order(values, index)
    values = values[order]
    count = _count(index, size).to(torch.int64)
    present = count > 0
    last_item = (count.cumsum(0) - 1)[present]
    count = count[present]
    first_item = last_item - (count - 1)
    place = (count - 1).to(_accumulator(values)) * q
    below, above = first_item + place.floor().to(torch.int64), first_item + place.ceil().to(torch.int64)
    exact = below == above
    low, high = values[below], values[above]
    # An exact order statistic may be infinite, and inf - inf must then not enter the interpolation.
    between = torch.lerp(low.masked_fill(exact, 0.0), high.masked_fill(exact, 0.0), (place - place.floor()).to(low))
    quantile = torch.where(exact, low, between)
    quantile = torch.where(values[last_item].isnan(), values[last_item], quantile)  # NaN sorts last
    return values.new_full((size,), empty).masked_scatter(present, quantile)


# Item-wise functions of a segment: [item] -> [item]


def segment_softmax(
    values: Float[Tensor, "item"],
    index: Int[Tensor, "item"],
    size: int,
    *,
    mask: Bool[Tensor, "item"] | None = None,
) -> Float[Tensor, "item"]:
    """exp(x_i) / sum_j exp(x_j) within each segment; masked items get 0.

    A segment whose values are all -inf has no distribution and gives NaN, as ``torch.softmax`` does.
    """
    positions = _positions(index, size, mask)
    kept, kept_index = _kept(_float(values, index), positions), _kept(index, positions)
    log_probs = kept - _logsumexp(kept, kept_index, size).index_select(0, kept_index)
    return _place(log_probs.exp(), positions, len(index), 0.0)


def segment_log_softmax(
    values: Float[Tensor, "item"],
    index: Int[Tensor, "item"],
    size: int,
    *,
    mask: Bool[Tensor, "item"] | None = None,
) -> Float[Tensor, "item"]:
    """x_i - log sum_j exp(x_j) within each segment; masked items get -inf, the logarithm of their softmax."""
    positions = _positions(index, size, mask)
    kept, kept_index = _kept(_float(values, index), positions), _kept(index, positions)
    log_probs = kept - _logsumexp(kept, kept_index, size).index_select(0, kept_index)
    return _place(log_probs, positions, len(index), -math.inf)


def segment_rank(
    values: Float[Tensor, "item"],
    index: Int[Tensor, "item"],
    size: int,
    *,
    mask: Bool[Tensor, "item"] | None = None,
    method: Literal["average", "min", "ordinal"] = "average",
) -> Float[Tensor, "item"]:
    """Rank of each item within its segment, ascending from 1; masked items get 0. Not differentiable.

    Ties get their mean rank (``average``), their lowest (``min``), or distinct ranks in order of appearance
    (``ordinal``). A NaN makes every rank of its segment NaN.
    """
    if method not in ("average", "min", "ordinal"):
        raise ValueError(f"rank method {method!r} is none of 'average', 'min', 'ordinal'")
    positions = _positions(index, size, mask)
    kept, kept_index = _kept(_float(values, index).detach(), positions), _kept(index, positions)
    order = _value_order(kept, kept_index)
    ordered, ordered_index = kept[order], kept_index[order]
    before, _ = _neighbours(ordered_index)
    rank = (before + 1).to(kept.dtype)
    if method != "ordinal":
        tie_starts = before == 0
        tie_starts[1:] |= ordered[1:] != ordered[:-1]
        tied_before, tied_after = _neighbours(tie_starts.cumsum(0))
        rank = rank - tied_before
        if method == "average":
            rank = rank + (tied_before + tied_after).to(kept.dtype) / 2
    invalid = torch.zeros(size, dtype=torch.bool, device=kept.device)
    invalid[kept_index[kept.isnan()]] = True
    rank = rank.masked_fill(invalid[ordered_index], math.nan)
    return _place(torch.empty_like(rank).index_copy(0, order, rank), positions, len(index), 0.0)


def segment_cumsum(
    values: Float[Tensor, "item"],
    index: Int[Tensor, "item"],
    size: int,
    *,
    mask: Bool[Tensor, "item"] | None = None,
    exclusive: bool = False,
    reverse: bool = False,
) -> Float[Tensor, "item"]:
    """Running sum y_t = sum_{s <= t} x_s within each segment.

    ``exclusive`` leaves x_t itself out, ``reverse`` sums over s >= t. Masked items add 0 and receive the running sum.
    """
    values = _float(values, index)
    if mask is not None:
        _check_mask(index, mask)
        values = values.masked_fill(~mask, 0.0)
    positions = _in_time(index, _positions(index, size, None))
    before, after = _neighbours(_kept(index, positions))
    kept = _kept(values, positions)
    one = torch.ones((), dtype=_accumulator(kept))
    if reverse:
        total = _scan(kept, one, before, after)
    else:
        total = _scan(kept.flip(0), one, after.flip(0), before.flip(0)).flip(0)
    if exclusive:
        # The neighbour's sum, not total - x_t: that cancels, and lets an infinite x_t into its own result.
        total = _shift(total, before, after, 1 if reverse else -1, 0.0)
    return _place(total, positions, len(index), 0.0)


def segment_reverse_scan(
    values: Float[Tensor, "item"],
    discount: float | Float[Tensor, "item"] | Float[Tensor, ""],
    index: Int[Tensor, "item"],
    size: int,
    *,
    mask: Bool[Tensor, "item"] | None = None,
) -> Float[Tensor, "item"]:
    """y_t = x_t + discount_t * y_{t+1} within each segment, y = 0 beyond its last item.

    Masked items are skipped: an unmasked item is linked, by its own discount, to the next unmasked item. They get 0.
    Differentiable in ``values`` and in a tensor ``discount``, also twice.

    Computed by recursive doubling (Hillis and Steele 1986): after pass k every item holds the sum over its next 2^k
    items, so the longest segment takes log2(length) passes. Products of discounts over a segment must not overflow.
    """
    values = _float(values, index)
    positions = _in_time(index, _positions(index, size, mask))
    before, after = _neighbours(_kept(index, positions))
    if not isinstance(discount, Tensor):
        # A scalar in float64 does not widen the float32 vectors, and its powers stay exact to float32.
        discount = torch.tensor(discount, dtype=_accumulator(values))
    elif discount.dim() > 0:
        discount = _kept(_float(discount, index, "discount").to(values.dtype), positions)
    total = _scan(_kept(values, positions), discount, before, after)
    return _place(total, positions, len(index), 0.0)


def segment_shift(
    values: Float[Tensor, "item"],
    index: Int[Tensor, "item"],
    *,
    by: int = 1,
    fill: float = 0.0,
    mask: Bool[Tensor, "item"] | None = None,
) -> Float[Tensor, "item"]:
    """y_t = x_{t+by} within each segment, counting unmasked items only: V_{t+1} with ``by=1``, V_{t-1} with ``by=-1``.

    Items without such a neighbour, and masked items, get ``fill``.
    """
    values = _float(values, index)
    positions = _in_time(index, _positions(index, None, mask))
    before, after = _neighbours(_kept(index, positions))
    return _place(_shift(_kept(values, positions), before, after, by, fill), positions, len(index), fill)


def segment_is_first(
    index: Int[Tensor, "item"], size: int, *, mask: Bool[Tensor, "item"] | None = None
) -> Bool[Tensor, "item"]:
    """True at the first unmasked item of each segment."""
    positions = _in_time(index, _positions(index, size, mask))
    before, _ = _neighbours(_kept(index, positions))
    return _place(before == 0, positions, len(index), False)


def segment_is_last(
    index: Int[Tensor, "item"], size: int, *, mask: Bool[Tensor, "item"] | None = None
) -> Bool[Tensor, "item"]:
    """True at the last unmasked item of each segment."""
    positions = _in_time(index, _positions(index, size, mask))
    _, after = _neighbours(_kept(index, positions))
    return _place(after == 0, positions, len(index), False)


def segment_pairs(
    index: Int[Tensor, "item"], size: int, *, mask: Bool[Tensor, "item"] | None = None
) -> tuple[Int[Tensor, "pair"], Int[Tensor, "pair"]]:
    """All ordered pairs (i, j), i != j, of unmasked items of one segment, as two vectors of places.

    Segment by segment, and within one by i, then by j, in order of appearance: n (n - 1) pairs for n items.
    """
    positions = _in_time(index, _positions(index, size, mask))
    places = torch.arange(len(index), device=index.device) if positions is None else positions
    before, after = _neighbours(_kept(index, positions))
    others = before + after + 1
    first = torch.arange(len(places), device=index.device).repeat_interleave(others)
    within = torch.arange(len(first), device=index.device) - (others.cumsum(0) - others)[first]
    second = (first - before[first]) + within
    distinct = first != second
    return places[first[distinct]], places[second[distinct]]


def spread(values: Shaped[Tensor, "segment"], index: Int[Tensor, "item"]) -> Shaped[Tensor, "item"]:
    """y_i = x_{index_i}: a value per segment handed down to its items. Keeps the dtype; differentiable."""
    _positions(index, len(values), None)
    return values.index_select(0, index)


# What the functions above share. `positions` are the places of unmasked items in the input; None stands for all of
# them in their order, which spares a copy.


def _accumulator(values: Tensor) -> torch.dtype:
    return torch.float32 if values.device.type == "mps" else torch.float64  # Apple's GPUs have no float64


def _float(values: Tensor, index: Tensor, name: str = "values") -> Tensor:
    if values.shape != index.shape or values.dim() != 1:
        raise ValueError(f"{name} {list(values.shape)} and index {list(index.shape)} must be vectors of one length")
    return values if values.dtype == torch.float64 else values.to(torch.float32)


def _check_mask(index: Tensor, mask: Tensor) -> None:
    if mask.shape != index.shape or index.dim() != 1:
        raise ValueError(f"mask {list(mask.shape)} and index {list(index.shape)} must be vectors of one length")
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be of dtype bool, not {mask.dtype}")


def _positions(index: Tensor, size: int | None, mask: Tensor | None) -> Tensor | None:
    """Places of the unmasked items, after checking that their ids are valid."""
    positions = None
    if mask is not None:
        _check_mask(index, mask)
        positions = mask.nonzero().squeeze(1)
    kept = _kept(index, positions)
    if size is not None and kept.numel() > 0:
        low, high = (int(bound) for bound in kept.aminmax())
        if low < 0 or high >= size:
            raise ValueError(f"segment id {low if low < 0 else high} lies outside 0 .. {size - 1} (size={size})")
    return positions


def _in_time(index: Tensor, positions: Tensor | None) -> Tensor | None:
    """The same places, brought segment by segment; within a segment in order of appearance."""
    kept = _kept(index, positions)
    if not bool((kept[1:] < kept[:-1]).any()):
        return positions
    order = kept.argsort(stable=True)
    return order if positions is None else positions[order]


def _kept(values: Tensor, positions: Tensor | None) -> Tensor:
    return values if positions is None else values.index_select(0, positions)


def _place(values: Tensor, positions: Tensor | None, length: int, fill: float | bool) -> Tensor:
    if positions is None:
        return values
    return values.new_full((length,), fill).index_copy(0, positions, values)


def _select(values: Tensor, index: Tensor, size: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    values = _float(values, index)
    positions = _positions(index, size, mask)
    return _kept(values, positions), _kept(index, positions)


def _accumulate(values: Tensor, index: Tensor, size: int) -> Tensor:
    values = values.to(_accumulator(values))
    return values.new_zeros(size).index_add(0, index, values)


def _count(index: Tensor, size: int) -> Tensor:
    return _accumulate(torch.ones_like(index, dtype=torch.float32), index, size)


def _mean(values: Tensor, index: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Mean in the accumulator's dtype (0 where empty) and number of items of each segment."""
    count = _count(index, size)
    # Deviations from a member of the segment are averaged, not the values: the mean of equal values is then exact.
    anchor = _extreme(values.detach(), index, size, "amax", 0.0)
    anchor = torch.where(anchor.isfinite(), anchor, 0.0).to(count.dtype)
    deviation = values.to(count.dtype) - anchor.index_select(0, index)
    return anchor + _accumulate(deviation, index, size) / count.clamp(min=1), count


def _var(values: Tensor, index: Tensor, size: int, unbiased: bool) -> tuple[Tensor, Tensor]:
    mean, count = _mean(values, index, size)
    deviation = values.to(mean.dtype) - mean.index_select(0, index)
    freedom = count - 1 if unbiased else count
    return _accumulate(deviation.square(), index, size) / freedom.clamp(min=1), count


def _extreme(values: Tensor, index: Tensor, size: int, reduce: Literal["amax", "amin"], empty: float) -> Tensor:
    return values.new_full((size,), empty).scatter_reduce(0, index, values, reduce, include_self=False)


def _logsumexp(values: Tensor, index: Tensor, size: int) -> Tensor:
    top = _extreme(values.detach(), index, size, "amax", 0.0)
    top = torch.where(top.isinf(), 0.0, top)
    total = _accumulate((values - top.index_select(0, index)).exp(), index, size)
    nothing = total == 0
    # The logarithm has an infinite slope at 0, which would meet the zero gradient of exp(-inf).
    log_total = total.masked_fill(nothing, 1.0).log().masked_fill(nothing, -math.inf)
    return (log_total + top).to(values.dtype)


def _value_order(values: Tensor, index: Tensor) -> Tensor:
    """Permutation that sorts by segment, then by value (NaN last), then by appearance."""
    by_value = values.detach().argsort(stable=True)
    return by_value[index[by_value].argsort(stable=True)]


def _neighbours(index: Tensor) -> tuple[Tensor, Tensor]:
    """Number of items before and after each item in its run of equal ids."""
    _, lengths = torch.unique_consecutive(index, return_counts=True)
    ends = lengths.cumsum(0)
    place = torch.arange(len(index), device=index.device)
    before = place - (ends - lengths).repeat_interleave(lengths, output_size=len(index))
    return before, lengths.repeat_interleave(lengths, output_size=len(index)) - 1 - before


def _shift(values: Tensor, before: Tensor, after: Tensor, by: int, fill: float) -> Tensor:
    inside = after >= by if by >= 0 else before >= -by
    return torch.where(inside, values.roll(-by), fill)


def _double(values: Tensor, discount: Tensor, after: Tensor) -> Tensor:
    """The recurrence of :func:`segment_reverse_scan` on contiguous segments, ``after`` items before each one's end.

    ``discount`` is one number for all or one per item.
    """
    total = values.clone()
    factor = discount.clone()  # product of the discounts that link an item to the one `reach` items later
    longest = int(after.max()) if after.numel() > 0 else 0
    reach = 1
    while reach <= longest:
        inside = after[:-reach] >= reach
        here = factor[:-reach] if factor.dim() else factor
        # Selected, not multiplied by zero: a NaN of the next segment stays there.
        total[:-reach] += torch.where(inside, here * total[reach:], 0.0)
        factor = factor * factor if factor.dim() == 0 else _chain(factor, inside, reach)
        reach *= 2
    return total


def _chain(factor: Tensor, inside: Tensor, reach: int) -> Tensor:
    """Products over ``reach`` links become products over twice as many; in place."""
    factor[:-reach] *= torch.where(inside, factor[reach:], 0.0)
    return factor


def _scan(values: Tensor, discount: Tensor, before: Tensor, after: Tensor) -> Tensor:
    return cast(Tensor, _ReverseScan.apply(values, discount, before, after))  # type: ignore[no-untyped-call]


class _ReverseScan(torch.autograd.Function):
    """The scan and its adjoint, which is a scan in the other direction: g_t = dy_t + discount_{t-1} g_{t-1}.

    Differentiating the doubling passes themselves would keep every pass in memory.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, discount: Tensor, before: Tensor, after: Tensor) -> Tensor:
        total = _double(values, discount, after)
        ctx.save_for_backward(total, discount, before, after)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        total, discount, before, after = ctx.saved_tensors
        incoming = discount.roll(1).flip(0) if discount.dim() else discount
        adjoint = _scan(upstream[0].flip(0), incoming, after.flip(0), before.flip(0)).flip(0)
        if not ctx.needs_input_grad[1]:
            return adjoint, None, None, None
        slope = adjoint * _shift(total, before, after, 1, 0.0)
        return adjoint, (slope if discount.dim() else slope.sum()).to(discount), None, None

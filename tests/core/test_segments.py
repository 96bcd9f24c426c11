"""Segment reductions and scans against NumPy loops, SciPy and finite differences.

The tests draw ragged cases: any number of segments including empty ones, ids in any order, and masked items that carry
NaN or infinity, which must leave no trace in results or gradients.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polopt.core import segments as sg

ENOUGH = settings(max_examples=25, deadline=None)


@dataclass(frozen=True)
class Case:
    """A ragged batch. ``members[s]`` are the places of the unmasked items of segment s, in order of appearance."""

    values: Tensor
    index: Tensor
    size: int
    mask: Tensor | None

    @property
    def keep(self) -> np.ndarray:
        return np.ones(len(self.index), bool) if self.mask is None else self.mask.numpy()

    @property
    def members(self) -> list[np.ndarray]:
        return [np.flatnonzero((self.index.numpy() == s) & self.keep) for s in range(self.size)]

    def reduce(self, oracle: Callable[[np.ndarray], float], empty: float) -> np.ndarray:
        x = self.values.double().numpy()
        return np.array([oracle(x[places]) if len(places) else empty for places in self.members])

    def itemwise(self, oracle: Callable[[np.ndarray], np.ndarray], masked: float) -> np.ndarray:
        x = self.values.double().numpy()
        out = np.full(len(x), masked)
        for places in self.members:
            if len(places):
                out[places] = oracle(x[places])
        return out


POISON = (math.nan, math.inf, -math.inf)


@st.composite
def cases(draw: st.DrawFn, ties: bool = False, dtype: torch.dtype = torch.float64) -> Case:
    size = draw(st.integers(1, 6))
    length = draw(st.integers(0, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = torch.from_numpy(rng.normal(scale=10.0 ** rng.integers(-2, 3), size=length))
    if ties:
        values = values.sign() * int(rng.integers(0, 3))  # several equal values in nearly every segment
    index = torch.from_numpy(rng.integers(0, size, length))
    if draw(st.booleans()):
        index = index.sort().values
    if draw(st.booleans()):
        return Case(values.to(dtype), index, size, None)
    mask = torch.from_numpy(rng.random(length) < rng.choice([0.0, 0.5, 0.9]))
    values[~mask] = torch.from_numpy(rng.choice(POISON, int((~mask).sum())))
    index[~mask] = torch.from_numpy(rng.integers(-3, size + 3, int((~mask).sum())))
    return Case(values.to(dtype), index, size, mask)


def close(actual: Tensor, expected: np.ndarray, rtol: float = 1e-9, atol: float = 1e-9) -> None:
    np.testing.assert_allclose(actual.detach().double().numpy(), expected, rtol=rtol, atol=atol)


# Reductions

REDUCTIONS: dict[str, tuple[Callable[..., Tensor], Callable[[np.ndarray], float], float]] = {
    "sum": (sg.segment_sum, np.sum, 0.0),
    "mean": (sg.segment_mean, np.mean, 0.0),
    "var": (sg.segment_var, lambda x: np.var(x, ddof=1) if len(x) > 1 else 0.0, 0.0),
    "var_biased": (partial(sg.segment_var, unbiased=False), np.var, 0.0),
    "std": (sg.segment_std, lambda x: np.std(x, ddof=1) if len(x) > 1 else 0.0, 0.0),
    "std_biased": (partial(sg.segment_std, unbiased=False), np.std, 0.0),
    "max": (sg.segment_max, np.max, -math.inf),
    "min": (sg.segment_min, np.min, math.inf),
    "logsumexp": (sg.segment_logsumexp, scipy.special.logsumexp, -math.inf),
}
TAKE_EMPTY = ["mean", "var", "std", "max", "min"]


@pytest.mark.parametrize("name", REDUCTIONS)
@ENOUGH
@given(case=cases())
def test_reduction_matches_numpy(name: str, case: Case) -> None:
    function, oracle, empty = REDUCTIONS[name]
    close(function(case.values, case.index, case.size, mask=case.mask), case.reduce(oracle, empty))


@pytest.mark.parametrize("name", TAKE_EMPTY)
@ENOUGH
@given(case=cases())
def test_empty_segments_take_the_value_asked_for(name: str, case: Case) -> None:
    function, oracle, _ = REDUCTIONS[name]
    close(function(case.values, case.index, case.size, mask=case.mask, empty=-7.0), case.reduce(oracle, -7.0))


@ENOUGH
@given(case=cases())
def test_count(case: Case) -> None:
    close(sg.segment_count(case.index, case.size, mask=case.mask), np.array([len(p) for p in case.members]))


@ENOUGH
@given(case=cases(), q=st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.25, 0.5, 1.0])))
def test_quantile_matches_numpy(case: Case, q: float) -> None:
    actual = sg.segment_quantile(case.values, case.index, case.size, q, mask=case.mask, empty=3.0)
    close(actual, case.reduce(lambda x: float(np.quantile(x, q)), 3.0))


def test_quantile_of_infinite_and_invalid_values() -> None:
    values = torch.tensor([1.0, math.inf, math.inf, math.nan, 0.0, -math.inf])
    index = torch.tensor([0, 0, 0, 1, 1, 2])
    close(sg.segment_quantile(values, index, 3, 0.5), np.array([math.inf, math.nan, -math.inf]))
    with pytest.raises(ValueError, match=r"q=1\.5"):
        sg.segment_quantile(values, index, 3, 1.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.1, 1 / 3, -1e30, 7e-12, 0.7])
def test_equal_values_have_exactly_their_value_as_mean_and_no_spread(value: float, dtype: torch.dtype) -> None:
    values = torch.full((66,), value, dtype=dtype, requires_grad=True)
    index = torch.repeat_interleave(torch.arange(11), torch.arange(1, 12))
    mean, std = sg.segment_mean(values, index, 11), sg.segment_std(values, index, 11)
    assert torch.equal(sg.spread(mean, index), values)
    assert torch.equal(std, torch.zeros(11, dtype=dtype))
    assert torch.equal(sg.segment_var(values, index, 11), torch.zeros(11, dtype=dtype))
    (gradient,) = torch.autograd.grad(std.sum(), values)
    assert torch.equal(gradient, torch.zeros_like(values))


def test_float32_sums_do_not_drift_over_a_million_items() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(1_000_000, generator=generator) + 1000
    index = torch.zeros(1_000_000, dtype=torch.int64)
    x = values.double().numpy()
    close(sg.segment_sum(values, index, 1), np.array([x.sum()]), rtol=1e-7)
    close(sg.segment_mean(values, index, 1), np.array([x.mean()]), rtol=1e-7)
    # A one-pass float32 variance is off by orders of magnitude here: the mean square is 1e7 times the variance.
    close(sg.segment_std(values, index, 1), np.array([x.std(ddof=1)]), rtol=1e-6)


def test_logsumexp_of_extreme_values() -> None:
    values = torch.tensor([1e4, 1e4, -1e4, -1e4, -math.inf, -math.inf, 0.0], requires_grad=True)
    index = torch.tensor([0, 0, 1, 1, 2, 3, 3])
    total = sg.segment_logsumexp(values, index, 5)
    close(total, np.array([1e4 + math.log(2), -1e4 + math.log(2), -math.inf, 0.0, -math.inf]), rtol=1e-7)
    (gradient,) = torch.autograd.grad(total[total.isfinite()].sum(), values)
    close(gradient, np.array([0.5, 0.5, 0.5, 0.5, 0.0, 0.0, 1.0]), rtol=1e-7)
    everything = torch.autograd.grad(sg.segment_logsumexp(values, index, 5).sum(), values)[0]
    assert everything.isfinite().all()


def test_tied_extremes_share_the_gradient() -> None:
    values = torch.tensor([2.0, 2.0, 1.0, 5.0], requires_grad=True)
    index = torch.tensor([0, 0, 0, 1])
    high = torch.autograd.grad(sg.segment_max(values, index, 2).sum(), values)[0]
    low = torch.autograd.grad(sg.segment_min(values, index, 2).sum(), values)[0]
    close(high, np.array([0.5, 0.5, 0.0, 1.0]))
    close(low, np.array([0.0, 0.0, 1.0, 1.0]))


# Item-wise functions


@ENOUGH
@given(case=cases())
def test_softmax_and_log_softmax_match_scipy(case: Case) -> None:
    probabilities = sg.segment_softmax(case.values, case.index, case.size, mask=case.mask)
    log_probabilities = sg.segment_log_softmax(case.values, case.index, case.size, mask=case.mask)
    close(probabilities, case.itemwise(scipy.special.softmax, 0.0))
    close(log_probabilities, case.itemwise(scipy.special.log_softmax, -math.inf))


@pytest.mark.parametrize("method", ["average", "min", "ordinal"])
@pytest.mark.parametrize("ties", [False, True])
@ENOUGH
@given(data=st.data())
def test_rank_matches_scipy(method: Any, ties: bool, data: st.DataObject) -> None:
    case = data.draw(cases(ties=ties))
    actual = sg.segment_rank(case.values, case.index, case.size, mask=case.mask, method=method)
    close(actual, case.itemwise(lambda x: scipy.stats.rankdata(x, method=method), 0.0))


def test_rank_of_invalid_values_and_unknown_method() -> None:
    values, index = torch.tensor([3.0, math.nan, 1.0, 2.0]), torch.tensor([0, 0, 1, 1])
    close(sg.segment_rank(values, index, 2), np.array([math.nan, math.nan, 1.0, 2.0]))
    with pytest.raises(ValueError, match="'dense'"):
        inspect.unwrap(sg.segment_rank)(values, index, 2, method="dense")


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@ENOUGH
@given(case=cases())
def test_cumsum_matches_a_loop(exclusive: bool, reverse: bool, case: Case) -> None:
    if case.mask is not None:
        case.index[~case.mask] = 0  # masked items receive the running sum here, so they need a segment
    x, index, keep = case.values.numpy(), case.index.numpy(), case.keep
    expected, running = np.zeros(len(x)), np.zeros(case.size)
    for t in range(len(x))[:: -1 if reverse else 1]:
        before = running[index[t]]
        if keep[t]:
            running[index[t]] += x[t]
        expected[t] = before if exclusive else running[index[t]]
    actual = sg.segment_cumsum(case.values, case.index, case.size, mask=case.mask, exclusive=exclusive, reverse=reverse)
    close(actual, expected)


def test_exclusive_cumsum_does_not_subtract() -> None:
    """An item's own value must leave no rounding, infinity or NaN in the sum of the others."""
    values, index = torch.tensor([1.0, 1e20, 1.0, math.inf, 0.5, math.nan]), torch.tensor([0, 0, 1, 1, 2, 2])
    assert sg.segment_cumsum(values, index, 3, exclusive=True).tolist() == [0.0, 1.0, 0.0, 1.0, 0.0, 0.5]
    values = torch.tensor([1e20, 1.0, math.inf, 1.0, math.nan, 0.5])
    actual = sg.segment_cumsum(values, index, 3, exclusive=True, reverse=True)
    assert actual.tolist() == [1.0, 0.0, 1.0, 0.0, 0.5, 0.0]


def test_softmax_of_a_segment_without_any_mass_is_invalid() -> None:
    values, index = torch.tensor([-math.inf, -math.inf, -math.inf, 0.0]), torch.tensor([0, 0, 1, 1])
    close(sg.segment_softmax(values, index, 2), np.array([math.nan, math.nan, 0.0, 1.0]))


def scan_loop(case: Case, discount: np.ndarray) -> np.ndarray:
    x = case.values.double().numpy()
    out = np.zeros(len(x))
    for places in case.members:
        following = 0.0
        for t in places[::-1]:
            following = out[t] = x[t] + discount[t] * following
    return out


@pytest.mark.parametrize("discount", [0.0, 0.9, 1.0, 1.1])
@ENOUGH
@given(case=cases())
def test_reverse_scan_matches_a_loop(discount: float, case: Case) -> None:
    expected = scan_loop(case, np.full(len(case.index), discount))
    close(sg.segment_reverse_scan(case.values, discount, case.index, case.size, mask=case.mask), expected)
    scalar = torch.tensor(discount, dtype=torch.float64)
    close(sg.segment_reverse_scan(case.values, scalar, case.index, case.size, mask=case.mask), expected)


@ENOUGH
@given(case=cases(), seed=st.integers(0, 2**32 - 1))
def test_reverse_scan_with_a_discount_per_item_matches_a_loop(case: Case, seed: int) -> None:
    rng = np.random.default_rng(seed)
    discount = rng.random(len(case.index)) * rng.integers(0, 2, len(case.index))
    discount[~case.keep] = math.nan
    actual = sg.segment_reverse_scan(case.values, torch.from_numpy(discount), case.index, case.size, mask=case.mask)
    close(actual, scan_loop(case, discount))


def test_reverse_scan_by_hand() -> None:
    """Rewards 1, 2, 4 at discount 1/2: 1 + (2 + 4/2)/2 = 3. The masked step is skipped, not discounted through."""
    values, index = torch.tensor([1.0, math.nan, 2.0, 4.0, 8.0]), torch.tensor([0, 0, 0, 0, 1])
    mask = torch.tensor([True, False, True, True, True])
    returns = sg.segment_reverse_scan(values, 0.5, index, 2, mask=mask)
    assert returns.tolist() == [3.0, 0.0, 4.0, 4.0, 8.0]


@pytest.mark.parametrize("discount", [0.9999, 1.0])
def test_reverse_scan_of_a_long_segment_in_float32(discount: float) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([1, 0, 20_000, 3])
    index = torch.repeat_interleave(torch.arange(4), lengths)
    values = torch.rand(len(index), generator=generator)
    expected = scan_loop(Case(values, index, 4, None), np.full(len(index), discount))
    close(sg.segment_reverse_scan(values, discount, index, 4), expected, rtol=1e-6)
    close(
        sg.segment_reverse_scan(values, torch.full_like(values, 0.99), index, 4),
        scan_loop(Case(values, index, 4, None), np.full(len(index), np.float32(0.99))),
        rtol=1e-5,
    )


@pytest.mark.parametrize("by", [1, -1, 2, -3, 0, 50])
@ENOUGH
@given(case=cases())
def test_shift_matches_a_loop(by: int, case: Case) -> None:
    x, expected = case.values.numpy(), np.full(len(case.index), 9.0)
    for places in case.members:
        for k, t in enumerate(places):
            if 0 <= k + by < len(places):
                expected[t] = x[places[k + by]]
    close(sg.segment_shift(case.values, case.index, by=by, fill=9.0, mask=case.mask), expected)


@ENOUGH
@given(case=cases())
def test_first_and_last_items(case: Case) -> None:
    first, last = np.zeros(len(case.index), bool), np.zeros(len(case.index), bool)
    for places in case.members:
        if len(places):
            first[places[0]] = last[places[-1]] = True
    assert sg.segment_is_first(case.index, case.size, mask=case.mask).tolist() == first.tolist()
    assert sg.segment_is_last(case.index, case.size, mask=case.mask).tolist() == last.tolist()


def test_spread_keeps_the_dtype_and_is_the_adjoint_of_sum() -> None:
    index = torch.tensor([2, 0, 2, 1])
    assert sg.spread(torch.tensor([5, 6, 7]), index).tolist() == [7, 5, 7, 6]
    assert sg.spread(torch.tensor([True, False, True]), index).tolist() == [True, True, True, False]
    values = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    upstream = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(sg.spread(values, index), values, upstream)
    assert torch.equal(gradient, sg.segment_sum(upstream, index, 3))


# Properties of all of them


def scan(values: Tensor, index: Tensor, size: int, *, mask: Tensor | None = None) -> Tensor:
    return sg.segment_reverse_scan(values, 0.9, index, size, mask=mask)


def scan_by_item(values: Tensor, index: Tensor, size: int, *, mask: Tensor | None = None) -> Tensor:
    """Discounts that depend on the values, so that the gradient also runs through them."""
    return sg.segment_reverse_scan(values, values.double().nan_to_num(0.0, 0.0, 0.0).sigmoid(), index, size, mask=mask)


def shift(values: Tensor, index: Tensor, size: int, *, mask: Tensor | None = None) -> Tensor:
    return sg.segment_shift(values, index, mask=mask)


def quantile(values: Tensor, index: Tensor, size: int, *, mask: Tensor | None = None) -> Tensor:
    return sg.segment_quantile(values, index, size, 0.3, mask=mask)


def log_softmax(values: Tensor, index: Tensor, size: int, *, mask: Tensor | None = None) -> Tensor:
    """With the -inf of masked items taken out, so that sums stay finite."""
    return sg.segment_log_softmax(values, index, size, mask=mask).clamp(min=-1e3)


ITEMWISE: dict[str, Callable[..., Tensor]] = {
    "softmax": sg.segment_softmax,
    "log_softmax": log_softmax,
    "cumsum": sg.segment_cumsum,
    "cumsum_reverse_exclusive": partial(sg.segment_cumsum, reverse=True, exclusive=True),
    "scan": scan,
    "scan_by_item": scan_by_item,
    "shift": shift,
}
DIFFERENTIABLE: dict[str, Callable[..., Tensor]] = {
    **{name: function for name, (function, _, _) in REDUCTIONS.items()},
    "quantile": quantile,
    **ITEMWISE,
}
EVERY: dict[str, Callable[..., Tensor]] = {**DIFFERENTIABLE, "rank": sg.segment_rank}


def ragged(seed: int = 0, length: int = 14) -> Case:
    """Distinct values, one empty segment, one of a single item, masked NaN and infinities, ids out of order."""
    rng = np.random.default_rng(seed)
    index = torch.from_numpy(rng.choice([0, 1, 3], length))
    index[0] = 4
    mask = torch.from_numpy(rng.random(length) < 0.7)
    mask[:3] = torch.tensor([True, False, True])
    values = torch.from_numpy(rng.permutation(np.linspace(-2.0, 2.0, length)))
    values[~mask] = torch.from_numpy(rng.choice(POISON, int((~mask).sum())))
    return Case(values, index, 5, mask)


def finite(output: Tensor) -> Tensor:
    """The neutral values of empty segments are constants: drop the infinite ones."""
    return output[output.isfinite()]


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("seed", range(3))
def test_gradient_matches_finite_differences(name: str, seed: int) -> None:
    case = ragged(seed)
    assert case.mask is not None
    mask, function = case.mask, DIFFERENTIABLE[name]

    def of_unmasked(unmasked: Tensor) -> Tensor:
        values = case.values.clone().masked_scatter(mask, unmasked)
        return finite(function(values, case.index, case.size, mask=mask))

    assert torch.autograd.gradcheck(of_unmasked, case.values[mask].clone().requires_grad_())


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@ENOUGH
@given(case=cases(ties=True))
def test_gradient_is_finite_and_zero_at_masked_items(name: str, case: Case) -> None:
    values = case.values.clone().requires_grad_()
    output = DIFFERENTIABLE[name](values, case.index.clamp(0, case.size - 1), case.size, mask=case.mask)
    weight = torch.arange(1.0, len(output) + 1, dtype=output.dtype)
    # Every output takes part, also infinite neutral values: their slope must not come back as NaN.
    (gradient,) = torch.autograd.grad(output, values, weight)
    assert gradient.isfinite().all()
    assert (gradient[torch.from_numpy(~case.keep)] == 0).all()


@pytest.mark.parametrize("reverse", [False, True])
def test_scans_are_twice_differentiable(reverse: bool) -> None:
    case = ragged(3)
    assert case.mask is not None
    values, index = case.values[case.mask].requires_grad_(), case.index[case.mask]
    discount = torch.rand_like(values).detach().requires_grad_()

    def both(x: Tensor, d: Tensor) -> Tensor:
        total = sg.segment_reverse_scan(x, d, index, case.size)
        return total + sg.segment_cumsum(x * d, index, case.size, reverse=reverse)

    assert torch.autograd.gradgradcheck(both, (values, discount))


@pytest.mark.parametrize("value", [0.0, 0.7, 1.0])
def test_gradient_of_a_shared_discount(value: float) -> None:
    case = ragged(1)
    discount = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda d: sg.segment_reverse_scan(case.values, d, case.index, case.size, mask=case.mask), (discount,)
    )


@pytest.mark.parametrize("name", EVERY)
@ENOUGH
@given(case=cases(), seed=st.integers(0, 2**32 - 1))
def test_order_of_segments_does_not_matter(name: str, case: Case, seed: int) -> None:
    """Interleave the segments anew, each in its own order: the same results, moved along."""
    function = EVERY[name]
    index = case.index.clamp(0, case.size - 1)
    rng = np.random.default_rng(seed)
    deck = torch.from_numpy(rng.permutation(len(index)))
    order = torch.empty_like(deck)  # place k of the new order takes the next unused item of the segment dealt there
    for s in range(case.size):
        order[index[deck] == s] = torch.nonzero(index == s).squeeze(1)
    mask = None if case.mask is None else case.mask[order]
    moved = function(case.values[order], index[order], case.size, mask=mask)
    original = function(case.values, index, case.size, mask=case.mask)
    close(moved, (original[order] if name in ITEMWISE or name == "rank" else original).numpy())


@pytest.mark.parametrize("name", [*REDUCTIONS, "quantile"])
@ENOUGH
@given(case=cases(), seed=st.integers(0, 2**32 - 1))
def test_reductions_ignore_the_order_of_items(name: str, case: Case, seed: int) -> None:
    function = DIFFERENTIABLE[name]
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(case.index)))
    mask = None if case.mask is None else case.mask[order]
    shuffled = function(case.values[order], case.index[order], case.size, mask=mask)
    close(shuffled, function(case.values, case.index, case.size, mask=case.mask).numpy())


@pytest.mark.parametrize("name", EVERY)
def test_invalid_values_stay_in_their_segment(name: str) -> None:
    """Neighbours of a segment that holds NaN or infinity come out bit for bit as without it."""
    index = torch.repeat_interleave(torch.arange(3), torch.tensor([5, 6, 7]))
    clean = torch.linspace(-1, 1, 18, dtype=torch.float64)
    for poison in POISON:
        dirty = clean.clone()
        dirty[7:10] = poison
        before, after = EVERY[name](clean, index, 3), EVERY[name](dirty, index, 3)
        others = torch.tensor([True, False, True]) if len(before) == 3 else index != 1
        assert torch.equal(before[others], after[others])
        if math.isnan(poison):
            assert after[~others].isnan().any()


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(
    "given_dtype, result_dtype",
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_results_are_float32_or_better(name: str, given_dtype: torch.dtype, result_dtype: torch.dtype) -> None:
    case = ragged()
    values = case.values.to(given_dtype)
    actual = EVERY[name](values, case.index, case.size, mask=case.mask)
    assert actual.dtype == result_dtype
    exact = EVERY[name](values.double(), case.index, case.size, mask=case.mask)
    close(actual, exact.numpy(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [0, 3])
def test_zero_items(name: str, masked: bool, size: int) -> None:
    values = torch.zeros(0, requires_grad=True)
    mask = torch.zeros(0, dtype=torch.bool) if masked else None
    output = EVERY[name](values, torch.zeros(0, dtype=torch.int64), size, mask=mask)
    assert len(output) == (0 if name in ITEMWISE or name == "rank" else size)
    if output.requires_grad:
        assert torch.autograd.grad(output.sum(), values)[0].shape == (0,)


def test_index_functions_of_zero_items() -> None:
    index = torch.zeros(0, dtype=torch.int64)
    assert sg.segment_count(index, 2).tolist() == [0.0, 0.0]
    assert sg.segment_is_first(index, 0).tolist() == sg.segment_is_last(index, 2).tolist() == []
    assert sg.spread(torch.zeros(0), index).tolist() == []


@pytest.mark.parametrize("name", EVERY)
def test_wrong_lengths_are_named(name: str) -> None:
    # A TypeError where shape annotations are enforced around the public functions.
    function = EVERY[name]
    index = torch.zeros(3, dtype=torch.int64)
    with pytest.raises((ValueError, TypeError), match=r"(?s)4.*3"):
        function(torch.zeros(4), index, 1)
    with pytest.raises((ValueError, TypeError), match=r"(?s)2.*3|3.*2"):
        function(torch.zeros(3), index, 1, mask=torch.ones(2, dtype=torch.bool))


def test_messages_name_shapes_ids_and_dtypes() -> None:
    total = inspect.unwrap(sg.segment_sum)
    index = torch.tensor([0, 5])
    with pytest.raises(ValueError, match=r"values \[3\] and index \[2\]"):
        total(torch.zeros(3), index, 6)
    with pytest.raises(ValueError, match=r"mask \[3\] and index \[2\]"):
        total(torch.zeros(2), index, 6, mask=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"segment id 5 lies outside 0 \.\. 4"):
        total(torch.zeros(2), index, 5)
    with pytest.raises(ValueError, match="segment id -1"):
        total(torch.zeros(2), index - 1, 6)
    with pytest.raises(ValueError, match="float32"):
        total(torch.zeros(2), index, 6, mask=torch.ones(2))
    with pytest.raises(ValueError, match=r"discount \[1\] and index \[2\]"):
        inspect.unwrap(sg.segment_reverse_scan)(torch.zeros(2), torch.zeros(1), index, 6)
    with pytest.raises(ValueError, match="segment id 5"):
        sg.spread(torch.zeros(3), index)


def test_scan_memory_does_not_grow_with_the_number_of_passes() -> None:
    """Backward keeps the result and the discounts, not one vector per doubling pass."""
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    values = torch.zeros(4096, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        sg.segment_reverse_scan(values, 0.9, torch.zeros(4096, dtype=torch.int64), 1)
    assert sum(saved) <= 4 * 4096 + 1

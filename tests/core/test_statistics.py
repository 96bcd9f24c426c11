from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polopt.core.errors import UsageError
from polopt.core.statistics import accuracy_interval, clustered_mean_interval, pass_at_k


def test_wilson_equals_its_closed_form() -> None:
    z = 1.959963984540054
    for successes, n in [(0, 10), (3, 10), (10, 10), (437, 1319)]:
        p = successes / n
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        low, high = accuracy_interval(successes, n)
        assert low == pytest.approx(centre - half, abs=1e-9)
        assert high == pytest.approx(centre + half, abs=1e-9)


def test_exact_interval_puts_half_of_the_error_in_each_tail() -> None:
    low, high = accuracy_interval(7, 20, level=0.9, method="exact")
    above = sum(math.comb(20, i) * low**i * (1 - low) ** (20 - i) for i in range(7, 21))
    below = sum(math.comb(20, i) * high**i * (1 - high) ** (20 - i) for i in range(8))
    assert above == pytest.approx(0.05, abs=1e-6)
    assert below == pytest.approx(0.05, abs=1e-6)


@pytest.mark.parametrize(("successes", "n", "level"), [(0, 0, 0.95), (5, 4, 0.95), (-1, 4, 0.95), (1, 4, 1.0)])
def test_accuracy_interval_rejects_impossible_counts(successes: int, n: int, level: float) -> None:
    with pytest.raises(UsageError):
        accuracy_interval(successes, n, level)


def test_wilson_covers_at_its_level_by_exact_summation() -> None:
    n = 50
    bounds = [accuracy_interval(s, n) for s in range(n + 1)]
    coverage = []
    for p in np.linspace(0.05, 0.95, 37):
        pmf = [math.comb(n, s) * p**s * (1 - p) ** (n - s) for s in range(n + 1)]
        coverage.append(sum(q for q, (low, high) in zip(pmf, bounds, strict=True) if low <= p <= high))
    assert 0.93 < float(np.mean(coverage)) < 0.97


def test_clustered_interval_equals_a_loop_over_prompts() -> None:
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat([4, -2, 9, 7, 1], [3, 1, 5, 2, 4]))
    values = rng.normal(size=15)
    result = clustered_mean_interval(torch.tensor(values), torch.tensor(labels))
    means = np.array([values[labels == label].mean() for label in (4, -2, 9, 7, 1)])
    t_975_with_4_degrees = 2.7764451051977987
    half = t_975_with_4_degrees * means.std(ddof=1) / math.sqrt(5)
    assert result.count == 5
    assert result.mean == pytest.approx(means.mean(), rel=1e-12)
    assert result.low == pytest.approx(means.mean() - half, rel=1e-9)
    assert result.high == pytest.approx(means.mean() + half, rel=1e-9)


def test_repeating_every_sample_does_not_narrow_the_clustered_interval() -> None:
    values, labels = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0]), torch.tensor([0, 0, 1, 2, 2])
    once = clustered_mean_interval(values, labels)
    often = clustered_mean_interval(values.repeat(100), labels.repeat(100))
    assert (often.low, often.high) == pytest.approx((once.low, once.high))


def test_an_unscored_sample_is_left_out_rather_than_counted_as_zero() -> None:
    values, labels = torch.tensor([1.0, math.nan, 0.5, math.nan]), torch.tensor([0, 0, 1, 2])
    kept = clustered_mean_interval(values[[0, 2]], labels[[0, 2]])
    assert clustered_mean_interval(values, labels) == kept
    assert kept.mean == 0.75


def test_the_spread_of_a_single_prompt_is_unknown() -> None:
    one = clustered_mean_interval(torch.tensor([1.0, 0.0]), torch.tensor([3, 3]))
    assert one.mean == 0.5 and one.count == 1
    assert math.isnan(one.low) and math.isnan(one.high)
    none = clustered_mean_interval(torch.tensor([math.nan]), torch.tensor([3]))
    assert math.isnan(none.mean) and none.count == 0


def test_pass_at_k_equals_enumeration_of_every_draw() -> None:
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            draws = list(itertools.combinations([i < c for i in range(n)], k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-14), (n, c, k)


@settings(deadline=None)
@given(st.data())
def test_pass_at_k_keeps_its_digits_at_any_size(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 5000))
    c = data.draw(st.integers(0, n))
    k = data.draw(st.integers(1, n))
    exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
    assert pass_at_k(n, c, k) == pytest.approx(float(exact), rel=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_pass_at_k_rejects_impossible_counts(n: int, c: int, k: int) -> None:
    with pytest.raises(UsageError):
        pass_at_k(n, c, k)

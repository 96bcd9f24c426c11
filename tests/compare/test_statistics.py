from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from polopt.compare.statistics import (
    area_under_curve,
    first_reaching,
    interquartile_mean,
    iqm_score,
    mean_score,
    paired_difference,
    probability_of_improvement,
    stratified_difference,
)
from polopt.core.errors import UsageError
from polopt.core.statistics import Interval

RANDOM = np.random.default_rng(0)


def normal(*shape: int, mean: float = 0.0) -> list[list[float]]:
    return (mean + RANDOM.normal(size=shape)).tolist()


def test_interquartile_mean_is_the_mean_of_the_middle_half() -> None:
    assert interquartile_mean([7, 0, 100, 2, 3, 4, 5, -50]) == pytest.approx((2 + 3 + 4 + 5) / 4)
    scores = RANDOM.normal(size=30).tolist()
    assert interquartile_mean(scores) == pytest.approx(np.mean(np.sort(scores)[7:-7]))
    assert interquartile_mean([1.0, math.nan, 3.0]) == 2.0
    assert math.isnan(interquartile_mean([]))


def test_paired_difference_is_the_paired_t_interval() -> None:
    x, y = normal(2, 7)
    found = paired_difference(x, y, level=0.9)
    oracle = stats.ttest_rel(x, y).confidence_interval(0.9)
    assert [found.mean, found.low, found.high] == pytest.approx([np.mean(x) - np.mean(y), oracle.low, oracle.high])
    assert found.count == 7


def test_paired_difference_by_hand() -> None:
    # d = 1, 2, 3: mean 2, sd 1, t_2(0.975) = 4.302653
    found = paired_difference([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.high - found.mean == pytest.approx(4.302653 / math.sqrt(3), abs=1e-6)


def test_pairing_removes_what_a_seed_does_to_both() -> None:
    (noise,) = normal(1, 6)
    small = paired_difference([10 * n + 1 + 0.01 * i for i, n in enumerate(noise)], [10 * n for n in noise])
    assert small.low > 0.9 and small.high < 1.2


def test_pairs_with_an_invalid_score_are_left_out() -> None:
    whole = paired_difference([1.0, 2.0, 4.0], [0.0, 0.0, 0.0])
    assert paired_difference([1.0, 2.0, math.nan, 4.0, 9.0], [0.0, 0.0, 5.0, 0.0, math.nan]) == whole


@pytest.mark.parametrize("estimate", [mean_score, iqm_score])
def test_one_seed_has_no_bounds(estimate: Callable[[list[list[float]]], Interval]) -> None:
    found = estimate([[0.5], [0.7]])
    assert found.mean == pytest.approx(0.6) and math.isnan(found.low) and math.isnan(found.high)
    assert math.isnan(estimate([[0.5], []]).mean)


def test_difference_and_probability_with_one_seed_have_no_bounds() -> None:
    for found in (paired_difference([0.5], [0.2]), probability_of_improvement([[0.5]], [[0.2]])):
        assert math.isnan(found.low) and math.isnan(found.high) and found.count == 1
    assert math.isnan(paired_difference([], []).mean)


def test_equal_differences_have_an_interval_without_width() -> None:
    assert paired_difference([1.0, 2.0], [1.0, 2.0]) == Interval(0.0, 0.0, 0.0, 2)


def test_stratified_difference_of_one_stratum_is_the_paired_one() -> None:
    x, y = normal(2, 5)
    assert stratified_difference([x], [y]) == paired_difference(x, y)


def test_stratified_difference_of_two_strata_is_half_of_welch() -> None:
    # The mean of two means is half of the difference between d_1 and -d_2, whose interval is Welch's.
    d, e = normal(1, 4)[0], [3 * value for value in normal(1, 7)[0]]
    found = stratified_difference([d, e], [[0.0] * 4, [0.0] * 7])
    oracle = stats.ttest_ind(d, [-v for v in e], equal_var=False).confidence_interval(0.95)
    assert [found.low, found.high] == pytest.approx([oracle.low / 2, oracle.high / 2])


def test_paired_difference_covers_the_truth_as_often_as_it_says() -> None:
    hits = 0
    for x, y in RANDOM.normal(size=(2000, 2, 5)):
        found = paired_difference((x + 0.3).tolist(), y.tolist())
        hits += found.low <= 0.3 <= found.high
    assert 0.935 < hits / 2000 < 0.965


def test_mean_is_resampled_within_strata() -> None:
    # Redrawn across strata, 0 and 1 would give an interval from 0 to 1.
    assert mean_score([[0.0] * 4, [1.0] * 4]) == Interval(0.5, 0.5, 0.5, 8)


def test_mean_interval_against_a_bootstrap_by_loops() -> None:
    strata = normal(3, 6)
    random = np.random.default_rng(1)
    means = [np.mean([random.choice(s, len(s)).mean() for s in strata]) for _ in range(4000)]
    found = mean_score(strata)
    width = np.quantile(means, 0.975) - np.quantile(means, 0.025)
    assert found.low == pytest.approx(np.quantile(means, 0.025), abs=0.06 * width)
    assert found.high == pytest.approx(np.quantile(means, 0.975), abs=0.06 * width)


def test_iqm_interval_against_a_bootstrap_by_loops() -> None:
    strata = normal(2, 6)
    random = np.random.default_rng(1)
    values = []
    for _ in range(4000):
        drawn = np.sort(np.concatenate([random.choice(s, len(s)) for s in strata]))
        values.append(drawn[3:-3].mean())
    found = iqm_score(strata)
    width = np.quantile(values, 0.975) - np.quantile(values, 0.025)
    assert found.mean == pytest.approx(np.sort(np.concatenate(strata))[3:-3].mean())
    assert found.low == pytest.approx(np.quantile(values, 0.025), abs=0.08 * width)
    assert found.high == pytest.approx(np.quantile(values, 0.975), abs=0.08 * width)


def test_probability_of_improvement_is_mann_whitney() -> None:
    x, y = normal(2, 8)
    assert probability_of_improvement([x], [y]).mean == pytest.approx(stats.mannwhitneyu(x, y).statistic / 64)
    # 3 > 1, 3 = 3, 2 > 1, 2 < 3
    assert probability_of_improvement([[3.0, 2.0]], [[1.0, 3.0]]).mean == pytest.approx((1 + 0.5 + 1 + 0) / 4)


def test_probability_of_improvement_redraws_the_runs_of_a_seed_together() -> None:
    x, y = [0.0, 2.0, 5.0], [1.0, 3.0, 4.0]
    values = []
    for chosen in itertools.product(range(3), repeat=3):
        wins = [(x[i] > y[j]) + 0.5 * (x[i] == y[j]) for i in chosen for j in chosen]
        values.append(sum(wins) / 9)
    found = probability_of_improvement([x], [y])
    assert found.low == pytest.approx(np.quantile(values, 0.025, method="inverted_cdf"))
    assert found.high == pytest.approx(np.quantile(values, 0.975, method="inverted_cdf"))


def test_intervals_are_reproducible() -> None:
    strata = normal(2, 5)
    assert mean_score(strata) == mean_score(strata)
    assert mean_score(strata, seed=1) != mean_score(strata)


def test_area_is_the_mean_height() -> None:
    assert area_under_curve([0.0, 10.0, 30.0], [0.0, 1.0, 1.0]) == pytest.approx((5 + 20) / 30)
    assert math.isnan(area_under_curve([0.0], [1.0]))


def test_first_reaching_is_between_the_points() -> None:
    x, y = [0.0, 10.0, 20.0, 30.0], [0.2, 0.4, 0.8, 0.5]
    assert first_reaching(x, y, 0.6) == pytest.approx(15.0)
    assert first_reaching(x, y, 0.1) == 0.0
    assert first_reaching(x, y, 0.9) == math.inf
    assert first_reaching(x, [0.2, math.nan, 0.8, 0.9], 0.5) == pytest.approx(10.0)
    assert first_reaching([], [], 0.5) == math.inf


def test_what_does_not_fit_together_is_said() -> None:
    with pytest.raises(UsageError, match="2 seeds of the treatment cannot be paired with 1 of the baseline"):
        paired_difference([1.0, 2.0], [1.0])
    with pytest.raises(UsageError, match="1 strata cannot be paired with 2"):
        stratified_difference([[1.0]], [[1.0], [2.0]])
    with pytest.raises(UsageError, match=r"strictly between 0 and 1, got 1\.5"):
        mean_score([[1.0, 2.0]], level=1.5)

"""Statistics over seeds: interquartile mean, stratified bootstrap, paired differences, probability of improvement.

Scores are given by stratum (a task, a problem): one list of final scores per stratum, one entry per seed; the same
place is the same seed in every contender. The measures are those of Agarwal et al. 2021 (arXiv:2108.13264); resampling,
trimming and quantiles are scipy's. A seed whose score is NaN (not measurable) is left out, never counted as 0.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from polopt.core.errors import UsageError
from polopt.core.statistics import Interval

RESAMPLES: Final = 5_000
"""Bootstrap resamples: the bounds of an interval move by about 1 % of its width between random seeds."""

Scores = Sequence[float]
Strata = Sequence[Scores]


def interquartile_mean(scores: Scores) -> float:
    """Mean of the middle half of the scores: a quarter (rounded down) is cut from each end; NaN where there is none."""
    kept = _valid(scores)
    return float(_stats().trim_mean(kept, 0.25)) if kept.size else math.nan


def paired_difference(treatment: Scores, baseline: Scores, level: float = 0.95) -> Interval:
    """Mean of d_i = treatment_i - baseline_i over seeds i, with a Student-t interval.

        mean(d) +- t_{n-1} sd(d) / sqrt(n)

    The pairs share prompts and random numbers, so that what a seed does to both cancels. Student's interval, because
    with the 5 or 10 seeds that are usual the percentiles of a bootstrap are too narrow. ``count`` is n, the pairs with
    both scores; with n < 2 the bounds are NaN. Raises UsageError when the lengths differ.
    """
    return stratified_difference([treatment], [baseline], level)


def stratified_difference(treatment: Strata, baseline: Strata, level: float = 0.95) -> Interval:
    """The paired difference averaged over K strata that count equally, with a Welch-Satterthwaite interval.

        D = 1/K sum_k mean(d_k),  SE^2 = sum_k v_k,  v_k = var(d_k) / (K^2 n_k),  nu = SE^4 / sum_k v_k^2 / (n_k - 1)

    D +- t_nu SE; for K = 1 it is `paired_difference`. ``count`` is the number of pairs. A stratum with one pair makes
    the bounds NaN, one without any the mean too. Raises UsageError when strata or seeds do not match.
    """
    _check_level(level)
    _check_pairs(treatment, baseline)
    differences = [
        _valid(np.asarray(x, dtype=float) - np.asarray(y, dtype=float))
        for x, y in zip(treatment, baseline, strict=True)
    ]
    counts = [d.size for d in differences]
    if not counts or min(counts) == 0:
        return Interval(math.nan, math.nan, math.nan, sum(counts))
    mean = float(np.mean([d.mean() for d in differences]))
    if min(counts) < 2:
        return Interval(mean, math.nan, math.nan, sum(counts))
    parts = [float(d.var(ddof=1)) / (len(differences) ** 2 * d.size) for d in differences]
    error = math.sqrt(sum(parts))
    if error == 0.0:
        return Interval(mean, mean, mean, sum(counts))
    # Shares of the variance, so that its square cannot underflow.
    freedom = 1.0 / sum((v / error**2) ** 2 / (n - 1) for v, n in zip(parts, counts, strict=True))
    half = float(_stats().t.ppf(0.5 + level / 2, freedom)) * error
    return Interval(mean, mean - half, mean + half, sum(counts))


def mean_score(scores: Strata, level: float = 0.95, *, seed: int = 0) -> Interval:
    """Mean over strata of the mean score; its stratified bootstrap interval redraws seeds within each stratum."""
    return _bootstrapped(scores, lambda *samples, axis: np.mean([s.mean(axis) for s in samples], axis=0), level, seed)


def iqm_score(scores: Strata, level: float = 0.95, *, seed: int = 0) -> Interval:
    """Interquartile mean of all scores together; stratified bootstrap interval (arXiv:2108.13264, section 4.3)."""
    trim_mean = _stats().trim_mean

    def statistic(*samples: NDArray[Any], axis: int) -> Any:
        return trim_mean(np.concatenate(samples, axis=axis), 0.25, axis=axis)

    return _bootstrapped(scores, statistic, level, seed)


def probability_of_improvement(treatment: Strata, baseline: Strata, level: float = 0.95, *, seed: int = 0) -> Interval:
    """P(X > Y) of a run of the treatment and one of the baseline, averaged over strata; a tie counts one half.

        P = 1/K sum_k 1/n_k^2 sum_ij ( [x_ki > y_kj] + [x_ki = y_kj] / 2 )

    (arXiv:2108.13264, appendix A; the Mann-Whitney statistic.) The bootstrap redraws seeds within each stratum, x and y
    of a seed together, as they share its prompts. Raises UsageError when strata or seeds do not match.
    """
    _check_pairs(treatment, baseline)
    pairs = []
    for x, y in zip(treatment, baseline, strict=True):
        both = np.asarray([x, y], dtype=float)
        pairs.append(both[:, ~np.isnan(both).any(0)])
    wins = [(x[:, None] > y[None]) + 0.5 * (x[:, None] == y[None]) for x, y in pairs]

    def statistic(*samples: NDArray[Any], axis: int) -> Any:
        means = []
        for table, sample in zip(wins, samples, strict=True):
            chosen = np.moveaxis(sample, axis, -1).astype(int)
            means.append(table[chosen[..., :, None], chosen[..., None, :]].mean((-2, -1)))
        return np.mean(means, axis=0)

    return _bootstrapped([np.arange(x.size) for x, _ in pairs], statistic, level, seed)


def area_under_curve(x: Sequence[float], y: Sequence[float]) -> float:
    """Mean height of the curve: its trapezoidal area over the range of x; NaN for fewer than two different x."""
    if len(x) != len(y):
        raise UsageError(f"a curve has as many x as y, got {len(x)} and {len(y)}")
    span = x[-1] - x[0] if x else 0.0
    return float(np.trapezoid(y, x) / span) if span > 0 else math.nan


def first_reaching(x: Sequence[float], y: Sequence[float], target: float) -> float:
    """The x at which the curve, straight between its points, first is at or above ``target``; infinite if it never is.

    Points whose y is NaN are left out.
    """
    points = [(a, b) for a, b in zip(x, y, strict=True) if not math.isnan(b)]
    for (x0, y0), (x1, y1) in zip([points[0], *points] if points else [], points, strict=False):
        if y1 >= target:
            return x1 if y0 >= target or y1 == y0 else x0 + (x1 - x0) * (target - y0) / (y1 - y0)
    return math.inf


def _bootstrapped(
    samples: Strata | Sequence[NDArray[Any]], statistic: Callable[..., Any], level: float, seed: int
) -> Interval:
    """The statistic of the samples and the percentiles of its bootstrap distribution, strata redrawn independently."""
    _check_level(level)
    kept = [_valid(sample) for sample in samples]
    counts = [sample.size for sample in kept]
    if not counts or min(counts) == 0:
        return Interval(math.nan, math.nan, math.nan, sum(counts))
    estimate = float(statistic(*kept, axis=-1))
    if min(counts) < 2:
        return Interval(estimate, math.nan, math.nan, sum(counts))
    found = _stats().bootstrap(
        kept,
        statistic,
        n_resamples=RESAMPLES,
        vectorized=True,
        axis=-1,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return Interval(estimate, float(found.confidence_interval.low), float(found.confidence_interval.high), sum(counts))


def _valid(values: Any) -> NDArray[Any]:
    array = np.asarray(values, dtype=float)
    kept: NDArray[Any] = array[~np.isnan(array)]
    return kept


def _check_pairs(treatment: Strata, baseline: Strata) -> None:
    if len(treatment) != len(baseline):
        raise UsageError(f"{len(treatment)} strata cannot be paired with {len(baseline)}")
    for x, y in zip(treatment, baseline, strict=True):
        if len(x) != len(y):
            raise UsageError(f"{len(x)} seeds of the treatment cannot be paired with {len(y)} of the baseline")


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise UsageError(f"a confidence level lies strictly between 0 and 1, got {level}")


def _stats() -> Any:
    # scipy.stats takes about a second to import; only reports pay for it.
    return importlib.import_module("scipy.stats")

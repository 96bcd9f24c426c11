"""Interval estimates for evaluation: accuracy, clustered means, pass@k."""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from polopt.core.errors import UsageError


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence bounds; `count` is the number of independent units behind it."""

    mean: float
    low: float
    high: float
    count: int


def accuracy_interval(
    successes: int, n: int, level: float = 0.95, method: Literal["wilson", "exact"] = "wilson"
) -> tuple[float, float]:
    """Confidence bounds of a success probability from `successes` out of `n` independent trials.

    "wilson" (Wilson 1927, the default): the p with |successes/n - p| <= z sqrt(p (1 - p) / n). Coverage is close to
    `level` on average, also near 0 and 1. "exact" (Clopper and Pearson 1934): coverage never below `level`, wider.

    Trials that share a prompt are not independent: use `clustered_mean_interval` for several samples per prompt.

    Raises:
        UsageError: no trials, successes outside [0, n], or a level outside (0, 1).
    """
    if n < 1:
        raise UsageError(f"an accuracy interval needs at least one trial, got n = {n}")
    if not 0 <= successes <= n:
        raise UsageError(f"successes must lie between 0 and n = {n}, got {successes}")
    _check_level(level)
    # scipy.stats takes about a second to import; only evaluation pays for it.
    stats: Any = importlib.import_module("scipy.stats")
    bounds = stats.binomtest(successes, n).proportion_ci(confidence_level=level, method=method)
    return float(bounds.low), float(bounds.high)


def clustered_mean_interval(
    values: Float[Tensor, "sample"], cluster: Int[Tensor, "sample"], level: float = 0.95
) -> Interval:
    """Mean over clusters of the cluster means, with a Student-t interval over clusters.

        y_g = mean of values in cluster g,   mean = (1/G) sum_g y_g,   mean +- t_{G-1} sd(y) / sqrt(G)

    Samples of one prompt are correlated, prompts are drawn independently; so the prompt is the unit and every prompt
    counts once however many samples it has (Miller 2024, arXiv:2411.00640, clustered standard errors).

    Args:
        values: one score per sample; NaN (could not be scored) is left out, never counted as 0.
        cluster: any integer label per sample, such as the group of a trajectory.
        level: coverage in (0, 1).

    Returns:
        Interval with `count` = G. One cluster has bounds NaN (its spread is unknown); no cluster has mean NaN too.
    """
    _check_level(level)
    if values.shape != cluster.shape:
        raise UsageError(f"{values.numel()} values cannot have {cluster.numel()} cluster labels")
    valid = ~values.isnan()
    labels, index = torch.unique(cluster[valid], return_inverse=True)
    groups = labels.numel()
    if groups == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    sums = torch.zeros(groups, dtype=torch.float64, device=values.device)
    sums = sums.index_add(0, index, values[valid].double())
    means = sums / torch.bincount(index, minlength=groups)
    mean = float(means.mean())
    if groups == 1:
        return Interval(mean, math.nan, math.nan, 1)
    special: Any = importlib.import_module("scipy.special")
    quantile = float(special.stdtrit(groups - 1, 0.5 + level / 2))
    half = quantile * float(means.std(correction=1)) / math.sqrt(groups)
    return Interval(mean, mean - half, mean + half, groups)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate of the probability that at least one of k samples is correct.

        pass@k = 1 - C(n - c, k) / C(n, k) = 1 - prod_{i = n-c+1}^{n} (1 - k / i)

    from n samples of one prompt of which c are correct (Chen et al. 2021, arXiv:2107.03374, Eq. 1). The product is
    summed in logs and subtracted with expm1, so neither large n nor an estimate near 0 loses digits.

    Raises:
        UsageError: unless 1 <= k <= n and 0 <= c <= n.
    """
    if not 0 <= c <= n:
        raise UsageError(f"pass@k needs 0 <= c <= n, got c = {c} correct of n = {n} samples")
    if not 1 <= k <= n:
        raise UsageError(f"pass@{k} needs between 1 and n samples to draw, got n = {n}; sample at least k per prompt")
    if n - c < k:
        return 1.0
    # The ratio is symmetric in c and k; the shorter product is cheaper and rounds less often.
    terms, other = min(c, k), max(c, k)
    return 0.0 - math.expm1(math.fsum(math.log1p(-other / (n - i)) for i in range(terms)))


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise UsageError(f"a confidence level lies strictly between 0 and 1, got {level}")

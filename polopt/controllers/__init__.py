"""Coefficients that follow the statistics of the run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from polopt.core.errors import UsageError
from polopt.core.part import Part, Stateful, part


@part("controller", "adaptive-kl")
@dataclass(frozen=True)
class AdaptiveKL(Stateful):
    """beta <- beta * (1 + clip(KL / target - 1, -0.2, 0.2) * trajectories / horizon), after each iteration.

    Writes the coefficient into the method's field ``coefficient`` (dotted, as on the command line). Reads the statistic
    ``kl``. Ziegler et al. 2019, arXiv:1909.08593, section 2.2.
    """

    target: float = 6.0
    horizon: float = 10_000.0
    initial: float = 0.05
    coefficient: str = "reward.beta"
    beta: float | None = field(default=None, init=False, compare=False)

    state = ("beta",)

    def __call__(self, statistics: Mapping[str, float]) -> dict[str, float]:
        beta = self.initial if self.beta is None else self.beta
        if math.isfinite(statistics.get("kl", math.nan)):
            error = min(max(statistics["kl"] / self.target - 1.0, -0.2), 0.2)
            beta *= 1.0 + error * statistics["trajectories"] / self.horizon
        self.remember(beta=beta)
        return {self.coefficient: beta}


@part("controller", "linear-schedule")
@dataclass(frozen=True)
class LinearSchedule(Part):
    """c(p) = (1 - p) start + p end for each coefficient, p the share of the budget that is spent, in [0, 1].

    ``start`` and ``end`` map the method's fields (dotted, as on the command line) to numbers. Reads the statistic
    ``progress``; without it, before the first iteration, p is 0. Raises UsageError unless both name the same fields.
    """

    start: Mapping[str, float] = field(default_factory=dict)
    end: Mapping[str, float] = field(default_factory=dict)

    def __call__(self, statistics: Mapping[str, float]) -> dict[str, float]:
        if odd := sorted(set(self.start) ^ set(self.end)):
            raise UsageError(f"linear-schedule has {odd[0]!r} in only one of start and end; give both its values")
        progress = statistics.get("progress", 0.0)
        return {name: (1 - progress) * self.start[name] + progress * self.end[name] for name in self.start}

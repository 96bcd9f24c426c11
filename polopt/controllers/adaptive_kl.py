"""A KL coefficient that follows a target."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from polopt.core.part import Stateful, part


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

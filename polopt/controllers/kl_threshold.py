"""A KL threshold that follows the velocity of the reward."""

from __future__ import annotations

import math
import statistics as plain
from collections.abc import Mapping
from dataclasses import dataclass, field

from polopt.core.part import Stateful, part


@part("controller", "kl-threshold")
@dataclass(frozen=True)
class KLThreshold(Stateful):
    """tau = clip((base + u) f, low, high): u by a PID controller on the reward's velocity, f by the phase of the run.

    m' = 0.95 m + 0.05 R, R the mean reward of the batch;  e = m' - m - target;  I <- clip(I + e, -1, 1);
    u = kp e + ki I + kd (e - e_before), and 0 at the first reward, which is m. With the last ``window`` rewards and
    the ``window`` before them (the same ones where there are none): f = 1.5 with fewer than a window ("warm-up"), 1.2
    where the mean rose by more than 0.01 ("climbing"), 1.0 where it is above 0.7 with a deviation below 0.02
    ("converged"), else 0.8 ("plateau").

    Also k <- 0.9 k + 0.1 KL, an average that starts at 0. Writes tau and k into the method's fields ``threshold`` and
    ``average``; reads the statistics ``reward`` and ``kl_statistic``. ``calls`` steps are made per iteration with the
    same numbers. A number that is missing or not finite moves nothing. Maity 2026, arXiv:2602.04651.
    """

    base: float = 0.3
    low: float = 0.1
    high: float = 0.6
    kp: float = 0.3
    ki: float = 0.01
    kd: float = 0.05
    target: float = 0.001
    window: int = 50
    calls: int = 1
    kl_statistic: str = "kl"
    threshold: str = "regularizer.threshold"
    average: str = "regularizer.average"
    mean: float | None = field(default=None, init=False, compare=False)
    integral: float = field(default=0.0, init=False, compare=False)
    error: float = field(default=0.0, init=False, compare=False)
    output: float = field(default=0.0, init=False, compare=False)
    history: tuple[float, ...] = field(default=(), init=False, compare=False)
    kl: float = field(default=0.0, init=False, compare=False)

    state = ("mean", "integral", "error", "output", "history", "kl")

    def __call__(self, statistics: Mapping[str, float]) -> dict[str, float]:
        reward, kl = (statistics.get(name, math.nan) for name in ("reward", self.kl_statistic))
        for _ in range(self.calls):
            if math.isfinite(reward):
                self._follow(reward)
            if math.isfinite(kl):
                self.remember(kl=0.9 * self.kl + 0.1 * kl)
        tau = min(max((self.base + self.output) * self.factor, self.low), self.high)
        return {self.threshold: tau, self.average: self.kl}

    def _follow(self, reward: float) -> None:
        self.remember(history=(*self.history, reward)[-2 * self.window :])
        if self.mean is None:
            self.remember(mean=reward)
            return
        mean = 0.95 * self.mean + 0.05 * reward
        error = mean - self.mean - self.target
        integral = min(max(self.integral + error, -1.0), 1.0)
        output = self.kp * error + self.ki * integral + self.kd * (error - self.error)
        self.remember(mean=mean, integral=integral, error=error, output=output)

    @property
    def factor(self) -> float:
        """f, by the rewards so far."""
        if len(self.history) < self.window:
            return 1.5
        recent = self.history[-self.window :]
        before = self.history[: self.window] if len(self.history) == 2 * self.window else recent
        if plain.fmean(recent) > plain.fmean(before) + 0.01:
            return 1.2
        return 1.0 if plain.pstdev(recent) < 0.02 and plain.fmean(recent) > 0.7 else 0.8

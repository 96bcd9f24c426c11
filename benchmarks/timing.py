"""Timing of alternating contenders: whatever else the machine does hits them alike, and ratios are of neighbours."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Contender = Callable[[], Any]
"""One repetition of the work; what it returns is dropped."""


@dataclass(frozen=True)
class Times:
    """Seconds of every round by contender; round i of one was measured right beside round i of the others."""

    seconds: Mapping[str, tuple[float, ...]]

    def median(self, name: str) -> float:
        """Median seconds of a contender."""
        return statistics.median(self.seconds[name])

    def ratio(self, slower: str, faster: str) -> tuple[float, float, float]:
        """Median, lower and upper decile over rounds of seconds(slower) / seconds(faster)."""
        pairs = zip(self.seconds[slower], self.seconds[faster], strict=True)
        ratios = sorted(a / b for a, b in pairs)
        if len(ratios) < 2:
            return ratios[0], ratios[0], ratios[0]
        cuts = statistics.quantiles(ratios, n=10, method="inclusive")
        return statistics.median(ratios), cuts[0], cuts[-1]

    def fastest(self) -> str:
        """The contender with the smallest median."""
        return min(self.seconds, key=self.median)


def alternate(contenders: Mapping[str, Contender], rounds: int, warmup: int = 1) -> Times:
    """``rounds`` repetitions of each contender in turn after ``warmup`` unmeasured ones, the order reversed each round.

    The garbage collector runs between repetitions, not within; a contender with a method ``prepare`` is told when.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(-warmup, rounds):
        order = list(contenders) if number % 2 == 0 else list(reversed(contenders))
        for name in order:
            gc.collect()
            gc.disable()
            if hasattr(contenders[name], "prepare"):
                contenders[name].prepare()
            started = time.perf_counter()
            contenders[name]()
            spent = time.perf_counter() - started
            gc.enable()
            if number >= 0:
                seconds[name].append(spent)
    return Times({name: tuple(values) for name, values in seconds.items()})


def best_setting(choices: Mapping[str, Contender]) -> str:
    """The fastest of some settings of one side, each tried once after a warm-up."""
    return alternate(choices, rounds=1).fastest()

"""Coefficients that follow the budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from polopt.core.errors import UsageError
from polopt.core.part import Part, part


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

"""A coefficient that is a statistic of the run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from polopt.core.part import Part, part


@part("controller", "follow")
@dataclass(frozen=True)
class Follow(Part):
    """c <- the statistic of the last iteration: how a part gets to know one of them, such as the learning rate.

    ``coefficient`` is the method's field (dotted, as on the command line). It keeps its value where the statistic is
    missing or not finite.
    """

    statistic: str = "learning_rate"
    coefficient: str = "weight.rate"

    def __call__(self, statistics: Mapping[str, float]) -> dict[str, float]:
        value = statistics.get(self.statistic, math.nan)
        return {self.coefficient: value} if math.isfinite(value) else {}

"""A temperature that holds the entropy of the policy where it is wanted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from polopt.core.part import Stateful, part


@part("controller", "target-entropy")
@dataclass(frozen=True)
class TargetEntropy(Stateful):
    """Writes T into the field ``temperature`` and target - H into the field ``gap`` of the method (dotted names).

    T = high where H <= target, else low; ``linear``: T = clip(1 + target - H, low, high). H is the statistic
    ``entropy`` of the last iteration that had one, nats per step; 0 before the first.
    """

    target: float = 0.5
    low: float = 0.8
    high: float = 1.2
    linear: bool = False
    temperature: str = "rollout.other"
    gap: str = "filter.gap"
    entropy: float = field(default=0.0, init=False, compare=False)

    state = ("entropy",)

    def __call__(self, statistics: Mapping[str, float]) -> dict[str, float]:
        if math.isfinite(measured := statistics.get("entropy", math.nan)):
            self.remember(entropy=measured)
        gap = self.target - self.entropy
        heat = min(max(1 + gap, self.low), self.high) if self.linear else self.high if gap >= 0 else self.low
        return {self.temperature: heat, self.gap: gap}

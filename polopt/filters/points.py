"""Points of a judge as labels."""

from __future__ import annotations

from dataclasses import dataclass

from polopt.core.part import Part, part
from polopt.core.rollout import Rollout


@part("filter", "points")
@dataclass(frozen=True)
class Points(Part):
    """label_i = low + (high - low) v_i of a column v [M] in [0, 1]; groups in which all are equal or invalid go."""

    column: str = "score"
    low: float = 1.0
    high: float = 6.0

    gives = frozenset({"label"})

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.column})

    def __call__(self, rollout: Rollout) -> Rollout:
        value = rollout[self.column]
        varied = rollout.group_std(value)[rollout.group] > 0
        label = self.low + (self.high - self.low) * value
        return rollout.with_columns(trajectory={"label": label}).select(varied & ~value.isnan())

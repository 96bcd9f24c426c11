"""Two stages of one run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from polopt.core.errors import UsageError
from polopt.core.part import Stateful, part


@part("controller", "stages")
@dataclass(frozen=True)
class Stages(Stateful):
    """The coefficients ``first`` for a ``share`` of the budget, ``second`` from then on, against the policy of then.

    Both map the method's fields (dotted, as on the command line) to numbers. ``model`` names a `Snapshot` of the method
    that is taken anew where the second stage begins; the optimizer is not reset. Reads the statistics ``progress`` and
    ``iteration``. State: the iteration at which the second stage began. Raises UsageError for a share outside [0, 1).
    """

    first: Mapping[str, float] = field(default_factory=dict)
    second: Mapping[str, float] = field(default_factory=dict)
    share: float = 0.5
    model: str = "ref"
    began: int | None = field(default=None, init=False, compare=False)

    state = ("began",)

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise UsageError(f"stages: the share of the first stage lies in [0, 1), got {self.share}")

    def __call__(self, statistics: Mapping[str, float]) -> dict[str, float]:
        if self.began is None and statistics.get("progress", 0.0) >= self.share:
            self.remember(began=int(statistics.get("iteration", 0)))
        if self.began is None:
            return dict(self.first)
        return {**self.second, f"models.{self.model}.at": self.began}

"""What a benchmark gives: one row per setting."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """``ratio``: how many times as fast as the peer named in ``peer`` (median over rounds, ``ratio_low`` and
    ``ratio_high`` its deciles). ``share_of_limit``: time that the machine's measured peak rates need for the work that
    must be done, over our time. ``goal``: the ratio that was aimed at. ``more`` holds what else was measured, ``most``
    the largest values aimed at of some of it.
    """

    name: str
    peer: str
    ratio: float
    ratio_low: float
    ratio_high: float
    share_of_limit: float
    goal: float
    seconds: float
    more: dict[str, Any] = field(default_factory=dict)
    most: dict[str, float] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """Whether the goals were reached, or by how much not."""
        missed = [f"missed by {1 - self.ratio / self.goal:.0%}"] if self.ratio < self.goal else []
        missed += [
            f"{name.replace('_', ' ')} {self.more[name]:.3g}, at most {most:g} wanted"
            for name, most in self.most.items()
            if self.more[name] > most
        ]
        return "; ".join(missed) or "reached"

    def as_dict(self) -> dict[str, Any]:
        """As it is written to JSON."""
        return asdict(self)

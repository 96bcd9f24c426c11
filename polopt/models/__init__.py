"""Frozen models that a method owns besides its policy, and when they are refreshed."""

from __future__ import annotations

from dataclasses import dataclass

from polopt.core.part import Part, part


@part("models", "snapshot")
@dataclass(frozen=True)
class Snapshot(Part):
    """The policy's weights at the start of the run, taken anew every ``every`` iterations where that is set."""

    every: int | None = None

    def due(self, iteration: int) -> bool:
        """Whether the model is replaced by the present policy before this iteration (the first is 0)."""
        return self.every is not None and iteration > 0 and iteration % self.every == 0

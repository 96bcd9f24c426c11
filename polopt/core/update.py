"""What an update part is given: the gradient of one batch, and the step along it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch.nn import Parameter


class Step(Protocol):
    """One update in the making. The trainer implements it; parts of slot ``update`` drive it."""

    @property
    def parameters(self) -> Sequence[Parameter]:
        """What is trained."""
        ...

    @property
    def finite(self) -> bool:
        """Whether the last `gradient` had a finite loss and nothing was rejected."""
        ...

    def gradient(self) -> dict[str, float]:
        """Put the gradient of the whole batch's loss into ``.grad`` (replacing what was there); returns its metrics."""
        ...

    def apply(self) -> None:
        """Let the optimizer step along ``.grad``; the policy's version rises by one."""
        ...

    def reject(self, reason: str) -> None:
        """Give up this update: drop the gradient, count it, keep the batch for inspection."""
        ...

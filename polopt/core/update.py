"""What an update part is given: the gradient of one batch, and the step along it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch.nn import Parameter

from polopt.core.rollout import Rollout


class Step(Protocol):
    """One update in the making. The trainer implements it; parts of slot ``update`` drive it."""

    @property
    def parameters(self) -> Sequence[Parameter]:
        """What is trained."""
        ...

    @property
    def batch(self) -> Rollout:
        """What the update learns from: the rollout with its credit, or one of its minibatches."""
        ...

    @property
    def finite(self) -> bool:
        """Whether the last `gradient` had a finite loss and nothing was rejected."""
        ...

    @property
    def chunk_square_norms(self) -> Sequence[float]:
        """||g_m||^2 of each chunk of the last `gradient`, scaled so that the mean of the g_m is the batch's gradient.

        Empty where there was a single chunk.
        """
        ...

    def gradient(self, chunks: int = 1) -> dict[str, float]:
        """Put the gradient of the whole batch's loss into ``.grad`` (replacing what was there); returns its metrics.

        ``chunks`` above 1 also measures the gradients of that many parts of the batch, of whole groups (of whole
        trajectories where the batch is one group), as equal in number as can be and never more than there are. The
        gradient is the same, up to rounding, for one more buffer of its size.
        """
        ...

    def preview(self) -> float:
        """KL per step, nats, from the present policy to the one after a whole optimizer step along ``.grad``.

        The mean over the batch's trainable steps of exp(x) - x - 1, x the change of a step's log-prob. The step is
        made and taken back: parameters, moments and ``.grad`` stay as they are.
        """
        ...

    def apply(self, scale: float = 1.0) -> None:
        """Let the optimizer step along ``.grad``; the policy's version rises by one.

        ``scale`` multiplies the learning rate of this one step.
        """
        ...

    def saved(self) -> dict[str, Any]:
        """Copies of the parameters and of the optimizer's moments as they are now: what an update part may declare as
        its state.
        """
        ...

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Put back what `saved` gave; ``.grad`` stays. The weights change, so the policy's version rises by one."""
        ...

    def reject(self, reason: str) -> None:
        """Give up this update: drop the gradient, count it, keep the batch for inspection."""
        ...

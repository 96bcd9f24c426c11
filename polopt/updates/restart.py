"""Two stages in one run: what the first one made becomes a model, and training begins anew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from polopt.core.part import Stateful, part
from polopt.core.update import Step
from polopt.updates.gradient_step import descend


@part("update", "restart")
@dataclass(frozen=True)
class Restart(Stateful):
    """Gradient steps as `GradientStep`'s, which begin anew, once, where the model ``made`` is no longer ``start``.

    Where both are a `polopt.models.Snapshot`, ``made`` with ``at``, the first iterations train ``made``; parameters and
    moments then return to where the run began. The first update on a batch to which both give the same log-probs keeps
    them (state, until they are put back); the first one after it on a batch where they differ puts them back before its
    gradient. A ``made`` that differs from the first batch on leaves one stage. The course of the learning rate goes on.
    Costs a copy of parameters and moments in the first stage.
    """

    max_norm: float = 1.0
    made: str = "guide"
    start: str = "ref"
    before: Mapping[str, Any] | None = field(default=None, init=False, compare=False)

    state = ("before",)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({f"logp/{self.made}", f"logp/{self.start}"})

    def __call__(self, step: Step) -> dict[str, float]:
        made, start = (step.batch[f"logp/{name}"][step.batch.mask] for name in (self.made, self.start))
        second = bool((made != start).any())
        if second and self.before is not None:
            step.restore(self.before)
            self.remember(before=None)
        elif not second and self.before is None:
            self.remember(before=step.saved())
        return descend(step, step.gradient(), self.max_norm)

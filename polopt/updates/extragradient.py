"""A half step to look ahead, then the whole step from where the half step began."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from polopt.core.part import Stateful, part
from polopt.core.update import Step
from polopt.updates.gradient_step import descend


@part("update", "extragradient")
@dataclass(frozen=True)
class Extragradient(Stateful):
    """theta_{t+1/2} = theta_t - lr grad L(theta_t; batch of pi_t), theta_{t+1} = theta_t - lr grad L(theta_t; batch of
    pi_{t+1/2}): two updates, and with one update per rollout two iterations, make one effective step.

    The first update of two keeps parameters and moments and goes ahead; the policy there samples the next batch; the
    second update puts both back and steps along that batch's gradient at theta_t. Optimizers with moments see the
    second gradients alone. After an odd number of updates the policy is the one that looks ahead. Gradients are clipped
    to ``max_norm``. Costs a copy of parameters and moments, which is state. Korpelevich 1976.
    """

    max_norm: float = 1.0
    before: Mapping[str, Any] | None = field(default=None, init=False, compare=False)

    state = ("before",)

    def __call__(self, step: Step) -> dict[str, float]:
        if self.before is None:
            self.remember(before=step.saved())
        else:
            step.restore(self.before)
            self.remember(before=None)
        return descend(step, step.gradient(), self.max_norm)

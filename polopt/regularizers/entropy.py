"""Entropy bonus."""

from __future__ import annotations

from dataclasses import dataclass

from polopt.core.loss import Evaluation, Loss, per_step
from polopt.core.part import Part, part
from polopt.core.rollout import Rollout


@part("regularizer", "entropy")
@dataclass(frozen=True)
class Entropy(Part):
    """l_t = -coefficient * H(pi(. | s_t)), the entropy of the policy's distribution at each step, nats."""

    coefficient: float = 0.01

    evaluates = frozenset({"entropy"})

    def __call__(self, evaluation: Evaluation, rollout: Rollout) -> Loss:
        return per_step(-self.coefficient * evaluation.entropy)

"""One optimizer step, shorter the fewer trajectories the batch is worth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from polopt.core.part import Part, part
from polopt.core.update import Step
from polopt.updates.gradient_step import descend
from polopt.weights.truncated_sequence import log_weight


@part("update", "effective-sample-size")
@dataclass(frozen=True)
class EffectiveSampleSize(Part):
    """One optimizer step at min(1, ESS / ``on_policy``) times the learning rate, or the root of that, by ``rule``.

    ESS = (sum_i w_i)^2 / (M sum_i w_i^2) over the M trajectories of the batch that can train, w their importance
    weights (`polopt.weights.truncated_sequence.log_weight`); ``on_policy`` is that of fresh data (1, and 0.55 in the
    paper's tool use). The gradient is clipped to ``max_norm``. Logs ``update/ess`` and ``update/rate_share``. Huang et
    al. 2026, arXiv:2602.17616.
    """

    on_policy: float = 1.0
    rule: Literal["sqrt", "linear"] = "sqrt"
    max_norm: float = 1.0

    needs = frozenset({"logp", "logp/start"})

    def __call__(self, step: Step) -> dict[str, float]:
        log = log_weight(step.batch)[step.batch.active_lengths > 0].double()
        ess = float((2 * log.logsumexp(0) - (2 * log).logsumexp(0)).exp()) / len(log) if len(log) else 1.0
        share = min(1.0, ess / self.on_policy) ** (0.5 if self.rule == "sqrt" else 1.0)
        return descend(step, {**step.gradient(), "update/ess": ess, "update/rate_share": share}, self.max_norm, share)

"""BAPO: clip bounds that adapt until positive steps carry their share (Xi et al. 2025, arXiv:2510.18927).

Off-policy, steps with A < 0 dominate the loss, and a fixed clip blocks what raises entropy: unlikely steps with A > 0.
For every update BAPO moves the bounds c_lo <= rho_t <= c_hi (ratios, not distances from 1) no further than needed for
P / (P + Q) >= rho_0,    P = sum_{A >= 0} min(rho_t, c_hi) A_t,    Q = sum_{A < 0} max(rho_t, c_lo) |A_t|;
L = -(1/N) sum_t min(rho_t A_t, clip(rho_t, c_lo, c_hi) A_t), the rest as in GRPO.

``search`` "paper" (Algorithm 1): c_hi rises in its steps; at its end c_lo does; nothing moves where c_lo cannot.
"code": c_lo first, then c_hi, each cut at its end; the authors' configuration has low (0.6, 0.8, 0.05), high
(1.2, 2, 0.05), target 0.5, dual 3. Eq. 8 weights steps by pi_old: an expectation, which the sum over sampled steps
estimates, as in the code; its absolute values are read as the share that the text speaks of.
``measure`` "surrogate": by it a higher c_lo makes Q larger, away from the target; what that bound is for, no gradient
of unlikely negative steps, does not count. "gradient" counts rho_t |A_t| of steps inside their bound: every move helps.
Epochs and minibatches are those of the authors' example.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from polopt.aggregations import TokenMean
from polopt.core.errors import UsageError
from polopt.core.loss import Evaluation, Loss
from polopt.core.method import Schedule
from polopt.core.part import Part, part
from polopt.core.registry import method
from polopt.core.rollout import Rollout
from polopt.methods.base.grpo import grpo
from polopt.objectives.clipped_surrogate import ClippedSurrogate
from polopt.objectives.ratio import log_ratio


@part("objective", "adaptive-clip")
@dataclass(frozen=True)
class AdaptiveClip(Part):
    """The clipped surrogate whose bounds are searched over the steps of the whole update, as above, without gradient.

    ``low`` and ``high`` are start, end and step of the bounds. Logged: the bounds found and P / (P + Q), 1 where Q = 0.
    Raises UsageError for a range that does not rise. arXiv:2510.18927, Eq. 8 and Algorithm 1.
    """

    target: float = 0.4
    low: tuple[float, float, float] = (0.6, 0.9, 0.02)
    high: tuple[float, float, float] = (1.2, 3.0, 0.05)
    search: Literal["paper", "code"] = "paper"
    measure: Literal["surrogate", "gradient"] = "surrogate"
    dual: float | None = None

    needs = frozenset({"logp", "advantage"})
    unit = "batch"
    vanishes_with = "advantage"

    def __post_init__(self) -> None:
        for start, end, step in (self.low, self.high):
            if end < start or step <= 0:
                raise UsageError(f"a bound rises from its start to its end in positive steps, got {start, end, step}")

    def __call__(self, evaluation: Evaluation, rollout: Rollout) -> Loss:
        ratio = log_ratio(evaluation, rollout).detach().double().exp()[rollout.mask]
        advantage = rollout.advantage.double()[rollout.mask]
        for low, high in self.path():
            share = self.share(ratio, advantage, low, high)
            if share >= self.target:
                break
        loss = ClippedSurrogate(1 - low, high - 1, dual=self.dual)(evaluation, rollout)
        found = {"clip_bound/low": low, "clip_bound/high": high, "positive_share": share}
        return replace(loss, metrics={**loss.metrics, **{name: ratio.new_tensor(v) for name, v in found.items()}})

    def path(self) -> list[tuple[float, float]]:
        """The pairs (c_lo, c_hi) in the order in which they are tried."""
        lows, highs = self._rungs(*self.low), self._rungs(*self.high)
        if self.search == "code":
            return [(low, highs[0]) for low in lows] + [(lows[-1], high) for high in highs[1:]]
        if len(lows) == 1:
            return [(lows[0], highs[0])]
        return [(lows[0], high) for high in highs] + [(low, highs[-1]) for low in lows[1:]]

    def _rungs(self, start: float, end: float, step: float) -> list[float]:
        # By multiplication: 0.02 added up overshoots 0.9 by rounding and misses the last rung.
        count = math.floor((end - start) / step + 1e-9)
        rungs = [start + k * step for k in range(count + 1)]
        return [*rungs, end] if self.search == "code" and rungs[-1] < end - 1e-9 else rungs

    def share(self, ratio: Float[Tensor, " step"], advantage: Float[Tensor, " step"], low: float, high: float) -> float:
        """P / (P + Q) of trainable steps at these bounds; 1 where Q = 0."""
        size = advantage.abs()
        if self.measure == "gradient":
            above, below = ratio * (ratio <= high) * size, ratio * (ratio >= low) * size
        else:
            above, below = ratio.clamp(max=high) * size, ratio.clamp(min=low) * size
        positive, negative = float(above[advantage >= 0].sum()), float(below[advantage < 0].sum())
        return positive / (positive + negative) if negative > 0 else 1.0


bapo = method(
    "bapo",
    grpo,
    seed="159",
    paper="arXiv:2510.18927",
    objective=AdaptiveClip(),
    aggregation=TokenMean(),
    schedule=Schedule(epochs=2, minibatches=4),
)

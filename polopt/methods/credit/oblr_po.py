"""OBLR-PO: variance-optimal baseline, rate set by signal to noise (Huang et al. 2025, arXiv:2511.23310).

phi_i = sum_t grad log pi(o_it);  b* = E[|phi|^2 r] / E[|phi|^2] minimises the variance of mean_i (r_i - b) phi_i;
A_i = r_i - sum_{j != i} |phi_j|^2 r_j / sum_{j != i} |phi_j|^2;  L = -(1/M) sum_i A_i sum_t log pi(o_it);
eta = eta_max S / (S + V), S = |grad J|^2, V the variance of the gradient estimate: the rate of the largest guaranteed
improvement, eta_max = 1 / smoothness.

The public text gives these principles, not their estimates. Here: the leave-one-out baseline, the one without bias; S
and V from eight chunks of the batch, averaged over updates; eta_max the run's learning rate; |phi|^2 by default from
the logits, for one forward pass (exactly: a backward pass per trajectory). Under Adam the rate is a heuristic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils import get_total_norm

from polopt.core.part import Part, Stateful, part
from polopt.core.registry import method
from polopt.core.rollout import Rollout
from polopt.core.segments import segment_cumsum, segment_min
from polopt.core.update import Step
from polopt.methods.base.reinforce import reinforce
from polopt.updates.gradient_step import descend


@part("advantage", "score-weighted")
@dataclass(frozen=True)
class ScoreWeighted(Part):
    """A_i = R_i - sum_j w_j R_j / sum_j w_j, [M], j the other valid members of the group, all with ``others`` off.

    w_j by ``norms``: "exact" |phi_j|^2 (``score_norm``); "logits" sum_t (1 - 2 pi(o_t) + sum_v pi(v)^2), which is exact
    for a softmax per prefix; "length" |y_j|. Plain mean where the weights vanish; 0 for an invalid return and for one
    with nothing to compare.
    """

    norms: Literal["logits", "exact", "length"] = "logits"
    others: bool = True

    @property
    def needs(self) -> frozenset[str]:
        columns = {"logits": {"logp", "collision"}, "exact": {"score_norm"}, "length": set[str]()}
        return frozenset({"reward"} | columns[self.norms])

    def weights(self, rollout: Rollout) -> Float[Tensor, " trajectory"]:
        """w_j >= 0."""
        if self.norms == "logits":
            return rollout.sum_steps((1 - 2 * rollout.logp.exp() + rollout["collision"]).clamp_min(0))
        return rollout["score_norm"] if self.norms == "exact" else rollout.active_lengths

    def __call__(self, rollout: Rollout) -> Float[Tensor, " trajectory"]:
        returns, group, count = rollout.trajectory_return, rollout.group, rollout.n_groups
        valid = ~returns.isnan()
        # A shift by a member leaves A as it is and makes equal returns exactly 0.
        gain = torch.where(valid, returns - segment_min(returns, group, count, mask=valid)[group], 0.0)

        def total(values: Tensor) -> Tensor:
            # Sums of what lies on either side: nothing is subtracted, so that no member's weight cancels the others'.
            before = segment_cumsum(values, group, count, mask=valid, exclusive=self.others)
            return before + segment_cumsum(values, group, count, mask=valid, exclusive=True, reverse=True)

        weight = self.weights(rollout).to(gain)
        mass, size = total(weight), total(torch.ones_like(gain))
        weighted = total(weight * gain) / torch.where(mass > 0, mass, 1.0)
        baseline = torch.where(mass > 0, weighted, total(gain) / size.clamp_min(1))
        return torch.where(valid & (size > 0), gain - baseline, 0.0)


@part("update", "signal-to-noise")
@dataclass(frozen=True)
class SignalToNoise(Stateful):
    """One optimizer step at S / (S + V) times the learning rate, S the squared gradient and V its variance.

    From the gradients g_m of M ``chunks`` of the batch (`Step.gradient`) and their mean g: V = (sum_m |g_m|^2 / M -
    |g|^2) / (M - 1); |g|^2 - V estimates S without bias. |g|^2 and V are averaged over updates with ``decay`` (a ratio
    needs no start-up correction), S is then held at ``floor`` |g|^2 at least. A batch of one chunk leaves the averages
    alone. The gradient is clipped to ``max_norm`` after the estimate. Logs ``update/rate_share``.
    """

    chunks: int = 8
    decay: float = 0.9
    floor: float = 0.01
    max_norm: float = 1.0
    square: float = field(default=0.0, init=False, compare=False)
    noise: float = field(default=0.0, init=False, compare=False)

    state = ("square", "noise")

    def __call__(self, step: Step) -> dict[str, float]:
        metrics = step.gradient(self.chunks)
        norms = step.chunk_square_norms
        if step.finite and len(norms) > 1 and math.isfinite(sum(norms)):
            square = float(get_total_norm([p.grad for p in step.parameters if p.grad is not None])) ** 2
            noise = max(0.0, sum(norms) / len(norms) - square) / (len(norms) - 1)
            old, new = self.decay, 1 - self.decay
            self.remember(square=old * self.square + new * square, noise=old * self.noise + new * noise)
        signal = max(self.square - self.noise, self.floor * self.square)
        share = signal / (signal + self.noise) if self.square > 0 else 1.0
        return descend(step, {**metrics, "update/rate_share": share}, self.max_norm, share)


oblr_po = method(
    "oblr-po",
    reinforce,
    seed="025",
    paper="arXiv:2511.23310",
    reward=None,
    advantage=ScoreWeighted(),
    update=SignalToNoise(),
)

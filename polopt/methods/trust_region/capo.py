"""CAPO: drop tokens whose predicted optimizer step leaves a trust region (Melo et al. 2025, arXiv:2510.00819).

Of the output layer alone, for a step with state h, top-K distribution pi, v = onehot(a) - pi and advantage A:
g = A v h^T [K, D];  u = g (SGD), or Adam's direction for g with the rows' moments;  q = u h;  <g, u> = A v.q;
m_H = lr A v.q + lr^2/2 A [(v.q)^2 - q^T (diag pi - pi pi^T) q]: predicted change of the objective;
m_F = lr^2/2 (v.q)^2: of the policy (KL);  kept iff |m_H| < change and m_F < divergence;
L = (1/M) sum_i (1/max(kept_i, 1)) sum_{t kept} -min(rho_t A_i, clip(rho_t) A_i).
After the test each row's moments advance by the mean of its gradients over kept tokens; rows not seen keep theirs.

Bounds of the paper: 1e-4 and 0.01 (defaults); for Dr. GRPO 1e-3 and 5e-4, for REINFORCE 1e-5 and 0.1. The official code
reads h one position late (the state after the token) and takes u = g before its first moments are there; here h is the
state that predicts the token and u is Adam's from the start. The learning rate is that of the iteration before, so the
first is not tested unless `--weight.rate` is given (the code warms up from a rate of 0). Clips, as GRPO does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from polopt.controllers import Follow
from polopt.core.errors import UsageError
from polopt.core.part import Stateful, part
from polopt.core.policy import TOP
from polopt.core.registry import method
from polopt.core.rollout import Rollout
from polopt.methods.base.grpo import grpo
from polopt.updates.row_moments import Moments, RowAdam


@part("weight", "curvature")
@dataclass(frozen=True)
class Curvature(Stateful):
    """w_t = 1 on kept steps, 0 on others; with ``renormalise`` times |y_i| / kept_i, so that a mean over the response
    is one over its kept steps. See the file for m_H and m_F; with ``lowest`` the test is lowest <= m_H < change. No
    ``rate``: all are kept.

    State: Adam's moments of the V' vocabulary rows seen so far, 2 V' D numbers, at most twice the output layer.
    """

    change: float = 0.01
    divergence: float = 1e-4
    lowest: float | None = None
    rate: float | None = None
    optimizer: Literal["adam", "sgd"] = "adam"
    top: int = 50
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    renormalise: bool = True
    moments: Moments = field(default_factory=dict, init=False, compare=False)

    needs = frozenset({"advantage", "action", "hidden", "top_id", "top_logp"})
    unit = "trajectory"
    state = ("moments",)

    def __post_init__(self) -> None:
        if not 1 <= self.top <= TOP:
            raise UsageError(f"curvature looks at the {self.top} most likely tokens; give from 1 to {TOP}")

    def __call__(self, rollout: Rollout) -> Float[Tensor, " step"]:
        live = rollout.mask
        ids, h = rollout["top_id"][live, : self.top], rollout["hidden"][live]
        pi = rollout["top_logp"][live, : self.top].softmax(-1)
        v, a = (rollout["action"][live, None] == ids).to(pi) - pi, rollout.advantage[live].to(pi)
        keep, slopes, adam = live.clone(), a[:, None] * v, RowAdam(self.beta1, self.beta2, self.eps)
        if self.rate is not None:
            sgd = self.optimizer == "sgd"
            q = slopes * h.square().sum(-1, keepdim=True) if sgd else adam.moved(self.moments, ids, slopes, h)
            change, divergence = predicted(a, v, pi, q, self.rate)
            above = change > -self.change if self.lowest is None else change >= self.lowest
            keep[live] = above & (change < self.change) & (divergence < self.divergence)
        if self.optimizer == "adam":
            kept = keep[live]
            self.remember(moments=adam.advance_by_mean(self.moments, ids[kept], slopes[kept], h[kept]))
        weight = keep.to(pi)
        if self.renormalise:
            weight = weight * rollout.spread(rollout.active_lengths / rollout.sum_steps(weight).clamp_min(1))
        return weight


def predicted(a: Tensor, v: Tensor, pi: Tensor, q: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """m_H and m_F [N] of steps with advantage a [N], v, pi and q [N, K]; <g, u> = a v.q because g = a v h^T."""
    slope = (v * q).sum(-1)
    spread = (pi * q.square()).sum(-1) - (pi * q).sum(-1).square()
    change = rate * a * slope + 0.5 * rate**2 * a * (slope.square() - spread)
    return change, 0.5 * rate**2 * slope.square()


capo = method(
    "capo",
    grpo,
    seed="079",
    paper="arXiv:2510.00819",
    weight=Curvature(),
    controller=Follow(statistic="learning_rate", coefficient="weight.rate"),
)

"""GTPO: shared tokens are never pushed down, uncertain responses are dropped (Simoni et al. 2025, arXiv:2508.03772).

A_i = r_i - mean_g;  c_i = delta_i (A_i - gamma H_i), H_i the mean entropy of response i, a constant;
delta_i = 0 where H_i > ln 2, unless the initial policy's mean entropy exceeds ln 2 too, else 1;
L = -(1/M) sum_i (c_i / |y_i|) sum_t lambda_it rho_it, without KL or reference;  lambda_it = f_it b_it:
f_it = w (A_i > 0) or 0 (A_i < 0) while each of steps 1..t carries a token that responses of both signs have at its
position, else 1; b_it the same with positions counted from the response's own end; w = 2.

delta is a coefficient, no filter: a dropped response counts in M and shares its tokens. The official code filters
always, above 0.7 (`--advantage.filter always --advantage.threshold 0.7`), sums over responses, and divides a response's
loss by a count of conflict tokens that takes one run reversed; `per_conflict` counts right. Its ratio is held at 1, as
it is here in the one update per rollout; its H is of the training forward, here of the sampling policy, the same then.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from polopt.core.part import Part, Stateful, part
from polopt.core.registry import method
from polopt.core.rollout import Rollout
from polopt.core.segments import segment_cumsum, segment_max, segment_min
from polopt.methods.base.grpo import grpo


@part("advantage", "entropy-penalised")
@dataclass(frozen=True)
class EntropyPenalised(Stateful):
    """c_i = delta_i (R_i - mean_g - gamma H_i) [M], H_i the mean ``entropy`` of the trainable steps of i, nats.

    delta_i = [H_i <= threshold]; with ``filter`` "initial" it is 1 for all where the mean of H over the first batch
    (state) exceeds the threshold, with "never" always. A group without spread keeps the entropy term; an invalid return
    gives 0. arXiv:2508.03772; a vocabulary of few tokens wants another threshold than ln 2.
    """

    gamma: float = 0.1
    threshold: float = math.log(2)
    filter: Literal["initial", "always", "never"] = "initial"
    initial: float | None = field(default=None, init=False, compare=False)

    needs = frozenset({"reward", "entropy"})
    unit = "batch"
    state = ("initial",)

    def __call__(self, rollout: Rollout) -> Float[Tensor, " trajectory"]:
        returns, entropy = rollout.trajectory_return, rollout.mean_steps(rollout["entropy"])
        if self.initial is None and bool(rollout.mask.any()):
            self.remember(initial=float(entropy[rollout.active_lengths > 0].double().mean()))
        exempt = self.filter == "never" or (self.filter == "initial" and (self.initial or 0.0) > self.threshold)
        kept = ~returns.isnan() & ((entropy <= self.threshold) | exempt)
        return torch.where(kept, rollout.group_center(returns) - self.gamma * entropy, 0.0)


@part("weight", "conflict-tokens")
@dataclass(frozen=True)
class ConflictTokens(Part):
    """lambda_t = f_t b_t [N]: ``boost``, its square, 0 or 1 by the runs of shared tokens from both ends (see above).

    Positions count the trainable steps; masked steps, and responses with a centred return of 0 or an invalid one, share
    nothing and keep 1. ``per_conflict`` divides by max(1, steps of the response in either run).
    """

    boost: float = 2.0
    per_conflict: bool = False

    needs = frozenset({"reward", "action"})

    def __call__(self, rollout: Rollout) -> Float[Tensor, " step"]:
        sign = rollout.spread(rollout.group_center(rollout.trajectory_return).sign())
        forward, backward = (self._run(rollout, sign, reverse) for reverse in (False, True))
        factor = torch.where(sign > 0, self.boost, 0.0).to(sign)
        weight = torch.where(forward, factor, 1.0) * torch.where(backward, factor, 1.0)
        if self.per_conflict:
            weight = weight / rollout.spread(rollout.sum_steps((forward | backward).to(sign)).clamp_min(1))
        return weight

    def _run(self, rollout: Rollout, sign: Tensor, reverse: bool) -> Bool[Tensor, " step"]:
        trajectory, count, action = rollout.trajectory, rollout.n_trajectories, rollout["action"]
        kept = rollout.mask & (sign != 0)
        ones = torch.ones_like(trajectory, dtype=torch.float32)
        position = segment_cumsum(ones, trajectory, count, mask=kept, reverse=reverse).long()
        key = (rollout.step_group * (position.max() + 1) + position) * (action.max() + 1) + action
        values, token = torch.unique(key, return_inverse=True)
        low, high = (extreme(sign, token, len(values), mask=kept) for extreme in (segment_min, segment_max))
        shared = kept & ((low < 0) & (high > 0))[token]
        return shared & (segment_cumsum((~shared).float(), trajectory, count, mask=kept, reverse=reverse) == 0)


gtpo = method(
    "gtpo",
    grpo,
    seed="058",
    paper="arXiv:2508.03772",
    advantage=EntropyPenalised(),
    weight=ConflictTokens(),
)

"""The clipped importance-weighted surrogate of PPO, per step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from polopt.core.loss import Evaluation, Loss, per_step
from polopt.core.part import Part, part
from polopt.core.rollout import Rollout
from polopt.objectives.ratio import clip_shares, log_ratio


@part("objective", "clipped-surrogate")
@dataclass(frozen=True)
class ClippedSurrogate(Part):
    """l_t = -min(rho_t A_t, clip(rho_t, 1 - low, 1 + high) A_t), rho_t = pi(a_t) / pi_old(a_t).

    dl/dlogp_t = -rho_t A_t, and 0 where A > 0 and rho > 1 + high, or A < 0 and rho < 1 - low. ``cap`` bounds rho before
    the minimum (two-sided clip: TRL's delta). ``dual`` bounds the loss of a step with A < 0 by -dual * A (Ye et al.
    2020, arXiv:1912.09729). A and pi_old are constants. Schulman et al. 2017, arXiv:1707.06347, Eq. 7.
    """

    low: float = 0.2
    high: float = 0.2
    cap: float | None = None
    dual: float | None = None

    needs = frozenset({"logp", "advantage"})
    vanishes_with = "advantage"

    def __call__(self, evaluation: Evaluation, rollout: Rollout) -> Loss:
        advantage = rollout.advantage
        ratio = log_ratio(evaluation, rollout).exp()
        bounded = ratio if self.cap is None else ratio.clamp(max=self.cap)
        gain = bounded * advantage
        # min(rho A, clip(rho) A) is the minimum of rho A and of A times the one bound that can be the smaller.
        above, below = advantage.new_tensor(1 + self.high), advantage.new_tensor(1 - self.low)
        limit = torch.where(advantage > 0, above, below) * advantage
        cut = limit < gain
        gain = torch.where(cut, limit, gain)
        if self.dual is not None:
            gain = torch.where(advantage < 0, torch.maximum(gain, self.dual * advantage), gain)
        return per_step(-gain, **clip_shares(cut, advantage, rollout))

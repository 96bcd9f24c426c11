"""Importance ratios in log space, with the one bound that keeps them finite."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from polopt.core.loss import Evaluation
from polopt.core.rollout import Rollout

MAX_LOG_RATIO = 20.0
"""exp(20) is about 5e8: far outside every trust region, yet finite in float32 when multiplied by an advantage."""


def log_ratio(evaluation: Evaluation, rollout: Rollout) -> Float[Tensor, " step"]:
    """log pi(a_t) - log pi_old(a_t), 0 on masked steps, bounded by +-`MAX_LOG_RATIO`."""
    return rollout.kept(evaluation.logp - rollout.logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def clip_metrics(
    ratio: Float[Tensor, " step"], advantage: Float[Tensor, " step"], low: float, high: float, rollout: Rollout
) -> dict[str, Tensor]:
    """`clip_shares` of a ratio that is `outside`."""
    return clip_shares(outside(ratio, advantage, low, high), advantage, rollout)


def outside(
    ratio: Float[Tensor, " step"], advantage: Float[Tensor, " step"], low: float, high: float
) -> Bool[Tensor, " step"]:
    """Where a ratio has left [1 - low, 1 + high] on the side to which its advantage pushes it."""
    return ((ratio < 1 - low) & (advantage < 0)) | ((ratio > 1 + high) & (advantage > 0))


def clip_by_sign(
    ratio: Float[Tensor, " step"], sign: Float[Tensor, " step"], plus: tuple[float, float], minus: tuple[float, float]
) -> Float[Tensor, " step"]:
    """The ratio within the bounds ``plus`` where ``sign`` >= 0, within ``minus`` where it is negative."""
    return torch.where(sign >= 0, ratio.clamp(*plus), ratio.clamp(*minus))


def clip_shares(cut: Bool[Tensor, " step"], advantage: Float[Tensor, " step"], rollout: Rollout) -> dict[str, Tensor]:
    """Share of trainable steps whose gradient the clip removes (``cut``): with A < 0, with A > 0, either."""
    below = rollout.batch_share(cut & (advantage < 0))
    above = rollout.batch_share(cut & (advantage > 0))
    return {"clip_ratio__low_mean": below, "clip_ratio__high_mean": above, "clip_ratio__region_mean": below + above}

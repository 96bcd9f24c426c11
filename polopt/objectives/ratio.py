"""Importance ratios in log space, with the one bound that keeps them finite."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.core.loss import Evaluation
from polopt.core.rollout import Rollout

MAX_LOG_RATIO = 20.0
"""exp(20) is about 5e8: far outside every trust region, yet finite in float32 when multiplied by an advantage."""


def log_ratio(evaluation: Evaluation, rollout: Rollout) -> Float[Tensor, " step"]:
    """log pi(a_t) - log pi_old(a_t), 0 on masked steps, bounded by +-`MAX_LOG_RATIO`."""
    gap = torch.where(rollout.mask, evaluation.logp - rollout.logp, 0.0)
    return gap.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def clip_metrics(
    ratio: Float[Tensor, " step"], advantage: Float[Tensor, " step"], low: float, high: float, rollout: Rollout
) -> dict[str, Tensor]:
    """Share of trainable steps whose gradient the clip removes: below with A < 0, above with A > 0, either."""
    below = rollout.batch_mean(((ratio < 1 - low) & (advantage < 0)).float())
    above = rollout.batch_mean(((ratio > 1 + high) & (advantage > 0)).float())
    return {"clip_ratio__low_mean": below, "clip_ratio__high_mean": above, "clip_ratio__region_mean": below + above}

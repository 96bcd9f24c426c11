"""SPO: segment policy optimisation, credit per segment of an answer (Guo et al. 2025, arXiv:2505.23564).

Chain: cuts before every m-th unsure step (p_t < 0.9); V(cut) = mean reward of K fresh continuations, V(end) = R.
Tree: segments of at most M steps that branch; V(leaf) = r, V(node) = mean of its children's values.
A_t = V(end of its segment) - V(start), 0 before the first cut; A <- (A - mean) / sqrt(var + 1e-8) where M_t = 1;
L = -(1 / sum_t M_t) sum_t M_t min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t), M_t = [p_t < 0.9], p_t the sampler's.

`--rollout tree` grows 6-6-6 trees, the paper's choice for long answers. Of the authors' code (AIFrameResearch/SPO): K,
m, M, 8 minibatches twice (trees: once), edges with A = 0 left out, log-ratio at most 10 (`cap`). Not its whitening per
minibatch, 8 iterations for the edges of a tree, and KL of 1e-4 to the initial policy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.aggregations import TokenMean
from polopt.core.method import Schedule
from polopt.core.part import Part, part
from polopt.core.registry import method
from polopt.core.rollout import Rollout, Source
from polopt.methods.base.grpo import grpo
from polopt.objectives.clipped_surrogate import ClippedSurrogate
from polopt.rewards.segment_values import SegmentValues
from polopt.rollouts.chain import Chain


@part("filter", "unsure-steps")
@dataclass(frozen=True)
class UnsureSteps(Part):
    """Drops probes, and masks what was no decision: steps with p_t >= ``threshold``; edges of a tree with A = 0."""

    threshold: float = 0.9

    needs = frozenset({"logp", "source", "value/start", "value/end"})

    def __call__(self, rollout: Rollout) -> Rollout:
        moved = rollout["value/end"] != rollout["value/start"] if "edge" in rollout else rollout.mask
        mask = rollout.mask & moved & (rollout.logp < math.log(self.threshold))
        return rollout.with_columns(step={"mask": mask}).select(rollout["source"] != Source.PROBE)


@part("advantage", "segment-difference")
@dataclass(frozen=True)
class SegmentDifference(Part):
    """A_t = V(end) - V(start) of its segment, [N]; ``normalize`` divides by the spread of the siblings' values + 1e-8.
    ``whiten`` is over the trainable steps of the batch. Steps without a value at either end and invalid answers get 0.
    """

    normalize: bool = False
    whiten: bool = True

    needs = frozenset({"reward", "value/start", "value/end", "value/spread"})
    unit = "batch"

    def __call__(self, rollout: Rollout) -> Float[Tensor, " step"]:
        scale = rollout["value/spread"] + 1e-8 if self.normalize else 1.0
        change = (rollout["value/end"] - rollout["value/start"]) / scale
        change = torch.where(rollout.spread(rollout.reward.isnan()), torch.nan, change)
        return rollout.whiten(change) if self.whiten else change.nan_to_num(0.0)


spo_segment = method(
    "spo-segment",
    grpo,
    seed="131",
    paper="arXiv:2505.23564",
    rollout=Chain(),
    reward=SegmentValues(),
    filter=UnsureSteps(),
    advantage=SegmentDifference(),
    objective=ClippedSurrogate(cap=math.exp(10.0)),
    aggregation=TokenMean(),
    schedule=Schedule(epochs=2, minibatches=8),
)

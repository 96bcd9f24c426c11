"""ADORA: one weight per prompt, by whether long answers pay off there (Ren et al. 2026, arXiv:2602.10019).

Of a prompt's G responses those with score > theta succeed, those with score <= theta that were not cut fail.
L+ = max |y_i| over successes (-inf without one), L- = mean |y_i| over failures; LA = [L+ > L-], DA = [#successes / G <=
tau]. A_i = w (r_i - mean_g) / (std_g + eps), w constant in the group, by one of three rules:

- attenuate (the authors' code for language models, the default): w = 1 if LA else lambda;
- attenuate-vlm (their code for vision): w = 1 if LA or there is no success, else lambda; L- = inf without a failure;
- amplify (the paper, strong language models): w = w+ if LA and DA else 1.

Otherwise L- = -inf without a failure. The code fixes the first two rules; whether the third needs both criteria or
one, no available source says (`--weight.criteria or` takes one). The code's theta 1.01 belongs to its reward scale. w
weighs the loss terms, after every normalisation: it scales the clipped surrogate as a factor of A would. A group of one
gives 0 (the code: w r).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from polopt.advantages.group import GroupZScore
from polopt.core.part import Part, part
from polopt.core.registry import method
from polopt.core.rollout import Rollout
from polopt.core.segments import segment_count, segment_max, segment_mean
from polopt.methods.base.grpo import grpo


@part("weight", "length-advantage")
@dataclass(frozen=True)
class LengthAdvantage(Part):
    """w [M] of each trajectory's prompt, by ``rule``; ``attenuation`` is lambda, ``amplification`` w+, ``share`` tau.

    Success is judged on ``column`` with ``threshold`` (theta); an invalid score is neither success nor failure. Lengths
    are trainable steps. No failure is cut by the limit or, with ``cutoff`` (L_cut), as long as that. Eq. 4-6.
    """

    rule: Literal["attenuate", "attenuate-vlm", "amplify"] = "attenuate"
    attenuation: float = 0.1
    amplification: float = 2.0
    share: float = 0.5
    criteria: Literal["and", "or"] = "and"
    threshold: float = 0.5
    cutoff: int | None = None
    column: str = "score"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.column}) if self.cutoff is not None else frozenset({self.column, "truncated"})

    def __call__(self, rollout: Rollout) -> Float[Tensor, " trajectory"]:
        score, length, group, size = rollout[self.column], rollout.active_lengths, rollout.group, rollout.n_groups
        whole = ~rollout["truncated"].bool() if self.cutoff is None else length < self.cutoff
        success, failure = score > self.threshold, (score <= self.threshold) & whole
        unfailed = math.inf if self.rule == "attenuate-vlm" else -math.inf
        typical = segment_mean(length, group, size, mask=failure, empty=unfailed)
        longer = segment_max(length, group, size, mask=success) > typical
        successes = segment_count(group, size, mask=success)
        weight = score.new_ones(size)
        if self.rule == "attenuate":
            return weight.masked_fill(~longer, self.attenuation)[group]
        if self.rule == "attenuate-vlm":
            return weight.masked_fill(~longer & (successes > 0), self.attenuation)[group]
        hard = successes <= self.share * rollout.group_count(score)
        return weight.masked_fill(longer & hard if self.criteria == "and" else longer | hard, self.amplification)[group]


adora = method(
    "adora",
    grpo,
    seed="018",
    paper="arXiv:2602.10019",
    advantage=GroupZScore(eps=1e-6),
    weight=LengthAdvantage(),
)

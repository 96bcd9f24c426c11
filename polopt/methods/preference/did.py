"""Differential information: which rejected answers make DPO's reward right (Won et al. 2025, arXiv:2505.23761).

q_{pi/rho}(y) ~ pi(y) / rho(y), normalised over answers, is the law of what turns rho into pi: pi ~ rho q. With chosen
answers from pi_ref and rejected ones from pi_l, the first of a pair is the chosen one with probability
p = sigma(log q_{ref/l}(y_w) - log q_{ref/l}(y_l)). DPO then learns pi* iff q_{ref/l} ~ (q_{*/ref})^beta, that is iff
pi_l ~ pi_ref (pi_ref / pi*)^beta; and the mean log-likelihood of the chosen answers must fall, by KL(pi_ref || pi*).
These laws, the entropy of q and the fit of beta are in `polopt.policies.differential_information`.

The loss stays DPO's. The recipe makes the pairs for the target of a reward, pi* ~ pi_ref exp(r / beta), so that
pi_l ~ pi_ref exp(-r) whatever beta: answers are drawn from the reference, any of a group is the chosen one, and the
rejected one is another, resampled in proportion to exp(-r).

Settled: the closed form of pi_l and the displacement follow from the power law; the resampling and the estimate of the
entropy are ours; the projected-gradient variant of the paper's study, whose projection is not settled, is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from polopt.core.errors import UsageError
from polopt.core.part import Stateful, part
from polopt.core.registry import method
from polopt.core.rollout import Rollout
from polopt.core.segments import segment_count, segment_is_first, segment_max
from polopt.filters.preferences import with_labels
from polopt.methods.preference.dpo import dpo
from polopt.rollouts.groups import Groups


@part("filter", "did-pairs")
@dataclass(frozen=True)
class InformativePairs(Stateful):
    """Of each group one member drawn alike, label 1, and another drawn in proportion to exp(-scale v), label 0.

    v is a column [M]; members with an invalid (NaN) value take no part, groups with fewer than two others go. On
    answers of pi_ref DPO with beta learns pi_ref exp(scale v / beta), up to what resampling a finite group misses.
    State: how many batches were drawn, which with ``seed`` decides the draws.
    """

    column: str = "score"
    scale: float = 1.0
    seed: int = 0
    batches: int = field(default=0, init=False, compare=False)

    gives = frozenset({"label", "mask/chosen"})
    state = ("batches",)

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise UsageError(f"did-pairs: scale must be a finite number, got {self.scale}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.column})

    def __call__(self, rollout: Rollout) -> Rollout:
        values, group, count = rollout[self.column].double(), rollout.group, rollout.n_groups
        generator = torch.Generator().manual_seed(hash((self.seed, self.batches)) % 2**62)
        # The largest of log-weights with Gumbel noise is a draw in proportion to the weights.
        noise = -(-torch.rand(2, len(group), generator=generator, dtype=torch.float64).log()).log().to(values.device)
        self.remember(batches=self.batches + 1)
        valid = ~values.isnan()
        valid = valid & (segment_count(group, count, mask=valid) >= 2)[group]
        chosen = _largest(noise[0], rollout, valid)
        rejected = _largest(noise[1] - self.scale * values.nan_to_num(), rollout, valid & ~chosen)
        kept = (chosen | rejected).nonzero().flatten()
        return with_labels(rollout.select(kept), chosen[kept].float())


def _largest(
    keys: Float[Tensor, " trajectory"], rollout: Rollout, mask: Bool[Tensor, " trajectory"]
) -> Bool[Tensor, " trajectory"]:
    top = segment_max(keys, rollout.group, rollout.n_groups, mask=mask)[rollout.group]
    return segment_is_first(rollout.group, rollout.n_groups, mask=mask & (keys == top))


did = method(
    "did",
    dpo,
    seed="033",
    paper="arXiv:2505.23761",
    rollout=Groups(mixture_of="ref", mixture_weight=1.0),
    filter=InformativePairs(),
)

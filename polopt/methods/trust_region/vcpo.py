"""VCPO: variance-controlled policy optimisation from stale data (Huang et al. 2026, arXiv:2602.17616).

w_i = exp(sum_t log pi(y_it) - log mu(y_it)), mu the policy that sampled;  k_i = w_i^2 |grad sum_t log pi(y_it)|^2;
A_i = (R_i - b_g) / sigma_g,  b_g = sum_i k_i R_i / sum_i k_i over the group;
L = -(1/M) sum_i min(w_i, c) A_i (1/|y_i|) sum_t log pi(y_it);
eta_eff = eta sqrt(min(1, ESS / ESS_on)),  ESS = (sum_i w_i)^2 / (M sum_i w_i^2) over the batch of the update.

b_g minimises the second moment of w_i (R_i - b) grad log pi(y_i); taken from the gradient's own samples it biases it.
The code's norm has min(w_i, c) inside, so that its k_i is this one times min(w_i, c)^2 (`--advantage.twice true`).
Norms come from the logits by default, as OBLR-PO's do, for one forward pass; `--advantage.norms exact` is the paper's,
for a backward pass per response (the code uses those of the update). One update per batch, as in the code: else w is
that of the first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.aggregations import SequenceMean
from polopt.core.part import part
from polopt.core.registry import method
from polopt.core.rollout import Rollout
from polopt.core.segments import segment_max
from polopt.methods.base.grpo import grpo
from polopt.methods.base.reinforce import PolicyGradient
from polopt.methods.credit.oblr_po import ScoreWeighted
from polopt.updates.effective_sample_size import EffectiveSampleSize
from polopt.weights.truncated_sequence import TruncatedSequence, log_weight


@part("advantage", "off-policy-baseline")
@dataclass(frozen=True)
class OffPolicyBaseline(ScoreWeighted):
    """`ScoreWeighted` with the weights k_j (``twice``: times min(w_j, 8)^2), over sigma: the group's population
    standard deviation, 1 where that is below 1e-8.
    """

    others: bool = False
    twice: bool = False

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"logp", "logp/start"}

    def weights(self, rollout: Rollout) -> Float[Tensor, " trajectory"]:
        log = log_weight(rollout)
        if self.twice:
            log = log + log.clamp(max=math.log(TruncatedSequence.cap))
        # Without its maximum, w can be squared; norms are those of the policy of the update.
        largest = segment_max(log, rollout.group, rollout.n_groups, mask=~rollout.trajectory_return.isnan())
        here = rollout.with_columns(step={"logp": rollout["logp/start"]})
        return (2 * (log - largest[rollout.group])).exp() * super().weights(here)

    def __call__(self, rollout: Rollout) -> Float[Tensor, " trajectory"]:
        sigma = rollout.group_std(rollout.trajectory_return, unbiased=False)[rollout.group]
        return super().__call__(rollout) / torch.where(sigma > 1e-8, sigma, 1.0)


vcpo = method(
    "vcpo",
    grpo,
    seed="072",
    paper="arXiv:2602.17616",
    advantage=OffPolicyBaseline(),
    weight=TruncatedSequence(),
    objective=PolicyGradient(),
    aggregation=SequenceMean(),
    update=EffectiveSampleSize(),
)

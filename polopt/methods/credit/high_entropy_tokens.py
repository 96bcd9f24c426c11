"""High-entropy tokens: only the forks of a response train (Wang et al. 2025, arXiv:2506.01939).

M_t = [H_t >= tau], tau the (1 - rho) quantile of the entropies of the batch, rho = 0.2;
L = -(1/N) sum_i sum_t M_it min(rho_it A_i, clip(rho_it, 1 - low, 1 + high) A_i), the rest as in DAPO.
N counts every trainable step, kept or not, as in the paper and in TRL: a kept step has the gradient that it has in full
training. A KL term, where one is added, is not masked (TRL's order).

The paper and TRL take H from the training forward, so that the mask moves between the updates of one rollout. Here H is
the sampling policy's, which is the same number at the first update and costs no pass; the mask then holds for all
updates of the rollout. The quantile is over the whole rollout (the paper: a batch or micro-batch).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.core.errors import UsageError
from polopt.core.part import Part, part
from polopt.core.registry import method
from polopt.core.rollout import Rollout
from polopt.core.segments import segment_quantile
from polopt.methods.base.dapo import dapo


@part("weight", "high-entropy")
@dataclass(frozen=True)
class HighEntropy(Part):
    """w_t = [H_t >= tau] [N], 0 or 1; H_t is ``entropy`` (nats), tau its (1 - fraction) quantile over the batch.

    The quantile interpolates linearly between order statistics and comes from a sort, so that a batch of any size has
    one; ties with tau are kept. Masked steps take no part. ``lowest`` keeps the other steps, H_t < tau, instead: the
    paper's control. arXiv:2506.01939, section 5. Raises UsageError for a fraction outside (0, 1].
    """

    fraction: float = 0.2
    lowest: bool = False

    needs = frozenset({"entropy"})
    unit = "batch"

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise UsageError(f"high-entropy keeps a fraction of the steps in (0, 1], got {self.fraction}")

    def __call__(self, rollout: Rollout) -> Float[Tensor, " step"]:
        entropy, mask = rollout["entropy"], rollout.mask
        everything = torch.zeros_like(rollout.trajectory)
        threshold = segment_quantile(entropy, everything, 1, 1 - self.fraction, mask=mask)
        return ((entropy < threshold if self.lowest else entropy >= threshold) & mask).to(entropy.dtype)


high_entropy_tokens = method(
    "high-entropy-tokens",
    dapo,
    seed="165",
    paper="arXiv:2506.01939",
    weight=HighEntropy(),
)

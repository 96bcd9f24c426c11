"""LiPO: listwise preference optimisation, learning to rank (Liu et al. 2024, arXiv:2402.01878).

A list of K answers y_i to one prompt has labels psi_i (a ranking model's mean chance to beat the others, in [0, 1]).
The scores s_i = beta sum_t (log pi - log pi_ref) take any loss of learning to rank; L is the mean over lists.
LiPO-lambda: sum over psi_i > psi_j of Delta_ij log(1 + exp(-(s_i - s_j))),
Delta_ij = |G_i - G_j| |1 / D(tau_i) - 1 / D(tau_j)|, G = 2^psi - 1, D(k) = log(1 + k), tau_i the rank of s_i (best 1):
by how much swapping the two would change the list's DCG. No gradient flows through the ranks.

Settled: the sum over pairs is not divided by their number, and the logarithm is natural (the paper writes log;
LambdaLoss, Wang et al. 2018, sums). The losses that it is compared with are `--objective list-pairwise`, list-mle,
list-softmax and list-pointwise (`polopt.objectives.ranking`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.core.part import part
from polopt.core.registry import method
from polopt.core.segments import segment_rank
from polopt.methods.preference.dpo import dpo
from polopt.objectives.preference import Pairs, answered
from polopt.objectives.ranking import ListPairwise
from polopt.rollouts.dataset import Dataset


@part("objective", "list-lambda")
@dataclass(frozen=True)
class ListLambda(ListPairwise):
    """`ListPairwise` with Delta_ij for weights; of equal scores the first ranks first. arXiv:2402.01878."""

    def weight(self, score: Float[Tensor, " trajectory"], pairs: Pairs) -> Float[Tensor, " pair"]:
        rollout = pairs.rollout
        rank = segment_rank(-score, rollout.group, rollout.n_groups, mask=answered(rollout), method="ordinal")
        discount = 1 / (1 + rank.to(score).clamp_min(1)).log()
        gain = torch.exp2(rollout["label"].to(score)) - 1
        i, j = pairs.winner, pairs.loser
        return (gain[i] - gain[j]).abs() * (discount[i] - discount[j]).abs()


lipo = method(
    "lipo",
    dpo,
    seed="215",
    paper="arXiv:2402.01878",
    rollout=Dataset(form="lists"),
    objective=ListLambda(),
)

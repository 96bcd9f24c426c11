"""On-policy and negative gradients: which of the two helps, a study (Tajwar et al. 2024, arXiv:2404.14367).

N answers y_i of a prompt with rewards r_i, l_i = log pi(y_i), the sum over the steps; means over prompts of
best-of-N: -l_b, b = argmax r;  explicit negative: -l_b + negative l_w, w = argmin r (this recipe, negative 0.5);
RWR: -(1/N) sum_i exp(r_i / beta) l_i (`--advantage reward-weighted --objective policy-gradient --filter none
--aggregation sequence-sum`);  REINFORCE: -(1/N) sum_i (r_i - mean r) l_i;  DPO and IPO: the mean over all pairs of
different rewards (`--rollout groups --filter ranked` of these methods).
Two switches: answers of pi or of pi_ref (`--rollout.mixture-of ref --rollout.mixture-weight 1`), and a loss that pushes
answers down or none. Both help where the best answers are unlikely under pi_ref.
RWR on answers of pi_ref has the expected gradient Z (p - q) in the logits, that of the forward KL to
q ~ pi_ref exp(r / beta) times Z; REINFORCE on answers of pi with the penalty beta KL(pi || pi_ref) that of
beta times the reverse KL to q: the one covers modes, the other seeks them.

Prompts whose answers are all worth the same are left out: on-policy their expected gradient is 0. The authors' code
leaves negative to its user; 0.5 is this recipe's. Its comparison: `polopt study suboptimal-on-policy`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.core.errors import UsageError
from polopt.core.part import Part, part
from polopt.core.registry import method
from polopt.core.rollout import Rollout
from polopt.filters.preferences import Ranked
from polopt.methods.preference.dpo import dpo
from polopt.objectives.best_of_n import BestOfN
from polopt.rollouts.groups import Groups


@part("advantage", "reward-weighted")
@dataclass(frozen=True)
class RewardWeighted(Part):
    """A_i = exp(R_i / beta), [M], never negative; 0 for an invalid (NaN) return.

    Reward-weighted regression (Peters and Schaal 2007); with r less a baseline it is AWR's (Peng et al. 2019,
    arXiv:1910.00177, Eq. 9). Raises UsageError for a beta that is not above 0.
    """

    beta: float = 0.05

    needs = frozenset({"reward"})

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise UsageError(f"reward-weighted: beta must be above 0, got {self.beta}")

    def __call__(self, rollout: Rollout) -> Float[Tensor, " trajectory"]:
        returns = rollout.trajectory_return
        return torch.where(returns.isnan(), 0.0, (returns / self.beta).exp())


suboptimal_on_policy = method(
    "suboptimal-on-policy",
    dpo,
    seed="192",
    paper="arXiv:2404.14367",
    rollout=Groups(),
    filter=Ranked(),
    objective=BestOfN(negative=0.5),
    models={},
)

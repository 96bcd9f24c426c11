"""rDPO: provably robust DPO, for labels wrong at a known rate (Chowdhury et al. 2024, arXiv:2403.00409).

Each label is reversed independently with probability eps < 1/2. With DPO's gap h = s_w - s_l in the order of the labels
and l(h) = -log sigma(beta h),
L = mean over pairs of [(1 - eps) l(h) - eps l(-h)] / (1 - 2 eps):
over the reversals its expectation is DPO's loss of the true labels, and so it is for the gradient,
dL/dh = -beta [sigma(-beta h) + eps / (1 - 2 eps)] for a pair. Where p is the true preference, DPO itself settles at
sigma(beta h) = (1 - 2 eps) p + eps; its label smoothing (`dpo --objective.label_smoothing eps`, conservative DPO) has
eps with the other sign in the gradient and settles further off.

The loss falls without bound, with slope -beta eps / (1 - 2 eps) at large h: negative values are normal, few epochs are
enough. eps belongs to the data (how often annotators, or a judge and its swapped self, disagree) and is no regulariser:
too large a value makes the policy too sure of itself. The paper takes it from the noise or selects it on held-out
pairs; the default of 0.1 is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from polopt.core.errors import UsageError
from polopt.core.part import part
from polopt.core.registry import method
from polopt.methods.preference.dpo import dpo
from polopt.objectives.preference import DivergenceLoss, Sides, smoothed


@part("objective", "rdpo")
@dataclass(frozen=True)
class RobustDPO(DivergenceLoss):
    """l_wl = [-(1 - eps) log sigma(beta h) + eps log sigma(-beta h)] / (1 - 2 eps), h = g(s_w) - g(s_l), g = s for the
    reverse KL.

    eps is ``flip``, the probability that a label is reversed, in [0, 1/2); 0 is DPO. arXiv:2403.00409, section 3.
    """

    flip: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.flip < 0.5:
            raise UsageError(f"rdpo: flip is the probability of a wrong label, in [0, 1/2), got {self.flip}")

    def terms(self, score: Sides) -> Float[Tensor, " pair"]:
        # Label smoothing the other way: 1 + e and -e for 1 - eps and eps.
        return smoothed(self.beta * score.gap, -self.flip / (1 - 2 * self.flip))


rdpo = method("rdpo", dpo, seed="085", paper="arXiv:2403.00409", objective=RobustDPO())

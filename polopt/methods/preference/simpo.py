"""SimPO: simple preference optimisation with a reference-free reward (Meng et al. 2024, arXiv:2405.14734).

The reward of an answer is its mean log-prob, which is what ranks what the policy writes; winners must lead by gamma:
L = mean over pairs of -log sigma(beta (m_w - m_l) - gamma),  m_i = (1 / |y_i|) sum_t log pi(a_t).
beta = 2 and gamma = 0.5 as in the authors' code, which names gamma / beta = 0.25; they sweep beta 2 .. 10 and
gamma / beta 0.1 .. 0.8.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from polopt.core.part import part
from polopt.core.registry import method
from polopt.methods.preference.dpo import dpo
from polopt.objectives.preference import Sides, WithoutReference, check_smoothing, smoothed


@part("objective", "simpo")
@dataclass(frozen=True)
class SimPO(WithoutReference):
    """l = -(1 - eps) log sigma(z) - eps log sigma(-z), z = beta (m_w - m_l) - gamma, m mean log-probs per step.

    eps is ``label_smoothing``. With a ``shape`` a that is not 0 the score is (1 - exp(-a m)) / a in the place of m:
    AlphaPO (Gupta et al. 2025, arXiv:2501.03884). arXiv:2405.14734, Eq. 6.
    """

    beta: float = 2.0
    gamma: float = 0.5
    label_smoothing: float = 0.0
    shape: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_smoothing(self.name, self.label_smoothing)

    def score(
        self, ratio: Float[Tensor, " trajectory"], length: Float[Tensor, " trajectory"]
    ) -> Float[Tensor, " trajectory"]:
        mean = ratio / length
        return -(-self.shape * mean).expm1() / self.shape if self.shape else mean

    def terms(self, score: Sides) -> Float[Tensor, " pair"]:
        return smoothed(self.beta * score.gap - self.gamma, self.label_smoothing)


simpo = method("simpo", dpo, seed="base", paper="arXiv:2405.14734", objective=SimPO(), models={})

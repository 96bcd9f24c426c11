"""NLPO: PPO within a learned action mask, for text generation (Ramamurthy et al. 2022, arXiv:2210.01241).

A mask policy psi, the weights of every mu-th iteration, says what may be chosen: ranked by psi, the actions before
which the others hold at most p, at least ``nucleus_min`` of them, and special tokens (mask m, kept with each step).
pi^m(a) = m_a pi(a) / sum_b m_b pi(b) is sampled, and is what PPO's ratio is of: rho = pi^m / pi^m_old under the same m,
L = -mean min(rho A, clip(rho, 1 - eps, 1 + eps) A) + c_v (V - Ret)^2. The reward of a step is the task's less
coef (log pi - log pi_ref), both without mask; coef <- coef (1 + 0.1 clip((KL - target) / target, -0.2, 0.2)).

Settings are those of the official code (allenai/RL4LMs) for IMDB: p 0.9, mu 5, gamma 0.99, c_v 0.5, coef and target
0.1. Its mask has at least 100 of 50,257 tokens; here it is 1, vocabularies being smaller too. psi is refreshed after
the updates of an iteration, as in the paper's algorithm; the code copies the policy just before them, one iteration
older. Advantages are whitened over the iteration, not over mini-batches of 64 steps, and an epoch is one update. KL is
the k3 estimate. Language models sample with a mask through `generate`: the native decoder runs one model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from polopt.controllers import AdaptiveKL
from polopt.core.loss import Evaluation, Loss
from polopt.core.method import Schedule
from polopt.core.part import part
from polopt.core.registry import method
from polopt.core.rollout import Rollout
from polopt.methods.base.ppo import GAE, ClippedValueLoss, ppo
from polopt.models import Snapshot
from polopt.objectives.clipped_surrogate import ClippedSurrogate
from polopt.rewards.shaping import KLPenalty
from polopt.rollouts.groups import Groups


@part("objective", "masked-surrogate")
@dataclass(frozen=True)
class MaskedSurrogate(ClippedSurrogate):
    """The clipped surrogate of pi^m: rho_t = pi^m(a_t) / pi^m_old(a_t), m being what could be drawn at step t.

    The gradient in the logits of what could not be drawn is 0.
    """

    needs = frozenset({"masked_logp", "advantage"})
    evaluates = frozenset({"masked_logp"})

    def __call__(self, evaluation: Evaluation, rollout: Rollout) -> Loss:
        masked = Evaluation({**evaluation.columns, "logp": evaluation["masked_logp"]})
        return super().__call__(masked, rollout.with_columns(step={"logp": rollout["masked_logp"]}))


@part("controller", "proportional-kl")
@dataclass(frozen=True)
class ProportionalKL(AdaptiveKL):
    """beta <- beta * (1 + rate * clip(KL / target - 1, -0.2, 0.2)) after each iteration, whatever its size."""

    target: float = 0.1
    initial: float = 0.1
    rate: float = 0.1

    def __call__(self, statistics: Mapping[str, float]) -> dict[str, float]:
        return super().__call__({**statistics, "trajectories": self.rate * self.horizon})


nlpo = method(
    "nlpo",
    ppo,
    seed="161",
    paper="arXiv:2210.01241",
    rollout=Groups(nucleus_of="mask"),
    reward=KLPenalty(beta=0.1),
    advantage=GAE(gamma=0.99),
    objective=MaskedSurrogate() + ClippedValueLoss(coefficient=1.0, width=None),
    controller=ProportionalKL(),
    models={"ref": Snapshot(), "mask": Snapshot(every=5)},
    schedule=Schedule(epochs=5),
)

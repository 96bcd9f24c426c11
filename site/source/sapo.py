"""SAPO: soft adaptive policy optimisation (Gao et al. 2025, arXiv:2511.20347).

f(rho) = (4/tau) sigmoid(tau (rho - 1)), tau = tau_pos where A > 0, else tau_neg;
L = -(1/M) sum_i (1/|y_i|) sum_t f(rho_t) A_i, A_i the group z-score.
The gate 4p(1 - p), p = sigmoid(tau (rho - 1)), fades a step's gradient as its ratio leaves 1; nothing is masked. The
loss value contains the constant 2/tau * A and is not a reward. Four minibatches per rollout as in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from polopt.core.loss import Evaluation, Loss, per_step
from polopt.core.method import Schedule
from polopt.core.part import Part, part
from polopt.core.registry import method
from polopt.core.rollout import Rollout
from polopt.methods.base.grpo import grpo
from polopt.objectives.ratio import log_ratio


@part("objective", "sigmoid-gate")
@dataclass(frozen=True)
class SigmoidGate(Part):
    """l_t = -(4/tau) sigmoid(tau (rho_t - 1)) A_t; dl/dlogp_t = -4 p (1 - p) rho_t A_t. arXiv:2511.20347."""

    tau_pos: float = 1.0
    tau_neg: float = 1.05

    needs = frozenset({"logp", "advantage"})
    vanishes_with = "advantage"

    def __call__(self, evaluation: Evaluation, rollout: Rollout) -> Loss:
        advantage = rollout.advantage
        ratio = log_ratio(evaluation, rollout).exp()
        tau = torch.full_like(advantage, self.tau_neg).masked_fill(advantage > 0, self.tau_pos)
        p = torch.sigmoid(tau * (ratio - 1))
        gate = (4 * p * (1 - p)).detach()
        return per_step(-4 / tau * p * advantage, gate__mean=rollout.batch_mean(gate))


sapo = method(
    "sapo",
    grpo,
    seed="base",
    paper="arXiv:2511.20347",
    objective=SigmoidGate(),
    schedule=Schedule(minibatches=4),
)

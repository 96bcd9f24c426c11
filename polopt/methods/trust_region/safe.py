"""SAFE: soft-min of two values, entropy-gated KL above a moving threshold (Maity 2026, arXiv:2602.04651).

V = -a log[(exp(-V_1 / a) + exp(-V_2 / a)) / 2] of a response, a = 0.3: between the smaller value and the mean;
A_i = whiten(r_i - V_i) over the batch, r the reward by its running mean and deviation;
L = clipped surrogate (token mean) + 0.5 L_V + penalty - 0.01 H;
L_V = (1/M) sum_i [Huber(V_i - r_i) + Huber(V_old,i + clip(V_i - V_old,i, +-0.2) - r_i)] / 2, delta = 0.5: no maximum;
penalty = 0.1 max(k - tau, 0)^2 max(0.5, 2 / (H + 0.1)), k <- 0.9 k + 0.1 mean_t(log pi_t - log pi_ref,t), signed;
tau follows the reward's velocity: `polopt.controllers.KLThreshold`.

The code's penalty is a number; here it is differentiated through the present KL (`--regularizer.differentiable false`
is the code). The code never uses its target critic (left out) and its scaling of the step by min(1, 0.5 / its KL)
(`--update kl-scaled`). It reads the state after the last token, by two perceptrons; here two linear heads see the state
before it. It moves tau and k in each of its 2 epochs; here they move as often, but after the iteration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import huber_loss

from polopt.advantages.running import START, standardised, with_batch
from polopt.controllers import KLThreshold
from polopt.core.loss import Evaluation, Loss, per_trajectory
from polopt.core.method import Schedule
from polopt.core.part import Part, Stateful, part
from polopt.core.registry import method
from polopt.core.rollout import Rollout
from polopt.methods.base.ppo import ppo
from polopt.objectives.clipped_surrogate import ClippedSurrogate
from polopt.policies.values import soft_minimum
from polopt.regularizers.entropy import Entropy
from polopt.regularizers.gated_kl import EntropyGatedKL

HEADS = frozenset({"value/1", "value/2"})


def response_value(columns: Any, rollout: Rollout, softness: float) -> Float[Tensor, " trajectory"]:
    """V of the last trainable step of each trajectory, 0 without one; ``columns`` have the two heads [N]."""
    heads = torch.stack([columns[name] for name in sorted(HEADS)])
    return rollout.at_last_step(soft_minimum(heads, softness))


@part("advantage", "response-value")
@dataclass(frozen=True)
class ResponseValue(Stateful):
    """A_i and ``return`` r_i (see the file), the same on every step; an invalid reward gives 0 and NaN.

    The running moments (`polopt.advantages.running`), which are state, take in the batch first.
    """

    softness: float = 0.3
    moments: Mapping[str, float] = field(default_factory=lambda: dict(START), init=False, compare=False)

    needs = frozenset({"reward"}) | HEADS
    gives = frozenset({"return"})
    unit = "batch"
    state = ("moments",)

    def __call__(self, rollout: Rollout) -> dict[str, Tensor]:
        reward = torch.where(rollout.active_lengths > 0, rollout.trajectory_return, torch.nan)
        self.remember(moments=with_batch(self.moments, reward))
        target = standardised(self.moments, reward)
        value = response_value(rollout, rollout, self.softness)
        return {"advantage": rollout.whiten(target - value), "return": target}


@part("objective", "response-value-huber")
@dataclass(frozen=True)
class ResponseValueLoss(Part):
    """l_i = coefficient L_V,i (see the file), 0 where the return is NaN; the return and V_old are constants."""

    coefficient: float = 0.5
    width: float = 0.2
    delta: float = 0.5
    softness: float = 0.3

    needs = frozenset({"return"}) | HEADS
    evaluates = HEADS
    unit = "trajectory"

    def __call__(self, evaluation: Evaluation, rollout: Rollout) -> Loss:
        value, old = (response_value(columns, rollout, self.softness) for columns in (evaluation, rollout))
        target = rollout.mean_steps(rollout["return"])
        valid = ~target.isnan() & (rollout.active_lengths > 0)
        target = torch.where(valid, target, 0.0).to(value)
        near = old + (value - old).clamp(-self.width, self.width)
        error = sum(huber_loss(v, target, reduction="none", delta=self.delta) for v in (value, near))
        return per_trajectory(torch.where(valid, self.coefficient * 0.5 * error, 0.0))


safe = method(
    "safe",
    ppo,
    seed="070",
    paper="arXiv:2602.04651",
    reward=None,
    advantage=ResponseValue(),
    objective=ClippedSurrogate() + ResponseValueLoss(),
    regularizer=EntropyGatedKL() + Entropy(0.01),
    controller=KLThreshold(calls=2, kl_statistic="penalty/kl"),
    schedule=Schedule(epochs=2),
)

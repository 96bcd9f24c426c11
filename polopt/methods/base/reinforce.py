"""REINFORCE: score-function policy gradient with a baseline (Williams 1992, Machine Learning 8:229-256).

R_i = r_i - beta * sum_t (log pi_old,t - log pi_ref,t);  A_i = R_i - b_i;
L = -(1/M) sum_i A_i sum_t log pi_it, the sum over steps being what makes it the gradient of the expected return
(`--aggregation token-mean` divides by the steps instead). On language models: Ahmadian et al. 2024, arXiv:2402.14740.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.aggregations import SequenceSum
from polopt.core.loss import Evaluation, Loss, per_step
from polopt.core.part import Part, Stateful, part
from polopt.core.registry import method
from polopt.core.rollout import Rollout
from polopt.curricula.uniform import Uniform
from polopt.models import Snapshot
from polopt.rewards.shaping import KLPenalty
from polopt.rollouts.groups import Groups
from polopt.updates.gradient_step import GradientStep


@part("advantage", "batch-baseline")
@dataclass(frozen=True)
class BatchBaseline(Stateful):
    """A_i = R_i - b, [M], with one of the baselines

    - ``none``: b = 0;
    - ``mean``: b = (1/M) sum_j R_j over the valid returns of the batch (i included);
    - ``leave-one-out``: b_i = mean of the other returns of the batch, A = M/(M-1) * (R_i - mean);
    - ``moving-average``: the value before this batch of b <- decay * b + (1 - decay) * mean(R), starting at ``start``;
    - ``running-mean``: the mean of all earlier batches' means (the variant of arXiv:2402.14740).

    Invalid (NaN) returns give 0 and enter no baseline. State: the average and the number of batches in it.
    """

    baseline: Literal["none", "mean", "leave-one-out", "moving-average", "running-mean"] = "mean"
    decay: float = 0.9
    start: float = 0.0
    average: float | None = field(default=None, init=False, compare=False)
    batches: int = field(default=0, init=False, compare=False)

    needs = frozenset({"reward"})
    unit = "batch"
    state = ("average", "batches")

    def __call__(self, rollout: Rollout) -> Float[Tensor, " trajectory"]:
        returns = rollout.trajectory_return
        valid = ~returns.isnan()
        count = int(valid.sum())
        mean = float(returns[valid].double().mean()) if count else 0.0
        before = self.start if self.average is None else self.average
        scale = 1.0
        match self.baseline:
            case "none":
                baseline = 0.0
            case "mean":
                baseline = mean
            case "leave-one-out":
                baseline, scale = mean, count / max(count - 1, 1)
            case "moving-average":
                baseline = before
                if count:
                    self.remember(average=self.decay * before + (1 - self.decay) * mean, batches=self.batches + 1)
            case "running-mean":
                baseline = before
                if count:
                    total = 0.0 if self.average is None else self.average * self.batches
                    self.remember(average=(total + mean) / (self.batches + 1), batches=self.batches + 1)
        return torch.where(valid, (returns - baseline) * scale, 0.0)


@part("objective", "policy-gradient")
@dataclass(frozen=True)
class PolicyGradient(Part):
    """l_t = -A_t log pi(a_t), A detached; no ratio, so a batch is meant for one update only."""

    needs = frozenset({"advantage"})
    vanishes_with = "advantage"

    def __call__(self, evaluation: Evaluation, rollout: Rollout) -> Loss:
        return per_step(-rollout.advantage * evaluation.logp)


reinforce = method(
    "reinforce",
    seed="base",
    paper="Williams 1992",
    curriculum=Uniform(),
    rollout=Groups(),
    reward=KLPenalty(beta=0.0),
    advantage=BatchBaseline(),
    objective=PolicyGradient(),
    aggregation=SequenceSum(),
    models={"ref": Snapshot()},
    update=GradientStep(),
)

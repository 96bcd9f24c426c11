"""CPL: contrastive preference learning from segments (Hejna et al. 2023, arXiv:2310.13639).

People prefer a segment for its regret, the sum of optimal advantages, not for its summed reward. In maximum-entropy RL
the optimal advantage is alpha log pi*, so that the likelihood of preferences is a loss of the policy alone, in any MDP:
A(x) = alpha sum_t gamma^t log pi(a_t | s_t),  L = mean over pairs of -log e^A(w) / (e^A(w) + e^(lambda A(l)))
                                                 = softplus(lambda A(l) - A(w)).
lambda < 1 (the conservative bias) makes policies cheaper that keep to the data: the loss is flat where nothing was
compared. Variants: lambda 1 with behaviour cloning (`--regularizer behaviour-cloning`: CPL-BC); log pi - log pi_BC in
the place of log pi (`--objective.model ref`: CPL-KL, DPO for gamma = lambda = 1).

Settled: the official code has no gamma, so the default is 1; it drops ranked pairs with a loss of exactly 0, which we
average. Its first stage, behaviour cloning on all segments, is `--controller cloning-first`; the optimizer is not reset
after it. A language model that was tuned on such answers needs none. For continuous actions the code takes -|mu - a|^2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from polopt.core.errors import UsageError
from polopt.core.loss import Evaluation, Loss, per_group, per_step
from polopt.core.part import Part, part
from polopt.core.registry import method
from polopt.core.rollout import Rollout
from polopt.core.segments import segment_cumsum, segment_pairs
from polopt.methods.preference.dpo import dpo
from polopt.objectives.preference import Pairs, answered, pair_metrics


@part("objective", "cpl")
@dataclass(frozen=True)
class CPL(Part):
    """L_g = weight * mean over the pairs of a group of softplus(lambda A_l - A_w), lambda being ``bias`` in (0, 1].

    A_i = alpha sum_t gamma^t (log pi_t - log pi_model,t), t the number of trainable steps before the step and gamma
    the ``discount``; without ``model`` the log-probs themselves. With ``soft`` labels every pair counts both ways, with
    P(i before j) = label_i / (label_i + label_j). arXiv:2310.13639, section 3.
    """

    alpha: float = 0.1
    bias: float = 0.5
    discount: float = 1.0
    model: str | None = None
    soft: bool = False
    weight: float = 1.0

    unit = "group"

    def __post_init__(self) -> None:
        if not (self.alpha > 0 and 0 < self.bias <= 1 and 0 < self.discount <= 1):
            raise UsageError(
                f"cpl: alpha must be above 0, bias and discount above 0 and at most 1, got {self.alpha}, {self.bias} "
                f"and {self.discount}"
            )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"label"} if self.model is None else {"label", f"logp/{self.model}"})

    def __call__(self, evaluation: Evaluation, rollout: Rollout) -> Loss:
        step = evaluation.logp if self.model is None else evaluation.logp - rollout[f"logp/{self.model}"]
        if self.discount < 1:
            trajectory, ones = rollout.trajectory, rollout.mask.to(step)
            step = step * self.discount ** segment_cumsum(ones, trajectory, rollout.n_trajectories, exclusive=True)
        advantage, pairs = self.alpha * rollout.sum_steps(step), Pairs.of(rollout)
        metrics = pair_metrics(pairs, advantage, rollout.sum_steps(evaluation.logp))
        chance = torch.ones((), device=step.device)
        if self.soft:
            pairs = Pairs(rollout, *segment_pairs(rollout.group, rollout.n_groups, mask=answered(rollout)))
            first, second = rollout["label"][pairs.winner], rollout["label"][pairs.loser]
            # Twice, since the mean is over both directions; two labels of 0 are equal.
            chance = 2 * torch.where(first == second, 0.5, first / (first + second)).to(step)
        terms = chance * F.softplus(self.bias * advantage[pairs.loser] - advantage[pairs.winner])
        return per_group(self.weight * pairs.mean(terms), **metrics)


@part("regularizer", "behaviour-cloning")
@dataclass(frozen=True)
class BehaviourCloning(Part):
    """l_t = -coefficient * log pi(a_t), on every step of every answer, preferred or not."""

    coefficient: float = 1.0

    def __call__(self, evaluation: Evaluation, rollout: Rollout) -> Loss:
        return per_step(-self.coefficient * evaluation.logp)


@part("controller", "cloning-first")
@dataclass(frozen=True)
class CloningFirst(Part):
    """Behaviour cloning alone for ``iterations``; then the contrast, with ``coefficient`` times behaviour cloning.

    Sets the fields of objective `CPL` and regularizer `BehaviourCloning`, which must be there.
    """

    iterations: int = 100
    coefficient: float = 0.0

    def __call__(self, statistics: Mapping[str, float]) -> dict[str, float]:
        cloning = statistics.get("iteration", 0.0) < self.iterations
        return {"objective.weight": float(not cloning), "regularizer.coefficient": 1.0 if cloning else self.coefficient}


cpl = method("cpl", dpo, seed="206", paper="arXiv:2310.13639", objective=CPL())

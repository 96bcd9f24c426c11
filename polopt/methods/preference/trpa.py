"""TRPA: trust region preference approximation (Su et al. 2025, arXiv:2504.04524).

Rules sort the answers of a group into levels L, 1 best; every pair of different levels is a preference. With
s_i = (1/|y_i|) sum_t log pi - log pi_ref and P the pairs of all groups of the batch,
L_pref = (1/|P|) sum over (i, j) in P, L_i < L_j, of -log sigma(kappa(L_i) beta (s_i - s_j)),
kappa(1) = 2.5, else 1 (right answers weigh more); without any pair (1/M) sum_i -log sigma(+- s_i), + at level 1.
L = L_pref + c (1/N) sum_t k3_t,  k3 = exp(d) - d - 1,  d = log pi_old - log pi: a KL to the policy that sampled.

Settled by the official code (the paper has a beta per level): kappa beta multiplies both members of a pair; k3 is the
estimator for samples of pi. Its pairs are those within a micro-batch; here they are all pairs of the group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from polopt.core.loss import Evaluation, Loss, total
from polopt.core.part import Part, part
from polopt.core.registry import method
from polopt.core.rollout import Rollout
from polopt.methods.base.grpo import grpo
from polopt.objectives.preference import Pairs, answered, pair_metrics
from polopt.objectives.ratio import MAX_LOG_RATIO


@part("reward", "preference-levels")
@dataclass(frozen=True)
class PreferenceLevels(Part):
    """``label`` = 1 - L [M], 0 at the top: L - 1 is how many gates are left, from the first whose reward is not > 1/2.

    ``gates`` name rewards; None: format, then correct, those of them that there are, or else all rewards, the first
    (a task's verifier) last. With these two L is 1 right, 2 wrong, 3 bad format. NaN where the reward of a gate is.
    """

    gates: tuple[str, ...] | None = None

    gives = frozenset({"label"})

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"reward/*"} if self.gates is None else {f"reward/{gate}" for gate in self.gates})

    def __call__(self, rollout: Rollout) -> Rollout:
        known = [gate for gate in ("format", "correct") if f"reward/{gate}" in rollout]
        gates = self.gates or known or list(rollout.rewards)[::-1]
        rewards = torch.stack([rollout[f"reward/{gate}"] for gate in gates])
        passed = (rewards > 0.5).cumprod(0).sum(0).to(rewards)
        label = (passed - len(gates)).masked_fill(rewards.isnan().any(0), torch.nan)
        return rollout.with_columns(trajectory={"label": label})


class BatchPairs(Pairs):
    """Pairs that count alike, whichever group they are of."""

    def share(self, values: Float[Tensor, " pair"]) -> Float[Tensor, ""]:
        return values.detach().sum() / max(len(values), 1)


@part("objective", "trpa")
@dataclass(frozen=True)
class PreferenceApproximation(Part):
    """L_pref of labels 1 - L, where 0 is the top level. arXiv:2504.04524; fallback from the official code."""

    beta: float = 0.1
    kappa: float = 2.5

    needs = frozenset({"label", "logp/ref"})
    unit = "batch"

    def __call__(self, evaluation: Evaluation, rollout: Rollout) -> Loss:
        pairs, top, logp = BatchPairs.of(rollout), rollout["label"] == 0, evaluation.logp
        ratio = rollout.mean_steps(logp - rollout["logp/ref"])
        if len(pairs.winner):
            scale = self.beta * (1 + (self.kappa - 1) * top.to(ratio))[pairs.winner]
            margin = scale * (ratio[pairs.winner] - ratio[pairs.loser])
        else:
            margin = torch.where(top, ratio, -ratio)[answered(rollout)]
        loss = -F.logsigmoid(margin).sum() / max(len(margin), 1)
        return total(loss, **pair_metrics(pairs, self.beta * ratio, rollout.mean_steps(logp)))


@part("regularizer", "rollout-kl")
@dataclass(frozen=True)
class RolloutKL(Part):
    """c K, K the mean over steps of k3 <= 10, of exp(-d) + d - 1 if ``unbiased``; with ``root`` c sqrt(K + 1/4)."""

    coefficient: float = 0.001
    unbiased: bool = False
    root: bool = False

    needs = frozenset({"logp"})
    unit = "batch"

    def __call__(self, evaluation: Evaluation, rollout: Rollout) -> Loss:
        gap = torch.where(rollout.mask, rollout.logp - evaluation.logp, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        gap = -gap if self.unbiased else gap
        kl = rollout.batch_mean((torch.expm1(gap) - gap).clamp(max=10.0))
        return total(self.coefficient * ((kl + 0.25).sqrt() if self.root else kl), kl__rollout=kl)


trpa = method(
    "trpa",
    grpo,
    seed="040",
    paper="arXiv:2504.04524",
    task="worksheet",
    reward=PreferenceLevels(),
    advantage=None,
    objective=PreferenceApproximation(),
    regularizer=RolloutKL(),
)

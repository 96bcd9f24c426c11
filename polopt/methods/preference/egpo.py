"""EGPO: extragradient steps to the Nash equilibrium of a preference (Zhou et al. 2025, arXiv:2503.08942).

V(p, q) = P(p beats q) - beta KL(p || ref) + beta KL(q || ref) has one equilibrium, pi* ~ ref exp(P pi* / beta).
With the mirror step M(p, v) ~ p^(1 - eta beta) ref^(eta beta) exp(eta v):
pi_{t+1/2} = M(pi_t, P pi_t), pi_{t+1} = M(pi_t, P pi_{t+1/2}): the last iterate converges, at a linear rate.
A step is one gradient of a regression (online IPO). With answers y, y' ~ rho and opponents y'' ~ mu,
L = E[(d(y) - d(y') - E_mu[P(y beats y'') - P(y' beats y'')] / beta)^2], d = log pi - log ref:
for softmax tables of A answers and rho uniform, -(eta beta A / 4) grad L is the step M(pi, P mu) of the logits.

An iteration samples answers (temperature 2, top-k 10: close to uniform) and opponents (the policy itself), of three a
third are opponents; the half step ends one iteration, and the next one samples from it, restores and makes the whole
step. As in the paper d is a sum over steps; the official code (zhourunlong/EGPO) takes means by default, which changes
the scale of the target: `--objective.normalise true`. Inferred: opponents beyond one are averaged, as are all pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from polopt.aggregations import TokenMean
from polopt.core.errors import UsageError
from polopt.core.loss import Evaluation, Loss, per_group
from polopt.core.part import Part, part
from polopt.core.registry import method
from polopt.core.rollout import Rollout
from polopt.core.segments import segment_pairs
from polopt.curricula.uniform import Uniform
from polopt.filters.opponents import AgainstOpponents
from polopt.models import Snapshot
from polopt.objectives.preference import Pairs
from polopt.rewards.judges import ScoreJudge
from polopt.rollouts.opponents import Opponents
from polopt.updates.extragradient import Extragradient


@part("objective", "online-ipo")
@dataclass(frozen=True)
class OnlineIPO(Part):
    """L_g = mean over pairs i, j of a group of (d_i - d_j - (win_i - win_j) / beta)^2; the mean over groups.

    d_i = sum_t log pi(a_t) - log ref(a_t) over trainable steps, their mean with ``normalise``; ``win`` [M] is constant.
    Answers without a trainable step or a valid win rate are in no pair. Raises UsageError for
    a ``beta`` that is not above 0.
    """

    beta: float = 0.1
    normalise: bool = False

    needs = frozenset({"win", "logp/ref"})
    unit = "group"

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise UsageError(f"online-ipo: beta must be above 0, got {self.beta}")

    def __call__(self, evaluation: Evaluation, rollout: Rollout) -> Loss:
        ratio, win = evaluation.logp - rollout["logp/ref"], rollout["win"]
        d = rollout.mean_steps(ratio) if self.normalise else rollout.sum_steps(ratio)
        valid = (rollout.active_lengths > 0) & ~win.isnan()
        i, j = segment_pairs(rollout.group, rollout.n_groups, mask=valid)
        pairs = Pairs(rollout, i, j)
        gap, target = d[i] - d[j], (win[i] - win[j]) / self.beta
        right = (gap * target > 0).to(d.dtype)
        return per_group(pairs.mean((gap - target).square()), rewards__accuracies=pairs.share(right))


egpo = method(
    "egpo",
    seed="042",
    paper="arXiv:2503.08942",
    curriculum=Uniform(),
    rollout=Opponents(temperature=2.0, top_k=10, policy_temperature=1.0, share=1 / 3),
    reward=ScoreJudge(column="reward"),
    filter=AgainstOpponents(),
    objective=OnlineIPO(),
    aggregation=TokenMean(),
    models={"ref": Snapshot()},
    update=Extragradient(),
)

"""Nash-MD: the Nash policy of a preference by mirror descent, Nash-MD-PG (Munos et al. 2023, arXiv:2312.00886).

P_tau(pi beats pi') = P(pi beats pi') - tau KL(pi || mu) + tau KL(pi' || mu), mu the reference, has one equilibrium,
log pi*/mu = P pi* / tau + const. Tables: m_t = pi_t^(1 - eta tau) mu^(eta tau), normalised, pi_{t+1} ~ m_t
exp(eta P m_t): mirror descent against a mixture with the reference, whose last iterate converges without averaging.
Gradients: y ~ pi, y' ~ pi^(1 - b) mu^b, both constants, and ascent along
grad log pi(y) [P(y beats y') - 1/2 - tau log(pi(y) / mu(y))].
b = 0 is self-play, b = 1 the best response to mu. With b > 0 the fixed point is not exactly pi*.

The mixture is made token by token, logits (1 - b) log pi + b log mu at each step, as the paper does for generation; the
sequence mixture differs. Settled: half of each group are opponents, and a win rate is the mean over them (the paper
draws one pair per prompt); b = 1/4 lies in the paper's best range 0.125-0.375, tau = 0.008 is the paper's. TRL has b =
0.5, tau = 0.1 and the KL token by token (`--objective.kl token`), which leaves out what a step does to later ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from polopt.aggregations import TokenMean
from polopt.core.errors import UsageError
from polopt.core.loss import Evaluation, Loss, per_trajectory
from polopt.core.part import Part, part
from polopt.core.registry import method
from polopt.core.rollout import Rollout
from polopt.curricula.uniform import Uniform
from polopt.filters.opponents import AgainstOpponents
from polopt.models import Snapshot
from polopt.rewards.judges import ScoreJudge
from polopt.rollouts.opponents import Opponents
from polopt.updates.gradient_step import GradientStep


@part("objective", "nash-md-pg")
@dataclass(frozen=True)
class NashMDPG(Part):
    """l_i = -sum_t w_it log pi(a_t), w_it = win_i - 1/2 - tau k_it constant; the mean over trajectories.

    k is sum_t log pi(a_t) / mu(a_t) over the trainable steps (``kl`` "sequence"), or that of its own step ("token").
    An answer without a valid win rate adds nothing. Raises UsageError for ``tau`` < 0.
    """

    tau: float = 0.008
    kl: Literal["sequence", "token"] = "sequence"

    needs = frozenset({"win", "logp/ref"})
    unit = "trajectory"

    def __post_init__(self) -> None:
        if not 0 <= self.tau < math.inf:
            raise UsageError(f"nash-md-pg: tau must be at least 0, got {self.tau}")

    def __call__(self, evaluation: Evaluation, rollout: Rollout) -> Loss:
        ratio = rollout.kept(evaluation.logp.detach() - rollout["logp/ref"])
        total, win = rollout.sum_steps(ratio), rollout["win"]
        weight = rollout.spread(win - 0.5) - self.tau * (rollout.spread(total) if self.kl == "sequence" else ratio)
        valid = ~win.isnan() & (rollout.active_lengths > 0)
        terms = rollout.sum_steps(-torch.where(rollout.spread(valid), weight, 0.0) * evaluation.logp)
        share = max(rollout.counts.trajectories, 1.0)
        return per_trajectory(terms, kl__sequence=torch.where(valid, total, 0.0).sum() / share)


nash_md = method(
    "nash-md",
    seed="180",
    paper="arXiv:2312.00886",
    curriculum=Uniform(),
    rollout=Opponents(mixture_of="ref", mixture_weight=0.25, share=0.5),
    reward=ScoreJudge(column="reward"),
    filter=AgainstOpponents(),
    objective=NashMDPG(),
    aggregation=TokenMean(),
    models={"ref": Snapshot()},
    update=GradientStep(),
)

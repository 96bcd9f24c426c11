"""INPO: iterative Nash policy optimisation by no-regret learning (Zhang et al. 2024, arXiv:2407.00617).

The policy plays against itself, J(pi, pi') = P(pi beats pi') - tau KL(pi || ref) + tau KL(pi' || ref), by online mirror
descent with step 1 / eta, eta > tau:
pi_{t+1}(y) ~ exp(P(y beats pi_t) / eta) ref(y)^(tau / eta) pi_t(y)^(1 - tau / eta).
The step is the minimum of a squared loss on labelled pairs of answers of pi_t: with
h(y, y') = log pi(y) / pi(y') - rho log ref(y) / ref(y') - (1 - rho) log pi_t(y) / pi_t(y'), rho = tau / eta,
L = mean over pairs of (h(y_w, y_l) - 1 / (2 eta))^2, log-probs being sums over steps: no win rate is estimated.
rho = 1 is IPO on fresh pairs; rho = 0 is self-play without a pull to ref.

pi_t is the policy that sampled the batch, model ``anchor``, and an iteration makes several updates on one batch: take a
large one (`--prompts 256`); the paper's has 20,000 prompts. Its pairs are the best and the worst of K = 8 answers by a
tournament, here by win rate. The theory is of two independent answers with a drawn label: `--filter random-pair
--filter.column beats`. Inferred: eta 0.005 and rho 1/3 are a public script's that derives from the authors' release.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from polopt.core.errors import UsageError
from polopt.core.loss import Evaluation
from polopt.core.method import Schedule
from polopt.core.part import part
from polopt.core.registry import method
from polopt.core.rollout import Rollout
from polopt.filters.preferences import BestWorst
from polopt.methods.preference.dpo import dpo
from polopt.models import Snapshot
from polopt.objectives.preference import PairLoss, Sides, sequence_log_ratio
from polopt.rewards.judges import ScoreJudge
from polopt.rollouts.groups import Groups


@part("objective", "inpo")
@dataclass(frozen=True)
class INPO(PairLoss):
    """l = (h - 1 / (2 eta))^2, h the gap of rho s(ref) + (1 - rho) s(anchor), s the sums of log-ratios to a model.

    eta is ``beta`` and rho = tau / eta is ``ratio``, in [0, 1]: UsageError outside.
    """

    beta: float = 0.005
    ratio: float = 1 / 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.ratio <= 1:
            raise UsageError(f"inpo: ratio is tau / eta, in [0, 1], got {self.ratio}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"label", "logp/ref", "logp/anchor"})

    def scores(
        self, evaluation: Evaluation, rollout: Rollout
    ) -> tuple[Float[Tensor, " trajectory"], Float[Tensor, " trajectory"]]:
        ref, anchor = (sequence_log_ratio(evaluation, rollout, model) for model in ("ref", "anchor"))
        return self.ratio * ref + (1 - self.ratio) * anchor, sequence_log_ratio(evaluation, rollout, None)

    def terms(self, score: Sides) -> Float[Tensor, " pair"]:
        return (score.gap - 0.5 / self.beta).square()


inpo = method(
    "inpo",
    dpo,
    seed="210",
    paper="arXiv:2407.00617",
    rollout=Groups(),
    reward=ScoreJudge(column="reward"),
    filter=BestWorst(column="win"),
    objective=INPO(),
    models={"ref": Snapshot(), "anchor": Snapshot(every=1)},
    schedule=Schedule(minibatches=4),
)

"""RPO: regularised preference optimisation, DPO and imitation of the chosen answer (Liu et al. 2024, arXiv:2405.16436).

max over pi, min over r of eta E[r(y) - r(y0) - beta KL(pi || pi_ref)] + L_D(r): y from pi and y0 from a baseline play
against the reward that is worst for pi among those that explain the comparisons, L_D their Bradley-Terry loss. With
r = beta log pi/pi_ref + const. and the chosen answers as the baseline this is
L = mean over pairs of [-log sigma(beta (s_w - s_l)) - eta beta log pi(y_w)],  s_i = log pi(y_i) - log pi_ref(y_i).
DPO sees differences alone: both likelihoods of a pair may fall while mass moves to answers that no comparison is about.
The second term holds y_w: each of its steps has the gradient -(beta sigma(-beta h) + eta beta) / P, those of y_l have
+beta sigma(-beta h) / P; h = s_w - s_l, P pairs.

``normalise`` "mean" is the variant of the paper's appendix, -eta (1 / |y_w|) log pi(y_w), without beta: useful values
of eta are some 100 times larger (the authors' code: beta 0.5 and eta 0.2; for the sum 0.005 with beta 0.01 or, on
Gemma, 0.05). It is also the term that Pang et al. (2024, arXiv:2404.19733) add to DPO, with their alpha for eta.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from polopt.core.errors import UsageError
from polopt.core.loss import Evaluation, Loss, per_group
from polopt.core.part import part
from polopt.core.registry import method
from polopt.core.rollout import Rollout
from polopt.methods.preference.dpo import DPO, dpo
from polopt.objectives.preference import Pairs, Sides, pair_metrics


@part("objective", "rpo")
@dataclass(frozen=True)
class RegularisedDPO(DPO):
    """l_wl = DPO's term - eta beta log pi(y_w), or - eta log pi(y_w) / |y_w| with ``normalise`` "mean".

    eta = 0 is DPO. Logs ``nll``, what the second term multiplies. arXiv:2405.16436, section 4 and its appendix.
    """

    beta: float = 0.01
    eta: float = 0.005
    normalise: Literal["sum", "mean"] = "sum"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.eta >= 0:
            raise UsageError(f"rpo: eta must be at least 0, got {self.eta}")

    def __call__(self, evaluation: Evaluation, rollout: Rollout) -> Loss:
        pairs = Pairs.of(rollout)
        score, logp = self.scores(evaluation, rollout)
        summed = self.normalise == "sum"
        nll = -(logp if summed else rollout.mean_steps(evaluation.logp))[pairs.winner]
        held = self.eta * (self.beta if summed else 1.0) * nll
        terms = self.terms(Sides(score[pairs.winner], score[pairs.loser])) + held
        return per_group(pairs.mean(terms), nll=pairs.share(nll), **pair_metrics(pairs, self.beta * score, logp))


rpo = method("rpo", dpo, seed="183", paper="arXiv:2405.16436", objective=RegularisedDPO())

"""TGDPO: DPO with token-level reward guidance (Zhu et al. 2025, arXiv:2506.14574).

A frozen guide pi_g, a policy aligned before, rates each token by r_t = beta [log pi_g(a_t) - log pi_ref(a_t)];
f_t = 1 + alpha r_t on the steps of a winner, 1 - alpha r_t on those of a loser, constants;
h = beta sum_{t in w} f_t [log pi - log pi_ref]_t - beta sum_{t in l} f_t [log pi - log pi_ref]_t;
L = mean over pairs of -log sigma(h).
A winner's step has the gradient -beta f_t sigma(-h), a loser's +beta f_t sigma(-h). The solution of a KL-regularised
problem per step with coefficient beta f_t has a partition function too; it makes an offset inside sigma, whose loss the
paper proves harmless. The guide's beta is the policy's, as in the official code; f is not clamped there, so that with a
large alpha the update of a step can change its sign (``floor`` is ours).

The guide is trained by DPO on the same pairs. Until it exists it is the reference, all f are 1 and the loss is DPO's:
the first 30 iterations (`--models.guide.at`) make the guide, then weights and optimizer go back to the start. Or it is
given: `--models.guide.folder RUN/model` names a policy that was trained from the same reference, by DPO, SimPO or else.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from polopt.core.loss import Evaluation, Loss, per_group
from polopt.core.part import part
from polopt.core.registry import method
from polopt.core.rollout import Rollout
from polopt.core.segments import segment_min
from polopt.methods.preference.dpo import dpo
from polopt.models import Snapshot
from polopt.objectives.preference import PairLoss, Pairs, pair_metrics
from polopt.updates.restart import Restart


@part("objective", "tgdpo")
@dataclass(frozen=True)
class TokenGuidedDPO(PairLoss):
    """l_wl = -log sigma(h) (see the file), with f_t >= ``floor`` where that is set; alpha = 0 is DPO.

    Logs DPO's metrics, the least f of a pair and the share of steps with a negative f. arXiv:2506.14574; official code.
    """

    alpha: float = 0.5
    floor: float | None = None

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"logp/guide"}

    def __call__(self, evaluation: Evaluation, rollout: Rollout) -> Loss:
        pairs, (score, logp) = Pairs.of(rollout), self.scores(evaluation, rollout)
        ratio = evaluation.logp - rollout["logp/ref"]
        up, down = self.factor(rollout, 1), self.factor(rollout, -1)
        won, lost = rollout.sum_steps(up * ratio), rollout.sum_steps(down * ratio)
        terms = -F.logsigmoid(self.beta * (won[pairs.winner] - lost[pairs.loser]))
        sides = ((up, pairs.winner), (down, pairs.loser))
        least = [segment_min(f, rollout.trajectory, rollout.n_trajectories, mask=rollout.mask)[i] for f, i in sides]
        negative = [rollout.mean_steps((f < 0).to(f))[i] for f, i in sides]
        return per_group(
            pairs.mean(terms),
            factor__least=pairs.share(torch.minimum(*least)),
            factor__negative=pairs.share((negative[0] + negative[1]) / 2),
            **pair_metrics(pairs, self.beta * score, logp),
        )

    def factor(self, rollout: Rollout, sign: int) -> Float[Tensor, " step"]:
        """f_t of a winner (sign 1) or a loser (-1)."""
        reward = self.beta * rollout.kept(rollout["logp/guide"] - rollout["logp/ref"])
        f = 1 + sign * self.alpha * reward
        return f if self.floor is None else f.clamp_min(self.floor)


tgdpo = method(
    "tgdpo",
    dpo,
    seed="007",
    paper="arXiv:2506.14574",
    objective=TokenGuidedDPO(),
    models={"ref": Snapshot(), "guide": Snapshot(at=30)},
    update=Restart(),
)

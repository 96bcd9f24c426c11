"""ReMix: reincarnating mix-policy proximal policy gradient (Liang et al. 2025, arXiv:2507.06892).

A batch of iteration k: a share p from the policies pi_{k-i}, 1 <= i <= N_w, the rest from pi_k; m updates on it.
r_t = pi(a_t) / pi_{k-i}(a_t),  c_t = pi_k(a_t) / pi_{k-i}(a_t);
L = -(1/N) sum_t min(r_t A_t, clip(r_t, c_t - eps, c_t + eps) A_t) - c_H H
    + beta (lam KL(pi || base) + (1 - lam) KL(pi || pi_k)),  lam(k) = max(1 - 0.1 ceil(max(k - 50, 0) / 10), 0.5);
after iteration T: base <- pi_T, p = 0, m = 1, which is GRPO with these anchors.

The clip is c_t times that of PPO around pi_k, with half-width eps / c_t. The "precedent policy" is the one from which
the iteration starts, whose log-probs c_t needs anyway. The public text leaves open: the distribution of i (here uniform
over the groups of the window), A of replayed responses (whole groups are replayed, so that it is their own), the
estimator of KL (k3), beta and c_H (0.001), m after T. T is 50, as for GRPO. Iterations count from 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from polopt.aggregations import TokenMean
from polopt.core.loss import Evaluation, Loss, per_step
from polopt.core.method import Schedule
from polopt.core.part import Part, part
from polopt.core.registry import method
from polopt.core.rollout import Rollout
from polopt.methods.base.grpo import grpo
from polopt.models import Snapshot
from polopt.objectives.ratio import log_ratio
from polopt.regularizers.entropy import Entropy
from polopt.regularizers.kl import KL
from polopt.rollouts.replay import Replay


@part("objective", "mixed-clip")
@dataclass(frozen=True)
class MixedClip(Part):
    """l_t = -min(r_t A_t, clip(r_t, c_t - ``width``, c_t + ``width``) A_t), r = pi / logp, c = ``logp/start`` / logp.

    dl/dlogp_t = -r_t A_t, and 0 where A > 0 and r > c + width, or A < 0 and r < c - width: nothing at the start of an
    iteration, however old the data. On fresh data it is PPO's surrogate.
    """

    width: float = 0.2

    needs = frozenset({"logp", "logp/start", "advantage"})
    vanishes_with = "advantage"

    def __call__(self, evaluation: Evaluation, rollout: Rollout) -> Loss:
        ratio = log_ratio(evaluation, rollout).exp()
        centre = log_ratio(Evaluation({"logp": rollout["logp/start"]}), rollout).exp()
        clipped = torch.maximum(torch.minimum(ratio, centre + self.width), centre - self.width)
        plain, bounded = ratio * rollout.advantage, clipped * rollout.advantage
        out = rollout.batch_mean((bounded < plain).float())
        return per_step(-torch.minimum(plain, bounded), clip_ratio__region_mean=out)


@part("controller", "reincarnation")
@dataclass(frozen=True)
class Reincarnation(Part):
    """lam(k), never below ``floor``, as the coefficients of KL(pi || base) and KL(pi || start); ``switch`` is T.

    Until T ``share`` p of the groups is replayed and ``updates`` m are made on each batch. Reads ``iteration``.
    """

    switch: int = 50
    share: float = 0.4
    updates: int = 2
    beta: float = 0.001
    floor: float = 0.5

    def __call__(self, statistics: Mapping[str, float]) -> dict[str, float]:
        number = int(statistics.get("iteration", 0)) + 1
        late = number > self.switch
        lam = max(1 - 0.1 * math.ceil(max(number - 50, 0) / 10), self.floor)
        return {
            "regularizer.0.beta": lam * self.beta,
            "regularizer.1.beta": (1 - lam) * self.beta,
            "rollout.share": 0.0 if late else self.share,
            "schedule.epochs": 1 if late else self.updates,
            "models.base.at": self.switch,
        }


remix = method(
    "remix",
    grpo,
    seed="082",
    paper="arXiv:2507.06892",
    rollout=Replay(share=0.4, window=2),
    objective=MixedClip(),
    regularizer=KL(0.001, model="base") + KL(0.0, model="start") + Entropy(0.001),
    aggregation=TokenMean(),
    controller=Reincarnation(),
    models={"base": Snapshot(at=50)},
    schedule=Schedule(epochs=2),
)

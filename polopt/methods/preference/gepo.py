"""GEPO: groups of equivalent winners beside on-policy RL (OORL: Wu et al. 2025, arXiv:2505.12723).

Several answers of a prompt are equally right: n winners, m losers. With s_y = sum_t log pi/pi_ref of an answer,
L_GEPO = mean over prompts of -log sigma(beta (mean_w s - mean_l s)) + lambda Var_w s:
the mean implicit reward of the winners leads that of the losers, and winners are rewarded alike. It is the Lagrangian
of the one subject to a bound on the other; Z(x) cancels in both. OORL adds it, with weight 0.01, to the clipped
surrogate on the policy's own answers, whose advantages are the returns whitened over the batch (REINFORCE++).

Settled, where the displayed equations could not be read: Var is over n, of the log-ratios (not times beta^2), as the
text says; beta is not stated, 0.1 here. A winner has a label of at least ``threshold``. Prompts without winners
or losers keep the term that they have and are counted. Var grows with the square of the length: lower lambda for long
answers. Alone, offline: `--rollout dataset --rollout.form lists --objective gepo`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from polopt.aggregations import TokenMean
from polopt.core.loss import Evaluation, Loss, per_group
from polopt.core.part import Part, part
from polopt.core.registry import method
from polopt.core.rollout import Rollout
from polopt.core.segments import segment_count, segment_mean
from polopt.methods.base.grpo import grpo
from polopt.objectives.clipped_surrogate import ClippedSurrogate
from polopt.objectives.preference import answered, sequence_log_ratio
from polopt.rollouts.beside import BesideAnswers


@part("objective", "gepo")
@dataclass(frozen=True)
class GEPO(Part):
    """L_g = weight (-log sigma(beta (mean_w s - mean_l s)) + lambda Var_w s), lambda being ``variance``.

    Winners are the answers of the group with a label of at least ``threshold``, losers those with another. Without
    either the first term is 0, with fewer than two winners the second. Learns from the steps of the column ``on``.
    """

    beta: float = 0.1
    variance: float = 1.0
    weight: float = 1.0
    threshold: float = 1.0
    on: str = "mask"

    unit = "group"

    @property
    def mask(self) -> str:  # type: ignore[override]
        """Where it trains."""
        return self.on

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"label", "logp/ref"} | ({self.on} - {"mask"}))

    def __call__(self, evaluation: Evaluation, rollout: Rollout) -> Loss:
        group, count = rollout.group, rollout.n_groups
        s, right, there = sequence_log_ratio(evaluation, rollout), rollout["label"] >= self.threshold, answered(rollout)
        winner, loser = there & right, there & ~right
        mean = segment_mean(s, group, count, mask=winner)
        gap = mean - segment_mean(s, group, count, mask=loser)
        winners, losers = (segment_count(group, count, mask=side) for side in (winner, loser))
        both = (winners > 0) & (losers > 0)
        contrast = torch.where(both, -F.logsigmoid(self.beta * gap), 0.0)
        spread = segment_mean((s - mean[group]).square(), group, count, mask=winner)

        def share(values: Tensor) -> Tensor:
            return values.to(s).detach().sum() / max(rollout.counts.groups, 1.0)

        return per_group(
            self.weight * (contrast + self.variance * spread),
            rewards__accuracies=share(both & (gap > 0)),
            rewards__margins=share(torch.where(both, self.beta * gap, 0.0)),
            winners__variance=share(spread),
            groups__one_sided=share(~both),
            groups__single_winner=share(winners == 1),
        )


@part("advantage", "batch-whitened")
@dataclass(frozen=True)
class BatchWhitened(Part):
    """A_t = (R_i - mean) / sqrt(var + 1e-8) over the trainable steps of the batch; 0 where the return is invalid (NaN).

    REINFORCE++ without discount: every step carries the return of its trajectory. Hu 2025, arXiv:2501.03262.
    """

    needs = frozenset({"reward"})
    unit = "batch"

    def __call__(self, rollout: Rollout) -> Float[Tensor, " step"]:
        return rollout.whiten(rollout.spread(rollout.trajectory_return))


gepo = method(
    "gepo",
    grpo,
    seed="144",
    paper="arXiv:2505.12723",
    rollout=BesideAnswers(),
    advantage=BatchWhitened(),
    objective=ClippedSurrogate() + GEPO(weight=0.01, on="mask/known"),
    aggregation=TokenMean(),
)

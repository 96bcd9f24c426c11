"""Reward model: a score of answers learned from comparisons (Ouyang et al. 2022, arXiv:2203.02155).

P(w beats l) = sigma(r(x, w) - r(x, l)) (Bradley and Terry 1952; from human comparisons: Christiano et al. 2017,
arXiv:1706.03741);  L = mean over prompts of the mean over their pairs of -log sigma(r_w - r_l - m), Eq. 1: a list of K
answers counts once, with all its K (K - 1) / 2 pairs. m is a margin (Touvron et al. 2023, arXiv:2307.09288, Eq. 2).
r(x, y) is the critic's value before the action that ends y, when all of y is read. Only differences of r are learned;
``centring`` adds c (r_w + r_l)^2, as TRL does (Eisenstein et al. 2023, arXiv:2312.09244).

The critic sits on the policy's trunk, which trains with it. `polopt train reward-model --data pairs.jsonl` writes it to
the run's folder, and `--reward model:FOLDER` scores with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from polopt.aggregations import TokenMean
from polopt.core.errors import UsageError
from polopt.core.loss import Evaluation, Loss, per_group
from polopt.core.part import Evaluate, Part, part
from polopt.core.registry import method
from polopt.core.rollout import Rollout
from polopt.curricula.uniform import Uniform
from polopt.objectives.preference import Pairs
from polopt.rewards.scales import write_scales
from polopt.rollouts.dataset import Dataset
from polopt.updates.gradient_step import GradientStep


@part("objective", "bradley-terry")
@dataclass(frozen=True)
class BradleyTerry(Part):
    """l_wl = -log sigma(r_w - r_l - m) + centring (r_w + r_l)^2, r the value [M] at the last step of each answer.

    ``margin`` names a trajectory column [M], whose value at the winner is m (a data set's column ``margin``:
    `--slots.reward example-columns --reward.names margin`). ``heads`` above 1 trains as many heads on the same pairs,
    each from its own start: the mean of their losses. Metrics are of their mean reward.
    """

    margin: str | None = None
    centring: float = 0.0
    heads: int = 1

    unit = "group"
    reads_logp = False

    def __post_init__(self) -> None:
        if self.heads < 1:
            raise UsageError(f"bradley-terry: there must be at least one head, got {self.heads}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"label"} if self.margin is None else {"label", self.margin})

    @property
    def evaluates(self) -> frozenset[str]:  # type: ignore[override]
        """The values of the heads."""
        return frozenset({"value"} if self.heads == 1 else {f"value/{head + 1}" for head in range(self.heads)})

    def rewards(self, values: Mapping[str, Tensor], rollout: Rollout) -> Float[Tensor, "head trajectory"]:
        """r of every head: the values at the last trainable step of each trajectory, 0 where there is none."""
        last = rollout.last_step
        own = torch.stack(
            [values[name] for name in sorted(self.evaluates, key=lambda n: int(n.partition("/")[2] or 1))]
        )
        return torch.where(last >= 0, own[:, last.clamp_min(0)], 0.0)

    def __call__(self, evaluation: Evaluation, rollout: Rollout) -> Loss:
        pairs = Pairs.of(rollout)
        reward = self.rewards(evaluation.columns, rollout)
        won, lost = reward[:, pairs.winner], reward[:, pairs.loser]
        gap = won - lost
        if self.margin is not None:
            gap = gap - rollout[self.margin].to(gap)[pairs.winner]
        terms = (-F.logsigmoid(gap) + self.centring * (won + lost).square()).mean(0)
        mean, other = won.mean(0), lost.mean(0)
        return per_group(
            pairs.mean(terms),
            rewards__chosen=pairs.share(mean),
            rewards__rejected=pairs.share(other),
            rewards__accuracies=pairs.share((mean > other).to(mean.dtype)),
            rewards__margins=pairs.share(mean - other),
        )

    def conclude(self, answers: Rollout, evaluate: Evaluate, folder: Path) -> None:
        """Write beside the model the mean and standard deviation of its rewards of training answers, per head."""
        columns = evaluate(answers, self.evaluates)
        write_scales(self.rewards({name: columns[name] for name in self.evaluates}, answers), folder)


reward_model = method(
    "reward-model",
    seed="base",
    paper="arXiv:2203.02155",
    curriculum=Uniform(),
    rollout=Dataset(),
    objective=BradleyTerry(),
    aggregation=TokenMean(),
    update=GradientStep(),
)

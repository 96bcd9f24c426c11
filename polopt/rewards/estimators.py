"""Estimators of which answer is better, asked under dropout: a reward of every answer from each of several passes.

Trajectory column ``estimates`` [M, T]: r_i^t of answer i in pass t. All answers of a pass see the same dropout:
P_t(i beats j) = sigmoid(r_i^t - r_j^t), what passes disagree about is `polopt.rewards.uncertainty.pair_uncertainty`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cache
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from polopt.core.errors import UsageError
from polopt.core.part import Evaluate, Stateful, part
from polopt.core.rollout import Rollout
from polopt.core.segments import segment_pairs
from polopt.rewards.models import ModelReward, Options, RewardModel
from polopt.rewards.scoring import transcripts


@dataclass(frozen=True)
class Estimator(Stateful):
    """Adds ``estimates`` [M, T] from T = ``passes`` passes, each of which drops a share ``dropout`` of the features.

    State: how many batches were estimated, which with ``seed`` decides the draws. Raises UsageError for an option out
    of range.
    """

    dropout: float = 0.1
    passes: int = 10
    seed: int = 0
    batches: int = field(default=0, init=False, compare=False)

    gives: ClassVar[frozenset[str]] = frozenset({"estimates"})
    state: ClassVar[tuple[str, ...]] = ("batches",)

    def __post_init__(self) -> None:
        if not 0 < self.dropout < 1 or self.passes < 2:
            raise UsageError(
                f"{self.name}: dropout must be a probability in (0, 1) and passes at least 2, got {self.dropout} and "
                f"{self.passes}"
            )

    def draw(self) -> int:
        """A seed for this batch."""
        self.remember(batches=self.batches + 1)
        return int(hash((self.seed, self.batches)) % 2**62)


@part("reward", "model-estimator")
@dataclass(frozen=True)
class ModelEstimator(Estimator):
    """Passes of a trained reward model, ``model`` the folder that `polopt train reward-model` wrote.

    Dropout is on the hidden state that its head reads, and there alone. Several folders, joined by +, or heads make an
    ensemble: ``passes`` of each. Raises UsageError where no folder is named or it holds no reward model.
    """

    model: str = ""

    def __call__(self, rollout: Rollout) -> Rollout:
        if not self.model:
            raise UsageError("model-estimator has no reward model; name its folder: --reward.model FOLDER")
        said = transcripts(rollout)
        options = Options(normalize=False, dropout=self.dropout, passes=self.passes, seed=self.draw())
        found = ModelReward(_models(self.model), options).scores([t.prompt for t in said], [t.completion for t in said])
        return rollout.with_columns(trajectory={"estimates": found.T.float().to(rollout.device)})


@cache
def _models(folders: str) -> tuple[RewardModel, ...]:
    return tuple(RewardModel.load(folder) for folder in folders.split("+"))


@part("reward", "head-estimator")
@dataclass(frozen=True)
class HeadEstimator(Estimator):
    """r_i^t = w . (m_t * x_i), m_t of 0 and 1 / (1 - dropout), x_i the policy's own state at the end of answer i.

    x_i is what the output layer reads before the last action, scaled to the square norm D of its D entries; it stands
    in the column ``features`` [M, D]. The head w is learned while the policy trains: after each iteration `fit_head`
    goes on from it with the pairs of all answers that a ``column`` [M] orders. Before the first w = 0: every P_t is
    1/2. State: w.
    """

    column: str = "score"
    steps: int = 50
    rate: float = 0.02
    ridge: float = 0.01
    weight: Tensor | None = field(default=None, init=False, compare=False)

    needs = frozenset({"hidden"})
    gives = Estimator.gives | {"features"}
    state = ("batches", "weight")

    def __call__(self, rollout: Rollout) -> Rollout:
        last = rollout.last_step
        x = torch.where((last >= 0)[:, None], rollout["hidden"][last.clamp_min(0)], 0.0)
        x = F.normalize(x, dim=1) * x.shape[1] ** 0.5
        # The states of all steps are not needed any more, and are the largest column by far.
        columns = {**rollout.columns, "step": {n: v for n, v in rollout.columns["step"].items() if n != "hidden"}}
        kept = kept_features(self.passes, x, self.dropout, torch.Generator().manual_seed(self.draw()))
        weight = x.new_zeros(x.shape[1]) if self.weight is None else self.weight.to(x)
        estimates = x @ (kept * weight).T
        made = dataclasses.replace(rollout, columns=columns)
        return made.with_columns(trajectory={"estimates": estimates, "features": x})

    def observe(self, rollout: Rollout, evaluate: Evaluate) -> None:
        """Learn from the pairs of an iteration."""
        score, x = rollout[self.column], rollout["features"]
        i, j = segment_pairs(rollout.group, rollout.n_groups, mask=~score.isnan() & (rollout.active_lengths > 0))
        better = score[i] > score[j]
        if not bool(better.any()):
            return
        start = x.new_zeros(x.shape[1]) if self.weight is None else self.weight.to(x)
        generator = torch.Generator().manual_seed(hash((self.seed, self.batches, 1)) % 2**62)
        weight = fit_head(
            x,
            i[better],
            j[better],
            start=start,
            generator=generator,
            dropout=self.dropout,
            steps=self.steps,
            rate=self.rate,
            ridge=self.ridge,
        )
        self.remember(weight=weight)


def kept_features(
    passes: int, like: Float[Tensor, "answer feature"], dropout: float, generator: torch.Generator
) -> Float[Tensor, "pass feature"]:
    """What multiplies the features in each pass: 0 with probability ``dropout``, else 1 / (1 - dropout)."""
    kept = torch.rand(passes, like.shape[1], generator=generator) >= dropout
    return kept.to(like) / (1 - dropout)


def fit_head(
    x: Float[Tensor, "answer feature"],
    winner: Int[Tensor, " pair"],
    loser: Int[Tensor, " pair"],
    *,
    start: Float[Tensor, " feature"],
    generator: torch.Generator,
    dropout: float = 0.1,
    steps: int = 50,
    rate: float = 0.02,
    ridge: float = 0.01,
) -> Float[Tensor, " feature"]:
    """Adam on the mean over pairs of -log sigma(w . m (x_w - x_l)) + ridge |w|^2 / 2, from ``start``.

    m are features kept under dropout, drawn for every step.
    """
    gap = x[winner] - x[loser]
    with torch.enable_grad():
        weight = start.clone().requires_grad_()
        optimizer = torch.optim.Adam([weight], rate)
        for kept in kept_features(steps, x, dropout, generator):
            optimizer.zero_grad()
            loss = -F.logsigmoid(gap @ (kept * weight)).mean() + ridge / 2 * weight.square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return weight.detach()

"""Judges: parts that say how often each trajectory of a group beats the others.

Every judge adds the trajectory columns ``win`` [M], ``beats`` [M, K] and ``member`` [M], K the size of the largest
group: ``beats[i, member[j]]`` is P(i beats j) for i and j of one group. ``member`` stays true when trajectories are
dropped or reordered. Past the end of its group a row is NaN, and 1/2 at its own place. ``win`` is the mean over the
others; NaN for a group of one, and where a comparison is invalid.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from polopt.core.errors import UsageError
from polopt.core.part import Part, part
from polopt.core.rollout import Rollout
from polopt.core.segments import segment_cumsum, segment_mean, segment_pairs
from polopt.rewards.comparisons import TEMPLATE, VERDICTS, Preference, load_preference
from polopt.rewards.reward import RewardError, accepted
from polopt.rewards.scoring import transcripts
from polopt.rewards.transcript import Transcript

LOG = logging.getLogger(__name__)


def beaten_by(rollout: Rollout, i: Int[Tensor, " pair"], j: Int[Tensor, " pair"]) -> Float[Tensor, " pair"]:
    """P(i beats j) for trajectories i and j of the same groups, from what a judge left in the rollout."""
    return rollout["beats"][i, rollout["member"][j].long()]


@dataclass(frozen=True)
class Judge(Part):
    """What judges share.

    ``swapped`` asks for both orders and takes the mean of P(i beats j) and 1 - P(j beats i), which takes a preference
    for the place of an answer away. ``replace`` makes ``win`` the reward too; what is invalid then trains nowhere, as
    with any reward.
    """

    swapped: bool = False
    replace: bool = False

    gives = frozenset({"win", "beats", "member"})

    def prefers(self, rollout: Rollout, i: Int[Tensor, " pair"], j: Int[Tensor, " pair"]) -> Float[Tensor, " pair"]:
        """P(i beats j) of every pair, NaN where it is invalid; all pairs of all groups in one call."""
        raise NotImplementedError

    def __call__(self, rollout: Rollout) -> Rollout:
        group, count, size = rollout.group, rollout.n_groups, rollout.n_trajectories
        i, j = segment_pairs(group, count)
        if len(i):
            chance = self.prefers(rollout, i, j)
            if self.swapped:
                # Every pair is there in both orders: sorted by (i, j) and by (j, i) they lie beside each other.
                order, back = torch.argsort(i * size + j), torch.argsort(j * size + i)
                i, j, chance = i[order], j[order], (chance[order] + 1 - chance[back]) / 2
        else:
            chance = torch.zeros(0, device=rollout.device)
        member = segment_cumsum(torch.ones_like(group).float(), group, count, exclusive=True).long()
        width = int(member.max()) + 1 if size else 1
        own = torch.arange(size, device=rollout.device)
        beats = chance.new_full((size, width), math.nan)
        beats[own, member] = 0.5
        beats[i, member[j]] = chance
        win = segment_mean(chance, i, size, empty=math.nan)
        judged = rollout.with_columns(trajectory={"win": win, "beats": beats, "member": member})
        if not self.replace:
            return judged
        masks = ["mask", *rollout.counts.masks]
        return judged.with_columns(
            trajectory={"reward": win.clone()},
            step={name: rollout.under(name).mask & ~rollout.spread(win.isnan()) for name in masks},
        )


@part("reward", "judge-scores")
@dataclass(frozen=True)
class ScoreJudge(Judge):
    """P(i beats j) = sigmoid(scale (s_i - s_j)) of a trajectory column: the preference of Bradley and Terry.

    ``column`` is any of the rewards, ``reward/<name>`` of a reward model too. With ``scale`` none the higher score wins
    for certain, and equal scores 1/2: a verifier as a judge. An invalid score makes its comparisons invalid.
    """

    column: str = "score"
    scale: float | None = 1.0

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.column})

    def prefers(self, rollout: Rollout, i: Int[Tensor, " pair"], j: Int[Tensor, " pair"]) -> Float[Tensor, " pair"]:
        score = rollout[self.column]
        score = score if score.is_floating_point() else score.float()
        gap = score[i] - score[j]
        if self.scale is not None:
            return torch.sigmoid(self.scale * gap)
        return torch.where(gap.isnan(), gap, (1 + gap.sign()) / 2)


@runtime_checkable
class Judged(Protocol):
    """What hands a preference over the answers of its world: a problem of the exact world."""

    def preference(self) -> Preference: ...


@part("reward", "judge-pairwise")
@dataclass(frozen=True)
class PairwiseJudge(Judge):
    """P(i beats j) by a function of both texts: ``file.py:function``, or ``lm:PATH``, a language model that is asked.

    ``judge`` is a name or a function (`polopt.rewards.comparisons.Preference`). A language model reads ``template``
    with ``{prompt}``, ``{first}`` and ``{second}``, and P is the softmax of the log-probs of its two ``verdicts``. A
    judge that raises, gives a wrong number of values, or a value outside [0, 1] fails: ``on_error`` "raise" ends the
    run; with "skip" every comparison is tried alone, those that fail are invalid, and the log says why.
    """

    judge: str | Preference = ""
    template: str = TEMPLATE
    verdicts: tuple[str, ...] = VERDICTS
    on_error: Literal["raise", "skip"] = "raise"

    def __post_init__(self) -> None:
        if len(self.verdicts) != 2:
            raise UsageError(f"a judge needs two verdicts, for the first and for the second, got {self.verdicts}")
        if self.judge:
            self.function()

    def function(self) -> Preference:
        """The function that is asked. Raises UsageError where none is named or it cannot be loaded."""
        if not self.judge:
            raise UsageError("the judge has no function; name one: --reward.judge file.py:function or lm:PATH")
        if isinstance(self.judge, str):
            return load_preference(self.judge, self.template, (self.verdicts[0], self.verdicts[1]))
        return self.judge

    def prefers(self, rollout: Rollout, i: Int[Tensor, " pair"], j: Int[Tensor, " pair"]) -> Float[Tensor, " pair"]:
        said = transcripts(rollout)
        pairs = [(said[a], said[b]) for a, b in zip(i.tolist(), j.tolist(), strict=True)]
        try:
            values = _asked(self.function(), pairs)
        except _Failure as failure:
            if self.on_error == "raise":
                raise RewardError(f"the judge {failure}") from failure.__cause__
            values = [self._alone(pair) for pair in pairs]
        dtype = rollout.logp.dtype if "logp" in rollout else torch.float32
        return torch.tensor(values, dtype=dtype, device=rollout.device)

    def _alone(self, pair: tuple[Transcript, Transcript]) -> float:
        try:
            return _asked(self.function(), [pair])[0]
        except _Failure as failure:
            LOG.warning("invalid comparison: the judge %s", failure)
            return math.nan


@part("reward", "judge-matrix")
@dataclass(frozen=True)
class MatrixJudge(PairwiseJudge):
    """P(i beats j) of the preference game of an exact problem, which hands its function to this part."""

    def of_problem(self, problem: Judged) -> Self:
        """The part that asks this problem."""
        return dataclasses.replace(self, judge=problem.preference())

    def function(self) -> Preference:
        if not self.judge:
            raise UsageError("judge-matrix is for a problem of the exact world that has preferences (--problem)")
        return super().function()


class _Failure(Exception):
    """A call that gave no usable values; the text completes "the judge ..."."""


def _asked(judge: Preference, pairs: Sequence[tuple[Transcript, Transcript]]) -> list[float]:
    examples = [first.example for first, _ in pairs]
    where = f"(first example {examples[0].id!r})"
    try:
        values = list(judge(**accepted(judge, _keywords(pairs), "the judge")))
    except UsageError:
        raise
    except Exception as error:
        raise _Failure(f"raised {type(error).__name__}: {error} {where}") from error
    if len(values) != len(pairs):
        raise _Failure(f"returned {len(values)} values for {len(pairs)} comparisons {where}")
    numbers = []
    for value, example in zip(values, examples, strict=True):
        number = math.nan if value is None else float(value)
        if value is not None and not 0 <= number <= 1:
            raise _Failure(f"returned {value!r}, which is not a probability (example {example.id!r})")
        numbers.append(number)
    return numbers


def _keywords(pairs: Sequence[tuple[Transcript, Transcript]]) -> Mapping[str, Any]:
    examples = [first.example for first, _ in pairs]
    names = dict.fromkeys(name for example in examples for name in example.columns)
    columns: dict[str, Any] = {name: [example.columns.get(name) for example in examples] for name in names}
    return columns | {
        "answer": [example.answer for example in examples],
        "example": examples,
        "prompts": [first.prompt for first, _ in pairs],
        "first": [first.completion for first, _ in pairs],
        "second": [second.completion for _, second in pairs],
        "first_ids": [first.completion_ids for first, _ in pairs],
        "second_ids": [second.completion_ids for _, second in pairs],
    }

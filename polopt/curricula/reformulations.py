"""Harder versions of a question beside it in the pool (MQR: Dai et al. 2026, arXiv:2601.20614).

An example's column ``reformulations`` lists prompts with the same gold answer. The paper has a language model write
three of them per question; `REWRITES` says what to ask of one, and `sub_sum` does without one for sums.
"""

from __future__ import annotations

import bisect
import itertools
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final, overload

import torch

from polopt.core.errors import UsageError
from polopt.core.example import Example
from polopt.core.part import part
from polopt.core.policy import Request
from polopt.curricula.uniform import Uniform

COLUMN: Final = "reformulations"

REWRITES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "background": (
            "Rewrite the question below so that it is told as a story. The story must sound as if it mattered but have "
            "nothing to do with the mathematics that the solution needs. If the question is a story already, replace "
            "it by another, more involved one. Every number and condition stays, and so does the answer. Reply with "
            "the rewritten question only.\n\nQuestion: {question}\nAnswer (do not reveal it): {answer}"
        ),
        "term": (
            "Choose the concept on which the question below turns. Make up an abstract mathematical term for it, "
            "define the term precisely, then state the whole question in that term. Nothing else changes, and the "
            "answer stays. Reply with the rewritten question only.\n\nQuestion: {question}\nAnswer (do not reveal it): "
            "{answer}"
        ),
        "sub-problem": (
            "Choose one number that the question below gives and that matters to its solution. Replace it by a "
            "self-contained problem, from any branch of mathematics, whose one answer is that number, so that it must "
            "be solved first. The rest stays, and so does the answer. Reply with the rewritten question only.\n\n"
            "Question: {question}\nAnswer (do not reveal it): {answer}"
        ),
    }
)
"""What to ask of a language model for each kind of reformulation; format with ``question`` and ``answer``. Verify that
a rewritten question has the old answer before training on it."""


@part("curriculum", "reformulations")
@dataclass(frozen=True)
class Reformulations(Uniform):
    """`Uniform` over the pool and the reformulations of its examples, each a prompt of its own and a group of its own.

    The k-th reformulation of example ``id`` is an example ``id/k`` with the same answer and columns and no worked
    solution. State as in `Uniform`. Raises UsageError for a column that is not a list of prompts.
    """

    def __call__(
        self, pool: Sequence[Example], *, prompts: int, group: int, generator: torch.Generator
    ) -> list[Request]:
        return super().__call__(_Expanded(pool), prompts=prompts, group=group, generator=generator)


class _Expanded(Sequence[Example]):
    """A pool with the reformulations after each of its examples; those that are drawn are made when they are."""

    def __init__(self, pool: Sequence[Example]) -> None:
        self.pool = pool
        self.ends = list(itertools.accumulate(1 + len(_given(example)) for example in pool))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        owner = bisect.bisect_right(self.ends, range(len(self))[index])
        example = self.pool[owner]
        number = index % len(self) - (self.ends[owner - 1] if owner else 0)
        if not number:
            return example
        return replace(
            example,
            id=f"{example.id}/{number}",
            prompt=_given(example)[number - 1],
            steps=(),
            completion=None,
            chosen=None,
            rejected=None,
        )


def _given(example: Example) -> Sequence[str]:
    found = example.columns.get(COLUMN) or ()
    if not isinstance(found, list | tuple):
        raise UsageError(
            f"column {COLUMN!r} of example {example.id!r} must be a list of prompts, got a {type(found).__name__}"
        )
    return found


def sub_sum(question: str, rng: random.Random) -> str | None:
    """The question with one of its numbers, 2 or more, as a sum of two: ``7+8=?`` -> ``3+4+8=?``, ``9-7`` -> ``9-3-4``.

    The value stays, and no intermediate result lies outside the range of the old ones and 0. None if there is no such
    number.
    """
    terms = [match for match in re.finditer(r"[+-]?[0-9]+", question) if abs(int(match.group())) >= 2]
    if not terms:
        return None
    term = rng.choice(terms)
    sign, size = re.fullmatch(r"([+-]?)([0-9]+)", term.group()).groups()  # type: ignore[union-attr]
    first = rng.randint(1, int(size) - 1)
    return f"{question[: term.start()]}{sign}{first}{sign or '+'}{int(size) - first}{question[term.end() :]}"

"""Arithmetic on a worksheet: judged by the answer, by the form in which it is worked, and by its length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from polopt.core.example import Example
from polopt.tasks.arithmetic import Arithmetic
from polopt.tasks.task import Judge


@dataclass(frozen=True)
class Worksheet(Arithmetic):
    """Prompts, answers and levels of :class:`Arithmetic`, and two rewards more, each 1 or 0.

    - ``format``: the completion is worked one operation per line item, with an item for every operation of the prompt;
      whether the items or the answer are right does not matter.
    - ``length``: the completion has at most ``limit`` = 20 characters.

    Worked solutions have 8 to 12 characters at level 1, 14 to 21 at level 2, 20 to 30 at level 3 and 26 to 39 at level
    4: the two agree below level 3 and are opposed, but for a few prompts, from there on. ``length`` is the easiest of
    the three (a bare answer earns it), and a completion that leaves items out can be right and short at every level.
    """

    name: str = "worksheet"
    limit: int = 20

    @property
    def rewards(self) -> Mapping[str, Judge]:
        """The rewards besides ``correct``."""
        return {"format": self._format, "length": self._length}

    def grade(self, completion: str, example: Example) -> float:
        """Mean of the three rewards."""
        judged = [judge(completion, example) for judge in (self.score, *self.rewards.values())]
        return sum(judged) / len(judged)

    def _format(self, completion: str, example: Example) -> float:
        items = completion.count(";")
        return float(items == len(example.steps) and self.strategy_of(completion) == "worked")

    def _length(self, completion: str, example: Example) -> float:
        return float(len(completion) <= self.limit)

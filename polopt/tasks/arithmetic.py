"""Chains of additions and subtractions, worked from left to right: ``7+8-5=?`` -> ``7+8=15;15-5=10;#10``."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from polopt.core.example import Example
from polopt.tasks.task import draw_examples, example_id, final_answer, with_answer

_INTEGER = re.compile(r"-?[0-9]{1,9}")
_WORKED = re.compile(r"([0-9]+[+-][0-9]+=-?[0-9]+;)+#[^;]*")
_SKIPPED = re.compile(r"([0-9]+([+-][0-9]+)+=-?[0-9]+;)+#[^;]*")
_TERM = re.compile(r"[+-]?[0-9]+")

_LARGEST_OPERAND = 15
_LARGEST_RESULT = 60


@dataclass(frozen=True)
class Arithmetic:
    """Level = number of operations. Operands are 1..15 and every running result is 0..60.

    Strategies: ``worked`` (one operation per step), ``shortcut`` (two operations in one step, where slips happen),
    ``direct`` (the answer at once, mostly near and wrong).
    """

    name: str = "arithmetic"
    levels: tuple[int, ...] = (1, 2, 3, 4)
    max_new_tokens: int = 56
    strategies: tuple[str, ...] = ("worked", "shortcut", "direct")
    shares: tuple[float, ...] = (0.27, 0.25, 0.48)

    def examples(
        self, count: int, *, seed: int, split: str = "train", levels: Sequence[int] | None = None
    ) -> list[Example]:
        return draw_examples(self, self._make, count, seed=seed, split=split, levels=levels)

    def _make(self, level: int, rng: random.Random) -> Example:
        total = rng.randint(1, _LARGEST_OPERAND)
        text, steps = str(total), []
        for _ in range(level):
            operand = rng.randint(1, _LARGEST_OPERAND)
            sign = rng.choice("+-")
            if total - operand < 0:
                sign = "+"
            elif total + operand > _LARGEST_RESULT:
                sign = "-"
            result = total + operand if sign == "+" else total - operand
            steps.append(f"{total}{sign}{operand}={result};")
            text += f"{sign}{operand}"
            total = result
        prompt = f"{text}=?\n"
        return Example(
            id=example_id(self.name, level, prompt),
            prompt=prompt,
            answer=str(total),
            steps=tuple(steps),
            columns={"level": level},
        )

    def score(self, completion: str, example: Example) -> float:
        """1.0 if the text after the last ``#`` is an integer equal to the answer."""
        answer = final_answer(completion)
        if answer is None or example.answer is None or not _INTEGER.fullmatch(answer):
            return 0.0
        return float(int(answer) == int(example.answer))

    def grade(self, completion: str, example: Example) -> float:
        """1 if right; else 1/2 less 1/20 for each unit that the integer answer is off, at least 0."""
        answer = final_answer(completion)
        if answer is None or example.answer is None or not _INTEGER.fullmatch(answer):
            return 0.0
        off = abs(int(answer) - int(example.answer))
        return max(0.0, 0.5 - 0.05 * off) if off else 1.0

    def demonstration(self, example: Example, strategy: str, rng: random.Random) -> str:
        truth = int(str(example.answer))
        if strategy == "worked":
            return with_answer(example.steps, str(truth))
        if strategy == "direct":
            return with_answer((), str(truth if rng.random() < 0.1 else _near(truth, rng)))
        terms = _TERM.findall(str(example.prompt))
        total, steps = int(terms[0]), []
        for start in range(1, len(terms), 2):
            chunk = terms[start : start + 2]
            result = total + sum(int(term) for term in chunk)
            # Most steps that skip a line slip; a lone operation is done as in `worked`.
            if len(chunk) == 2 and rng.random() < 0.6:
                result = _near(result, rng)
            steps.append(f"{total}{''.join(chunk)}={result};")
            total = result
        return with_answer(steps, str(total))

    def strategy_of(self, completion: str) -> str:
        if completion.startswith("#"):
            return "direct"
        if _WORKED.fullmatch(completion):
            return "worked"
        return "shortcut" if _SKIPPED.fullmatch(completion) else "other"


def _near(value: int, rng: random.Random) -> int:
    """A value close to, but not equal to, the given one, and not negative."""
    return rng.choice([near for gap in (1, 2, 3, 5, 10) for near in (value - gap, value + gap) if near >= 0])

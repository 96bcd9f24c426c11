"""Run a short program on a list of digits: ``sort,inc:527`` -> ``257>368>#368``."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from polopt.core.example import Example
from polopt.tasks.task import draw_examples, example_id, final_answer, with_answer

_SHORTEST_LIST, _LONGEST_LIST = 4, 6
_WORKED = re.compile(r"([0-9]+>)+#[^>]*")

OPERATIONS: Mapping[str, Callable[[str], str]] = {
    "sort": lambda digits: "".join(sorted(digits)),
    "rev": lambda digits: digits[::-1],
    "inc": lambda digits: "".join(str((int(digit) + 1) % 10) for digit in digits),
    "tail": lambda digits: digits[1:],
    "swap": lambda digits: digits[-1] + digits[1:-1] + digits[0],
}
"""List operations on 2 or more digits: ascending order, reversal, add 1 modulo 10, drop the first, swap the ends."""


@dataclass(frozen=True)
class Programs:
    """Level = number of operations, applied from left to right to a list of 4 to 6 digits.

    Strategies: ``worked`` (the list after every operation), ``hasty`` (the same after a ``?``, mostly with a slip),
    ``direct`` (the answer at once, mostly of one operation only).
    """

    name: str = "programs"
    levels: tuple[int, ...] = (1, 2, 3)
    max_new_tokens: int = 40
    strategies: tuple[str, ...] = ("worked", "hasty", "direct")
    shares: tuple[float, ...] = (0.25, 0.25, 0.5)

    def examples(
        self, count: int, *, seed: int, split: str = "train", levels: Sequence[int] | None = None
    ) -> list[Example]:
        return draw_examples(self, self._make, count, seed=seed, split=split, levels=levels)

    def _make(self, level: int, rng: random.Random) -> Example | None:
        digits = "".join(rng.choices("0123456789", k=rng.randint(_SHORTEST_LIST, _LONGEST_LIST)))
        names = rng.choices(tuple(OPERATIONS), k=level)
        lists = run_program(names, digits)
        if digits == lists[0] or any(before == after for before, after in pairwise(lists)):
            return None  # an operation that changes nothing says nothing about who can run it
        prompt = f"{','.join(names)}:{digits}\n"
        return Example(
            id=example_id(self.name, level, prompt),
            prompt=prompt,
            answer=lists[-1],
            steps=tuple(f"{result}>" for result in lists),
            columns={"level": level},
        )

    def score(self, completion: str, example: Example) -> float:
        """1.0 if the text after the last ``#`` is exactly the resulting list."""
        answer = final_answer(completion)
        return float(answer is not None and answer == example.answer)

    def grade(self, completion: str, example: Example) -> float:
        """1 if right; else half the share of digits of the result that are in their place."""
        if self.score(completion, example):
            return 1.0
        answer, right = final_answer(completion) or "", str(example.answer)
        matched = sum(a == b for a, b in zip(answer, right, strict=False))
        return 0.5 * matched / max(len(answer), len(right))

    def demonstration(self, example: Example, strategy: str, rng: random.Random) -> str:
        names, _, digits = str(example.prompt).strip().partition(":")
        if strategy == "worked":
            return with_answer(example.steps, str(example.answer))
        if strategy == "direct":
            if rng.random() < 0.1:
                return with_answer((), str(example.answer))
            guess = OPERATIONS[rng.choice(names.split(","))](digits)
            return with_answer((), _slip(guess, rng) if guess == example.answer else guess)
        # The slip is carried on by the operations after it.
        slipped = rng.randrange(len(example.steps))
        value, steps = digits, ["?"]
        for index, name in enumerate(names.split(",")):
            value = OPERATIONS[name](value)
            if index == slipped and rng.random() < 0.7:
                value = _slip(value, rng)
            steps.append(f"{value}>")
        return with_answer(steps, value)

    def strategy_of(self, completion: str) -> str:
        if completion.startswith("#"):
            return "direct"
        if completion.startswith("?") and _WORKED.fullmatch(completion[1:]):
            return "hasty"
        return "worked" if _WORKED.fullmatch(completion) else "other"


def run_program(names: Sequence[str], digits: str) -> list[str]:
    """The list after each operation."""
    lists = []
    for name in names:
        digits = OPERATIONS[name](digits)
        lists.append(digits)
    return lists


def _slip(digits: str, rng: random.Random) -> str:
    """One digit replaced by another."""
    at = rng.randrange(len(digits))
    other = rng.choice([digit for digit in "0123456789" if digit != digits[at]])
    return digits[:at] + other + digits[at + 1 :]

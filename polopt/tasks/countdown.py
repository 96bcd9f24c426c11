"""Reach a target with all the given numbers: ``3,5,7>22`` -> ``3*5=15;15+7=22;#3*5+7``. Many answers are right."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from polopt.core.example import Example
from polopt.tasks.task import draw_examples, example_id, final_answer, with_answer

_LARGEST_NUMBER = 12
_LARGEST_RESULT = 99
_LONGEST_EXPRESSION = 64
_TOKENS = re.compile(r"[1-9][0-9]{0,5}|[-+*/()]")
_PROMPT = re.compile(r"([0-9,]+)>([0-9]+)\n")
_STEP = r"[0-9]+[-+*][0-9]+=-?[0-9]+;"
_STRAIGHT = re.compile(rf"({_STEP})+#[^;]*")
_SEARCH = re.compile(rf"({_STEP}|x)+#[^;]*")


@dataclass(frozen=True)
class Countdown:
    """Level = how many numbers (1..12); each must be used exactly once, with ``+ - * /`` and parentheses.

    Strategies: ``straight`` (one chain of steps that hits the target), ``search`` (chains that miss end in ``x`` and
    another is tried), ``direct`` (an expression at once, mostly a guess).
    """

    name: str = "countdown"
    levels: tuple[int, ...] = (2, 3, 4)
    max_new_tokens: int = 96
    strategies: tuple[str, ...] = ("straight", "search", "direct")
    shares: tuple[float, ...] = (0.2, 0.3, 0.5)

    def examples(
        self, count: int, *, seed: int, split: str = "train", levels: Sequence[int] | None = None
    ) -> list[Example]:
        return draw_examples(self, self._make, count, seed=seed, split=split, levels=levels)

    def _make(self, level: int, rng: random.Random) -> Example:
        numbers = [rng.randint(1, _LARGEST_NUMBER) for _ in range(level)]
        steps, expression, target = _chain(numbers, rng)
        prompt = f"{','.join(str(number) for number in sorted(numbers))}>{target}\n"
        return Example(
            id=example_id(self.name, level, prompt),
            prompt=prompt,
            answer=expression,
            steps=tuple(steps),
            columns={"level": level, "target": target},
        )

    def score(self, completion: str, example: Example) -> float:
        """1.0 if the text after the last ``#`` is an expression over exactly the given numbers, equal to the target."""
        expression = final_answer(completion)
        asked = _PROMPT.fullmatch(str(example.prompt))
        if expression is None or asked is None:
            return 0.0
        evaluated = evaluate(expression)
        if evaluated is None:
            return 0.0
        value, used = evaluated
        given = sorted(int(number) for number in asked[1].split(","))
        return float(sorted(used) == given and value == int(asked[2]))

    def grade(self, completion: str, example: Example) -> float:
        """1 if right; else, for an expression of the given numbers, 1/2 less 1/20 for each unit off, at least 0."""
        evaluated = evaluate(final_answer(completion) or "")
        asked = _PROMPT.fullmatch(str(example.prompt))
        if evaluated is None or asked is None or sorted(evaluated[1]) != sorted(map(int, asked[1].split(","))):
            return 0.0
        off = abs(evaluated[0] - int(asked[2]))
        return float(max(Fraction(0), Fraction(1, 2) - off / 20)) if off else 1.0

    def demonstration(self, example: Example, strategy: str, rng: random.Random) -> str:
        numbers, target = _read(example)
        if strategy == "direct":
            right = rng.random() < 0.2
            return with_answer((), str(example.answer) if right else _chain(numbers, rng)[1])
        misses: list[str] = []
        if strategy == "search":
            for _ in range(rng.randint(1, 2)):
                steps, _, value = _chain(numbers, rng)
                if value != target:
                    misses += [*steps, "x"]
        return with_answer([*misses, *example.steps], str(example.answer))

    def strategy_of(self, completion: str) -> str:
        if completion.startswith("#"):
            return "direct"
        if _STRAIGHT.fullmatch(completion):
            return "straight"
        return "search" if _SEARCH.fullmatch(completion) else "other"


def evaluate(expression: str) -> tuple[Fraction, list[int]] | None:
    """Exact value and the numbers used, in order; None if malformed, too long (over 64 characters) or a division by 0.

    Grammar: ``sum = product (("+" | "-") product)*``, ``product = atom (("*" | "/") atom)*``,
    ``atom = number | "(" sum ")"``; numbers are positive integers without leading zeros, no blanks, no signs.
    """
    if len(expression) > _LONGEST_EXPRESSION:
        return None
    tokens = _TOKENS.findall(expression)
    if "".join(tokens) != expression:
        return None
    used: list[int] = []
    try:
        value, end = _sum(tokens, 0, used)
    except (_Malformed, ZeroDivisionError):
        return None
    return (value, used) if end == len(tokens) else None


class _Malformed(Exception):
    """The expression breaks the grammar."""


def _sum(tokens: list[str], at: int, used: list[int]) -> tuple[Fraction, int]:
    value, at = _product(tokens, at, used)
    while at < len(tokens) and tokens[at] in "+-":
        term, end = _product(tokens, at + 1, used)
        value, at = (value + term if tokens[at] == "+" else value - term), end
    return value, at


def _product(tokens: list[str], at: int, used: list[int]) -> tuple[Fraction, int]:
    value, at = _atom(tokens, at, used)
    while at < len(tokens) and tokens[at] in "*/":
        factor, end = _atom(tokens, at + 1, used)
        value, at = (value * factor if tokens[at] == "*" else value / factor), end
    return value, at


def _atom(tokens: list[str], at: int, used: list[int]) -> tuple[Fraction, int]:
    if at >= len(tokens):
        raise _Malformed
    if tokens[at].isdigit():
        used.append(int(tokens[at]))
        return Fraction(used[-1]), at + 1
    if tokens[at] != "(":
        raise _Malformed
    value, at = _sum(tokens, at + 1, used)
    if at >= len(tokens) or tokens[at] != ")":
        raise _Malformed
    return value, at + 1


def _read(example: Example) -> tuple[list[int], int]:
    left, _, right = str(example.prompt).strip().partition(">")
    return [int(number) for number in left.split(",")], int(right)


def _chain(numbers: Sequence[int], rng: random.Random) -> tuple[list[str], str, int]:
    """A random left-to-right chain over all numbers with results 1..99: its steps, its expression, its value."""
    first, *rest = rng.sample(list(numbers), len(numbers))
    value, expression, is_sum, steps = first, str(first), False, []
    for number in rest:
        choices = {"+": value + number, "-": value - number, "*": value * number}
        sign = rng.choice([sign for sign, result in choices.items() if 1 <= result <= _LARGEST_RESULT])
        if sign == "*" and is_sum:
            expression = f"({expression})"
        is_sum = sign != "*"
        expression += f"{sign}{number}"
        steps.append(f"{value}{sign}{number}={choices[sign]};")
        value = choices[sign]
    return steps, expression, value

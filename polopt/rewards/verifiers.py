"""Rewards that compare a completion with the known answer: 1 right, 0 wrong, None where there is no answer."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from polopt.core.errors import UsageError
from polopt.rewards.reward import RewardFunction
from polopt.rewards.texts import completion_text
from polopt.rewards.timeout import OutOfTime, call_with_timeout

_MARKER = "####"


def exact_match(argument: str | None = None) -> RewardFunction:
    """1 if the completion equals the answer, where runs of white space count as one space.

    With an argument, the completion is what follows the last occurrence of that text: ``exact-match:####``. A
    completion without it is wrong.
    """
    marker = argument

    def reward(completions: Sequence[Any], answer: Sequence[str | None], **columns: Any) -> list[float | None]:
        return [_matches(completion_text(said), gold, marker) for said, gold in zip(completions, answer, strict=True)]

    return reward


def _matches(said: str, gold: str | None, marker: str | None) -> float | None:
    if gold is None:
        return None
    if marker is not None:
        _, found, said = said.rpartition(marker)
        if not found:
            return 0.0
    return float(" ".join(said.split()) == " ".join(gold.split()))


def math_verify(argument: str | None = None) -> RewardFunction:
    r"""1 if the completion's final answer is mathematically the answer, by the package ``math-verify``.

    The final answer of a text with ``\boxed{}`` is what the boxes hold; otherwise the line after the last ``####``;
    otherwise what the package finds, which prefers the end of the text. ``1,234`` equals ``1234`` and ``0.5`` equals
    ``\frac{1}{2}``. A completion without an answer is wrong (0). An answer of the dataset that cannot be parsed
    gives None. The argument is the time limit per completion in seconds, 5 by default: ``math-verify:10``. A
    comparison that overruns it gives None too: a completion such as ``9**9**9**9`` is undecided, neither wrong nor a
    fault of the reward that should end the run.
    """
    seconds = 5.0 if argument is None else _positive(argument, "math-verify:SECONDS")
    # Its own limits use signal.alarm, which works on the main thread only and would clear the alarm of a caller.
    for name in ("math_verify.parser", "math_verify.grader"):
        logger = logging.getLogger(name)
        if _is_not_about_timeouts not in logger.filters:
            logger.addFilter(_is_not_about_timeouts)

    def reward(completions: Sequence[Any], answer: Sequence[str | None], **columns: Any) -> list[float | None]:
        return [
            None if gold is None else _within(seconds, completion_text(said), gold)
            for said, gold in zip(completions, answer, strict=True)
        ]

    return reward


def _within(seconds: float, said: str, gold: str) -> float | None:
    try:
        return call_with_timeout(partial(_is_equal, said, gold), seconds)
    except OutOfTime:
        return None


def _is_not_about_timeouts(record: logging.LogRecord) -> bool:
    return "Timeout is disabled" not in record.getMessage()


def _is_equal(said: str, gold: str) -> float | None:
    from math_verify import verify  # here, because it imports sympy

    expected = _parse_gold(gold)
    if not expected:
        return None
    return float(verify(expected, _parse_final(said), timeout_seconds=None))


def _parse_gold(gold: str) -> list[Any]:
    if "\\boxed" in gold or _MARKER in gold or "$" in gold:
        return _parse_final(gold)
    # Without delimiters only the first number of "x^2 + 1" would be found.
    return _parse(f"\\boxed{{{gold}}}") or _parse(gold)


def _parse_final(text: str) -> list[Any]:
    if "\\boxed" not in text:
        _, marker, tail = text.rpartition(_MARKER)
        if marker and tail.strip():
            found = _parse(tail.strip().splitlines()[0])
            if found:
                return found
    return _parse(text)


def _parse(text: str) -> list[Any]:
    from math_verify import parse

    parsed: list[Any] = parse(text, parsing_timeout=None)
    return parsed


def matches(argument: str | None = None) -> RewardFunction:
    """1 if the regular expression is found anywhere in the completion: ``regex:PATTERN``."""
    if not argument:
        raise UsageError("reward 'regex' needs a pattern: regex:PATTERN")
    pattern = compile_pattern(argument)

    def reward(completions: Sequence[Any], **columns: Any) -> list[float]:
        return [float(pattern.search(completion_text(said)) is not None) for said in completions]

    return reward


def compile_pattern(text: str, flags: re.RegexFlag = re.NOFLAG) -> re.Pattern[str]:
    """The compiled pattern.

    Raises:
        UsageError: it is not a regular expression.
    """
    try:
        return re.compile(text, flags)
    except re.error as error:
        raise UsageError(f"{text!r} is not a regular expression: {error}") from error


def _positive(text: str, form: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise UsageError(f"{text!r} in {form} must be a positive number")
    return number

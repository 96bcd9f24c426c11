"""Rewards for how a completion is written, whatever it says."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from polopt.core.errors import UsageError
from polopt.rewards.reward import RewardFunction
from polopt.rewards.texts import completion_text
from polopt.rewards.verifiers import compile_pattern

_TAGS = re.compile(r"[A-Za-z][\w-]*(,[A-Za-z][\w-]*)*")


def formatted(argument: str | None = None) -> RewardFunction:
    """1 if the whole completion has the format.

    The argument is a list of tags, ``format:think,answer`` (the default): each tag opens and closes exactly once, in
    that order, with only white space outside. Anything that is not such a list is a regular expression that the whole
    completion must match; in it, ``.`` matches line ends too.
    """
    text = argument or "think,answer"
    if not _TAGS.fullmatch(text):
        pattern = compile_pattern(text, re.DOTALL)
        return _per_completion(lambda said: float(pattern.fullmatch(said) is not None))
    tags = text.split(",")
    return _per_completion(lambda said: float(_is_tagged(said, tags)))


def _is_tagged(said: str, tags: Sequence[str]) -> bool:
    if any(said.count(f"<{tag}>") != 1 or said.count(f"</{tag}>") != 1 for tag in tags):
        return False
    rest = said
    for tag in tags:
        before, _, rest = rest.partition(f"<{tag}>")
        _, closed, rest = rest.partition(f"</{tag}>")
        if before.strip() or not closed:
            return False
    return not rest.strip()


def _per_completion(judge: Any) -> RewardFunction:
    def reward(completions: Sequence[Any], **columns: Any) -> list[float]:
        return [judge(completion_text(said)) for said in completions]

    return reward


def length(argument: str | None = None) -> RewardFunction:
    """``r = max(0, 1 - |L - T| / T)`` for a completion of L tokens and the target T: ``length:200``.

    1 at the target, falling linearly to 0 at no tokens and at twice the target.
    """
    if argument is None or not argument.isdecimal() or int(argument) < 1:
        raise UsageError(f"reward 'length' needs a target in tokens, at least 1: length:200, but got {argument!r}")
    target = int(argument)

    def reward(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
        return [max(0.0, 1.0 - abs(len(ids) - target) / target) for ids in completion_ids]

    return reward

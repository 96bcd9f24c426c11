"""One item of a task or dataset, before any policy has seen it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

Message = Mapping[str, str]
"""One chat message: ``{"role": ..., "content": ...}``."""

Text = str | tuple[Message, ...]
"""Plain text, or a chat that a tokenizer's template renders."""


@dataclass(frozen=True)
class Example:
    """A prompt and whatever is known about its answer.

    ``id`` is stable and unique within its pool: statistics that persist per prompt are keyed by it. ``answer`` is what
    a verifier compares with, ``steps`` a worked solution with one entry per step, ``columns`` every other column of a
    dataset row; reward functions receive them as keyword lists.

    Answers that are known already: a pair is ``chosen`` and ``rejected``; a list is ``completions`` with one of
    ``labels`` each, any grades, higher being preferred; a single is a ``completion`` with the ``label`` true or false;
    a demonstration is a ``completion`` without one. `answers_of` reads them all.
    """

    id: str
    prompt: Text
    answer: str | None = None
    steps: tuple[str, ...] = ()
    completion: Text | None = None
    chosen: Text | None = None
    rejected: Text | None = None
    label: bool | None = None
    completions: tuple[Text, ...] = ()
    labels: tuple[float, ...] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)


def answers_of(example: Example) -> tuple[tuple[Text, float], ...]:
    """Every answer that an example brings, with its label; higher is preferred, comparable within the example alone.

    The list where there is one, else the pair (1 and 0), else the single (1, or 0 where its label is false); nothing
    where the example has no answers.
    """
    if example.completions:
        return tuple(zip(example.completions, map(float, example.labels), strict=True))
    if example.chosen is not None and example.rejected is not None:
        return (example.chosen, 1.0), (example.rejected, 0.0)
    if example.completion is not None:
        return ((example.completion, 0.0 if example.label is False else 1.0),)
    return () if example.chosen is None else ((example.chosen, 1.0),)


def plain(examples: Sequence[Example]) -> list[dict[str, Any]]:
    """Examples as dicts of their fields, which a checkpoint can hold where it can hold their ``columns``."""
    return [{f.name: getattr(example, f.name) for f in fields(Example)} for example in examples]


def from_plain(rows: Sequence[Mapping[str, Any]]) -> tuple[Example, ...]:
    """The examples that `plain` wrote."""
    return tuple(Example(**row) for row in rows)

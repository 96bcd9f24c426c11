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
    """

    id: str
    prompt: Text
    answer: str | None = None
    steps: tuple[str, ...] = ()
    completion: Text | None = None
    chosen: Text | None = None
    rejected: Text | None = None
    label: bool | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)


def plain(examples: Sequence[Example]) -> list[dict[str, Any]]:
    """Examples as dicts of their fields, which a checkpoint can hold where it can hold their ``columns``."""
    return [{f.name: getattr(example, f.name) for f in fields(Example)} for example in examples]


def from_plain(rows: Sequence[Mapping[str, Any]]) -> tuple[Example, ...]:
    """The examples that `plain` wrote."""
    return tuple(Example(**row) for row in rows)

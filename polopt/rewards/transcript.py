"""What a reward sees of one trajectory."""

from __future__ import annotations

from dataclasses import dataclass

from polopt.core.example import Example, Text


@dataclass(frozen=True)
class Transcript:
    """One prompt and the completion a policy gave.

    ``prompt`` is what the policy was shown, which a hint may have made longer than ``example.prompt``. ``truncated``:
    a length limit cut the completion.
    """

    example: Example
    prompt: Text
    completion: str
    completion_ids: tuple[int, ...]
    truncated: bool = False

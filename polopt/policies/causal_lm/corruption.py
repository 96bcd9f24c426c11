"""Prompts whose observation is partly blanked out: what a view of the policy conditions on."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from polopt.core.errors import UsageError
from polopt.core.example import Example
from polopt.core.policy import Corruption
from polopt.policies.causal_lm.payload import TokenPayload
from polopt.policies.sampling import uniforms

OBSERVATION = "observation"
"""Column of an example that holds the part of its prompt that may be blanked."""


def blank_id(tokenizer: Any, blank: str) -> int:
    """The one token that ``blank`` is. Raises UsageError when it is none or several."""
    ids = list(tokenizer(blank, add_special_tokens=False)["input_ids"])
    if len(ids) != 1:
        raise UsageError(
            f"the blank {blank!r} of a corrupted prompt is {len(ids)} tokens of this tokenizer; choose a text that is "
            f"one token"
        )
    return int(ids[0])


def observed(
    tokenizer: Any,
    text: str,
    ids: Sequence[int],
    example: Example,
    offsets: Callable[[], Sequence[tuple[int, int]]],
) -> list[int]:
    """Places of the observation's tokens in ``ids``, the tokens of the rendered prompt ``text``.

    They are the tokens that overlap the first occurrence of the example's column ``observation``, or without such a
    column all of the prompt; special tokens never. ``offsets()`` says where in the text each token lies. Raises
    UsageError naming the example when the prompt lacks its observation, or the tokenizer cannot say where tokens lie.
    """
    special = set(tokenizer.all_special_ids)
    whole = [place for place, token in enumerate(ids) if token not in special]
    given = example.columns.get(OBSERVATION)
    if not given:
        return whole
    start = text.find(str(given))
    if start < 0:
        raise UsageError(
            f"the observation of example {example.id!r} is no part of its prompt: {str(given)[:60]!r} is not in "
            f"{text[:60]!r}"
        )
    if not getattr(tokenizer, "is_fast", False):
        raise UsageError(
            f"example {example.id!r} has an observation, but the tokenizer is slow and does not say where tokens lie; "
            f"use a fast tokenizer, or leave the column {OBSERVATION!r} out to corrupt the whole prompt"
        )
    spans = offsets()
    end = start + len(str(given))
    return [place for place in whole if spans[place][0] < end and spans[place][1] > start]


def corrupted(
    payload: TokenPayload,
    corruption: Corruption,
    version: int,
    blank: int,
    places: Callable[[int], Sequence[int]],
) -> TokenPayload:
    """The payload with its own spoilt prompt for every trajectory; ``places(i)`` may be blanked in trajectory i.

    Which of them are is a function of the seed, the version, and the tokens of prompt and completion alone.
    """
    prompts = []
    for index, owner in enumerate(payload.prompt_of.tolist()):
        prompt, chosen = list(payload.prompts[owner]), torch.tensor(places(index), dtype=torch.int64)
        key = (corruption.seed, version, prompt, list(payload.completion_ids[index]))
        digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
        seed = torch.tensor(int.from_bytes(digest, "big") >> 1)
        hit = uniforms(seed.expand(chosen.shape), chosen) < corruption.probability
        for place in chosen[hit].tolist():
            prompt[place] = blank
        prompts.append(tuple(prompt))
    return dataclasses.replace(payload, prompts=tuple(prompts), prompt_of=torch.arange(len(prompts)))

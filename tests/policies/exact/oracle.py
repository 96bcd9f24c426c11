"""Sequences, prefixes and probabilities by brute force, in plain Python."""

from __future__ import annotations

import itertools
import math
from functools import cache

import torch
from torch import Tensor

from polopt.policies.exact import ExactPolicy, SequenceSpace

SPACES = [
    SequenceSpace(2, 1),
    SequenceSpace(3, 3),
    SequenceSpace(2, 1, end=True),
    SequenceSpace(2, 4, end=True),
    SequenceSpace(3, 3, end=True),
    SequenceSpace(4, 2, end=True),
]


def ids(space: SequenceSpace) -> str:
    return f"V{space.vocabulary}H{space.length}{'end' if space.end else ''}"


@cache
def all_sequences(space: SequenceSpace) -> list[tuple[int, ...]]:
    """Every sequence, in no particular order."""
    found = set()
    for word in itertools.product(range(space.vocabulary), repeat=space.length):
        if space.end and space.vocabulary - 1 in word:
            word = word[: word.index(space.vocabulary - 1) + 1]
        found.add(word)
    return sorted(found)


@cache
def all_prefixes(space: SequenceSpace) -> list[tuple[int, ...]]:
    """Every prefix after which a token is chosen, in the documented order of nodes."""
    return sorted({word[:t] for word in all_sequences(space) for t in range(len(word))}, key=lambda w: (len(w), w))


def probability(space: SequenceSpace, table: Tensor, word: tuple[int, ...]) -> float:
    """p(word) under the logits [K, V] of one problem."""
    node = {prefix: number for number, prefix in enumerate(all_prefixes(space))}
    value = 1.0
    for t, token in enumerate(word):
        logits = table[node[word[:t]]].tolist()
        value *= math.exp(logits[token]) / sum(map(math.exp, logits))
    return value


def word(space: SequenceSpace, number: int) -> tuple[int, ...]:
    """Tokens of a numbered sequence."""
    return tuple(space.sequences[number, : int(space.lengths[number])].tolist())


def random_policy(space: SequenceSpace, problems: int = 2, head: str = "tabular", seed: int = 0) -> ExactPolicy:
    """Normal logits."""
    shape = ExactPolicy(space, problems, head=head).logits.shape
    generator = torch.Generator().manual_seed(seed)
    return ExactPolicy(space, problems, torch.randn(shape, generator=generator, dtype=torch.float64), head=head)


def random_reward(space: SequenceSpace, problems: int = 2, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(problems, space.n_sequences, generator=generator, dtype=torch.float64)

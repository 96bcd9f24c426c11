"""The enumeration against itertools."""

from __future__ import annotations

import pytest
import torch

from polopt.core.errors import UsageError
from polopt.policies.exact import SequenceSpace
from tests.policies.exact.oracle import SPACES, all_prefixes, all_sequences, ids, word

every_space = pytest.mark.parametrize("space", SPACES, ids=ids)


@every_space
def test_every_sequence_is_enumerated_once(space: SequenceSpace) -> None:
    found = [word(space, s) for s in range(space.n_sequences)]
    assert len(set(found)) == len(found) == len(space.sequences)
    assert set(found) == set(all_sequences(space))


@every_space
def test_sequences_are_ordered_by_the_length_of_their_prefix_then_by_tokens(space: SequenceSpace) -> None:
    found = [word(space, s) for s in range(space.n_sequences)]
    assert found == sorted(found, key=lambda w: (len(w), w))


@every_space
def test_nodes_are_the_prefixes_in_order(space: SequenceSpace) -> None:
    prefixes = all_prefixes(space)
    assert space.n_nodes == len(prefixes)
    assert space.depths.tolist() == [len(p) for p in prefixes]
    assert space.previous.tolist() == [p[-1] if p else -1 for p in prefixes]
    for s in range(space.n_sequences):
        w = word(space, s)
        assert space.nodes[s, : len(w)].tolist() == [prefixes.index(w[:t]) for t in range(len(w))]
        assert space.nodes[s, len(w) :].tolist() == [0] * (space.length - len(w))
        assert space.sequences[s, len(w) :].tolist() == [-1] * (space.length - len(w))


@every_space
def test_child_leads_to_the_longer_prefix(space: SequenceSpace) -> None:
    prefixes = all_prefixes(space)
    for prefix in prefixes:
        if prefix:
            parent = torch.tensor(prefixes.index(prefix[:-1]))
            assert int(space.child(parent, torch.tensor(prefix[-1]))) == prefixes.index(prefix)


@every_space
def test_sequences_are_found_by_their_tokens(space: SequenceSpace) -> None:
    for s in range(space.n_sequences):
        assert space.index(word(space, s)) == s
    words = set(all_sequences(space))
    for prefix in all_prefixes(space):
        assert space.index(prefix) == -1
        for token in range(space.vocabulary):
            node = torch.tensor(all_prefixes(space).index(prefix))
            number = int(space.sequence_of(node, torch.tensor(token)))
            assert (number >= 0) == ((*prefix, token) in words)
            assert number < 0 or word(space, number) == (*prefix, token)
    assert space.index([space.vocabulary]) == space.index([-1]) == space.index([0] * (space.length + 1)) == -1


def test_a_sequence_is_cut_only_where_an_end_token_is_missing() -> None:
    assert not SequenceSpace(3, 3).truncated.any()
    space = SequenceSpace(3, 3, end=True)
    cut = [word(space, s) for s in range(space.n_sequences) if space.truncated[s]]
    assert cut == [w for w in all_sequences(space) if 2 not in w]
    assert space.index([2, 0]) == -1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 3), "vocabulary of at least 2"),
        ((2, 0), "length of at least 1"),
        ((10, 9), "10 tokens and length 9"),
        ((3, 10**9), "more sequences than can be enumerated"),
    ],
)
def test_spaces_that_cannot_be(arguments: tuple[int, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SequenceSpace(*arguments)

"""All sequences over a small vocabulary, and the tree of their prefixes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from polopt.core.errors import UsageError

PADDING: Final = -1
LARGEST: Final = 2**24
"""Most tokens that all sequences of a space may have together: what is enumerated must fit in memory."""


@dataclass(frozen=True)
class SequenceSpace:
    """Every sequence over tokens 0 .. V-1 that a policy can write, S in all, and their K prefixes (nodes).

    Without ``end`` every sequence has H tokens and S = V^H. With ``end`` the last token of the vocabulary, V-1, ends a
    sequence and is its last token; a sequence without it is cut after H tokens, so that lengths run from 1 to H and
    S = 1 + c + ... + c^(H-2) + c^(H-1) V with c = V-1.

    Nodes are the prefixes after which a token is chosen, numbered by depth and then by their tokens: the empty prefix
    is 0 and the child of node n by token a is n c + 1 + a (c = V without ``end``). Sequences are numbered by length of
    the prefix before their last token, then by tokens.

    Raises UsageError for V < 2, H < 1, or S H > 2^24.
    """

    vocabulary: int
    length: int
    end: bool = False

    def __post_init__(self) -> None:
        if self.vocabulary < 2:
            raise UsageError(f"a sequence space needs a vocabulary of at least 2 tokens, got {self.vocabulary}")
        if self.length < 1:
            raise UsageError(f"sequences need a length of at least 1, got {self.length}")
        # In logarithms: 10^(10^9) would never return.
        if math.log(self.length) + (self.length - 1) * math.log(self.branching) + math.log(self.vocabulary) > math.log(
            LARGEST
        ):
            raise UsageError(
                f"{self.vocabulary} tokens and length {self.length} give more sequences than can be enumerated; make "
                f"either smaller"
            )

    @property
    def branching(self) -> int:
        """Tokens after which a sequence goes on: c = V, or V-1 with an end token."""
        return self.vocabulary - 1 if self.end else self.vocabulary

    @property
    def end_token(self) -> int | None:
        """The token that ends a sequence, or None."""
        return self.vocabulary - 1 if self.end else None

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First node of each depth 0 .. H-1, and K."""
        found = [0]
        for depth in range(self.length):
            found.append(found[-1] + self.branching**depth)
        return tuple(found)

    @property
    def n_nodes(self) -> int:
        """K."""
        return self.starts[-1]

    @property
    def n_sequences(self) -> int:
        """S."""
        return self.early + int(self.branching ** (self.length - 1)) * self.vocabulary

    @property
    def early(self) -> int:
        """Sequences that end before H tokens; they come first, in the order of the nodes at which they end."""
        return self.starts[self.length - 1] if self.end else 0

    # --- the enumeration ----------------------------------------------------------------------------------------

    @cached_property
    def _enumerated(self) -> tuple[Tensor, Tensor]:
        tokens, nodes = [], []
        for depth in range(self.length):
            last = depth == self.length - 1
            if not last and not self.end:
                continue
            actions = torch.arange(self.vocabulary) if last else torch.tensor([self.vocabulary - 1])
            prefix = torch.arange(self.branching**depth)
            # Node of the prefix at each depth, and the token that leads from one to the next.
            ranks = [prefix // self.branching ** (depth - step) for step in range(depth + 1)]
            path = torch.stack([rank + start for rank, start in zip(ranks, self.starts, strict=False)], dim=1)
            digits = [rank % self.branching for rank in ranks[1:]]
            written = torch.stack(digits, dim=1) if digits else prefix.new_zeros(len(prefix), 0)
            count = len(actions)
            chosen = actions.repeat(len(prefix))[:, None]
            rest = self.length - depth - 1
            pad = chosen.new_full((len(chosen), rest), PADDING)
            tokens.append(torch.cat([written.repeat_interleave(count, 0), chosen, pad], dim=1))
            nodes.append(torch.cat([path.repeat_interleave(count, 0), pad.clamp_min(0)], dim=1))
        return torch.cat(tokens), torch.cat(nodes)

    @property
    def sequences(self) -> Int[Tensor, "sequence time"]:
        """Tokens of every sequence [S, H], -1 after its end."""
        return self._enumerated[0]

    @property
    def nodes(self) -> Int[Tensor, "sequence time"]:
        """Node at which each token is chosen [S, H], 0 after the end."""
        return self._enumerated[1]

    @cached_property
    def mask(self) -> Bool[Tensor, "sequence time"]:
        """Where a sequence has a token [S, H]."""
        return self.sequences != PADDING

    @cached_property
    def lengths(self) -> Int[Tensor, " sequence"]:
        """Tokens of each sequence [S], its end token included."""
        return self.mask.sum(1)

    @cached_property
    def truncated(self) -> Bool[Tensor, " sequence"]:
        """Sequences that H cut before their end token [S]; none where there is no end token."""
        if self.end_token is None:
            return torch.zeros(self.n_sequences, dtype=torch.bool)
        return (self.sequences[:, -1] != self.end_token) & (self.lengths == self.length)

    @cached_property
    def depths(self) -> Int[Tensor, " node"]:
        """Tokens in the prefix of each node [K]."""
        sizes = torch.tensor(self.starts).diff()
        return torch.arange(self.length).repeat_interleave(sizes)

    @cached_property
    def previous(self) -> Int[Tensor, " node"]:
        """Last token of the prefix of each node [K], -1 at the root."""
        return torch.where(self.depths > 0, (torch.arange(self.n_nodes) - 1) % self.branching, PADDING)

    # --- finding one's way --------------------------------------------------------------------------------------

    def child(self, node: Int[Tensor, "*any"], token: Int[Tensor, "*any"]) -> Int[Tensor, "*any"]:
        """The node after a token that does not end the sequence; only meaningful above depth H-1."""
        return node * self.branching + 1 + token

    def node_of(self, prefix: Sequence[int]) -> int:
        """The node after these tokens.

        Raises UsageError where they are no prefix of the space: a token outside it, an end, or nothing left to choose.
        """
        node = 0
        for token in prefix:
            if not 0 <= token < self.branching:
                raise UsageError(
                    f"prefix {tuple(prefix)} has the token {token}; a sequence goes on after 0 .. {self.branching - 1}"
                )
            node = node * self.branching + 1 + token
        if len(prefix) >= self.length:
            raise UsageError(f"prefix {tuple(prefix)} fills the {self.length} tokens of the space; nothing can follow")
        return node

    def sequence_of(self, node: Int[Tensor, "*any"], token: Int[Tensor, "*any"]) -> Int[Tensor, "*any"]:
        """Number of the sequence that choosing ``token`` at ``node`` completes, -1 where it completes none."""
        deepest = self.starts[self.length - 1]
        late = self.early + (node - deepest) * self.vocabulary + token
        ended = token == self.vocabulary - 1 if self.end else torch.zeros_like(token, dtype=torch.bool)
        return torch.where(node >= deepest, late, torch.where(ended, node, PADDING))

    def index(self, tokens: Sequence[int]) -> int:
        """Number of the sequence with these tokens, -1 where it is none of the space (unfinished, say)."""
        node = 0
        for token in tokens[:-1]:
            if not 0 <= token < self.branching:
                return PADDING
            node = node * self.branching + 1 + token
        if not 0 < len(tokens) <= self.length or not 0 <= tokens[-1] < self.vocabulary:
            return PADDING
        # Without tensors: rewards look up one trajectory at a time.
        deepest = self.starts[self.length - 1]
        if len(tokens) == self.length:
            return self.early + (node - deepest) * self.vocabulary + tokens[-1]
        return node if tokens[-1] == self.end_token else PADDING

"""Sequences as one row without padding: every token once, a shared prompt once, attention within each sequence.

Linear layers, norms and everything else that treats tokens one by one see the N tokens of a batch in one row. Attention
alone needs to know which sequence a token belongs to: it is polopt's own function of Hugging Face's attention interface
and works on buckets of sequences of similar length, padded there only. It computes softmax(q k^T scaling) v by torch's
scaled dot product, for architectures whose attention is that and nothing more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

NAME: Final = "polopt_packed"
"""Under which Hugging Face finds the attention function."""

_CALL: Final = {"cpu": 256, "cuda": 4096}
"""About how many padded positions of attention take as long as one more call of it does at least."""


@dataclass(frozen=True, eq=False)
class Bucket:
    """Sequences of similar length in one attention call: places of their tokens in the row, and which are real.

    ``past`` are the places of what each sequence goes on after (a prompt that others share), None where that is
    nothing.
    """

    own: Int[Tensor, "sequence time"]
    real: Bool[Tensor, "sequence time"]
    past: Int[Tensor, "sequence before"] | None = None
    past_real: Bool[Tensor, "sequence before"] | None = None

    @cached_property
    def mask(self) -> Bool[Tensor, "sequence 1 time key"] | None:
        """What each token may look at; None for all before it in its own sequence."""
        if self.past is None or self.past_real is None:
            return None
        count, time = self.own.shape
        causal = torch.ones(time, time, dtype=torch.bool, device=self.own.device).tril()
        before = self.past_real[:, None].expand(count, time, self.past.shape[1])
        return torch.cat((before, causal.expand(count, time, time)), -1)[:, None]

    @cached_property
    def places(self) -> Int[Tensor, " token"]:
        """Flat places of the real tokens among sequence times time."""
        return self.real.flatten().nonzero().flatten()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scaling: float | None) -> Float[Tensor, "token head size"]:
        """Attention of the bucket's real tokens; q, k and v are those of the whole row, [N, head, size]."""
        seen = self.own if self.past is None else torch.cat((self.past, self.own), 1)
        queries, keys, values = _rows(q, self.own), _rows(k, seen), _rows(v, seen)
        shared = queries.shape[1] // keys.shape[1]
        if shared > 1:
            keys, values = keys.repeat_interleave(shared, 1), values.repeat_interleave(shared, 1)
        out = nn.functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=self.mask, is_causal=self.mask is None, scale=scaling
        )
        return out.transpose(1, 2).flatten(0, 1).index_select(0, self.places)


def _rows(x: Tensor, places: Tensor) -> Tensor:
    """[N, head, size] at places [sequence, time] as [sequence, head, time, size]."""
    return x.index_select(0, places.flatten()).view(*places.shape, *x.shape[1:]).transpose(1, 2)


@dataclass(frozen=True, eq=False)
class Packing:
    """N tokens in a row: their ids and positions, and the buckets in which they attend to each other."""

    ids: Int[Tensor, " token"]
    positions: Int[Tensor, " token"]
    buckets: tuple[Bucket, ...]

    @classmethod
    def of(
        cls,
        sequences: Sequence[Tensor],
        after: Sequence[int | None] | None = None,
        device: torch.device | str = "cpu",
    ) -> Packing:
        """Sequences of token ids, one after the other in the row; ``after[i]`` is the sequence that i goes on after.

        That one goes on after none itself.
        """
        lengths = torch.tensor([len(sequence) for sequence in sequences], dtype=torch.int64)
        starts = lengths.cumsum(0) - lengths
        parents = [None] * len(sequences) if after is None else list(after)
        before = torch.tensor([0 if p is None else len(sequences[p]) for p in parents], dtype=torch.int64)
        within = torch.arange(int(lengths.sum())) - starts.repeat_interleave(lengths)
        made = []
        # A prompt for several and a sequence for itself see different things: never in one bucket.
        kinds = ([i for i, p in enumerate(parents) if p is None], [i for i, p in enumerate(parents) if p is not None])
        call = _CALL["cpu" if torch.device(device).type == "cpu" else "cuda"]
        for kind in kinds:
            for members in buckets_of([int(lengths[i]) for i in kind], call):
                chosen = torch.tensor([kind[i] for i in members])
                own, real = _grid(starts[chosen], lengths[chosen])
                if not own.shape[1]:
                    continue
                past: tuple[Tensor, ...] = ()
                if parents[int(chosen[0])] is not None:
                    owners = torch.tensor([parents[i] for i in chosen.tolist()])
                    past = _grid(starts[owners], lengths[owners])
                made.append(Bucket(*(x.to(device) for x in (own, real, *past))))
        positions = within + before.repeat_interleave(lengths)
        ids = torch.cat(list(sequences)) if len(sequences) else torch.zeros(0, dtype=torch.int64)
        return cls(ids.to(device), positions.to(device), tuple(made))

    @cached_property
    def order(self) -> Int[Tensor, " token"]:
        """Where each token of the row lies in the buckets' outputs, one after the other."""
        found = torch.cat([bucket.own.flatten().index_select(0, bucket.places) for bucket in self.buckets])
        back = torch.empty_like(found)
        back[found] = torch.arange(len(found), device=found.device)
        return back

    def states(self, trunk: Any) -> Float[Tensor, "token hidden"]:
        """Final hidden states of the tokens."""
        token = _PACKING.set(self)
        try:
            with _attention(trunk.config):
                out = trunk(
                    input_ids=self.ids[None], position_ids=self.positions[None], attention_mask=None, use_cache=False
                )
        finally:
            _PACKING.reset(token)
        states: Tensor = out.last_hidden_state[0]
        return states


def buckets_of(lengths: Sequence[int], call: int) -> list[list[int]]:
    """Indices in falling order of length, cut wherever narrower rows save more than ``call`` padded positions."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    sizes = torch.tensor([lengths[i] for i in order])

    def cut(start: int, end: int) -> list[tuple[int, int]]:
        run = sizes[start:end]
        saved = (run[0] - run) * torch.arange(len(run), 0, -1)
        best = int(saved.argmax())
        if int(saved[best]) <= call:
            return [(start, end)]
        return [*cut(start, start + best), *cut(start + best, end)]

    return [order[start:end] for start, end in cut(0, len(order))] if order else []


def _grid(starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Places of sequences, one a line, and which are real; the others are place 0."""
    steps = torch.arange(int(lengths.max()))[None]
    real = steps < lengths[:, None]
    return torch.where(real, starts[:, None] + steps, 0), real


_PACKING: ContextVar[Packing | None] = ContextVar("packing", default=None)


@contextmanager
def _attention(config: Any) -> Iterator[None]:
    # Set past the property, which would reach into other models' parts of the configuration.
    before = config._attn_implementation_internal
    config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        config._attn_implementation_internal = before


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    packing = _PACKING.get()
    unknown = [name for name in ("sliding_window", "softcap", "s_aux", "head_mask") if more.get(name) is not None]
    if packing is None or attention_mask is not None or unknown:
        raise NotImplementedError(f"packed attention knows nothing of {', '.join(unknown) or 'a mask'}")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    pieces = [bucket.attend(q, k, v, scaling) for bucket in packing.buckets]
    return torch.cat(pieces).index_select(0, packing.order)[None], None


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, lambda *_, **__: None)

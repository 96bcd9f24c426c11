"""Batched autoregressive decoding straight from a Hugging Face module's own weights.

Prompts are prefilled once and shared by their trajectories. Rows live in slots of a static key/value memory, aligned
at their newest token: every row writes the same column, so that a step is a slice write, and the attended window is
as wide as the longest row. A row that ends frees its slot for a waiting trajectory, or the last rows move into the
gaps and the batch shrinks.

Sampler and learner are the same weights: nothing is copied that outlives a call. The randomness of a trajectory is a
pure function of its seed and step, so that it does not depend on neighbours, order or ``max_rows`` (beyond the
rounding of floating-point kernels, which may differ with the batch size).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from polopt.core.errors import UsageError
from polopt.core.policy import Sampling
from polopt.policies.causal_lm.fallback import Companion, MaskPolicy, decode_with_generate, evaluating
from polopt.policies.causal_lm.families import Network, hidden_states, logits, read, rotary_table, supports, unwrap
from polopt.policies.causal_lm.generations import Generations, Progress, Recorder, Request, check_request
from polopt.policies.sampling import draw, uniforms

__all__ = ["Generations", "Sampling", "decode", "decode_with_generate", "generate", "supports"]

PREFILL_TOKENS = 8192
"""Padded prompt tokens in one prefill pass: bounds the activations."""

INSPECT_EVERY = {"cpu": 1}
"""Steps between looks at which rows ended, 8 on other devices: there a look waits for everything queued."""

UNIFORM_STEPS = 16
"""Random numbers are made for this many steps at a time."""


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    counts: Sequence[int],
    seeds: Int[Tensor, "trajectory"],
    sampling: Sampling,
    *,
    eos_ids: Sequence[int],
    tokenizer: Any = None,
    entropy: bool = False,
    max_rows: int = 256,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    limits: Sequence[int | None] | None = None,
    mask: MaskPolicy | None = None,
    mixture: Companion | None = None,
) -> Generations:
    """``decode`` where the model is supported, ``decode_with_generate`` elsewhere and where another model has a say."""
    if mask is not None or mixture is not None:
        run: Callable[..., Generations] = partial(decode_with_generate, mask=mask, mixture=mixture)
    else:
        run = decode if supports(model) else decode_with_generate
    return run(
        model,
        prompts,
        counts,
        seeds,
        sampling,
        eos_ids=eos_ids,
        tokenizer=tokenizer,
        entropy=entropy,
        max_rows=max_rows,
        dtype=dtype,
        progress=progress,
        limits=limits,
    )


@torch.no_grad()
def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    counts: Sequence[int],
    seeds: Int[Tensor, "trajectory"],
    sampling: Sampling,
    *,
    eos_ids: Sequence[int],
    tokenizer: Any = None,
    entropy: bool = False,
    max_rows: int = 256,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    limits: Sequence[int | None] | None = None,
) -> Generations:
    """Sample counts[i] completions of prompts[i], in order, trajectory m with the randomness of seeds[m].

    ``dtype`` computes as ``torch.autocast(dtype)`` does; None follows an enclosing autocast, or the model's own dtype.
    ``entropy`` asks for the entropy column, ``tokenizer`` is needed for stop strings only, ``max_rows`` bounds the
    rows that decode at once, ``progress(finished, all)`` is called as trajectories end, ``limits`` bounds the steps of
    each prompt's trajectories below ``max_new_tokens``. Training flags are left as they were and dropout is off.

    Raises UsageError for a model without a native decoder (see ``supports``), an empty or over-long prompt, and
    counts or seeds that do not fit; FloatingPointError when the model's log-probs are not finite.
    """
    if not supports(model):
        raise UsageError(f"{type(model).__name__} has no native decoder; use decode_with_generate")
    base = unwrap(model)
    request = check_request(
        base,
        prompts,
        counts,
        seeds,
        sampling,
        eos_ids=eos_ids,
        tokenizer=tokenizer,
        entropy=entropy,
        max_rows=max_rows,
        progress=progress,
        limits=limits,
    )
    device = request.device.type
    if dtype is None and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    recorder = Recorder(request)
    with evaluating(base), torch.autocast(device, enabled=False):
        if len(request.owner):
            _run(read(base, dtype), request, recorder)
    return recorder.finish()


def _run(network: Network, request: Request, recorder: Recorder) -> None:
    """The loop: trajectories join, draw, end and leave; those that remain step."""
    slots = min(request.max_rows, len(request.owner))
    waiting = _Waiting(network, request)
    cos, signed = rotary_table(network, waiting.reach)
    memory = _Memory(network, slots, waiting.width, int(request.limits.max()))
    every = INSPECT_EVERY.get(request.device.type, 8)

    recorder.idle(slots)
    positions = torch.zeros(slots, dtype=torch.int64, device=request.device)
    scores = torch.empty(0, device=request.device)
    randoms, used, until = scores, 0, 0
    while True:
        free = np.flatnonzero(~recorder.live)
        if waiting.left and len(free) > len(recorder.live) // 8:
            joined = waiting.admit(free, memory, cos, signed)
            index = _indices(joined.slots, request.device)
            if scores.shape[0] != slots:
                scores = joined.scores.new_empty(slots, joined.scores.shape[-1])
            scores[index] = joined.scores
            positions[index] = _indices(joined.lengths, request.device)
            recorder.replace(joined.slots, joined.trajectories)
            memory.focus(recorder.live)
            used, until = len(randoms), min(every, recorder.steps_left())

        if used == len(randoms):
            # [step, row], so that a row of the table is contiguous.
            steps = (
                _indices(recorder.steps(), request.device) + torch.arange(UNIFORM_STEPS, device=request.device)[:, None]
            )
            randoms, used = uniforms(request.seeds[_indices(recorder.rows, request.device)], steps), 0
        drawn = draw(scores, randoms[used], request.sampling, request.entropy)
        recorder.add(drawn)
        tokens, used, until = drawn.token, used + 1, until - 1

        if until == 0:
            ended = recorder.inspect()
            if not recorder.live.any():
                if not waiting.left:
                    return
                memory.clear()
                continue
            if ended:
                if not waiting.left and (~recorder.live).sum() > len(recorder.live) // 16:
                    order = memory.compact(recorder.live)
                    index = _indices(order, request.device)
                    tokens, positions = tokens[index], positions[index]
                    recorder.begin(recorder.rows[order], recorder.done[order])
                    used = len(randoms)
                memory.focus(recorder.live)
            until = min(every, recorder.steps_left())

        memory.make_room(waiting.most_steps if waiting.left else recorder.steps_left(most=True))
        hidden = hidden_states(network, tokens, cos[positions], signed[positions], memory.attend)
        memory.column += 1
        # Rows that ended keep stepping until they are replaced; they must not step off the table.
        positions = (positions + 1).clamp_(max=cos.shape[0] - 1)
        scores = logits(network, hidden)


def _indices(values: NDArray[np.int64], device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device)


@dataclass(frozen=True)
class _Prefilled:
    """Keys and values per layer [prompt, position, kv_head, dim], right-padded; next-token scores [prompt, vocab]."""

    keys: list[Tensor]
    values: list[Tensor]
    scores: Tensor

    def only(self, index: int, length: int) -> _Prefilled:
        """One prompt, in memory of its own so that the rest of its batch can go."""
        keys, values = ([x[index : index + 1, :length].clone() for x in xs] for xs in (self.keys, self.values))
        return _Prefilled(keys, values, self.scores[index : index + 1].clone())


def _prefill(network: Network, prompts: list[list[int]], cos: Tensor, signed: Tensor) -> _Prefilled:
    """One causal pass. Padding stands to the right of every real token, so that the causal mask alone hides it."""
    count, width = len(prompts), max(map(len, prompts))
    ids = torch.tensor([p + [0] * (width - len(p)) for p in prompts], device=network.device)
    keys: list[Tensor] = []
    values: list[Tensor] = []

    def attend(_: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (
            x.to(network.kv_dtype).view(count, width, -1, network.head_dim) for x in (query, key, value)
        )
        keys.append(key)
        values.append(value)
        share = query.shape[2] // network.kv_heads
        key, value = (
            x.repeat_interleave(share, dim=2).transpose(1, 2) if share > 1 else x.transpose(1, 2) for x in (key, value)
        )
        out = F.scaled_dot_product_attention(query.transpose(1, 2), key, value, is_causal=True, scale=network.scale)
        return out.transpose(1, 2).reshape(count * width, -1)

    cos, signed = cos[:width].repeat(count, 1, 1), signed[:width].repeat(count, 1, 1)
    hidden = hidden_states(network, ids.flatten(), cos, signed, attend)
    last = torch.tensor([i * width + len(p) - 1 for i, p in enumerate(prompts)], device=network.device)
    return _Prefilled(keys, values, logits(network, hidden[last]))


@dataclass(frozen=True)
class _Joined:
    slots: NDArray[np.int64]
    trajectories: NDArray[np.int64]
    lengths: NDArray[np.int64]
    scores: Tensor


class _Waiting:
    """Trajectories that have no slot yet, longest prompts first.

    That order makes prefill batches of like lengths, and a prompt that joins later always fits to the left of the
    column that running rows write next.
    """

    def __init__(self, network: Network, request: Request) -> None:
        self.network, self.request = network, request
        groups = [(prompt, np.flatnonzero(request.owner == prompt)) for prompt in np.unique(request.owner)]
        groups.sort(key=lambda group: -len(request.prompts[group[0]]))
        self.queue = deque(groups)
        self.left = len(request.owner)
        self.width = len(request.prompts[groups[0][0]])
        lengths = np.array([len(prompt) for prompt in request.prompts], np.int64)[request.owner]
        self.reach = int((lengths + request.limits).max())
        self.most_steps = int(request.limits.max())
        self.held: tuple[int, _Prefilled] | None = None

    def admit(self, free: NDArray[np.int64], memory: _Memory, cos: Tensor, signed: Tensor) -> _Joined:
        """Fill free slots: prefill prompts that have not been, and write their keys and values for each new row."""
        groups: list[tuple[int, NDArray[np.int64]]] = []
        room = len(free)
        while room and self.queue:
            prompt, trajectories = self.queue.popleft()
            groups.append((prompt, trajectories[:room]))
            if len(trajectories) > room:
                self.queue.appendleft((prompt, trajectories[room:]))
            room -= len(groups[-1][1])
        taken = sum(len(trajectories) for _, trajectories in groups)
        self.left -= taken
        slots = free[:taken]
        lengths = np.concatenate([np.full(len(t), len(self.request.prompts[p]), np.int64) for p, t in groups])
        memory.open(int(lengths[0]))

        scores, start, at = [], 0, 0
        while start < len(groups):
            first = groups[start][0]
            if self.held is not None and self.held[0] == first:
                batch, prefilled = groups[start : start + 1], self.held[1]
            else:
                size = max(1, PREFILL_TOKENS // len(self.request.prompts[first]))
                batch = groups[start : start + size]
                prefilled = _prefill(self.network, [self.request.prompts[p] for p, _ in batch], cos, signed)
            source = np.repeat(np.arange(len(batch)), [len(t) for _, t in batch])
            rows = slice(at, at + len(source))
            memory.write(slots[rows], lengths[rows], source, prefilled)
            scores.append(prefilled.scores[_indices(source, self.network.device)])
            start, at = start + len(batch), at + len(source)
        last = groups[-1][0]
        split = bool(self.queue) and self.queue[0][0] == last
        self.held = (last, prefilled.only(len(batch) - 1, len(self.request.prompts[last]))) if split else None
        return _Joined(slots, np.concatenate([t for _, t in groups]), lengths, torch.cat(scores))


class _Memory:
    """Keys and values of running rows, per layer [slot, kv_head, column, dim].

    Row r occupies columns starts[r] .. column - 1 and every row writes ``column`` next. ``bias`` [slot, column] hides
    what lies before a row's start. Columns grow in blocks; those that no running row needs any more are reclaimed.
    """

    def __init__(self, network: Network, slots: int, width: int, steps: int) -> None:
        self.network, self.rows = network, slots
        self.capacity = _block(width, steps)
        shape = (slots, network.kv_heads, self.capacity, network.head_dim)
        dtype, device = network.kv_dtype, network.device
        # Zeros, because a hidden column still enters attention as 0 * value.
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in network.layers]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in network.layers]
        self.bias = torch.zeros(slots, self.capacity, dtype=dtype, device=device)
        self.starts = np.zeros(slots, np.int64)
        self.column = self.low = 0
        self.mask: Tensor | None = None
        self.uniform = False

    def clear(self) -> None:
        """No row is running."""
        self.column = 0

    def open(self, width: int) -> None:
        """Rows with prompts of at most ``width`` tokens are about to be written."""
        if self.column == 0:
            self.column = width

    def write(
        self, slots: NDArray[np.int64], lengths: NDArray[np.int64], source: NDArray[np.int64], prefilled: _Prefilled
    ) -> None:
        """Put prompt source[i] of ``prefilled``, lengths[i] tokens long, into slots[i], ending before ``column``."""
        device = self.network.device
        width = int(lengths.max())
        starts = self.column - lengths
        self.starts[slots] = starts
        index, which = _indices(slots, device), _indices(source, device)[:, None]
        pick = (torch.arange(width, device=device) - _indices(width - lengths, device)[:, None]).clamp_(min=0)
        for memory, fresh in ((self.keys, prefilled.keys), (self.values, prefilled.values)):
            for layer, x in zip(memory, fresh, strict=True):
                layer[index, :, self.column - width : self.column] = x[which, pick].transpose(1, 2)
        hidden = torch.arange(self.capacity, device=device) < _indices(starts, device)[:, None]
        self.bias[index] = torch.zeros_like(hidden, dtype=self.bias.dtype).masked_fill_(hidden, -torch.inf)

    def focus(self, live: NDArray[np.bool_]) -> None:
        """Attend to no more columns than the running rows need."""
        starts = self.starts[: self.rows][live]
        self.low = int(starts.min())
        self.uniform = bool((starts == self.low).all())
        if not self.uniform:
            self.low -= self.low % 16  # fused kernels want an aligned mask

    def compact(self, live: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Move the last running rows into the gaps; new row i is old row order[i]."""
        rows = int(live.sum())
        order = np.arange(rows)
        gaps, movers = np.flatnonzero(~live[:rows]), rows + np.flatnonzero(live[rows:])
        order[gaps] = movers
        device = self.network.device
        to, source = _indices(gaps, device), _indices(movers, device)
        for layer in (*self.keys, *self.values):
            layer[to, :, self.low : self.column] = layer[source, :, self.low : self.column]
        self.bias[to] = self.bias[source]
        self.starts[gaps] = self.starts[movers]
        self.rows = rows
        return order

    def make_room(self, steps: int) -> None:
        """Make sure that ``column`` exists; ``steps`` more at most will follow."""
        if self.column == self.capacity:
            width = self.column - self.low
            roomy = width <= self.low  # the window can move left without overlapping itself
            if not roomy:
                self.capacity = _block(width, steps)
            move = self._moved_left if roomy else self._moved
            self.keys[:] = map(move, self.keys)
            self.values[:] = map(move, self.values)
            self.bias = move(self.bias[:, None, :, None])[:, 0, :, 0]
            # A gap left by an ended row may have started anywhere; what it computes is dropped.
            self.starts = np.maximum(self.starts - self.low, 0)
            self.column, self.low = width, 0
        window = self.bias[: self.rows, None, None, self.low : self.column + 1]
        self.mask = None if self.uniform else window

    def _moved_left(self, x: Tensor) -> Tensor:
        x[:, :, : self.column - self.low] = x[:, :, self.low : self.column]
        x[:, :, self.column - self.low :] = 0
        return x

    def _moved(self, x: Tensor) -> Tensor:
        moved = x.new_zeros(self.rows, x.shape[1], self.capacity, x.shape[3])
        moved[:, :, : self.column - self.low] = x[: self.rows, :, self.low : self.column]
        return moved

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One token per row: write it, then attend to everything the row has seen."""
        keys, values = self.keys[layer][: self.rows], self.values[layer][: self.rows]
        keys[:, :, self.column], values[:, :, self.column] = key, value
        window = slice(self.low, self.column + 1)
        # Query heads that share a key head become queries of it.
        grouped = query.to(keys.dtype).view(self.rows, self.network.kv_heads, -1, self.network.head_dim)
        out = F.scaled_dot_product_attention(
            grouped, keys[:, :, window], values[:, :, window], attn_mask=self.mask, scale=self.network.scale
        )
        return out.reshape(self.rows, -1)


def _block(width: int, steps: int) -> int:
    """Columns to allocate when ``width`` are in use and at most ``steps`` more will be, rounded up to 16."""
    return -(-(width + min(steps, max(128, width))) // 16) * 16

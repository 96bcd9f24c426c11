"""What decoding returns, what it is asked, and the bookkeeping that every decoder shares: who stopped when."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from numpy.typing import NDArray
from torch import Tensor

from polopt.core.errors import UsageError
from polopt.core.policy import Sampling
from polopt.policies.sampling import Draw

Progress = Callable[[int, int], None]
"""(finished trajectories, all trajectories)."""


@dataclass(frozen=True)
class Generations:
    """Completions, packed trajectory after trajectory, on the model's device.

    ``ids`` are the chosen tokens, the final end-of-sequence or stop token included. ``logp`` (float32) is the log-prob
    under softmax(logits / policy temperature), whole vocabulary; ``logp_sampled`` under the distribution it was drawn
    from (None where that is the same); ``entropy`` of the policy's distribution in nats (None unless asked).
    ``truncated``: cut by max_new_tokens or the context length, without an end-of-sequence, stop id or stop string.
    """

    ids: Int[Tensor, "step"]
    lengths: Int[Tensor, "trajectory"]
    logp: Float[Tensor, "step"]
    logp_sampled: Float[Tensor, "step"] | None
    entropy: Float[Tensor, "step"] | None
    truncated: Bool[Tensor, "trajectory"]
    kept: UInt8[Tensor, "step byte"] | None = None
    """The tokens that could be drawn, as bits, where a mask policy said so."""


@dataclass(frozen=True)
class Request:
    """A checked call of a decoder; ``owner`` and ``limits`` give every trajectory's prompt and most steps."""

    prompts: list[list[int]]
    owner: NDArray[np.int64]
    limits: NDArray[np.int64]
    seeds: Int[Tensor, "trajectory"]
    sampling: Sampling
    ends: tuple[int, ...]
    tokenizer: Any
    entropy: bool
    max_rows: int
    device: torch.device
    progress: Progress | None


def check_request(
    model: Any,
    prompts: Sequence[Sequence[int]],
    counts: Sequence[int],
    seeds: Int[Tensor, "trajectory"],
    sampling: Sampling,
    *,
    eos_ids: Sequence[int],
    tokenizer: Any,
    entropy: bool,
    max_rows: int,
    progress: Progress | None,
    limits: Sequence[int | None] | None = None,
) -> Request:
    """Raise UsageError naming the offending prompt, count, limit, seed vector or option, or return the request."""
    config = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    context = getattr(config, "max_position_embeddings", None)
    vocabulary = getattr(config, "vocab_size", None)
    if len(counts) != len(prompts):
        raise UsageError(f"counts has {len(counts)} entries for {len(prompts)} prompts; give one count per prompt")
    for index, (prompt, count) in enumerate(zip(prompts, counts, strict=True)):
        if len(prompt) == 0:
            raise UsageError(f"prompt {index} has no tokens; a prompt needs at least one")
        if context is not None and len(prompt) > context - 1:
            raise UsageError(
                f"prompt {index} has {len(prompt)} tokens; the model's context of {context} positions "
                f"leaves room for at most {context - 1}"
            )
        low, high = min(prompt), max(prompt)
        if low < 0 or (vocabulary is not None and high >= vocabulary):
            raise UsageError(
                f"prompt {index} contains token {low if low < 0 else high}; the model's vocabulary has {vocabulary}"
            )
        if count < 0:
            raise UsageError(f"counts[{index}] is {count}; it must be at least 0")
    total = int(sum(counts))
    if seeds.shape != (total,):
        raise UsageError(
            f"seeds has shape {tuple(seeds.shape)}; the counts ask for {total} trajectories, one seed each"
        )
    if max_rows < 1:
        raise UsageError(f"max_rows is {max_rows}; it must be at least 1")
    if sampling.stop and tokenizer is None:
        raise UsageError(
            f"stop strings {sampling.stop!r} need the tokenizer that turns tokens into text; pass tokenizer"
        )
    budget = sampling.max_new_tokens
    if budget is None:
        raise UsageError("max_new_tokens is None; a decoder needs a number")
    owner = np.repeat(np.arange(len(prompts)), np.asarray(counts, dtype=np.int64))
    rooms = np.array([context - len(p) if context is not None else budget for p in prompts], np.int64)
    for index, limit in enumerate(limits or ()):
        if limit is not None and limit < 1:
            raise UsageError(f"the limit of prompt {index} is {limit} steps; it must be at least 1")
    if limits is not None:
        rooms = np.minimum(rooms, [budget if limit is None else limit for limit in limits])
    device = model.get_input_embeddings().weight.device
    return Request(
        prompts=[list(prompt) for prompt in prompts],
        owner=owner,
        limits=np.minimum(budget, rooms)[owner],
        seeds=seeds.to(device, torch.int64),
        sampling=sampling,
        ends=tuple(sorted({*map(int, eos_ids), *sampling.stop_ids})),
        tokenizer=tokenizer,
        entropy=entropy,
        max_rows=max_rows,
        device=device,
        progress=progress,
    )


class Recorder:
    """Collects draws of changing sets of rows and knows which rows have ended.

    ``begin`` names the rows, ``add`` takes one draw per row, ``inspect`` looks at every draw since it was last called
    (the only place that waits for the device). Rows that ended may keep drawing until the row set changes; what they
    draw is dropped.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        total = len(request.owner)
        self.lengths = np.zeros(total, np.int64)
        self.truncated = np.zeros(total, bool)
        self.rows = np.zeros(0, np.int64)
        self.done = np.zeros(0, np.int64)
        self.live = np.zeros(0, bool)
        self._ends = torch.tensor(request.ends, dtype=torch.int64, device=request.device)
        self._draws: list[Draw] = []
        self._seen = 0
        self._since = self.done
        self._segments: list[tuple[NDArray[np.int64], NDArray[np.int64], list[Tensor | None]]] = []
        self._texts = StopStrings(request) if request.sampling.stop else None

    def begin(self, rows: NDArray[np.int64], done: NDArray[np.int64]) -> None:
        """From now on a draw has one entry per trajectory in ``rows``, which have ``done`` steps each so far."""
        self._close()
        self.rows, self.done, self._since = rows.copy(), done.copy(), done.copy()
        self.live = self.lengths[rows] == 0

    def idle(self, slots: int) -> None:
        """As many rows as ``slots``, none of them running yet."""
        self.rows, self.done, self.live = np.zeros(slots, np.int64), np.zeros(slots, np.int64), np.zeros(slots, bool)

    def replace(self, slots: NDArray[np.int64], trajectories: NDArray[np.int64]) -> None:
        """Rows ``slots`` are now ``trajectories``, at their first step."""
        rows, done = self.rows.copy(), self.done.copy()
        rows[slots], done[slots] = trajectories, 0
        self.begin(rows, done)

    def add(self, draw: Draw) -> None:
        """One draw per row."""
        self._draws.append(draw)

    def steps(self) -> NDArray[np.int64]:
        """Steps of every row so far, those not inspected yet included."""
        return self.done + (len(self._draws) - self._seen)

    def steps_left(self, *, most: bool = False) -> int:
        """Steps that every live row (``most``: some live row) may still take after the last inspection."""
        left = (self.request.limits[self.rows] - self.done)[self.live]
        return int(left.max() if most else left.min())

    def inspect(self) -> bool:
        """Update ``live`` and ``done``; whether any row ended."""
        fresh = [draw.token for draw in self._draws[self._seen :]]
        self._seen = len(self._draws)
        if not fresh:
            return False
        tokens = torch.stack(fresh) if len(fresh) > 1 else fresh[0][None]
        hits = torch.isin(tokens, self._ends) if len(self._ends) else torch.zeros_like(tokens, dtype=torch.bool)
        hit = hits.cpu().numpy()
        limits = self.request.limits[self.rows]
        never = np.iinfo(np.int64).max
        ends = np.where(hit.any(0), self.done + hit.argmax(0) + 1, never)
        if self._texts is not None:
            ends = self._texts.ends(self.rows, self.done, self.live, tokens.tolist(), ends)
        self.done = self.done + len(fresh)
        ended = self.live & (self.done >= np.minimum(ends, limits))
        if not ended.any():
            return False
        rows = self.rows[ended]
        self.lengths[rows] = np.minimum(ends, limits)[ended]
        self.truncated[rows] = (ends > limits)[ended]
        self.live = self.live & ~ended
        if self.request.progress is not None:
            self.request.progress(int((self.lengths > 0).sum()), len(self.lengths))
        return True

    def finish(self) -> Generations:
        """Pack everything recorded; raises FloatingPointError when the model gave NaN probabilities."""
        self._close()
        device = self.request.device
        total = int(self.lengths.sum())
        offsets = np.cumsum(self.lengths) - self.lengths
        dtypes = (torch.int64, torch.float32, torch.float32, torch.float32, torch.uint8)
        masked = self.request.sampling.nucleus_of is not None
        present = (True, True, self.request.sampling.differs, self.request.entropy, masked)
        wide = [() if value is None else value.shape[2:] for value in self._segments[0][2]] if total else [()] * 5
        columns = [
            torch.empty(total, *shape, dtype=dtype, device=device) if kept else None
            for dtype, kept, shape in zip(dtypes, present, wide, strict=True)
        ]
        for rows, since, values in self._segments:
            steps = since + np.arange(_height(values))[:, None]
            valid = steps < self.lengths[rows]
            source = torch.from_numpy(np.flatnonzero(valid)).to(device)
            target = torch.from_numpy((offsets[rows] + steps)[valid]).to(device)
            for column, value in zip(columns, values, strict=True):
                if column is not None and value is not None:
                    column[target] = value.flatten(0, 1)[source]
        ids, logp, logp_sampled, entropy, allowed = columns
        assert ids is not None and logp is not None
        if total and not bool(torch.isfinite(logp).all()):
            step = int((~torch.isfinite(logp)).nonzero()[0])
            row = int(np.searchsorted(offsets, step, side="right")) - 1
            raise FloatingPointError(
                f"the model gave a log-prob of {float(logp[step])} at step {step - int(offsets[row])} of trajectory "
                f"{row} (prompt {int(self.request.owner[row])}); its weights or logits are not finite"
            )
        return Generations(
            ids=ids,
            lengths=torch.from_numpy(self.lengths).to(device),
            logp=logp,
            logp_sampled=logp_sampled,
            entropy=entropy,
            truncated=torch.from_numpy(self.truncated).to(device),
            kept=allowed,
        )

    def _close(self) -> None:
        if self._draws:
            columns = [None if column[0] is None else torch.stack(column) for column in zip(*self._draws, strict=True)]
            self._segments.append((self.rows, self._since, columns))
        self._draws, self._seen = [], 0


def _height(values: list[Tensor | None]) -> int:
    assert values[0] is not None
    return values[0].shape[0]


class StopStrings:
    """Finds the first token at which a trajectory's text contains a stop string.

    Only the tail that a new match could touch is decoded: a stop string of b bytes spans at most b tokens, and a few
    more give the tokenizer its left context (word-start spaces, partial characters).
    """

    def __init__(self, request: Request) -> None:
        self.tokenizer = request.tokenizer
        self.stop = request.sampling.stop
        self.reach = max(len(text.encode()) for text in self.stop) + 8
        self.history: dict[int, list[int]] = {}

    def ends(
        self,
        rows: NDArray[np.int64],
        done: NDArray[np.int64],
        live: NDArray[np.bool_],
        tokens: list[list[int]],
        ends: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        """``ends`` lowered to where a live row's text first contains a stop string; ``tokens`` is [step][row]."""
        ends = ends.copy()
        for row in np.flatnonzero(live):
            ids = self.history.setdefault(int(rows[row]), [])
            ids += [step[row] for step in tokens]
            first = max(0, int(done[row]) - self.reach)
            if not self._matches(ids[first:]):
                continue
            for end in range(int(done[row]) + 1, len(ids) + 1):
                if self._matches(ids[first:end]):
                    ends[row] = min(int(ends[row]), end)
                    break
        return ends

    def _matches(self, ids: list[int]) -> bool:
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return any(stop in text for stop in self.stop)

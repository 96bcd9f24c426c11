"""Final hidden states at the steps of trajectories: hardly a padded position, and a shared prompt only once.

Rows of similar length go through the trunk together, each such bucket padded by itself. Where several trajectories
share a prompt, the prompt goes through once, and completions attend to its keys and values; gradients flow through
both. Every position sees what it would see in a row of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from polopt.core.example import Example
from polopt.policies.causal_lm.payload import TokenPayload

_CALL: Final = {"cpu": 64, "cuda": 2048}
"""About how many positions take as long as one more call of the trunk does at least."""
_WORTH_SHARING: Final = 0.9
"""Positions with shared prompts, over those without, from which on the detour over a cache does not pay."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Sequences of tokens, right-padded. ``before`` [row] are positions that each goes on after."""

    ids: Int[Tensor, "row time"]
    mask: Bool[Tensor, "row time"]
    before: Int[Tensor, " row"]

    @classmethod
    def of(cls, sequences: Sequence[Tensor], device: torch.device, before: Tensor | None = None) -> Rows:
        """The rows of these sequences, going on after ``before`` positions each (0 when left out)."""
        lengths = torch.tensor([len(sequence) for sequence in sequences], dtype=torch.int64)
        ids = (
            nn.utils.rnn.pad_sequence(list(sequences), batch_first=True)
            if len(lengths)
            else torch.zeros(0, 1, dtype=torch.int64)
        )
        mask = torch.arange(ids.shape[1])[None] < lengths[:, None]
        start = torch.zeros_like(lengths) if before is None else before
        return cls(ids.to(device), mask.to(device), start.to(device))

    def inputs(self, module: Any) -> dict[str, Any]:
        """What the module's forward takes."""
        inputs: dict[str, Any] = {"input_ids": self.ids, "attention_mask": self.mask.long(), "use_cache": False}
        if "position_ids" in inspect.signature(module.forward).parameters:
            inputs["position_ids"] = self.before[:, None] + torch.arange(self.ids.shape[1], device=self.ids.device)
        return inputs


def padded(payload: TokenPayload, device: torch.device) -> tuple[Rows, Int[Tensor, " step"]]:
    """Prompt and completion of every trajectory as one bucket, and the flat places at which its steps are predicted."""
    rows = Rows.of(_whole_rows(payload), device)
    starts = torch.arange(len(payload.lengths)) * rows.ids.shape[1]
    return rows, _places(payload, starts).to(device)


def step_states(
    trunk: Any, payload: TokenPayload, device: torch.device, *, share: bool
) -> Float[Tensor, "step hidden"]:
    """The hidden state from which each step is predicted, in packed order.

    ``share`` allows prompts to go through the trunk once for all their trajectories (see `can_share`).
    """
    if share and _saves(payload):
        return _continued(trunk, payload, device)
    return _whole(trunk, payload, device)


def _whole(trunk: Any, payload: TokenPayload, device: torch.device) -> Tensor:
    rows = _whole_rows(payload)
    if not rows:
        nothing: Tensor = trunk(**Rows.of(rows, device).inputs(trunk)).last_hidden_state
        return nothing.flatten(0, 1)
    starts = torch.zeros(len(rows), dtype=torch.int64)
    states, used = [], 0
    for members in buckets([len(row) for row in rows], _CALL.get(device.type, _CALL["cuda"])):
        bucket = Rows.of([rows[i] for i in members], device)
        states.append(trunk(**bucket.inputs(trunk)).last_hidden_state.flatten(0, 1))
        starts[members] = used + torch.arange(len(members)) * bucket.ids.shape[1]
        used += bucket.ids.numel()
    return torch.cat(states).index_select(0, _places(payload, starts).to(device))


def _continued(trunk: Any, payload: TokenPayload, device: torch.device) -> Tensor:
    prompts = Rows.of([torch.tensor(prompt, dtype=torch.int64) for prompt in payload.prompts], device)
    cache = DynamicCache()
    out = trunk(**prompts.inputs(trunk) | {"use_cache": True, "past_key_values": cache})
    # Taken before the completions, which add to the caches that are made of them.
    layers: Any = cache.layers
    kept = [(layer.keys, layer.values) for layer in layers]
    states, used = [out.last_hidden_state.flatten(0, 1)], prompts.ids.numel()
    own = torch.tensor([len(prompt) for prompt in payload.prompts])
    ends = torch.arange(len(own)) * prompts.ids.shape[1] + own - 1
    # The first token follows from the prompt's last place, the last one is nobody's input.
    tails = [ids[:-1] for ids in torch.split(payload.ids, payload.lengths.tolist())]
    starts = torch.zeros(len(tails), dtype=torch.int64)
    for members in buckets([len(tail) for tail in tails], _CALL.get(device.type, _CALL["cuda"])):
        if not len(tails[members[0]]):
            continue
        owner = payload.prompt_of[torch.tensor(members)]
        bucket = Rows.of([tails[i] for i in members], device, own[owner])
        chosen = owner.to(device)
        past = DynamicCache([(k.index_select(0, chosen), v.index_select(0, chosen)) for k, v in kept])
        mask = torch.cat((prompts.mask.index_select(0, chosen), bucket.mask), 1).long()
        inputs = bucket.inputs(trunk) | {"use_cache": True, "past_key_values": past, "attention_mask": mask}
        states.append(trunk(**inputs).last_hidden_state.flatten(0, 1))
        starts[members] = used + torch.arange(len(members)) * bucket.ids.shape[1]
        used += bucket.ids.numel()
    within = _within(payload.lengths)
    later = starts.repeat_interleave(payload.lengths) + within - 1
    places = torch.where(within == 0, ends[payload.prompt_of].repeat_interleave(payload.lengths), later)
    return torch.cat(states).index_select(0, places.to(device))


def _whole_rows(payload: TokenPayload) -> list[Tensor]:
    """Prompt and completion of each trajectory; the last completion token is nobody's input."""
    prompts = [torch.tensor(prompt, dtype=torch.int64) for prompt in payload.prompts]
    completions = torch.split(payload.ids, payload.lengths.tolist())
    return [torch.cat((prompts[o], ids[:-1])) for o, ids in zip(payload.prompt_of.tolist(), completions, strict=True)]


def _places(payload: TokenPayload, starts: Int[Tensor, " trajectory"]) -> Int[Tensor, " step"]:
    """Where each step is predicted, when row i of `_whole_rows` begins at ``starts[i]``.

    Step t of a completion is predicted at place prompt_length - 1 + t of its row.
    """
    first = starts + payload.prompt_lengths - 1
    return first.repeat_interleave(payload.lengths) + _within(payload.lengths)


def _within(lengths: Tensor) -> Tensor:
    return torch.arange(int(lengths.sum())) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)


def _saves(payload: TokenPayload) -> bool:
    completions = int(payload.lengths.sum())
    shared = sum(len(prompt) for prompt in payload.prompts)
    return shared + completions < _WORTH_SHARING * (int(payload.prompt_lengths.sum()) + completions)


def buckets(lengths: Sequence[int], call: int) -> list[list[int]]:
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


def can_share(base: Any, trunk: Any) -> bool:
    """Whether completions may go on from cached prompts: full attention that reads a mask and positions.

    What the configuration promises is tried out on two short prompts, so that an architecture with a twist of its own
    is never computed wrongly.
    """
    config = base.config.get_text_config() if hasattr(base.config, "get_text_config") else base.config
    types = set(getattr(config, "layer_types", None) or ["full_attention"])
    # A window counts places in the cache, and with them the padding between a short prompt and its completion.
    windowed = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    parameters = inspect.signature(trunk.forward).parameters
    if windowed or types != {"full_attention"} or not {"position_ids", "past_key_values"} <= set(parameters):
        return False
    if getattr(config, "_attn_implementation", "eager") not in ("eager", "sdpa"):
        return False
    device, known = base.get_input_embeddings().weight.device, min(7, config.vocab_size - 1)
    prompts, tails = ([1, 2, 3], [2]), ([1, 2, 1], [3, 1], [2])
    payload = TokenPayload.build(
        ([token % known for token in prompts[i]] for i in (0, 1, 0)),
        ([token % known for token in tail] for tail in tails),
        torch.ones(3),
        [Example("", "")] * 3,
        [""] * 3,
        [""] * 3,
    )
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        try:
            expected, found = _whole(trunk, payload, device), _continued(trunk, payload, device)
        except (TypeError, ValueError, AttributeError, RuntimeError, NotImplementedError):
            return False
    tolerance = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 2e-2
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())

"""Final hidden states at the steps of trajectories: no padded position, and a shared prompt only once.

An architecture whose attention can be packed (`can_pack`) sees all tokens in one row
(`polopt.policies.causal_lm.packing`), any other one a padded row for each trajectory. Either way every position sees
what it would in a row of its own.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from polopt.core.example import Example
from polopt.policies.causal_lm.packing import Packing
from polopt.policies.causal_lm.payload import TokenPayload

_WORTH_SHARING: Final = 0.9
"""Tokens with shared prompts, over those without, up to which the mask that sharing needs pays."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Prompt and completion of every trajectory, right-padded; the last completion token is nobody's input.

    ``steps`` are the flat places at which the steps are predicted: step t at prompt_length - 1 + t of its row.
    """

    ids: Int[Tensor, "row time"]
    mask: Bool[Tensor, "row time"]
    steps: Int[Tensor, " step"]

    @classmethod
    def of(cls, payload: TokenPayload, device: torch.device) -> Rows:
        """The rows of a payload."""
        rows = _sequences(payload)
        none = torch.zeros(0, 1, dtype=torch.int64)
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True) if rows else none
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        mask = torch.arange(ids.shape[1])[None] < lengths[:, None]
        steps = _places(payload, torch.arange(len(rows)) * ids.shape[1] + payload.prompt_lengths - 1)
        return cls(ids.to(device), mask.to(device), steps.to(device))

    def inputs(self, module: Any) -> dict[str, Any]:
        """What the module's forward takes."""
        inputs: dict[str, Any] = {"input_ids": self.ids, "attention_mask": self.mask.long(), "use_cache": False}
        if "position_ids" in inspect.signature(module.forward).parameters:
            inputs["position_ids"] = torch.arange(self.ids.shape[1], device=self.ids.device).expand(self.ids.shape)
        return inputs


def step_states(trunk: Any, payload: TokenPayload, device: torch.device, *, pack: bool) -> Float[Tensor, "step hidden"]:
    """The hidden state from which each step is predicted, in packed order."""
    if not pack or not len(payload.lengths):
        rows = Rows.of(payload, device)
        padded: Tensor = trunk(**rows.inputs(trunk)).last_hidden_state
        return padded.flatten(0, 1).index_select(0, rows.steps)
    sequences, before = _sequences(payload), payload.prompt_lengths
    if not _saves(payload):
        starts = torch.tensor([len(row) for row in sequences]).cumsum(0).roll(1)
        starts[0] = 0
        return Packing.of(sequences, device=device).states(trunk)[_places(payload, starts + before - 1).to(device)]
    prompts = [torch.tensor(prompt, dtype=torch.int64) for prompt in payload.prompts]
    tails = [row[n:] for row, n in zip(sequences, before.tolist(), strict=True)]
    packing = Packing.of([*prompts, *tails], [None] * len(prompts) + payload.prompt_of.tolist(), device)
    ends = torch.tensor([len(sequence) for sequence in (*prompts, *tails)]).cumsum(0)
    # The first token of a completion follows from its prompt's last place, the others from the one before them.
    later = _places(payload, ends[len(prompts) - 1 : -1] - 1)
    first = (payload.lengths.cumsum(0) - payload.lengths).to(device)
    places = later.to(device).index_copy(0, first, (ends[: len(prompts)] - 1)[payload.prompt_of].to(device))
    return packing.states(trunk).index_select(0, places)


def _sequences(payload: TokenPayload) -> list[Tensor]:
    """Prompt and completion of each trajectory, less the last token."""
    prompts = [torch.tensor(prompt, dtype=torch.int64) for prompt in payload.prompts]
    completions = torch.split(payload.ids, payload.lengths.tolist())
    return [torch.cat((prompts[o], ids[:-1])) for o, ids in zip(payload.prompt_of.tolist(), completions, strict=True)]


def _places(payload: TokenPayload, first: Int[Tensor, " trajectory"]) -> Int[Tensor, " step"]:
    """Places of the steps, those of trajectory i one after the other from ``first[i]`` on."""
    starts = payload.lengths.cumsum(0) - payload.lengths
    return (first - starts).repeat_interleave(payload.lengths) + torch.arange(int(payload.lengths.sum()))


def _saves(payload: TokenPayload) -> bool:
    completions = int(payload.lengths.sum())
    shared = sum(len(prompt) for prompt in payload.prompts)
    return shared + completions < _WORTH_SHARING * (int(payload.prompt_lengths.sum()) + completions)


def can_pack(base: Any, trunk: Any) -> bool:
    """Whether the tokens of many sequences may go through the trunk as one row.

    Its attention must be torch's or plain, over everything before, and reached through Hugging Face's attention
    interface. That is tried out on short sequences, so that an architecture with a twist of its own is never computed
    wrongly.
    """
    config = trunk.config
    types = set(getattr(config, "layer_types", None) or ["full_attention"])
    windowed = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    if windowed or types != {"full_attention"} or "position_ids" not in inspect.signature(trunk.forward).parameters:
        return False
    if getattr(config, "_attn_implementation_internal", None) not in ("eager", "sdpa"):
        return False
    device = base.get_input_embeddings().weight.device
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for shared in (False, True):
            payload = _trial(shared, config.vocab_size)
            try:
                found = step_states(trunk, payload, device, pack=True)
            except (TypeError, ValueError, AttributeError, RuntimeError, IndexError):
                return False
            expected = step_states(trunk, payload, device, pack=False)
            tolerance = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 2e-2
            if not bool((found - expected).abs().max() <= tolerance * expected.abs().max()):
                return False
    return True


def _trial(shared: bool, vocabulary: int) -> TokenPayload:
    """Three short sequences, two of them with one prompt where prompts are shared."""
    known = min(7, vocabulary - 1)
    prompts = ([1, 2, 3, 1, 2], [2], [1, 2, 3, 1, 2] if shared else [3, 3])
    tails = ([1, 2, 1], [3, 1], [2])
    return TokenPayload.build(
        ([token % known for token in prompt] for prompt in prompts),
        ([token % known for token in tail] for tail in tails),
        torch.ones(3),
        [Example("", "")] * 3,
        [""] * 3,
        [""] * 3,
    )

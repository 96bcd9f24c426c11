"""Hidden states without padding and with shared prompts: the model's own forward, in fewer positions."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from polopt.policies.causal_lm import states
from polopt.policies.causal_lm.payload import TokenPayload
from polopt.policies.causal_lm.policy import CausalLM
from polopt.policies.causal_lm.states import buckets
from tests.policies.causal_lm.models import byte_tokenizer, tiny, token_rollout
from tests.policies.causal_lm.test_policy import ALL, FAMILIES, move, plain, weighted

LENGTHS = ((9, 1), (9, 17), (9, 5), (4, 30), (4, 2), (9, 16), (4, 1))
SHARING = {"Qwen3": True, "Llama": True, "GPT2": True, "Cohere": True, "Granite": True, "Gemma2": False}


def payload() -> Any:
    """Two prompts of different length, whose completions lie mixed up."""
    rollout = token_rollout(LENGTHS)
    tokens = rollout.payload
    assert isinstance(tokens, TokenPayload)
    long, short = tokens.prompts[int(tokens.prompt_of[0])], tokens.prompts[int(tokens.prompt_of[3])]
    owner = torch.tensor([0 if before == 9 else 1 for before, _ in LENGTHS])
    object.__setattr__(tokens, "prompts", (long, short))
    object.__setattr__(tokens, "prompt_of", owner)
    return rollout


def widths(one: CausalLM, rollout: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Shapes of what goes through the trunk."""
    seen: list[tuple[int, int]] = []
    of = states.Rows.inputs
    monkeypatch.setattr(
        states.Rows, "inputs", lambda rows, trunk: seen.append(tuple(rows.ids.shape)) or of(rows, trunk)
    )
    with torch.no_grad():
        one.evaluate(rollout, ALL)
    return seen


@pytest.mark.parametrize("call", [0, 10**6])
@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_are_those_of_rows_of_their_own(
    family: str, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(states, "_CALL", {"cpu": call, "cuda": call})
    one = CausalLM(tiny(family, **FAMILIES[family]), byte_tokenizer())
    move(one)
    rollout = payload()
    assert one._layer is not None
    assert one._layer.share == SHARING[family]
    found, expected = one.evaluate(rollout, ALL).columns, plain(one.model, rollout)
    for name in ALL:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)
    gradients = (torch.autograd.grad(weighted(columns), one.parameters()) for columns in (found, expected))
    for actual, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()) + 1e-7)


def test_a_shared_prompt_goes_through_once_and_nothing_is_padded_that_need_not_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(states, "_CALL", {"cpu": 0, "cuda": 0})
    one = CausalLM(tiny("Qwen3"), byte_tokenizer())
    # Both prompts, then completions less their last token by length; those of one token need no pass of their own.
    assert widths(one, payload(), monkeypatch) == [(2, 9), (1, 29), (1, 16), (1, 15), (1, 4), (1, 1)]


def test_prompts_of_their_own_take_no_detour(monkeypatch: pytest.MonkeyPatch) -> None:
    one = CausalLM(tiny("Qwen3"), byte_tokenizer())
    assert widths(one, token_rollout(((3, 5), (7, 2))), monkeypatch) == [(2, 8)]


@pytest.mark.parametrize(
    "options", [{"sliding_window": 4, "use_sliding_window": True}, {"_attn_implementation": "flex"}]
)
def test_windows_and_other_attention_do_not_share(options: dict[str, Any]) -> None:
    model = tiny("Qwen3")
    for name, value in options.items():
        setattr(model.config, name, value)
    assert not states.can_share(model, model.model)


def test_an_architecture_that_ignores_the_positions_it_is_given_does_not_share() -> None:
    model = tiny("Qwen3")
    forward = model.model.forward

    def shifted(*args: Any, position_ids: Tensor | None = None, past_key_values: Any = None, **kwargs: Any) -> Any:
        if past_key_values is not None and past_key_values.get_seq_length():
            position_ids = torch.zeros_like(position_ids)
        return forward(*args, position_ids=position_ids, past_key_values=past_key_values, **kwargs)

    assert states.can_share(model, model.model)
    model.model.forward = shifted
    assert not states.can_share(model, model.model)


@pytest.mark.parametrize("call", [0, 3, 20, 10**6])
def test_buckets_hold_every_row_once_and_no_cut_would_save_more_than_a_call(call: int) -> None:
    lengths = torch.randint(1, 40, (30,), generator=torch.Generator().manual_seed(1)).tolist()
    found = buckets(lengths, call)
    assert sorted(i for bucket in found for i in bucket) == list(range(30))
    for bucket in found:
        sizes = [lengths[i] for i in bucket]
        assert sizes == sorted(sizes, reverse=True)
        assert all((len(sizes) - k) * (sizes[0] - sizes[k]) <= call for k in range(1, len(sizes)))
    # And every cut that was made was worth it.
    for one, other in itertools.pairwise(found):
        assert len(other) * (lengths[one[0]] - lengths[other[0]]) > 0
    assert len(found) == 1 or call < 10**6

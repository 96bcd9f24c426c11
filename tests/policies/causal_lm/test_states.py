"""Hidden states of sequences in one row, with shared prompts: the model's own forward, in fewer positions."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from polopt.policies.causal_lm import packing, states
from polopt.policies.causal_lm.packing import Packing, buckets_of
from polopt.policies.causal_lm.payload import TokenPayload
from polopt.policies.causal_lm.policy import CausalLM
from tests.policies.causal_lm.models import byte_tokenizer, tiny, token_rollout
from tests.policies.causal_lm.test_policy import ALL, FAMILIES, move, plain, weighted

LENGTHS = ((9, 1), (9, 17), (9, 5), (4, 30), (4, 2), (9, 16), (4, 1))
PACKS = {"Qwen3": True, "Llama": True, "GPT2": True, "Cohere": True, "Granite": True, "Gemma2": False}


def rollout(shared: bool = True) -> Any:
    """Completions that lie mixed up, of two prompts of different length or of one prompt each."""
    made = token_rollout(LENGTHS)
    tokens = made.payload
    assert isinstance(tokens, TokenPayload)
    if shared:
        long, short = tokens.prompts[int(tokens.prompt_of[0])], tokens.prompts[int(tokens.prompt_of[3])]
        object.__setattr__(tokens, "prompts", (long, short))
        object.__setattr__(tokens, "prompt_of", torch.tensor([0 if n == 9 else 1 for n, _ in LENGTHS]))
    return made


@pytest.mark.parametrize("call", [0, 10**6])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_are_those_of_rows_of_their_own(
    family: str, shared: bool, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "_CALL", {"cpu": call, "cuda": call})
    one = CausalLM(tiny(family, **FAMILIES[family]), byte_tokenizer())
    move(one)
    batch = rollout(shared)
    assert one._layer is not None
    assert one._layer.pack == PACKS[family]
    found, expected = one.evaluate(batch, ALL).columns, plain(one.model, batch)
    for name in ALL:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)
    gradients = (torch.autograd.grad(weighted(columns), one.parameters()) for columns in (found, expected))
    for actual, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()) + 1e-7)


@pytest.mark.parametrize(("shared", "tokens"), [(True, 9 + 4 + 65), (False, 4 * 9 + 3 * 4 + 65)])
def test_every_token_goes_through_once_and_a_shared_prompt_too(
    shared: bool, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = CausalLM(tiny("Qwen3"), byte_tokenizer())
    seen: list[tuple[int, ...]] = []
    one.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    with torch.no_grad():
        one.evaluate(rollout(shared), ALL)
    # The last token of a completion is nobody's input.
    assert seen == [(1, tokens)]


def test_the_models_own_attention_is_put_back_also_after_an_error() -> None:
    model = tiny("Qwen3")
    batch = Packing.of([torch.tensor([1, 2, 3]), torch.tensor([4])], [None, 0])
    before = model.config._attn_implementation
    batch.states(model.model)
    assert model.config._attn_implementation == before
    broken = Packing.of([torch.tensor([10**6])])
    with pytest.raises(IndexError):
        broken.states(model.model)
    assert model.config._attn_implementation == before
    assert packing._PACKING.get() is None


@pytest.mark.parametrize(
    "options", [{"sliding_window": 4, "use_sliding_window": True}, {"_attn_implementation": "flex"}]
)
def test_windows_and_other_attention_are_not_packed(options: dict[str, Any]) -> None:
    model = tiny("Qwen3")
    for name, value in options.items():
        setattr(model.config, name, value)
    assert not states.can_pack(model, model.model)


def test_an_architecture_that_ignores_the_positions_it_is_given_is_not_packed() -> None:
    model = tiny("Qwen3")
    forward = model.model.forward

    def shifted(*args: Any, position_ids: Tensor, **kwargs: Any) -> Any:
        return forward(*args, position_ids=torch.arange(position_ids.shape[1])[None], **kwargs)

    assert states.can_pack(model, model.model)
    model.model.forward = shifted
    assert not states.can_pack(model, model.model)


def test_an_attention_with_an_argument_of_its_own_is_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("Qwen3")
    attention = model.model.layers[0].self_attn
    monkeypatch.setattr(attention, "sliding_window", 3)
    assert not states.can_pack(model, model.model)


@pytest.mark.parametrize("call", [0, 3, 20, 10**6])
def test_buckets_hold_every_row_once_and_no_cut_would_save_more_than_a_call(call: int) -> None:
    lengths = torch.randint(1, 40, (30,), generator=torch.Generator().manual_seed(1)).tolist()
    found = buckets_of(lengths, call)
    assert sorted(i for bucket in found for i in bucket) == list(range(30))
    for bucket in found:
        sizes = [lengths[i] for i in bucket]
        assert sizes == sorted(sizes, reverse=True)
        assert all((len(sizes) - k) * (sizes[0] - sizes[k]) <= call for k in range(1, len(sizes)))
    for one, other in itertools.pairwise(found):
        assert lengths[one[-1]] > lengths[other[0]]
    assert len(found) == 1 or call < 10**6

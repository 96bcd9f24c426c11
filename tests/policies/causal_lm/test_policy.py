"""The language model policy against Hugging Face's own forward, token by token and row by row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from polopt.core.errors import UsageError
from polopt.core.example import Example
from polopt.core.policy import Request, Sampling
from polopt.core.rollout import Rollout, Source
from polopt.policies.causal_lm.loading import LoraOptions, add_lora
from polopt.policies.causal_lm.payload import TokenPayload
from polopt.policies.causal_lm.policy import CausalLM, trajectory_seeds
from polopt.training.checkpoint import load_checkpoint, save_checkpoint
from tests.policies.causal_lm.models import BOS, EOS, byte_tokenizer, tiny, token_rollout

ALL = frozenset({"logp", "entropy", "lse", "collision"})
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen3": {},
    "Llama": {"tie_word_embeddings": True},
    "GPT2": {},
    "Gemma2": {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "Cohere": {"logit_scale": 0.3},
    "Granite": {"logits_scaling": 3.0},
}


def policy(family: str = "Qwen3", *, lora: bool = False, **options: Any) -> CausalLM:
    model = tiny(family, **options)
    return CausalLM(add_lora(model, LoraOptions(rank=2)) if lora else model, byte_tokenizer())


def move(one: CausalLM, seed: int = 0, by: float = 0.1) -> None:
    """What an optimizer step would do."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in one.parameters():
            parameter += by * torch.randn(parameter.shape, generator=generator)
    one.version += 1


def plain(model: Any, rollout: Rollout) -> dict[str, Tensor]:
    """One unpadded row at a time through the model's own forward, in its dtype."""
    payload = rollout.payload
    assert isinstance(payload, TokenPayload)
    columns: dict[str, list[Tensor]] = {"logp": [], "entropy": [], "lse": [], "collision": []}
    for i, completion in enumerate(payload.completion_ids):
        prompt = payload.prompts[int(payload.prompt_of[i])]
        logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0]
        for t, token in enumerate(completion):
            z = logits[len(prompt) - 1 + t] / float(payload.temperature[i])
            columns["lse"].append(z.logsumexp(-1))
            columns["collision"].append(z.softmax(-1).square().sum())
            columns["logp"].append(z.log_softmax(-1)[token])
            columns["entropy"].append(-(z.softmax(-1) * z.log_softmax(-1)).sum())
    return {name: torch.stack(values) for name, values in columns.items()}


def weighted(columns: Mapping[str, Tensor]) -> Tensor:
    """A scalar in which every step of every column counts differently."""
    generator = torch.Generator().manual_seed(3)
    terms = [(torch.randn(len(columns[n]), generator=generator) * columns[n].float()).sum() for n in sorted(columns)]
    return torch.stack(terms).sum()


# --- evaluate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_evaluate_is_the_models_own_forward_whatever_the_padding(family: str) -> None:
    one = policy(family, **FAMILIES[family])
    assert one._layer is not None  # the fused way, not the fallback
    rollout = token_rollout(temperature=[1.0, 0.5, 2.0, 0.8])
    with torch.no_grad():
        found = one.evaluate(rollout, ALL)
        expected = plain(one.model, rollout)
    for name in ALL:
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "lora"), [(f, False) for f in FAMILIES] + [("Qwen3", True), ("GPT2", True)])
def test_gradient_is_that_of_the_models_own_forward_for_every_parameter(family: str, lora: bool) -> None:
    one = policy(family, lora=lora, **FAMILIES[family])
    move(one)  # B = 0 would hide the gradient of A
    rollout = token_rollout(temperature=[1.0, 0.5, 2.0, 0.8])
    found = torch.autograd.grad(weighted(one.evaluate(rollout, ALL).columns), one.parameters())
    expected = torch.autograd.grad(weighted(plain(one.model, rollout)), one.parameters())
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()) + 1e-7)
    assert any(bool(gradient.any()) for gradient in found)


class OwnHead(nn.Module):
    """An output layer that the fused way cannot know."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden) ** 3


def twisted(model: Any) -> Any:
    """A model whose configuration does not tell what its forward does to the logits."""
    forward = model.forward

    def altered(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits = out.logits * 0.5
        return out

    model.forward = altered
    return model


def with_own_head(model: Any) -> Any:
    model.lm_head = OwnHead(model.lm_head)
    return model


@pytest.mark.parametrize("change", [with_own_head, twisted])
def test_an_output_layer_with_a_twist_goes_through_the_models_logits(change: Callable[[Any], Any]) -> None:
    one = CausalLM(change(tiny()), byte_tokenizer())
    assert one._layer is None
    one.add_critic()
    rollout = token_rollout(temperature=[1.0, 0.5, 2.0, 0.8])
    found = one.evaluate(rollout, ALL | {"value"})
    expected = plain(one.model, rollout)
    for name in ALL:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)
    trained = [p for name, p in one.model.named_parameters()]
    for actual, wanted in zip(
        torch.autograd.grad(weighted({n: found[n] for n in ALL}), trained),
        torch.autograd.grad(weighted(expected), trained),
        strict=True,
    ):
        torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()) + 1e-7)


def test_a_trajectory_does_not_depend_on_its_batch() -> None:
    one, rollout = policy(), token_rollout()
    with torch.no_grad():
        together = torch.split(one.evaluate(rollout, ALL)["entropy"], rollout.lengths.tolist())
        for index, expected in enumerate(together):
            alone = one.evaluate(rollout.select(torch.tensor([index])), ALL)["entropy"]
            torch.testing.assert_close(alone, expected, rtol=1e-5, atol=1e-6)


def test_dropout_is_off_even_in_training_mode() -> None:
    one, rollout = policy("GPT2"), token_rollout()
    assert one.model.config.resid_pdrop > 0
    with torch.no_grad():
        expected = one.evaluate(rollout, ALL)
        one.model.train()
        found = one.evaluate(rollout, ALL)
        assert one.model.training
        torch.manual_seed(0)
        dropped = plain(one.model, rollout)["logp"]
    assert torch.equal(found.logp, expected.logp)
    assert (dropped - expected.logp).abs().max() > 1e-3


def test_bfloat16_autocast_is_close_and_returns_float32() -> None:
    exact = policy()
    half = CausalLM(exact.model, exact.tokenizer, dtype=torch.bfloat16)
    rollout = token_rollout()
    found = half.evaluate(rollout, ALL)
    expected = exact.evaluate(rollout, ALL)
    for name in ALL:
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], expected[name], rtol=0.05, atol=0.1)
    assert not torch.equal(found.logp, expected.logp)
    gradient = torch.autograd.grad(found.logp.sum(), half.parameters())
    wanted = torch.autograd.grad(expected.logp.sum(), exact.parameters())
    for actual, reference in zip(gradient, wanted, strict=True):
        assert actual.dtype == torch.float32
        assert (actual - reference).norm() <= 0.1 * reference.norm() + 1e-6


def test_a_model_of_the_policy_does_not_spoil_its_gradient_under_autocast() -> None:
    """Autocast reuses casts; one made without gradient must not reach the pass that needs one."""
    one = policy(lora=True)
    one.dtype = torch.bfloat16
    move(one)
    one.add_model("ref")
    rollout = token_rollout()
    alone = torch.autograd.grad(one.evaluate(rollout, frozenset({"logp"})).logp.sum(), one.parameters())
    both = torch.autograd.grad(one.evaluate(rollout, frozenset({"logp", "logp/ref"})).logp.sum(), one.parameters())
    for actual, wanted in zip(both, alone, strict=True):
        assert torch.equal(actual, wanted)


def test_unknown_names_and_other_payloads_are_refused() -> None:
    one = policy()
    for name in ("value", "logp/ref", "kurtosis"):
        with pytest.raises(ValueError, match=f"cannot evaluate '{name}'"):
            one.evaluate(token_rollout(), frozenset({name}))
    with pytest.raises(TypeError, match="not of NoneType"):
        one.evaluate(Rollout(torch.tensor([1]), torch.tensor([0])), ALL)


def test_cost_counts_the_prompt() -> None:
    assert policy().cost(token_rollout(((3, 5), (7, 1)))) == [8, 8]


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True])
def test_added_models_keep_the_weights_of_their_moment(lora: bool) -> None:
    one, rollout = policy(lora=lora), token_rollout()
    names, moments = frozenset({"logp"}), {}
    for name in ("start", "later"):
        one.add_model(name)
        moments[name] = one.evaluate(rollout, names).logp.detach()
        move(one)
    live = one.evaluate(rollout, names).logp
    found = one.evaluate(rollout, frozenset({"logp", "logp/start", "logp/later"}))
    for name, expected in moments.items():
        assert not found[f"logp/{name}"].requires_grad
        torch.testing.assert_close(found[f"logp/{name}"], expected, rtol=0, atol=1e-6)
        assert (expected - live).abs().max() > 1e-3
    assert found.logp.requires_grad
    assert torch.equal(found.logp, live)  # the policy's own weights and adapters are back
    one.add_model("start")  # and a name can move on
    torch.testing.assert_close(one.evaluate(rollout, frozenset({"logp/start"}))["logp/start"], live.detach())


def test_the_reference_of_a_lora_run_is_its_base_and_costs_nothing() -> None:
    one, rollout = policy(lora=True), token_rollout()
    one.add_model("ref")
    assert one.state_dict()["models"] == {"ref": {"kind": "base"}}
    move(one)
    found = one.evaluate(rollout, frozenset({"logp/ref"}))["logp/ref"]
    torch.testing.assert_close(found, plain(tiny(), rollout)["logp"], rtol=1e-5, atol=1e-5)
    one.add_model("lagged")
    sizes = {name: value.numel() for name, value in one.state_dict()["models"]["lagged"]["tensors"].items()}
    assert sum(sizes.values()) == sum(p.numel() for p in one.parameters())  # adapters, not the model


def test_live_adapters_come_back_after_an_error() -> None:
    one = policy(lora=True)
    move(one)
    one.add_model("lagged")
    move(one)
    before = [p.detach().clone() for p in one.parameters()]

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    hook = one.model.get_base_model().model.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        one.evaluate(token_rollout(), frozenset({"logp/lagged"}))
    hook.remove()
    assert all(torch.equal(p, kept) for p, kept in zip(one.parameters(), before, strict=True))


# --- critic -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True])
def test_the_critic_values_the_prefix_before_each_step(lora: bool) -> None:
    one, rollout = policy(lora=lora), token_rollout()
    count = len(one.parameters())
    one.add_critic()
    one.add_critic()
    assert len(one.parameters()) == count + 2
    assert "value" in one.columns
    assert torch.equal(one.evaluate(rollout, frozenset({"value"})).value, torch.zeros(rollout.n_steps))
    move(one)
    found = one.evaluate(rollout, frozenset({"value", "logp"}))
    payload, head, expected = rollout.payload, one.critic, []
    assert isinstance(payload, TokenPayload) and head is not None
    for i, completion in enumerate(payload.completion_ids):
        prompt = payload.prompts[int(payload.prompt_of[i])]
        for t in range(len(completion)):
            prefix = torch.tensor([prompt + completion[:t]])  # the step's own token is not part of what is valued
            hidden = one.model(input_ids=prefix, output_hidden_states=True).hidden_states[-1][0, -1]
            expected.append(hidden @ head.linear.weight[0] + head.linear.bias[0])
    torch.testing.assert_close(found.value, torch.stack(expected), rtol=1e-4, atol=1e-5)
    gradients = torch.autograd.grad(found.value.sum(), one.parameters(), allow_unused=True)
    assert all(g is not None for g in gradients[-2:])
    assert any(g is not None and bool(g.any()) for g in gradients[:-2])  # the trunk is shared


# --- state and saving -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True])
def test_state_round_trip_through_a_checkpoint(tmp_path: Path, lora: bool) -> None:
    one, rollout = policy(lora=lora), token_rollout()
    one.add_model("ref")
    one.add_critic()
    move(one)
    one.add_model("lagged")
    move(one)
    names = frozenset({"logp", "value", "logp/ref", "logp/lagged"})
    expected = one.evaluate(rollout, names)
    state = load_checkpoint(save_checkpoint(tmp_path, 2, one.state_dict()))
    other = policy(lora=lora)
    before = other.parameters()
    other.load_state_dict(state)
    assert all(a is b for a, b in zip(before, other.parameters(), strict=False))  # an optimizer holds them
    assert other.version == 2
    found = other.evaluate(rollout, names)
    for name in names:
        assert torch.equal(found[name], expected[name])
    if lora:
        assert all("lora_" in name for name in one.state_dict()["model"])


def test_a_state_that_does_not_fit_names_the_weight() -> None:
    one = policy()
    state = one.state_dict()
    lacking = {**state, "model": {n: v for n, v in state["model"].items() if n != "lm_head.weight"}}
    with pytest.raises(UsageError, match=r"the state lacks 'lm_head\.weight' of the model \(1 names differ\)"):
        one.load_state_dict(lacking)
    with pytest.raises(UsageError, match=r"the policy lacks 'extra'"):
        one.load_state_dict({**state, "model": {**state["model"], "extra": torch.zeros(1)}})
    with pytest.raises(UsageError, match=r"'lm_head\.weight' of the model has shape \(2, 3\), expected \(258, 32\)"):
        one.load_state_dict({**state, "model": {**state["model"], "lm_head.weight": torch.zeros(2, 3)}})
    with pytest.raises(UsageError, match="it lacks 'critic'"):
        one.load_state_dict({"version": 0, "model": {}, "models": {}})
    with pytest.raises(UsageError, match="model 'ref' is of kind 'base', but this policy trains all weights"):
        one.load_state_dict({**state, "models": {"ref": {"kind": "base"}}})
    one.add_critic()
    with pytest.raises(UsageError, match="the state has no critic"):
        one.load_state_dict(state)


@pytest.mark.parametrize(("family", "lora"), [("Qwen3", False), ("Qwen3", True), ("GPT2", True)])
def test_what_is_saved_loads_with_transformers_alone(tmp_path: Path, family: str, lora: bool) -> None:
    one, rollout = policy(family, lora=lora), token_rollout()
    move(one)
    one.add_critic()
    with torch.no_grad():
        expected = one.evaluate(rollout, ALL)
        one.save(tmp_path / "out")
        after = one.evaluate(rollout, ALL)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        found = plain(loaded, rollout)
    for name in ALL:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4)
        assert torch.equal(after[name], expected[name])  # saving changes nothing
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a b")["input_ids"] == one.tokenizer("a b")["input_ids"]
    assert (tmp_path / "out" / "critic.safetensors").is_file()
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file() == lora
    assert not list((tmp_path / "out").rglob("*.bin"))
    again = CausalLM.load(tmp_path / "out", device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(again.evaluate(rollout, ALL).logp, expected.logp, rtol=1e-4, atol=1e-4)


def test_a_saved_critic_can_be_taken_up_again(tmp_path: Path) -> None:
    one, rollout = policy(), token_rollout()
    one.add_critic()
    move(one)
    one.save(tmp_path)
    other = CausalLM.load(tmp_path, device="cpu")
    other.load_critic(tmp_path)
    names = frozenset({"value"})
    torch.testing.assert_close(other.evaluate(rollout, names).value, one.evaluate(rollout, names).value)
    with pytest.raises(UsageError, match="holds no critic"):
        policy().load_critic(tmp_path / "elsewhere")
    smaller = policy(hidden_size=16)
    with pytest.raises(UsageError, match=r"critic of shapes .*\(1, 32\).* this model needs .*\(1, 16\)"):
        smaller.load_critic(tmp_path)


def test_load_with_lora(tmp_path: Path) -> None:
    policy().save(tmp_path)
    one = CausalLM.load(tmp_path, lora=LoraOptions(rank=2), device="cpu", precision="float32")
    assert one.dtype is None
    rollout = token_rollout()
    torch.testing.assert_close(one.evaluate(rollout, ALL).logp, policy().evaluate(rollout, ALL).logp)
    assert sum(p.numel() for p in one.parameters()) < sum(p.numel() for p in policy().parameters()) / 4


# --- prompts ----------------------------------------------------------------------------------------------------------


def ask(prompt: Any, name: str = "q7", count: int = 1, replaced: Any = None) -> Request:
    return Request(Example(name, prompt), count, replaced)


def test_prompts_are_tokenized_as_the_tokenizer_does() -> None:
    one = policy()
    assert one.tokenize_prompt("hi", "x") == one.tokenizer("hi")["input_ids"]
    chat = ({"role": "user", "content": "2+2?"},)
    assert one.tokenize_prompt(chat, "x") == one.tokenizer("user:2+2?<eos>assistant:")["input_ids"]
    assert one.tokenize_prompt("hi<eos>", "x")[-1] == EOS  # the text says so itself


def test_what_a_tokenizer_puts_in_front_stays_and_what_it_appends_goes() -> None:
    from tokenizers.processors import TemplateProcessing

    one = policy()
    specials = [("<bos>", BOS), ("<eos>", EOS)]
    one.tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<bos> $A <eos>", special_tokens=specials)
    bare = one.tokenizer("hi", add_special_tokens=False)["input_ids"]
    assert one.tokenizer("hi")["input_ids"] == [BOS, *bare, EOS]
    assert one.tokenize_prompt("hi", "x") == [BOS, *bare]
    assert one.tokenize_prompt("hi<eos>", "x") == [BOS, *bare, EOS]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt of example 'q7' is empty"),
        ((), "the prompt of example 'q7' is empty"),
        (
            "x" * 64,
            "the prompt of example 'q7' has 64 tokens; the model's context of 64 tokens leaves room for at most 63",
        ),
    ],
)
def test_prompts_that_cannot_be_used_name_their_example(prompt: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        policy().sample([ask("fine", "ok"), ask(prompt)], Sampling(), seed=0)


def test_a_chat_without_template() -> None:
    one = CausalLM(tiny(), byte_tokenizer(template=False))
    with pytest.raises(UsageError, match="example 'q7' is a chat, but the tokenizer has no chat template"):
        one.sample([ask(({"role": "user", "content": "hi"},))], Sampling(), seed=0)


def test_the_longest_prompt_that_fits_gets_one_token() -> None:
    rollout = policy().sample([ask("x" * 63)], Sampling(), seed=0)
    assert rollout.lengths.tolist() == [1]


def test_end_ids_are_the_union_of_what_model_and_tokenizer_say() -> None:
    model = tiny()
    model.generation_config.eos_token_id = [5, 6]
    model.config.eos_token_id = 7
    assert CausalLM(model, byte_tokenizer()).eos_ids == (5, 6, 7, EOS)


def test_a_tokenizer_of_another_model_is_refused() -> None:
    with pytest.raises(UsageError, match="they do not belong together"):
        CausalLM(tiny(vocab_size=200, bos_token_id=1, eos_token_id=1, pad_token_id=1), byte_tokenizer())


# --- sampling ---------------------------------------------------------------------------------------------------------

SHORT = Sampling(max_new_tokens=7)


def same_trajectories(one: Rollout, other: Rollout) -> bool:
    assert isinstance(one.payload, TokenPayload) and isinstance(other.payload, TokenPayload)
    return one.payload.completion_ids == other.payload.completion_ids


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_sampled_log_probs_are_those_of_evaluate(family: str, temperature: float) -> None:
    one = policy(family, **FAMILIES[family])
    requests = [ask("ab", "1", 3), ask("a longer prompt", "2", 2)]
    rollout = one.sample(requests, Sampling(temperature=temperature, max_new_tokens=7), seed=1)
    with torch.no_grad():
        found = one.evaluate(rollout, frozenset({"logp", "entropy"}))
    torch.testing.assert_close(rollout.logp, found.logp, rtol=0, atol=1e-5)
    torch.testing.assert_close(rollout["entropy"], found.entropy, rtol=0, atol=1e-5)


def test_under_bfloat16_sampler_and_learner_agree_to_its_rounding() -> None:
    one = policy()
    one.dtype = torch.bfloat16
    rollout = one.sample([ask("ab", "1", 8), ask("a longer prompt", "2", 8)], SHORT, seed=1)
    with torch.no_grad():
        gap = (one.evaluate(rollout, frozenset({"logp"})).logp - rollout.logp).abs()
    # Logits of size 4 to 8 are rounded to steps of 1/32; keys and values of the same prefix round alike.
    assert gap.mean() < 0.02
    assert gap.max() < 0.15


def test_a_rollout_has_its_columns_groups_and_texts() -> None:
    one = policy()
    one.version = 3
    chat = ({"role": "user", "content": "hi"},)
    requests = [ask("plain", "1", 2), ask("none", "2", 0), ask("replaced", "3", 1, chat)]
    rollout = one.sample(requests, SHORT, seed=0)
    assert rollout.group.tolist() == [0, 0, 1]
    assert set(rollout.names()) == {"action", "logp", "entropy", "mask", "truncated", "version", "source"}
    assert rollout.mask.all()
    assert rollout["version"].tolist() == [3] * 3
    assert rollout["source"].tolist() == [Source.POLICY] * 3
    payload = rollout.payload
    assert isinstance(payload, TokenPayload)
    assert [e.id for e in payload.examples] == ["1", "1", "3"]
    assert payload.prompt_texts == ("plain", "plain", chat)
    assert len(payload.prompts) == 2
    assert payload.lengths.tolist() == rollout.lengths.tolist()
    for ids, text, cut in zip(payload.completion_ids, payload.completions, rollout["truncated"].tolist(), strict=True):
        assert cut == (ids[-1] != EOS)
        assert text == one.tokenizer.decode([i for i in ids if i < BOS])


def test_truncated_sampling_adds_the_log_prob_it_was_drawn_with() -> None:
    one = policy()
    rollout = one.sample([ask("ab", "1", 4)], Sampling(top_k=3, max_new_tokens=7), seed=0)
    assert (rollout["logp/sampled"] > rollout.logp).all()
    with torch.no_grad():
        torch.testing.assert_close(one.evaluate(rollout, ALL).logp, rollout.logp, rtol=0, atol=1e-5)


def test_a_trajectory_depends_on_its_seed_and_place_alone() -> None:
    one = policy()
    first, second = ask("ab", "1", 3), ask("cdef", "2", 2)
    both = one.sample([first, second], SHORT, seed=1)
    assert same_trajectories(one.sample([first, second], SHORT, seed=1), both)
    assert not same_trajectories(one.sample([first, second], SHORT, seed=2), both)
    assert same_trajectories(one.sample([first], SHORT, seed=1), both.select(torch.arange(3)))
    more = one.sample([ask("ab", "1", 5), ask("other", "9", 1)], SHORT, seed=1)
    assert same_trajectories(more.select(torch.arange(3)), both.select(torch.arange(3)))
    few_rows = CausalLM(one.model, one.tokenizer, max_rows=2)
    assert same_trajectories(few_rows.sample([first, second], SHORT, seed=1), both)


def test_seeds_are_distinct_across_seeds_requests_and_members() -> None:
    seeds = torch.cat([trajectory_seeds(seed, [3, 0, 4]) for seed in range(50)])
    assert seeds.unique().numel() == 50 * 7
    assert int(seeds.min()) >= 0
    assert torch.equal(trajectory_seeds(0, [3, 2])[:3], trajectory_seeds(0, [3])[:3])


def test_nothing_to_sample() -> None:
    with pytest.raises(UsageError, match="nothing to sample"):
        policy().sample([ask("a", "1", 0)], SHORT, seed=0)


def test_default_length_and_progress() -> None:
    one = CausalLM(tiny(), byte_tokenizer(), default_max_new_tokens=3)
    seen: list[tuple[int, int]] = []
    rollout = one.sample([ask("ab", "1", 4)], Sampling(), seed=0, progress=lambda done, all_: seen.append((done, all_)))
    assert int(rollout.lengths.max()) <= 3
    assert seen[-1] == (4, 4)

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from polopt.core.errors import UsageError
from polopt.policies.causal_lm import decoder
from polopt.policies.causal_lm.decoder import Generations, Sampling, decode, decode_with_generate, generate, supports
from polopt.policies.sampling import draw, kept_tokens, uniforms

VOCAB = 100
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15, 16, 17], [18, 19], [5, 6, 7, 20]]
COUNTS = [2, 3, 1, 0, 4]
EOS = [2, 3, 4]


def tiny(family: str, *, tied: bool = False, kv_heads: int = 2, context: int = 64, **extra: Any) -> Any:
    configs = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
    models_ = {"llama": LlamaForCausalLM, "qwen2": Qwen2ForCausalLM, "qwen3": Qwen3ForCausalLM}
    torch.manual_seed(0)
    config = configs[family](
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=8,
        max_position_embeddings=context,
        tie_word_embeddings=tied,
        initializer_range=0.25,
        pad_token_id=0,
        **extra,
    )
    model = models_[family](config)
    # Norm weights of one and biases of zero would hide that they are applied at all.
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def run(model: Any, how: Any = decode, sampling: Sampling | None = None, seed: int = 0, **extra: Any) -> Generations:
    seeds = torch.arange(seed, seed + sum(COUNTS))
    options = {"eos_ids": EOS, "entropy": True, **extra}
    return how(model, PROMPTS, COUNTS, seeds, sampling or Sampling(max_new_tokens=24), **options)


def split(generations: Generations, column: str = "ids") -> list[Tensor]:
    return list(getattr(generations, column).split(generations.lengths.tolist()))


def owners(prompts: list[list[int]] = PROMPTS, counts: list[int] = COUNTS) -> list[list[int]]:
    return [prompt for prompt, count in zip(prompts, counts, strict=True) for _ in range(count)]


@torch.no_grad()
def forward_logps(model: Any, generations: Generations, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probs of the generated tokens and entropies, from the model's own forward, one trajectory at a time."""
    logps, entropies = [], []
    for prompt, ids in zip(owners(), split(generations), strict=True):
        full = torch.cat((torch.tensor(prompt), ids))[None]
        rows = (model(full).logits[0, len(prompt) - 1 : -1].float() / temperature).log_softmax(-1)
        logps.append(rows.gather(1, ids[:, None])[:, 0])
        entropies.append(-(rows.exp() * rows).sum(-1))
    return torch.cat(logps), torch.cat(entropies)


def assert_same(one: Generations, two: Generations) -> None:
    assert one.lengths.tolist() == two.lengths.tolist()
    assert one.ids.tolist() == two.ids.tolist()
    assert one.truncated.tolist() == two.truncated.tolist()
    for name in ("logp", "logp_sampled", "entropy"):
        left, right = getattr(one, name), getattr(two, name)
        assert (left is None) == (right is None)
        if left is not None:
            torch.testing.assert_close(left, right, atol=2e-5, rtol=0)


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
MODELS = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tied": True}),
    "llama no grouping": ("llama", {"kv_heads": 4}),
    "llama one key head": ("llama", {"kv_heads": 1}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama llama3 rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama yarn rope": ("llama", {"rope_parameters": YARN_ROPE}),
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {"tied": True}),
    "qwen3": ("qwen3", {}),
    "qwen3 tied": ("qwen3", {"tied": True}),
}


@pytest.mark.parametrize("name", MODELS)
def test_logps_and_entropies_are_those_of_the_models_own_forward(name: str) -> None:
    family, extra = MODELS[name]
    model = tiny(family, **extra)
    assert supports(model)
    generations = run(model, sampling=Sampling(temperature=1.3, max_new_tokens=24))
    logps, entropies = forward_logps(model, generations, temperature=1.3)
    torch.testing.assert_close(generations.logp, logps, atol=1e-5, rtol=0)
    torch.testing.assert_close(generations.entropy, entropies, atol=1e-5, rtol=1e-5)
    assert generations.logp.dtype == torch.float32
    assert generations.logp_sampled is None
    assert len(set(generations.lengths.tolist())) > 2  # rows ended at different times


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_bf16_weights_agree_with_the_bf16_forward(family: str) -> None:
    model = tiny(family).to(torch.bfloat16)
    generations = run(model)
    logps, _ = forward_logps(model, generations)
    gap = (generations.logp - logps).abs()
    assert generations.logp.dtype == torch.float32
    assert gap.max() < 0.25 and gap.mean() < 0.02


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "lora"])
def test_bf16_autocast_agrees_with_the_forward_under_autocast(family: str) -> None:
    model = lora("qwen2") if family == "lora" else tiny(family)
    generations = run(model, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        logps, _ = forward_logps(model, generations)
        ambient = run(model)
    gap = (generations.logp - logps).abs()
    exact = (generations.logp - forward_logps(model, generations)[0]).abs()
    assert gap.max() < 0.25 and gap.mean() < 0.02
    assert gap.mean() < exact.mean()  # the float32 forward is further away: bf16 was really used
    assert_same(generations, ambient)


@pytest.mark.parametrize("name", ["llama", "qwen2 tied", "qwen3"])
@pytest.mark.parametrize(
    "sampling", [Sampling(max_new_tokens=20), Sampling(0.8, top_p=0.9, top_k=30, max_new_tokens=20)]
)
def test_the_fallback_makes_the_same_choices(name: str, sampling: Sampling) -> None:
    family, extra = MODELS[name]
    model = tiny(family, **extra)
    native = run(model, sampling=sampling)
    assert_same(native, run(model, decode_with_generate, sampling))
    assert_same(native, run(model, decode_with_generate, sampling, max_rows=3))
    assert_same(native, run(model, generate, sampling))


def test_the_fallback_ignores_the_models_own_generation_defaults() -> None:
    model = tiny("llama")
    expected = run(model)
    model.generation_config.repetition_penalty = 3.0
    model.generation_config.eos_token_id = 50
    kept = model.generation_config
    assert_same(expected, run(model, decode_with_generate))
    assert model.generation_config is kept


def test_unsupported_models_go_through_the_fallback_and_match_their_forward() -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=32, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3, pad_token_id=0
    )
    model = GPT2LMHeadModel(config).train()
    assert not supports(model)
    with pytest.raises(UsageError, match="GPT2LMHeadModel has no native decoder"):
        run(model)
    generations = run(model, generate, Sampling(max_new_tokens=100))
    assert model.training
    logps, entropies = forward_logps(model.eval(), generations)
    torch.testing.assert_close(generations.logp, logps, atol=1e-5, rtol=0)
    torch.testing.assert_close(generations.entropy, entropies, atol=1e-5, rtol=1e-5)
    full = [len(prompt) + length for prompt, length in zip(owners(), generations.lengths.tolist(), strict=True)]
    assert all((total == 32) == cut for total, cut in zip(full, generations.truncated.tolist(), strict=True))
    assert_same(generations, run(model, generate, Sampling(max_new_tokens=100), max_rows=2))


def test_sliding_windows_are_left_to_the_fallback() -> None:
    model = tiny("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1)
    assert not supports(model)
    generations = run(model, generate)
    torch.testing.assert_close(generations.logp, forward_logps(model, generations)[0], atol=1e-5, rtol=0)


def test_hooked_and_patched_modules_are_left_to_the_fallback() -> None:
    model = tiny("llama")
    handle = model.model.layers[0].register_forward_hook(lambda module, args, out: out * 0.5)
    assert not supports(model)
    handle.remove()
    assert supports(model)
    model.model.layers[1].mlp.forward = lambda x: x
    assert not supports(model)


def test_a_hooked_projection_is_called_not_bypassed() -> None:
    model = tiny("llama")
    before = run(model)
    model.model.layers[0].self_attn.v_proj.register_forward_hook(lambda module, args, out: out * 3)
    after = run(model)
    torch.testing.assert_close(after.logp, forward_logps(model, after)[0], atol=1e-5, rtol=0)
    assert after.ids.tolist() != before.ids.tolist()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_greedy_is_what_generate_gives(family: str) -> None:
    model = tiny(family)
    generations = run(model, sampling=Sampling(temperature=0, max_new_tokens=24))
    for prompt, ids in zip(owners(), split(generations), strict=True):
        tokens = torch.tensor([prompt])
        reference = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=24, eos_token_id=EOS
        )
        assert reference[0, len(prompt) :].tolist() == ids.tolist()
    torch.testing.assert_close(generations.logp, forward_logps(model, generations)[0], atol=1e-5, rtol=0)


def test_greedy_with_truncation_is_a_certain_choice() -> None:
    generations = run(tiny("llama"), sampling=Sampling(temperature=0, top_p=0.5, max_new_tokens=4))
    assert generations.logp_sampled is not None
    assert (generations.logp_sampled == 0).all() and (generations.logp < 0).all()


# --- a trajectory is a function of the weights, its prompt and its seed -------------------------------------------


@pytest.mark.parametrize("max_rows", [1, 3, 4, 9])
@pytest.mark.parametrize("every", [1, 8])
def test_max_rows_and_inspection_interval_change_nothing(
    max_rows: int, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama", context=128)
    expected = run(model, sampling=Sampling(max_new_tokens=60))
    monkeypatch.setattr(decoder, "INSPECT_EVERY", {"cpu": every})
    assert_same(expected, run(model, sampling=Sampling(max_new_tokens=60), max_rows=max_rows))


def test_prefill_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("qwen3")
    expected = run(model)
    monkeypatch.setattr(decoder, "PREFILL_TOKENS", 10)
    assert_same(expected, run(model))


def test_every_prompt_is_prefilled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen, prefill = tiny("llama"), [], decoder._prefill

    def counting(network: Any, prompts: list[list[int]], *rest: Any) -> Any:
        seen.extend(map(tuple, prompts))
        return prefill(network, prompts, *rest)

    monkeypatch.setattr(decoder, "_prefill", counting)
    run(model, max_rows=2)
    wanted = [tuple(prompt) for prompt, count in zip(PROMPTS, COUNTS, strict=True) if count]
    assert sorted(seen) == sorted(wanted)


def test_neighbours_and_order_change_nothing() -> None:
    model = tiny("qwen2")
    together = run(model)
    alone = [
        decode(model, [prompt], [1], torch.tensor([seed]), Sampling(max_new_tokens=24), eos_ids=EOS)
        for seed, prompt in enumerate(owners())
    ]
    assert together.ids.tolist() == torch.cat([g.ids for g in alone]).tolist()
    assert together.lengths.tolist() == [int(g.lengths) for g in alone]
    backwards = decode(
        model, owners()[::-1], [1] * 10, torch.arange(10).flip(0), Sampling(max_new_tokens=24), eos_ids=EOS
    )
    assert [ids.tolist() for ids in split(backwards)][::-1] == [ids.tolist() for ids in split(together)]


@pytest.mark.parametrize(("ends", "groups", "method"), [(1, 12, "_moved"), (14, 120, "_moved_left")])
def test_long_ragged_batches_survive_growth_reuse_and_compaction(
    ends: int, groups: int, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hundreds of steps through few slots: blocks grow, columns are reclaimed, slots change hands."""
    model = tiny("llama", context=400)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(20, VOCAB, size=rng.integers(1, 40)).tolist() for _ in range(groups)]
    counts = rng.integers(1, 4, size=groups).tolist()
    calls = []
    original = getattr(decoder._Memory, method)
    monkeypatch.setattr(decoder._Memory, method, lambda memory, x: calls.append(1) or original(memory, x))
    seeds = torch.arange(sum(counts)) * 1000
    generations = decode(
        model, prompts, counts, seeds, Sampling(9.0, max_new_tokens=300), eos_ids=range(2, 2 + ends), max_rows=7
    )
    assert calls
    packed = zip(owners(prompts, counts), split(generations), split(generations, "logp"), strict=True)
    with torch.no_grad():
        for prompt, ids, logp in packed:
            logits = model(torch.cat((torch.tensor(prompt), ids))[None]).logits[0, len(prompt) - 1 : -1]
            expected = (logits / 9).log_softmax(-1).gather(1, ids[:, None])[:, 0]
            torch.testing.assert_close(expected, logp, atol=1e-5, rtol=0)


def test_no_weight_is_kept_across_updates() -> None:
    model = tiny("llama", tied=True)
    before = run(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(torch.tensor([PROMPTS[2]])).logits.logsumexp(-1).mean().backward()
    optimizer.step()
    after = run(model)
    assert before.ids.tolist() != after.ids.tolist()
    torch.testing.assert_close(after.logp, forward_logps(model, after)[0], atol=1e-5, rtol=0)


def test_columns_can_enter_autograd_and_the_model_is_left_as_it_was() -> None:
    model = tiny("llama").train()
    model.model.layers[0].eval()
    flags = [module.training for module in model.modules()]
    generations = run(model)
    assert [module.training for module in model.modules()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    logits = model(torch.tensor([PROMPTS[0]])).logits[0, -1]
    loss = (logits.log_softmax(-1)[generations.ids[:1]] - generations.logp[:1]).exp().sum()
    loss.backward()
    assert any(parameter.grad is not None for parameter in model.parameters())


# --- LoRA -----------------------------------------------------------------------------------------------------------


def lora(family: str) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.5, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False
    )
    return peft.get_peft_model(tiny(family), config).eval()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_lora_adapters_are_applied(family: str) -> None:
    model = lora(family)
    assert supports(model)
    model.train()
    generations = run(model)
    model.eval()
    torch.testing.assert_close(generations.logp, forward_logps(model, generations)[0], atol=1e-5, rtol=0)
    assert_same(generations, run(model, decode_with_generate))
    with model.disable_adapter():
        without = run(model)
        torch.testing.assert_close(without.logp, forward_logps(model, without)[0], atol=1e-5, rtol=0)
    assert without.ids.tolist() != generations.ids.tolist()


def test_prompt_learning_is_not_silently_dropped() -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    assert not supports(peft.get_peft_model(tiny("llama"), config))


# --- the draw -------------------------------------------------------------------------------------------------------


def oracle(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """Full and truncated distribution of one row, token by token."""
    p = np.exp(logits.astype(np.float64) / sampling.temperature)
    p /= p.sum()
    keep = set(range(len(p)))
    ranked = sorted(keep, key=lambda i: -p[i])
    if sampling.top_k:
        keep &= {i for i in keep if p[i] >= p[ranked[min(sampling.top_k, len(p)) - 1]]}
    if sampling.top_p < 1:
        total, mass, nucleus = sum(p[i] for i in keep), 0.0, set()
        for i in ranked:
            if i in keep and mass < sampling.top_p * total:
                nucleus.add(i)
                mass += p[i]
        keep &= nucleus
    keep &= {i for i in keep if p[i] >= sampling.min_p * p.max()}
    q = np.array([p[i] if i in keep else 0.0 for i in range(len(p))])
    return p, q / q.sum()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from([0.3, 1.0, 2.0]),
    st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    st.sampled_from([0, 1, 3, 11, 50]),
    st.sampled_from([0.0, 0.05, 0.3, 1.0]),
)
def test_truncated_distributions_match_a_loop(
    seed: int, temperature: float, top_p: float, top_k: int, min_p: float
) -> None:
    sampling = Sampling(temperature, top_p, top_k, min_p)
    rng = np.random.default_rng(seed)
    logits = (3 * rng.normal(size=(6, 17))).astype(np.float32)
    uniform = torch.from_numpy(rng.random(6))
    chosen = draw(torch.from_numpy(logits), uniform, sampling, entropy=True)
    kept = kept_tokens((torch.from_numpy(logits) / temperature).softmax(-1), sampling) if sampling.truncates else None
    for row in range(6):
        full, truncated = oracle(logits[row], sampling)
        if kept is not None:
            assert kept[row].tolist() == (truncated > 0).tolist()
        cumulative = np.cumsum(truncated)
        token = int(chosen.token[row])
        assert cumulative[token] - truncated[token] - 1e-6 <= float(uniform[row]) <= cumulative[token] + 1e-6
        assert math.isclose(float(chosen.logp[row]), math.log(full[token]), abs_tol=1e-4)
        assert chosen.entropy is not None
        assert math.isclose(float(chosen.entropy[row]), -(full * np.log(full)).sum(), abs_tol=1e-4)
        if chosen.logp_sampled is not None:
            assert math.isclose(float(chosen.logp_sampled[row]), math.log(truncated[token]), abs_tol=1e-4)
        assert (chosen.logp_sampled is None) == (top_p == 1 and top_k == 0 and min_p == 0)


@pytest.mark.parametrize("sampling", [Sampling(1.5, max_new_tokens=1), Sampling(1.5, top_p=0.8, max_new_tokens=1)])
def test_frequencies_follow_the_distribution(sampling: Sampling) -> None:
    model, draws = tiny("llama"), 4000
    generations = decode(model, [PROMPTS[0]], [draws], torch.arange(draws), sampling, eos_ids=[])
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[0]])).logits[0, -1].numpy()
    _, probs = oracle(logits, sampling)
    counts = np.bincount(generations.ids.numpy(), minlength=VOCAB)
    assert counts[probs == 0].sum() == 0
    likely = probs * draws > 5
    chi2 = ((counts - probs * draws) ** 2 / np.maximum(probs * draws, 1e-9))[likely].sum()
    degrees = likely.sum()
    assert degrees > 10
    assert chi2 < degrees + 5 * math.sqrt(2 * degrees)


def splitmix64(seed: int, step: int) -> float:
    """The documented stream in Python's own integers."""
    word = (1 << 64) - 1

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & word
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & word
        return x ^ (x >> 31)

    golden = 0x9E3779B97F4A7C15
    return (mix((mix((seed + golden) & word) + (step + 1) * golden) & word) >> 12) / 2**52


def test_random_numbers_are_a_pure_function_of_seed_and_step() -> None:
    seeds = [0, 1, 2, 17, 2**62, -1, -(2**63)]
    steps = [0, 1, 2, 1000, 2**40]
    table = uniforms(torch.tensor(seeds)[:, None], torch.tensor(steps))
    expected = [[splitmix64(seed, step) for step in steps] for seed in seeds]
    assert table.tolist() == expected
    many = uniforms(torch.arange(300)[:, None], torch.arange(300)).numpy()
    assert abs(many.mean() - 0.5) < 0.005 and abs(many.var() - 1 / 12) < 0.002
    along_seeds = np.corrcoef(many[:-1].ravel(), many[1:].ravel())[0, 1]
    along_steps = np.corrcoef(many[:, :-1].ravel(), many[:, 1:].ravel())[0, 1]
    assert abs(along_seeds) < 0.015 and abs(along_steps) < 0.015


# --- where a completion ends ----------------------------------------------------------------------------------------


def tokenizer() -> PreTrainedTokenizerFast:
    letters = [chr(ord("a") + i % 26) * (1 + i // 26) for i in range(VOCAB)]
    model = models.WordLevel({text: i for i, text in enumerate(letters)}, unk_token="a")
    backend = Tokenizer(model)
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize("how", [decode, decode_with_generate])
@pytest.mark.parametrize("every", [1, 8])
def test_stop_strings_end_at_the_token_that_completes_them(
    how: Any, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "INSPECT_EVERY", {"cpu": every})
    model, text = tiny("llama"), tokenizer()
    stop = ("ccc", "kk", "zq", "ee")
    free = run(model, how, Sampling(max_new_tokens=40))
    stopped = run(model, how, Sampling(max_new_tokens=40, stop=stop), tokenizer=text)
    ends = []
    for ids, cut in zip(split(free), free.truncated.tolist(), strict=True):
        found = [n for n in range(1, len(ids) + 1) if any(s in text.decode(ids[:n]) for s in stop)]
        ends.append((found[0], False) if found else (len(ids), cut))
    assert list(zip(stopped.lengths.tolist(), stopped.truncated.tolist(), strict=True)) == ends
    assert [ids.tolist() for ids in split(stopped)] == [
        ids[:n].tolist() for ids, (n, _) in zip(split(free), ends, strict=True)
    ]
    assert stopped.lengths.tolist() != free.lengths.tolist()


def test_stop_ids_end_a_completion_and_are_part_of_it() -> None:
    model = tiny("llama")
    free = run(model, eos_ids=[], sampling=Sampling(max_new_tokens=40))
    assert free.truncated.all() and (free.lengths == 40).all()
    stopped = run(model, eos_ids=[7], sampling=Sampling(max_new_tokens=40, stop_ids=(30, 31, 32)))
    for whole, ids, cut in zip(split(free), split(stopped), stopped.truncated.tolist(), strict=True):
        hits = [n for n, token in enumerate(whole.tolist()) if token in (7, 30, 31, 32)]
        length = hits[0] + 1 if hits else 40
        assert ids.tolist() == whole[:length].tolist()
        assert cut == (not hits)
    assert not stopped.truncated.all()


def test_an_end_token_at_the_last_allowed_step_is_not_a_truncation() -> None:
    model = tiny("llama")
    free = run(model, eos_ids=[], sampling=Sampling(max_new_tokens=6))
    last = int(free.ids[5])
    again = run(model, eos_ids=[last], sampling=Sampling(max_new_tokens=6))
    first = free.ids[:6].tolist().index(last) + 1
    assert int(again.lengths[0]) == first and not bool(again.truncated[0])


def test_the_context_length_truncates() -> None:
    model = tiny("llama", context=12)
    generations = run(model, sampling=Sampling(max_new_tokens=50), eos_ids=[])
    totals = [len(prompt) + length for prompt, length in zip(owners(), generations.lengths.tolist(), strict=True)]
    assert totals == [12] * 10 and generations.truncated.all()
    torch.testing.assert_close(generations.logp, forward_logps(model, generations)[0], atol=1e-5, rtol=0)


def test_progress_counts_to_the_end() -> None:
    calls: list[tuple[int, int]] = []
    run(tiny("llama"), progress=lambda done, total: calls.append((done, total)), max_rows=3)
    assert calls[-1] == (10, 10) and calls == sorted(calls)


def test_nothing_asked_gives_nothing() -> None:
    for counts, prompts in (([], []), ([0], [[5]])):
        generations = decode(tiny("llama"), prompts, counts, torch.arange(0), Sampling(max_new_tokens=4), eos_ids=[])
        assert generations.ids.shape == (0,) and generations.lengths.shape == (0,)


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.2),
        ("top_k", -1),
        ("min_p", 1.5),
        ("max_new_tokens", 0),
        ("stop", ("",)),
        ("stop", "abc"),
        ("stop_ids", (-3,)),
    ],
)
def test_out_of_range_settings_name_the_field_and_the_value(field: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"{field} is") as error:
        Sampling(**{field: value})
    assert (repr(value) if isinstance(value, str | tuple) else str(value)) in str(error.value)


@pytest.mark.parametrize("how", [decode, decode_with_generate, generate])
@pytest.mark.parametrize(
    ("prompts", "counts", "seeds", "extra", "message"),
    [
        ([[5], []], [1, 1], 2, {}, "prompt 1 has no tokens"),
        ([[5], [6] * 64], [1, 1], 2, {}, "prompt 1 has 64 tokens; .* 64 positions .* at most 63"),
        ([[5, VOCAB]], [1], 1, {}, f"prompt 0 contains token {VOCAB}"),
        ([[5, -1]], [1], 1, {}, "prompt 0 contains token -1"),
        ([[5]], [1, 2], 3, {}, "counts has 2 entries for 1 prompts"),
        ([[5]], [-1], 1, {}, r"counts\[0\] is -1"),
        ([[5]], [3], 2, {}, r"seeds has shape \(2,\); the counts ask for 3"),
        ([[5]], [1], 1, {"max_rows": 0}, "max_rows is 0"),
        ([[5]], [1], 1, {"sampling": Sampling(stop=("x",))}, "need the tokenizer"),
    ],
)
def test_bad_requests_are_named(
    how: Any, prompts: Any, counts: Any, seeds: int, extra: dict[str, Any], message: str
) -> None:
    options = {"eos_ids": EOS, **extra}
    sampling = options.pop("sampling", Sampling())
    with pytest.raises(UsageError, match=message):
        how(tiny("llama"), prompts, counts, torch.arange(seeds), sampling, **options)


@pytest.mark.parametrize("how", [decode, decode_with_generate])
def test_a_model_with_nan_weights_is_reported_where_it_happened(how: Any) -> None:
    model = tiny("llama")
    model.lm_head.weight.data[3, 0] = math.nan
    with pytest.raises(FloatingPointError, match="step 0 of trajectory 0"):
        run(model, how)

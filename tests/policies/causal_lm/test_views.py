"""A language model policy against another model over the whole vocabulary, and its view of a spoilt prompt."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from polopt.core.errors import UsageError
from polopt.core.example import Example
from polopt.core.policy import Corruption, Request, Sampling
from polopt.core.rollout import Rollout
from polopt.models import Snapshot
from polopt.models.corrupted_prompt import CorruptedPrompt
from polopt.policies.causal_lm.payload import TokenPayload
from polopt.policies.causal_lm.policy import CausalLM
from polopt.training.checkpoint import load_checkpoint, save_checkpoint
from tests.policies.causal_lm.models import byte_tokenizer, token_rollout
from tests.policies.causal_lm.test_policy import FAMILIES, move, policy

VIEW = frozenset({"logp/blind"})


def distributions(one: CausalLM, rollout: Rollout) -> list[Tensor]:
    """The whole distribution at every step, one unpadded row at a time, float64."""
    payload, found = rollout.payload, []
    assert isinstance(payload, TokenPayload)
    base = one.model.get_base_model() if hasattr(one.model, "get_base_model") else one.model
    for i, completion in enumerate(payload.completion_ids):
        prompt = payload.prompts[int(payload.prompt_of[i])]
        logits = base(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0].detach().double()
        places = range(len(prompt) - 1, len(prompt) + len(completion) - 1)
        found += [(logits[t] / float(payload.temperature[i])).softmax(-1) for t in places]
    return found


@pytest.mark.parametrize("layered", [True, False], ids=["fused", "row by row"])
@pytest.mark.parametrize(("family", "lora"), [*((f, False) for f in FAMILIES), ("Qwen3", True)])
def test_distances_to_a_model_are_sums_over_the_vocabulary(family: str, lora: bool, layered: bool) -> None:
    one = policy(family, lora=lora, **FAMILIES[family])
    if not layered:
        one._layer = None
    rollout = token_rollout(temperature=(1.0, 0.5, 2.0, 1.0))
    for _ in range(2):  # under LoRA a base without adapters first, then a copy of them
        expected_other = distributions(one, rollout)
        one.add_model("ref")
        move(one)
        names = frozenset({"hellinger/ref", "kl/ref", "logp/ref", "logp", "max_entropy"})
        found = one.evaluate(rollout, names)
        pairs = list(zip(distributions(one, rollout), expected_other, strict=True))
        hellinger = torch.stack([1 - (p * q).sqrt().sum() for p, q in pairs])
        kl = torch.stack([(p * (p / q).log()).sum() for p, q in pairs])
        torch.testing.assert_close(found["hellinger/ref"].double(), hellinger, rtol=1e-3, atol=2e-6)
        torch.testing.assert_close(found["kl/ref"].double(), kl, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(found["max_entropy"], torch.full_like(found["kl/ref"], math.log(258)))
        assert hellinger.max() > 1e-3
        assert found.logp.requires_grad and not found["hellinger/ref"].requires_grad


def test_the_reference_at_the_start_is_at_distance_zero_exactly() -> None:
    one, rollout = policy(), token_rollout()
    one.add_model("ref")
    found = one.evaluate(rollout, frozenset({"hellinger/ref", "kl/ref"}))
    assert not found["hellinger/ref"].any() and not found["kl/ref"].any()


# --- views ------------------------------------------------------------------------------------------------------------

GRID = "S.x/..x/x.G"


def asked(observation: bool = True, chat: bool = False) -> list[Example]:
    columns = [{"observation": text} if observation else {} for text in (GRID, "x.S/G..")]
    prompts = [f"find a way in {text} now\n" for text in (GRID, "x.S/G..")]
    return [
        Example(f"e{i}", ({"role": "user", "content": prompt},) if chat else prompt, columns=given)
        for i, (prompt, given) in enumerate(zip(prompts, columns, strict=True))
    ]


def sampled(one: CausalLM, examples: list[Example] | None = None, count: int = 3) -> Rollout:
    requests = [Request(example, count) for example in examples or asked()]
    return one.sample(requests, Sampling(max_new_tokens=5), seed=3)


def spoilt(one: CausalLM, rollout: Rollout, name: str = "blind") -> TokenPayload:
    payload = rollout.payload
    assert isinstance(payload, TokenPayload)
    return one._corrupted(payload, one._views[name])


def roomy(**options: Any) -> CausalLM:
    return policy(max_position_embeddings=128, **options)


def test_a_view_scores_the_completion_after_the_spoilt_prompt() -> None:
    one = roomy()
    rollout = sampled(one)
    one.add_view("blind", Corruption())
    move(one)  # the present weights, not those of the moment at which it was added
    found = one.evaluate(rollout, frozenset({"logp", "logp/blind", "kl/blind", "hellinger/blind"}))
    assert found.logp.requires_grad and not found["logp/blind"].requires_grad
    payload = spoilt(one, rollout)
    there = Rollout(rollout.lengths, rollout.group, payload=payload)
    rows = distributions(one, there)
    expected = torch.stack([row[token] for row, token in zip(rows, payload.ids, strict=True)]).log()
    torch.testing.assert_close(found["logp/blind"].double(), expected, rtol=1e-4, atol=1e-4)
    pairs = list(zip(distributions(one, rollout), rows, strict=True))
    kl = torch.stack([(p * (p / q).log()).sum() for p, q in pairs])
    torch.testing.assert_close(found["kl/blind"].double(), kl, rtol=1e-3, atol=1e-5)
    assert (found["logp/blind"] - found.logp).abs().max() > 1e-3


@pytest.mark.parametrize("chat", [False, True])
def test_only_tokens_of_the_observation_become_blanks(chat: bool) -> None:
    one = roomy()
    one.add_view("all", Corruption(probability=1.0))
    one.add_view("half", Corruption(probability=0.5))
    one.add_view("none", Corruption(probability=0.0))
    rollout = sampled(one, asked(chat=chat))
    payload = rollout.payload
    assert isinstance(payload, TokenPayload)
    tokenizer = one.tokenizer
    before = [tokenizer.decode(payload.prompts[int(i)]) for i in payload.prompt_of]
    every = [tokenizer.decode(prompt) for prompt in spoilt(one, rollout, "all").prompts]
    for was, text, example in zip(before, every, payload.examples, strict=True):
        observation = example.columns["observation"]
        assert text == was.replace(observation, " " * len(observation)) != was
    half = spoilt(one, rollout, "half")
    assert half.prompt_lengths.tolist() == payload.prompt_lengths.tolist()
    shares = []
    for i, prompt in enumerate(half.prompts):
        own, whole = payload.prompts[int(payload.prompt_of[i])], spoilt(one, rollout, "all").prompts[i]
        assert all(token in (a, b) for token, a, b in zip(prompt, own, whole, strict=True))
        hit = [token != a for token, a, b in zip(prompt, own, whole, strict=True) if a != b]
        shares.append(sum(hit) / len(hit))
    assert 0.2 < sum(shares) / len(shares) < 0.8 and len(set(half.prompts)) > 2
    untouched = spoilt(one, rollout, "none")
    assert [untouched.prompts[i] for i in range(6)] == [payload.prompts[int(i)] for i in payload.prompt_of]


def test_without_an_observation_the_whole_prompt_may_go_but_special_tokens_stay() -> None:
    one = roomy()
    one.add_view("all", Corruption(probability=1.0))
    rollout = sampled(one, asked(observation=False, chat=True))
    for prompt in spoilt(one, rollout, "all").prompts:
        text = one.tokenizer.decode(prompt)
        assert set(text.replace("<eos>", "")) == {" "} and text.count("<eos>") == 1


def test_a_prefix_is_no_part_of_the_prompt_that_may_go() -> None:
    one = roomy()
    one.add_view("all", Corruption(probability=1.0))
    prefix = tuple(one.tokenizer("S.x/", add_special_tokens=False)["input_ids"])
    requests = [Request(example, 2, prefix=prefix) for example in asked(observation=False)]
    rollout = one.sample(requests, Sampling(max_new_tokens=3), seed=0)
    for prompt in spoilt(one, rollout, "all").prompts:
        assert prompt[-4:] == prefix and len(set(prompt[:-4])) == 1


def test_the_blanks_are_a_function_of_seed_version_prompt_and_completion_alone() -> None:
    one = roomy()
    one.add_view("blind", Corruption())
    rollout = sampled(one, count=4)
    whole = one.evaluate(rollout, VIEW)["logp/blind"]
    marked = rollout.with_columns(step={"logp/blind": whole})
    for order in ([5], [7, 0], [3, 3, 1]):
        piece = marked.select(torch.tensor(order))
        torch.testing.assert_close(one.evaluate(piece, VIEW)["logp/blind"], piece["logp/blind"], rtol=1e-5, atol=1e-5)
    prompts = spoilt(one, rollout).prompts
    assert spoilt(one, rollout.select(torch.tensor([6, 2]))).prompts == (prompts[6], prompts[2])
    one.version += 1
    assert spoilt(one, rollout).prompts != prompts  # fresh after every update
    one.version -= 1
    assert spoilt(one, rollout).prompts == prompts
    one.add_view("blind", Corruption(seed=1))
    assert spoilt(one, rollout).prompts != prompts


@pytest.mark.parametrize("lora", [False, True])
def test_views_outlive_a_checkpoint(tmp_path: Any, lora: bool) -> None:
    one = roomy(lora=lora)
    one.add_view("blind", Corruption(0.7, "x", 5))
    move(one)
    rollout = sampled(one)
    expected = one.evaluate(rollout, VIEW)["logp/blind"]
    state = load_checkpoint(save_checkpoint(tmp_path, 2, one.state_dict()))
    assert state["models"] == {}  # a setting, not weights
    other = roomy(lora=lora)
    other.load_state_dict(state)
    assert torch.equal(other.evaluate(rollout, VIEW)["logp/blind"], expected)
    other.load_state_dict({name: value for name, value in state.items() if name != "views"})
    assert "logp/blind" in other.columns


def test_parts_install_themselves() -> None:
    one = roomy()
    Snapshot().install(one, "ref")
    CorruptedPrompt(probability=0.25, seed=4).install(one, "blind")
    assert {"logp/ref", "hellinger/ref", "logp/blind", "kl/blind"} <= one.columns
    assert one._views == {"blind": Corruption(0.25, " ", 4)}
    assert not any(CorruptedPrompt().due(iteration) for iteration in range(5))


def test_what_cannot_be_corrupted() -> None:
    one = roomy()
    with pytest.raises(UsageError, match=r"probability in \[0, 1\], got 1\.5"):
        Corruption(probability=1.5)
    with pytest.raises(UsageError, match="'ab' of a corrupted prompt is 2 tokens"):
        one.add_view("blind", Corruption(blank="ab"))
    one.add_model("ref")
    with pytest.raises(UsageError, match="has a model 'ref' already"):
        one.add_view("ref", Corruption())
    one.add_view("blind", Corruption())
    lost = [Example("lost", "a prompt\n", columns={"observation": GRID})]
    with pytest.raises(UsageError, match="observation of example 'lost' is no part of its prompt"):
        one.evaluate(sampled(one, lost), VIEW)

    class Slow:
        """A tokenizer that does not say where its tokens lie."""

        is_fast = False

        def __getattr__(self, name: str) -> Any:
            return getattr(byte_tokenizer(), name)

        def __call__(self, *args: Any, **options: Any) -> Any:
            assert "return_offsets_mapping" not in options
            return byte_tokenizer()(*args, **options)

    one.tokenizer = Slow()
    with pytest.raises(UsageError, match="example 'e0' has an observation, but the tokenizer is slow"):
        one.evaluate(sampled(one), VIEW)
    assert one.evaluate(sampled(one, asked(observation=False)), VIEW)["logp/blind"].isfinite().all()

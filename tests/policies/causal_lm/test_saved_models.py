"""Frozen models read from a folder: what another run made, beside a policy that trains all weights or adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from polopt.core.errors import UsageError
from polopt.core.example import Example
from polopt.core.policy import Request
from polopt.core.rollout import Rollout
from polopt.models import Snapshot
from polopt.policies.causal_lm.loading import LoraOptions, add_lora
from polopt.policies.causal_lm.policy import CausalLM
from tests.policies.causal_lm.models import byte_tokenizer, tiny


def policy(seed: int = 0, *, lora: bool = False, **options: int) -> CausalLM:
    model = tiny(seed=seed, **options)
    return CausalLM(add_lora(model, LoraOptions(rank=2)) if lora else model, byte_tokenizer())


def written(by: CausalLM) -> Rollout:
    requests = [Request(Example(str(i), text), 1) for i, text in enumerate(("one", "two"))]
    return by.write(requests, ["first answer", "second"])


def moved(by: CausalLM) -> None:
    with torch.no_grad():
        for parameter in by.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("lora", [False, True])
def test_it_is_the_model_of_the_folder_whatever_the_policy_does(lora: bool, tmp_path: Path) -> None:
    teacher, live = policy(seed=1), policy(lora=lora)
    teacher.save(tmp_path)
    rollout = written(live)
    with torch.no_grad():
        expected = teacher.evaluate(rollout, frozenset({"logp"})).logp
    Snapshot(folder=str(tmp_path)).install(live, "guide")
    for _ in range(2):
        found = live.evaluate(rollout, frozenset({"logp", "logp/guide", "kl/guide"}))
        assert torch.allclose(found["logp/guide"], expected, atol=1e-6)
        assert not found["logp/guide"].requires_grad and float(found["kl/guide"].min()) > 0
        assert float((found.logp - expected).detach().abs().max()) > 0.1
        moved(live)


@pytest.mark.parametrize("lora", [False, True])
def test_a_checkpoint_finds_it_again(lora: bool, tmp_path: Path) -> None:
    policy(seed=1).save(tmp_path / "guide")
    live, resumed = policy(lora=lora), policy(lora=lora)
    live.load_model("guide", tmp_path / "guide")
    resumed.load_state_dict(live.state_dict())
    rollout, names = written(live), frozenset({"logp/guide"})
    assert torch.equal(live.evaluate(rollout, names)["logp/guide"], resumed.evaluate(rollout, names)["logp/guide"])


def test_adapters_are_read_merged(tmp_path: Path) -> None:
    teacher, live = policy(lora=True), policy()
    moved(teacher)
    teacher.save(tmp_path)
    live.load_model("guide", tmp_path)
    rollout = written(live)
    with torch.no_grad():
        expected = teacher.evaluate(rollout, frozenset({"logp"})).logp
    assert torch.allclose(live.evaluate(rollout, frozenset({"logp/guide"}))["logp/guide"], expected, atol=1e-5)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    policy(vocab_size=300).save(tmp_path / "wide")
    with pytest.raises(UsageError, match="wide holds a Qwen3ForCausalLM of 300 tokens, the policy is"):
        policy().load_model("guide", tmp_path / "wide")
    CausalLM(tiny("GPT2"), byte_tokenizer()).save(tmp_path / "gpt")
    with pytest.raises(UsageError, match="gpt holds a GPT2LMHeadModel"):
        policy().load_model("guide", tmp_path / "gpt")
    other = byte_tokenizer()
    other.add_tokens(["<more>"])
    CausalLM(tiny(vocab_size=300), other).save(tmp_path / "other")
    with pytest.raises(UsageError, match="other has another tokenizer than the policy; model 'guide'"):
        policy().load_model("guide", tmp_path / "other")
    with pytest.raises(UsageError, match="nothing"):
        policy().load_model("guide", tmp_path / "nothing")

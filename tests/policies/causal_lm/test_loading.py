"""Loading: what works, and what is said where it does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from polopt.core.errors import UsageError
from polopt.policies.causal_lm.loading import (
    LoraOptions,
    add_lora,
    check_vocabulary,
    load_model,
    load_tokenizer,
    pick_autocast,
    pick_device,
)
from tests.policies.causal_lm.models import byte_tokenizer, tiny

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("family", ["Qwen3", "GPT2"])
def test_weights_come_back_in_float32(tmp_path: Path, family: str) -> None:
    model = tiny(family).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, CPU)
    for (name, expected), (other, found) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other
        assert found.dtype == torch.float32
        assert torch.equal(found, expected.float())


def test_tied_embeddings_are_not_missing(tmp_path: Path) -> None:
    tiny(tie_word_embeddings=True).save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), CPU)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_tokenizer_round_trip(folder: Path) -> None:
    text = "höl 5\n"
    assert load_tokenizer(folder).decode(load_tokenizer(folder)(text)["input_ids"]) == text


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"{tmp_path} is not a model: it has no config.json"):
        load_model(tmp_path, CPU)


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no model folder at '/no/such/folder'"):
        load_model("/no/such/folder", CPU)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is a file"):
        load_model(tmp_path / "file", CPU)


def test_an_adapter_alone(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match="holds an adapter only"):
        load_model(tmp_path, CPU)


def test_a_hub_name_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="cannot reach model nobody/nothing on the hub, nor is it a folder"):
        load_model("nobody/nothing", CPU)
    with pytest.raises(UsageError, match="nobody/nothing has no tokenizer"):
        load_tokenizer("nobody/nothing")


def test_no_tokenizer(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=f"{tmp_path} has no tokenizer"):
        load_tokenizer(tmp_path)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_model_that_is_no_causal_language_model(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(UsageError, match="cannot load a causal language model from"):
        load_model(folder, CPU)


def test_a_model_type_nobody_knows(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "frobnicator"}))
    with pytest.raises(UsageError, match=r"is not a model: .*frobnicator"):
        load_model(folder, CPU)


def test_a_model_with_code_of_its_own_is_refused_and_its_code_not_run(folder: Path) -> None:
    marker = folder / "ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass C: pass\n")
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.C"}}))
    with pytest.raises(UsageError, match="is not a model"):
        load_model(folder, CPU)
    assert not marker.exists()


def test_a_quantised_model(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UsageError, match="is quantised"):
        load_model(folder, CPU)


def test_missing_weights_are_not_drawn_at_random(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=r"lacks 1 weights .* such as model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(folder, CPU)


def test_damaged_and_pickled_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UsageError, match="cannot load a causal language model from"):
        load_model(folder, CPU)
    path.unlink()
    torch.save(tiny().state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(UsageError, match="cannot load a causal language model from"):
        load_model(folder, CPU)


def test_a_tokenizer_of_another_model() -> None:
    check_vocabulary(tiny(), byte_tokenizer())
    with pytest.raises(UsageError, match="'<eos>' with id 257, but the model embeds ids below 257 only"):
        check_vocabulary(tiny(vocab_size=257, eos_token_id=1, pad_token_id=1), byte_tokenizer())


@pytest.mark.parametrize("family", ["Qwen3", "GPT2"])
def test_lora_trains_adapters_only_starts_at_the_base_and_depends_on_its_seed(family: str) -> None:
    ids = torch.arange(6)[None]
    expected = tiny(family)(ids).logits
    first, again, other = (add_lora(tiny(family), LoraOptions(rank=2, seed=s)).eval() for s in (0, 0, 1))
    torch.testing.assert_close(first(ids).logits, expected)
    trained = {name: p for name, p in first.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert not any("lm_head" in name for name in trained)
    same = dict(again.named_parameters())
    differs = dict(other.named_parameters())
    assert all(torch.equal(p, same[name]) for name, p in trained.items())
    assert any(not torch.equal(p, differs[name]) for name, p in trained.items())


def test_lora_leaves_the_global_random_state_alone() -> None:
    model = tiny()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    add_lora(model, LoraOptions(rank=2))
    assert torch.equal(torch.rand(1), expected)


def test_lora_options_out_of_range() -> None:
    with pytest.raises(UsageError, match="rank of at least 1, got 0"):
        LoraOptions(rank=0)
    with pytest.raises(UsageError, match="alpha above 0, got 0"):
        LoraOptions(alpha=0)
    with pytest.raises(UsageError, match=r"target_modules .*'nothing'.* do not fit"):
        add_lora(tiny(), LoraOptions(target_modules=("nothing",)))


def test_precision_and_device() -> None:
    assert pick_autocast("float32", CPU, 4096) is None
    assert pick_autocast("bfloat16", CPU, 8) is torch.bfloat16
    assert pick_autocast("auto", CPU, 32) is None  # small models lose time to casts
    with pytest.raises(UsageError, match="precision 'int4' is none of"):
        pick_autocast("int4", CPU, 8)  # type: ignore[arg-type]
    assert pick_device("cpu") == CPU
    with pytest.raises(UsageError, match="device 'abacus' cannot be used"):
        pick_device("abacus")


def test_auto_precision_follows_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, expected in (("avx512_bf16", torch.bfloat16), ("amx_bf16", torch.bfloat16), ("avx2", None)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda capability=capability: {capability: True})
        assert pick_autocast("auto", CPU, 1024) is expected

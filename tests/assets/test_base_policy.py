"""The shipped policy loads, is small, and has something to learn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from polopt.assets import base_policy_path
from polopt.tasks.registry import tasks


@pytest.fixture(scope="module")
def folder() -> Path:
    return base_policy_path()


def test_size_and_parameter_count(folder: Path) -> None:
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 8_000_000
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert 1_000_000 <= sum(parameter.numel() for parameter in model.parameters()) <= 3_000_000
    assert model.dtype == torch.float32
    assert not list(folder.glob("*.bin"))


def test_tokens_are_bytes_and_text_survives(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in ("7+8-5=?\n", "3*5=15;x  # é ☃\t\x00", "a , b ."):
        ids = tokenizer(text)["input_ids"]
        assert ids == list(text.encode())
        assert tokenizer.decode(ids) == text
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (256, 257, 258)
    assert len(tokenizer) == 259
    chat = [{"role": "user", "content": "7+8=?\n"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == "7+8=?\n"


def test_special_tokens_are_the_same_in_every_file(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    for config in (model.config, model.generation_config):
        assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (256, 257, 258)
    assert model.config.tie_word_embeddings


def test_sampling_solves_a_part_of_the_default_task(folder: Path) -> None:
    task = tasks()["arithmetic"]
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    examples = task.examples(96, seed=21, split="test")
    encoded = tokenizer([str(example.prompt) for example in examples], return_tensors="pt", padding=True)
    torch.manual_seed(0)
    output = model.generate(**encoded, max_new_tokens=task.max_new_tokens, do_sample=True, top_k=0, temperature=1.0)
    texts = tokenizer.batch_decode(output[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
    forms = [task.strategy_of(text) for text in texts]
    scores = [task.score(text, example) for text, example in zip(texts, examples, strict=True)]
    assert 0.25 < sum(scores) / len(scores) < 0.6
    worked = [score for score, form in zip(scores, forms, strict=True) if form == "worked"]
    assert len(worked) > 15
    assert sum(worked) / len(worked) > 0.85
    assert {"worked", "direct"} <= set(forms)


def test_the_record_of_training_keeps_its_promises(folder: Path) -> None:
    record = json.loads((folder / "training.json").read_text())
    assert record["finished"]
    # Tasks that came later ask what the policy has learnt from these.
    assert record["held_out"].keys() == {"arithmetic", "countdown", "programs", "grid"}
    arithmetic = record["held_out"]["arithmetic"]
    assert 0.35 <= arithmetic["accuracy"] <= 0.5 - arithmetic["half_width_95"]
    assert arithmetic["strategies"]["worked"]["accuracy"] >= 0.93
    for name in ("countdown", "programs", "grid"):
        assert 0.1 <= record["held_out"][name]["accuracy"] <= 0.6
        assert len(record["held_out"][name]["strategies"]) >= 2

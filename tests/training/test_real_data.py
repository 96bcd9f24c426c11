"""Grade-school mathematics, a tokenizer trained on it, and a checkpoint on disk: what a user brings."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from polopt.training.config import RunConfig
from polopt.training.run import train
from polopt.training.trackers.jsonl import read_jsonl

DATA = Path(__file__).parents[3] / "shared" / "data" / "gsm8k"

pytestmark = pytest.mark.skipif(
    not (DATA / "train.jsonl").is_file(),
    reason=f"GSM8K is not in {DATA}; this test reads its train.jsonl and test.jsonl",
)


def questions(count: int) -> list[str]:
    with (DATA / "train.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line)["question"] for line, _ in zip(file, range(count), strict=False)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 with a byte-level BPE of 512 pieces."""
    folder = tmp_path_factory.mktemp("real") / "model"
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(questions(200), trainer)
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<eos>").save_pretrained(folder)
    config = Qwen3Config(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=1024, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("lora", [None, 4], ids=["full", "lora"])
def test_two_steps_on_gsm8k(lora: int | None, checkpoint: Path, even_spec: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = RunConfig(
        model=str(checkpoint),
        data=str(DATA / "train.jsonl"),
        eval_data=str(DATA / "test.jsonl"),
        # Random weights are never right: a second reward gives them something to learn.
        reward=("math-verify", f"{even_spec}@0.1"),
        steps=2,
        prompts=2,
        group=4,
        lr=1e-2,
        lora=lora,
        eval_prompts=6,
        track=("none",),
        device="cpu",
        threads=1,
        out=str(run),
        slots={"rollout.max_new_tokens": 12},
    )
    summary = train(config, quiet=True)
    keys = ("accuracy_before", "accuracy_after", "accuracy_before_ci", "accuracy_after_ci", "seconds", "tokens")
    assert set(summary) >= {*keys, "peak_rss_mb", "run"}
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert 0 <= summary["accuracy_after"] <= 1 and summary["prompts"] == 6
    assert all(0 <= bound <= 1 for bound in summary["accuracy_before_ci"] + summary["accuracy_after_ci"])
    assert summary["rollouts"] == 16 and 16 <= summary["tokens"] <= 16 * 12
    lines = [line for line in read_jsonl(run / "log.jsonl") if "reward" in line]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["frac_reward_invalid"] == 0 and math.isfinite(line["loss"]) for line in lines)
    assert all(line["rewards/math-verify/mean"] >= 0 for line in lines)

    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoint, run / "model"))
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)
    model, tokenizer = (auto.from_pretrained(run / "model") for auto in (AutoModelForCausalLM, AutoTokenizer))
    text = questions(1)[0]
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == text and ids.shape[1] < len(text) / 1.5
    assert bool(torch.isfinite(model(ids).logits).all())

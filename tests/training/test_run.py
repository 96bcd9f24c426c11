"""A run from a configuration to its summary, and input that is refused before anything is written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from polopt.core.errors import UsageError
from polopt.training.config import make_config, read_config
from polopt.training.run import train

SUMMARY = {
    "accuracy_before", "accuracy_after", "accuracy_before_ci", "accuracy_after_ci", "seconds", "tokens", "peak_rss_mb",
    "run", "method", "steps", "rollouts", "prompts",
}  # fmt: skip


def test_a_run_leaves_a_model_a_log_its_settings_and_a_summary(small_run: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = small_run(run, method="grpo", track=("tensorboard",), profile=True)
    summary = train(config, quiet=True)
    assert set(summary) >= SUMMARY
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    low, high = summary["accuracy_after_ci"]
    assert low <= summary["accuracy_after"] <= high
    assert summary["steps"] == 3 and summary["rollouts"] == 24 and 24 <= summary["tokens"] <= 240
    assert summary["run"] == str(run) and 50 < summary["peak_rss_mb"] < 1e5 and 0 < summary["seconds"] < 60
    written = make_config(read_config(run / "config.yaml"))
    assert json.dumps(written.as_dict()) == json.dumps(config.as_dict())
    assert {p.name for p in run.iterdir()} >= {"config.yaml", "log.jsonl", "model", "checkpoints", "summary.json"}
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    ids = tokenizer("1+1=", return_tensors="pt")["input_ids"]
    assert bool(torch.isfinite(model(ids).logits).all())
    losses = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert all(math.isfinite(v) for line in losses for v in line.values())


def test_the_run_of_a_written_configuration_is_the_same_run(small_run: Any, tmp_path: Path) -> None:
    train(small_run(tmp_path / "a", steps=1), quiet=True)
    settings = read_config(tmp_path / "a" / "config.yaml") | {"out": str(tmp_path / "b")}
    train(make_config(settings), quiet=True)
    assert (tmp_path / "a" / "log.jsonl").read_bytes() == (tmp_path / "b" / "log.jsonl").read_bytes()


def test_lora_trains_the_adapters_and_saves_a_merged_model(small_run: Any, model_folder: Path, tmp_path: Path) -> None:
    train(small_run(tmp_path / "run", lora=2, method="ppo", save_every="1"), quiet=True)
    before, after = (load_file(f / "model.safetensors") for f in (model_folder, tmp_path / "run" / "model"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("proj" in name for name in changed)


def test_a_single_example_can_train_without_evaluation(small_run: Any, tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text(json.dumps({"prompt": "1+1=", "answer": "2"}) + "\n")
    summary = train(small_run(tmp_path / "run", data=str(tmp_path / "one.jsonl"), steps=1), quiet=True)
    assert summary["accuracy_after"] is None and summary["accuracy_after_ci"] == [None, None]
    json.dumps(summary, allow_nan=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "grop"}, "unknown method 'grop'.*'grpo'"),
        ({"reward": ("no-such",)}, "no-such"),
        ({"reward": ()}, "needs a reward"),
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"model": "./nowhere"}, "nowhere"),
        ({"track": ("abacus",)}, "unknown tracker 'abacus'"),
        ({"eval_every": "often"}, "'often'"),
        ({"steps": -1}, "-1 steps"),
        ({"slots": {"advantage": "no-such"}}, "no-such"),
        ({"slots": {"objective.hihg": 0.3}}, "hihg"),
        ({"slots": {"advantages": "gae"}}, "unknown slot 'advantages'"),
    ],
    ids=repr,
)
def test_bad_input_is_refused_before_anything_is_written(
    options: dict[str, Any], message: str, small_run: Any, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        train(small_run(tmp_path / "run", **options), quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_part_that_a_file_cannot_hold_is_refused_before_anything_is_written(small_run: Any, tmp_path: Path) -> None:
    # It could be trained with, but not written down, and a run must be repeatable from its config.yaml.
    from polopt.advantages.group import GroupCenter

    with pytest.raises(UsageError, match=r"'advantage' cannot be GroupCenter\(\)"):
        train(small_run(tmp_path / "run", {"advantage": GroupCenter()}), quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_folder_with_anything_in_it_is_not_overwritten(small_run: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="already exists and is not empty"):
        train(small_run(tmp_path), quiet=True)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_resuming_needs_a_run_of_the_same_method(small_run: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(UsageError, match="no run to resume"):
        train(small_run(run), resume=True, quiet=True)
    assert not run.exists()
    train(small_run(run, steps=1), quiet=True)
    with pytest.raises(UsageError, match="belongs to method 'grpo', not to 'rloo'"):
        train(small_run(run, method="rloo"), resume=True, quiet=True)

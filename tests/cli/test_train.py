from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import polopt.training.run
from polopt.cli.options import Given, parse
from polopt.cli.train import POSITIONAL, configure, groups
from polopt.core import registry
from polopt.core.errors import UsageError
from polopt.training.config import RunConfig
from tests.cli.conftest import Result

# A reward in which random completions differ, so that updates are not zero.
REWARD = "def letters(completions, **_):\n    return [len(set(text)) / 8 for text in completions]\n"
SMALL = [
    *("--steps", 2, "--prompts", 2, "--group", 2, "--eval-prompts", 4, "--rollout.max-new-tokens", 8),
    *("--track", "none", "--reward", "mine.py:letters", "--lr", "1e-2"),
]


def settings(*arguments: str) -> tuple[RunConfig, str]:
    return configure(parse("train", "", groups(), arguments, POSITIONAL))


def test_options_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        'method = "dapo"\nprompts = 3\ngroup = 5\nstrict = true\ntrack = ["wandb"]\nlr = 1e-4\nadvantage = "rloo"\n'
        "[objective]\nhigh = 0.3\nlow = 0.1\n[rollout]\nmax-new-tokens = 9\n",
        encoding="utf-8",
    )
    config, notice = settings(
        "--config", str(file), "--prompts", "7", "--no-strict", "--objective.high", "0.4", "--lr", "None"
    )
    assert (config.method, config.prompts, config.group, config.strict) == ("dapo", 7, 5, False)
    assert (config.lr, config.track, config.eval_prompts) == (None, ("wandb",), RunConfig().eval_prompts)
    assert config.slots == {
        "advantage": "rloo",
        "objective.high": "0.4",
        "objective.low": 0.1,
        "rollout.max_new_tokens": 9,
    }
    assert notice == ""
    assert settings("ppo", "--config", str(file), "--track", "none")[0].track == ("none",)
    assert settings("ppo", "--config", str(file))[0].method == "ppo"


def test_a_part_that_is_replaced_takes_its_settings_of_the_file_with_it(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "method: grpo\nslots: {advantage: gae, advantage.lam: 0.5, objective.high: 0.3}\n", encoding="utf-8"
    )
    slots = settings("--config", str(file), "--advantage", "leave-one-out")[0].slots
    assert slots == {"advantage": "leave-one-out", "objective.high": 0.3}


def test_data_on_the_command_line_replaces_the_task_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("method: grpo\ntask: countdown\n", encoding="utf-8")
    config, _ = settings("--config", str(file), "--data", "x.jsonl")
    assert (config.task, config.data) == (None, "x.jsonl")
    file.write_text("method: grpo\ndata: x.jsonl\n", encoding="utf-8")
    config, _ = settings("--config", str(file), "--task", "grid")
    assert (config.task, config.data) == ("grid", None)


def test_a_method_is_needed_from_somewhere() -> None:
    with pytest.raises(UsageError, match="name a method"):
        configure(Given())
    assert configure(Given(options={"method": "ppo"}))[0].method == "ppo"


def test_a_finished_run_of_the_file_is_not_in_the_way_of_its_repetition(tmp_path: Path) -> None:
    earlier = tmp_path / "run"
    earlier.mkdir()
    file = earlier / "config.yaml"
    file.write_text(f"method: grpo\nout: {earlier}\n", encoding="utf-8")
    assert settings("--config", str(file)) == (RunConfig(out=str(earlier)), "")
    (earlier / "model").mkdir()
    config, notice = settings("--config", str(file))
    assert config.out is None
    assert str(earlier) in notice and "finished" in notice
    assert settings("--config", str(file), "--out", str(earlier))[0].out == str(earlier)


@pytest.fixture
def mine(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(REWARD, encoding="utf-8")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


@pytest.mark.usefixtures("mine")
def test_train_resume_and_repeat(run: Callable[..., Result], model: str, tmp_path: Path) -> None:
    first, longer, again = tmp_path / "first", tmp_path / "longer", tmp_path / "again"
    result = run("train", "grpo", "--model", model, *SMALL, "--json", "s.json", "--out", "first")
    assert (result.code, result.err) == (0, "")
    assert "accuracy" in result.out
    summary = json.loads((tmp_path / "s.json").read_text(encoding="utf-8"))
    assert set(summary) == {
        *("method", "accuracy_before", "accuracy_after", "accuracy_before_ci", "accuracy_after_ci", "prompts"),
        *("seconds", "steps", "tokens", "rollouts", "peak_rss_mb", "run"),
    }
    assert (summary["method"], summary["steps"], summary["rollouts"], summary["prompts"]) == ("grpo", 2, 8, 4)
    assert 8 <= summary["tokens"] <= 64
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "mine.py", "s.json"]
    steps = [row for row in read(first / "log.jsonl") if "grad_norm" in row]
    assert len(steps) == 2 and any(row["grad_norm"] > 0 for row in steps)
    assert yaml.safe_load((first / "config.yaml").read_text(encoding="utf-8"))["slots"] == {
        "rollout.max_new_tokens": "8"
    }

    # Wrong ways to go on leave the run as it was.
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    other = run("train", "rloo", "--resume", "--out", "first")
    assert other.code == 2
    assert "belongs to method 'grpo', not to 'rloo'" in other.err and other.err.count("\n") == 1
    taken = run("train", "grpo", "--model", model, *SMALL, "--out", "first")
    assert taken.code == 2 and "already exists" in taken.err
    assert {path: path.read_bytes() for path in first.rglob("*") if path.is_file()} == before

    # The same run from its file, quietly.
    repeated = run("train", "--config", "first/config.yaml", "--out", "again", "--quiet")
    assert (repeated.code, repeated.out, repeated.err) == (0, "", "")
    assert (again / "log.jsonl").read_bytes() == (first / "log.jsonl").read_bytes()
    assert all(torch.equal(a, b) for a, b in zip(weights(first).values(), weights(again).values(), strict=True))

    # Two steps and two more are four.
    resumed = run("train", "--resume", "--out", "first", "--steps", 4, "--json", "s.json", "--quiet")
    assert (resumed.code, resumed.err) == (0, "")
    assert json.loads((tmp_path / "s.json").read_text(encoding="utf-8"))["steps"] == 4
    assert run("train", "--config", "again/config.yaml", "--out", "longer", "--steps", 4, "--quiet").code == 0
    assert weights(first).keys() == weights(longer).keys()
    assert all(torch.equal(a, b) for a, b in zip(weights(first).values(), weights(longer).values(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights(first).values(), weights(again).values(), strict=True))


@pytest.mark.usefixtures("mine")
def test_an_interrupted_run_says_how_to_go_on(
    run: Callable[..., Result], model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(polopt.training.run.Trainer, "step", interrupt)
        lost = run("train", "grpo", "--model", model, *SMALL, "--out", "lost", "--quiet")
        kept = run("train", "grpo", "--model", model, *SMALL, "--out", "kept", "--quiet", "--save-every", "1")
    assert (lost.code, kept.code) == (130, 130)
    assert lost.err.count("\n") == 1 and "--save-every" in lost.err
    assert kept.err == "polopt: interrupted; continue with: polopt train --resume --out kept\n"
    assert run(*kept.err.split("polopt ")[-1].split(), "--quiet").code == 0


def test_a_method_in_a_file_of_one_s_own(
    run: Callable[..., Result], model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    (tmp_path / "mine.py").write_text(REWARD)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "own.py").write_text(
        '"""Own: it centres."""\nfrom polopt.core.registry import method\n'
        'from polopt.methods.base.rloo import rloo\nown = method("own-method", rloo)\n'
    )
    result = run("train", "sub/own.py", "--model", model, "--task", "arithmetic", *SMALL)
    assert result.code == 0, result.err
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("own-arithmetic-0-")
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["own.py"]
    assert yaml.safe_load((folder / "config.yaml").read_text())["method"] == "sub/own.py"

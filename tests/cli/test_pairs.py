"""``polopt pairs``: rows that follow from answers and their scores, and that training reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from polopt.rollouts.dataset import Dataset
from polopt.tasks.datasets import load_examples
from tests.cli.conftest import Result

REWARD = (
    "def length(completions, **_):\n    return [float(len(text)) for text in completions]\n"
    "def even(completions, **_):\n    return [float(len(text) % 2 == 0) for text in completions]\n"
    "def same(completions, **_):\n    return [1.0] * len(completions)\n"
)


@pytest.fixture(autouse=True)
def files(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(REWARD, encoding="utf-8")
    rows = [{"prompt": f"{n}+1=", "answer": str(n + 1), "level": n % 3} for n in range(70)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def made(run: Callable[..., Result], model: str, out: str, *arguments: object) -> list[dict[str, Any]]:
    given = ("--model", model, "--data", "data.jsonl", "--max-new-tokens", 6, "--group", 3, "--out", out)
    result = run("pairs", *given, *arguments)
    assert (result.code, result.err) == (0, "")
    return [json.loads(line) for line in Path(out).read_text(encoding="utf-8").splitlines()]


def test_pairs(run: Callable[..., Result], model: str) -> None:
    rows = made(run, model, "p.jsonl", "--reward", "mine.py:length", "--seed", 2)
    assert 0 < len(rows) <= 70
    for row in rows:
        assert len(row["chosen"]) > len(row["rejected"])
        assert (row["chosen_score"], row["rejected_score"]) == (len(row["chosen"]), len(row["rejected"]))
        assert row["prompt"] == f"{int(row['answer']) - 1}+1=" and row["level"] == (int(row["answer"]) - 1) % 3
    examples = load_examples("p.jsonl")
    Dataset().check(examples)
    assert [e.chosen for e in examples] == [row["chosen"] for row in rows]
    assert examples[0].columns["chosen_score"] == rows[0]["chosen_score"]
    assert made(run, model, "again.jsonl", "--reward", "mine.py:length", "--seed", 2) == rows
    assert made(run, model, "other.jsonl", "--reward", "mine.py:length", "--seed", 3) != rows


def test_lists(run: Callable[..., Result], model: str) -> None:
    rows = made(run, model, "l.jsonl", "--reward", "mine.py:length", "--form", "lists", "--prompts", 20)
    assert 0 < len(rows) <= 20
    for row in rows:
        assert len(set(row["completions"])) == len(row["completions"]) == len(row["labels"]) >= 2
        assert row["labels"] == [len(text) for text in row["completions"]]
    Dataset(form="lists").check(load_examples("l.jsonl"))


def test_labels(run: Callable[..., Result], model: str) -> None:
    rows = made(run, model, "s.jsonl", "--reward", "mine.py:even", "--form", "labels", "--prompts", 20)
    assert len({row["prompt"] for row in rows}) == 20
    assert all(row["label"] == (len(row["completion"]) % 2 == 0) for row in rows)
    examples = load_examples("s.jsonl")
    Dataset(form="singles").check(examples)
    assert [e.label for e in examples] == [row["label"] for row in rows]


def test_a_summary(run: Callable[..., Result], model: str) -> None:
    rows = made(run, model, "p.jsonl", "--reward", "mine.py:length", "--json", "made.json", "--prompts", 9)
    said = json.loads(Path("made.json").read_text(encoding="utf-8"))
    assert said == {"out": "p.jsonl", "form": "pairs", "rows": len(rows), "prompts": 9, "group": 3}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--reward", "mine.py:length"), "name the file"),
        (("--reward", "mine.py:length", "--out", "p.json"), "written as .jsonl"),
        (("--reward", "mine.py:length", "--out", "data.jsonl"), "exists"),
        (("--reward", "mine.py:length", "--out", "no/p.jsonl"), "no folder"),
        (("--reward", "mine.py:length", "--out", "p.jsonl", "--group", 1), "--group must be at least 2"),
        (("--reward", "mine.py:length", "--out", "p.jsonl", "--prompts", 0), "--prompts must be at least 1"),
        (("--reward", "mine.py:same", "--out", "p.jsonl", "--prompts", 2), "equally good"),
        (("--reward", "mine.py:length", "--out", "p.jsonl", "--prompts", 2, "--form", "labels"), "0 or 1"),
        (("--out", "p.jsonl"), "needs a reward"),
    ],
)
def test_mistakes(run: Callable[..., Result], model: str, arguments: tuple[object, ...], said: str) -> None:
    result = run("pairs", "--model", model, "--data", "data.jsonl", "--max-new-tokens", 4, *arguments)
    assert result.code == 2 and said in result.err
    assert not list(Path().glob("*p.jsonl"))

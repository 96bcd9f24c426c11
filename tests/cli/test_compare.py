from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from polopt.cli.compare import command_line

Run = Callable[..., "Result"]  # type: ignore[name-defined]

QUICK = ("--problem", "sparse-rewards", "--budget", "rollouts=128", "--seeds", 2, "--points", 2)
CACHED = ("--cache", "cache", "--jobs", 1)


def test_methods_are_compared_in_the_exact_world(run: Run, tmp_path: Path) -> None:
    contenders = ("grpo", "gspo", "grpo --advantage leave-one-out")
    first = run("compare", *contenders, *QUICK, *CACHED, "--out", "found", "--json", "numbers.json")
    assert first.code == 0, first.err
    assert "6 runs in" in first.out and "difference to grpo" in first.out and "+advantage=leave-one-out" in first.out
    folder = tmp_path / "found"
    assert sorted(path.name for path in folder.iterdir()) == ["compare.json", "compare.png", "index.html"]
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers == json.loads((folder / "compare.json").read_text())
    labels = [entry["contender"]["label"] for entry in numbers["contenders"]]
    assert labels == ["grpo", "gspo", "grpo+advantage=leave-one-out"]
    assert numbers["contenders"][1]["spent"]["rollouts"] == 128
    assert numbers["command"].startswith("polopt compare grpo gspo 'grpo --advantage leave-one-out'")
    assert numbers["command"] in (folder / "index.html").read_text().replace("&#x27;", "'")

    again = run("compare", *contenders, "rloo", *QUICK, *CACHED, "--out", "again")
    assert again.code == 0 and "2 runs in" in again.out and "6 from the cache" in again.out
    kept = json.loads((tmp_path / "again" / "compare.json").read_text())
    assert kept["runs"][:6] == numbers["runs"]


def test_methods_are_compared_in_the_small_world(run: Run, tmp_path: Path) -> None:
    tiny = ("--budget", "rollouts=8", "--prompts", 2, "--group", 4, "--eval-prompts", 8, "--points", 1, "--seeds", 1)
    found = run("compare", "grpo", "rloo", *tiny, *CACHED, "--out", "found")
    assert found.code == 0, found.err
    assert "grpo, rloo on arithmetic: 8 rollouts, 1 seed" in found.out and "1 seed cannot tell" in found.out
    numbers = json.loads((tmp_path / "found" / "compare.json").read_text())
    before = {entry["points"][0]["score"] for entry in numbers["runs"]}
    assert len(numbers["runs"]) == 2 and len(before) == 1
    assert numbers["contenders"][1]["versus"]["difference"]["low"] is None


def test_staleness_is_a_world_of_its_own(run: Run, tmp_path: Path) -> None:
    small = ("--problem", "sparse-rewards", "--budget", "steps=2", "--seeds", 1)
    found = run("compare", "grpo", *small, "--stale", 0, 3, *CACHED, "--out", "x")
    assert found.code == 0, found.err
    numbers = json.loads((tmp_path / "x" / "compare.json").read_text())
    assert [world["stale"] for world in numbers["plan"]["worlds"]] == [0, 3]
    # Three batches of 8 prompts are sampled ahead, in the first of two steps.
    rollouts = {run["world"]: run["points"][-1]["rollouts"] for run in numbers["runs"]}
    assert rollouts == {"sparse-rewards stale 0": 128, "sparse-rewards stale 3": 320}


def test_learning_rates_are_tuned(run: Run, tmp_path: Path) -> None:
    found = run("compare", "grpo", "gspo", *QUICK, *CACHED, "--tune-lr", "0.01,0.1", "--tune-seeds", 1, "--out", "x")
    assert found.code == 0 and "8 runs in" in found.out and "try others beyond it" in found.out
    numbers = json.loads((tmp_path / "x" / "compare.json").read_text())
    assert [(t["contender"], t["lr"]) for t in numbers["trials"]] == [
        (label, rate) for label in ("grpo", "gspo") for rate in (0.01, 0.1)
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "name the methods to compare"),
        (("grpo", "grpo"), "'grpo' is named twice"),
        (("grpo", "gprx"), "unknown method 'gprx'"),
        (("grpo", "grpo --advantage x"), "unknown advantage 'x'"),
        (("grpo", "--advantage", "x"), "unknown advantage 'x'"),
        (("grpo", "--budget", "20000"), "cannot read the budget '20000'"),
        (("grpo", "--task", "chess"), "unknown task 'chess'"),
        (("grpo", "--problem", "x"), "unknown problem 'x'"),
        (("grpo", "--problem", "sparse-rewards", "--task", "grid"), "one kind per comparison"),
        (("grpo", "--problem", "sparse-rewards", "--lora", 4), "--lora has no meaning"),
        (("grpo", "--problem", "sparse-rewards", "--lr", -1), "--lr must be above 0"),
        (("grpo", "--tune-lr", "0.1"), "--tune-lr needs at least two learning rates"),
        (("grpo", "--lr", "0.1", "--tune-lr", "0.1,0.2"), "exclude each other"),
        (("grpo", "--seeds", 0), "--seeds must be at least 1"),
        (("grpo", "--jobs", 0), "--jobs must be at least 1"),
        (("grpo", "--confidence", 95), "--confidence lies strictly between 0 and 1"),
        (("grpo", "--model", "somewhere"), "a model of your own needs a budget"),
        (("grpo", "--seedz", 3), "unknown option --seedz; did you mean --seed"),
        (("grpo", "--json", "nowhere/x.json"), "there is no folder nowhere"),
    ],
)
def test_wrong_input_is_one_line(run: Run, arguments: tuple[object, ...], said: str, tmp_path: Path) -> None:
    found = run("compare", *arguments)
    assert found.code == 2 and found.err.count("\n") == 1 and said in found.err
    assert not list(tmp_path.iterdir())


def test_a_quick_leaderboard(run: Run, tmp_path: Path) -> None:
    found = run("leaderboard", "--quick", "--methods", "rloo,gspo", "--world", "exact", *CACHED, "--out", "page.md")
    assert found.code == 0, found.err
    text = (tmp_path / "page.md").read_text()
    assert text.startswith("# Leaderboard") and "| `grpo` |" in text and "| `gspo` |" in text
    assert "polopt leaderboard --quick --methods rloo,gspo --world exact" in text
    assert run("leaderboard", "--world", "moon", "--out", "p.md").err.strip().endswith("choose from small, exact")
    assert "folder that exists" in run("leaderboard", "--out", "nowhere/page.md").err


def test_a_page_shows_the_command_without_this_machine_s_places() -> None:
    given = ["grpo", "--cache", "/somewhere", "--seeds", "3", "--out=there", "--json", "numbers.json"]
    assert command_line("compare", given) == "polopt compare grpo --seeds 3"

"""``polopt diagnose``: options, table, files, errors."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from polopt.cli.diagnose import groups
from tests.cli.conftest import Result

Run = Callable[..., Result]
QUICK = ("--vocabulary", 2, "--length", 1, "--no-end", "--seconds", 1)


def test_methods_are_compared_side_by_side(run: Run, tmp_path: Path) -> None:
    result = run("diagnose", "grpo", "rloo", "dr-grpo", *QUICK, "--out", "here")
    assert (result.code, result.err) == (0, "")
    header = next(line for line in result.out.splitlines() if "measure" in line)
    assert header.index("grpo") < header.index("rloo") < header.index("dr-grpo")
    report = json.loads((tmp_path / "here" / "diagnosis.json").read_text())
    assert list(report["methods"]) == ["grpo", "rloo", "dr-grpo"]
    assert report["methods"]["grpo"]["bias"]["angle"] > 0.1
    assert report["methods"]["rloo"]["bias"]["angle"] < 1e-5
    assert report["methods"]["dr-grpo"]["bias"]["scale"] == pytest.approx(0.75)
    assert report["problem"]["group_sizes"] == [4, 4, 4]
    assert (tmp_path / "here" / "diagnosis.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_says_how_it_was_estimated(run: Run) -> None:
    result = run("diagnose", "grpo", "reinforce", *QUICK)
    # 5 groups of four of two sequences, for each of three prompts.
    row = next(line for line in result.out.splitlines() if "estimated from" in line)
    assert "15 groups, all" in row
    assert "sampled in batches" in result.out
    assert "noise" in result.out


def test_slots_and_fields_are_replaced(run: Run, tmp_path: Path) -> None:
    result = run(
        "diagnose", "grpo", *QUICK, "--advantage", "leave-one-out", "--aggregation=sequence-sum", "--json", "out.json"
    )
    assert result.code == 0, result.err
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["slots"] == {"advantage": "leave-one-out", "aggregation": "sequence-sum"}
    assert report["methods"]["grpo"]["bias"]["scale"] == pytest.approx(1)
    assert report["methods"]["grpo"]["bias"]["residual"] == pytest.approx(0, abs=1e-6)


def test_the_problem_is_as_told(run: Run, tmp_path: Path) -> None:
    arguments = ("--problem", "unequal-groups", "--problems", 2, "--vocabulary", 2, "--length", 1, "--seed", 3)
    assert run("diagnose", "rloo", *arguments, "--json", "a.json").code == 0
    assert run("diagnose", "rloo", *arguments, "--group", 3, "--json", "b.json").code == 0
    first, second = (json.loads((tmp_path / name).read_text())["problem"] for name in ("a.json", "b.json"))
    assert first["group_sizes"] == [2, 3]
    assert second["group_sizes"] == [3, 3]
    assert (first["vocabulary"], first["length"], first["end"], first["seed"]) == (2, 1, True, 3)


def test_a_seed_repeats_what_is_sampled(run: Run, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert (
            run("diagnose", "reinforce", *QUICK, "--prompts", 2, "--json", f"{name}.json", "--png", "x.png").code == 0
        )
    a, b = (json.loads((tmp_path / f"{name}.json").read_text())["methods"]["reinforce"] for name in ("a", "b"))
    for name in ("bias", "noise", "curve", "all_right"):
        assert a[name] == b[name]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "name a method"),
        (("grop",), "grpo"),
        (("grpo", "--problem", "binary"), "binary-verifier"),
        (("grpo", "--problem", "random-rewards", "--pass-rate", 0.5), "--pass-rate"),
        (("grpo", "--pass-rate", 1.5), "1.5"),
        (("grpo", "--pass-rate", 0.5, "--problems", 2), "--problems 2"),
        (("grpo", "--vocabulary", 1), "vocabulary"),
        (("grpo", "--group", 0), "--group"),
        (("grpo", "--png", "x.pdf"), ".png"),
        (("grpo", "--json", "missing/x.json"), "missing"),
        (("grpo", "--objective.hihg", 1), "hihg"),
        (("grpo", "--porblem", "x"), "--problem"),
    ],
)
def test_wrong_input_is_one_line(run: Run, arguments: tuple[object, ...], words: str) -> None:
    result = run("diagnose", *arguments)
    assert result.code == 2
    assert result.out == ""
    assert words in result.err
    assert len(result.err.splitlines()) == 1


def test_every_option_is_explained(run: Run) -> None:
    assert [option.name for options in groups().values() for option in options if not option.help] == []
    result = run("diagnose", "--help")
    assert result.code == 0
    assert "--pass-rate" in result.out


def test_the_comparison_of_the_documentation_is_quick(run: Run) -> None:
    started = time.process_time()
    assert run("diagnose", "grpo", "rloo", "dr-grpo").code == 0
    assert time.process_time() - started < 20

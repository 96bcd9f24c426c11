from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

import polopt.claims
from polopt.claims import claims
from polopt.claims.claim import Claim
from tests.cli.conftest import Result


def counted(seed: int, quick: bool) -> Mapping[str, float]:
    return {"treatment": 1.0 + seed / 100, "control": 0.0}


@pytest.fixture
def one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two claims that cost nothing."""
    members = tuple(
        Claim("grpo", name, "It helps [a lot].", "exact", "nothing", "use", direction, measure=counted)
        for name, direction in (("helps", "higher"), ("harms", "lower"))
    )
    monkeypatch.setattr(polopt.claims, "claims", lambda: {"grpo": members})


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.usefixtures("one")
def test_verdicts_go_into_the_ledger_of_this_folder(run: Callable[..., Result], tmp_path: Path) -> None:
    result = run("claim", "grpo")
    assert result.code == 0, result.err
    assert "It helps [a lot]." in result.out and "reproduced" in result.out
    found = lines(tmp_path / "claims" / "ledger.jsonl")
    assert [(r["claim"], r["verdict"], r["seeds"]) for r in found] == [
        ("helps", "reproduced", 12),
        ("harms", "not reproduced", 12),
    ]
    assert found[0]["command"] == "polopt claim grpo --only helps"


@pytest.mark.usefixtures("one")
def test_one_claim_with_more_seeds_replaces_its_entry(run: Callable[..., Result], tmp_path: Path) -> None:
    ledger = tmp_path / "book.jsonl"
    run("claim", "grpo", "--ledger", ledger)
    result = run("claim", "grpo", "--only", "harms", "--seeds", 15, "--ledger", ledger)
    assert result.code == 0 and "helps" not in result.out.replace("It helps", "")
    assert [(r["claim"], r["seeds"]) for r in lines(ledger)] == [("helps", 12), ("harms", 15)]
    assert lines(ledger)[1]["command"] == "polopt claim grpo --only harms --seeds 15"


@pytest.mark.usefixtures("one")
def test_quick_judges_nothing_and_writes_only_where_told(run: Callable[..., Result], tmp_path: Path) -> None:
    result = run("claim", "--all", "--quick")
    assert result.code == 0 and "not judged" in result.out and "reproduced" not in result.out
    assert not (tmp_path / "claims").exists()
    run("claim", "--all", "--quick", "--ledger", "book.jsonl")
    assert [(r["quick"], r["seeds"]) for r in lines(tmp_path / "book.jsonl")] == [(True, 2), (True, 2)]


def test_a_real_claim_from_the_command_line(run: Callable[..., Result]) -> None:
    result = run("claim", "gspo", "--only", "agreement", "--quick")
    assert result.code == 0, result.err
    assert "agreement" in result.out and "clipped-share" not in result.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name one method or give --all"),
        (("grpo", "--all"), "name one method or give --all"),
        (("grpoo",), "no claim of 'grpoo'; did you mean 'grpo'"),
        (("grpo", "--seeds", 3), "needs at least 10 seeds, got --seeds 3; add --quick"),
        (("grpo", "--seeds", 0), "--seeds must be at least 1, got 0"),
        (("grpo", "--only", "nonsense"), "there is no claim called 'nonsense'; there are samples-reinforce,"),
        (("grpo", "--world", "large"), "unknown world 'large'; the worlds are exact and small"),
        (("grpo", "--ledger", "."), "--ledger . is a folder; name a file"),
        (("grpo", "--ledger", "no/such/file.jsonl"), "there is no folder no/such"),
        (("grpo", "--sedes", 3), "unknown option --sedes; did you mean --seeds"),
    ],
)
def test_wrong_input_is_one_line_and_measures_nothing(
    run: Callable[..., Result], arguments: tuple[object, ...], message: str, tmp_path: Path
) -> None:
    result = run("claim", *arguments)
    assert (result.code, result.out) == (2, "")
    assert message in result.err and len(result.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_ledger_is_found_before_anything_is_measured(run: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims" / "ledger.jsonl").write_text("nonsense\n")
    result = run("claim", "grpo")
    assert result.code == 2 and "line 1 is no entry of a ledger" in result.err


def test_help_names_the_defaults(run: Callable[..., Result]) -> None:
    from polopt.claims.claim import LEAST_SEEDS, SEEDS
    from polopt.claims.ledger import LEDGER

    text = " ".join(run("claim", "--help").out.replace("│", " ").split())
    assert f"{SEEDS['exact']} in the exact world and {SEEDS['small']} in the small one" in text
    assert f"at least {LEAST_SEEDS['exact']} seeds" in text and str(LEDGER) in text
    assert claims()

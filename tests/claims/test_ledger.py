from __future__ import annotations

import json
import math
import re
import subprocess
from pathlib import Path

import pytest

from polopt.claims import ledger
from polopt.claims.claim import Claim, Outcome, judge
from polopt.claims.ledger import current_commit, entry, read_ledger, write_ledger
from polopt.core.errors import UsageError
from tests.claims.test_claim import made, nothing

FIELDS = {
    *("slug", "claim", "verdict", "statement", "world", "baseline", "metric", "direction", "margin", "treatment"),
    *("control", "effect", "interval", "seeds", "seconds", "commit", "command", "date"),
}


def row(slug: str, claim: str, effect: float = 0.0) -> dict[str, object]:
    return {"slug": slug, "claim": claim, "effect": effect}


def test_an_entry_has_everything_needed_to_run_it_again() -> None:
    outcome = judge(made(), [{"treatment": 1.0 + seed, "control": 0.5} for seed in range(10)], 1.26)
    found = entry(outcome, command="polopt claim slug", commit="abc-dirty")
    assert set(found) == FIELDS
    assert found["effect"] == 5.0 and found["interval"][0] < 5.0 < found["interval"][1]
    assert (found["seeds"], found["seconds"], found["commit"]) == (10, 1.3, "abc-dirty")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", found["date"])
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_an_entry_without_a_measurement_says_why() -> None:
    claim = Claim("slug", "name", "A.", "small", "b", "m", "higher", untestable="too large")
    found = entry(Outcome(claim, "not testable here"), command="c", commit="")
    assert (found["reason"], found["effect"], found["interval"]) == ("too large", None, [None, None])


def test_one_seed_has_no_interval() -> None:
    found = entry(judge(made(), [nothing(0, True)]), command="c", commit="", quick=True)
    assert found["interval"] == [None, None] and found["verdict"] == "not reproduced" and found["quick"] is True
    assert math.isfinite(found["effect"])


def test_known_claims_are_replaced_in_place_and_new_ones_added(tmp_path: Path) -> None:
    path = tmp_path / "claims" / "ledger.jsonl"
    write_ledger(path, [row("a", "x", 1), row("b", "x", 2), row("a", "y", 3)])
    write_ledger(path, [row("c", "x", 4), row("b", "x", 5)])
    assert [(r["slug"], r["claim"], r["effect"]) for r in read_ledger(path)] == [
        ("a", "x", 1),
        ("b", "x", 5),
        ("a", "y", 3),
        ("c", "x", 4),
    ]
    assert len(path.read_text().splitlines()) == 4
    assert [p.name for p in path.parent.iterdir()] == ["ledger.jsonl"]


def test_a_write_that_fails_leaves_the_old_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ledger.jsonl"
    write_ledger(path, [row("a", "x", 1)])
    before = path.read_bytes()
    with pytest.raises(ValueError):
        write_ledger(path, [row("a", "x", math.nan)])

    def broken(self: Path, target: Path) -> Path:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        write_ledger(path, [row("a", "x", 2)])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["ledger.jsonl"]


@pytest.mark.parametrize("line", ["{", "[]", '{"slug": "a"}', "3"])
def test_a_damaged_ledger_is_not_overwritten(tmp_path: Path, line: str) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text('{"slug": "a", "claim": "x"}\n\n' + line + "\n")
    with pytest.raises(UsageError, match=r"ledger\.jsonl line 3"):
        write_ledger(path, [row("a", "x")])
    assert path.read_text().endswith(line + "\n")


def test_no_ledger_has_no_entries(tmp_path: Path) -> None:
    assert read_ledger(tmp_path / "ledger.jsonl") == []


def test_the_commit_is_the_checkouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        line = ["git", "-c", "user.name=n", "-c", "user.email=e", *words]
        return subprocess.run(line, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    module = tmp_path / "polopt" / "claims" / "ledger.py"
    monkeypatch.setattr(ledger, "__file__", str(module))
    method = tmp_path / "polopt" / "core" / "method.py"
    module.parent.mkdir(parents=True)
    method.parent.mkdir()
    method.write_text("")
    git("init", "--quiet")
    assert current_commit() == ""
    git("add", "polopt")
    git("commit", "--quiet", "-m", "first")
    assert current_commit() == git("rev-parse", "HEAD")
    method.write_text("changed")
    assert current_commit() == git("rev-parse", "HEAD") + "-dirty"


def test_the_ledger_of_the_repository_is_of_registered_claims() -> None:
    from polopt.claims import claims

    path = Path(__file__).parents[2] / ledger.LEDGER
    known = {(claim.slug, claim.name): claim for members in claims().values() for claim in members}
    rows = read_ledger(path)
    assert {(r["slug"], r["claim"]) for r in rows} == set(known)
    for r in rows:
        claim = known[r["slug"], r["claim"]]
        assert (r["statement"], r["metric"], r["direction"]) == (claim.statement, claim.metric, claim.direction)
        assert (r["baseline"], r["world"], r["margin"]) == (claim.baseline, claim.world, claim.margin)
        assert "quick" not in r

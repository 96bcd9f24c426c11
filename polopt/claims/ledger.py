"""The ledger: one line of JSON per claim, with everything needed to run it again."""

from __future__ import annotations

import datetime
import json
import math
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from polopt.claims.claim import Outcome
from polopt.core.errors import UsageError
from polopt.training.files import write_whole

LEDGER: Final = Path("claims/ledger.jsonl")


def entry(outcome: Outcome, *, command: str, commit: str, quick: bool = False) -> dict[str, Any]:
    """An outcome as plain data; numbers that were not measured are null."""
    claim = outcome.claim
    made: dict[str, Any] = {
        "slug": claim.slug,
        "claim": claim.name,
        "verdict": outcome.verdict,
        "statement": claim.statement,
        "world": claim.world,
        "baseline": claim.baseline,
        "metric": claim.metric,
        "direction": claim.direction,
        "margin": claim.margin,
        "treatment": _number(outcome.treatment),
        "control": _number(outcome.control),
        "effect": _number(outcome.effect),
        "interval": [_number(outcome.low), _number(outcome.high)],
        "seeds": outcome.seeds,
        "seconds": round(outcome.seconds, 1),
        "commit": commit,
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }
    if claim.untestable:
        made["reason"] = claim.untestable
    if quick:
        made["quick"] = True
    return made


def read_ledger(path: Path) -> list[dict[str, Any]]:
    """The entries of a ledger, none where there is no file.

    Raises UsageError naming the line that is not an entry.
    """
    if not path.exists():
        return []
    found = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--ledger {path} cannot be read: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            _ = row["slug"], row["claim"]
        except (ValueError, KeyError, TypeError):
            raise UsageError(f"{path} line {number} is no entry of a ledger; mend or remove it") from None
        found.append(row)
    return found


def write_ledger(path: Path, entries: Sequence[dict[str, Any]]) -> None:
    """Replace the entries of the same (slug, claim) in their place, add the others at the end.

    The file is written whole or not at all. Raises UsageError when the ledger that is there cannot be read.
    """
    fresh = {(row["slug"], row["claim"]): row for row in entries}
    rows = [fresh.pop((row["slug"], row["claim"]), row) for row in read_ledger(path)]
    rows += fresh.values()
    text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)


def current_commit() -> str:
    """Commit of the checkout that polopt runs from, "-dirty" where files differ from it; empty outside a checkout."""
    package = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        # Without optional locks: looking must not write to the checkout.
        line = ["git", "--no-optional-locks", *arguments]
        return subprocess.run(line, cwd=package, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        # An installed polopt may lie inside somebody else's checkout, which does not track it.
        git("ls-files", "--error-unmatch", "core/method.py")
        commit = git("rev-parse", "HEAD")
        return f"{commit}-dirty" if git("status", "--porcelain") else commit
    except (OSError, subprocess.SubprocessError):
        return ""


def _number(value: float) -> float | None:
    # Twelve digits: enough for every use, and the same on every machine.
    return float(f"{value:.12g}") if math.isfinite(value) else None

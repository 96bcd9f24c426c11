"""``python -m benchmarks [--only NAME] [--json FILE] [--markdown FILE] [--rounds N] [--list]``"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from benchmarks.row import Row

MODULES: Final = ("grpo_step", "generation", "log_probs", "credit", "dpo_step")


def main() -> int:
    """Run the chosen benchmarks one after the other, print a table as they finish, write JSON where asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="run this one (repeatable)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one object per row")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table as a page")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="measured rounds of each contender")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    given = parser.parse_args()
    known = _known()
    if given.list:
        print("\n".join(known))
        return 0
    if unknown := [name for name in given.only if name not in known]:
        parser.error(f"there is no benchmark {unknown[0]!r}; there are {', '.join(known)}")
    if given.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {given.rounds}")
    from benchmarks.machine import describe
    from benchmarks.training import quiet

    quiet()

    where = describe()
    print(f"{date.today()}  " + "  ".join(f"{name} {value}" for name, value in where.items()), flush=True)
    rows = []
    for name in given.only or known:
        print(f"{name} ...", end=" ", flush=True)
        row = known[name](name, given.rounds)
        rows.append(row)
        print(
            f"{row.ratio:.2f}x [{row.ratio_low:.2f}, {row.ratio_high:.2f}] of {row.peer}; "
            f"goal {row.goal:g}x: {row.verdict}; {row.seconds:.3g} s, {row.share_of_limit:.0%} of the limit",
            flush=True,
        )
        for label, value in row.more.items():
            print(f"    {label}: {value:,.4g}" if isinstance(value, float) else f"    {label}: {value}", flush=True)
        if given.json:
            given.json.write_text(json.dumps([row.as_dict() for row in rows], indent=2) + "\n")
        if given.markdown:
            given.markdown.write_text(page(rows, where, date.today(), given.rounds))
    return 0


def page(rows: Sequence[Row], where: Mapping[str, str], day: date, rounds: int) -> str:
    """The table, and under it what else was measured of each row."""
    machine = "; ".join(f"{name} {value}" for name, value in where.items())
    lines = [
        f"Measured on {day}: {machine}. Median of {rounds} rounds with deciles; each side at its fastest setting.",
        "",
        "| benchmark | against | times as fast | goal | verdict | seconds | share of the machine's limit |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.name} | {row.peer} | {row.ratio:.2f} [{row.ratio_low:.2f}, {row.ratio_high:.2f}] | {row.goal:g} | "
            f"{row.verdict} | {row.seconds:.3g} | {row.share_of_limit:.0%} |"
        )
    lines.append("")
    for row in rows:
        seen = (
            f"{label} {value:,.4g}" if isinstance(value, float) else f"{label} {value}"
            for label, value in row.more.items()
        )
        lines.append(f"- `{row.name}`: " + ", ".join(seen).replace("_", " ") + ".")
    return "\n".join(lines) + "\n"


def _known() -> dict[str, Callable[[str, int], Row]]:
    found = {}
    for module in (importlib.import_module(f"benchmarks.{name}") for name in MODULES):
        found |= dict.fromkeys(module.CASES, module.run)
    return found


if __name__ == "__main__":
    sys.exit(main())

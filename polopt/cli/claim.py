"""``polopt claim``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.markup import escape
from rich.status import Status
from rich.table import Table

from polopt.cli.options import Groups, Option, parse
from polopt.cli.output import make_console, silence_libraries
from polopt.core.errors import UsageError

if TYPE_CHECKING:
    from polopt.claims.claim import Claim, Outcome

DESCRIPTION = """\
Test a paper's claim at small scale, on paired seeds, and write the verdict into the ledger.

A claim is reproduced iff the 95% interval of the paired difference excludes zero in the claimed direction (beyond a
margin that the claim states, where it says "at least as good"), with at least 10 seeds in the exact world or 5 in the
small one. docs/claims.md explains the rule; the docstring of each file in polopt/claims is its design."""

SLUG = Option("slug", str | None, None, "Slug of the method whose paper claims it.", "METHOD")
LEDGER: Final = "claims/ledger.jsonl"
OPTIONS = (
    Option("all", bool, False, "Every claim there is."),
    Option("only", tuple[str, ...], (), "Only the claim of this name.", "NAME"),
    Option("world", str | None, None, "Only the claims of this world: exact or small.", "WORLD"),
    Option("seeds", int | None, None, "Paired seeds; 12 in the exact world and 5 in the small one when left out.", "N"),
    Option("quick", bool, False, "2 seeds and tiny budgets, to see that the code runs; writes no ledger unless told."),
    Option("ledger", str | None, None, f"File of the verdicts; {LEDGER} when left out.", "FILE"),
)


def groups() -> Groups:
    """Every option by the title under which the help shows it."""
    return {"options": OPTIONS}


def claim_command(arguments: Sequence[str]) -> int:
    """Measure, judge, write, print; returns the exit code.

    Raises UsageError for wrong input.
    """
    given = parse("claim", DESCRIPTION, groups(), arguments, SLUG)
    options = {option.name: option.default for option in OPTIONS} | dict(given.options)
    if bool(given.positional) == options["all"]:
        raise UsageError("name one method or give --all: polopt claim METHOD")

    from polopt.claims import claims, claims_of
    from polopt.claims.claim import check
    from polopt.claims.ledger import current_commit, entry, read_ledger, write_ledger

    slugs = list(claims()) if options["all"] else [str(given.positional)]
    chosen = {slug: _chosen(claims_of(slug), options["only"], options["world"]) for slug in slugs}
    chosen = {slug: members for slug, members in chosen.items() if members}
    if not chosen:
        raise UsageError(_nothing(options["only"], options["world"], slugs))
    ledger = _ledger(options["ledger"], options["quick"])
    if ledger is not None:
        read_ledger(ledger)
    silence_libraries()
    console = make_console()
    commit = current_commit()
    table = outcome_table()
    with Status("", console=console) as status:
        for members in chosen.values():
            outcomes = check(
                members,
                seeds=options["seeds"],
                quick=options["quick"],
                tell=lambda text: status.update(f"[bold]claims[/bold] {escape(text)}"),
            )
            for outcome in outcomes:
                add_outcome(table, outcome, judged=not options["quick"])
            if ledger is not None:
                rows = [
                    entry(outcome, command=_command(outcome, options), commit=commit, quick=options["quick"])
                    for outcome in outcomes
                ]
                # After every paper, so that an interruption loses one at most.
                write_ledger(ledger, rows)
    console.print(table)
    if ledger is not None:
        console.print(f"[bold]ledger[/bold] {escape(str(ledger))}", highlight=False, soft_wrap=True)
    if options["quick"]:
        console.print("[dim]quick: the code runs; the numbers mean nothing[/dim]", highlight=False)
    return 0


def _chosen(members: Sequence[Claim], only: Sequence[str], world: str | None) -> list[Claim]:
    return [c for c in members if (not only or c.name in only) and world in (None, c.world)]


def _nothing(only: Sequence[str], world: str | None, slugs: Sequence[str]) -> str:
    from polopt.claims import claims

    if world not in (None, "exact", "small"):
        return f"unknown world {world!r}; the worlds are exact and small"
    there = ", ".join(claim.name for slug in slugs for claim in claims()[slug] if world in (None, claim.world))
    asked = f" called {' or '.join(map(repr, only))}" if only else ""
    where = f" in the {world} world" if world else ""
    return f"there is no claim{asked}{where}; there are {there or 'none'}"


def _ledger(path: str | None, quick: bool) -> Path | None:
    """Where to write, checked before anything is measured."""
    if path is None:
        return None if quick else Path(LEDGER)
    if Path(path).is_dir():
        raise UsageError(f"--ledger {path} is a folder; name a file")
    if not Path(path).absolute().parent.is_dir():
        raise UsageError(f"--ledger {path}: there is no folder {Path(path).parent}")
    return Path(path)


def _command(outcome: Outcome, options: dict[str, object]) -> str:
    words = ["polopt", "claim", outcome.claim.slug, "--only", outcome.claim.name]
    if options["seeds"] is not None:
        words += ["--seeds", str(options["seeds"])]
    return " ".join([*words, "--quick"] if options["quick"] else words)


def outcome_table() -> Table:
    """The table of verdicts, without rows."""
    table = Table("claim", "metric", "claimed", "effect", "95% interval", "seeds", "s", "verdict", show_lines=True)
    for index in (3, 4, 5, 6):
        table.columns[index].no_wrap = True
    table.columns[0].ratio, table.columns[1].ratio = 3, 2
    return table


def add_outcome(table: Table, outcome: Outcome, *, judged: bool) -> None:
    """One row; the verdict is left out where nothing is ``judged``."""
    claim = outcome.claim
    within = f"\n± {claim.margin:g}" if claim.margin else ""
    said = outcome.verdict if judged else "not judged"
    color = {"reproduced": "green", "not reproduced": "red"}.get(said, "yellow")
    measured = claim.measure is not None
    table.add_row(
        f"[bold]{escape(claim.slug)}[/bold] {escape(claim.name)}\n[dim]{escape(claim.statement)}[/dim]",
        f"{escape(claim.metric)} [dim]({claim.world} world)[/dim]",
        claim.direction + within,
        f"{outcome.effect:+.3g}" if measured else "",
        f"{outcome.low:+.3g} .. {outcome.high:+.3g}" if measured else "",
        str(outcome.seeds),
        f"{outcome.seconds:.0f}",
        f"[{color}]{said}[/{color}]" + (f"\n{escape(claim.untestable)}" if claim.untestable else ""),
    )

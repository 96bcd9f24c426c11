"""``polopt study``."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import time
from collections.abc import Mapping, Sequence
from html import escape as html
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from polopt.cli.claim import add_outcome, outcome_table
from polopt.cli.compare import command_line, made_with
from polopt.cli.options import Groups, Option, parse
from polopt.cli.output import make_console, silence_libraries, write_json
from polopt.core.errors import UsageError

if TYPE_CHECKING:
    from polopt.claims.claim import Claim
    from polopt.claims.study import Found, Study

DESCRIPTION = """\
Rerun the comparison that a paper is about, on paired seeds, and draw its figure.

Writes a page with the verdicts on the paper's statements, the figure, and every difference with its 95% interval, and
the numbers behind them. The statements are those of `polopt claim METHOD`, which keeps the ledger. Without a name the
studies are listed."""

SLUG = Option("slug", str | None, None, "Slug of the study; all are listed when left out.", "STUDY")
OPTIONS = (
    Option("quick", bool, False, "2 seeds and tiny budgets, to see that the code runs."),
    Option("seeds", int | None, None, "Paired seeds; 12 in the exact world and 5 in the small one when left out.", "N"),
    Option("world", str | None, None, "Only what is measured in this world: exact or small.", "WORLD"),
    Option("out", str | None, None, "Folder of the page, figure and numbers; runs/study-STUDY-TIME.", "FOLDER"),
)


def groups() -> Groups:
    """Every option by the title under which the help shows it."""
    return {"options": OPTIONS}


def study_command(arguments: Sequence[str]) -> int:
    """Measure, judge, draw, write, print; returns the exit code.

    Raises UsageError for wrong input.
    """
    given = parse("study", DESCRIPTION, groups(), arguments, SLUG)
    options = {option.name: option.default for option in OPTIONS} | dict(given.options)

    from polopt.claims import claims_of, study_of
    from polopt.claims.study import carry_out
    from polopt.compare.panels import plot_panels

    console = make_console()
    if given.positional is None:
        console.print(_listed())
        return 0
    slug = str(given.positional)
    study, claims = _within(options["world"], slug, study_of(slug), claims_of(slug))
    folder = _folder(slug, options["out"])
    silence_libraries()
    with Told(console) as tell:
        found = carry_out(slug, study, claims, seeds=options["seeds"], quick=options["quick"], tell=tell)
    table = outcome_table()
    for outcome in found.outcomes:
        add_outcome(table, outcome, judged=not options["quick"])
    console.print(table)
    for panel in _difference_tables(found):
        console.print(panel)
    folder.mkdir(parents=True, exist_ok=True)
    plot_panels(found.panels, f"{study.title} ({slug})", folder / "study.png")
    command, made = command_line("study", arguments), made_with(1)
    write_json(numbers(found, command, made), str(folder / "study.json"))
    _write_page(found, folder, command, {**made, "seconds": round(found.seconds)}, judged=not options["quick"])
    console.print(f"[bold]page[/bold] {escape(str(folder / 'index.html'))}", highlight=False, soft_wrap=True)
    if options["quick"]:
        console.print("[dim]quick: the code runs; the numbers mean nothing[/dim]", highlight=False)
    return 0


def _listed() -> Table:
    from polopt.claims import claims_of, studies

    table = Table("study", "what is asked", "statements", "panels")
    for slug, study in studies().items():
        table.add_row(slug, escape(study.question), str(len(claims_of(slug))), str(len(study.panels)))
    return table


def _within(world: str | None, slug: str, study: Study, claims: Sequence[Claim]) -> tuple[Study, tuple[Claim, ...]]:
    """The part of a study, and of its statements, that is measured in a world."""
    claims = tuple(claim for claim in claims if world in (None, claim.world))
    panels = tuple(panel for panel in study.panels if world in (None, panel.world))
    if not panels:
        raise UsageError(
            f"the figure of {slug} shows nothing of the world {world!r}: the worlds are exact and small, and "
            f"polopt claim {slug} measures statements without a figure"
        )
    return dataclasses.replace(study, panels=panels), claims


def _folder(slug: str, out: str | None) -> Path:
    if out is None:
        return Path("runs") / f"study-{slug}-{time.strftime('%Y%m%d-%H%M%S')}"
    if Path(out).exists() and not Path(out).is_dir():
        raise UsageError(f"--out {out} is a file; name a folder")
    return Path(out)


class Told:
    """Where a study is: a line that is redrawn on a terminal; elsewhere a line every so often."""

    def __init__(self, console: Console, interval: float = 15.0) -> None:
        self.console, self.interval = console, interval
        self.status = console.status("") if console.is_terminal else None
        self.started = self.said = time.monotonic()

    def __enter__(self) -> Told:
        if self.status is not None:
            self.status.start()
        return self

    def __call__(self, text: str) -> None:
        passed = time.monotonic() - self.started
        line = f"{text} ({passed:.0f} s)"
        if self.status is not None:
            self.status.update(escape(line))
        elif time.monotonic() - self.said > self.interval:
            self.said = time.monotonic()
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def __exit__(self, *error: object) -> None:
        if self.status is not None:
            self.status.stop()


# --- what was found, in tables ------------------------------------------------------------------------------------


def _difference_tables(found: Found) -> list[Table]:
    from polopt.compare.panels import Differences
    from polopt.compare.words import interval, signed

    tables = []
    for panel in found.panels:
        if not isinstance(panel, Differences):
            continue
        table = Table("comparison", "difference", "95% interval", title=escape(panel.title), title_justify="left")
        for label, difference in panel.rows.items():
            table.add_row(escape(label), signed(difference.mean), escape(interval(difference)))
        tables.append(table)
    return tables


def numbers(found: Found, command: str, made: Mapping[str, Any]) -> dict[str, Any]:
    """Everything as plain data: verdicts, panels, and what was measured per seed."""
    from polopt.compare.plan import plain

    return {
        "study": found.slug,
        "command": command,
        "made": dict(made),
        "claims": [
            {
                "claim": o.claim.name,
                "statement": o.claim.statement,
                "verdict": o.verdict,
                **{name: getattr(o, name) for name in ("effect", "low", "high", "treatment", "control", "seeds")},
            }
            for o in found.outcomes
        ],
        "panels": [plain(panel) for panel in found.panels],
        "measurements": {name: [dict(row) for row in rows] for name, rows in found.rows.items()},
        "seconds": found.seconds,
    }


def _write_page(found: Found, folder: Path, command: str, made: Mapping[str, Any], *, judged: bool) -> None:
    from polopt.claims import module_of
    from polopt.compare.page import Cell, image, settings_table, table, write_html
    from polopt.compare.panels import Differences
    from polopt.compare.words import duration, interval, number, signed

    study = found.study
    statements: list[list[Cell]] = []
    for o in found.outcomes:
        colour = {"reproduced": "better", "not reproduced": "worse"}.get(o.verdict, "unclear") if judged else "unclear"
        said = o.verdict if judged else "not judged"
        measured = o.claim.measure is not None
        bounds = f'<span class="range">[{number(o.low)}, {number(o.high)}]</span>'
        statements.append(
            [
                f'{html(o.claim.statement)}<span class="range">{html(o.claim.metric)}; against '
                f'{html(o.claim.baseline)}</span><span class="range">{html(o.claim.untestable)}</span>',
                (o.claim.direction + (f", margin {o.claim.margin:g}" if o.claim.margin else ""), ""),
                (f"{signed(o.effect)}{bounds}" if measured else "", "n"),
                (str(o.seeds) if measured else "", "n"),
                f'<span class="{colour}">{said}</span>',
            ]
        )
    body = [
        f"<h1>{html(study.title)}</h1>",
        f'<p class="lead">{html(study.question)}</p>',
        f'<p class="note">{html(found.slug)}; measured in {duration(found.seconds)}</p>',
        "<h2>Statements of the paper</h2>",
        table(["statement", "claimed", ("effect", "n"), ("seeds", "n"), ""], statements),
        '<p class="note">A statement is reproduced if the 95% interval of the paired difference lies on the claimed '
        "side of zero, or within the margin it states.</p>",
        "<h2>Figure</h2>",
        image(folder / "study.png", study.title),
        '<p class="note">Lines are means over seeds with the 95% bootstrap interval of the mean. Differences are '
        "paired by seed, with Student's 95% interval; they are grey where it contains zero, and nothing is claimed of "
        "them beyond the statements above.</p>",
    ]
    for panel in found.panels:
        if isinstance(panel, Differences):
            rows: list[list[Cell]] = [
                [html(label), (signed(d.mean), "n"), (html(interval(d)), "n")] for label, d in panel.rows.items()
            ]
            head: list[Cell] = ["comparison", (f"difference, {html(panel.unit)}", "n"), ("95% interval", "n")]
            body += [f"<h2>{html(panel.title)}</h2>", table(head, rows)]
        else:
            rows = [
                [
                    html(label),
                    (number(c.mean[-1]), "n"),
                    (f"[{number(c.low[-1])}, {number(c.high[-1])}]", "n"),
                    (f"{c.x[-1]:g}", "n"),
                ]
                for label, c in panel.curves.items()
            ]
            head = ["line", (f"{html(panel.y)}, last point", "n"), ("95% interval", "n"), (f"at {html(panel.x)}", "n")]
            body += [f"<h2>{html(panel.title)}</h2>", table(head, rows)]
    design = inspect.getdoc(importlib.import_module(module_of(found.slug))) or ""
    body += ["<h2>Design</h2>", f"<pre>{html(design)}</pre>"]
    body += ["<h2>How it was run</h2>", f"<pre>{html(command)}</pre>", settings_table(made)]
    write_html(study.title, "\n".join(body), folder / "index.html")

"""A comparison as one web page that needs nothing else: tables, curves, what differs between contenders, settings."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, Final

from polopt.compare.figure import colour_of
from polopt.compare.report import LEAST_GAIN, Entry, Report
from polopt.compare.words import cost, edges, headline, interval, number, signed, target_text, title_of, verdict_text

_STYLE: Final = """
:root { color-scheme: light; }
body { font: 15px/1.55 system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; color: #22262b; background: #fff;
  margin: 0 auto; max-width: 1160px; padding: 32px 24px 64px; }
h1 { font-size: 25px; line-height: 1.25; margin: 0 0 4px; }
h2 { font-size: 18px; margin: 38px 0 10px; }
p.lead { font-size: 17px; margin: 6px 0 4px; }
p.note, td.note { color: #666a70; font-size: 13.5px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
th, td { text-align: left; padding: 6px 14px 6px 0; border-bottom: 1px solid #e6e8eb; vertical-align: top; }
th { font-weight: 600; border-bottom-color: #9aa0a6; white-space: nowrap; font-size: 13.5px; }
td.n, th.n { text-align: right; white-space: nowrap; }
td.same { color: #8a8f98; }
td.parts { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: 12.5px; overflow-wrap: anywhere; }
.range { color: #666a70; font-size: 12.5px; display: block; }
.dot { display: inline-block; width: 11px; height: 11px; border-radius: 50%; margin-right: 8px; }
.better { color: #1d7a3e; font-weight: 600; } .worse { color: #b3323f; font-weight: 600; } .unclear { color: #666a70; }
img { width: 100%; height: auto; margin-top: 8px; }
pre { background: #f5f6f8; padding: 12px 14px; border-radius: 6px; white-space: pre-wrap; overflow-wrap: anywhere;
  font-size: 13px; }
"""


def write_page(
    report: Report, path: Path, *, figure: Path, command: str, settings: Mapping[str, Any], made: Mapping[str, Any]
) -> None:
    """Write the page; the figure is put into it."""
    body = "\n".join(
        (
            f"<h1>{escape(title_of(report))}</h1>",
            f'<p class="lead">{escape(headline(report))}</p>',
            f'<p class="note">{escape(cost(report))}</p>',
            _results(report),
            image(figure, "Learning curves, paired differences and final scores"),
            _along(report),
            _worlds(report),
            _trials(report),
            _parts(report),
            "<h2>How it was run</h2>",
            f"<pre>{escape(command)}</pre>",
            settings_table({**made, **settings}),
        )
    )
    write_html(title_of(report), body, path)


def write_html(title: str, body: str, path: Path) -> None:
    """A page of its own around a body of HTML, in the style of all of them."""
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def image(path: Path, about: str) -> str:
    """A picture as part of a page."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(about)}" src="data:image/png;base64,{data}">'


Cell = str | tuple[str, str]
"""HTML, or HTML with the classes of its cell."""


def table(head: Sequence[Cell], rows: Iterable[Sequence[Cell]]) -> str:
    """A table in HTML."""

    def cell(tag: str, value: Cell) -> str:
        text, classes = value if isinstance(value, tuple) else (value, "")
        return f'<{tag} class="{classes}">{text}</{tag}>' if classes else f"<{tag}>{text}</{tag}>"

    lines = ["<tr>" + "".join(cell("th", h) for h in head) + "</tr>"]
    lines += ["<tr>" + "".join(cell("td", c) for c in row) + "</tr>" for row in rows]
    return '<div class="scroll"><table>' + "\n".join(lines) + "</table></div>"


def _name(report: Report, entry: Entry) -> str:
    shade = colour_of(report)[entry.contender.label]
    return f'<span class="dot" style="background:{shade}"></span>{escape(entry.contender.label)}'


def _ranged(value: Any, text: str | None = None) -> Cell:
    shown = number(value.mean) if text is None else text
    if not math.isfinite(value.low):
        return shown, "n"
    return f'{shown}<span class="range">{escape(interval(value))}</span>', "n"


def _results(report: Report) -> str:
    rows: list[list[Cell]] = []
    for entry in report.entries:
        versus = entry.versus
        row: list[Cell] = [_name(report, entry), _ranged(entry.mean), _ranged(entry.iqm)]
        if versus is None:
            row += [("", "n"), ("", "n"), "baseline"]
        else:
            row += [
                _ranged(versus.difference, signed(versus.difference.mean)),
                _ranged(versus.improvement, f"{versus.improvement.mean:.0%}"),
                f'<span class="{versus.verdict}">{verdict_text(entry)}</span>',
            ]
        rows.append(row)
    base = escape(report.baseline.contender.label)
    head: list[Cell] = [
        "contender",
        ("final score, mean", "n"),
        ("interquartile mean", "n"),
        (f"difference to {base}", "n"),
        ("probability that it is better", "n"),
        "",
    ]
    note = (
        f"Held-out score when the budget was spent, with {report.level:.0%} intervals over seeds: stratified "
        "bootstrap for the means and the probability, Student's for the paired difference. A difference is called when "
        "its whole interval lies on one side of zero; the intervals are not corrected for the number of contenders."
    )
    return "<h2>Final score</h2>" + table(head, rows) + f'<p class="note">{note}</p>'


def _along(report: Report) -> str:
    head: list[Cell] = [
        "contender",
        ("area under the curve", "n"),
        (f"rollouts to {escape(target_text(report))}", "n"),
        ("entropy, nats", "n"),
        ("length, tokens", "n"),
        ("seconds per step", "n"),
        ("steps", "n"),
        ("rollouts", "n"),
        ("tokens", "n"),
    ]
    rows: list[list[Cell]] = []
    for entry in report.entries:
        reached = entry.to_target
        soon = f"{reached.rollouts:,.0f}" if math.isfinite(reached.rollouts) else "not reached"
        rows.append(
            [
                _name(report, entry),
                _ranged(entry.area),
                (f'{soon}<span class="range">{reached.reached} of {reached.runs} runs</span>', "n"),
                (number(entry.entropy), "n"),
                (f"{entry.length:.1f}", "n"),
                (f"{entry.step_seconds:.3g}", "n"),
                *((f"{entry.spent[name]:,.0f}", "n") for name in ("steps", "rollouts", "tokens")),
            ]
        )
    note = (
        "Area: mean height of the held-out curve over the budget. Rollouts to the target: the median run. Entropy and "
        "length are held-out ones at the end; steps, rollouts and tokens are means per run. An iteration that has "
        "begun is finished, so that a method that samples further prompts may spend slightly more than the budget."
    )
    if report.comparison.plan.unit == "seconds":
        note += " The budget is wall time: it depends on the machine and on what else it did."
    return "<h2>On the way</h2>" + table(head, rows) + f'<p class="note">{note}</p>'


def _worlds(report: Report) -> str:
    worlds = [w.label for w in report.comparison.plan.worlds]
    if len(worlds) == 1:
        return ""
    head: list[Cell] = ["contender", *((escape(w), "n") for w in worlds)]
    start: list[Cell] = ["initial policy", *((number(report.before[w]), "n") for w in worlds)]
    rows: list[list[Cell]] = [start]
    for entry in report.entries:
        cells: list[Cell] = []
        for world in worlds:
            score = number(entry.by_world[world].mean)
            if entry.collapsed[world]:
                score += f' <span class="worse">{entry.collapsed[world]} collapsed</span>'
            if entry.versus is None:
                cells.append((score, "n"))
            else:
                difference = entry.versus.by_world[world]
                shown = f"{signed(difference.mean)} {interval(difference)}"
                cells.append((f'{score}<span class="range">{escape(shown)}</span>', "n"))
        rows.append([_name(report, entry), *cells])
    note = (
        "Final score, and below it the difference to the first contender. A run has collapsed where it ended without "
        f"half of what it had gained at its best ({LEAST_GAIN:g} at least) over the initial policy."
    )
    return "<h2>World by world</h2>" + table(head, rows) + f'<p class="note">{note}</p>'


def _trials(report: Report) -> str:
    if not report.comparison.trials:
        return ""
    plan = report.comparison.plan
    head: list[Cell] = ["contender", "world", *((f"{rate:g}", "n") for rate in plan.tune)]
    rows: list[list[Cell]] = []
    for (label, world), tried in report.comparison.trials.items():
        chosen = report.comparison.rates[label, world]
        cells: list[Cell] = []
        for rate, scores in tried.items():
            mean = number(sum(scores) / len(scores))
            cells.append((f"<strong>{mean}</strong>" if rate == chosen else mean, "n"))
        rows.append([escape(label), escape(world), *cells])
    note = f"Mean final score over {plan.tune_seeds} seeds that the comparison does not use; the chosen rate is bold."
    note += f" {escape(edges(report))}"
    return "<h2>Choice of the learning rate</h2>" + table(head, rows) + f'<p class="note">{note}</p>'


def _parts(report: Report) -> str:
    slots = list(dict.fromkeys(slot for entry in report.entries for slot in entry.parts))
    base = report.baseline.parts
    rows: list[list[Cell]] = []
    for slot in slots:
        cells: list[Cell] = []
        for entry in report.entries:
            text = entry.parts.get(slot, "none")
            same = entry is not report.baseline and text == base.get(slot, "none")
            cells.append(("the same", "same") if same else (escape(text), "parts"))
        rows.append([slot, *cells])
    rates = {
        entry.contender.label: ", ".join(dict.fromkeys(f"{rate:g}" for rate in entry.rates.values()))
        for entry in report.entries
    }
    rows.append(["learning rate", *((rate, "parts") for rate in rates.values())])
    head: list[Cell] = ["slot", *(_name(report, entry) for entry in report.entries)]
    return "<h2>What differs</h2>" + table(head, rows)


def settings_table(values: Mapping[str, Any]) -> str:
    """Settings by name; those that are empty are left out."""
    rows: list[list[Cell]] = [
        [escape(name), (escape(_shown(value)), "parts")]
        for name, value in values.items()
        if value not in (None, [], {})
    ]
    return table(["setting", "value"], rows)


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)

"""Every method against one baseline, in the small and the exact world, as a page of the documentation."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from polopt.compare.plan import parse_contender
from polopt.compare.report import Entry, Report
from polopt.compare.words import amount, duration, interval, number, ranged, seeds, signed
from polopt.core.errors import UsageError
from polopt.methods import methods
from polopt.tasks.problems import problem
from polopt.training.build import check_needs

TASKS: Final = ("arithmetic", "countdown", "grid")
"""Tasks of the small world that the leaderboard averages."""
PROBLEMS: Final = ("binary-verifier", "sparse-rewards", "several-modes", "multi-step")
"""Problems of the exact world that it averages: the largest possible score of each is 1."""


def fitting() -> tuple[list[str], dict[str, str]]:
    """Contenders that learn from generated prompts and verified answers alone; why other methods do not, by slug.

    A method that learns from a data set makes its pairs from its own answers.
    """
    fit: list[str] = []
    others: dict[str, str] = {}
    made = problem(PROBLEMS[0])
    for slug, method in methods().items():
        try:
            contender = parse_contender(f"{slug}+pairs=on-policy" if method.offline else slug)
            composed = contender.method()
            if composed.reads_answers:
                raise UsageError(f"{slug} learns from known answers beside its own")
            if not composed.trains_policy:
                raise UsageError(f"{slug} trains no policy: its loss reads no log-probs")
            check_needs(composed, made.policy(), made.reward_functions())
        except UsageError as error:
            others[slug] = str(error)
        else:
            fit.append(contender.label)
    return fit, others


def ordered(small: Report | None, exact: Report | None) -> list[str]:
    """Labels by their difference to the baseline, the largest first; the small world decides where there is one."""
    leading = small or exact
    if leading is None:
        return []

    def place(entry: Entry) -> float:
        difference = 0.0 if entry.versus is None else entry.versus.difference.mean
        return -math.inf if math.isnan(difference) else difference

    return [entry.contender.label for entry in sorted(leading.entries, key=place, reverse=True)]


def make_page(
    small: Report | None,
    exact: Report | None,
    *,
    command: str,
    made: Mapping[str, Any],
    left_out: Mapping[str, str],
) -> str:
    """The page in Markdown: one table over both worlds, a table of each world, how it was made and what it cost."""
    reports = {"small world": small, "exact world": exact}
    present = {name: report for name, report in reports.items() if report is not None}
    base = next(iter(present.values())).baseline.contender.label
    labels = ordered(small, exact)
    parts = [
        "# Leaderboard",
        f"Every method that learns from generated prompts and verified answers, against `{base}`, under one budget. "
        "Runs of one seed are paired: the same initial policy, the same prompts in the same order, the same held-out "
        "prompts. A score is the held-out score when the budget was spent, averaged over tasks; a difference is the "
        "mean over seeds of the paired difference, in bold where its 95% interval excludes zero. The intervals are not "
        "corrected for the number of methods. Every method has the same learning rate, that of its world, and its own "
        "defaults otherwise: the table says what a method does as it comes, not what tuning could make of it. A method "
        "that learns from known answers samples them here (`pairs=on-policy`).",
        _overview(present, labels),
        *_assisted(labels),
        *(_details(name, report, labels) for name, report in present.items()),
        "## How it was made",
        f"```bash\n{command}\n```",
        _settings(present, made),
    ]
    if left_out:
        parts.append(
            "Not run, as they need more than prompts and a verifier: " + ", ".join(f"`{s}`" for s in left_out) + "."
        )
    return "\n\n".join(parts) + "\n"


def _assisted(labels: Sequence[str]) -> list[str]:
    """Who was helped: methods whose rollout has an environment, in training and on held-out prompts alike."""
    known = methods()
    helped = [s for s in labels if s in known and getattr(known[s].rollout, "environment", None) is not None]
    if not helped:
        return []
    names = ", ".join(f"`{slug}`" for slug in helped)
    return [
        f"Not a fair comparison: {names} answer with a tool (the calculator) in the small world, in training and on "
        "held-out prompts, and their scores there have its help. In the exact world nothing answers them."
    ]


def _by_label(report: Report) -> Mapping[str, Entry]:
    return {entry.contender.label: entry for entry in report.entries}


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join([" --- ", *([" ---: "] * (len(head) - 1))]) + "|"]
    # An interval is not broken over lines, nor its minus sign left behind.
    joined = (re.sub(r"\[.*?\]", lambda m: m[0].replace(", ", ",\u00a0"), " | ".join(row)) for row in rows)
    return "\n".join(lines + [f"| {row} |" for row in joined])


def _named(label: str) -> str:
    """Slug and settings, between which a line may end."""
    slug, plus, settings = label.partition("+")
    return f"`{slug}`" + (f" `+{settings}`" if plus else "")


def _difference(entry: Entry) -> str:
    if entry.versus is None:
        return "baseline"
    value = entry.versus.difference
    text = f"{signed(value.mean)} {interval(value)}".rstrip()
    return text if entry.versus.verdict == "unclear" else f"**{text}**"


def _overview(present: Mapping[str, Report], labels: Sequence[str]) -> str:
    head = ["method"]
    for name, report in present.items():
        head += [f"{name}: score", f"difference to {report.baseline.contender.label}", "P(better)"]
    rows = []
    for label in labels:
        row = [_named(label)]
        for report in present.values():
            entry = _by_label(report)[label]
            row += [ranged(entry.mean), _difference(entry), _improvement(entry)]
        rows.append(row)
    return _table(head, rows)


def _improvement(entry: Entry) -> str:
    return "" if entry.versus is None else f"{entry.versus.improvement.mean:.0%}"


def _details(name: str, report: Report, labels: Sequence[str]) -> str:
    worlds = [w.label for w in report.comparison.plan.worlds]
    head = ["method", *worlds, "area", "entropy", "length", "steps", "seconds per step"]
    start = ["initial policy", *(number(report.before[w]) for w in worlds), *[""] * 5]
    rows = [start]
    for label in labels:
        entry = _by_label(report)[label]
        rows.append(
            [
                _named(label),
                *(ranged(entry.by_world[w]) for w in worlds),
                number(entry.area.mean),
                number(entry.entropy),
                f"{entry.length:.1f}",
                f"{entry.spent['steps']:,.0f}",
                f"{entry.step_seconds:.2g}",
            ]
        )
    said = {
        "small world": "The policy shipped with polopt on generated tasks; scores are shares of right answers.",
        "exact world": "A tabular policy over all short sequences; scores are expected rewards, without noise.",
    }[name]
    explained = "Area is the mean height of the held-out curve; entropy (nats per token) and length are final ones."
    return f"## {name.capitalize()}\n\n{said} {explained}\n\n{_table(head, rows)}"


def _settings(present: Mapping[str, Report], made: Mapping[str, Any]) -> str:
    rows = []
    for name, report in present.items():
        plan = report.comparison.plan
        runs = sum(map(len, report.comparison.results.values()))
        rollouts = sum(r["points"][-1]["rollouts"] for results in report.comparison.results.values() for r in results)
        rate = ", ".join(dict.fromkeys(f"{r:g}" for r in report.comparison.rates.values()))
        rows.append(
            [
                name,
                amount(plan.limit, plan.unit),
                seeds(report),
                rate,
                f"{runs:,}",
                f"{rollouts:,.0f}",
                duration(report.machine_seconds),
            ]
        )
    table = _table(
        ["", "budget of a run", "seeds", "learning rate", "runs", "rollouts in all", "time of all runs"], rows
    )
    facts = ", ".join(f"{name} {value}" for name, value in made.items())
    return (
        f"{table}\n\nMade with: {facts}. Time is the sum over runs, each with what threads it had; "
        "it and the seconds per step depend on what else the machine was doing."
    )

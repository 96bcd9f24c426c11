"""How results are said: numbers, intervals, verdicts, titles."""

from __future__ import annotations

import math
from typing import Any

from polopt.compare.report import FEWEST, Entry, Report
from polopt.core.statistics import Interval


def number(value: float) -> str:
    """Three decimals; a dash for what is unknown."""
    return "-" if math.isnan(value) else f"{value:.3f}"


def signed(value: float) -> str:
    """Three decimals with a sign."""
    return "-" if math.isnan(value) else f"{value:+.3f}"


def interval(value: Interval) -> str:
    """``[0.701, 0.812]``; empty where the bounds are unknown."""
    return f"[{number(value.low)}, {number(value.high)}]" if math.isfinite(value.low) else ""


def ranged(value: Interval) -> str:
    """A mean with its interval."""
    return f"{number(value.mean)} {interval(value)}".rstrip()


def amount(value: float, unit: str) -> str:
    """``20,000 rollouts``."""
    return f"{value:,.0f} {unit}" if value == int(value) else f"{value:,g} {unit}"


def budget(report: Report) -> str:
    """The budget of a run."""
    return amount(report.comparison.plan.limit, report.comparison.plan.unit)


def seeds(report: Report) -> str:
    """How many seeds."""
    count = report.comparison.plan.seeds
    return f"{count} seed{'s' * (count != 1)}"


def title_of(report: Report) -> str:
    """Who was compared where."""
    labels = [entry.contender.label for entry in report.entries]
    who = ", ".join(labels) if len(labels) <= 4 else f"{len(labels)} methods"
    ages: dict[str, list[str]] = {}
    for world in report.comparison.plan.worlds:
        ages.setdefault(world.place, []).append(str(world.stale))
    where = ", ".join(
        place if stale == ["0"] else f"{place} {' / '.join(stale)} updates stale" for place, stale in ages.items()
    )
    return f"{who} on {where}: {budget(report)}, {seeds(report)}"


def headline(report: Report) -> str:
    """What was found, in a sentence or two."""
    base = report.baseline.contender.label
    others = [entry for entry in report.entries if entry.versus is not None]
    if not others:
        return f"{base} reaches {ranged(report.baseline.mean)}."
    if report.comparison.plan.seeds < FEWEST:
        return f"{seeds(report).capitalize()} cannot tell a difference from chance: use --seeds 5."
    said = []
    for verdict in ("better", "worse", "unclear"):
        group = [entry for entry in others if entry.versus is not None and entry.versus.verdict == verdict]
        if not group:
            continue
        shown = ", ".join(f"{e.contender.label} ({_difference(e)})" for e in group)
        verb = "is" if len(group) == 1 else "are"
        said.append(
            f"{shown} {verb} {verdict} than {base}."
            if verdict != "unclear"
            else f"No clear difference to {base}: {shown}."
        )
    return " ".join(said)


def _difference(entry: Entry) -> str:
    assert entry.versus is not None
    return f"{signed(entry.versus.difference.mean)} {interval(entry.versus.difference)}"


def verdict_text(entry: Entry) -> str:
    """One or two words about the difference."""
    if entry.versus is None:
        return ""
    return {"better": "better", "worse": "worse", "unclear": "no clear difference"}[entry.versus.verdict]


def target_text(report: Report) -> str:
    """What the curves are to reach."""
    target = report.baseline.to_target.target
    return f"{target:g}" if target is not None else f"final {report.baseline.contender.label}"


def rollouts_to_target(entry: Entry) -> str:
    """The median run's rollouts, or that it does not get there."""
    reached = entry.to_target
    return f"{reached.rollouts:,.0f}" if math.isfinite(reached.rollouts) else f"{reached.reached}/{reached.runs} runs"


def cost(report: Report) -> str:
    """What the comparison took."""
    c = report.comparison
    total = f"{c.ran} runs in {duration(c.seconds)}" if c.ran else "no new runs"
    return f"{total}, {c.reused} from the cache; all runs together took {duration(report.machine_seconds)}."


def edges(report: Report) -> str:
    """Which tuned learning rates are the smallest or largest tried, so that a better one may lie outside."""
    tune = report.comparison.plan.tune
    found = [label for (label, _), rate in report.comparison.rates.items() if tune and rate in (min(tune), max(tune))]
    if not found:
        return ""
    return (
        f"The chosen rate is the smallest or largest tried for {', '.join(dict.fromkeys(found))}: try others beyond it."
    )


def lines(label: str) -> str:
    """A contender's label with a line for each replaced setting."""
    return "\n+".join(label.split("+"))


def duration(seconds: float) -> str:
    """``42 s``, ``3 min 20 s``, ``1 h 5 min``."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def plain_settings(report: Report) -> dict[str, Any]:
    """The plan and the settings of its first run that are not the contender's."""
    plan = report.comparison.plan
    world = plan.worlds[0]
    job = plan.job(plan.contenders[0], world, plan.first_seed, plan.lr)
    # The labels of the worlds say how stale they are.
    hidden = {"method", "slots", "seed", "lr", "task", "stale", plan.unit}
    if world.exact:
        hidden |= {"model", "eval_prompts", "eval_samples", "max_rows", "precision", "device", "lora", "token_budget"}
    return {
        "budget": budget(report),
        "seeds": f"{plan.first_seed} to {plan.first_seed + plan.seeds - 1}",
        "evaluations": f"{plan.points} and one before",
        **{name: value for name, value in job.settings.items() if name not in hidden},
    }

"""What a comparison found, in numbers: final scores, differences, areas, rollouts to a target, costs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np

from polopt.compare.execute import Comparison, Result, final_score
from polopt.compare.plan import Contender, World
from polopt.compare.statistics import (
    area_under_curve,
    first_reaching,
    iqm_score,
    mean_score,
    paired_difference,
    probability_of_improvement,
    stratified_difference,
)
from polopt.core.method import Method
from polopt.core.part import describe
from polopt.core.statistics import Interval

Verdict = Literal["better", "worse", "unclear"]
CURVES: Final = ("score", "entropy", "length")
FEWEST: Final = 3
"""Seeds below which no difference is called: two differences of scores on few prompts may be equal by chance, which
leaves an interval without width.
"""
LEAST_GAIN: Final = 0.05
"""What a run must have gained to be able to lose it."""


@dataclass(frozen=True)
class Curve:
    """Mean over seeds of what was measured after ``x`` rollouts on average, and the bootstrap interval of each mean."""

    x: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class ToTarget:
    """Rollouts until the held-out curve reaches ``target``: the median over all runs, infinite where fewer than half
    reach it; ``reached`` of ``runs`` do.
    """

    target: float | None
    rollouts: float
    reached: int
    runs: int


@dataclass(frozen=True)
class Versus:
    """A contender against the first one: mean paired difference of final scores, and P(a run of it is better).

    ``by_world`` are the differences in each world. ``verdict`` is clear when the interval excludes zero and every world
    has at least `FEWEST` pairs.
    """

    difference: Interval
    by_world: Mapping[str, Interval]
    improvement: Interval

    @property
    def verdict(self) -> Verdict:
        """Which side of zero the whole interval of the difference lies on."""
        if min(interval.count for interval in self.by_world.values()) < FEWEST:
            return "unclear"
        if self.difference.low > 0:
            return "better"
        return "worse" if self.difference.high < 0 else "unclear"


@dataclass(frozen=True)
class Entry:
    """One contender over all worlds and seeds; averages count worlds equally.

    ``entropy`` (nats per token) and ``length`` (tokens) are held-out ones at the end, ``area`` is the mean height of
    the held-out curve over the budget, ``step_seconds`` the median of an iteration. ``spent`` are means per run.
    ``collapsed`` is the number of runs in each world that `has_collapsed`. ``versus`` is None for the first contender.
    """

    contender: Contender
    parts: Mapping[str, str]
    rates: Mapping[str, float]
    mean: Interval
    iqm: Interval
    area: Interval
    by_world: Mapping[str, Interval]
    collapsed: Mapping[str, int]
    to_target: ToTarget
    entropy: float
    length: float
    step_seconds: float
    spent: Mapping[str, float]
    rejected: int
    curves: Mapping[str, Mapping[str, Curve]]
    versus: Versus | None


@dataclass(frozen=True)
class Report:
    """A comparison, ready to be shown. ``before`` is the score of the initial policy, by world."""

    comparison: Comparison
    entries: tuple[Entry, ...]
    before: Mapping[str, float]
    level: float

    @property
    def baseline(self) -> Entry:
        """What the others are compared with."""
        return self.entries[0]

    @property
    def machine_seconds(self) -> float:
        """Seconds that all runs took, those from the cache included, each by itself."""
        return sum(float(r["seconds"]) for results in self.comparison.results.values() for r in results)


def make_report(comparison: Comparison, *, target: float | None = None, level: float = 0.95) -> Report:
    """The numbers of a comparison.

    Without a ``target`` it is, in each world, the mean final score of the first contender: how soon do the others get
    there?
    """
    plan = comparison.plan
    first = plan.contenders[0]
    worlds = plan.worlds
    targets = {
        w.label: target
        if target is not None
        else statistics.fmean(map(final_score, comparison.results[first.label, w.label]))
        for w in worlds
    }
    base = _finals(comparison, first)
    entries = []
    for contender in plan.contenders:
        scores = _finals(comparison, contender)
        versus = None
        if contender is not first:
            versus = Versus(
                stratified_difference(scores, base, level),
                {w.label: paired_difference(x, y, level) for w, x, y in zip(worlds, scores, base, strict=True)},
                probability_of_improvement(scores, base, level),
            )
        entries.append(_entry(comparison, contender, scores, targets, target, versus, level))
    before = {
        w.label: statistics.fmean(float(r["points"][0]["score"]) for r in comparison.results[first.label, w.label])
        for w in worlds
    }
    return Report(comparison, tuple(entries), before, level)


def _finals(comparison: Comparison, contender: Contender) -> list[list[float]]:
    return [[final_score(r) for r in comparison.results[contender.label, w.label]] for w in comparison.plan.worlds]


def _entry(
    comparison: Comparison,
    contender: Contender,
    scores: Sequence[Sequence[float]],
    targets: Mapping[str, float],
    target: float | None,
    versus: Versus | None,
    level: float,
) -> Entry:
    plan = comparison.plan
    by_world = {w.label: comparison.results[contender.label, w.label] for w in plan.worlds}
    runs = [(label, result) for label, results in by_world.items() for result in results]
    reached = [first_reaching(*_points(r, "rollouts", "score"), targets[label]) for label, r in runs]
    areas = [[_area(r, plan.unit, plan.limit) for r in results] for results in by_world.values()]
    return Entry(
        contender=contender,
        parts=parts_of(contender.method()),
        rates={w.label: comparison.rates[contender.label, w.label] for w in plan.worlds},
        mean=mean_score(scores, level),
        iqm=iqm_score(scores, level),
        area=mean_score(areas, level),
        by_world={w.label: mean_score([x], level) for w, x in zip(plan.worlds, scores, strict=True)},
        collapsed={label: sum(map(has_collapsed, results)) for label, results in by_world.items()},
        to_target=ToTarget(target, statistics.median(reached), sum(map(math.isfinite, reached)), len(reached)),
        entropy=_average(by_world, "entropy"),
        length=_average(by_world, "length"),
        step_seconds=statistics.median([s for _, r in runs for s in r["training"]["step_time"]] or [math.nan]),
        spent={name: _average(by_world, name) for name in ("steps", "rollouts", "tokens", "seconds")},
        rejected=sum(int(r["rejected"]) for _, r in runs),
        curves={label: {name: curve(results, name, level) for name in CURVES} for label, results in by_world.items()},
        versus=versus,
    )


def parts_of(method: Method) -> dict[str, str]:
    """The parts of a method by slot, in words."""
    return {
        str(slot): ", ".join(f"{name}: {describe(p)}" for name, p in value.items())
        if isinstance(value, Mapping)
        else describe(value)
        for slot, value in method.slots().items()
    }


def has_collapsed(result: Result) -> bool:
    """Whether a run ended without half of what it had gained at its best, `LEAST_GAIN` at least, over its start."""
    first, *scores = (float(point["score"]) for point in result["points"])
    gain = max(scores, default=first) - first
    return gain >= LEAST_GAIN and scores[-1] - first < gain / 2


def curve(results: Sequence[Result], name: str, level: float) -> Curve:
    """Mean over seeds at equal shares of the budget, against the mean number of rollouts there; each run's line is
    straight between its points.
    """
    grid = np.linspace(0.0, 1.0, max(len(result["points"]) for result in results))
    x = [np.interp(grid, *_points(result, "fraction", "rollouts")) for result in results]
    table = np.array([np.interp(grid, *_points(result, "fraction", name)) for result in results])
    means = [mean_score([column.tolist()], level) for column in table.T]
    return Curve(
        tuple(np.mean(x, axis=0).tolist()),
        tuple(m.mean for m in means),
        tuple(m.low for m in means),
        tuple(m.high for m in means),
    )


def _points(result: Result, x: str, y: str) -> tuple[list[float], list[float]]:
    return [float(p[x]) for p in result["points"]], [float(p[y]) for p in result["points"]]


def _area(result: Result, unit: str, limit: float) -> float:
    """Area up to the budget; the last iteration may have gone beyond it."""
    x, y = _points(result, unit, "score")
    inside = [min(value, limit) for value in x]
    return area_under_curve(inside, list(np.interp(inside, x, y)))


def _average(by_world: Mapping[str, Sequence[Result]], name: str) -> float:
    return statistics.fmean(
        statistics.fmean(float(r["points"][-1][name]) for r in results) for results in by_world.values()
    )


def world_of(report: Report, label: str) -> World:
    """The world with a label."""
    return next(w for w in report.comparison.plan.worlds if w.label == label)


def as_dict(report: Report, *, command: str = "", made: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Everything as plain data: the summary of each contender, and what was measured in every run."""
    from polopt.compare.plan import plain

    comparison = report.comparison
    plan = comparison.plan
    return {
        "command": command,
        "made": dict(made or {}),
        "plan": plain(plan),
        "level": report.level,
        "before": dict(report.before),
        "contenders": [
            {**plain(entry), "verdict": entry.versus.verdict if entry.versus else None} for entry in report.entries
        ],
        "trials": [
            {"contender": contender, "world": world, "lr": rate, "scores": list(scores)}
            for (contender, world), tried in comparison.trials.items()
            for rate, scores in tried.items()
        ],
        "runs": [
            {"contender": contender, "world": world, "seed": plan.first_seed + index, **result}
            for (contender, world), results in comparison.results.items()
            for index, result in enumerate(results)
        ],
        "cost": {
            "runs": comparison.ran,
            "reused": comparison.reused,
            "seconds": comparison.seconds,
            "run_seconds": report.machine_seconds,
        },
    }

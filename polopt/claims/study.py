"""A study: the comparison that a paper is about, its statements (the claims of its file) and its pictures.

Claims and pictures read the same measurements: a file with ``CLAIMS`` that also has a ``STUDY`` says there which of the
measured numbers are drawn, and `carry_out` measures every seed once for both.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from polopt.claims.claim import (
    LEVEL,
    QUICK_SEEDS,
    SEEDS,
    Claim,
    Measure,
    Measured,
    Outcome,
    World,
    check_seeds,
    judge,
    measured,
)
from polopt.compare.panels import Differences, Lines, Panel
from polopt.compare.report import Curve
from polopt.compare.statistics import mean_score, paired_difference

BLOCK: Final = SEEDS["exact"]
"""Seeds that `at_once` trains together."""


@dataclass(frozen=True)
class Curves:
    """A panel of lines: for each label the places x and the names of what was measured there."""

    title: str
    x: str
    y: str
    measure: Measure
    lines: Mapping[str, Sequence[tuple[float, str]]]
    logarithmic: bool = False
    world: World = "exact"


@dataclass(frozen=True)
class Effects:
    """A panel of paired differences: for each label a measured treatment and its control.

    Without a control the treatment is a difference already. These are open comparisons: nothing is claimed of them.
    """

    title: str
    unit: str
    measure: Measure
    rows: Mapping[str, tuple[str, str | None]]
    world: World = "exact"


@dataclass(frozen=True)
class Study:
    """What is asked, in a sentence, and the panels of the figure in their order."""

    title: str
    question: str
    panels: tuple[Curves | Effects, ...]


@dataclass(frozen=True)
class Found:
    """A study that was carried out: verdicts of its claims, panels with intervals, and the measurements behind them.

    ``rows`` has one entry per seed for each measure, by the measure's name.
    """

    slug: str
    study: Study
    outcomes: tuple[Outcome, ...]
    panels: tuple[Panel, ...]
    rows: Mapping[str, Sequence[Mapping[str, float]]]
    seconds: float


def carry_out(
    slug: str,
    study: Study,
    claims: Sequence[Claim],
    *,
    seeds: int | None = None,
    quick: bool = False,
    tell: Callable[[str], None] = lambda text: None,
) -> Found:
    """Measure each seed once, judge the claims, compute the panels.

    Seeds are those of a claim where left out; ``quick`` takes 2 of tiny budgets. Raises UsageError for fewer seeds than
    a verdict needs.
    """
    check_seeds(claims, seeds, quick)
    worlds: dict[Measure, World] = {claim.measure: claim.world for claim in claims if claim.measure is not None}
    worlds |= {panel.measure: panel.world for panel in study.panels}
    known: dict[Measure, Measured] = {}
    for measure, world in worlds.items():
        count = seeds or (QUICK_SEEDS if quick else SEEDS[world])
        name = getattr(measure, "__name__", "measure")
        known[measure] = measured(measure, count, quick=quick, tell=tell, what=f"{slug}: {name.replace('_', ' ')}")
    outcomes = tuple(
        Outcome(claim, "not testable here")
        if claim.measure is None
        else judge(claim, known[claim.measure].rows, known[claim.measure].seconds)
        for claim in claims
    )
    return Found(
        slug,
        study,
        outcomes,
        tuple(_panel(panel, known[panel.measure].rows) for panel in study.panels),
        {getattr(measure, "__name__", "measure"): found.rows for measure, found in known.items()},
        math.fsum(found.seconds for found in known.values()),
    )


def _panel(panel: Curves | Effects, rows: Sequence[Mapping[str, float]]) -> Panel:
    if isinstance(panel, Curves):
        lines = {label: _curve(points, rows) for label, points in panel.lines.items()}
        return Lines(panel.title, panel.x, panel.y, lines, panel.logarithmic)
    found = {}
    for label, (treatment, control) in panel.rows.items():
        ours, theirs = ([0.0 if name is None else row[name] for row in rows] for name in (treatment, control))
        found[label] = paired_difference(ours, theirs, LEVEL)
    return Differences(panel.title, panel.unit, found)


def _curve(points: Sequence[tuple[float, str]], rows: Sequence[Mapping[str, float]]) -> Curve:
    means = [mean_score([[row[name] for row in rows]], LEVEL) for _, name in points]
    return Curve(
        tuple(x for x, _ in points),
        tuple(m.mean for m in means),
        tuple(m.low for m in means),
        tuple(m.high for m in means),
    )


def at_once(runs: Callable[[Sequence[int], bool], Sequence[Mapping[str, float]]]) -> Measure:
    """A measure from a function that measures several seeds together, one row each.

    For runs whose seeds are independent problems of one exact policy: their parameters, samples and gradients do not
    meet, so that training them together costs little more than one of them. `BLOCK` seeds are trained at a time; which
    draws a seed gets depends on its place in its block alone.
    """

    @functools.cache
    def block(number: int, quick: bool) -> Sequence[Mapping[str, float]]:
        size = QUICK_SEEDS if quick else BLOCK
        return runs(range(number * size, (number + 1) * size), quick)

    @functools.wraps(runs)
    def measure(seed: int, quick: bool) -> Mapping[str, float]:
        size = QUICK_SEEDS if quick else BLOCK
        return dict(block(seed // size, quick)[seed % size])

    return measure

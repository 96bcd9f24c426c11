"""A comparison as one picture."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from polopt.compare.execute import final_score
from polopt.compare.report import Curve, Entry, Report
from polopt.compare.statistics import mean_score

COLOURS: Final = (
    *("#1f6fb4", "#d9741a", "#2e8b57", "#9b4f96", "#c43d4b", "#7a6a58", "#17a2a2", "#c2a000", "#5b6ee1", "#8a8f98"),
    *("#e58fb1", "#5d8c1d", "#12355b", "#b5651d", "#7fc4e8", "#4d1f4a"),
)
INK, _GRID, _GREY = "#444444", "#e6e8eb", "#8a8f98"
_UNITS: Final = 6
"""Columns of the grid; panels are 2, 3 or 4 of them wide."""


def colour_of(report: Report) -> dict[str, str]:
    """A colour for each contender, by label."""
    return {e.contender.label: COLOURS[i % len(COLOURS)] for i, e in enumerate(report.entries)}


def plot_report(report: Report, title: str, path: Path) -> None:
    """Held-out curves with the interval of their mean in each world, paired differences with theirs, the final score of
    every seed, in a single world entropy and length, and over several stalenesses the final score against them, as a
    PNG.
    """
    # Figure without pyplot: no global state, no window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    worlds = [w.label for w in report.comparison.plan.worlds]
    single = len(worlds) == 1
    columns = 2 if len(worlds) in (2, 4) else 3
    score_rows = math.ceil(len(worlds) / columns)
    places = _places(report)
    stale_columns = min(len(places), 3)
    stale_rows = math.ceil(len(places) / 3)
    rows = stale_rows + score_rows + 1
    # Room for what is written: a name at the end of each line, a row for each difference.
    differences = (len(report.entries) - 1) * (len(worlds) + 1.6 if len(worlds) > 1 else 1)
    heights = [
        *[max(4.1, 0.35 + 0.31 * len(report.entries))] * stale_rows,
        *[4.1] * score_rows,
        max(4.1, 0.19 * differences),
    ]
    figure = Figure(figsize=(13.5, sum(heights) + 0.9), dpi=120, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.12)  # type: ignore[union-attr, call-arg]
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(rows, _UNITS, height_ratios=heights)
    colour = colour_of(report)

    def panel(row: int, start: int, width: int) -> Any:
        return figure.add_subplot(grid[stale_rows + row, start : start + width])

    for index, place in enumerate(places):
        width = _UNITS // stale_columns
        start = index % 3 * width
        _staleness(figure.add_subplot(grid[index // 3, start : start + width]), report, place, colour)
    if single:
        _curves(panel(0, 0, 4), report, worlds[0], "score", "Held-out score", colour)
        _differences(panel(0, 4, 2), report, colour)
        _curves(panel(1, 0, 2), report, worlds[0], "entropy", "Entropy, nats per token", colour)
        _curves(panel(1, 2, 2), report, worlds[0], "length", "Length, tokens", colour)
        _seeds(panel(1, 4, 2), report, colour)
    else:
        width = _UNITS // columns
        for index, label in enumerate(worlds):
            axis = panel(index // columns, index % columns * width, width)
            _curves(axis, report, label, "score", f"Held-out score: {label}", colour)
        _differences(panel(score_rows, 0, 4), report, colour)
        _seeds(panel(score_rows, 4, 2), report, colour)
    from matplotlib.lines import Line2D

    figure.legend(
        [Line2D([], [], color=shade, linewidth=3) for shade in colour.values()],
        list(colour),
        loc="outside lower center",
        ncols=min(len(colour), 5),
        fontsize=10,
        frameon=False,
        columnspacing=2,
    )
    figure.suptitle(title, x=0.012, ha="left", fontsize=12, color=INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def dress(axis: Any, title: str) -> None:
    """A panel's title, grid and frame."""
    axis.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axis.grid(True, color=_GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=9, colors=INK)


def _curves(axis: Any, report: Report, world: str, name: str, title: str, colour: dict[str, str]) -> None:
    dress(axis, title)
    for index, entry in enumerate(report.entries):
        line: Curve = entry.curves[world][name]
        shade = colour[entry.contender.label]
        # Widths that shrink: curves that coincide stay visible below each other.
        width = 1.5 + 3.0 * (1 - (index + 1) / len(report.entries))
        axis.plot(line.x, line.mean, color=shade, linewidth=width, marker="o", markersize=2 + width)
        axis.fill_between(line.x, line.low, line.high, color=shade, alpha=0.13, linewidth=0)
    target = report.baseline.to_target.target
    if name == "score" and target is not None:
        axis.axhline(target, color=_GREY, linewidth=1, linestyle=(0, (4, 3)))
        axis.annotate(
            "target", (0.995, target), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8
        )
    axis.set_xlim(left=0)
    axis.set_xlabel("rollouts", fontsize=9, color=INK)


def _places(report: Report) -> list[str]:
    """Worlds that were run at several stalenesses, by the label they share."""
    places = [world.place for world in report.comparison.plan.worlds]
    return [place for place in dict.fromkeys(places) if places.count(place) > 1]


def _staleness(axis: Any, report: Report, place: str, colour: dict[str, str]) -> None:
    """Final score against the staleness, one position for each number of updates; where at least half of the runs
    collapsed, a cross.
    """
    worlds = sorted((w for w in report.comparison.plan.worlds if w.place == place), key=lambda w: w.stale)
    dress(axis, f"Final score against staleness: {place}")
    before = sum(report.before[world.label] for world in worlds) / len(worlds)
    axis.axhline(before, color=_GREY, linewidth=1, linestyle=(0, (4, 3)))
    axis.annotate("before training", (0, before), (0, 3), textcoords="offset points", fontsize=8, color=INK)
    for entry in report.entries:
        shade = colour[entry.contender.label]
        values = [entry.by_world[world.label] for world in worlds]
        axis.plot(range(len(worlds)), [v.mean for v in values], color=shade, linewidth=2, marker="o", markersize=4)
        axis.fill_between(
            range(len(worlds)), [v.low for v in values], [v.high for v in values], color=shade, alpha=0.13, linewidth=0
        )
        lost = [i for i, w in enumerate(worlds) if 2 * entry.collapsed[w.label] >= report.comparison.plan.seeds]
        axis.plot(lost, [values[i].mean for i in lost], "X", color=shade, markersize=12, markeredgecolor="white")
    axis.set_xticks(range(len(worlds)), [str(world.stale) for world in worlds])
    axis.set_xlabel(
        "updates between sampling and learning; a cross: half of the runs or more lost most of what they had gained",
        fontsize=9,
        color=INK,
    )
    last = worlds[-1].label
    axis.set_xlim(-0.12, len(worlds) - 1 + 0.13 * len(worlds))
    low, high = axis.get_ylim()
    ends = [(entry.by_world[last].mean - low) / (high - low) for entry in report.entries]
    for entry, end, height in zip(report.entries, ends, apart(ends, 0.92 / max(len(ends), 12)), strict=True):
        shade = colour[entry.contender.label]
        axis.annotate(
            _short(entry.contender.label, 22),
            (len(worlds) - 1, low + end * (high - low)),
            (len(worlds) - 1 + 0.02 * len(worlds), low + height * (high - low)),
            color=shade,
            fontsize=9,
            fontweight="bold",
            va="center",
            arrowprops={"arrowstyle": "-", "color": shade, "linewidth": 0.7, "shrinkB": 3, "relpos": (0, 0.5)},
        )


def apart(places: Sequence[float], gap: float) -> list[float]:
    """The nearest places (in squares) that lie ``gap`` apart in the same order, within [0, 1] if they fit."""
    optimize: Any = importlib.import_module("scipy.optimize")
    order = np.argsort(places, kind="stable")
    steps = gap * np.arange(len(places))
    # Distances of at least the gap are no distances below 0 once the gaps are taken away.
    nearest = optimize.isotonic_regression(np.asarray(places)[order] - steps).x
    found = np.empty(len(places))
    found[order] = np.clip(nearest, 0.0, max(0.0, 1 - steps[-1])) + steps
    return found.tolist()


def _differences(axis: Any, report: Report, colour: dict[str, str]) -> None:
    """Paired differences from the first contender, the overall one large and those of several worlds small below it."""
    baseline = report.baseline.contender.label
    dress(axis, f"Final score minus that of {_short(baseline)}")
    others = [entry for entry in report.entries if entry.versus is not None]
    if not others:
        axis.text(0.5, 0.5, "one contender: nothing to compare with", ha="center", transform=axis.transAxes, color=INK)
        axis.set_xticks([])
        axis.set_yticks([])
        return
    axis.axvline(0, color=INK, linewidth=1)
    several = len(report.comparison.plan.worlds) > 1
    height = 0.0
    for entry in others:
        assert entry.versus is not None
        shade = colour[entry.contender.label]
        rows = [(entry.versus.difference, _short(entry.contender.label), 7.0, 2.2)]
        if several:
            rows += [(d, _short(world), 4.0, 1.2) for world, d in entry.versus.by_world.items()]
        for interval, name, size, width in rows:
            axis.plot(interval.mean, height, "o", color=shade, markersize=size)
            if math.isfinite(interval.low):
                axis.plot((interval.low, interval.high), (height, height), color=shade, linewidth=width)
            # In the panel: names beside it would take its width.
            bold = "bold" if size > 5 else "normal"
            # Beside the intervals of several worlds, above the one of a single world.
            raised = height if several else height + 0.22
            axis.text(0.012, raised, name, transform=axis.get_yaxis_transform(), fontsize=8.5, va="center", weight=bold)
            height -= 1.0
        height -= 0.6 if several else 0.0
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
    axis.margins(x=0.04, y=min(0.1, -1.0 / height))
    if several:
        left, right = axis.get_xlim()
        axis.set_xlim(left - 0.42 * (right - left), right)
    else:
        axis.set_ylim(height + 0.5, 0.6)
    axis.set_xlabel(f"paired by seed, {report.level:.0%} interval", fontsize=9, color=INK)


def _seeds(axis: Any, report: Report, colour: dict[str, str]) -> None:
    """The final score of every seed, averaged over worlds; a line joins the runs of one seed."""
    dress(axis, "Final score of every seed")
    table = [_by_seed(report, entry) for entry in report.entries]
    for column in zip(*table, strict=True):
        axis.plot(range(len(column)), column, color="#c9cdd2", linewidth=0.9, zorder=1)
    for place, (entry, values) in enumerate(zip(report.entries, table, strict=True)):
        shade = colour[entry.contender.label]
        axis.scatter([place] * len(values), values, color=shade, s=26, zorder=2, edgecolor="white", linewidth=0.5)
        mean = mean_score([values]).mean
        axis.plot((place - 0.28, place + 0.28), (mean, mean), color=shade, linewidth=2.4, zorder=3)
    axis.set_xticks(range(len(table)), [""] * len(table))
    axis.tick_params(axis="x", length=0)
    axis.set_xlim(-0.6, len(table) - 0.4)
    axis.grid(False, axis="x")
    axis.set_xlabel("lines join runs of one seed, bars are means", fontsize=9, color=INK)


def _by_seed(report: Report, entry: Entry) -> Sequence[float]:
    comparison = report.comparison
    columns = [
        [final_score(r) for r in comparison.results[entry.contender.label, w.label]] for w in comparison.plan.worlds
    ]
    return [sum(seed) / len(seed) for seed in zip(*columns, strict=True)]


def _short(label: str, limit: int = 30) -> str:
    return label if len(label) <= limit else label[: limit - 1] + "…"

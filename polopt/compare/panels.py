"""Pictures of any measurements: lines with the interval of their mean, and paired differences, panel by panel."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from polopt.compare.figure import COLOURS, INK, dress
from polopt.compare.report import Curve
from polopt.core.statistics import Interval

_COLUMNS: Final = 2
_LETTERS: Final = 88
"""Letters of a legend's line that are as wide as a panel."""
_STYLES: Final = ("-", (0, (5, 2)), (0, (1, 1.2)))
"""Of lines once the colours are used up."""


@dataclass(frozen=True)
class Lines:
    """Curves by label, against ``x`` and with the quantity ``y``."""

    title: str
    x: str
    y: str
    curves: Mapping[str, Curve]
    logarithmic: bool = False


@dataclass(frozen=True)
class Differences:
    """Mean paired differences by label, in a ``unit``."""

    title: str
    unit: str
    rows: Mapping[str, Interval]


Panel = Lines | Differences


def plot_panels(panels: Sequence[Panel], title: str, path: Path) -> None:
    """The panels in two columns, as a PNG; one label has one colour in all of them."""
    # Figure without pyplot: no global state, no window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [panels[i : i + _COLUMNS] for i in range(0, len(panels), _COLUMNS)]
    heights = [max(map(_height, row)) for row in rows]
    figure = Figure(figsize=(13.5, sum(heights) + 0.6), dpi=120, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)  # type: ignore[union-attr, call-arg]
    FigureCanvasAgg(figure)
    # Rows have margins of their own: the labels of differences are wide.
    parts = figure.subfigures(len(rows), 1, height_ratios=heights, squeeze=False)[:, 0]
    labels = dict.fromkeys(label for panel in panels if isinstance(panel, Lines) for label in panel.curves)
    styles = {
        label: (COLOURS[i % len(COLOURS)], _STYLES[i // len(COLOURS) % len(_STYLES)]) for i, label in enumerate(labels)
    }
    for part, members in zip(parts, rows, strict=True):
        for axis, panel in zip(part.subplots(1, len(members), squeeze=False)[0], members, strict=True):
            if isinstance(panel, Lines):
                _lines(axis, panel, styles)
            else:
                _differences(axis, panel)
    figure.suptitle(title, x=0.012, ha="left", fontsize=12, color=INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _height(panel: Panel) -> float:
    """Inches."""
    if isinstance(panel, Lines):
        return 4.2 + 0.19 * math.ceil(len(panel.curves) / _columns(panel))
    return 1.3 + 0.3 * max(len(panel.rows), 4)


def _columns(panel: Lines) -> int:
    """Columns of the legend: as many as fit below a panel, up to 3."""
    longest = max(map(len, panel.curves))
    return max(1, min(3, len(panel.curves), _LETTERS // (longest + 8)))


def _lines(axis: Any, panel: Lines, styles: Mapping[str, tuple[str, Any]]) -> None:
    dress(axis, panel.title)
    for label, curve in panel.curves.items():
        shade, dash = styles[label]
        marker = "o" if len(curve.x) <= 12 else ""
        axis.plot(curve.x, curve.mean, color=shade, linestyle=dash, linewidth=1.8, marker=marker, ms=4, label=label)
        if math.isfinite(curve.low[0]):
            axis.fill_between(curve.x, curve.low, curve.high, color=shade, alpha=0.13, linewidth=0)
    if panel.logarithmic:
        axis.set_xscale("log")
        places = sorted({x for curve in panel.curves.values() for x in curve.x})
        if len(places) <= 12:
            axis.set_xticks(places, [f"{x:g}" for x in places])
            axis.minorticks_off()
    axis.set_xlabel(panel.x, fontsize=9, color=INK)
    axis.set_ylabel(panel.y, fontsize=9, color=INK)
    # Below the panel: lines fill what is inside.
    axis.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.13),
        ncols=_columns(panel),
        fontsize=8.5,
        frameon=False,
        handlelength=2.6,
    )


def _differences(axis: Any, panel: Differences) -> None:
    dress(axis, panel.title)
    axis.axvline(0, color=INK, linewidth=1)
    for place, interval in enumerate(panel.rows.values()):
        # Clear where the whole interval is on one side of zero.
        clear = math.isfinite(interval.low) and (interval.low > 0 or interval.high < 0)
        shade = (COLOURS[0] if interval.mean > 0 else COLOURS[4]) if clear else COLOURS[9]
        axis.plot(interval.mean, -place, "o", color=shade, markersize=6)
        if math.isfinite(interval.low):
            axis.plot((interval.low, interval.high), (-place, -place), color=shade, linewidth=2)
    axis.set_yticks([-place for place in range(len(panel.rows))], list(panel.rows), fontsize=9)
    axis.set_ylim(0.6 - len(panel.rows), 0.4)
    axis.grid(False, axis="y")
    axis.margins(x=0.06)
    axis.locator_params(axis="x", nbins=5)
    axis.set_xlabel(f"{panel.unit}, paired by seed", fontsize=9, color=INK)

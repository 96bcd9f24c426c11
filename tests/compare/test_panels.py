"""Panels of curves and of differences, as a picture."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.image import imread

from polopt.compare.figure import COLOURS
from polopt.compare.panels import Differences, Lines, Panel, plot_panels
from polopt.compare.report import Curve
from polopt.core.statistics import Interval


def curve(level: float, points: int = 5) -> Curve:
    x = tuple(float(i + 1) for i in range(points))
    mean = tuple(level + 0.1 * i for i in range(points))
    return Curve(x, mean, tuple(m - 0.05 for m in mean), tuple(m + 0.05 for m in mean))


def drawn(panels: list[Panel], path: Path) -> tuple[int, int]:
    plot_panels(panels, "A title", path)
    height, width = imread(path).shape[:2]
    return height, width


def test_more_panels_make_a_taller_picture(tmp_path: Path) -> None:
    lines = Lines("Lines", "queries", "reward", {"ours": curve(0.0), "theirs": curve(0.3)}, logarithmic=True)
    rows = {"better": Interval(0.2, 0.1, 0.3, 12), "worse": Interval(-0.2, -0.3, -0.1, 12)}
    differences = Differences("Differences", "reward", {**rows, "unclear": Interval(0.0, -0.1, 0.1, 12)})
    one, two = drawn([lines, differences], tmp_path / "one.png"), drawn([lines] * 4, tmp_path / "two.png")
    assert one[1] == two[1] and two[0] > 1.6 * one[0]


def test_a_line_of_one_seed_and_many_labels(tmp_path: Path) -> None:
    """Unknown bounds draw no band; more labels than colours get other dashes."""
    unknown = Curve((1.0, 2.0), (0.5, 0.6), (math.nan,) * 2, (math.nan,) * 2)
    many = {f"line {i}": curve(i / 10, 20) for i in range(len(COLOURS) + 3)}
    panels: list[Panel] = [
        Lines("One seed", "x", "y", {"alone": unknown, **many}),
        Differences("One", "y", {"single": Interval(0.1, math.nan, math.nan, 1)}),
        Lines("Alone in its row", "x", "y", {"alone": unknown}),
    ]
    assert min(drawn(panels, tmp_path / "deep" / "er.png")) > 500

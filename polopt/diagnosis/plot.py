"""The diagnosis as one picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from polopt.diagnosis.diagnose import Diagnosis

_COLOURS: Final = ("#1f6fb4", "#d9741a", "#2e8b57", "#9b4f96", "#c43d4b", "#7a6a58", "#17a2a2", "#8a8f98")
_INK, _GRID, _GREY = "#444444", "#e6e8eb", "#8a8f98"


def plot_diagnosis(found: Mapping[str, Diagnosis], title: str, path: Path) -> None:
    """Four panels as a PNG: bias and noise, weight of a prompt against its pass rate, what all-right and all-wrong
    groups teach, and reward and entropy on the way to the fixed point. ``found`` is by label.
    """
    # Figure without pyplot: no global state, no window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8.6), dpi=120, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)  # type: ignore[union-attr, call-arg]
    FigureCanvasAgg(figure)
    grid: Any = figure.add_gridspec(2, 2)
    bars, weights, signal, path_axes = grid
    colour = {label: _COLOURS[i % len(_COLOURS)] for i, label in enumerate(found)}
    _bias_and_noise(figure, bars, found, colour)
    _weights(_axis(figure, weights, "Weight of a prompt by its pass rate"), found, colour)
    _signal(figure, signal, found, colour)
    _paths(figure, path_axes, found, colour)
    handles, labels = _legend(colour)
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(len(found), 6),
        fontsize=10,
        frameon=False,
        columnspacing=2,
    )
    figure.suptitle(title, x=0.012, ha="left", fontsize=12, color=_INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _legend(colour: Mapping[str, str]) -> tuple[list[Any], list[str]]:
    from matplotlib.patches import Patch

    return [Patch(color=shade) for shade in colour.values()], list(colour)


def _axis(figure: Any, where: Any, title: str) -> Any:
    axis = figure.add_subplot(where)
    axis.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axis.grid(True, color=_GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=9, colors=_INK)
    return axis


def _bars(
    axis: Any, values: list[float], colour: Mapping[str, str], unit: str, errors: list[float] | None = None
) -> None:
    """Horizontal bars with their values beside them, the first method on top."""
    place = np.arange(len(values))[::-1]
    drawn = [0.0 if math.isnan(value) else value for value in values]
    axis.barh(place, drawn, color=list(colour.values()), height=0.62)
    for y, value, error in zip(place, drawn, errors or [], strict=False):
        if error:
            axis.errorbar(value, y, xerr=error, fmt="none", ecolor=_INK, elinewidth=1, capsize=2)
    reach = max([*(d + e for d, e in zip(drawn, errors or [0.0] * len(drawn), strict=True)), 1e-12])
    for y, value, shown, error in zip(place, values, drawn, errors or [0.0] * len(values), strict=True):
        axis.text(shown + error + 0.02 * reach, y, _number(value) + unit, va="center", fontsize=9, color=_INK)
    axis.set_xlim(0, 1.28 * reach)
    axis.set_yticks([])
    axis.grid(False, axis="y")
    axis.spines["left"].set_color(_GREY)


def _number(value: float) -> str:
    if math.isnan(value):
        return "none"
    if abs(value) < 5e-4:
        return "0"
    return f"{value:.3g}"


def _width(index: int, count: int) -> float:
    """Lines grow thinner: those that coincide stay visible below each other."""
    return 1.7 + 4.0 * (count - 1 - index) / max(count - 1, 1)


def _bias_and_noise(figure: Any, where: Any, found: Mapping[str, Diagnosis], colour: Mapping[str, str]) -> None:
    left, right = where.subgridspec(1, 2, wspace=0.12)
    angle = _axis(figure, left, "Bias")
    _bars(angle, [d.bias.angle for d in found.values()], colour, "°", [d.bias.angle_floor for d in found.values()])
    angle.set_xlabel("angle to the gradient of expected reward", fontsize=9)
    noise = _axis(figure, right, "Noise")
    _bars(noise, [d.noise for d in found.values()], colour, "")
    noise.set_xlabel("trajectories until signal = noise", fontsize=9)


def _weights(axis: Any, found: Mapping[str, Diagnosis], colour: Mapping[str, str]) -> None:
    rates = np.linspace(0.02, 0.98, 200)
    axis.plot(rates, 0.5 / np.sqrt(rates * (1 - rates)), color=_GREY, linewidth=1.2, linestyle=(0, (2, 2)))
    top = 0.0
    for index, (label, d) in enumerate(found.items()):
        if d.curve is None or not any(d.curve.weight) or not np.isfinite(d.curve.relative).all():
            continue
        relative, weight = np.array(d.curve.relative), np.array(d.curve.weight)
        scale = float(relative @ weight / (weight @ weight))
        width = _width(index, len(found))
        axis.plot(d.curve.rates, relative, color=colour[label], linewidth=width, marker="o", markersize=3 + width / 2)
        if any(d.curve.error):
            wide = 2 * abs(scale) * np.array(d.curve.error)
            axis.fill_between(d.curve.rates, relative - wide, relative + wide, color=colour[label], alpha=0.15, lw=0)
        top = max(top, float(np.abs(relative).max()))
    axis.set_ylim(0, min(max(1.25 * top, 2.0), 8.0))
    axis.set_xlim(0, 1)
    shown = 0.8 * min(axis.get_ylim()[1], 3.4)
    at = (1 - math.sqrt(1 - 1 / shown**2)) / 2  # where the dotted curve is as high
    axis.annotate(
        "group z-score of a large group\n" r"$1/\sqrt{p(1-p)}$",
        (at, shown),
        (at + 0.1, shown),
        va="center",
        fontsize=9,
        color="#666a70",
        arrowprops={"arrowstyle": "-", "color": _GREY, "linewidth": 0.8},
    )
    axis.set_xlabel("pass rate p of the prompt", fontsize=9)
    axis.set_ylabel("weight of its true gradient, at p = 1/2 one", fontsize=9, color=_INK)


def _signal(figure: Any, where: Any, found: Mapping[str, Diagnosis], colour: Mapping[str, str]) -> None:
    axis = _axis(figure, where, "What groups without contrast cost and teach")
    first = next(iter(found.values()))
    shades = ["#d5d8dc", *colour.values()]
    columns = [(first.all_right.probability, first.all_wrong.probability)]
    columns += [(d.all_right.share, d.all_wrong.share) for d in found.values()]
    width = 0.84 / len(columns)
    for index, (values, shade) in enumerate(zip(columns, shades, strict=True)):
        place = np.arange(2) + (index - (len(columns) - 1) / 2) * width
        drawn = [0.0 if math.isnan(v) else 100 * v for v in values]
        axis.bar(place, drawn, width=0.88 * width, color=shade)
        for x, value, raw in zip(place, drawn, values, strict=True):
            text = "none" if math.isnan(raw) else f"{value:.3g}%" if value >= 0.05 else "0"
            axis.text(x, value, text, ha="center", va="bottom", fontsize=9, color=_INK)
    axis.text(0.99, 0.97, "grey: share of the groups", transform=axis.transAxes, ha="right", va="top", color="#666a70")
    axis.set_xticks([0, 1], ["all responses right", "all responses wrong"])
    axis.set_xlim(-0.6, 1.6)
    axis.set_ylim(0, max(1.2 * axis.get_ylim()[1], 1.0))
    axis.grid(False, axis="x")
    axis.set_ylabel("share of the gradient's expected length, %", fontsize=9, color=_INK)


def _paths(figure: Any, where: Any, found: Mapping[str, Diagnosis], colour: Mapping[str, str]) -> None:
    upper, lower = where.subgridspec(2, 1, hspace=0.08)
    reward = _axis(figure, upper, "Following the expected gradient")
    entropy = figure.add_subplot(lower, sharex=reward)
    entropy.grid(True, color=_GRID, linewidth=0.8)
    entropy.spines[["top", "right"]].set_visible(False)
    entropy.tick_params(labelsize=9, colors=_INK)
    for index, (label, d) in enumerate(found.items()):
        if d.fixed_point is None:
            continue
        width = _width(index, len(found))
        for axis, values in ((reward, d.fixed_point.rewards), (entropy, d.fixed_point.entropies)):
            axis.plot(values, color=colour[label], linewidth=width)
            end = "o" if d.fixed_point.converged else "x"
            axis.plot(len(values) - 1, values[-1], end, color=colour[label], markersize=4 + width, clip_on=False)
    reward.tick_params(labelbottom=False)
    reward.set_ylabel("expected reward", fontsize=9, color=_INK)
    entropy.set_ylabel("entropy, nats", fontsize=9, color=_INK)
    entropy.set_ylim(bottom=0)
    entropy.set_xlabel("steps (dot: converged, cross: not yet)", fontsize=9)

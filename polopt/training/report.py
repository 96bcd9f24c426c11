"""What a finished run shows its owner: before and after, learning curves, samples to read, where the model is."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from polopt.core.errors import UsageError
from polopt.training import metrics_names as names
from polopt.training.trackers.jsonl import read_jsonl

SAMPLES_SHOWN: Final = 10


@dataclass(frozen=True)
class Sample:
    """A completion to read. A reward of NaN could not be computed."""

    prompt: str
    completion: str
    reward: float


def read_log(run: Path) -> list[dict[str, Any]]:
    """Lines of `run/log.jsonl` as dicts with "step" first; [] when nothing was logged yet.

    Raises:
        UsageError: no such folder, or a broken line.
    """
    if not run.is_dir():
        raise UsageError(f"no run at {run}; give the folder that holds log.jsonl")
    return read_jsonl(run / "log.jsonl")


def write_report(
    run: Path,
    before: Mapping[str, float] | None,
    after: Mapping[str, float] | None,
    samples: Sequence[Sample],
    model_path: Path | None,
    console: Console | None = None,
) -> None:
    """Write `run/curves.png` and `run/samples.md`, and print a table, shortened samples and the paths.

    `before` and `after` are evaluations by metric name, with or without the prefix "eval/"; "accuracy/low" and
    "accuracy/high" (or any other metric's) are its confidence bounds. Of more than ten samples, ten are shown that
    are evenly spaced in reward, the worst and the best among them.
    """
    console = console or Console()
    run.mkdir(parents=True, exist_ok=True)
    if before or after:
        console.print(comparison_table(before or {}, after or {}))
    shown = spread_by_reward(samples)
    written: list[tuple[str, Path]] = []
    if shown:
        (run / "samples.md").write_text(samples_markdown(shown, len(samples)), encoding="utf-8")
        written.append(("samples", run / "samples.md"))
        for sample in shown:
            console.print(_sample_panel(sample, console.width))
    log = read_log(run)
    if log:
        plot_curves(log, run / "curves.png")
        written.append(("curves", run / "curves.png"))
    if model_path is not None:
        written.append(("model", model_path))
    for label, path in written:
        console.print(f"[bold]{label:<8}[/bold]{escape(str(path))}", highlight=False, soft_wrap=True)


# --- before and after -------------------------------------------------------------------------------------------------

_ORDER: Final = (names.ACCURACY, "pass", names.REWARD, names.MEAN_LENGTH, names.ENTROPY)


def comparison_table(before: Mapping[str, float], after: Mapping[str, float]) -> Table:
    """A row per metric: value (with bounds where given) before and after training, and the change."""
    sides = [{name.removeprefix(names.EVAL): value for name, value in side.items()} for side in (before, after)]
    metrics = dict.fromkeys(name for side in sides for name in side if not name.endswith(("/low", "/high")))
    table = Table(title="Held-out evaluation (brackets: 95% confidence interval)")
    table.add_column("metric")
    for column in ("before", "after", "change"):
        table.add_column(column, justify="right")
    for name in sorted(metrics, key=_rank):
        first, last = (side.get(name, math.nan) for side in sides)
        # A difference of two rates is in points; "%" would read as a relative change.
        change = f"{(last - first) * 100:+.1f} pts" if _is_rate(name) else f"{last - first:+.4g}"
        row = [_with_bounds(name, side) for side in sides]
        table.add_row(Text(name), *row, "" if math.isnan(last - first) else change)
    return table


def _rank(name: str) -> tuple[int, int, str]:
    """Place in the table: the usual metrics first, pass@k by k."""
    kind, _, k = name.partition("@")
    if k.isdigit():
        return _ORDER.index("pass"), int(k), name
    return _ORDER.index(kind) if kind in _ORDER else len(_ORDER), 0, name


def _is_rate(name: str) -> bool:
    return name.startswith((names.ACCURACY, "pass@"))


def _with_bounds(name: str, side: Mapping[str, float]) -> str:
    value = side.get(name, math.nan)
    if math.isnan(value):
        return "-"
    form: Callable[[float], str] = (lambda x: f"{x:.1%}") if _is_rate(name) else (lambda x: f"{x:.4g}")
    low, high = side.get(f"{name}/low", math.nan), side.get(f"{name}/high", math.nan)
    # The backslash keeps rich from reading the bracket as markup.
    return form(value) if math.isnan(low) or math.isnan(high) else f"{form(value)} \\[{form(low)}, {form(high)}]"


# --- samples ----------------------------------------------------------------------------------------------------------


def spread_by_reward(samples: Sequence[Sample], count: int = SAMPLES_SHOWN) -> list[Sample]:
    """At most `count` samples, evenly spaced in the order of rewards, best first; unscored ones count as last."""
    ordered = sorted(samples, key=lambda s: (math.isnan(s.reward), -s.reward if not math.isnan(s.reward) else 0.0))
    if len(ordered) <= count:
        return ordered
    return [ordered[round(i * (len(ordered) - 1) / max(1, count - 1))] for i in range(count)]


def samples_markdown(shown: Sequence[Sample], total: int) -> str:
    """The samples in full, as Markdown; text of the model stays inside code fences."""
    origin = f" of {total}, evenly spaced from the best reward to the worst" if total > len(shown) else ""
    parts = [f"# Samples\n\n{len(shown)} samples{origin}.\n"]
    for number, sample in enumerate(shown, 1):
        reward = _reward(sample)
        parts.append(
            f"## {number}. {reward}\n\nPrompt\n\n{_fence(sample.prompt)}\n\nCompletion\n\n{_fence(sample.completion)}\n"
        )
    return "\n".join(parts)


def _fence(text: str) -> str:
    text = _printable(text)
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}text\n{text}\n{ticks}"


def _reward(sample: Sample) -> str:
    return "reward could not be computed" if math.isnan(sample.reward) else f"reward {sample.reward:.4g}"


def _sample_panel(sample: Sample, width: int) -> Panel:
    # One line of prompt and two of completion, within the panel's border.
    body = Text(_shorten(sample.prompt, width - 4), style="dim")
    body.append("\n")
    body.append(_shorten(sample.completion, 2 * (width - 4)), style="not dim")
    return Panel(body, title=_reward(sample), title_align="left")


def _shorten(text: str, length: int) -> str:
    """One line, cut in the middle."""
    line = " ".join(_printable(text).split())
    if len(line) <= length:
        return line
    half = (length - 5) // 2
    # The end of a completion holds its answer.
    return f"{line[:half]} ... {line[-half:]}"


def _printable(text: str) -> str:
    """A model's output may hold escape codes, which a terminal would obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


# --- curves -----------------------------------------------------------------------------------------------------------

Series = tuple[NDArray[np.float64], NDArray[np.float64]]
_BLUE, _ORANGE, _GREY = "#1f6fb4", "#d9741a", "#8a8f98"


def plot_curves(log: Sequence[Mapping[str, Any]], path: Path, x: str = "step") -> None:
    """Six panels of learning curves as a PNG: reward, held-out accuracy with its confidence band, entropy, KL to the
    reference (where a run has none, the share of groups whose rewards are all equal), completion length, and gradient
    norm with the clipped share. A quantity that was never logged says so.

    Args:
        log: lines as from `read_log`.
        path: the file to write.
        x: the metric on the horizontal axis, such as "step", "num_tokens" or "num_rollouts".
    """
    # Figure without pyplot: no global state, no window system, safe beside a user's own plots.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    fourth, unit, title = names.KL, "nats per token", "KL to reference"
    if not any(names.KL in line for line in log):
        fourth, unit, title = names.FRAC_REWARD_ZERO_STD, "share of groups", "Groups without a learning signal"
    figure = Figure(figsize=(13.5, 7.2), dpi=120, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)  # type: ignore[union-attr, call-arg]
    FigureCanvasAgg(figure)
    axes: list[Any] = list(figure.subplots(2, 3, sharex=True).flat)
    for axis, heading in zip(
        axes,
        (
            "Reward",
            "Held-out accuracy",
            "Entropy",
            title,
            "Completion length",
            "Gradient norm and clipping",
        ),
        strict=True,
    ):
        axis.set_title(heading, loc="left", fontsize=11, fontweight="bold")
        axis.grid(True, color="#e6e8eb", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=9, colors="#444444", labelbottom=True)
        axis.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    reward, accuracy, entropy, signal, length, update = axes

    _trend(reward, _series(log, names.REWARD, x), "mean of a batch")
    _accuracy(accuracy, log, x)
    _trend(entropy, _series(log, names.ENTROPY, x), "nats per token")
    _trend(signal, _series(log, fourth, x), unit)
    _length(length, log, x)
    _update(update, log, x)
    for axis in axes:
        if not axis.lines and not axis.collections:
            axis.text(0.5, 0.5, "not logged", transform=axis.transAxes, ha="center", va="center", color=_GREY)
            axis.grid(False)
            axis.set_yticks([])
    for axis in axes[3:]:
        axis.set_xlabel(x.replace("_", " "), fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _series(log: Sequence[Mapping[str, Any]], name: str, x: str) -> Series:
    points = [(line[x], line[name]) for line in log if name in line and x in line]
    array = np.array(points, dtype=np.float64).reshape(-1, 2)
    array = array[np.isfinite(array).all(axis=1)]
    return array[:, 0], array[:, 1]


def _trend(axis: Any, series: Series, ylabel: str, color: str = _BLUE, label: str | None = None) -> None:
    """The values, pale, under their moving average over 5% of the run."""
    at, values = series
    if not len(at):
        return
    axis.set_ylabel(ylabel, fontsize=9, color="#444444")
    width = max(1, len(values) // 20)
    if width < 2:
        axis.plot(at, values, color=color, linewidth=1.6, marker="o", markersize=3, label=label)
        return
    axis.plot(at, values, color=color, alpha=0.25, linewidth=0.9)
    axis.plot(at, _moving_average(values, width), color=color, linewidth=1.9, label=label)


def _moving_average(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Mean of the values at most width/2 places away: centred, so it does not lag; at the ends only the half that
    exists, so a single last value cannot look like a trend."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(len(values))
    begin = np.maximum(place - width // 2, 0)
    end = np.minimum(place + width // 2 + 1, len(values))
    return np.asarray((total[end] - total[begin]) / (end - begin))


def _accuracy(axis: Any, log: Sequence[Mapping[str, Any]], x: str) -> None:
    name = names.EVAL + names.ACCURACY
    at, values = _series(log, name, x)
    bounded = [line for line in log if name + "/low" in line and name + "/high" in line]
    band, low = _series(bounded, name + "/low", x)
    _, high = _series(bounded, name + "/high", x)
    if len(at):
        axis.plot(at, values, color=_BLUE, linewidth=1.9, marker="o", markersize=4, label="accuracy")
    if len(band) and len(low) == len(high):
        axis.fill_between(band, low, high, color=_BLUE, alpha=0.15, linewidth=0, label="95% interval")
    # One more line at most: the largest k, the ceiling that sampling reaches.
    ks = {int(m[1]) for line in log for key in line if (m := re.fullmatch(re.escape(names.EVAL) + r"pass@(\d+)", key))}
    if ks and max(ks) > 1:
        label = names.pass_at(max(ks))
        passed, rate = _series(log, names.EVAL + label, x)
        axis.plot(passed, rate, color=_ORANGE, linewidth=1.5, marker="o", markersize=3, label=label)
    if axis.lines:
        from matplotlib.ticker import PercentFormatter

        axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        low_end, high_end = axis.get_ylim()
        axis.set_ylim(max(low_end, -0.03), min(high_end, 1.03))
        axis.legend(fontsize=8, frameon=False)


def _length(axis: Any, log: Sequence[Mapping[str, Any]], x: str) -> None:
    terminated = _series(log, names.MEAN_TERMINATED_LENGTH, x)
    every = _series(log, names.MEAN_LENGTH, x)
    _trend(axis, every, "tokens", label="all")
    if len(terminated[0]) and not np.array_equal(terminated[1], every[1]):
        _trend(axis, terminated, "tokens", _ORANGE, "terminated")
        axis.legend(fontsize=8, frameon=False)


def _update(axis: Any, log: Sequence[Mapping[str, Any]], x: str) -> None:
    norm, clipped = _series(log, names.GRAD_NORM, x), _series(log, names.CLIP_REGION, x)
    both = len(norm[0]) and len(clipped[0])
    _trend(axis, norm, "gradient norm")
    if not len(clipped[0]):
        return
    side = axis.twinx() if both else axis
    _trend(side, clipped, "share of steps clipped", _ORANGE)
    side.set_ylim(bottom=0.0)
    side.yaxis.label.set_color(_ORANGE)
    if both:
        axis.set_ylim(bottom=0.0)
        axis.yaxis.label.set_color(_BLUE)
        side.spines[["top", "left"]].set_visible(False)
        side.tick_params(labelsize=9, colors="#444444")

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from polopt.core.errors import UsageError
from polopt.training.report import (
    Sample,
    _moving_average,
    comparison_table,
    plot_curves,
    read_log,
    samples_markdown,
    spread_by_reward,
    write_report,
)


def rendered(renderable: Any) -> str:
    console = Console(file=io.StringIO(), width=120, record=True)
    console.print(renderable)
    return console.export_text()


def log_lines(steps: int = 60) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        lines.append({"step": step, "reward": step / steps, "entropy": 1.0, "kl": 0.1, "grad_norm": 2.0})
        lines[-1] |= {"completions/mean_length": 10.0, "clip_ratio/region_mean": 0.01, "num_tokens": 100 * step}
        if step % 20 == 0:
            lines.append({"step": step, "eval/accuracy": 0.5, "eval/accuracy/low": 0.4, "eval/accuracy/high": 0.6})
    return lines


def test_the_table_shows_bounds_and_change_and_reads_either_prefix() -> None:
    before = {"eval/accuracy": 0.125, "eval/accuracy/low": 0.05, "eval/accuracy/high": 0.2, "eval/reward": 1.0}
    after = {"accuracy": 0.5, "accuracy/low": 0.4, "accuracy/high": 0.6, "pass@8": 0.9, "pass@16": 0.95, "reward": 3.0}
    text = rendered(comparison_table(before, after))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    assert rows == [
        ["accuracy", "12.5% [5.0%, 20.0%]", "50.0% [40.0%, 60.0%]", "+37.5 pts"],
        ["pass@8", "-", "90.0%", ""],
        ["pass@16", "-", "95.0%", ""],
        ["reward", "1", "3", "+2"],
    ]


def test_ten_samples_spread_from_best_to_worst() -> None:
    samples = [Sample("p", f"c{i}", float(i)) for i in range(101)] + [Sample("p", "broken", math.nan)]
    shown = spread_by_reward(samples[:-1])
    assert len(shown) == 10
    assert shown[0].reward == 100 and shown[-1].reward == 0
    gaps = -np.diff([sample.reward for sample in shown])
    assert gaps.min() >= 11 and gaps.max() <= 12
    assert spread_by_reward(samples)[-1].completion == "broken"
    assert spread_by_reward(samples[:3]) == samples[2::-1]


def test_a_completion_cannot_break_out_of_its_fence_or_send_escape_codes() -> None:
    text = samples_markdown([Sample("```", "````\n# not a heading\x1b[2J", math.nan)], 1)
    assert "`````text\n````\n# not a heading\N{REPLACEMENT CHARACTER}[2J\n`````" in text
    assert "\x1b" not in text
    assert "could not be computed" in text


def test_the_report_of_a_whole_run(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log_lines()))
    out = io.StringIO()
    long = "start " + "word " * 500 + "\x1b[31m[bold]the answer is 4"
    samples = [Sample(f"What is {i}+{i}?", long, float(i)) for i in range(12)]
    console = Console(file=out, width=100)
    write_report(tmp_path, {"accuracy": 0.1}, {"accuracy": 0.5}, samples, tmp_path / "model", console)
    text = out.getvalue()
    assert "+40.0 pts" in text and str(tmp_path / "model") in text and str(tmp_path / "curves.png") in text
    unwrapped = " ".join(text.replace("│", " ").split())
    assert "\x1b" not in text and unwrapped.count("[bold]the answer is 4") == 10
    assert max(map(len, text.splitlines())) <= max(100, len(str(tmp_path / "samples.md")) + 8)
    assert text.count("reward ") >= 10 and text.count("word") < 10 * 60
    markdown = (tmp_path / "samples.md").read_text()
    assert markdown.count("\n## ") == 10 and markdown.count("word") == 5000
    assert imread(tmp_path / "curves.png").shape[:2] == (864, 1620)


def test_a_run_without_evaluation_samples_or_log_still_reports(tmp_path: Path) -> None:
    out = io.StringIO()
    write_report(tmp_path / "run", None, None, [], None, Console(file=out))
    assert out.getvalue() == "" and list((tmp_path / "run").iterdir()) == []
    write_report(tmp_path / "run", None, {"accuracy": 0.5}, [], None, Console(file=out, width=100))
    assert "50.0%" in out.getvalue()


@pytest.mark.parametrize(
    "log",
    [
        [{"step": 1}],
        [{"step": 1, "reward": 0.5}],
        [{"step": s, "reward": math.nan, "kl": math.inf} for s in range(30)],
        [{"step": 1, "eval/accuracy": 1.0, "eval/pass@4": 1.0}],
        [{"step": s, "clip_ratio/region_mean": 0.0} for s in range(3)],
        [{"step": s, "eval/accuracy": 0.0, "eval/accuracy/low": math.nan, "eval/accuracy/high": 0.1} for s in range(3)],
    ],
)
def test_curves_cope_with_what_is_missing(tmp_path: Path, log: list[dict[str, Any]], recwarn: Any) -> None:
    plot_curves(log, tmp_path / "curves.png")
    assert imread(tmp_path / "curves.png").shape[:2] == (864, 1620)
    assert [str(warning.message) for warning in recwarn] == []


def test_curves_differ_when_a_series_does_and_can_run_over_tokens(tmp_path: Path) -> None:
    log = log_lines()
    for name, lines, x in [
        ("a", log, "step"),
        ("b", log, "step"),
        ("c", [{k: v for k, v in line.items() if k != "kl"} for line in log], "step"),
        ("d", log, "num_tokens"),
    ]:
        plot_curves(lines, tmp_path / f"{name}.png", x)
    a, b, c, d = (imread(tmp_path / f"{name}.png") for name in "abcd")
    assert np.array_equal(a, b) and not np.array_equal(a, c) and not np.array_equal(a, d)


def test_the_moving_average_equals_a_loop() -> None:
    values = np.random.default_rng(0).normal(size=23)
    for width in (2, 3, 8, 50):
        half = width // 2
        loop = [values[max(0, i - half) : i + half + 1].mean() for i in range(23)]
        assert _moving_average(values, width) == pytest.approx(loop)


def test_read_log(tmp_path: Path) -> None:
    assert read_log(tmp_path) == []
    (tmp_path / "log.jsonl").write_text('{"step": 1, "kl": null, "x": "-Infinity"}\n')
    (line,) = read_log(tmp_path)
    assert math.isnan(line["kl"]) and line["x"] == -math.inf
    with pytest.raises(UsageError, match="no run at"):
        read_log(tmp_path / "absent")

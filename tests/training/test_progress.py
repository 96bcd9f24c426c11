from __future__ import annotations

import io

import pytest
from rich.console import Console

from polopt.training.budget import Budget, Spent
from polopt.training.progress import RunProgress


class Clock:
    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


def play(bar: RunProgress, clock: Clock, steps: int, seconds: float, first: int = 0) -> None:
    with bar:
        for step in range(first, first + steps + 1):
            spent = Spent(steps=step, seconds=seconds * step, tokens=100 * step)
            bar.update(spent, {"reward": step / 10, "entropy": 1.5}, phase="sample")
            clock.now += seconds


def test_off_a_terminal_one_line_per_interval_with_the_first_and_the_last() -> None:
    out, clock = io.StringIO(), Clock()
    play(RunProgress(Budget(steps=12), console=Console(file=out, width=40), clock=clock), clock, 12, 4.0)
    lines = out.getvalue().splitlines()
    # Every 10 s with a step of 4 s: steps 0, 3, 6, 9, 12, and the end once more without its phase.
    assert [line.split()[1] for line in lines] == ["0/12", "3/12", "6/12", "9/12", "12/12", "12/12"]
    assert "50%" in lines[2] and "reward 0.600" in lines[2] and "entropy 1.500" in lines[2] and "25 tok/s" in lines[2]
    assert "24s left" in lines[2] and lines[2].endswith("sample")
    assert "\x1b" not in out.getvalue()


def test_time_left_after_a_resume_follows_the_pace_of_this_process() -> None:
    clock = Clock()
    bar = RunProgress(Budget(steps=100), quiet=True, clock=clock)
    bar.update(Spent(steps=90, seconds=90_000.0))
    assert "left" not in bar.line()
    clock.now += 30
    bar.update(Spent(steps=95, seconds=90_030.0))
    assert "30s left" in bar.line()
    clock.now += 100_000
    bar.update(Spent(steps=96, seconds=190_030.0))
    assert "h" in bar.line().split(" left")[0].split("  ")[-1]


def test_metrics_keep_their_last_value_and_missing_ones_are_left_out() -> None:
    bar = RunProgress(Budget(), quiet=True)
    bar.update(Spent(steps=3), {"reward": 0.25, "kl": float("nan"), "eval/accuracy": 0.5})
    bar.update(Spent(steps=4), {"completions/mean_length": 12.0, "tokens_per_second": 1234.0})
    assert bar.line() == "step 4  reward 0.250  held-out 50.0%  length 12.0  1,234 tok/s"


def test_quiet_prints_nothing_even_when_the_run_fails(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError), RunProgress(Budget(steps=2), quiet=True) as bar:
        bar.update(Spent(steps=1), {"reward": 1.0})
        raise RuntimeError
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_the_line_is_redrawn_and_markup_is_not_interpreted() -> None:
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, width=120, force_terminal=True)
    with RunProgress(Budget(steps=4), console=console, clock=clock) as bar:
        bar.update(Spent(steps=1), {"reward": 0.5}, phase="[bold]sample")
        assert console._live_stack or console._live  # type: ignore[attr-defined]
        bar.update(Spent(steps=4), {"reward": 0.75})
    text = out.getvalue()
    assert "step 4/4" in text and "reward 0.750" in text and "100%" in text
    assert text.endswith("\x1b[?25h")  # the cursor is back


def test_a_failing_run_gives_the_terminal_back() -> None:
    out = io.StringIO()
    with (
        pytest.raises(KeyboardInterrupt),
        RunProgress(Budget(), console=Console(file=out, width=120, force_terminal=True)) as bar,
    ):
        bar.update(Spent(steps=1))
        raise KeyboardInterrupt
    assert "\x1b[?25h" in out.getvalue()

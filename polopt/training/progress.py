"""One live line about a run: how far, how well, how fast, how long still."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Final, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn

from polopt.training.budget import Budget, Spent
from polopt.training.metrics_names import ACCURACY, ENTROPY, EVAL, KL, MEAN_LENGTH, REWARD, TOKENS_PER_SECOND

_SHOWN: Final = (
    (REWARD, "reward", "{:.3f}"),
    (EVAL + ACCURACY, "held-out", "{:.1%}"),
    (ENTROPY, "entropy", "{:.3f}"),
    (KL, "kl", "{:.4f}"),
    (MEAN_LENGTH, "length", "{:.1f}"),
)


class RunProgress:
    """Progress of a run towards its budget.

        with RunProgress(Budget(steps=100)) as bar:
            bar.update(meter.spent, {"reward": 0.4}, phase="sample")

    On a terminal one line that is redrawn; elsewhere (a file, a notebook's pipe, CI) one line every `interval`
    seconds, with the first and the last state always among them. Metrics keep their last value until updated.

    Args:
        budget: limits that define the fraction done and the time left; without limits neither is shown.
        quiet: print nothing.
        console: where to print; standard output by default.
        interval: seconds between lines when not on a terminal.
        clock: seconds, never decreasing.
    """

    def __init__(
        self,
        budget: Budget,
        *,
        quiet: bool = False,
        console: Console | None = None,
        interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._budget = budget
        self._quiet = quiet
        self._console = console or Console()
        self._interval = interval
        self._clock = clock
        self._metrics: dict[str, float] = {}
        self._phase = ""
        self._spent = Spent()
        self._first: tuple[float, Spent] | None = None
        self._printed: tuple[float, str] | None = None
        self._live: tuple[Progress, TaskID] | None = None

    def __enter__(self) -> Self:
        if not self._quiet and self._console.is_terminal:
            columns = (SpinnerColumn(), BarColumn(bar_width=20), TextColumn("{task.description}", markup=False))
            progress = Progress(*columns, console=self._console)
            total = 1.0 if self._budget.limits() else None
            self._live = progress, progress.add_task("starting", total=total)
            progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._phase = ""
        if self._live is not None:
            progress, task = self._live
            if self._first is not None:
                progress.update(task, description=self.line())
            progress.stop()
            self._live = None
        elif not self._quiet and self._first is not None and (not self._printed or self._printed[1] != self.line()):
            self._print(self._clock())

    def update(self, spent: Spent, metrics: Mapping[str, float] | None = None, phase: str = "") -> None:
        """Show the state after `spent`; `phase` says what the run is doing now."""
        now = self._clock()
        if self._first is None:
            self._first = now, spent
        self._spent, self._phase = spent, phase
        self._metrics.update(metrics or {})
        if self._quiet:
            return
        if self._live is not None:
            progress, task = self._live
            done = self._budget.fraction(spent) if self._budget.limits() else None
            progress.update(task, completed=done, description=self.line())
        elif self._printed is None or now - self._printed[0] >= self._interval:
            self._print(now)

    def line(self) -> str:
        """The state as one line of plain text."""
        steps = f"step {self._spent.steps}"
        if self._budget.steps is not None:
            steps += f"/{self._budget.steps}"
        parts = [steps]
        if self._budget.limits():
            parts.append(f"{self._budget.fraction(self._spent):.0%}")
        for name, label, form in _SHOWN:
            value = self._metrics.get(name)
            if value is not None and not math.isnan(value):
                parts.append(f"{label} {form.format(value)}")
        speed = self._tokens_per_second()
        if speed is not None:
            parts.append(f"{speed:,.0f} tok/s")
        left = self._seconds_left()
        if left is not None:
            parts.append(f"{_duration(left)} left")
        if self._phase:
            parts.append(self._phase)
        return "  ".join(parts)

    def _print(self, now: float) -> None:
        line = self.line()
        self._printed = now, line
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _tokens_per_second(self) -> float | None:
        if TOKENS_PER_SECOND in self._metrics:
            return self._metrics[TOKENS_PER_SECOND]
        if self._first is None:
            return None
        seconds = self._spent.seconds - self._first[1].seconds
        tokens = self._spent.tokens - self._first[1].tokens
        return tokens / seconds if seconds > 0 and tokens > 0 else None

    def _seconds_left(self) -> float | None:
        """From the pace since this process began: after a resume on another machine, the old pace says nothing."""
        if self._first is None or not self._budget.limits():
            return None
        begin, first = self._first
        done = self._budget.fraction(self._spent)
        gained = done - self._budget.fraction(first)
        if gained <= 0:
            return None
        return (1 - done) * (self._clock() - begin) / gained


def _duration(seconds: float) -> str:
    if seconds >= 3600:
        return f"{int(seconds // 3600)}h{int(seconds % 3600 // 60):02d}m"
    return f"{int(seconds // 60)}m{int(seconds % 60):02d}s" if seconds >= 60 else f"{int(seconds)}s"

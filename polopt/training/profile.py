"""Where the wall time of a run goes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Final

from rich.table import Table

PHASES: Final[tuple[str, ...]] = ("sample", "reward", "evaluate", "backward", "update")
OTHER: Final = "other"
_NOTHING: Final = nullcontext()


class Profiler:
    """Wall seconds per phase.

        profiler = Profiler()
        with profiler.phase("sample"):
            ...

    Phases nest and are exclusive: seconds inside an inner phase are not counted for the outer one, so that the phases
    and "other" (outside any phase) add up to the time since construction. Seconds are the host's: on a GPU pass
    `synchronize=torch.cuda.synchronize`, or queued work is charged to the phase that waits for it. For one thread.

    Args:
        enabled: when false, `phase` does nothing.
        trace: keep every phase as an event for `trace.json` (about 200 bytes each).
        synchronize: called at both ends of every phase.
        clock: seconds, never decreasing.
    """

    def __init__(
        self,
        enabled: bool = True,
        *,
        trace: bool = False,
        synchronize: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._enabled = enabled
        self._trace = trace
        self._synchronize = synchronize
        self._clock = clock
        self._started = clock()
        self._seconds: dict[str, float] = {}
        self._calls: dict[str, int] = {}
        self._inner: list[float] = []  # seconds spent in finished inner phases, one entry per open phase
        self._events: list[dict[str, Any]] = []

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Charge the block's time to `name`."""
        return self._measure(name) if self._enabled else _NOTHING

    @contextmanager
    def _measure(self, name: str) -> Iterator[None]:
        start = self._now()
        self._inner.append(0.0)
        try:
            yield
        finally:
            duration = self._now() - start
            exclusive = duration - self._inner.pop()
            if self._inner:
                self._inner[-1] += duration
            self._seconds[name] = self._seconds.get(name, 0.0) + exclusive
            self._calls[name] = self._calls.get(name, 0) + 1
            if self._trace:
                begin = (start - self._started) * 1e6
                self._events.append(
                    {"name": name, "ph": "X", "ts": begin, "dur": duration * 1e6, "pid": 0, "tid": 0, "cat": "phase"}
                )

    def seconds(self) -> dict[str, float]:
        """Exclusive seconds per phase so far, the known phases first, then "other"; {} when off."""
        if not self._enabled:
            return {}
        total = self._clock() - self._started
        order = [*(p for p in PHASES if p in self._seconds), *(p for p in self._seconds if p not in PHASES)]
        seconds = {name: self._seconds[name] for name in order}
        seconds[OTHER] = seconds.pop(OTHER, 0.0) + max(0.0, total - sum(self._seconds.values()))
        return seconds

    def table(self) -> Table:
        """Phases with seconds, share of the total and number of calls."""
        table = Table(title="Where the time went")
        table.add_column("phase")
        for column in ("seconds", "share", "calls"):
            table.add_column(column, justify="right")
        seconds = self.seconds()
        total = sum(seconds.values()) or 1.0
        for name, value in seconds.items():
            table.add_row(name, f"{value:.1f}", f"{value / total:.0%}", str(self._calls.get(name, "")))
        return table

    def write(self, run: Path) -> Path | None:
        """Write `run/profile.json`, and `run/trace.json` when tracing; returns the former, or None when off.

        `trace.json` has one complete event per phase with its begin `ts` and duration `dur` in microseconds since
        construction. Open it at chrome://tracing or https://ui.perfetto.dev.
        """
        if not self._enabled:
            return None
        run.mkdir(parents=True, exist_ok=True)
        seconds = self.seconds()
        document = {"total_seconds": sum(seconds.values()), "seconds": seconds, "calls": self._calls}
        path = run / "profile.json"
        path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        if self._trace:
            events = {"displayTimeUnit": "ms", "traceEvents": sorted(self._events, key=lambda e: float(e["ts"]))}
            (run / "trace.json").write_text(json.dumps(events) + "\n", encoding="utf-8")
        return path

    def _now(self) -> float:
        if self._synchronize is not None:
            self._synchronize()
        return self._clock()

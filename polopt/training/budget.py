"""How much a run may spend, what it has spent, and what happens every so often."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Final, Literal

from polopt.core.errors import UsageError

Unit = Literal["steps", "seconds", "tokens", "rollouts"]
UNITS: Final[tuple[Unit, ...]] = ("steps", "seconds", "tokens", "rollouts")


@dataclass(frozen=True)
class Spent:
    """What a run has used: training steps, wall seconds, generated tokens, rollouts (trajectories)."""

    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0
    rollouts: int = 0


@dataclass(frozen=True)
class Budget:
    """Limits of a run in the units of `Spent`; None is no limit, and the first limit reached ends the run.

    Raises:
        UsageError: a limit that is negative or not a number.
    """

    steps: int | None = None
    seconds: float | None = None
    tokens: int | None = None
    rollouts: int | None = None

    def __post_init__(self) -> None:
        for unit in UNITS:
            limit = getattr(self, unit)
            if limit is not None and not limit >= 0:
                raise UsageError(f"a budget of {limit} {unit} is impossible; give a number of at least 0")

    def exhausted(self, spent: Spent) -> bool:
        """Whether any limit is reached."""
        return any(getattr(spent, unit) >= limit for unit, limit in self.limits().items())

    def fraction(self, spent: Spent) -> float:
        """max over limits of spent / limit, at most 1; 0 without limits."""
        shares = [getattr(spent, unit) / limit if limit else 1.0 for unit, limit in self.limits().items()]
        return min(1.0, max(shares, default=0.0))

    def limits(self) -> dict[Unit, float]:
        """The limits that are set."""
        return {unit: limit for unit in UNITS if (limit := getattr(self, unit)) is not None}


class Meter:
    """Counts what a run spends. Seconds run from construction, and on from the saved value after a resume.

    Time between a checkpoint and a kill is not part of the resumed run, just as the steps taken then are not.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._before = Spent()  # the counts, and the seconds up to `_started`
        self._started = clock()
        self._pauses = 0

    def add(self, *, steps: int = 0, tokens: int = 0, rollouts: int = 0) -> None:
        """Count finished work."""
        before = self._before
        self._before = replace(
            before, steps=before.steps + steps, tokens=before.tokens + tokens, rollouts=before.rollouts + rollouts
        )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock for work that the budget does not pay for, such as evaluation; pauses nest."""
        self._before = self.spent
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1
            self._started = self._clock()

    @property
    def spent(self) -> Spent:
        """Everything used so far, over all resumes."""
        running = 0.0 if self._pauses else self._clock() - self._started
        return replace(self._before, seconds=self._before.seconds + running)

    def restart(self) -> None:
        """Forget the time since construction or loading: set-up is not training."""
        self._started = self._clock()

    def state_dict(self) -> dict[str, Any]:
        """The counters, for a checkpoint."""
        return asdict(self.spent)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting from a saved state; the clock starts again now."""
        self._before = Spent(**{f.name: state[f.name] for f in fields(Spent)})
        self._started = self._clock()


@dataclass
class Every:
    """A trigger: due each time `interval` more of `unit` has been spent.

        if every.due(meter.spent):
            evaluate()
            every.done(meter.spent)

    Steps, tokens and rollouts are counted from 0 of the run: due when a multiple of `interval` lies in
    (last done, spent], so the moments are the same in a run that was resumed. Seconds are counted from the end of the
    last occasion, so slow work cannot crowd out training.
    """

    interval: float
    unit: Unit = "steps"
    last: float = field(default=0.0, compare=False)

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise UsageError(f"unknown unit {self.unit!r}; choose from {', '.join(UNITS)}")
        if not self.interval > 0:
            raise UsageError(f"an interval of {self.interval} {self.unit} is impossible; give a number above 0")
        if self.unit != "seconds" and math.isfinite(self.interval) and self.interval != int(self.interval):
            raise UsageError(f"an interval of {self.interval} {self.unit} is not a whole number")

    def due(self, spent: Spent) -> bool:
        """Whether it is time; asking changes nothing."""
        now = float(getattr(spent, self.unit))
        if self.unit == "seconds":
            return now - self.last >= self.interval
        return now // self.interval > self.last // self.interval

    def done(self, spent: Spent) -> None:
        """Note that the work was done, with what had been spent when it ended."""
        self.last = float(getattr(spent, self.unit))

    def state_dict(self) -> dict[str, Any]:
        """Unit and moment of the last occasion, for a checkpoint."""
        return {"unit": self.unit, "last": self.last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the last occasion. A state of another unit is ignored: the user changed the setting."""
        if state["unit"] == self.unit:
            self.last = float(state["last"])


_NAMES: Final[Mapping[str, tuple[Unit, float]]] = {
    **dict.fromkeys(("", "step", "steps"), ("steps", 1.0)),
    **dict.fromkeys(("s", "sec", "second", "seconds"), ("seconds", 1.0)),
    **dict.fromkeys(("m", "min", "minute", "minutes"), ("seconds", 60.0)),
    **dict.fromkeys(("h", "hour", "hours"), ("seconds", 3600.0)),
    **dict.fromkeys(("tok", "token", "tokens"), ("tokens", 1.0)),
    **dict.fromkeys(("rollout", "rollouts"), ("rollouts", 1.0)),
}
_QUANTITY = re.compile(r"(\d+(?:\.\d+)?(?:e\d+)?)\s*([a-z]*)")


def parse_every(text: str) -> Every:
    """Read "25" (steps), "90s", "2m", "1h", "100000tok" or "5000rollouts"; "never" is an infinite interval.

    Raises:
        UsageError: anything else, 0, or a fraction of a step, token or rollout.
    """
    if text.strip().lower() == "never":
        return Every(math.inf)
    match = _QUANTITY.fullmatch(text.strip().lower())
    if not match or match[2] not in _NAMES:
        raise UsageError(f"cannot read {text!r} as an interval; write 25 (steps), 90s, 2m, 100000tok or 5000rollouts")
    unit, factor = _NAMES[match[2]]
    return Every(float(match[1]) * factor, unit)


def parse_seconds(text: str) -> float:
    """Read a duration such as "90s", "8m", "1.5h" or "1h30m" in seconds; a bare number is seconds.

    Raises:
        UsageError: anything else.
    """
    compact = re.sub(r"\s+", "", text.lower())
    parts = re.findall(r"(\d+(?:\.\d+)?)([a-z]*)", compact)
    if not parts or "".join(number + unit for number, unit in parts) != compact:
        raise _not_a_duration(text)
    if len(parts) == 1 and not parts[0][1]:
        return float(parts[0][0])
    total = 0.0
    for number, name in parts:
        unit, factor = _NAMES.get(name, ("steps", 1.0))
        if unit != "seconds":
            raise _not_a_duration(text)
        total += float(number) * factor
    return total


def _not_a_duration(text: str) -> UsageError:
    return UsageError(f"cannot read {text!r} as a duration; write 90s, 8m, 1.5h or 1h30m")

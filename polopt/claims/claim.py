"""What a claim is, how it is measured, and the rule that turns measurements into a verdict.

A claim compares two arms on paired seeds: a seed fixes the problem, the initial policy and every random draw of both.
Its design (world, sizes, budget, metric, direction, margin) stands in the docstring of its file before it is run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final, Literal

from polopt.compare.statistics import paired_difference
from polopt.core.errors import UsageError

World = Literal["exact", "small"]
Direction = Literal["higher", "lower", "equal"]
Verdict = Literal["reproduced", "not reproduced", "not testable here"]
Measure = Callable[[int, bool], Mapping[str, float]]

LEAST_SEEDS: Final[Mapping[World, int]] = {"exact": 10, "small": 5}
"""Paired seeds without which nothing counts as reproduced."""

SEEDS: Final[Mapping[World, int]] = {"exact": 12, "small": 5}
"""Paired seeds of a full run."""

QUICK_SEEDS: Final = 2
LEVEL: Final = 0.95


@dataclass(frozen=True)
class Claim:
    """One direction of a paper's claim.

    ``measure(seed, quick)`` gives numbers by name; claims of one file may share it. The effect is the mean over seeds
    of ``treatment`` minus ``control`` (0 where that is None: the treatment is then a difference already).
    ``direction`` says how the treatment compares. ``margin`` is the difference that would not matter, in units of the
    metric: with "higher" or "lower" a positive one turns "better" into "not worse by more than the margin"; "equal"
    needs one. ``untestable`` is the reason why nothing can be measured here; there is no ``measure`` then.

    Raises ValueError for a claim that contradicts itself.
    """

    slug: str
    name: str
    statement: str
    world: World
    baseline: str
    metric: str
    direction: Direction
    treatment: str = "treatment"
    control: str | None = "control"
    margin: float = 0.0
    measure: Measure | None = None
    untestable: str = ""

    def __post_init__(self) -> None:
        if (self.measure is None) != bool(self.untestable):
            raise ValueError(f"claim {self.slug}/{self.name} needs either a measure or a reason why there is none")
        if self.margin < 0 or (self.direction == "equal" and not self.margin):
            raise ValueError(f"claim {self.slug}/{self.name} cannot have the margin {self.margin}")


@dataclass(frozen=True)
class Outcome:
    """What came of a claim. ``seconds`` are those of its measure, which claims may share."""

    claim: Claim
    verdict: Verdict
    effect: float = math.nan
    low: float = math.nan
    high: float = math.nan
    treatment: float = math.nan
    control: float = math.nan
    seeds: int = 0
    seconds: float = 0.0


def verdict(claim: Claim, low: float, high: float, seeds: int) -> Verdict:
    """The verdict on the 95% interval [low, high] of the paired difference.

    Reproduced iff there are at least `LEAST_SEEDS` and the interval excludes zero in the claimed direction: it lies
    above -margin ("higher"), below +margin ("lower"), or within (-margin, margin) ("equal"). Everything else, an
    interval that cannot be computed included, is not reproduced.
    """
    if claim.untestable:
        return "not testable here"
    if seeds < LEAST_SEEDS[claim.world] or not (math.isfinite(low) and math.isfinite(high)):
        return "not reproduced"
    match claim.direction:
        case "higher":
            holds = low > -claim.margin
        case "lower":
            holds = high < claim.margin
        case "equal":
            holds = -claim.margin < low and high < claim.margin
    return "reproduced" if holds else "not reproduced"


def check(
    claims: Sequence[Claim],
    *,
    seeds: int | None = None,
    quick: bool = False,
    tell: Callable[[str], None] = lambda text: None,
) -> list[Outcome]:
    """Measure each claim on paired seeds 0, 1, ... and judge it; claims that share a measure share its runs.

    ``quick`` takes 2 seeds and tiny budgets: the code runs, the verdict means nothing. Raises UsageError when a full
    run is asked for with fewer seeds than a verdict needs.
    """
    check_seeds(claims, seeds, quick)
    known: dict[Measure, Measured] = {}
    outcomes = []
    for claim in claims:
        if claim.measure is None:
            outcomes.append(Outcome(claim, "not testable here"))
            continue
        if claim.measure not in known:
            known[claim.measure] = measured(
                claim.measure,
                seeds or (QUICK_SEEDS if quick else SEEDS[claim.world]),
                quick=quick,
                tell=tell,
                what=f"{claim.slug}: {claim.name}",
            )
        found = known[claim.measure]
        outcomes.append(judge(claim, found.rows, found.seconds))
    return outcomes


def check_seeds(claims: Sequence[Claim], seeds: int | None, quick: bool) -> None:
    """Raise UsageError for fewer seeds than the verdicts of these claims need."""
    if seeds is not None and seeds < 1:
        raise UsageError(f"--seeds must be at least 1, got {seeds}")
    for claim in claims:
        if not quick and seeds is not None and seeds < LEAST_SEEDS[claim.world] and claim.measure is not None:
            raise UsageError(
                f"a verdict in the {claim.world} world needs at least {LEAST_SEEDS[claim.world]} seeds, got --seeds "
                f"{seeds}; add --quick to see whether the code runs"
            )


@dataclass(frozen=True)
class Measured:
    """One row of measurements per seed, and the seconds that they took."""

    rows: Sequence[Mapping[str, float]]
    seconds: float


_TELL: ContextVar[Callable[[str], None]] = ContextVar("tell", default=lambda text: None)


def note(text: str) -> None:
    """From within a long measure: where it is."""
    _TELL.get()(text)


def measured(
    measure: Measure, seeds: int, *, quick: bool, tell: Callable[[str], None] = lambda text: None, what: str = ""
) -> Measured:
    """The measurements of the seeds 0, 1, ...; ``tell`` hears where they are."""
    started = time.monotonic()
    rows = []
    for seed in range(seeds):
        here = f"{what}, seed {seed + 1} of {seeds}"
        tell(here)
        token = _TELL.set(lambda text, here=here: tell(f"{here}, {text}"))  # type: ignore[misc]
        try:
            rows.append(measure(seed, quick))
        finally:
            _TELL.reset(token)
    return Measured(rows, time.monotonic() - started)


def judge(claim: Claim, rows: Sequence[Mapping[str, float]], seconds: float = 0.0) -> Outcome:
    """The outcome of a claim from one row of measurements per seed.

    Raises ValueError for a measurement that is missing or not finite: the experiment is broken, the claim not judged.
    """
    treatment = [_value(claim, row, claim.treatment, seed) for seed, row in enumerate(rows)]
    control = [
        0.0 if claim.control is None else _value(claim, row, claim.control, seed) for seed, row in enumerate(rows)
    ]
    found = paired_difference(treatment, control, LEVEL)
    return Outcome(
        claim,
        verdict(claim, found.low, found.high, len(rows)),
        found.mean,
        found.low,
        found.high,
        sum(treatment) / len(rows),
        sum(control) / len(rows),
        len(rows),
        seconds,
    )


def _value(claim: Claim, row: Mapping[str, float], name: str, seed: int) -> float:
    found = float(row.get(name, math.nan))
    if not math.isfinite(found):
        raise ValueError(f"claim {claim.slug}/{claim.name}: {name!r} is {row.get(name)} at seed {seed}")
    return found

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import pytest
from scipy import stats

from polopt.claims.claim import LEAST_SEEDS, SEEDS, Claim, check, judge, verdict
from polopt.core.errors import UsageError


def nothing(seed: int, quick: bool) -> Mapping[str, float]:
    return {"treatment": 0.0, "control": 0.0}


def made(**changes: object) -> Claim:
    base = Claim("slug", "name", "A statement.", "exact", "baseline", "metric", "higher", measure=nothing)
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("direction", "margin", "low", "high", "expected"),
    [
        ("higher", 0.0, 0.1, 0.3, "reproduced"),
        ("higher", 0.0, 0.0, 0.3, "not reproduced"),
        ("higher", 0.0, -0.3, -0.1, "not reproduced"),
        ("higher", 0.2, -0.1, 0.3, "reproduced"),
        ("higher", 0.1, -0.1, 0.3, "not reproduced"),
        ("lower", 0.0, -0.3, -0.1, "reproduced"),
        ("lower", 0.0, -0.3, 0.0, "not reproduced"),
        ("lower", 0.0, 0.1, 0.3, "not reproduced"),
        ("lower", 0.2, -0.3, 0.1, "reproduced"),
        ("lower", 0.1, -0.3, 0.1, "not reproduced"),
        ("equal", 0.2, -0.1, 0.1, "reproduced"),
        ("equal", 0.2, -0.2, 0.1, "not reproduced"),
        ("equal", 0.2, -0.1, 0.2, "not reproduced"),
        ("higher", 0.0, math.nan, math.nan, "not reproduced"),
        ("higher", 0.0, 0.1, math.inf, "not reproduced"),
        ("equal", 0.2, math.nan, 0.1, "not reproduced"),
    ],
)
def test_the_rule(direction: str, margin: float, low: float, high: float, expected: str) -> None:
    assert verdict(made(direction=direction, margin=margin), low, high, 10) == expected


@pytest.mark.parametrize(("world", "least"), [("exact", 10), ("small", 5)])
def test_too_few_seeds_reproduce_nothing(world: str, least: int) -> None:
    claim = made(world=world)
    assert verdict(claim, 0.1, 0.2, least) == "reproduced"
    assert verdict(claim, 0.1, 0.2, least - 1) == "not reproduced"


def test_what_cannot_be_measured_has_a_reason() -> None:
    claim = made(measure=None, untestable="there is no such world")
    assert verdict(claim, 0.1, 0.2, 10) == "not testable here"
    (outcome,) = check([claim])
    assert (outcome.verdict, outcome.seeds, math.isnan(outcome.effect)) == ("not testable here", 0, True)


@pytest.mark.parametrize(
    "changes", [{"measure": None}, {"untestable": "why"}, {"margin": -0.1}, {"direction": "equal"}], ids=str
)
def test_a_claim_that_contradicts_itself_is_no_claim(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="slug/name"):
        made(**changes)


def test_the_effect_is_the_paired_difference_with_students_interval() -> None:
    treatment = [1.0, 2.5, 2.0, 4.0, 3.0, 2.0, 5.0, 1.5, 2.0, 3.5]
    control = [0.5, 2.0, 2.5, 3.0, 2.0, 2.0, 4.5, 0.5, 1.5, 3.0]
    outcome = judge(made(), [{"treatment": a, "control": b} for a, b in zip(treatment, control, strict=True)], 3.0)
    oracle = stats.ttest_rel(treatment, control).confidence_interval(0.95)
    assert (outcome.low, outcome.high) == pytest.approx((oracle.low, oracle.high))
    assert outcome.effect == pytest.approx(0.5)
    assert (outcome.treatment, outcome.control) == pytest.approx((2.65, 2.15))
    assert (outcome.seeds, outcome.seconds, outcome.verdict) == (10, 3.0, "reproduced")


def test_without_a_control_the_treatment_is_the_difference() -> None:
    outcome = judge(made(control=None), [{"treatment": 1.0 + seed} for seed in range(10)])
    assert (outcome.effect, outcome.control) == (5.5, 0.0)


@pytest.mark.parametrize("row", [{"treatment": 1.0}, {"treatment": math.nan, "control": 0.0}], ids=str)
def test_a_broken_experiment_is_not_judged(row: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="at seed 1"):
        judge(made(), [{"treatment": 1.0, "control": 0.0}, row])


def test_claims_that_share_a_measure_share_its_runs() -> None:
    seen: list[tuple[int, bool]] = []

    def measure(seed: int, quick: bool) -> Mapping[str, float]:
        seen.append((seed, quick))
        return {"a": float(seed), "b": 0.0, "c": seed + 1.0}

    members = [
        made(name="first", treatment="a", control="b", measure=measure),
        made(name="second", treatment="c", control="a", measure=measure),
    ]
    first, second = check(members, seeds=11)
    assert seen == [(seed, False) for seed in range(11)]
    assert (first.effect, second.effect, second.seeds) == (5.0, 1.0, 11)
    seen.clear()
    told: list[str] = []
    check(members, quick=True, tell=told.append)
    assert seen == [(0, True), (1, True)]
    assert told[-1] == "slug: first, seed 2 of 2"


@pytest.mark.parametrize("world", ["exact", "small"])
def test_a_full_run_takes_enough_seeds(world: str) -> None:
    claim = made(world=world)
    (outcome,) = check([claim])
    assert outcome.seeds == SEEDS[claim.world] >= LEAST_SEEDS[claim.world]
    with pytest.raises(UsageError, match=f"at least {LEAST_SEEDS[claim.world]} seeds, got --seeds 2; add --quick"):
        check([claim], seeds=2)
    assert check([claim], seeds=3, quick=True)[0].seeds == 3
    with pytest.raises(UsageError, match="must be at least 1, got 0"):
        check([claim], seeds=0, quick=True)

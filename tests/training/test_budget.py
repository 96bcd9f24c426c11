from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polopt.core.errors import UsageError
from polopt.training.budget import Budget, Every, Meter, Spent, parse_every, parse_seconds


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_first_limit_reached_ends_the_run() -> None:
    budget = Budget(steps=10, tokens=1000)
    assert not budget.exhausted(Spent(steps=9, tokens=999))
    assert budget.exhausted(Spent(steps=10, tokens=0))
    assert budget.exhausted(Spent(steps=1, tokens=1000))


def test_fraction_is_the_largest_share_and_never_above_one() -> None:
    budget = Budget(steps=10, seconds=100.0, rollouts=1000)
    assert budget.fraction(Spent(steps=2, seconds=50.0, rollouts=10)) == 0.5
    assert budget.fraction(Spent(steps=2, seconds=500.0)) == 1.0
    assert Budget(steps=0).fraction(Spent()) == 1.0


def test_a_budget_without_limits_never_ends() -> None:
    spent = Spent(10**9, 1e9, 10**12, 10**9)
    assert not Budget().exhausted(spent)
    assert Budget().fraction(spent) == 0.0


@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 20), st.integers(0, 20))
def test_exhausted_exactly_when_the_fraction_is_one(limit: int, tokens: int, steps: int, spent_tokens: int) -> None:
    budget, spent = Budget(steps=limit, tokens=tokens), Spent(steps=steps, tokens=spent_tokens)
    assert budget.exhausted(spent) == (budget.fraction(spent) == 1.0)


@pytest.mark.parametrize("limit", [-1, math.nan])
def test_an_impossible_budget_names_its_unit(limit: float) -> None:
    with pytest.raises(UsageError, match="seconds"):
        Budget(seconds=limit)


def test_seconds_accumulate_over_a_resume_without_the_pause() -> None:
    clock = Clock()
    meter = Meter(clock)
    meter.add(steps=1, tokens=7, rollouts=2)
    clock.now += 30
    state = meter.state_dict()
    clock.now += 5000
    resumed = Meter(clock)
    clock.now += 3
    resumed.load_state_dict(state)
    clock.now += 12
    resumed.add(steps=1, tokens=3)
    assert resumed.spent == Spent(steps=2, seconds=42.0, tokens=10, rollouts=2)


def test_the_clock_stands_still_in_a_pause_also_when_the_work_fails() -> None:
    clock = Clock()
    meter = Meter(clock)
    clock.now += 1
    with pytest.raises(KeyError), meter.paused():
        clock.now += 10
        with meter.paused():
            clock.now += 100
        clock.now += 1000
        meter.add(steps=3)
        assert meter.spent == Spent(steps=3, seconds=1.0)
        raise KeyError
    clock.now += 2
    assert meter.spent == Spent(steps=3, seconds=3.0)


@given(st.integers(1, 50), st.lists(st.integers(1, 60), max_size=60))
def test_a_trigger_fires_once_for_every_advance_that_crosses_a_multiple(interval: int, advances: list[int]) -> None:
    every, total = Every(interval, "tokens"), 0
    for advance in advances:
        crossed = any(token % interval == 0 for token in range(total + 1, total + advance + 1))
        total += advance
        assert every.due(Spent(tokens=total)) == crossed
        if crossed:
            every.done(Spent(tokens=total))
            assert not every.due(Spent(tokens=total))


def test_slow_work_on_a_clock_does_not_make_the_next_occasion_due_at_once() -> None:
    every = Every(60, "seconds")
    assert not every.due(Spent(seconds=59.9))
    assert every.due(Spent(seconds=60))
    every.done(Spent(seconds=130))
    assert not every.due(Spent(seconds=189))
    assert every.due(Spent(seconds=190))


def test_a_trigger_goes_on_after_a_resume() -> None:
    every = Every(25)
    every.done(Spent(steps=50))
    resumed = Every(25)
    assert resumed.due(Spent(steps=60))
    resumed.load_state_dict(every.state_dict())
    assert not resumed.due(Spent(steps=60))
    assert resumed.due(Spent(steps=75))


def test_a_state_of_another_unit_is_ignored() -> None:
    every = Every(60, "seconds")
    every.load_state_dict({"unit": "steps", "last": 1e6})
    assert every.due(Spent(seconds=60))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("25", Every(25, "steps")),
        ("25 steps", Every(25, "steps")),
        ("25s", Every(25, "seconds")),
        ("2m", Every(120, "seconds")),
        ("1.5h", Every(5400, "seconds")),
        ("100000tok", Every(100000, "tokens")),
        ("1e6 tokens", Every(1000000, "tokens")),
        ("5000rollouts", Every(5000, "rollouts")),
        ("never", Every(math.inf, "steps")),
    ],
)
def test_parse_every(text: str, expected: Every) -> None:
    assert parse_every(text) == expected


def test_never_is_never_due() -> None:
    assert not parse_every("never").due(Spent(10**12, 1e12, 10**12, 10**12))


@pytest.mark.parametrize("text", ["", "x", "-5", "0", "2.5", "1.5tok", "10 epochs", "5 5", "nan", "inf"])
def test_parse_every_rejects_what_it_cannot_read(text: str) -> None:
    with pytest.raises(UsageError):
        parse_every(text)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90.0), ("90s", 90.0), ("8m", 480.0), ("1.5h", 5400.0), ("1h 30m", 5400.0)]
)
def test_parse_seconds(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "-3s", "5tok", "1h30", "3 days", "ten"])
def test_parse_seconds_rejects_what_it_cannot_read(text: str) -> None:
    with pytest.raises(UsageError, match="duration"):
        parse_seconds(text)

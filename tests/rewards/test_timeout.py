"""Time limits: what they stop, and that they leave signals and timers as they found them."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from polopt.rewards.timeout import OutOfTime, call_with_timeout


@pytest.fixture(autouse=True)
def _alarm_is_put_back() -> Iterator[None]:
    def mine(number: int, frame: Any) -> None:
        raise AssertionError("the caller's alarm was triggered")

    earlier = signal.signal(signal.SIGALRM, mine)
    yield
    assert signal.getsignal(signal.SIGALRM) is mine
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    signal.signal(signal.SIGALRM, earlier)


def endless() -> None:
    while True:
        pass


def stubborn() -> None:
    while True:
        with contextlib.suppress(Exception):  # must not swallow the interrupt
            endless()


def very_stubborn() -> None:
    swallowed = 0
    while swallowed < 2:
        try:
            endless()
        except BaseException:
            swallowed += 1
    endless()


def backtracking() -> None:
    re.match(r"(a+)+$", "a" * 60 + "b")


def clears_the_alarm() -> None:
    earlier = signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(3)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, earlier)
    endless()


def sleeps() -> None:
    time.sleep(60)


def waits() -> None:
    asyncio.run(asyncio.sleep(60))


@pytest.mark.parametrize("function", [endless, stubborn, very_stubborn, backtracking, clears_the_alarm, sleeps, waits])
def test_stops_on_the_main_thread(function: Callable[[], None]) -> None:
    started = time.monotonic()
    with pytest.raises(OutOfTime, match=r"took longer than 0.1 s"):
        call_with_timeout(function, 0.1)
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("function", [endless, stubborn, sleeps])
def test_returns_on_other_threads(function: Callable[[], None]) -> None:
    caught: list[BaseException] = []

    def work() -> None:
        try:
            call_with_timeout(function, 0.1)
        except OutOfTime as error:
            caught.append(error)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(3)
    assert len(caught) == 1


def test_an_abandoned_loop_ends() -> None:
    def work() -> None:
        with pytest.raises(OutOfTime):
            call_with_timeout(endless, 0.05)

    before = set(threading.enumerate())
    worker = threading.Thread(target=work)
    worker.start()
    worker.join(3)
    deadline = time.monotonic() + 3
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before


@pytest.mark.parametrize("seconds", [None, 5.0])
def test_results_and_errors_pass_through(seconds: float | None) -> None:
    assert call_with_timeout(lambda: 7, seconds) == 7
    with pytest.raises(ZeroDivisionError):
        call_with_timeout(lambda: 1 // 0, seconds)
    results: list[Any] = []
    worker = threading.Thread(target=lambda: results.append(call_with_timeout(lambda: 7, seconds)))
    worker.start()
    worker.join(3)
    assert results == [7]


def test_calls_nest() -> None:
    def outer() -> str:
        with pytest.raises(OutOfTime, match=r"0.05"):
            call_with_timeout(endless, 0.05)
        endless()
        return "never"

    with pytest.raises(OutOfTime, match=r"0.3"):
        call_with_timeout(outer, 0.3)


def test_a_running_timer_keeps_the_time_it_has_left() -> None:
    rung: list[float] = []
    mine = signal.getsignal(signal.SIGALRM)
    signal.signal(signal.SIGALRM, lambda number, frame: rung.append(time.monotonic()))
    started = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, 0.4)
    call_with_timeout(lambda: time.sleep(0.1), 5.0)
    left, _ = signal.getitimer(signal.ITIMER_REAL)
    assert 0.1 < left <= 0.31
    time.sleep(left + 0.1)
    assert len(rung) == 1 and rung[0] - started >= 0.39
    signal.signal(signal.SIGALRM, mine)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_limits_that_are_none(seconds: float) -> None:
    with pytest.raises(ValueError, match="timeout must be a positive number of seconds"):
        call_with_timeout(lambda: None, seconds)


def test_many_short_limits_leave_nothing_behind() -> None:
    # Limits about as long as the call: the interrupt arrives at every point of setting up and taking down.
    for step in range(200):
        with contextlib.suppress(OutOfTime):
            call_with_timeout(lambda: sum(range(200)), 1e-6 * (1 + step))

"""A time limit on Python code that does not know about it."""

from __future__ import annotations

import ctypes
import math
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

Result = TypeVar("Result")

_REPEAT = 0.25
"""Seconds until an interrupt that something swallowed (a bare ``except``, a destructor) is repeated."""


class OutOfTime(TimeoutError):
    """The time limit of ``call_with_timeout`` was reached."""


class _Interrupt(BaseException):
    """Raised inside the code that overran; not an Exception, so that ``except Exception`` does not swallow it."""


def call_with_timeout(function: Callable[[], Result], seconds: float | None) -> Result:
    """``function()``, or ``OutOfTime`` after ``seconds`` of wall time; None is no limit.

    On the main thread the interval timer interrupts Python code, including a regular expression that backtracks
    without end, where it stands. An earlier SIGALRM handler and a running timer are put back, the timer with the time
    it has left, so calls nest. Code that sets and clears an alarm of its own loses the timer, and code may
    swallow the interrupt; a second clock on a thread then repeats it until the call ends.

    On other threads, and where there is no SIGALRM, signals cannot be used: ``function`` runs on a daemon thread, is
    abandoned at the limit, and is stopped at its next Python instruction.

    In both cases a single call into C that never returns to Python (and, on the main thread, does not check for
    signals) cannot be interrupted; only the second case returns from it.

    Raises:
        OutOfTime: the limit was reached.
        ValueError: ``seconds`` is not a positive number.
    """
    if seconds is None:
        return function()
    if not (seconds > 0 and math.isfinite(seconds)):
        raise ValueError(f"timeout must be a positive number of seconds, but is {seconds}")
    if hasattr(signal, "SIGALRM") and threading.current_thread() is threading.main_thread():
        return _call_with_alarm(function, seconds)
    return _call_on_thread(function, seconds)


def _call_with_alarm(function: Callable[[], Result], seconds: float) -> Result:
    running = False  # whether an interrupt would hit the function and not the machinery around it
    done = threading.Event()
    restoring = threading.Lock()
    main = threading.get_ident()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if running:
            raise _Interrupt

    def second_clock() -> None:
        delay = seconds + _REPEAT / 2
        while not done.wait(delay):
            delay = _REPEAT
            with restoring:
                # Another handler is not ours to trigger: the default one would end the process.
                if not done.is_set() and signal.getsignal(signal.SIGALRM) is interrupt:
                    signal.pthread_kill(main, signal.SIGALRM)

    started = time.monotonic()
    earlier = signal.getsignal(signal.SIGALRM)
    earlier_delay, earlier_interval = signal.getitimer(signal.ITIMER_REAL)
    try:
        try:
            signal.signal(signal.SIGALRM, interrupt)
            threading.Thread(target=second_clock, daemon=True).start()
            signal.setitimer(signal.ITIMER_REAL, seconds)
            running = True
            return function()
        finally:
            running = False
    except _Interrupt:
        raise OutOfTime(f"took longer than {seconds:g} s") from None
    finally:
        running = False  # again: an interrupt may have cut the first off
        done.set()
        with restoring:
            signal.setitimer(signal.ITIMER_REAL, 0)
            # None is a handler that Python did not install and cannot put back.
            signal.signal(signal.SIGALRM, signal.SIG_DFL if earlier is None else earlier)
        if earlier_delay:
            left = earlier_delay - (time.monotonic() - started)
            signal.setitimer(signal.ITIMER_REAL, max(left, 1e-3), earlier_interval)


def _call_on_thread(function: Callable[[], Result], seconds: float) -> Result:
    outcome: list[tuple[bool, Any]] = []

    def work() -> None:
        try:
            outcome.append((True, function()))
        except BaseException as error:  # raised again in the caller
            outcome.append((False, error))

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(seconds)
    if not outcome:
        if worker.ident is not None:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(worker.ident), ctypes.py_object(_Interrupt))
        raise OutOfTime(f"took longer than {seconds:g} s")
    succeeded, value = outcome[0]
    if not succeeded:
        raise value
    result: Result = value
    return result

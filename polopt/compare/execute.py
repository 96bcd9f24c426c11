"""Carry out a plan: results from the cache where there are some, the other runs in processes of their own."""

from __future__ import annotations

import math
import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import connection
from typing import Any, Final

from polopt.compare.cache import Cache, Key, key_of
from polopt.compare.plan import Job, Plan
from polopt.compare.runs import run
from polopt.core.errors import UsageError

Result = Mapping[str, Any]
Where = tuple[str, str]
"""Labels of a contender and a world."""
LOOKED_AT: Final = 0.5
"""Seconds between two looks at how far the runs are."""


@dataclass(frozen=True)
class Progress:
    """How far the runs are that the cache did not know: ``done`` of ``total``, and the ``fraction`` of their work."""

    done: int
    total: int
    fraction: float
    seconds: float
    latest: str = ""

    @property
    def left(self) -> float:
        """Seconds still to go at the pace so far; NaN before there is one."""
        return self.seconds * (1 - self.fraction) / self.fraction if self.fraction > 0 else math.nan


Tell = Callable[[Progress], None]


@dataclass(frozen=True)
class Comparison:
    """What a plan gave: results by contender and world, one per seed.

    ``rates`` are the learning rates that were trained with, ``trials`` the final scores behind their choice, where they
    were tuned. ``ran`` runs were carried out in ``seconds``, ``reused`` came from the cache.
    """

    plan: Plan
    results: Mapping[Where, Sequence[Result]]
    rates: Mapping[Where, float]
    trials: Mapping[Where, Mapping[float, Sequence[float]]] = field(default_factory=dict)
    ran: int = 0
    reused: int = 0
    seconds: float = 0.0


def compare(
    plan: Plan,
    cache: Cache,
    *,
    workers: int = 1,
    threads: int | None = None,
    tell: Tell = lambda progress: None,
) -> Comparison:
    """Carry out a plan. Every finished run is kept at once, so that a plan that is stopped goes on where it was.

    The learning rate of a contender in a world is the one with the highest mean final score over the trials' seeds, the
    smaller of two that are equal. Raises UsageError for what cannot be run, before the other runs start.
    """
    started = time.monotonic()
    ran = reused = 0
    trials: dict[Where, dict[float, list[float]]] = {}
    wanted = plan.trials()
    if wanted:
        every = [job for rates in wanted.values() for jobs in rates.values() for job in jobs]
        found, ran, reused = execute(every, cache, workers=workers, threads=threads, tell=tell)
        scores = iter([final_score(result) for result in found])
        trials = {
            where: {rate: [next(scores) for _ in jobs] for rate, jobs in rates.items()}
            for where, rates in wanted.items()
        }
    rates = {where: choose(tried) for where, tried in trials.items()}
    jobs = plan.jobs(rates)
    found, more, again = execute(
        [job for members in jobs.values() for job in members], cache, workers=workers, threads=threads, tell=tell
    )
    results = iter(found)
    return Comparison(
        plan,
        {where: [next(results) for _ in members] for where, members in jobs.items()},
        {where: float(members[0].config.lr or math.nan) for where, members in jobs.items()},
        trials,
        ran + more,
        reused + again,
        time.monotonic() - started,
    )


def choose(tried: Mapping[float, Sequence[float]]) -> float:
    """The rate with the highest mean score; a trial that could not be measured counts as the lowest."""
    means = {rate: statistics.fmean(scores) for rate, scores in tried.items()}
    return max(sorted(means), key=lambda rate: -math.inf if math.isnan(means[rate]) else means[rate])


def final_score(result: Result) -> float:
    """Held-out score when the budget was spent."""
    return float(result["points"][-1]["score"])


def execute(
    jobs: Sequence[Job],
    cache: Cache,
    *,
    workers: int = 1,
    threads: int | None = None,
    tell: Tell = lambda progress: None,
) -> tuple[list[Result], int, int]:
    """Results in the order of the jobs, how many runs were carried out, and how many jobs the cache knew.

    Equal jobs are run once. With several workers each run has ``threads`` threads, 1 when left out.
    """
    keys = [key_of(job) for job in jobs]
    known: dict[Key, Result] = {}
    missing: dict[Key, Job] = {}
    for key, job in zip(keys, jobs, strict=True):
        if key in known or key in missing:
            continue
        if (result := cache.get(key)) is None:
            missing[key] = job
        else:
            known[key] = result
    reused = sum(key in known for key in keys)

    def keep(key: Key, result: Result) -> None:
        cache.put(key, missing[key], result)
        known[key] = result

    if missing:
        if workers > 1 and len(missing) > 1:
            _in_processes(missing, keep, min(workers, len(missing)), threads or 1, tell)
        else:
            _one_by_one(missing, keep, threads, tell)
    return [known[key] for key in keys], len(missing), reused


def _one_by_one(
    missing: Mapping[Key, Job], keep: Callable[[Key, Result], None], threads: int | None, tell: Tell
) -> None:
    import torch

    before = torch.get_num_threads()
    started = time.monotonic()
    total = len(missing)
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        for index, (key, job) in enumerate(missing.items()):

            def heard(part: float, done: int = index, name: str = job.name) -> None:
                tell(Progress(done, total, (done + part) / total, time.monotonic() - started, name))

            heard(0.0)
            keep(key, run(job, heard))
        tell(Progress(total, total, 1.0, time.monotonic() - started))
    finally:
        torch.set_num_threads(before)


# --- several at a time --------------------------------------------------------------------------------------------

_parts: Any = None
"""In a worker: what part of each run is done, shared with the process that waits."""


def _in_processes(
    missing: Mapping[Key, Job], keep: Callable[[Key, Result], None], workers: int, threads: int, tell: Tell
) -> None:
    context = multiprocessing.get_context("spawn")
    parts = context.Array("d", len(missing))
    started = time.monotonic()
    latest = ""
    executor = ProcessPoolExecutor(workers, context, _begin, (parts, threads))
    try:
        waiting: dict[Future[Result], Key] = {
            executor.submit(_work, place, job): key for place, (key, job) in enumerate(missing.items())
        }
        place_of = {key: place for place, key in enumerate(missing)}
        pending = set(waiting)
        while pending:
            finished, pending = wait(pending, timeout=LOOKED_AT, return_when="FIRST_COMPLETED")
            for future in finished:
                key = waiting[future]
                try:
                    keep(key, future.result())
                except BrokenProcessPool:
                    raise RuntimeError(
                        f"a process that carried out a run has died, perhaps for want of memory ({missing[key].name}); "
                        f"try fewer --jobs; what is finished is kept"
                    ) from None
                latest = missing[key].name
                parts[place_of[key]] = 1.0
            done = len(missing) - len(pending)
            tell(Progress(done, len(missing), sum(parts[:]) / len(missing), time.monotonic() - started, latest))
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def _begin(parts: Any, threads: int) -> None:
    """Set a worker up: its threads, quiet libraries, and an end when the process that waits for it ends."""
    import torch
    from transformers.utils import logging

    global _parts
    _parts = parts
    torch.set_num_threads(threads)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    parent = multiprocessing.parent_process()
    if parent is not None:
        sentinel = parent.sentinel

        def watch() -> None:
            connection.wait([sentinel])
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()


def _work(place: int, job: Job) -> Result:
    def heard(part: float) -> None:
        _parts[place] = part

    try:
        return run(job, heard)
    except UsageError as error:
        raise UsageError(f"{job.name}: {error}") from None

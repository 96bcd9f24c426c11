from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from polopt.compare import execute as module
from polopt.compare.cache import Cache
from polopt.compare.execute import Progress, choose, compare, execute
from polopt.compare.plan import Job
from polopt.core.errors import UsageError
from tests.compare.worlds import exact_job, exact_plan, result


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs that are carried out, each with a result that tells its seed."""
    jobs: list[Job] = []

    def fake(job: Job, tell: Callable[[float], None]) -> dict[str, Any]:
        jobs.append(job)
        tell(0.5)
        return result((0.0, job.config.seed + 100 * (job.config.lr or 0)), (0, 8))

    monkeypatch.setattr(module, "run", fake)
    return jobs


def test_only_what_is_new_runs(tmp_path: Path, ran: list[Job]) -> None:
    cache = Cache(tmp_path)
    first = compare(exact_plan("grpo", "gspo", seeds=3), cache)
    assert (first.ran, first.reused, len(ran)) == (6, 0, 6)
    again = compare(exact_plan("grpo", "gspo", seeds=3), cache)
    assert (again.ran, again.reused, len(ran)) == (0, 6, 6)
    assert again.results == first.results
    more = compare(exact_plan("grpo", "rloo", "gspo", seeds=4), cache)
    assert (more.ran, more.reused) == (6, 6)
    assert [(job.config.method, job.config.seed) for job in ran[6:]] == [
        ("grpo", 3),
        *(("rloo", seed) for seed in range(4)),
        ("gspo", 3),
    ]
    assert [r["points"][-1]["score"] for r in more.results["rloo", "sparse-rewards"]] == [3.0, 4.0, 5.0, 6.0]


def test_a_comparison_that_was_stopped_goes_on(tmp_path: Path, ran: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    fake = module.run

    def stopped(job: Job, tell: Callable[[float], None]) -> Any:
        if len(ran) == 3:
            raise KeyboardInterrupt
        return fake(job, tell)

    monkeypatch.setattr(module, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        compare(exact_plan("grpo", "gspo", seeds=3), Cache(tmp_path))
    assert len(ran) == 3 and len(list(tmp_path.iterdir())) == 3
    monkeypatch.setattr(module, "run", fake)
    done = compare(exact_plan("grpo", "gspo", seeds=3), Cache(tmp_path))
    assert (done.ran, done.reused) == (3, 3)
    assert [job.config.method for job in ran[3:]] == ["gspo"] * 3


def test_equal_jobs_run_once(tmp_path: Path, ran: list[Job]) -> None:
    jobs = [exact_job("grpo"), exact_job("grpo+objective.high=0.2"), exact_job("grpo", seed=1)]
    results, count, reused = execute(jobs, Cache(tmp_path))
    assert (len(ran), count, reused) == (2, 2, 0)
    assert results[0] == results[1] != results[2]


def test_the_best_learning_rate_of_each_contender_is_used(tmp_path: Path, ran: list[Job]) -> None:
    done = compare(exact_plan("grpo", "gspo", tune=(0.5, 0.1, 0.3)), Cache(tmp_path))
    trials = [job for job in ran if job.tuning]
    assert len(trials) == 2 * 3 * 2 and len(ran) == len(trials) + 4
    assert {job.config.seed for job in trials}.isdisjoint(job.config.seed for job in ran if not job.tuning)
    assert done.rates == {("grpo", "sparse-rewards"): 0.5, ("gspo", "sparse-rewards"): 0.5}
    assert all(job.config.lr == 0.5 for job in ran if not job.tuning)
    assert done.trials["gspo", "sparse-rewards"].keys() == {0.5, 0.1, 0.3}


def test_choice_of_a_rate() -> None:
    assert choose({0.1: [0.2, 0.4], 0.3: [0.5, 0.5], 1.0: [0.0, 0.9]}) == 0.3
    assert choose({0.3: [0.5], 0.1: [0.5]}) == 0.1
    assert choose({0.1: [0.2], 0.3: [math.nan]}) == 0.1


def test_progress_is_told_with_the_time_left(tmp_path: Path, ran: list[Job]) -> None:
    told: list[Progress] = []
    compare(exact_plan("grpo", seeds=2), Cache(tmp_path), tell=told.append)
    assert [(p.done, p.fraction) for p in told] == [(0, 0.0), (0, 0.25), (1, 0.5), (1, 0.75), (2, 1.0)]
    assert math.isnan(told[0].left) and told[-1].left == 0.0
    assert Progress(1, 4, 0.25, 10.0).left == pytest.approx(30.0)
    assert told[2].latest == "grpo on sparse-rewards, seed 1"


def test_processes_give_what_one_process_gives(tmp_path: Path) -> None:
    plan = exact_plan("grpo", "gspo", seeds=1)
    told: list[Progress] = []
    several = compare(plan, Cache(tmp_path / "several"), workers=2, tell=told.append)
    one = compare(plan, Cache(tmp_path / "one"), threads=1)
    for where, results in one.results.items():
        for a, b in zip(results, several.results[where], strict=True):
            assert [p["score"] for p in a["points"]] == [p["score"] for p in b["points"]]
    assert told[-1].done == 2 and told[-1].fraction == 1.0
    assert several.results["grpo", "sparse-rewards"][0]["threads"] == 1


def test_what_cannot_run_is_said_by_a_worker_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_parts", [0.0])
    with pytest.raises(UsageError, match=r"grpo on sparse-rewards, seed 0: .* needs column 'nothing'"):
        module._work(0, exact_job("grpo+filter=dynamic-sampling+filter.column=nothing"))

"""Batches that train some updates after they were sampled: exact ages, what is counted, checks, checkpoints."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from polopt.claims.exact import start
from polopt.compare.plan import Plan, make_worlds, parse_contender
from polopt.compare.runs import run as run_job
from polopt.core.errors import UsageError
from polopt.core.method import Schedule
from polopt.core.policy import START
from polopt.core.rollout import Rollout
from polopt.methods import get_method
from polopt.tasks.problems import problem
from polopt.training.budget import Budget
from polopt.training.build import check_needs
from polopt.training.checkpoint import latest_checkpoint
from polopt.training.collect import Collected
from polopt.training.config import RunConfig
from polopt.training.profile import Profiler
from polopt.training.run import train
from polopt.training.update import evaluate_columns
from tests.support import f64, same
from tests.training.conftest import (
    EVEN,
    CountingPolicy,
    collected,
    make_collector,
    make_step,
    make_tiny,
    make_trainer,
    nudge,
    short,
)


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing the curves takes longer than such a run."""
    monkeypatch.setattr("polopt.training.report.plot_curves", lambda *a, **k: None)


def watched(trainer: Any) -> list[tuple[Collected, int]]:
    """Every batch that is handed out, and the policy's version then."""
    collect, seen = trainer.collect, []

    def handed(*given: Any) -> Collected:
        batch: Collected = collect(*given)
        seen.append((batch, trainer.policy.version))
        return batch

    trainer.collect = handed
    return seen


def exact_run(stale: int, updates: int = 1, slug: str = "grpo", **options: Any) -> Any:
    method = get_method(slug) | {"schedule": Schedule(epochs=updates)}
    made = problem("multi-step", batch=4, seed=0)
    return start(made, method, seed=0, group=8, stale=stale, **options)


@pytest.mark.parametrize(
    ("stale", "updates", "ages"),
    [
        (0, 1, [0] * 6),
        (3, 1, [0, 1, 2, 3, 3, 3]),
        (4, 2, [0, 2, 4, 4, 4, 4]),  # two batches ahead
        (3, 2, [0, 2, 4, 4, 4, 4]),  # whole batches: at least 3
        (1, 4, [0, 4, 4, 4, 4, 4]),
    ],
)
def test_the_age_of_a_batch_in_updates(stale: int, updates: int, ages: list[int]) -> None:
    run = exact_run(stale, updates)
    seen = watched(run.trainer)
    for _ in range(6):
        run.step()
    found = [set((version - batch.kept["version"]).tolist()) for batch, version in seen if batch.kept is not None]
    assert found == [{age} for age in ages]
    assert run.metrics["policy/age_mean"] == run.metrics["policy/age_max"] == ages[-1]


def test_a_stale_batch_is_the_one_that_the_older_policy_sampled() -> None:
    """Batch j holds the log-probs of version max(0, j - 2), whatever has happened since."""
    run = exact_run(2)
    seen, logits = watched(run.trainer), []
    for _ in range(5):
        logits.append(run.policy.logits.detach().clone())
        run.step()
    live = run.policy.logits.detach().clone()
    for index, (batch, _) in enumerate(seen):
        with torch.no_grad():
            run.policy.logits.copy_(logits[max(0, index - 2)])
            assert batch.kept is not None
            same(batch.kept.logp, run.policy.evaluate(batch.kept, frozenset({"logp"})).logp)
    with torch.no_grad():
        run.policy.logits.copy_(live)
    assert not torch.equal(logits[0], logits[2])


def test_masked_log_probs_of_half_precision_are_those_of_sampling(policy: CountingPolicy) -> None:
    """The learner's own, under the weights that sampled: as old as the batch, or its ratio would be 1 at any age."""
    policy.dtype = torch.bfloat16
    method, generator = short("nlpo"), torch.Generator().manual_seed(0)
    check_needs(method, policy, (EVEN,))
    collector = make_collector(policy, stale=1)
    collector(method, generator)
    waiting = collector.in_flight[0].kept
    assert waiting is not None
    nothing = Profiler(enabled=False)
    then = evaluate_columns(policy, waiting, frozenset({"masked_logp"}), 10_000, nothing)["masked_logp"]
    nudge(policy)
    batch = collector(method, generator).kept
    assert batch is not None and torch.equal(batch["masked_logp"], then)
    now = evaluate_columns(policy, batch, frozenset({"masked_logp"}), 10_000, nothing)["masked_logp"]
    assert float((now - then).abs().max()) > 0.01


def test_batches_come_in_the_order_of_sampling_and_none_is_lost() -> None:
    fresh, late = exact_run(0), exact_run(3)
    first, seen = watched(fresh.trainer), watched(late.trainer)
    for _ in range(4):
        fresh.step()
        late.step()
    # The first four are of the initial policy; the very first batch is that of an ordinary run.
    assert torch.equal(first[0][0].drawn["action"], seen[0][0].drawn["action"])
    actions = [batch.drawn["action"] for batch, _ in seen]
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(actions))
    assert len(late.trainer._in_flight) == 3


def test_what_is_sampled_ahead_is_counted_when_it_is_sampled() -> None:
    run = exact_run(3)
    rollouts = []
    for _ in range(3):
        run.step()
        rollouts.append(run.trainer.meter.spent.rollouts)
    assert rollouts == [4 * 32, 5 * 32, 6 * 32]
    assert run.trainer.meter.spent.steps == 3


def test_without_staleness_nothing_is_kept() -> None:
    run = exact_run(0)
    run.step()
    assert run.trainer._in_flight == [] and run.trainer.meter.spent.rollouts == 32


def test_more_staleness_is_more_distance_from_the_sampler() -> None:
    found = []
    for stale in (0, 4, 12):
        run = exact_run(stale)
        for _ in range(20):
            run.step()
        found.append(run.metrics["policy/kl_to_sampler"])
    assert found[0] == pytest.approx(0.0, abs=1e-9) and found[0] < found[1] < found[2]


def test_the_columns_of_the_credit_are_those_of_the_policy_that_learns() -> None:
    """A critic's values are of the weights at learning, the log-probs of those at sampling."""
    run = exact_run(3, slug="ppo")
    seen = watched(run.trainer)
    values = []
    for _ in range(5):
        version = run.policy.version
        run.step()
        batch = seen[-1][0].kept
        assert batch is not None and version == seen[-1][1]
        values.append(batch["value"].abs().max())
    # The critic starts at 0: the batches of the initial policy would all have value 0.
    assert values[0] == 0 and all(value > 0 for value in values[1:])


# --- checks -----------------------------------------------------------------------------------------------------------


def test_strict_runs_on_stale_data_and_checks_the_first_update_where_it_can(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, short("grpo"), budget=Budget(steps=4), strict=True, tolerance=1e-4)
    object.__setattr__(trainer.collect, "stale", 2)
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "reward" in line]
    assert [line["policy/age_max"] for line in lines] == [0, 1, 2, 2]
    # A ratio to another policy's log-probs is no rounding error.
    assert ["policy/first_update_gap" in line for line in lines] == [True, False, False, False]
    assert lines[0]["policy/logp_difference_mean"] < 1e-5 < 1e-4 < lines[3]["policy/logp_difference_mean"]


def test_the_first_update_is_checked_on_what_is_fresh_in_a_mixed_batch(policy: CountingPolicy) -> None:
    method = short("grpo")
    old = collected(method, policy)
    nudge(policy)
    new = collected(method, policy, seed=1)
    step = make_step(policy, method, Rollout.concat([old, new]), 10_000)
    step.gradient()
    assert step.first is not None and 0 < step.first.steps < step.ratios.steps
    assert step.first.gap / step.first.steps < 1e-5 < 1e-4 < step.ratios.gap / step.ratios.steps
    stale = make_step(policy, method, old, 10_000)
    stale.gradient()
    assert stale.first is None and not stale.reused


def test_the_log_prob_at_the_start_of_learning(policy: CountingPolicy) -> None:
    method = short("grpo")
    old = collected(method, policy)
    nudge(policy)
    batch = Rollout.concat([old, collected(method, policy, seed=1)])
    policy.calls.clear()
    found = evaluate_columns(policy, batch, frozenset({START, "entropy"}), 10_000, Profiler(enabled=False))
    with torch.no_grad():
        expected = policy.evaluate(batch, frozenset({"logp"})).logp
    torch.testing.assert_close(found[START], expected, rtol=1e-4, atol=1e-5)
    assert float((found[START] - batch.logp).abs().max()) > 1e-3
    torch.testing.assert_close(found.logp, batch.logp, rtol=0, atol=0)
    # Only what other weights sampled went through the policy for it.
    asked = [call.rows for call in policy.calls if call.names == {"logp"}][:-1]
    assert sum(asked) == old.n_trajectories


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_a_resumed_stale_run_is_the_run_that_was_not_stopped(small_run: Any, tmp_path: Path) -> None:
    options = {"method": "ppo", "save_every": "1", "stale": 3}
    train(small_run(tmp_path / "whole", steps=6, **options), quiet=True)
    train(small_run(tmp_path / "parts", steps=2, **options), quiet=True)
    train(small_run(tmp_path / "parts", steps=6, **options), resume=True, quiet=True)
    assert (tmp_path / "parts" / "log.jsonl").read_bytes() == (tmp_path / "whole" / "log.jsonl").read_bytes()
    weights = [(tmp_path / run / "model" / "model.safetensors").read_bytes() for run in ("whole", "parts")]
    assert weights[0] == weights[1]


def test_the_queue_is_in_the_checkpoint(tmp_path: Path) -> None:
    first = make_trainer(tmp_path / "a", short("grpo"), budget=Budget(steps=1))
    object.__setattr__(first.collect, "stale", 2)
    first.train()
    second = make_trainer(tmp_path / "b", short("grpo"), make_tiny(1))
    for name in ("log", "timing", "text"):
        (tmp_path / "b" / f"{name}.jsonl").write_bytes((tmp_path / "a" / f"{name}.jsonl").read_bytes())
    second.resume(latest_checkpoint(tmp_path / "a"))  # type: ignore[arg-type]
    assert len(first._in_flight) == len(second._in_flight) == 2
    for saved, restored in zip(first._in_flight, second._in_flight, strict=True):
        assert torch.equal(saved.drawn["action"], restored.drawn["action"])
        assert saved.kept is not None and restored.kept is not None
        assert set(saved.kept.names()) == set(restored.kept.names())
        assert torch.equal(saved.kept.logp, restored.kept.logp)
        assert saved.invalid == restored.invalid


def test_a_resumed_run_replays_what_it_would_have(small_run: Any, tmp_path: Path) -> None:
    slots = {"rollout": "replay", "rollout.share": 0.5}
    options = {"save_every": "1", "prompts": 4, "stale": 1}
    train(small_run(tmp_path / "whole", slots, steps=5, **options), quiet=True)
    train(small_run(tmp_path / "parts", slots, steps=2, **options), quiet=True)
    train(small_run(tmp_path / "parts", slots, steps=5, **options), resume=True, quiet=True)
    assert (tmp_path / "parts" / "log.jsonl").read_bytes() == (tmp_path / "whole" / "log.jsonl").read_bytes()
    ages = [json.loads(line).get("policy/age_max", 0) for line in (tmp_path / "whole" / "log.jsonl").open()]
    assert max(ages) > 1


# --- settings ---------------------------------------------------------------------------------------------------------


def test_staleness_is_a_whole_number_of_updates() -> None:
    assert RunConfig(stale=3).as_dict()["stale"] == 3
    with pytest.raises(UsageError, match="--stale must be at least 0, got -1"):
        RunConfig(stale=-1)


def test_a_comparison_has_a_world_for_every_staleness() -> None:
    contenders = (parse_contender("grpo"),)
    worlds = make_worlds((), ("multi-step",), None, contenders, (0, 8))
    assert [(w.label, w.place, w.stale) for w in worlds] == [
        ("multi-step stale 0", "multi-step", 0),
        ("multi-step stale 8", "multi-step", 8),
    ]
    plan = Plan(contenders, worlds, "steps", 10, seeds=1, points=2, settings={"prompts": 2, "group": 4})
    jobs = [members[0] for members in plan.jobs({}).values()]
    assert [job.config.stale for job in jobs] == [0, 8]
    fresh, late = (run_job(job) for job in jobs)
    assert [result["points"][-1]["rollouts"] for result in (fresh, late)] == [10 * 8, 18 * 8]
    assert fresh["points"][-1]["score"] != late["points"][-1]["score"]
    with pytest.raises(UsageError, match="named twice"):
        Plan(contenders, make_worlds((), ("multi-step",), None, contenders, (4, 4)), "steps", 10)


def test_the_figure_shows_the_score_against_staleness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from polopt.compare import figure
    from polopt.compare.cache import Cache
    from polopt.compare.execute import compare, final_score
    from polopt.compare.report import make_report

    contenders = (parse_contender("grpo"), parse_contender("rloo"))
    worlds = make_worlds((), ("multi-step",), None, contenders, (4, 0))
    plan = Plan(contenders, worlds, "steps", 3, seeds=2, points=1, settings={"prompts": 2, "group": 4})
    comparison = compare(plan, Cache(tmp_path / "cache"))
    drawn: dict[str, Any] = {}
    dress = figure.dress

    def noting(axis: Any, title: str) -> None:
        drawn[title] = axis
        dress(axis, title)

    monkeypatch.setattr(figure, "dress", noting)
    figure.plot_report(make_report(comparison), "title", tmp_path / "a.png")
    axis = drawn["Final score against staleness: multi-step"]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0", "4"]
    courses = [line for line in axis.lines if line.get_marker() == "o"]
    for line, contender in zip(courses, contenders, strict=True):
        expected = [
            sum(map(final_score, comparison.results[contender.label, f"multi-step stale {k}"])) / 2 for k in (0, 4)
        ]
        same(f64(line.get_ydata()), expected)

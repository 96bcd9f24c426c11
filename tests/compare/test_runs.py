from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from polopt.compare.leaderboard import fitting
from polopt.compare.plan import Plan, make_worlds, parse_contender
from polopt.compare.runs import run
from polopt.core.errors import UsageError
from polopt.core.policy import Request
from polopt.core.rollout import Rollout
from polopt.policies.exact import ExactPolicy
from polopt.tasks.problems import problem
from tests.compare.worlds import exact_job


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, tuple[str, ...]]]:
    """Seed and prompts of everything that is sampled."""
    seen: list[tuple[int, tuple[str, ...]]] = []
    sample = ExactPolicy.sample

    def spied(self: ExactPolicy, requests: Sequence[Request], *args: Any, seed: int, **more: Any) -> Rollout:
        seen.append((seed, tuple(request.example.id for request in requests)))
        return sample(self, requests, *args, seed=seed, **more)

    monkeypatch.setattr(ExactPolicy, "sample", spied)
    return seen


def stream(seen: list[tuple[int, tuple[str, ...]]], contender: str, **more: Any) -> tuple[list[int], list[str]]:
    """Sampling seeds and prompts of a run that draws 3 of its 8 prompts per iteration."""
    seen.clear()
    run(exact_job(contender, settings={"prompts": 3}, rollouts=240, **more))
    return [seed for seed, _ in seen], [name for _, names in seen for name in names]


# Minibatches and epochs draw random numbers too: as many as the method likes.
@pytest.mark.parametrize("other", ["rloo", "gspo", "grpo+schedule.minibatches=3+schedule.epochs=2"])
def test_runs_of_one_seed_draw_the_same_prompts_with_the_same_random_numbers(
    drawn: list[tuple[int, tuple[str, ...]]], other: str
) -> None:
    seeds, prompts = stream(drawn, "grpo")
    assert len(seeds) == 10 and len(set(seeds)) == 10
    assert stream(drawn, other) == (seeds, prompts)
    assert stream(drawn, "grpo", seed=1)[1] != prompts


def test_a_filter_that_refills_takes_further_prompts_of_the_same_order(
    drawn: list[tuple[int, tuple[str, ...]]],
) -> None:
    _, prompts = stream(drawn, "grpo")
    _, refilled = stream(drawn, "gspo+filter=dynamic-sampling")
    shared = min(len(prompts), len(refilled))
    # Over several epochs of the 8 prompts.
    assert shared > 24 and refilled[:shared] == prompts[:shared]


def test_every_contender_starts_at_the_same_policy_and_seeds_are_other_problems() -> None:
    starts = [run(exact_job(name, seed=3))["points"][0]["score"] for name in ("grpo", "dapo", "ppo")]
    assert starts[0] == starts[1] == starts[2]
    assert run(exact_job("grpo", seed=4))["points"][0]["score"] != starts[0]


def test_the_score_is_the_expected_reward() -> None:
    made = problem("sparse-rewards", batch=8, seed=0)
    chance = made.policy().probabilities().detach().numpy()
    expected = np.mean([p @ r for p, r in zip(chance, made.reward.numpy(), strict=True)])
    assert run(exact_job())["points"][0]["score"] == pytest.approx(expected)


def test_a_run_is_measured_evenly_until_its_budget_is_spent() -> None:
    told: list[float] = []
    found = run(exact_job(rollouts=640, points=4), told.append)
    assert [p["rollouts"] for p in found["points"]] == [0, 192, 320, 512, 640]
    assert [p["fraction"] for p in found["points"]] == pytest.approx([0, 0.3, 0.5, 0.8, 1.0])
    assert len(found["training"]["reward"]) == 10 and found["training"]["rollouts"][-1] == 640
    assert told == pytest.approx([i / 10 for i in range(1, 11)])
    assert found["points"][-1]["score"] > found["points"][0]["score"]


def test_more_points_than_iterations_measure_every_iteration() -> None:
    assert [p["steps"] for p in run(exact_job(rollouts=128, points=50))["points"]] == [0, 1, 2]


def test_a_run_is_a_function_of_its_seed() -> None:
    assert run(exact_job())["points"][-1]["score"] == run(exact_job())["points"][-1]["score"]


@pytest.mark.parametrize("unit", ["steps", "tokens"])
def test_other_budgets(unit: str) -> None:
    plan = Plan((parse_contender("grpo"),), make_worlds((), ("sparse-rewards",), None), unit, 300, points=1)  # type: ignore[arg-type]
    limit = 300 if unit == "tokens" else 3
    job = Plan(plan.contenders, plan.worlds, plan.unit, limit, points=1).job(
        plan.contenders[0], plan.worlds[0], 0, None
    )
    last = run(job)["points"][-1]
    assert limit <= last[unit] < limit + 128


def test_a_method_that_cannot_run_in_its_world_is_said() -> None:
    with pytest.raises(UsageError, match="needs column"):
        run(exact_job("grpo+filter=dynamic-sampling+filter.column=nothing"))


def test_a_language_model_is_judged_on_other_prompts_when_its_learning_rate_is_tuned() -> None:
    plan = Plan(
        (parse_contender("grpo"),),
        make_worlds(("arithmetic",), (), None),
        "rollouts",
        8,
        points=1,
        settings={"prompts": 2, "group": 4, "eval_prompts": 24},
    )
    judged, tuned = (run(plan.job(plan.contenders[0], plan.worlds[0], 0, None, tuning=t)) for t in (False, True))
    assert [p["rollouts"] for p in judged["points"]] == [0, 8]
    assert 0 <= judged["points"][-1]["score"] <= 1
    assert judged["points"][0]["length"] != tuned["points"][0]["length"]
    assert judged["training"]["reward"] == tuned["training"]["reward"]


@pytest.mark.parametrize("contender", [*fitting()[0], "gepo"])
def test_every_contender_of_the_leaderboard_runs(contender: str) -> None:
    found = run(exact_job(contender, settings={"prompts": 2}, rollouts=16))
    assert 0 <= found["points"][-1]["score"] <= 1

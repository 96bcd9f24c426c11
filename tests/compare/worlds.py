"""Plans that take milliseconds, and results made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from polopt.compare.execute import Comparison
from polopt.compare.plan import Job, Plan, make_worlds, parse_contender


def exact_plan(
    *contenders: str, rollouts: int = 128, problems: Sequence[str] = ("sparse-rewards",), **more: Any
) -> Plan:
    worlds = make_worlds((), problems, None)
    options = {"seeds": 2, "points": 2, **more}
    return Plan(tuple(map(parse_contender, contenders)), worlds, "rollouts", rollouts, **options)


def exact_job(contender: str = "grpo", *, seed: int = 0, problem: str = "sparse-rewards", **more: Any) -> Job:
    plan = exact_plan(contender, problems=(problem,), **more)
    return plan.job(plan.contenders[0], plan.worlds[0], seed, plan.lr)


def result(scores: Sequence[float], rollouts: Sequence[float]) -> dict[str, Any]:
    """A run with these held-out scores after these numbers of rollouts."""
    points = [
        {
            "fraction": i / max(len(scores) - 1, 1),
            "steps": float(i),
            "seconds": 2.0 * i,
            "tokens": 3.0 * x,
            "rollouts": float(x),
            "score": score,
            "entropy": 1.0 - 0.1 * i,
            "length": 4.0,
        }
        for i, (x, score) in enumerate(zip(rollouts, scores, strict=True))
    ]
    training = {"rollouts": [10.0], "reward": [0.5], "entropy": [1.0], "length": [4.0], "step_time": [0.25]}
    return {"points": points, "training": training, "rejected": 0, "seconds": 3.0, "threads": 1}


def comparison(plan: Plan, finals: dict[str, Sequence[float]]) -> Comparison:
    """Every run rises straight from 0.2 to the final score of its contender and seed, in every world."""
    return Comparison(
        plan,
        {
            (label, w.label): [result((0.2, (0.2 + final) / 2, final), (0, 64, 128)) for final in scores]
            for label, scores in finals.items()
            for w in plan.worlds
        },
        {(label, w.label): 0.03 for label in finals for w in plan.worlds},
        ran=4,
        reused=2,
        seconds=65.0,
    )

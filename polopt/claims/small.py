"""What claims of the small world share: a short run of the shipped policy and its statistics per iteration."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from polopt.core.example import Example
from polopt.core.rollout import Rollout
from polopt.training.budget import Budget
from polopt.training.build import resolve
from polopt.training.config import RunConfig
from polopt.training.progress import RunProgress
from polopt.training.run import make_trainer
from polopt.training.tracking import Trackers
from polopt.training.trainer import Trainer


def statistics(
    method: str,
    *,
    seed: int,
    quick: bool,
    steps: int,
    slots: Mapping[str, Any] | None = None,
    until: Callable[[Sequence[Mapping[str, float]]], bool] = lambda rows: False,
) -> list[dict[str, float]]:
    """One row per iteration of a default run: ``reward``, ``entropy``, ``trajectories``, ``wrong length``.

    The reward is the mean success, the last one the mean length of incorrect responses. Everything that was sampled
    counts, before anything is filtered. An iteration without an incorrect response repeats the length of the one
    before. The run ends early once ``until`` holds of the rows so far. ``quick`` makes two iterations of a few short
    answers.
    """
    rows: list[dict[str, float]] = []
    level = (1,) if quick else ()
    with small_trainer(method, seed=seed, quick=quick, steps=steps, level=level, slots=dict(slots or {})) as trainer:
        collect: Any = trainer.collect

        def watched(*arguments: Any) -> Any:
            batch = collect(*arguments)
            drawn = batch.drawn
            score = drawn["score"]
            wrong = drawn.lengths[score < 1].float()
            before = rows[-1]["wrong length"] if rows else 0.0
            rows.append(
                {
                    "reward": float(score.mean()),
                    "entropy": float(drawn["entropy"].mean()),
                    "trajectories": float(drawn.n_trajectories),
                    "wrong length": float(wrong.mean()) if len(wrong) else before,
                }
            )
            return batch

        trainer.collect = watched  # type: ignore[assignment]
        for _ in range(trainer.budget.steps or 0):
            trainer.step()
            if until(rows):
                break
    return rows


def trained(
    method: str,
    *,
    seed: int,
    quick: bool,
    steps: int,
    level: tuple[int, ...] = (),
    rewards: tuple[str, ...] = (),
    slots: Mapping[str, Any] | None = None,
    prepare: Callable[[Example], Example] = lambda example: example,
    at_start: Callable[[Trainer], None] = lambda trainer: None,
) -> Trainer:
    """The trainer of a default run of 16 x 8 at its end, on the given levels, by the task's rewards or these.

    ``prepare`` is applied to every training example; ``slots`` are whole parts in the place of the method's;
    ``at_start`` sees the trainer before its first step. ``quick`` makes two iterations of a few answers.
    """
    with small_trainer(method, seed=seed, quick=quick, steps=steps, level=level, reward=rewards) as trainer:
        trainer.method = trainer.method | (slots or {})
        trainer.collect = replace(trainer.collect, pool=[prepare(example) for example in trainer.collect.pool])
        at_start(trainer)
        for _ in range(trainer.budget.steps or 0):
            trainer.step()
    return trainer


@contextmanager
def small_trainer(method: str, *, seed: int, quick: bool, steps: int, **settings: Any) -> Iterator[Trainer]:
    """The trainer of a run that evaluates, saves and logs nothing by itself: of 16 x 8 where the settings of the run
    say nothing else (``quick``: 2 steps of 2 x 2).
    """
    count, prompts, group = (2, 2, 2) if quick else (steps, 16, 8)
    size: dict[str, Any] = {"steps": count, "prompts": prompts, "group": group, "eval_prompts": 1}
    settled = resolve(RunConfig(method=method, seed=seed, track=("none",), **size | settings))
    with (
        tempfile.TemporaryDirectory() as folder,
        RunProgress(Budget(settled.steps), quiet=True, console=Console(quiet=True)) as bar,
    ):
        trainer = make_trainer(settled, Path(folder), bar)
        trainer.trackers = Trackers({})
        trainer.eval_every = trainer.save_every = None
        yield trainer


def answers(trainer: Trainer, examples: Sequence[Example]) -> Rollout:
    """One scored answer of the trained policy to each example."""
    assert trainer.evaluator is not None
    _, rollout = replace(trainer.evaluator, examples=examples)(trainer.policy)
    return rollout


def moving_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last ``window`` values (of all so far where there are fewer)."""
    return [sum(values[max(0, i + 1 - window) : i + 1]) / min(window, i + 1) for i in range(len(values))]


def first_reaching(values: Sequence[float], target: float) -> float:
    """Number of iterations until a curve reaches the target; its length where it never does."""
    return float(next((i + 1 for i, value in enumerate(values) if value >= target), len(values)))

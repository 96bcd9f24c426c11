"""One run of a comparison: from the initial policy until the budget is spent, measured on the way.

The streams of random numbers are the seed's, not the method's: which prompts come, in which order, and the random
numbers of the sampler do not depend on what a method draws for itself, so that runs of one seed are paired.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch

from polopt.compare.plan import Job
from polopt.core.errors import UsageError
from polopt.core.example import Example
from polopt.core.method import Method
from polopt.core.policy import Request
from polopt.policies.exact import ExactPolicy, enumeration
from polopt.rewards.scoring import Scorer
from polopt.tasks.preferences import labelled
from polopt.tasks.problems import Problem, problem
from polopt.training import metrics_names as names
from polopt.training.budget import Budget
from polopt.training.build import check_needs, make_method
from polopt.training.collect import Collected, Collector
from polopt.training.optimizer import make_optimizer
from polopt.training.profile import Profiler
from polopt.training.progress import RunProgress
from polopt.training.run import make_trainer
from polopt.training.tracking import Trackers
from polopt.training.trainer import Optimization, Trainer

SERIES: Final = {"rollouts": names.NUM_ROLLOUTS, "reward": names.REWARD, "entropy": names.ENTROPY}
SERIES_LENGTH: Final = names.MEAN_LENGTH
ANSWERED: Final = 64
"""Labelled examples of each problem of the exact world, for a method that learns from a data set."""

Measure = Callable[[], dict[str, float]]
Tell = Callable[[float], None]


@dataclass(frozen=True, kw_only=True)
class PairedCollector(Collector):
    """A collector whose prompts and sampling seeds come from two streams of its own, whatever the method draws.

    A filter that refills takes further prompts of the same order.
    """

    order: torch.Generator
    draws: torch.Generator

    @classmethod
    def of(cls, collector: Collector, seed: int) -> PairedCollector:
        """The collector with the streams of a seed."""
        own = {f.name: getattr(collector, f.name) for f in fields(Collector)}
        order, draws = (torch.Generator().manual_seed(2 * seed + stream) for stream in (0, 1))
        return cls(**own, order=order, draws=draws)

    def __call__(
        self,
        method: Method,
        generator: torch.Generator,
        progress: Callable[[int, int], None] | None = None,
    ) -> Collected:
        curriculum = method.curriculum

        def drawn(pool: Sequence[Example], **options: Any) -> list[Request]:
            requests: list[Request] = curriculum(pool, **{**options, "generator": self.order})
            return requests

        return super().__call__(method | {"curriculum": drawn}, self.draws, progress)


class _Memory:
    """A tracker that keeps what the trainer logs."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def start(self, config: Mapping[str, Any], resume: bool) -> None: ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.rows.append(dict(metrics))

    def text(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None: ...

    def finish(self, summary: Mapping[str, Any]) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def run(job: Job, tell: Tell = lambda fraction: None) -> dict[str, Any]:
    """Train and measure; ``tell`` hears which part of the budget is spent.

    Gives ``points``, evaluations at 0, 1/K, ..., 1 of the budget (or as soon after as an iteration ends), each with
    what was spent, held-out ``score``, ``entropy`` (nats per token) and ``length`` (tokens); ``training``, series with
    one entry per iteration; ``rejected``, updates that were not finite. Raises UsageError for a job that cannot be run.
    """
    started = time.monotonic()
    memory = _Memory()
    with TemporaryDirectory() as folder:
        trainer, measure = _exact(job, Path(folder)) if job.world.exact else _causal_lm(job, Path(folder))
        # Under the name of the one tracker that must not fail.
        trainer.trackers = Trackers({"jsonl": memory})
        trainer.collect = PairedCollector.of(trainer.collect, job.config.seed)
        points = [_point(trainer, measure)]
        trainer.meter.restart()
        while not trainer.budget.exhausted(trainer.meter.spent):
            trainer.step()
            done = trainer.budget.fraction(trainer.meter.spent)
            if done * job.points >= math.floor(points[-1]["fraction"] * job.points + 1e-9) + 1 - 1e-9:
                points.append(_point(trainer, measure))
            tell(done)
        rejected = trainer.rejected
    series = {name: [row.get(key, math.nan) for row in memory.rows] for name, key in SERIES.items()}
    series["length"] = [row.get(SERIES_LENGTH, math.nan) for row in memory.rows]
    series["step_time"] = [row.get(names.STEP_TIME, math.nan) for row in memory.rows]
    return {
        "points": points,
        "training": series,
        "rejected": rejected,
        "seconds": time.monotonic() - started,
        "threads": torch.get_num_threads(),
    }


def _point(trainer: Trainer, measure: Measure) -> dict[str, float]:
    with trainer.meter.paused():
        spent = trainer.meter.spent
        return {
            "fraction": trainer.budget.fraction(spent),
            **{name: float(getattr(spent, name)) for name in ("steps", "seconds", "tokens", "rollouts")},
            **measure(),
        }


def _causal_lm(job: Job, folder: Path) -> tuple[Trainer, Measure]:
    config = job.config
    count = config.eval_prompts
    if config.data is None:
        # Generated prompts: the first half judges the comparison, the second the choice of a learning rate.
        config = replace(config, eval_prompts=2 * count)
    trainer = make_trainer(replace(config, track=("none",), out=str(folder)), folder, RunProgress(Budget(), quiet=True))
    trainer.on_progress = lambda phase, metrics: None
    evaluator = trainer.evaluator
    if evaluator is None:
        raise UsageError(f"{config.data} leaves no held-out prompts to compare on; give --eval-data")
    if config.data is None:
        held_out = evaluator.examples[count:] if job.tuning else evaluator.examples[:count]
        evaluator = replace(evaluator, examples=held_out)

    def measure() -> dict[str, float]:
        found, _ = evaluator(trainer.policy)
        return {
            "score": found[f"{names.EVAL}{names.ACCURACY}"],
            "entropy": found.get(f"{names.EVAL}{names.ENTROPY}", math.nan),
            "length": found[f"{names.EVAL}{names.MEAN_LENGTH}"],
        }

    return trainer, measure


def _exact(job: Job, folder: Path) -> tuple[Trainer, Measure]:
    config, world = job.config, job.world
    # Another seed is another problem of the kind.
    made = problem(str(world.problem), batch=world.problems, seed=config.seed, **world.options)
    method = made.judged(make_method(config))
    policy = made.policy()
    rewards = made.reward_functions()
    check_needs(method, policy, rewards)
    limit = getattr(method.rollout, "max_new_tokens", None) or made.space.length
    rate = float(config.lr or 0.0)
    trainer = Trainer(
        policy=policy,
        method=method,
        collect=Collector(
            policy,
            _asked(method, made, config.seed),
            Scorer(rewards, config.on_reward_error, config.reward_timeout),
            config.prompts,
            config.group,
            limit,
            config.token_budget,
            Profiler(enabled=False),
            config.stale,
        ),
        optimizer=make_optimizer(
            policy.parameters(), rate, weight_decay=config.weight_decay, betas=(config.beta1, config.beta2)
        ),
        optimization=Optimization(rate, config.lr_schedule, config.warmup, config.token_budget),
        budget=Budget(config.steps, config.seconds, config.tokens, config.rollouts),
        run=folder,
        trackers=Trackers({}),
        seed=config.seed,
        strict=config.strict,
        tolerance=1e-6,
    )
    return trainer, lambda: _expectations(policy, made)


def _asked(method: Method, made: Problem, seed: int) -> Sequence[Example]:
    """The problems, or answers to them by the initial policy with labels, for a method that reads such answers."""
    if not method.reads_answers:
        return made.examples()
    return labelled(made, ANSWERED * made.batch, kind=getattr(method.rollout, "form", "lists"), seed=seed)


@torch.no_grad()
def _expectations(policy: ExactPolicy, made: Problem) -> dict[str, float]:
    """Expected reward, entropy per token and length under the policy, by enumeration; problems count equally."""
    chance = policy.probabilities()
    length = (chance * policy.space.lengths).sum(-1)
    return {
        "score": float(enumeration.expected_reward(policy, made.reward).mean()),
        "entropy": float((enumeration.entropy(policy) / length).mean()),
        "length": float(length.mean()),
    }

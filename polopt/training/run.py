"""One run from a configuration: evaluate, train, evaluate, report."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console

from polopt.core.errors import UsageError
from polopt.core.method import Method
from polopt.rewards.scoring import Scorer
from polopt.rollouts.groups import Groups
from polopt.training import metrics_names as names
from polopt.training.budget import Budget, parse_every
from polopt.training.build import Problem, check_needs, make_method, make_policy, make_problem, resolve
from polopt.training.checkpoint import latest_checkpoint
from polopt.training.collect import Collector
from polopt.training.config import RunConfig, make_config, read_config, write_config
from polopt.training.evaluation import Evaluator, LossEvaluator, samples_of
from polopt.training.optimizer import make_optimizer
from polopt.training.profile import Profiler
from polopt.training.progress import RunProgress
from polopt.training.report import Sample, write_report
from polopt.training.tracking import make_trackers
from polopt.training.trainer import Optimization, Trainer

# Mean |log-prob gap| between sampler and learner that rounding explains; bfloat16 keeps 8 bits.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}

PROMPTS_CHECKED = 20_000
"""Training prompts that are tokenized before anything is written; about three seconds. Later ones fail when drawn."""


def train(
    config: RunConfig, *, resume: bool = False, quiet: bool = False, console: Console | None = None
) -> dict[str, Any]:
    """Run to the end and return the summary that ``--json`` writes.

    With ``resume`` the run in the folder ``config.out`` goes on from its latest checkpoint. Raises UsageError for
    anything wrong with the input, before anything is written or overwritten.
    """
    console = console or Console(quiet=quiet)
    config = resolve(config)
    run = Path(str(config.out))
    _check_folder(run, config, resume)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with RunProgress(
        Budget(config.steps, config.seconds, config.tokens, config.rollouts), quiet=quiet, console=console
    ) as bar:
        trainer = make_trainer(config, run, bar)
        checkpoint = latest_checkpoint(run) if resume else None
        run.mkdir(parents=True, exist_ok=True)
        trainer.trackers.start(config.as_dict(), resume=resume)
        if checkpoint is not None:
            trainer.resume(checkpoint)
        write_config(config, run / "config.yaml")
        before, _ = _evaluate(trainer, run / "before.json", reuse=checkpoint is not None)
        if checkpoint is None and trainer.save_every is not None:
            # So that a run killed before its first checkpoint can be resumed too.
            trainer.save()
        trainer.meter.restart()
        trainer.train()
        seconds = trainer.meter.spent.seconds
        after, samples = _evaluate(trainer, run / "after.json", reuse=False)
    model = run / "model"
    trainer.policy.save(model)
    trainer.conclude(model)
    summary = _summary(trainer, before, after, seconds)
    trainer.trackers.finish(summary)
    if config.profile:
        trainer.profiler.write(run)
        console.print(trainer.profiler.table())
    write_report(run, before, after, samples, model, console=console)
    return summary


def make_trainer(config: RunConfig, run: Path, bar: RunProgress) -> Trainer:
    """The trainer of a resolved configuration; nothing is written yet."""
    method = make_method(config)
    problem = make_problem(config, method)
    if hasattr(method.rollout, "check"):
        # Where a reward judges them, held-out prompts are answered by the policy.
        method.rollout.check(problem.train if problem.rewards else [*problem.train, *problem.held_out])
    limit = getattr(method.rollout, "max_new_tokens", None) or problem.limit
    policy = make_policy(config, limit)
    check_needs(method, policy, problem.rewards)
    policy.check_prompts([*problem.train[:PROMPTS_CHECKED], *problem.held_out])
    scorer = Scorer(problem.rewards, config.on_reward_error, config.reward_timeout)
    profiler = Profiler(enabled=config.profile, trace=config.profile)
    rate = float(config.lr or 0.0)
    optimizer = make_optimizer(
        policy.parameters(), rate, weight_decay=config.weight_decay, betas=(config.beta1, config.beta2)
    )
    trainer = Trainer(
        policy=policy,
        method=method,
        collect=Collector(
            policy,
            problem.train,
            scorer,
            config.prompts,
            config.group,
            limit,
            config.token_budget,
            profiler,
            config.stale,
        ),
        optimizer=optimizer,
        optimization=Optimization(rate, config.lr_schedule, config.warmup, config.token_budget),
        budget=Budget(config.steps, config.seconds, config.tokens, config.rollouts),
        run=run,
        trackers=make_trackers([name for name in config.track if name != "none"], run),
        seed=config.seed,
        evaluator=_evaluator(config, method, problem, scorer, limit),
        eval_every=parse_every(config.eval_every) if config.eval_every else None,
        save_every=parse_every(config.save_every) if config.save_every else None,
        keep=config.keep,
        strict=config.strict,
        tolerance=TOLERANCE.get(policy.dtype or torch.float32, TOLERANCE[torch.bfloat16]),
        profiler=profiler,
    )
    trainer.on_progress = lambda phase, metrics: bar.update(trainer.meter.spent, metrics, phase)
    return trainer


def _evaluator(
    config: RunConfig, method: Method, problem: Problem, scorer: Scorer, limit: int
) -> Evaluator | LossEvaluator | None:
    if not problem.held_out:
        return None
    if not problem.rewards:
        return LossEvaluator(problem.held_out, method, limit, config.token_budget)
    return Evaluator(problem.held_out, scorer, _held_out(method.rollout), limit, config.eval_samples)


def _held_out(rollout: Any) -> Groups:
    """How held-out answers are drawn: as training answers are, one by one, in the environment of training if any.

    They are the policy's own: of it alone where training mixes it with another model, and at its own temperature where
    training explores at another.
    """
    if hasattr(rollout, "held_out"):
        return cast(Groups, rollout.held_out())
    options = {name: getattr(rollout, name) for name in Groups.__dataclass_fields__ if hasattr(rollout, name)}
    options["mixture_of"] = None
    if (own := options.get("policy_temperature")) is not None:
        plain = {name: getattr(Groups(), name) for name in ("top_p", "top_k", "min_p", "policy_temperature")}
        options |= {**plain, "temperature": own}
    return Groups(**options)


def _check_folder(run: Path, config: RunConfig, resume: bool) -> None:
    """Refuse to overwrite a run, and to resume what is not there or is another method's."""
    settled = run / "config.yaml"
    if resume:
        if not settled.is_file():
            raise UsageError(f"there is no run to resume in {run}: it has no config.yaml")
        earlier = make_config(read_config(settled))
        if earlier.method != config.method:
            raise UsageError(
                f"the run in {run} belongs to method {earlier.method!r}, not to {config.method!r}; resume it with that "
                f"method or choose another --out"
            )
    elif run.exists() and (not run.is_dir() or any(path.name != ".tmp-config.yaml" for path in run.iterdir())):
        raise UsageError(
            f"{run} already exists and is not empty; choose another --out, or continue its run with --resume"
        )


def _evaluate(trainer: Trainer, path: Path, *, reuse: bool) -> tuple[dict[str, float], list[Sample]]:
    """All held-out prompts, kept in a file so that a resumed run need not repeat what its start has measured."""
    if trainer.evaluator is None:
        return {}, []
    if reuse and path.is_file():
        kept: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
        return kept, []

    def progress(done: int, total: int) -> None:
        trainer.on_progress(f"evaluating {done}/{total}", {})

    with trainer.meter.paused(), trainer.profiler.phase("evaluation"):
        metrics, rollout = trainer.evaluator(trainer.policy, progress=progress)
    path.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    trainer.trackers.log(trainer.iteration, metrics)
    return metrics, samples_of(rollout)


def _summary(
    trainer: Trainer, before: Mapping[str, float], after: Mapping[str, float], seconds: float
) -> dict[str, Any]:
    def interval(side: Mapping[str, float]) -> list[float | None]:
        return [side.get(f"{names.EVAL}{bound}") for bound in (names.ACCURACY_LOW, names.ACCURACY_HIGH)]

    spent = trainer.meter.spent
    # Linux counts kilobytes, macOS bytes.
    unit = 2**20 if sys.platform == "darwin" else 2**10
    accuracy = f"{names.EVAL}{names.ACCURACY}"
    return {
        "method": trainer.method.slug,
        "accuracy_before": before.get(accuracy),
        "accuracy_after": after.get(accuracy),
        "accuracy_before_ci": interval(before),
        "accuracy_after_ci": interval(after),
        "prompts": after.get(f"{names.EVAL}prompts"),
        "seconds": seconds,
        "steps": spent.steps,
        "tokens": spent.tokens,
        "rollouts": spent.rollouts,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit,
        "run": str(trainer.run),
    }

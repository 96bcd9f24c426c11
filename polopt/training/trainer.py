"""The training loop. One iteration reads from top to bottom; what differs between methods is in their parts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from polopt.core.errors import UsageError
from polopt.core.method import Method
from polopt.core.override import override
from polopt.core.part import flatten
from polopt.core.policy import Policy, Request
from polopt.core.rollout import LEVELS, Rollout
from polopt.training import checks
from polopt.training import metrics_names as names
from polopt.training.budget import Budget, Every, Meter
from polopt.training.checkpoint import load_checkpoint, random_state, restore_random_state, save_checkpoint
from polopt.training.collect import Collected, Collector
from polopt.training.evaluation import Evaluator, LossEvaluator
from polopt.training.optimizer import learning_rate, load_optimizer_state, optimizer_state, set_learning_rate
from polopt.training.profile import Profiler
from polopt.training.tracking import Trackers
from polopt.training.update import BatchStep, evaluate_columns, minibatches

CONCLUDED = 512
"""Training prompts whose answers a trained model is described by."""


@dataclass(frozen=True)
class Optimization:
    """Learning rate and its course, and how much goes through the policy at once."""

    lr: float
    course: str = "constant"
    warmup: int = 0
    token_budget: int = 16_384


@dataclass
class Trainer:
    """Improves a policy by a method until the budget is spent.

    ``tolerance`` is the mean log-prob gap between sampler and learner that counts as rounding. ``on_progress`` is told
    the phase and the latest metrics. The method is cloned: its state belongs to this run.
    """

    policy: Policy
    method: Method
    collect: Collector
    optimizer: torch.optim.Optimizer
    optimization: Optimization
    budget: Budget
    run: Path
    trackers: Trackers
    seed: int
    evaluator: Evaluator | LossEvaluator | None = None
    eval_every: Every | None = None
    save_every: Every | None = None
    keep: int = 2
    strict: bool = False
    tolerance: float = 1e-3
    profiler: Profiler = field(default_factory=lambda: Profiler(enabled=False))
    on_progress: Callable[[str, Mapping[str, float]], None] = lambda phase, metrics: None
    meter: Meter = field(default_factory=Meter)
    iteration: int = 0
    rejected: int = 0
    controlled: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.method = self.method.clone()
        self.generator = torch.Generator().manual_seed(self.seed)
        # Sampled and not yet handed out: part of the run's state, whatever is put around the collector.
        self._in_flight = self.collect.in_flight
        self._saved = -1

    # --- the loop -----------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Iterate until the budget is spent; evaluate and save when due, and save at the end."""
        while not self.budget.exhausted(self.meter.spent):
            self.step()
            if self.eval_every is not None and self.eval_every.due(self.meter.spent):
                self.evaluate()
            if self.save_every is not None and self.save_every.due(self.meter.spent):
                self.save_every.done(self.meter.spent)
                self.save()
        if self._saved != self.iteration:
            self.save()

    def step(self) -> None:
        """One iteration: collect, assign credit, update, learn from the iteration."""
        started = time.monotonic()
        self._refresh_models()
        batch = self.collect(self.method, self.generator, self._sampling_progress)
        metrics = self._describe(batch)
        if batch.kept is not None:
            rollout = self.method.credit(batch.kept)
            metrics |= checks.check_versions(rollout, self.policy.version, self.strict)
            metrics |= checks.sampler_gap(rollout)
            metrics |= self._learn(rollout)
        self.meter.add(steps=1, tokens=batch.tokens, rollouts=batch.rollouts)
        self._observe(batch, metrics)

        self.iteration += 1
        seconds = time.monotonic() - started
        spent = self.meter.spent
        metrics |= {names.NUM_TOKENS: spent.tokens, names.NUM_ROLLOUTS: spent.rollouts}
        pace = batch.tokens / seconds
        clock = {names.STEP_TIME: seconds, names.TOKENS_PER_SECOND: pace, names.SECONDS: spent.seconds}
        self.trackers.log(self.iteration, {**metrics, **clock})
        self.on_progress("", metrics)

    def _learn(self, rollout: Rollout) -> dict[str, float]:
        """The method's schedule of updates on one rollout; metrics are means over the updates."""
        schedule = self.method.schedule
        rate = learning_rate(
            self.optimization.lr,
            self.optimization.course,
            fraction=self.budget.fraction(self.meter.spent),
            step=self.iteration,
            warmup=self.optimization.warmup,
        )
        set_learning_rate(self.optimizer, rate)
        first: dict[str, float] = {}
        collected: list[dict[str, float]] = []
        for _ in range(schedule.epochs):
            for batch in minibatches(rollout, schedule.minibatches, self.method.unit, self.generator):
                self.on_progress("update", {})
                step = BatchStep(
                    self.policy,
                    self.method,
                    batch,
                    self.optimizer,
                    self.optimization.token_budget,
                    self._reject,
                    self.profiler,
                )
                metrics = self.method.update(step)
                if step.first is not None:
                    first = checks.check_first_update(step.first, self.tolerance, self.strict)
                collected.append({**metrics, **step.ratios.metrics()})
        means = {
            name: sum(m[name] for m in collected if name in m) / sum(name in m for m in collected)
            for name in sorted({name for m in collected for name in m})
        }
        return {**means, **first, names.LEARNING_RATE: rate, "updates/rejected": float(self.rejected)}

    def _describe(self, batch: Collected) -> dict[str, float]:
        """What the batch is that trains now, before it does."""
        drawn = batch.answers
        if not drawn.n_trajectories:
            return {"groups/kept": float(batch.kept.n_groups) if batch.kept is not None else 0.0}
        metrics: dict[str, float] = {}
        if "reward" in drawn:
            metrics |= checks.check_rewards(drawn, self.strict)
            rewards = drawn.reward
            metrics[names.REWARD] = float(rewards.nanmean())
            spread = drawn.group_std(rewards)
            metrics[names.REWARD_STD] = float(spread.mean())
            metrics[names.FRAC_REWARD_ZERO_STD] = float((spread == 0).float().mean())
        for name, values in drawn.rewards.items():
            valid = values[~values.isnan()]
            if valid.numel():
                metrics[names.reward_mean(name)] = float(valid.mean())
                metrics[names.reward_std(name)] = float(valid.std(correction=0))
        lengths = drawn.lengths.float()
        cut = drawn["truncated"].bool() if "truncated" in drawn else torch.zeros_like(lengths, dtype=torch.bool)
        metrics |= {
            names.MEAN_LENGTH: float(lengths.mean()),
            names.MIN_LENGTH: float(lengths.min()),
            names.MAX_LENGTH: float(lengths.max()),
        }
        if not bool(cut.all()):
            metrics[names.MEAN_TERMINATED_LENGTH] = float(lengths[~cut].mean())
        metrics[names.CLIPPED_RATIO] = float(cut.float().mean())
        metrics["groups/drawn"] = float(drawn.n_groups)
        metrics["groups/kept"] = float(batch.kept.n_groups) if batch.kept is not None else 0.0
        if "entropy" in drawn and bool(drawn.mask.any()):
            metrics[names.ENTROPY] = float(drawn["entropy"][drawn.mask].mean())
        if batch.kept is not None and {"logp", "logp/ref"} <= set(batch.kept.names()):
            kept = batch.kept
            gap = (kept.logp - kept["logp/ref"])[kept.mask]
            metrics[names.KL] = float((torch.expm1(-gap.clamp(-20, 20)) + gap).mean())
        return metrics

    def _observe(self, batch: Collected, metrics: dict[str, float]) -> None:
        """Curricula and other parts learn from the iteration; controllers set coefficients for the next one."""
        answers = batch.answers
        for slot in self.method.slots().values():
            for part in flatten(slot):
                if hasattr(part, "observe") and answers.n_trajectories:
                    part.observe(answers, self._evaluated)
        if self.method.controller is not None:
            statistics = {
                **metrics,
                "trajectories": float(batch.drawn.n_trajectories),
                "progress": self.budget.fraction(self.meter.spent),
                "iteration": float(self.iteration + 1),
            }
            self.controlled |= self.method.controller(statistics)
            self._apply_control()
            metrics |= {f"controller/{name}": value for name, value in self.controlled.items()}

    def _evaluated(self, rollout: Rollout, names: frozenset[str]) -> Rollout:
        """The rollout with these functionals of the present policy as step columns, without gradient."""
        return evaluate_columns(self.policy, rollout, names, self.optimization.token_budget, self.profiler)

    def _apply_control(self) -> None:
        self.method = override(self.method, self.controlled)

    def _refresh_models(self) -> None:
        for name, model in self.method.models_in_use.items():
            if model.due(self.iteration):
                model.install(self.policy, name)
            if self.iteration == 0 and getattr(model, "recipe", None) is not None:
                self._train_model(name, model.recipe, model.steps)

    def _train_model(self, name: str, recipe: Method, steps: int) -> None:
        """Let another method train the policy, freeze what comes of it as the model, and go back to the start.

        What it samples is charged to the budget; its iterations are none of the run's.
        """
        start, version = [p.detach().clone() for p in self.policy.parameters()], self.policy.version
        for own, model in recipe.models_in_use.items():
            model.install(self.policy, own)
        inner = replace(
            self,
            method=recipe,
            collect=replace(self.collect, stale=0, in_flight=[]),
            budget=Budget(steps=steps),
            trackers=Trackers({}),
            evaluator=None,
            eval_every=None,
            save_every=None,
            seed=self.seed + 1,
            on_progress=lambda phase, metrics: self.on_progress(f"training the model {name}", {}),
            meter=Meter(),
            controlled={},
        )
        for _ in range(steps):
            inner.step()
        self.policy.add_model(name)
        with torch.no_grad():
            for parameter, value in zip(self.policy.parameters(), start, strict=True):
                parameter.copy_(value)
        self.policy.version = version
        # The run has not begun: its optimizer has no moments yet.
        self.optimizer.state.clear()
        self.rejected = inner.rejected
        self.meter.add(tokens=inner.meter.spent.tokens, rollouts=inner.meter.spent.rollouts)

    def _sampling_progress(self, done: int, total: int) -> None:
        self.on_progress(f"sampling {done}/{total}", {})

    def _reject(self, reason: str, batch: Rollout) -> None:
        """A loss or gradient that is not finite: count it and keep the batch's columns for inspection."""
        self.rejected += 1
        folder = self.run / "rejected"
        folder.mkdir(parents=True, exist_ok=True)
        columns = {f"{level}/{n}": v.contiguous() for level in LEVELS for n, v in batch.columns.get(level, {}).items()}
        columns |= {"lengths": batch.lengths, "group": batch.group.contiguous()}
        # One iteration may reject several updates; the count tells them apart.
        name = f"step-{self.iteration:08d}-{self.rejected:04d}.safetensors"
        save_file({name: value.clone() for name, value in columns.items()}, folder / name)
        checks.check_finite({}, self.strict, f"update rejected because {reason}; its batch is in {folder}")

    def evaluate(self) -> dict[str, float]:
        """A quarter of the held-out prompts, logged; its time is not charged to the budget."""
        if self.evaluator is None:
            return {}
        with self.meter.paused(), self.profiler.phase("evaluation"):
            self.on_progress("evaluating", {})
            metrics, _ = self.evaluator(self.policy, prompts=max(1, len(self.evaluator.examples) // 4))
        if self.eval_every is not None:
            self.eval_every.done(self.meter.spent)
        self.trackers.log(self.iteration, metrics)
        return metrics

    def conclude(self, folder: Path) -> None:
        """Let parts that have a method ``conclude(answers, evaluate, folder)`` write, beside the trained model in that
        folder, what its use needs: they are shown answers to the first `CONCLUDED` training prompts.
        """
        parts = [part for slot in self.method.slots().values() for part in flatten(slot) if hasattr(part, "conclude")]
        if parts:
            requests = [Request(example, self.collect.group) for example in self.collect.pool[:CONCLUDED]]
            answers = self.method.rollout(self.policy, requests, limit=self.collect.limit, seed=self.seed)
            for part in parts:
                part.conclude(answers, self._evaluated, folder)

    # --- checkpoints --------------------------------------------------------------------------------------------

    def save(self) -> Path:
        """Write everything that a resumed run needs to be the run that was never stopped."""
        self._saved = self.iteration
        return save_checkpoint(self.run, self.iteration, self.state_dict(), keep=self.keep)

    def state_dict(self) -> dict[str, Any]:
        """The whole state of the run."""
        return {
            "method": self.method.slug,
            "parts": self.method.state_dict(),
            "controlled": dict(self.controlled),
            "policy": self.policy.state_dict(),
            "optimizer": optimizer_state(self.optimizer),
            "in_flight": [batch.state_dict() for batch in self._in_flight],
            "generator": self.generator.get_state(),
            "random": random_state(),
            "meter": self.meter.state_dict(),
            "iteration": self.iteration,
            "rejected": self.rejected,
            "every": {name: every.state_dict() for name, every in self._triggers().items()},
            "trackers": self.trackers.state_dict(),
        }

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint.

        Raises UsageError when it is damaged or belongs to another method.
        """
        state = load_checkpoint(path)
        if state["method"] != self.method.slug:
            raise UsageError(
                f"checkpoint {path} belongs to method {state['method']!r}, not to {self.method.slug!r}; resume it with "
                f"that method or choose another --out"
            )
        self.policy.load_state_dict(state["policy"])
        load_optimizer_state(self.optimizer, state["optimizer"])
        self.method.load_state_dict(state["parts"])
        self.controlled = dict(state["controlled"])
        self._apply_control()
        device = self.policy.parameters()[0].device
        self._in_flight[:] = [Collected.from_state(batch, device) for batch in state.get("in_flight", ())]
        self.generator.set_state(state["generator"])
        self.meter.load_state_dict(state["meter"])
        self.iteration, self.rejected = state["iteration"], state["rejected"]
        for name, every in self._triggers().items():
            if name in state["every"]:
                every.load_state_dict(state["every"][name])
        self.trackers.load_state_dict(state["trackers"])
        restore_random_state(state["random"])

    def _triggers(self) -> dict[str, Every]:
        found = {"eval": self.eval_every, "save": self.save_every}
        return {name: every for name, every in found.items() if every is not None}

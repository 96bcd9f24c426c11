"""The loop: a function of its seed, over when its budget is spent, evaluated and saved when due, resumed as it was."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from polopt.core.errors import UsageError
from polopt.core.part import Evaluate, Part, Stateful, Then
from polopt.core.rollout import Rollout
from polopt.models import Snapshot
from polopt.policies.causal_lm.policy import CausalLM
from polopt.training.budget import Budget, Every
from polopt.training.checkpoint import latest_checkpoint
from polopt.training.run import train
from polopt.training.trainer import Optimization
from tests.training.conftest import make_tiny, make_trainer, plain_evaluation, short


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing the curves takes longer than such a run."""
    monkeypatch.setattr("polopt.training.report.plot_curves", lambda *a, **k: None)


def log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def training(run: Path) -> list[dict[str, Any]]:
    return [line for line in log(run) if "reward" in line]


@pytest.mark.parametrize("slug", ["grpo", "ppo"])
def test_a_run_is_a_function_of_its_seed(slug: str, small_run: Any, tmp_path: Path) -> None:
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        train(small_run(tmp_path / name, method=slug, seed=seed, steps=2), quiet=True)
    a, b, c = ((tmp_path / name / "log.jsonl").read_bytes() for name in "abc")
    assert a == b != c
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]


# --- budgets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [Budget(steps=2), Budget(rollouts=17), Budget(tokens=90), Budget(2, 1e9, 10**9, 33)])
def test_a_run_ends_with_the_iteration_that_spends_its_budget(budget: Budget, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, short("grpo"), budget=budget)
    trainer.train()
    lines = training(tmp_path)
    spent = [(line["step"], line["num_rollouts"], line["num_tokens"]) for line in lines]
    limits = [limit or math.inf for limit in (budget.steps, budget.rollouts, budget.tokens)]

    def over(counts: Sequence[int]) -> bool:
        return any(count >= limit for count, limit in zip(counts, limits, strict=True))

    assert over(spent[-1]) and not any(over(counts) for counts in spent[:-1])
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert [line["num_rollouts"] for line in lines] == [16 * i for i in range(1, len(lines) + 1)]
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / f"step-{len(lines):08d}"


def test_no_budget_trains_nothing(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, short("grpo"), budget=Budget(steps=0))
    trainer.train()
    assert log(tmp_path) == [] and trainer.policy.version == 0


def test_seconds_end_a_run(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, short("grpo"), budget=Budget(seconds=0.2))
    trainer.train()
    assert trainer.meter.spent.seconds >= 0.2 and trainer.iteration >= 1


def test_the_learning_rate_follows_its_course_over_the_budget(tmp_path: Path) -> None:
    optimization = Optimization(0.4, "linear", warmup=1)
    make_trainer(tmp_path, short("grpo"), budget=Budget(steps=4), optimization=optimization).train()
    assert [line["learning_rate"] for line in training(tmp_path)] == pytest.approx([0.2, 0.3, 0.2, 0.1])


# --- what happens every so often --------------------------------------------------------------------------------------


def test_evaluations_and_checkpoints_come_when_due(small_run: Any, tmp_path: Path) -> None:
    train(small_run(tmp_path / "run", steps=5, eval_every="2", save_every="2", keep=9), quiet=True)
    assert [line["step"] for line in log(tmp_path / "run") if "eval/accuracy" in line] == [0, 2, 4, 5]
    assert [line["eval/prompts"] for line in log(tmp_path / "run") if "eval/accuracy" in line] == [4, 1, 1, 4]
    saved = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert saved == [f"step-{step:08d}" for step in (0, 2, 4, 5)]


def test_only_the_end_is_saved_and_only_the_ends_evaluated_by_default(small_run: Any, tmp_path: Path) -> None:
    train(small_run(tmp_path / "run"), quiet=True)
    assert [line["step"] for line in log(tmp_path / "run") if "eval/accuracy" in line] == [0, 3]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003"]


def test_evaluation_is_not_charged_to_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path, short("grpo"), eval_every=Every(1), budget=Budget(steps=2))
    seconds: list[float] = []

    def slow(policy: Any, prompts: int) -> tuple[dict[str, float], None]:
        before = trainer.meter.spent.seconds
        torch.randn(200, 200) @ torch.randn(200, 200)
        seconds.append(trainer.meter.spent.seconds - before)
        return {"eval/accuracy": 0.5}, None

    slow.examples = [None] * 9  # type: ignore[attr-defined]
    trainer.evaluator = slow  # type: ignore[assignment]
    trainer.train()
    assert seconds == [0.0, 0.0]


def test_a_reference_is_refreshed_every_so_many_iterations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[str, int]] = []
    add = CausalLM.add_model

    def noting(self: CausalLM, name: str) -> None:
        taken.append((name, self.version))
        add(self, name)

    monkeypatch.setattr(CausalLM, "add_model", noting)
    method = short("reinforce", models={"ref": Snapshot(every=2)}) | {
        "reward": type(short("reinforce").reward)(beta=0.1)
    }
    make_trainer(tmp_path, method, budget=Budget(steps=5)).train()
    assert taken == [("ref", 0), ("ref", 2), ("ref", 4)]
    kl = [line["kl"] for line in training(tmp_path)]
    assert max(kl[0], kl[2], kl[4]) < 1e-6 and min(kl[1], kl[3]) > 1e-4


# --- what parts learn -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counter(Stateful):
    """A filter that keeps everything and counts what it is shown."""

    seen: int = field(default=0, init=False, compare=False)

    state = ("seen",)

    def __call__(self, rollout: Rollout) -> Rollout:
        return rollout

    def observe(self, rollout: Rollout, evaluate: Evaluate) -> None:
        self.remember(seen=self.seen + rollout.n_trajectories)


@pytest.mark.parametrize("composed", [False, True], ids=["alone", "in a chain"])
def test_parts_observe_every_iteration_and_the_given_method_stays_as_it_was(composed: bool, tmp_path: Path) -> None:
    part: Part = Then((Counter(), Counter())) if composed else Counter()
    method = short("grpo", filter=part)
    trainer = make_trainer(tmp_path, method, budget=Budget(steps=2))
    trainer.train()
    found = trainer.method.filter.parts if composed else (trainer.method.filter,)
    given = method.filter.parts if composed else (method.filter,)
    assert [part.seen for part in found] == [32] * len(found)
    assert [part.seen for part in given] == [0] * len(given)


@dataclass(frozen=True)
class Follower(Counter):
    """Keeps what was drawn, and how far the updates moved its log-probs."""

    last: Rollout | None = field(default=None, init=False, compare=False)
    moved: float = field(default=0.0, init=False, compare=False)

    state = ("seen", "last", "moved")

    def observe(self, rollout: Rollout, evaluate: Evaluate) -> None:
        super().observe(rollout, evaluate)
        now = evaluate(rollout, frozenset({"logp", "entropy"}))
        before = 0.0 if self.last is None else float(evaluate(self.last, frozenset({"logp"})).logp.sum())
        self.remember(last=now, moved=float((now.logp - rollout.logp).abs().mean()) + before)


def test_what_observes_can_ask_the_updated_policy(tmp_path: Path) -> None:
    optimization = Optimization(1e-2, token_budget=60)  # a few trajectories at a time
    trainer = make_trainer(
        tmp_path, short("grpo", filter=Follower()), budget=Budget(steps=1), optimization=optimization
    )
    trainer.train()
    part = trainer.method.filter
    assert part.moved > 1e-4  # not the log-probs of the policy that sampled
    expected = plain_evaluation(trainer.policy, part.last)
    for name in ("logp", "entropy"):
        torch.testing.assert_close(part.last[name], expected[name].detach(), rtol=1e-4, atol=1e-5)
        assert not part.last[name].requires_grad


def test_a_rollout_in_a_parts_state_survives_a_stop(tmp_path: Path) -> None:
    def trainer(run: Path, steps: int) -> Any:
        return make_trainer(run, short("grpo", filter=Follower()), budget=Budget(steps=steps))

    whole, first = trainer(tmp_path / "whole", 3), trainer(tmp_path / "first", 1)
    whole.train()
    first.train()
    second = trainer(tmp_path / "second", 3)
    for name in ("log", "timing", "text"):
        (tmp_path / "second" / f"{name}.jsonl").write_bytes((tmp_path / "first" / f"{name}.jsonl").read_bytes())
    second.resume(latest_checkpoint(tmp_path / "first"))
    second.train()
    assert second.method.filter.moved == whole.method.filter.moved
    assert torch.equal(second.method.filter.last.logp, whole.method.filter.last.logp)
    assert second.method.filter.last.examples == whole.method.filter.last.examples


def test_a_resumed_run_is_the_run_that_was_not_stopped(small_run: Any, tmp_path: Path) -> None:
    slots = {"controller": "adaptive-kl", "controller.horizon": 8.0, "controller.target": 1e-3, "models.ref.every": 3}
    options = {"method": "ppo", "save_every": "1", "eval_every": "2"}
    train(small_run(tmp_path / "whole", slots, steps=4, **options), quiet=True)
    train(small_run(tmp_path / "parts", slots, steps=2, **options), quiet=True)
    train(small_run(tmp_path / "parts", slots, steps=4, **options), resume=True, quiet=True)
    assert (tmp_path / "parts" / "log.jsonl").read_bytes() == (tmp_path / "whole" / "log.jsonl").read_bytes()
    betas = [line["controller/reward.beta"] for line in training(tmp_path / "parts")]
    assert len(set(betas)) == 4 and betas[0] != 0.05
    weights = [(tmp_path / run / "model" / "model.safetensors").read_bytes() for run in ("whole", "parts")]
    assert weights[0] == weights[1]


def test_a_controlled_coefficient_is_in_the_resumed_method(tmp_path: Path) -> None:
    from polopt.controllers import AdaptiveKL

    def trainer(run: Path, steps: int) -> Any:
        method = short("ppo", controller=AdaptiveKL(target=1e-3, horizon=8.0))
        return make_trainer(run, method, budget=Budget(steps=steps))

    first = trainer(tmp_path / "a", 2)
    first.train()
    second = trainer(tmp_path / "b", 3)
    (tmp_path / "b" / "log.jsonl").write_bytes((tmp_path / "a" / "log.jsonl").read_bytes())
    for name in ("timing", "text"):
        (tmp_path / "b" / f"{name}.jsonl").write_bytes((tmp_path / "a" / f"{name}.jsonl").read_bytes())
    second.resume(latest_checkpoint(tmp_path / "a"))
    assert second.method.reward.beta == first.method.reward.beta not in (0.05, None)
    assert second.method.controller.beta == first.method.controller.beta
    assert (second.iteration, second.policy.version) == (2, first.policy.version)


def test_a_checkpoint_of_another_method_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "a", short("grpo"), budget=Budget(steps=0))
    trainer.train()
    with pytest.raises(UsageError, match="belongs to method 'grpo', not to 'rloo'"):
        make_trainer(tmp_path / "b", short("rloo"), make_tiny()).resume(latest_checkpoint(tmp_path / "a"))  # type: ignore[arg-type]


# --- the log ----------------------------------------------------------------------------------------------------------


def test_an_iteration_logs_what_was_sampled(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, short("grpo"), budget=Budget(steps=1))
    batches = []
    collect = trainer.collect
    trainer.collect = lambda *a: batches.append(collect(*a)) or batches[-1]  # type: ignore[assignment, func-returns-value]
    trainer.train()
    (line,) = training(tmp_path)
    drawn = batches[0].drawn
    reward, lengths = drawn.reward.numpy(), drawn.lengths.numpy()
    by_group = reward.reshape(4, 4)
    cut = drawn["truncated"].bool().numpy()
    expected = {
        "reward": reward.mean(),
        "reward_std": by_group.std(axis=1, ddof=1).mean(),
        "frac_reward_zero_std": (by_group.std(axis=1) == 0).mean(),
        "rewards/even/mean": reward.mean(),
        "rewards/even/std": reward.std(),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": cut.mean(),
        "completions/mean_terminated_length": lengths[~cut].mean(),
        "num_tokens": lengths.sum(),
        "num_rollouts": 16,
        "groups/kept": 4,
        "policy/age_max": 0,
    }
    assert {name: line[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert line["policy/first_update_gap"] < 1e-4
    assert line["grad_norm"] > 0
    assert "seconds" not in line and "step_time" not in line

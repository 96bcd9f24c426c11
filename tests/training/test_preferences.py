"""Preference data in training: without any reward, on the policy's own answers, in the small world."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from polopt.assets import base_policy_path
from polopt.core.errors import UsageError
from polopt.core.policy import Request
from polopt.core.statistics import accuracy_interval
from polopt.filters.preferences import Best, BestWorst, Ranked
from polopt.methods import get_method
from polopt.rewards.scoring import Scorer
from polopt.rollouts.dataset import Dataset
from polopt.rollouts.groups import Groups
from polopt.training.build import SMALL_WORLD_OFFLINE_LR, composed, make_method, make_problem, resolve
from polopt.training.collect import Collector, judged
from polopt.training.config import RunConfig
from polopt.training.evaluation import LossEvaluator
from polopt.training.profile import Profiler
from polopt.training.run import train
from tests.training.conftest import POOL, collected, make_tiny, nudge, short

PLAIN: dict[str, Any] = {"track": ("none",), "device": "cpu", "threads": 1}
shipped = pytest.mark.skipif(
    not (base_policy_path() / "model.safetensors").is_file(), reason="the base policy is not built"
)


def write(path: Path, count: int = 40) -> str:
    rows = [
        {"prompt": f"{n}+1=?\n", "chosen": f"{n}+1={n + 1};#{n + 1}", "rejected": f"#{n + 3}"} for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# --- without a reward -----------------------------------------------------------------------------------------------


@shipped
def test_a_run_on_pairs_needs_no_reward(tmp_path: Path) -> None:
    data = write(tmp_path / "pairs.jsonl")
    config = RunConfig(method="dpo", data=data, steps=4, prompts=8, lr=1e-4, out=str(tmp_path / "run"), **PLAIN)
    summary = train(config, quiet=True)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert not any("reward" in line for line in lines)
    # A tenth of the rows is held out; at the start policy and reference are equal.
    evaluations = [line for line in lines if "eval/loss" in line]
    assert evaluations[0]["eval/loss"] == pytest.approx(math.log(2)) and evaluations[0]["eval/prompts"] == 4
    assert evaluations[-1]["eval/loss"] < evaluations[0]["eval/loss"]
    assert summary["accuracy_after"] == evaluations[-1]["eval/rewards/accuracies"] == 1.0
    steps = [line for line in lines if "rewards/margins" in line]
    assert steps[0]["loss"] == pytest.approx(math.log(2)) and steps[-1]["rewards/margins"] > 0


def test_what_is_needed_is_said_before_anything_is_written(tmp_path: Path) -> None:
    data = write(tmp_path / "pairs.jsonl")
    with pytest.raises(UsageError, match="needs a reward"):
        make_problem(RunConfig(method="dpo", data=data, pairs="on-policy"))
    with pytest.raises(UsageError, match="needs a reward"):
        make_problem(RunConfig(method="grpo", data=data))
    assert make_problem(RunConfig(method="dpo", data=data)).rewards == ()
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1+1"}\n', encoding="utf-8")
    config = RunConfig(method="dpo", data=str(tmp_path / "prompts.jsonl"), out=str(tmp_path / "run"), **PLAIN)
    with pytest.raises(UsageError, match=r"brings no pair .* --pairs on-policy"):
        train(config, quiet=True)
    assert not (tmp_path / "run").exists()


def test_answers_of_a_data_set_are_judged_only_for_a_part_that_asks() -> None:
    asked = []

    def reward(completions: list[str], **_: Any) -> list[float]:
        asked.append(len(completions))
        return [1.0] * len(completions)

    from polopt.rewards import NamedReward

    method, policy = short("dpo"), make_tiny()
    policy.add_model("ref")
    collector = Collector(
        policy,
        POOL,
        Scorer((NamedReward("mine", reward),)),
        prompts=4,
        group=4,
        limit=10,
        token_budget=10_000,
        profiler=Profiler(enabled=False),
    )
    batch = collector(method, torch.Generator().manual_seed(0)).kept
    assert batch is not None and "reward" not in batch and not asked
    assert not judged(method) and judged(method | {"reward": get_method("ppo").reward | get_method("dapo").reward})
    judging = method | {"filter": BestWorst()}
    batch = collector(judging, torch.Generator().manual_seed(0)).drawn
    assert asked == [8] and "score" in batch


def test_the_held_out_loss_is_that_of_the_method() -> None:
    policy, method = make_tiny(), short("dpo")
    rollout = collected(method, policy)
    nudge(policy)
    found, answers = LossEvaluator(POOL, method, 10, 10_000)(policy)
    assert answers.n_groups == len(POOL) and "logp" not in rollout
    whole = method.rollout(policy, [Request(example, 1) for example in POOL], limit=10, seed=0)
    with torch.no_grad():
        both = policy.evaluate(whole, frozenset({"logp", "logp/ref"}))
    ratio = whole.sum_steps(both["logp"] - both["logp/ref"]).view(-1, 2)
    gap = 0.1 * (ratio[:, 0] - ratio[:, 1])
    assert found["eval/loss"] == pytest.approx(float(torch.nn.functional.softplus(-gap).mean()), rel=1e-5)
    assert found["eval/accuracy"] == pytest.approx(float((gap > 0).float().mean()))
    few, _ = LossEvaluator(POOL, method, 10, 200)(policy)
    assert few["eval/loss"] == pytest.approx(found["eval/loss"], rel=1e-5)


def test_an_accuracy_of_pairs_has_an_interval() -> None:
    policy = make_tiny()
    policy.add_model("ref")
    found, answers = LossEvaluator(POOL, short("dpo"), 10, 10_000)(policy)
    # The policy is its reference: no pair has a gap, and none counts as right.
    low, high = accuracy_interval(0, answers.n_groups)
    assert (found["eval/accuracy"], found["eval/accuracy/low"], found["eval/accuracy/high"]) == (0.0, low, high)
    nudge(policy)
    lists, _ = LossEvaluator(POOL, short("dpo") | {"rollout": Dataset(form="lists")}, 10, 10_000)(policy)
    assert "eval/accuracy" in lists and "eval/accuracy/low" not in lists


def test_a_reward_model_is_measured_on_known_answers_and_a_policy_by_its_own() -> None:
    learned = make_problem(RunConfig(method="reward-model", eval_prompts=6))
    assert not learned.rewards and all(e.completions and e.labels for e in learned.held_out)
    for config in (RunConfig(method="dpo"), RunConfig(method="reward-model", pairs="on-policy")):
        asked = make_problem(dataclasses.replace(config, eval_prompts=6))
        assert asked.rewards and not any(example.completions for example in asked.held_out)


# --- on policy ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "judge"),
    [("pairs", BestWorst()), ("lists", Ranked()), ("demonstrations", Best()), ("singles", BestWorst())],
)
def test_on_policy_puts_samples_in_the_place_of_the_data_set(form: str, judge: Any) -> None:
    made = composed(get_method("dpo"), {"rollout.form": form, "rollout.temperature": "0.7"}, pairs="on-policy")
    assert made.rollout == Groups(temperature=0.7) and made.filter == judge
    assert made.objective == get_method("dpo").objective and not made.offline
    # It is a setting of the run, and its parts can be replaced like any others.
    config = RunConfig(method="dpo", pairs="on-policy", slots={"filter": "random-pair", "rollout.form": form})
    assert make_method(config).filter.name == "random-pair" and config.as_dict()["pairs"] == "on-policy"


def test_a_method_that_samples_has_no_pairs() -> None:
    with pytest.raises(UsageError, match="'grpo' samples its own answers"):
        make_method(RunConfig(method="grpo", pairs="on-policy"))


def test_the_best_and_the_worst_of_each_group_train() -> None:
    policy = make_tiny()
    own = composed(get_method("dpo"), {}, pairs="on-policy").clone()
    batch = collected(own, policy)
    assert batch.n_trajectories == 2 * batch.n_groups and "logp" in batch
    scores, labels = batch["score"], batch["label"]
    assert bool((scores[labels == 1] > scores[labels == 0]).all())


# --- the small world ------------------------------------------------------------------------------------------------


def test_the_rate_of_the_small_world() -> None:
    fast = resolve(RunConfig(method="grpo")).lr
    assert resolve(RunConfig(method="dpo")).lr == SMALL_WORLD_OFFLINE_LR < (fast or 0)
    assert resolve(RunConfig(method="reward-model")).lr == fast
    assert resolve(RunConfig(method="dpo", lr=1e-3)).lr == 1e-3


@shipped
def test_dpo_raises_the_accuracy_on_held_out_prompts(tmp_path: Path) -> None:
    config = RunConfig(method="dpo", steps=30, lr=5e-5, eval_prompts=256, out=str(tmp_path / "run"), **PLAIN)
    summary = train(config, quiet=True)
    assert summary["accuracy_after_ci"][0] > summary["accuracy_before_ci"][1]

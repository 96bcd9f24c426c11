"""A configuration says the same from Python, from a file and read back from a run, and refuses what it cannot mean."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from polopt.core.errors import UsageError
from polopt.methods import get_method, methods
from polopt.tasks.registry import get_task
from polopt.training import build
from polopt.training.build import DEFAULT_TASK, default_task, make_method, make_problem, resolve
from polopt.training.config import RunConfig, make_config, read_config, write_config

FULL = RunConfig(
    method="ppo",
    task="countdown",
    level=(2, 3),
    reward=("exact-match", "length:20@0.1"),
    on_reward_error="skip",
    steps=7,
    seconds=1.5,
    lr=3e-4,
    lr_schedule="cosine",
    lora=4,
    lora_targets=("q_proj", "v_proj"),
    eval_every="25",
    track=("none",),
    strict=True,
    slots={"advantage": "gae", "advantage.lam": 0.9, "rollout.stop": ["\n"], "schedule.epochs": 2},
)


@pytest.mark.parametrize("config", [RunConfig(), FULL], ids=["defaults", "everything"])
def test_a_written_configuration_reads_back_the_same(config: RunConfig, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    write_config(config, path)
    assert make_config(read_config(path)) == config
    write_config(make_config(read_config(path)), tmp_path / "again.yaml")
    assert (tmp_path / "again.yaml").read_bytes() == path.read_bytes()


TOML = """
method = "grpo"
steps = 5
eval-every = "10"
level = [1, 2]
reward = "exact-match"
"objective.high" = 0.3
[advantage]
eps = 1e-3
[rollout]
max-new-tokens = 12
temperature = 0.7
"""
YAML = """
method: grpo
steps: 5
eval_every: 10
level: [1, 2]
reward: exact-match
objective.high: 0.3
advantage: {eps: 1.0e-3}
slots:
  rollout:
    max-new-tokens: 12
    temperature: 0.7
"""


@pytest.mark.parametrize(("name", "text"), [("run.toml", TOML), ("run.yaml", YAML), ("run.yml", YAML)])
def test_toml_and_yaml_with_dotted_and_nested_slots(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    config = make_config(read_config(tmp_path / name))
    slots = {
        "objective.high": 0.3, "advantage.eps": 1e-3, "rollout.max_new_tokens": 12, "rollout.temperature": 0.7,
    }  # fmt: skip
    assert config == RunConfig(
        method="grpo", steps=5, eval_every="10", level=(1, 2), reward=("exact-match",), slots=slots
    )
    method = make_method(config)
    assert (method.objective.high, method.advantage.eps) == (0.3, 1e-3)
    assert (method.rollout.max_new_tokens, method.rollout.temperature) == (12, 0.7)


def test_yaml_reads_scientific_numbers_as_numbers() -> None:
    # YAML 1.1 takes 1e-4 without a dot for a string.
    assert make_config({"lr": "1e-4"}).lr == 1e-4


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"steps": "3"}, "steps"),
        ({"steps": 3.0}, "steps"),
        ({"steps": True}, "steps"),
        ({"lr": "fast"}, "lr"),
        ({"lr": True}, "lr"),
        ({"lr": [1e-3]}, "lr"),
        ({"strict": "yes"}, "strict"),
        ({"strict": 1}, "strict"),
        ({"model": 1.5}, "model"),
        ({"model": True}, "model"),
        ({"level": ["easy"]}, "level"),
        ({"level": [True]}, "level"),
        ({"reward": [1]}, "reward"),
        ({"prompts": None}, "prompts"),
        ({"lr_schedule": "linea"}, "lr_schedule"),
        ({"precision": "float16"}, "precision"),
        ({"slots": ["advantage"]}, "slots"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=f"setting '{named}'") as error:
        make_config(settings)
    value = settings[named]
    assert repr(value) in str(error.value) or repr(tuple(value)) in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stepz": 3}, "'stepz'.*'steps'"),
        ({"advantag": "gae"}, "'advantag'.*'advantage'"),
        ({"advantag.eps": 1}, "'advantag.eps'"),
        ({7: 3}, "7"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(settings: dict[Any, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_config(settings)


@pytest.mark.parametrize(
    "options",
    [
        {"prompts": 0},
        {"group": -1},
        {"token_budget": 0},
        {"keep": 0},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"warmup": -1},
        {"weight_decay": -0.1},
        {"beta1": 1.0},
        {"beta2": -0.1},
        {"threads": 0},
        {"reward_timeout": 0.0},
        {"lora": 0},
        {"lr_schedule": "lineer"},
        {"on_reward_error": "ignore"},
        {"precision": "half"},
        {"task": "grid", "data": "x.jsonl"},
    ],
    ids=repr,
)
def test_a_value_out_of_range_is_refused_by_its_option(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as error:
        RunConfig(**options)
    assert f"--{next(iter(options)).replace('_', '-')}" in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", "steps = ", "cannot be read"),
        ("a.yaml", "steps: [1", "cannot be read"),
        ("a.yaml", "- steps", "settings by name"),
        ("a.yaml", "", "settings by name"),
        ("a.yaml", "steps: !!python/object/apply:os.getcwd []", "cannot be read"),
    ],
)
def test_a_malformed_file_is_refused_by_its_path(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=message) as error:
        read_config(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_an_absent_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no configuration file .*none\.yaml"):
        read_config(tmp_path / "none.yaml")


def test_resolving_fills_every_default_and_keeps_what_was_given() -> None:
    small = resolve(RunConfig())
    assert small.lr and small.steps and small.task == "arithmetic" and small.out
    own = resolve(RunConfig(model="m", data="d.jsonl", lora=8))
    whole = resolve(RunConfig(model="m", data="d.jsonl"))
    assert own.task is None and own.steps and "grpo-d-0-" in str(own.out)
    assert whole.lr and own.lr and whole.lr < own.lr < small.lr  # the more weights move, the less each may
    assert resolve(RunConfig(seconds=3.0)).steps is None
    assert resolve(FULL) == dataclasses.replace(FULL, out=resolve(FULL).out)


def test_a_run_takes_the_task_of_its_method(monkeypatch: pytest.MonkeyPatch) -> None:
    taught = dataclasses.replace(get_method("grpo"), task="worksheet")
    monkeypatch.setattr(build, "get_method", {"grpo": get_method("grpo"), "taught": taught}.__getitem__)
    settled = resolve(RunConfig(method="taught"))
    assert settled.task == "worksheet" and "taught-worksheet-0-" in str(settled.out)
    assert resolve(RunConfig(method="taught", task="grid")).task == "grid"
    assert resolve(RunConfig(method="taught", data="d.jsonl")).task is None
    few = RunConfig(method="taught", eval_prompts=4, level=(1,))
    problem = make_problem(few)
    assert problem.name == "worksheet"
    assert [reward.name for reward in problem.rewards] == ["correct", "format", "length"]
    example = problem.held_out[0]
    texts = [f"#{example.answer}", "".join(example.steps) + "#0"]
    values = [r.function(completions=texts, example=[example, example]) for r in problem.rewards]
    assert values == [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
    own = make_problem(dataclasses.replace(few, reward=("exact-match",)))
    assert [reward.name for reward in own.rewards] == ["exact-match"]
    assert [r.name for r in make_problem(dataclasses.replace(few, method="grpo")).rewards] == ["correct"]


def test_methods_with_one_task_between_them_share_it() -> None:
    plain = get_method("grpo")
    first, second = (dataclasses.replace(plain, task=name) for name in ("worksheet", "grid"))
    assert default_task() == default_task(plain, plain) == DEFAULT_TASK
    assert default_task(first) == default_task(plain, first, first) == "worksheet"
    assert default_task(first, second) == default_task(second, plain, first) == DEFAULT_TASK


def test_every_method_names_a_task_that_exists() -> None:
    for method in methods().values():
        get_task(default_task(method))


def test_a_controllers_starting_coefficient_holds_from_the_start() -> None:
    plain = get_method("reinforce")
    assert plain.reward.beta == 0.0 and "logp/ref" not in plain.needs
    controlled = make_method(
        RunConfig(method="reinforce", slots={"controller": "adaptive-kl", "controller.initial": 0.2})
    )
    assert controlled.reward.beta == 0.2 and "logp/ref" in controlled.needs
    assert controlled.controller.beta is None  # nothing was observed yet

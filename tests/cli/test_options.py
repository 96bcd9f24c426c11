from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from polopt.cli.options import Option, field_docs, parse, run_options, split
from polopt.cli.train import groups
from polopt.core.errors import UsageError
from polopt.core.method import Schedule
from polopt.core.override import override
from polopt.methods import get_method
from polopt.training.config import RunConfig


def of(*arguments: str) -> tuple[list[str], set[str], dict[str, str]]:
    known = {option.name: option for options in groups().values() for option in options}
    return split(arguments, known, with_slots=True)


def test_every_setting_is_one_option_with_help() -> None:
    names = [option.name for options in groups().values() for option in options]
    assert len(names) == len(set(names))
    assert {f.name for f in dataclasses.fields(RunConfig)} - {"slots"} <= set(names)
    assert [option.name for options in groups().values() for option in options if not option.help] == []


def test_field_docs_are_the_strings_below_the_fields() -> None:
    docs = field_docs(RunConfig)
    assert docs["prompts"] == "Prompts per iteration."
    assert "method" in docs and "__post_init__" not in docs


def test_slots_and_fields_are_taken_out_and_the_rest_is_left_in_order() -> None:
    own, names, slots = of(
        "--prompts", "4", "--advantage", "leave-one-out", "grpo", "--objective.high=0.28", "--strict",
        "--rollout.max-new-tokens", "64", "--models.ref.every", "10", "--lr=-1", "--objective.low", "-0.5",
    )  # fmt: skip
    assert own == ["--prompts", "4", "grpo", "--strict", "--lr=-1"]
    assert names == {"prompts", "strict", "lr"}
    assert slots == {
        "advantage": "leave-one-out",
        "objective.high": "0.28",
        "rollout.max_new_tokens": "64",
        "models.ref.every": "10",
        "objective.low": "-0.5",
    }


def test_hyphens_are_kept_in_the_names_of_parts_and_the_last_setting_counts() -> None:
    slots = of("--objective.clipped-value.coefficient", "1", "--advantage=a", "--advantage=b", "--schedule.epochs=x=y")[
        2
    ]
    assert slots == {"objective.clipped-value.coefficient": "1", "advantage": "b", "schedule.epochs": "x=y"}


def test_an_option_wins_over_a_slot_of_its_name_which_has_a_prefix_of_its_own() -> None:
    own, names, slots = of("--reward", "math-verify", "--reward.beta", "0.1", "--slots.reward", "clip")
    assert own == ["--reward", "math-verify"]
    assert names == {"reward"}
    assert slots == {"reward.beta": "0.1", "reward": "clip"}


def test_a_value_that_looks_like_nothing_known_stays_a_value() -> None:
    assert of("--model", "advantage", "--map", "prompt=question")[2] == {}
    assert of("--resume", "grpo")[0] == ["--resume", "grpo"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--promts", "3"), r"unknown option --promts; did you mean --prompts"),
        (("--zzzzzz",), r"unknown option --zzzzzz; see --help"),
        (("--objectve.high", "3"), r"unknown slot 'objectve' in --objectve.high; did you mean --objective.high\?"),
        (("--advantag", "x"), r"unknown option --advantag; did you mean --advantage"),
        (("--advantage",), r"--advantage needs a value"),
        (("--objective.high", "--strict"), r"--objective.high needs a value"),
    ],
)
def test_what_cannot_be_split(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        of(*arguments)


def test_values_have_the_type_of_their_setting() -> None:
    given = parse(
        "train", "", groups(),
        ["--map", "prompt=q", "--map=answer=a", "--level", "1", "2", "--lr", "1e-4", "--no-strict",
         "--lora-alpha", "None", "--max_rows", "7", "--track", "none", "grpo", "--reward", "a", "--reward", "b"],
        Option("slug", str | None, None, ""),
    )  # fmt: skip
    expected: dict[str, Any] = {
        "map": ("prompt=q", "answer=a"),
        "level": (1, 2),
        "lr": 1e-4,
        "strict": False,
        "lora_alpha": None,
        "max_rows": 7,
        "track": ("none",),
        "reward": ("a", "b"),
    }
    assert given.options == expected
    assert given.positional == "grpo"


def test_an_option_that_is_not_given_is_not_in_the_answer() -> None:
    assert parse("train", "", groups(), [], Option("slug", str | None, None, "")).options == {}


def test_a_value_of_the_wrong_type_ends_with_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse("train", "", groups(), ["--prompts", "many"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "--prompts" in error and "many" in error


def test_slots_are_no_options_of_a_command_without_a_method() -> None:
    with pytest.raises(UsageError, match="unknown option --advantage"):
        split(["--advantage", "rloo"], {"model": run_options()["model"]}, with_slots=False)


def test_split_names_mean_what_override_does() -> None:
    slots = of(
        "--advantage", "leave-one-out", "--objective.high", "0.28", "--rollout.max-new-tokens", "64",
        "--schedule.epochs=2", "--regularizer", "kl", "--regularizer.beta", "0.04", "--models.ref.every", "10",
        "--filter", "dapo",
    )[2]  # fmt: skip
    method = override(get_method("grpo"), slots)
    assert method.advantage.name == "leave-one-out"
    assert method.objective.high == 0.28
    assert method.rollout.max_new_tokens == 64
    assert method.schedule == Schedule(epochs=2)
    assert (method.regularizer.name, method.regularizer.beta) == ("kl", 0.04)
    assert method.models["ref"].every == 10
    assert method.filter == get_method("dapo").filter
    member = override(get_method("ppo"), of("--objective.clipped-value.coefficient", "0.5")[2])
    assert member.objective.parts[1].coefficient == 0.5

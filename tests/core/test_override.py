"""Slots and fields of parts replaced by dotted name, as command line and configuration files do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import pytest

from polopt.advantages.group import GroupCenter, GroupZScore, LeaveOneOut
from polopt.aggregations import FixedLength, TokenMean
from polopt.core.errors import UsageError
from polopt.core.method import Schedule
from polopt.core.override import coerce, override
from polopt.methods import get_method
from polopt.methods.base.ppo import GAE, ClippedValueLoss
from polopt.methods.base.reinforce import BatchBaseline
from polopt.objectives.clipped_surrogate import ClippedSurrogate
from polopt.regularizers.entropy import Entropy
from polopt.regularizers.kl import KL
from tests.support import worked

grpo, ppo, reinforce = (get_method(slug) for slug in ("grpo", "ppo", "reinforce"))


@pytest.mark.parametrize("value", [0.3, "0.3"])
def test_a_field(value: Any) -> None:
    made = override(grpo, {"objective.high": value})
    assert made.objective == ClippedSurrogate(high=0.3)
    assert grpo.objective == ClippedSurrogate()


def test_a_slot_by_the_name_of_a_part_or_the_slug_of_a_method() -> None:
    assert override(grpo, {"advantage": "leave-one-out"}).advantage == LeaveOneOut()
    assert override(grpo, {"advantage": "dr-grpo"}).advantage == GroupCenter()
    assert override(grpo, {"aggregation": "dapo"}).aggregation == TokenMean()
    assert override(grpo, {"advantage": GAE(lam=1.0)}).advantage == GAE(lam=1.0)
    assert override(ppo, {"reward": "none"}).reward is None
    assert override(ppo, {"models": "none"}).models == {}


def test_a_slot_is_replaced_before_its_fields() -> None:
    made = override(grpo, {"regularizer.beta": "0.1", "regularizer": "kl"})
    assert made.regularizer == KL(beta=0.1)


def test_a_member_of_a_sum() -> None:
    expected = (ClippedSurrogate(), ClippedValueLoss(coefficient=0.5))
    for key in ("objective.clipped-value.coefficient", "objective.1.coefficient", "objective.coefficient"):
        assert override(ppo, {key: "0.5"}).objective.parts == expected
    both = override(ppo, {"objective.low": 0.1, "objective.clipped-value.width": "none"})
    assert both.objective.parts == (ClippedSurrogate(low=0.1), ClippedValueLoss(width=None))


def test_the_only_part_of_a_slot_may_be_named() -> None:
    assert override(grpo, {"objective.clipped-surrogate.low": 0.1}).objective == ClippedSurrogate(low=0.1)


def test_a_field_of_several_members_must_be_qualified() -> None:
    made = grpo | {"regularizer": KL() + KL(model="teacher") + Entropy()}
    with pytest.raises(UsageError, match=r"--regularizer.beta: 2 members have it; name one of 0.beta, "):
        override(made, {"regularizer.beta": 1.0})
    assert override(made, {"regularizer.1.beta": 1}).regularizer.parts[1] == KL(beta=1.0, model="teacher")


def test_schedule_and_models() -> None:
    assert override(ppo, {"schedule.minibatches": "2"}).schedule == Schedule(epochs=4, minibatches=2)
    assert override(ppo, {"models.ref.every": "10"}).models["ref"].every == 10
    with pytest.raises(UsageError, match="schedule needs epochs >= 1"):
        override(ppo, {"schedule.epochs": "0"})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"advantages": "gae"}, "unknown slot 'advantages'; the slots are curriculum"),
        ({"advantage": "gaee"}, "unknown advantage 'gaee'; did you mean 'gae'"),
        ({"objective.hgih": 1}, r"clipped-surrogate\(.*\) has no field 'hgih'; it has low, high, cap, dual"),
        ({"objective.other.low": 1}, "--objective.other.low: 0 members have it; name one of 0.low"),
        ({"regularizer.beta": 1}, "--regularizer.beta: the slot is empty; fill it first with --regularizer PART"),
        ({"models.teacher.every": 1}, "--models.teacher.every: there is no 'teacher'; there are ref"),
        ({"models.ref": "none"}, "--models.ref: name a field of it, one of every"),
        ({"objective.high": "much"}, "--objective.high expects float, got 'much'"),
        ({"schedule.epochs": "1.5"}, "--schedule.epochs expects int, got '1.5'"),
        ({"advantage.unbiased": "maybe"}, "--advantage.unbiased expects true or false, got 'maybe'"),
        ({"aggregation": "fixed-length", "aggregation.length": "x"}, "expects int or none, got 'x'"),
    ],
)
def test_mistakes_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        override(grpo, settings)


def test_a_value_outside_the_listed_ones() -> None:
    assert override(reinforce, {"advantage.baseline": "none"}).advantage == BatchBaseline("none")
    for wrong in ("median", "None"):
        with pytest.raises(UsageError, match=f"--advantage.baseline expects one of none, mean, .*, got '{wrong}'"):
            override(reinforce, {"advantage.baseline": wrong})
    with pytest.raises(UsageError, match=r"--regularizer.estimator expects one of k1, k2, k3, got 'k4'"):
        override(grpo, {"regularizer": "kl", "regularizer.estimator": "k4"})


def test_state_survives_a_changed_field() -> None:
    running = reinforce | {"advantage": BatchBaseline("moving-average")}
    running.credit(worked())
    changed = override(running, {"advantage.decay": 0.5})
    assert changed.advantage.average == running.advantage.average is not None
    assert changed.advantage.decay == 0.5
    with pytest.raises(UsageError, match="has no field 'average'"):
        override(running, {"advantage.average": 0.0})


@pytest.mark.parametrize(
    ("value", "wanted", "expected"),
    [
        ("3", int, 3),
        ("3", float, 3.0),
        (3, float, 3.0),
        (3, float | None, 3.0),
        ("1e-6", float, 1e-6),
        ("inf", float, math.inf),
        ("none", float | None, None),
        ("null", int | None, None),
        ("7", int | None, 7),
        (None, int | None, None),
        ("TRUE", bool, True),
        ("0", bool, False),
        (False, bool, False),
        ("text", str, "text"),
        ("none", str, "none"),
        ("</s>,\n", tuple[str, ...], ("</s>", "\n")),
        ("1,2", tuple[int, ...], (1, 2)),
        ("", tuple[int, ...], ()),
        ("a=1,b=0.5", Mapping[str, float], {"a": 1.0, "b": 0.5}),
        ("a=1", Mapping[str, float] | None, {"a": 1.0}),
        ("none", Mapping[str, float] | None, None),
        ("points", Literal["points", "floats"], "points"),
        ("2", Literal[1, 2], 2),
    ],
)
def test_strings_become_the_type_of_the_field(value: Any, wanted: Any, expected: Any) -> None:
    made = coerce(value, wanted, "slot.field")
    assert made == expected
    assert type(made) is type(expected)


@pytest.mark.parametrize(
    ("value", "wanted"),
    [("x", int), ("", float), ("a", Mapping[str, float]), ("a=b", Mapping[str, float]), ("1,x", tuple[int, ...])],
)
def test_what_cannot_be_read(value: str, wanted: Any) -> None:
    with pytest.raises(UsageError, match=r"--slot.field expects"):
        coerce(value, wanted, "slot.field")


def test_defaults_are_untouched() -> None:
    assert override(grpo, {}) == grpo
    assert grpo.advantage == GroupZScore()
    assert override(grpo, {"aggregation": FixedLength(3)}).aggregation.length == 3

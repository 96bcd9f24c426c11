"""How parts compose, declare, describe themselves and keep state."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from polopt.core.errors import UsageError
from polopt.core.part import (
    SLOTS,
    Part,
    Stateful,
    Sum,
    Then,
    check_slot,
    clone,
    declared,
    describe,
    flatten,
    named_parts,
    part,
    settings,
    suggest,
    widest_unit,
    with_settings,
)


@dataclass(frozen=True)
class Add(Part):
    """Adds a number."""

    by: int = 1
    needs = frozenset({"a"})
    gives = frozenset({"b"})

    def __call__(self, value: Any) -> Any:
        return value + self.by


@dataclass(frozen=True)
class Double(Part):
    """Doubles."""

    unit = "group"
    evaluates = frozenset({"entropy"})

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"c"})

    def __call__(self, value: Any) -> Any:
        return 2 * value


@dataclass(frozen=True)
class Tally(Stateful):
    """Counts its calls."""

    step: int = 1
    count: int = field(default=0, init=False, compare=False)
    seen: torch.Tensor = field(default_factory=lambda: torch.zeros(2), init=False, compare=False)
    state = ("count", "seen")

    def __call__(self, value: Any) -> Any:
        self.remember(count=self.count + self.step, seen=self.seen + 1)
        return value


def test_then_runs_from_left_to_right() -> None:
    assert (Add(3) | Double())(1) == 8
    assert (Double() | Add(3))(1) == 5
    assert (Double() | Add(3) | Double())(1) == 10


def test_composites_are_flat() -> None:
    chain = (Add(1) | Add(2)) | (Add(3) | Add(4))
    assert isinstance(chain, Then)
    assert [p.by for p in flatten(chain)] == [1, 2, 3, 4]
    total = (Add(1) + Add(2)) + Double()
    assert isinstance(total, Sum)
    assert len(flatten(total)) == 3
    assert flatten(None) == ()
    assert flatten(Add(5)) == (Add(5),)


def test_declarations_of_members_are_united() -> None:
    both = Add() + Double()
    assert declared(both, "needs") == {"a", "c"}
    assert declared(both, "gives") == {"b"}
    assert declared(both, "evaluates") == {"entropy"}
    assert declared(None, "needs") == frozenset()
    assert declared(lambda rollout: rollout, "needs") == frozenset()


def test_the_widest_unit_wins() -> None:
    assert widest_unit(Add(), None) == "step"
    assert widest_unit(Add() + Double(), Add()) == "group"
    assert widest_unit() == "step"


def test_state_there_and_back() -> None:
    tally = Tally(2)
    for _ in range(3):
        tally(0)
    state = tally.state_dict()
    assert state["count"] == 6
    other = Tally(2)
    other.load_state_dict(state)
    assert other.count == 6
    other(0)
    assert (tally.count, other.count) == (6, 8)
    assert tally.seen.tolist() == [3, 3]


def test_state_is_checked_by_name() -> None:
    with pytest.raises(UsageError, match=r"\['count'\], this version declares \['count', 'seen'\]"):
        Tally().load_state_dict({"count": 1})
    with pytest.raises(ValueError, match="writes 'other'"):
        Tally().remember(other=1)


def test_state_of_a_composite_belongs_to_its_members() -> None:
    chain = Add() | Tally(1) | Tally(5)
    chain(0)
    state = chain.state_dict()
    assert set(state) == {"1", "2"}
    fresh = Add() | Tally(1) | Tally(5)
    fresh.load_state_dict(state)
    assert [p.count for p in flatten(fresh)[1:]] == [1, 5]
    with pytest.raises(UsageError, match="has parts"):
        (Tally() | Add()).load_state_dict(state)


def test_a_clone_has_its_own_state() -> None:
    tally = Tally()
    tally(0)
    other = clone(tally)
    other(0)
    assert (tally.count, other.count) == (1, 2)
    assert tally.seen.tolist() == [1, 1]


def test_changed_settings_keep_the_state() -> None:
    tally = Tally()
    tally(0)
    faster = with_settings(tally, {"step": 10})
    assert (faster.step, faster.count) == (10, 1)
    faster(0)
    assert (faster.count, tally.count) == (11, 1)


def test_settings_are_what_a_user_can_set() -> None:
    assert settings(Tally(3)) == {"step": 3}
    assert settings(lambda: None) == {}


def test_descriptions() -> None:
    assert describe(None) == "none"
    assert describe(named_parts("objective")["clipped-surrogate"]()).startswith("clipped-surrogate(low=0.2, high=0.2")
    assert describe(Add(2) | Double()) == "Add(by=2) | Double()"
    assert describe(Add(2) + Double()) == "Add(by=2) + Double()"
    assert describe(test_descriptions) == "test_descriptions"


def test_two_parts_of_a_slot_cannot_share_a_name() -> None:
    import polopt.objectives.clipped_surrogate  # noqa: F401

    with pytest.raises(ValueError, match="two parts of slot 'objective' are called 'clipped-surrogate'"):
        part("objective", "clipped-surrogate")(Double)


def test_slots() -> None:
    assert all(check_slot(slot) == slot for slot in SLOTS)
    with pytest.raises(UsageError, match="unknown slot 'advantages'; the slots are curriculum, "):
        check_slot("advantages")


def test_hints_at_misspelt_names() -> None:
    assert suggest("grppo", ["grpo", "ppo", "sapo"]).startswith("did you mean 'grpo'")
    assert "'a'" in suggest("zzzzzz", ["a", "b"])

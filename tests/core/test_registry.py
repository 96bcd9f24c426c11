"""Methods by slug, parts by slot and name."""

from __future__ import annotations

from pathlib import Path

import pytest

from polopt.advantages.group import GroupZScore
from polopt.core import registry
from polopt.core.errors import UsageError
from polopt.core.method import Method
from polopt.core.override import override
from polopt.core.part import SLOTS, named_parts
from polopt.core.registry import find_part, method, registered
from polopt.methods import get_method, methods
from polopt.methods.base.grpo import grpo


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    methods()
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))


def test_every_file_of_methods_registers_itself() -> None:
    known = methods()
    assert {"reinforce", "rloo", "ppo", "grpo", "dr-grpo", "dapo", "gspo", "cispo", "sapo"} <= set(known)
    assert list(known) == sorted(known)
    for slug, made in known.items():
        assert made.slug == slug
        assert made.family
        assert made.paper
        assert made.seed
        assert len(made.doc.strip().splitlines()) > 1, f"{slug} says nothing about itself"


def test_a_misspelt_slug_gets_a_hint() -> None:
    assert get_method("grpo") is grpo
    with pytest.raises(UsageError, match=r"own is path/to/file.py"):
        get_method("mine")
    with pytest.raises(UsageError, match=r"unknown method 'grppo'; did you mean 'grpo'.*`polopt methods` lists all"):
        get_method("grppo")


def test_a_method_of_the_user_inherits_and_replaces() -> None:
    mine = method("mine", grpo, advantage=GroupZScore(eps=0.5))
    assert (mine.slug, mine.family) == ("mine", "user")
    assert mine.doc == __doc__
    assert mine.objective == grpo.objective
    assert mine.advantage.eps == 0.5
    assert registered()["mine"] is mine


def test_the_task_of_a_method_is_inherited_and_kept() -> None:
    assert grpo.task is None
    first = method("first", grpo, task="worksheet")
    second = method("second", first, advantage=GroupZScore(eps=0.5))
    third = method("third", first, task="grid")
    assert [m.task for m in (first, second, third)] == ["worksheet", "worksheet", "grid"]
    assert (second | {"advantage": GroupZScore()}).task == second.clone().task == "worksheet"
    assert override(third, {"advantage.eps": "0.1"}).task == "grid"


def test_mistakes_in_a_method_file() -> None:
    with pytest.raises(UsageError, match="unknown slot 'advantages'"):
        method("mine", grpo, advantages=GroupZScore())
    with pytest.raises(ValueError, match="two methods are called 'grpo'"):
        method("grpo", grpo)


def test_a_file_is_named_after_its_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "__name__", "polopt.methods.base.other")
    with pytest.raises(ValueError, match=r"method 'a-b' must live in a_b.py, not in polopt.methods.base.other"):
        method("a-b", grpo)
    assert method("other", grpo).family == "base"


def test_parts_by_name_or_method() -> None:
    assert find_part("advantage", "group-zscore") == GroupZScore()
    assert find_part("advantage", "grpo") == GroupZScore()
    assert find_part("regularizer", "none") is None
    with pytest.raises(UsageError, match="slot 'advantage' cannot be empty"):
        find_part("advantage", "none")
    assert find_part("models", "none") == {}
    with pytest.raises(UsageError, match=r"unknown advantage 'group-zskore'; did you mean 'group-zscore'"):
        find_part("advantage", "group-zskore")


@pytest.mark.parametrize("slot", SLOTS)
def test_every_named_part_stands_by_itself(slot: str) -> None:
    for name, make in named_parts(slot).items():  # type: ignore[arg-type]
        made = make()
        assert made.slot == slot
        assert made.name == name
        assert made.__doc__
        assert isinstance(made.needs, frozenset)
        assert isinstance(made.state_dict(), dict)
    assert isinstance(grpo, Method)


OWN = '"""Mine: it centres."""\nfrom polopt.core.registry import method\nfrom polopt.methods.base.rloo import rloo\n'


def test_a_file_of_one_s_own_is_a_method(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(OWN + 'first = method("mine-first", rloo)\nmine = method("mine", first, paper="draft")\n')
    made = get_method(str(file))
    assert (made.slug, made.family, made.paper, made.doc) == ("mine", "user", "draft", "Mine: it centres.")
    assert made.slots() == get_method("rloo").slots()
    # From now on other methods can take its parts by its slug.
    assert find_part("advantage", "mine") == made.advantage and get_method(str(file)) is made


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (OWN, "defines no method: end it with NAME = method"),
        (OWN + 'mine = method("grpo", rloo)\n', "fails to load: ValueError: two methods are called 'grpo'"),
        ("1 / 0\n", "fails to load: ZeroDivisionError"),
        (None, "there is no file"),
    ],
)
def test_a_file_without_a_method_is_said(tmp_path: Path, text: str | None, said: str) -> None:
    file = tmp_path / "mine.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UsageError, match=said):
        get_method(str(file))

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from polopt.cli.catalog import described, first_line, name_of
from polopt.cli.options import run_options, split
from polopt.core.part import SLOTS, named_parts
from polopt.methods import get_method, methods
from tests.cli.conftest import Result


def test_methods_json_is_the_registry(run: Callable[..., Result]) -> None:
    result = run("methods", "--json")
    listed = {entry["slug"]: entry for entry in json.loads(result.out)}
    assert result.code == 0
    assert list(listed) == list(methods())
    for slug, method in methods().items():
        entry = listed[slug]
        assert set(entry) == {
            *("slug", "name", "title", "family", "seed", "paper", "task", "slots", "needs", "evaluates")
        }
        assert (entry["family"], entry["seed"], entry["paper"]) == (method.family, method.seed, method.paper)
        assert entry["task"] == method.task
        assert entry["needs"] == sorted(method.needs)
        assert entry["evaluates"] == sorted(method.evaluates)
        assert set(entry["slots"]) == set(method.slots())
        assert entry["name"] and entry["name"] in method.title
    assert listed["grpo"]["name"] == "GRPO"
    assert listed["grpo"]["slots"]["objective"].startswith("clipped-surrogate(low=0.2, high=0.2")
    assert listed["ppo"]["slots"]["objective"].count("clipped-value(") == 1
    assert listed["grpo"]["slots"]["models"] == "ref: snapshot(every=None, at=None, folder=None)"


def test_methods_of_one_family(run: Callable[..., Result]) -> None:
    listed = json.loads(run("methods", "--family", "base", "--json").out)
    assert {entry["family"] for entry in listed} == {"base"}
    wrong = run("methods", "--family", "nothing")
    assert (wrong.code, wrong.out) == (2, "")
    assert "unknown family 'nothing'; the families are" in wrong.err and "base" in wrong.err


def test_the_table_has_every_method(run: Callable[..., Result]) -> None:
    table = run("methods").out
    for slug in methods():
        assert slug in table


@pytest.mark.parametrize("slug", list(methods()))
def test_show_has_citation_parts_and_options_that_the_command_line_knows(
    run: Callable[..., Result], slug: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    result = run("show", slug)
    method = get_method(slug)
    assert result.code == 0
    assert method.title in result.out
    for slot in method.slots():
        assert f" {slot} " in result.out
    flags = [word for word in result.out.split("│") if word.strip().startswith("--")]
    assert flags
    for flag in flags:
        _, _, slots = split([flag.strip(), "1"], run_options(), with_slots=True)
        assert len(slots) == 1


def test_show_names_the_member_where_two_share_a_field(
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    shown = run("show", "ppo").out
    assert "--objective.coefficient" in shown
    assert "--objective.high" in shown
    assert "--models.ref.every" in shown


def test_show_of_nothing_known(run: Callable[..., Result]) -> None:
    result = run("show", "gppo")
    assert result.code == 2
    assert "unknown method 'gppo'; did you mean" in result.err and "'ppo'" in result.err
    assert run("show").code == 2


def test_parts_of_a_slot(run: Callable[..., Result]) -> None:
    result = run("parts", "advantage")
    assert result.code == 0
    for name in named_parts("advantage"):
        assert name in result.out
    assert "clipped-surrogate" not in result.out
    wrong = run("parts", "advantages")
    assert wrong.code == 2
    assert "unknown slot 'advantages'; did you mean 'advantage'" in wrong.err


def test_all_parts(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    table = run("parts").out
    for slot in SLOTS:
        for name in named_parts(slot):
            assert name in table


def test_names_and_first_lines() -> None:
    class Bare:
        pass

    assert name_of(get_method("dapo")) == "DAPO"
    assert first_line(Bare) == ""
    assert first_line(get_method("grpo").objective).startswith("l_t = -min(rho_t A_t")
    assert described(None) == "none"

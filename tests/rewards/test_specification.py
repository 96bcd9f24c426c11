"""Specifications of rewards: names, arguments, weights, and functions of the user's own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from polopt.core.errors import UsageError
from polopt.rewards import REWARDS, parse_reward

SOURCE = """
from dataclasses import dataclass

@dataclass
class Settings:
    bonus: float = 1.0

def short(completions, **kwargs):
    return [Settings().bonus / (1 + len(said)) for said in completions]

number = 3
"""


@pytest.mark.parametrize(
    ("spec", "name", "weight"),
    [
        ("math-verify", "math-verify", 1.0),
        ("math-verify@0.5", "math-verify", 0.5),
        ("math-verify:10@-2", "math-verify:10", -2.0),
        ("length:200@1e-3", "length:200", 0.001),
        ("regex:a@b", "regex:a@b", 1.0),
        ("regex:a@b@2", "regex:a@b", 2.0),
        ("regex:a@5", "regex:a", 5.0),
        ("regex:a@5@1", "regex:a@5", 1.0),
    ],
)
def test_names_and_weights(spec: str, name: str, weight: float) -> None:
    reward = parse_reward(spec)
    assert (reward.name, reward.weight) == (name, weight)


def test_a_function_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "random.py").write_text(SOURCE)
    reward = parse_reward(f"{tmp_path}/random.py:short@0.25")
    assert (reward.name, reward.weight) == ("short", 0.25)
    assert reward.function(completions=["", "abc"]) == [1.0, 0.25]
    monkeypatch.chdir(tmp_path)
    assert parse_reward("random.py:short").function(completions=[""]) == [1.0]
    import random

    assert hasattr(random, "random")


def test_a_function_in_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_package").mkdir()
    (tmp_path / "some_package" / "__init__.py").write_text("")
    (tmp_path / "some_package" / "judges.py").write_text(SOURCE)
    (tmp_path / "some_package" / "broken.py").write_text("import no_such_module_at_all")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        reward = parse_reward("some_package.judges:short@2")
        assert (reward.name, reward.weight) == ("short", 2.0)
        assert reward.function(completions=["a"]) == [0.5]
        with pytest.raises(UsageError, match=r"module 'some_package.broken' fails to load: .*no_such_module_at_all"):
            parse_reward("some_package.broken:short")
    finally:
        for name in [name for name in sys.modules if name.startswith("some_package")]:
            del sys.modules[name]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("math-verfy", "no reward 'math-verfy'; built in are exact-match, format, length, math-verify, model, regex"),
        ("math-verfy:3", "no reward 'math-verfy:3'; built in are"),
        ("lenght:target", "no reward 'lenght:target'; built in are"),
        ("", "no reward ''; built in are"),
        ("math-verify@heavy", "weight 'heavy' of reward 'math-verify@heavy' is not a number"),
        ("math-verify@", "weight '' of reward 'math-verify@' is not a number"),
        ("math-verify@nan", "weight of reward 'math-verify@nan' must be a finite number"),
        ("math-verify@inf", "weight of reward 'math-verify@inf' must be a finite number"),
        ("regex:", "reward 'regex:' has a colon but no argument"),
        ("no/such/file.py:f", "there is no file 'no/such/file.py'"),
        ("r.py:absent", "'r.py' has nothing under the name 'absent', not a function"),
        ("r.py:number", "'r.py' has a value of type int under the name 'number', not a function"),
        ("r.py:short@much", "weight 'much' of reward 'r.py:short@much' is not a number"),
        ("broken.py:f", "reward file 'broken.py' fails to load: NameError: name 'undefined' is not defined"),
        ("syntax.py:f", "reward file 'syntax.py' fails to load: SyntaxError"),
        ("./notes.txt:f", "'./notes.txt' is not a Python file"),
        ("json:absent", "'json' has nothing under the name 'absent'"),
    ],
)
def test_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.py").write_text(SOURCE)
    (tmp_path / "broken.py").write_text("undefined")
    (tmp_path / "syntax.py").write_text("def")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UsageError) as caught:
        parse_reward(spec)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", sorted(REWARDS))
def test_every_built_in_reward_says_what_it_computes(name: str) -> None:
    assert REWARDS[name].__doc__

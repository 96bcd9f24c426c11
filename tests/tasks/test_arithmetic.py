from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from polopt.core.example import Example
from polopt.tasks.arithmetic import Arithmetic

TASK = Arithmetic()


def independent_value(prompt: str) -> int:
    """Sum of the signed terms, read from the right by splitting on the last operator."""
    text = prompt.removesuffix("=?\n")
    cut = max(text.rfind("+"), text.rfind("-"))
    if cut < 0:
        return int(text)
    term = int(text[cut + 1 :])
    return independent_value(text[:cut]) + (term if text[cut] == "+" else -term)


def test_answers_and_every_step_agree_with_an_independent_evaluator() -> None:
    for example in TASK.examples(400, seed=0):
        assert int(str(example.answer)) == independent_value(str(example.prompt))
        assert len(example.steps) == example.columns["level"] == len(re.findall(r"[+-]", str(example.prompt)))
        for step in example.steps:
            left, _, right = step.rstrip(";").partition("=")
            assert independent_value(left) == int(right)
            assert 0 <= int(right) <= 60


@given(guess=st.integers(-200, 200))
def test_an_integer_is_right_exactly_when_it_is_the_value(guess: int) -> None:
    example = Example(id="a", prompt="7+8-5=?\n", answer="10")
    assert TASK.score(f"#{guess}", example) == float(guess == independent_value("7+8-5=?\n"))


def test_steps_are_not_checked_but_the_answer_is_strict() -> None:
    example = Example(id="a", prompt="7+8-5=?\n", answer="10")
    assert TASK.score("7+8=99;#10", example) == 1.0
    for wrong in ("#10.0", "#+10", "#1e1", "#10;", "#٣", "#--10", "10"):
        assert TASK.score(wrong, example) == 0.0


def test_form_of_a_completion_tells_its_strategy() -> None:
    assert TASK.strategy_of("7+8=15;15-5=10;#10") == "worked"
    assert TASK.strategy_of("7+8-5=10;#10") == "shortcut"
    assert TASK.strategy_of("#10") == "direct"
    assert TASK.strategy_of("ten") == "other"

from __future__ import annotations

import ast
import itertools
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polopt.core.example import Example
from polopt.tasks.countdown import Countdown, evaluate

TASK = Countdown()


def value_by_syntax_tree(expression: str) -> Fraction:
    """Python's grammar, exact fractions."""

    def walk(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant):
            return Fraction(node.value)
        assert isinstance(node, ast.BinOp)
        left, right = walk(node.left), walk(node.right)
        if isinstance(node.op, ast.Add):
            return left + right
        if isinstance(node.op, ast.Sub):
            return left - right
        return left * right if isinstance(node.op, ast.Mult) else left / right

    return walk(ast.parse(expression, mode="eval").body)


def every_value(numbers: tuple[Fraction, ...]) -> dict[Fraction, str]:
    """All values of all expressions that use each number once, by combining any two until one is left."""
    found: dict[Fraction, str] = {}

    def combine(items: tuple[tuple[Fraction, str], ...]) -> None:
        if len(items) == 1:
            found.setdefault(*items[0])
            return
        for i, j in itertools.permutations(range(len(items)), 2):
            (a, left), (b, right) = items[i], items[j]
            rest = tuple(item for k, item in enumerate(items) if k not in (i, j))
            options = [(a + b, f"({left}+{right})"), (a - b, f"({left}-{right})"), (a * b, f"({left}*{right})")]
            if b:
                options.append((a / b, f"({left}/{right})"))
            for option in options:
                combine((*rest, option))

    combine(tuple((number, str(number)) for number in numbers))
    return found


EXPRESSIONS = st.recursive(
    st.integers(1, 40).map(str),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("+-*/"), inner).map("".join),
        inner.map("({})".format),
    ),
    max_leaves=7,
)


@settings(deadline=None)
@given(EXPRESSIONS)
def test_the_parser_agrees_with_pythons(expression: str) -> None:
    mine = evaluate(expression)
    try:
        expected = value_by_syntax_tree(expression)
    except ZeroDivisionError:
        assert mine is None
        return
    if len(expression) > 64:
        assert mine is None
    else:
        numbers = expression.translate(str.maketrans("+-*/()", "      ")).split()
        assert mine == (expected, [int(number) for number in numbers])


@pytest.mark.parametrize(
    "text", ["", "1+", "+1", "-1", "1 + 2", "(1", "1)", "()", "1()", "(1)(2)", "01", "1**2", "1//2"]
)
def test_what_is_not_an_expression_has_no_value(text: str) -> None:
    assert evaluate(text) is None


@pytest.mark.parametrize("numbers", [(3, 5, 7), (1, 12), (2, 2, 9)])
def test_exactly_the_reachable_targets_can_be_scored(numbers: tuple[int, ...]) -> None:
    reachable = every_value(tuple(Fraction(number) for number in numbers))
    listed = ",".join(str(number) for number in numbers)
    for target in range(1, 100):
        example = Example(id="c", prompt=f"{listed}>{target}\n")
        scores = {value: TASK.score(f"#{text}", example) for value, text in reachable.items()}
        assert {value for value, score in scores.items() if score} == ({Fraction(target)} & reachable.keys())


def test_every_drawn_target_is_reachable_and_steps_are_true() -> None:
    for example in TASK.examples(60, seed=0, levels=[2, 3]):
        listed, _, target = str(example.prompt).strip().partition(">")
        numbers = tuple(Fraction(number) for number in listed.split(","))
        assert Fraction(target) in every_value(numbers)
        assert value_by_syntax_tree(str(example.answer)) == int(target)
        for step in example.steps:
            left, _, right = step.rstrip(";").partition("=")
            assert value_by_syntax_tree(left) == int(right)


def test_each_number_once_no_more_no_fewer() -> None:
    example = Example(id="c", prompt="2,2,4>8\n")
    assert TASK.score("#2+2+4", example) == TASK.score("#(4-2)/2+7", example) + 1 == 1.0
    for wrong in ("#2*4", "#2+2+2+2", "#4+4", "#8", "#2+2*4", "#2+2+4=8"):
        assert TASK.score(wrong, example) == 0.0

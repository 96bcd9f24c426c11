"""What the calculator answers, and what it leaves alone."""

from __future__ import annotations

import random

import pytest

from polopt.core.example import Example
from polopt.rollouts.calculator import Calculator, value

ASKED = Example("1", "7+8=?\n")


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("7+8=", "15;"),
        ("7+8=15;15-5=", "10;"),
        ("3-10=", "-7;"),
        ("2+3*4-1=", "13;"),
        ("so 12*12=", "144;"),
        ("999999999*999999999=", f"{999999999**2};"),
    ],
)
def test_it_fills_in_a_result(completion: str, answer: str) -> None:
    assert Calculator().reply(ASKED, completion) == answer


@pytest.mark.parametrize(
    "completion",
    [
        "=",
        "7=",
        "7+=",
        "+7+8=",
        "7++8=",
        "7/8=",
        "2**9=",
        "1234567890+1=",
        "7+8= ",
        "__import__('os')=",
        "1+" * 22 + "1=",
    ],
)
def test_it_has_nothing_to_say_about_anything_else(completion: str) -> None:
    assert Calculator().reply(ASKED, completion) == ""


def test_values_are_those_of_python() -> None:
    rng = random.Random(0)
    for _ in range(200):
        text = str(rng.randint(0, 99)) + "".join(
            rng.choice("+-*") + str(rng.randint(0, 99)) for _ in range(rng.randint(1, 8))
        )
        assert value(text) == eval(text)  # noqa: S307 (our own digits and signs)

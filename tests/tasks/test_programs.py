from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from polopt.tasks.programs import OPERATIONS, Programs, run_program

TASK = Programs()


def run_on_integers(name: str, values: list[int]) -> list[int]:
    """The operations again, on integers and with loops."""
    result: list[int] = []
    if name == "sort":
        return sorted(values)
    if name == "rev":
        for value in values:
            result.insert(0, value)
    if name == "inc":
        result = [0 if value == 9 else value + 1 for value in values]
    if name == "tail":
        result = [values[index] for index in range(1, len(values))]
    if name == "swap":
        result = list(values)
        result[0], result[-1] = result[-1], result[0]
    return result


@given(st.lists(st.sampled_from(sorted(OPERATIONS)), max_size=4), st.text("0123456789", min_size=6, max_size=8))
def test_programs_agree_with_operations_on_integers(names: list[str], digits: str) -> None:
    expected, values = [], [int(digit) for digit in digits]
    for name in names:
        values = run_on_integers(name, values)
        expected.append("".join(str(value) for value in values))
    assert run_program(names, digits) == expected


def test_every_operation_of_a_prompt_does_something() -> None:
    for example in TASK.examples(300, seed=1):
        names, _, digits = str(example.prompt).strip().partition(":")
        lists = [digits, *run_program(names.split(","), digits)]
        assert all(before != after for before, after in pairwise(lists))
        assert lists[-1] == example.answer
        assert [step.rstrip(">") for step in example.steps] == lists[1:]


def test_leading_zeros_are_part_of_a_list() -> None:
    example = next(e for e in TASK.examples(300, seed=0) if str(e.answer).startswith("0"))
    assert TASK.score(f"#{example.answer}", example) == 1.0
    assert TASK.score(f"#{int(str(example.answer))}", example) == 0.0

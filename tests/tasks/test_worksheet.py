from __future__ import annotations

import random

import pytest

from polopt.core.example import Example
from polopt.tasks.arithmetic import Arithmetic
from polopt.tasks.registry import get_task
from polopt.tasks.task import rewards_of, with_answer
from polopt.tasks.worksheet import Worksheet

TASK = Worksheet()
SHORT = Example("a", "7+8=?\n", "15", ("7+8=15;",))
LONG = Example("b", "7+8-5+3=?\n", "13", ("7+8=15;", "15-5=10;", "10+3=13;"))


def judged(completion: str, example: Example) -> dict[str, float]:
    return {name: judge(completion, example) for name, judge in rewards_of(TASK).items()}


@pytest.mark.parametrize(
    ("completion", "example", "correct", "form", "length"),
    [
        ("7+8=15;#15", SHORT, 1, 1, 1),
        ("7+8=16;#16", SHORT, 0, 1, 1),  # a wrong item is in form
        ("7+8=15;#", SHORT, 0, 1, 1),
        ("#15", SHORT, 1, 0, 1),
        ("", SHORT, 0, 0, 1),
        ("7+8=15;7+8=15;#15", SHORT, 1, 0, 1),  # more items than operations
        ("7+8=15;15-5=10;10+3=13;#13", LONG, 1, 1, 0),
        ("7+8=15;#13", LONG, 1, 0, 1),  # fewer items than operations
        ("7+8-5=10;10+3=13;#13", LONG, 1, 0, 1),  # two operations in an item; 20 characters
        ("7+8-5=10;10+3=13; #13", LONG, 1, 0, 0),
        ("7+8=15;15-5=10;10+3=13;", LONG, 0, 0, 0),
        ("7+8-5=10;15-5=10;10+3=13;#13", LONG, 1, 0, 0),
    ],
)
def test_three_judgements(completion: str, example: Example, correct: int, form: int, length: int) -> None:
    assert judged(completion, example) == {"correct": correct, "format": form, "length": length}
    assert next(iter(judged(completion, example))) == "correct"


def test_form_and_brevity_agree_on_easy_prompts_and_are_opposed_on_hard_ones() -> None:
    brief = {}
    for level in TASK.levels:
        examples = TASK.examples(300, seed=1, levels=[level])
        worked = [(with_answer(e.steps, str(e.answer)), e) for e in examples]
        assert all(judged(text, e)["format"] == judged(text, e)["correct"] == 1 for text, e in worked)
        brief[level] = sum(judged(text, e)["length"] for text, e in worked) / len(worked)
    assert brief[1] == 1 and brief[2] > 0.9
    assert brief[3] < 0.1 and brief[4] == 0


def test_a_completion_can_be_right_and_short_at_every_level() -> None:
    for example in TASK.examples(40, seed=2):
        assert judged(f"#{example.answer}", example) == {"correct": 1, "format": 0, "length": 1}


def test_prompts_and_demonstrations_are_those_of_arithmetic() -> None:
    plain = Arithmetic()
    for example in TASK.examples(40, seed=3):
        for strategy in TASK.strategies:
            ours = TASK.demonstration(example, strategy, random.Random(0))
            assert ours == plain.demonstration(example, strategy, random.Random(0))
            assert TASK.score(ours, example) == plain.score(ours, example)
    prompts, others = ({str(e.prompt) for e in task.examples(4000, seed=0, levels=[1])} for task in (TASK, plain))
    assert len(prompts & others) > 0.8 * len(prompts)
    assert (TASK.levels, TASK.max_new_tokens, TASK.shares) == (plain.levels, plain.max_new_tokens, plain.shares)


def test_a_task_without_rewards_of_its_own_has_its_verifier() -> None:
    task = get_task("grid")
    named = rewards_of(task)
    assert list(named) == ["correct"]
    example = task.examples(1, seed=0)[0]
    right = with_answer(example.steps, str(example.answer))
    assert [named["correct"](text, example) for text in (right, "")] == [1.0, 0.0]

"""Written answers of generated tasks: what is right is on top, something is worse, and grades tell near from far."""

from __future__ import annotations

import random

import pytest

from polopt.core.errors import UsageError
from polopt.rollouts.dataset import groups_of
from polopt.tasks.answers import with_answers
from polopt.tasks.registry import get_task, tasks
from polopt.tasks.task import grade_of, with_answer

every_task = pytest.mark.parametrize("name", list(tasks()))


@every_task
def test_every_example_has_a_best_answer_and_a_worse_one(name: str) -> None:
    task = get_task(name)
    examples = task.examples(60, seed=3)
    made = with_answers(task, examples, seed=3)
    right = 0
    for plain, example in zip(examples, made, strict=True):
        assert (example.id, example.prompt, example.answer) == (plain.id, plain.prompt, plain.answer)
        assert len(example.completions) == len(example.labels) == 4
        assert list(example.labels) == [grade_of(task, text, example) for text in example.completions]
        assert min(example.labels) < max(example.labels) <= 1
        ((best, worst),) = groups_of(example, "pairs")
        assert (best[1], worst[1]) == (1.0, 0.0) and best[0] != worst[0]
        right += int(task.score(str(best[0]), example))
    # The worksheet's three rewards are opposed: its best answers need not be right.
    assert right == 60 or name == "worksheet"


@every_task
def test_answers_are_a_function_of_the_seed(name: str) -> None:
    task = get_task(name)
    examples = task.examples(10, seed=0)
    assert with_answers(task, examples, seed=0) == with_answers(task, examples, seed=0)
    assert with_answers(task, examples, seed=0) != with_answers(task, examples, seed=1)
    # Not of the examples beside it.
    assert with_answers(task, examples[4:6], seed=0) == with_answers(task, examples, seed=0)[4:6]


@every_task
def test_no_wrong_answer_is_graded_above_a_right_one(name: str) -> None:
    task = get_task(name)
    rng = random.Random(0)
    for example in task.examples(40, seed=1):
        reference = with_answer(example.steps, str(example.answer))
        texts = [reference, "", "#", "garbage", "#99", *(reference[:k] for k in range(len(reference)))]
        texts += [task.demonstration(example, strategy, rng) for strategy in task.strategies for _ in range(5)]
        grades = {text: grade_of(task, text, example) for text in texts}
        assert all(0 <= grade <= 1 for grade in grades.values())
        if name == "worksheet":
            continue
        assert grades[reference] == 1.0
        assert all((grade == 1) == bool(task.score(text, example)) for text, grade in grades.items())


def test_grades_of_each_task() -> None:
    (sum_,) = get_task("arithmetic").examples(1, seed=0)
    truth = int(str(sum_.answer))
    task = get_task("arithmetic")
    assert [grade_of(task, f"#{truth + off}", sum_) for off in (0, 1, 4, 10, 400)] == pytest.approx(
        [1, 0.45, 0.3, 0, 0]
    )
    (program,) = get_task("programs").examples(1, seed=0)
    digits = str(program.answer)
    spoilt = str((int(digits[0]) + 1) % 10) + digits[1:]
    assert grade_of(get_task("programs"), f"#{spoilt}", program) == pytest.approx(0.5 * (len(digits) - 1) / len(digits))
    (target,) = get_task("countdown").examples(1, seed=0, levels=[2])
    left, _, goal = str(target.prompt).strip().partition(">")
    a, b = map(int, left.split(","))
    off = min(abs(a + b - int(goal)), 10)
    assert grade_of(get_task("countdown"), f"#{a}+{b}", target) == pytest.approx(1.0 if off == 0 else 0.5 - off / 20)
    (sheet,) = get_task("worksheet").examples(1, seed=0)
    assert grade_of(get_task("worksheet"), with_answer(sheet.steps, str(sheet.answer)), sheet) == 1.0


def test_a_grid_is_graded_by_how_far_one_comes() -> None:
    task = get_task("grid")
    (example,) = task.examples(1, seed=0)
    moves = str(example.answer)
    # Nothing lies beyond the border.
    assert grade_of(task, f"#{moves[:-1]}", example) == pytest.approx(0.5)
    assert grade_of(task, "#" + "U" * 50, example) < 0.1


def test_one_answer_cannot_be_compared() -> None:
    with pytest.raises(UsageError, match="at least two"):
        with_answers(get_task("arithmetic"), [], seed=0, count=1)

"""Written answers of generated tasks: lists graded by the task itself, from which pairs and demonstrations follow."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from polopt.core.errors import UsageError
from polopt.core.example import Example
from polopt.tasks.task import Task, demonstration, grade_of, with_answer

ANSWERS = 4
"""Answers of each example."""
_ATTEMPTS = 100


def with_answers(task: Task, examples: Sequence[Example], *, seed: int, count: int = ANSWERS) -> list[Example]:
    """The examples with ``completions``, ``count`` of them, and their grades as ``labels`` (`grade_of`).

    Answers are written as the shipped policy writes (`demonstration`): quick ones are mostly wrong, worked ones mostly
    right. At least one is the best there can be and one is worse; the others are as they come. A function of task,
    examples, seed and count; the reference solution stands for a best answer that does not come, the same without the
    last character of its answer for a worse one. Raises UsageError for fewer than two answers.
    """
    if count < 2:
        raise UsageError(f"answers can be compared where there are at least two, got {count}")
    return [
        _with_answers(task, example, random.Random(f"{task.name}/{seed}/{example.id}"), count) for example in examples
    ]


def _with_answers(task: Task, example: Example, rng: random.Random, count: int) -> Example:
    reference = with_answer(example.steps, str(example.answer))
    top = grade_of(task, reference, example)
    drawn = [demonstration(task, example, rng) for _ in range(count)]
    grades = [grade_of(task, text, example) for text in drawn]
    for wanted in (True, False):
        # The place of a draw that is not needed: of the others one too many are on the other side.
        if any((grade >= top) == wanted for grade in grades):
            continue
        place = rng.randrange(count)
        found = (demonstration(task, example, rng) for _ in range(_ATTEMPTS))
        graded = ((text, grade_of(task, text, example)) for text in found)
        own = reference if wanted else with_answer(example.steps, str(example.answer)[:-1])
        drawn[place], grades[place] = next(
            (pair for pair in graded if (pair[1] >= top) == wanted), (own, grade_of(task, own, example))
        )
    return replace(example, completions=tuple(drawn), labels=tuple(grades))

"""What a generated task is, and how every task draws its examples.

All tasks write completions the same way: worked steps, then ``#`` and the final answer, then the end of the text.
``"".join(example.steps) + "#" + example.answer`` is a right completion of every example, so the first ``k`` steps
are a prefix of it and can be appended to a prompt as a hint.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import Protocol

from polopt.core.errors import UsageError
from polopt.core.example import Example

ANSWER_MARK = "#"
SPLITS = ("train", "test")
TEST_SHARE = 0.2
"""Share of all possible prompts that belongs to the ``test`` split."""

_FRESH_ATTEMPTS = 50

Judge = Callable[[str, Example], float]
"""What one reward makes of a completion of an example; never an error, whatever the text."""


class Task(Protocol):
    """A family of generated prompts with an exact verifier. ``strategies`` are the ways of answering it that the
    shipped base policy was taught, ``shares`` how often (they sum to 1). A task that judges a completion in several
    respects also has ``rewards``, see :func:`rewards_of`; one that grades wrong answers has ``grade``, a `Judge`, see
    :func:`grade_of`."""

    @property
    def name(self) -> str: ...

    @property
    def levels(self) -> tuple[int, ...]:
        """Difficulty levels, easiest first."""
        ...

    @property
    def max_new_tokens(self) -> int:
        """Completion budget in bytes that no worked solution exceeds."""
        ...

    @property
    def strategies(self) -> tuple[str, ...]: ...

    @property
    def shares(self) -> tuple[float, ...]: ...

    def examples(
        self, count: int, *, seed: int, split: str = "train", levels: Sequence[int] | None = None
    ) -> list[Example]:
        """``count`` examples, levels in turn: a function of (count, seed, split, levels). See :func:`draw_examples`."""
        ...

    def score(self, completion: str, example: Example) -> float:
        """1.0 if the completion ends in a right answer, else 0.0; a malformed completion is 0.0, never an error."""
        ...

    def demonstration(self, example: Example, strategy: str, rng: random.Random) -> str:
        """A completion written in the manner of ``strategy``, right or wrong as that strategy tends to be."""
        ...

    def strategy_of(self, completion: str) -> str:
        """The strategy whose form a completion has, or ``"other"``."""
        ...


def rewards_of(task: Task) -> Mapping[str, Judge]:
    """The rewards of a task by name: ``correct``, its verifier, then those of its mapping ``rewards`` where it has one.

    A run reports the first one as the accuracy.
    """
    named: Mapping[str, Judge] = getattr(task, "rewards", {})
    return {"correct": task.score, **named}


def grade_of(task: Task, completion: str, example: Example) -> float:
    """How good an answer is, in [0, 1], 1 for one that nothing can be said against.

    The task's own ``grade`` where it has one: it tells near misses from far ones, and never puts a wrong answer above a
    right one. Else the mean of its rewards.
    """
    if hasattr(task, "grade"):
        return float(task.grade(completion, example))
    judged = [judge(completion, example) for judge in rewards_of(task).values()]
    return sum(judged) / len(judged)


def demonstration(task: Task, example: Example, rng: random.Random) -> str:
    """A completion by a strategy drawn with the task's shares: what the base policy was trained on."""
    (strategy,) = rng.choices(task.strategies, weights=task.shares)
    return task.demonstration(example, strategy, rng)


def split_of(prompt: str) -> str:
    """``"test"`` for a fixed fifth of all prompts, chosen by a hash of the prompt's text, else ``"train"``.

    Since the text alone decides, no prompt is in both splits whatever the seeds and levels.
    """
    bucket = int.from_bytes(blake2b(prompt.encode(), digest_size=4, person=b"polopt-split").digest(), "big")
    return "test" if bucket < TEST_SHARE * 2**32 else "train"


def example_id(task: str, level: int, prompt: str) -> str:
    """``task/level/hash of the prompt``."""
    return f"{task}/{level}/{blake2b(prompt.encode(), digest_size=6).hexdigest()}"


def draw_examples(
    task: Task,
    make: Callable[[int, random.Random], Example | None],
    count: int,
    *,
    seed: int,
    split: str,
    levels: Sequence[int] | None,
) -> list[Example]:
    """Draw ``count`` examples of one split, cycling through ``levels`` (the task's own by default).

    ``make(level, rng)`` proposes an example, or None when its draw came to nothing. Prompts are unique within the
    call; a level with too few prompts left repeats some (same prompt, same id) once 50 proposals in a row were known.
    Raises :class:`UsageError` for a negative count, an unknown split, no level or an unknown level.
    """
    wanted = tuple(task.levels if levels is None else levels)
    if count < 0:
        raise UsageError(f"task {task.name!r} cannot draw {count} examples: give a count of 0 or more")
    if split not in SPLITS:
        raise UsageError(f"unknown split {split!r} of task {task.name!r}: choose one of {', '.join(SPLITS)}")
    if not wanted:
        raise UsageError(f"task {task.name!r} was given no levels: choose some of {task.levels}")
    for level in wanted:
        if level not in task.levels:
            raise UsageError(f"task {task.name!r} has no level {level!r}: choose some of {task.levels}")

    # A string seed is hashed with SHA-512 by `random`, so it does not depend on the process.
    rng = random.Random(f"{task.name}/{split}/{seed}")
    seen: set[str] = set()
    drawn: list[Example] = []
    while len(drawn) < count:
        level = wanted[len(drawn) % len(wanted)]
        known = 0
        while True:
            example = make(level, rng)
            if example is None or split_of(str(example.prompt)) != split:
                continue
            if example.id not in seen or known == _FRESH_ATTEMPTS:
                break
            known += 1
        seen.add(example.id)
        drawn.append(example)
    return drawn


def final_answer(completion: str) -> str | None:
    """The text after the last ``#``, without surrounding blanks; None if there is no mark."""
    _, mark, answer = completion.rpartition(ANSWER_MARK)
    return answer.strip(" \n") if mark else None


def with_answer(steps: Sequence[str], answer: str) -> str:
    """A completion: the steps, the mark, the answer."""
    return "".join(steps) + ANSWER_MARK + answer

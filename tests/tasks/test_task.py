"""What every task promises: determinism, disjoint splits, hints that are prefixes, verifiers that never raise."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polopt.core.errors import UsageError
from polopt.core.example import Example
from polopt.tasks.registry import get_task, tasks
from polopt.tasks.task import Task, demonstration, split_of, with_answer

TASKS = list(tasks().values())
CASES = [pytest.param(task, level, id=f"{task.name}-{level}") for task in TASKS for level in task.levels]
LONGEST_PROMPT = 32


@pytest.fixture(params=TASKS, ids=lambda task: str(task.name))
def task(request: pytest.FixtureRequest) -> Task:
    found: Task = request.param
    return found


@pytest.mark.parametrize(("task", "level"), CASES)
def test_worked_steps_of_every_level_are_right_and_fit_the_budget(task: Task, level: int) -> None:
    for split in ("train", "test"):
        for example in task.examples(60, seed=3, split=split, levels=[level]):
            completion = with_answer(example.steps, str(example.answer))
            assert task.score(completion, example) == 1.0
            assert len(completion.encode()) < task.max_new_tokens
            assert len(str(example.prompt)) <= LONGEST_PROMPT
            assert example.columns["level"] == level
            assert example.id.startswith(f"{task.name}/{level}/")


@pytest.mark.parametrize(("task", "level"), CASES)
def test_an_answer_of_another_prompt_is_not_always_right(task: Task, level: int) -> None:
    examples = task.examples(40, seed=5, levels=[level])
    swapped = [task.score(with_answer((), str(other.answer)), example) for example, other in pairwise(examples)]
    assert sum(swapped) < 0.5 * len(swapped)


def test_examples_are_a_function_of_seed_and_split(task: Task) -> None:
    first = task.examples(50, seed=11)
    assert first == task.examples(50, seed=11)
    assert first != task.examples(50, seed=12)
    assert first[:20] == task.examples(20, seed=11)


def test_splits_share_no_prompt_and_are_a_fifth_apart(task: Task) -> None:
    train = {example.prompt for seed in range(3) for example in task.examples(300, seed=seed)}
    test = {example.prompt for seed in range(3) for example in task.examples(300, seed=seed, split="test")}
    assert not train & test
    assert {split_of(str(prompt)) for prompt in test} == {"test"}
    share = sum(split_of(f"{task.name} {index}") == "test" for index in range(4000)) / 4000
    assert 0.17 < share < 0.23


def test_prompts_are_unique_and_levels_take_turns(task: Task) -> None:
    hardest = task.levels[-1]
    examples = task.examples(200, seed=0, levels=[hardest])
    assert len({example.id for example in examples}) == len({example.prompt for example in examples}) == 200
    rounds = 7
    mixed = Counter(example.columns["level"] for example in task.examples(rounds * len(task.levels), seed=0))
    assert mixed == dict.fromkeys(task.levels, rounds)


def test_an_exhausted_level_repeats_its_prompts_under_their_ids() -> None:
    examples = get_task("countdown").examples(300, seed=0, split="test", levels=[2])
    prompts = {example.prompt for example in examples}
    assert len(prompts) < 300
    assert len({example.id for example in examples}) == len(prompts)


def test_asking_for_what_does_not_exist_names_it(task: Task) -> None:
    with pytest.raises(UsageError, match="unknown split 'dev'"):
        task.examples(1, seed=0, split="dev")
    with pytest.raises(UsageError, match="no level 99"):
        task.examples(1, seed=0, levels=[99])
    with pytest.raises(UsageError, match="no levels"):
        task.examples(1, seed=0, levels=[])
    with pytest.raises(UsageError, match="-1 examples"):
        task.examples(-1, seed=0)


def test_unknown_task_lists_the_names() -> None:
    with pytest.raises(UsageError, match="'arithmetics': choose one of arithmetic, countdown, programs, grid"):
        get_task("arithmetics")
    assert get_task("grid") == tasks()["grid"]


GARBAGE = st.one_of(
    st.text(max_size=80),
    st.text(alphabet="0123456789+-*/()#;=, \nUDLRx?>²٣", max_size=80),
    st.builds("#{}".format, st.text(alphabet="0123456789+-*/()UDLR", max_size=80)),
    st.just("#" + "9" * 5000),
    st.just("#" + "(" * 5000 + "1" + ")" * 5000),
)


@settings(max_examples=250, deadline=None)
@given(completion=GARBAGE, which=st.integers(0, 200))
def test_no_text_makes_a_verifier_raise(completion: str, which: int) -> None:
    task = TASKS[which % len(TASKS)]
    pool: list[Example] = POOLS[task.name]
    example = pool[which % len(pool)]
    score = task.score(completion, example)
    assert score in (0.0, 1.0)
    assert task.strategy_of(completion) in (*task.strategies, "other")
    if "#" not in completion:
        assert score == 0.0


POOLS = {task.name: task.examples(12, seed=2) for task in TASKS}


def test_the_answer_counts_only_where_the_text_ends_in_it(task: Task) -> None:
    example = task.examples(1, seed=4)[0]
    right = with_answer(example.steps, str(example.answer))
    assert task.score(right, example) == 1.0
    assert task.score(right + "\n", example) == 1.0
    for wrong in ("", "#", str(example.answer), right + "#", right + " or so", right + "#?", right.replace("#", "")):
        assert task.score(wrong, example) == 0.0


def test_strategies_have_a_form_and_an_accuracy_of_their_own(task: Task) -> None:
    assert len(task.strategies) == len(task.shares) >= 2
    assert sum(task.shares) == pytest.approx(1.0)
    rng = random.Random(0)
    examples = task.examples(400, seed=6, levels=task.levels[1:])
    accuracy = {}
    for strategy in task.strategies:
        texts = [task.demonstration(example, strategy, rng) for example in examples]
        recognised = sum(task.strategy_of(text) == strategy for text in texts)
        assert recognised > 0.8 * len(texts)
        accuracy[strategy] = sum(map(task.score, texts, examples)) / len(texts)
        assert max(len(text.encode()) for text in texts) < task.max_new_tokens
    accurate = accuracy[task.strategies[0]]
    assert accurate == 1.0
    assert accuracy["direct"] < 0.5
    mixed = [task.score(demonstration(task, example, rng), example) for example in examples]
    expected = sum(share * accuracy[name] for name, share in zip(task.strategies, task.shares, strict=True))
    assert sum(mixed) / len(mixed) == pytest.approx(expected, abs=0.1)

"""Scoring: what functions receive, what they may return, and every way in which they fail."""

from __future__ import annotations

import asyncio
import functools
import math
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from polopt.core.errors import UsageError
from polopt.core.example import Example
from polopt.rewards import InvalidReward, NamedReward, RewardError, Scores, Transcript, score

CHAT = ({"role": "user", "content": "1+1?"},)


def transcripts(count: int, **fields: Any) -> list[Transcript]:
    return [
        Transcript(
            example=Example(id=f"q/{n}", prompt=f"{n}+1?", **{name: value[n] for name, value in fields.items()}),
            prompt=f"{n}+1?",
            completion="x" * n,
            completion_ids=tuple(range(n)),
        )
        for n in range(count)
    ]


def named(function: Callable[..., Any], name: str = "r", weight: float = 1.0) -> NamedReward:
    return NamedReward(name, function, weight)


def returning(*values: Any) -> NamedReward:
    return named(lambda completions: list(values))


def same(tensor: torch.Tensor, *expected: float) -> bool:
    return torch.equal(tensor.nan_to_num(-99.0), torch.tensor(expected).nan_to_num(-99.0))


def test_everything_a_function_written_for_trl_receives() -> None:
    seen: dict[str, Any] = {}

    def reward(prompts: Any, completions: Any, **kwargs: Any) -> list[float]:
        seen.update(kwargs, prompts=prompts, completions=completions)
        return [0.0] * len(completions)

    batch = transcripts(2, answer=["1", None], columns=[{"level": 3}, {"solution": "s", "prompt": "raw"}])
    state = object()
    score(batch, [named(reward)], trainer_state=state)
    assert callable(seen.pop("log_extra")) and callable(seen.pop("log_metric"))
    assert seen == {
        "prompts": ["0+1?", "1+1?"],
        "completions": ["", "x"],
        "completion_ids": [[], [0]],
        "answer": ["1", None],
        "level": [3, None],
        "solution": [None, "s"],
        "example": [transcript.example for transcript in batch],
        "id": ["q/0", "q/1"],
        "truncated": [False, False],
        "trainer_state": state,
    }


def test_chats_are_lists_of_messages() -> None:
    seen: dict[str, Any] = {}

    def reward(prompts: Any, completions: Any, chosen: Any) -> list[float]:
        seen.update(prompts=prompts, completions=completions, chosen=chosen)
        return [1.0]

    example = Example(id="a", prompt=CHAT, chosen=({"role": "assistant", "content": "2"},))
    score([Transcript(example, CHAT, "two", (5,))], [named(reward)])
    assert seen == {
        "prompts": [[{"role": "user", "content": "1+1?"}]],
        "completions": [[{"role": "assistant", "content": "two"}]],
        "chosen": [[{"role": "assistant", "content": "2"}]],
    }


def test_trl_functions_run_unchanged() -> None:
    trl_rewards = pytest.importorskip("trl.rewards")
    example = Example(id="a", prompt=CHAT, columns={"solution": r"\frac{1}{3}"})
    texts = [r"<think>ok</think>\boxed{\frac{1}{3}}", r"\boxed{\frac{1}{2}}"]
    batch = [Transcript(example, CHAT, text, (1,)) for text in texts]
    scores = score(
        batch,
        [named(trl_rewards.accuracy_reward, "accuracy"), named(trl_rewards.think_format_reward, "think", 0.5)],
        timeout=20.0,
    )
    assert same(scores.rewards["accuracy"], 1.0, 0.0)
    assert same(scores.rewards["think"], 1.0, 0.0)
    assert same(scores.total, 1.5, 0.0)


def test_functions_get_only_what_they_take() -> None:
    def reward(completions: Any, answer: Any, strict: bool = True) -> list[float]:
        assert strict
        return [float(len(said)) for said in completions]

    class Judge:
        def __call__(self, *, completion_ids: Any) -> list[float]:
            return [2.0 * len(ids) for ids in completion_ids]

    partial = functools.partial(reward, strict=True)
    scores = score(transcripts(3, answer=["a"] * 3), [named(reward, "a"), named(Judge(), "b"), named(partial, "c")])
    assert same(scores.rewards["a"], 0.0, 1.0, 2.0)
    assert same(scores.rewards["b"], 0.0, 2.0, 4.0)
    assert same(scores.rewards["c"], 0.0, 1.0, 2.0)


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_parameter_without_a_column_is_named(on_error: Any) -> None:
    def reward(completions: Any, solution: Any) -> list[float]:
        return [0.0]

    with pytest.raises(RewardError, match=r"reward 'r' takes 'solution'.*available are .*answer"):
        score(transcripts(1, answer=["a"]), [named(reward)], on_error=on_error)


def test_async_functions() -> None:
    async def reward(completions: Any, **kwargs: Any) -> list[float]:
        return [float(len(said)) for said in completions]

    assert same(score(transcripts(3), [named(reward)]).total, 0.0, 1.0, 2.0)

    async def notebook() -> Scores:
        return score(transcripts(3), [named(reward)])

    assert same(asyncio.run(notebook()).total, 0.0, 1.0, 2.0)


def test_logged_metrics_are_averaged() -> None:
    def reward(completions: Any, log_metric: Any, log_extra: Any, **kwargs: Any) -> list[float]:
        log_extra("said", completions)
        log_metric("loud", 1)
        log_metric("loud", torch.tensor(4.0))
        return [0.0] * len(completions)

    assert score(transcripts(2), [named(reward)]).metrics == {"loud": 2.5}


@pytest.mark.parametrize(
    "values",
    [[1, 0.5], (True, 0.5), np.array([1.0, 0.5]), torch.tensor([1.0, 0.5]), [np.float32(1), torch.tensor(0.5)]],
)
def test_what_counts_as_numbers(values: Any) -> None:
    total = score(transcripts(2), [named(lambda completions: values)]).total
    assert total.dtype == torch.float32
    assert same(total, 1.0, 0.5)


def test_total_over_the_rewards_that_apply() -> None:
    a = [1.0, None, None, 2.0]
    b = [3.0, 5.0, None, None]
    scores = score(transcripts(4), [named(lambda completions: a, "a", 2.0), named(lambda completions: b, "b", -1.0)])
    assert same(scores.rewards["a"], 1.0, math.nan, math.nan, 2.0)
    assert same(scores.rewards["b"], 3.0, 5.0, math.nan, math.nan)
    assert same(scores.total, 2 * 1 - 3, -5.0, math.nan, 4.0)
    assert scores.invalid == ()


def test_no_transcripts() -> None:
    scores = score([], [named(lambda completions: 1 / 0)])
    assert scores.total.shape == scores.rewards["r"].shape == (0,)


def test_rewards_must_exist_and_have_their_own_names() -> None:
    with pytest.raises(UsageError, match="no reward to score with"):
        score(transcripts(1), [])
    with pytest.raises(UsageError, match="two rewards have the name 'r'"):
        score(transcripts(1), [returning(1.0), returning(1.0)])
    with pytest.raises(UsageError, match="weight of reward 'r' must be a finite number, but is nan"):
        named(len, weight=math.nan)
    with pytest.raises(UsageError, match="a reward needs a name"):
        named(len, name="")


def fails_on_two(completions: Any, id: Any) -> list[float]:
    for said, name in zip(completions, id, strict=True):
        if len(said) == 2:
            raise KeyError(name)
    return [float(len(said)) for said in completions]


class NotAnException(BaseException):
    pass


def raises_no_exception(completions: Any) -> list[float]:
    raise NotAnException


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (returning(*[0.0] * 3), r"reward 'r' returned 3 values for 4 completions \(first example 'q/0'\)"),
        (returning(*[0.0] * 5), r"reward 'r' returned 5 values for 4 completions"),
        (named(fails_on_two), r"reward 'r' raised KeyError: 'q/2' \(example 'q/2'\)"),
        (named(raises_no_exception), r"reward 'r' raised NotAnException \(example 'q/0'\)"),
        (returning(0, 1, math.nan, 2), r"returned float nan, which is not a finite number \(example 'q/2'\)"),
        (returning(0, math.inf, 1, 2), r"returned float inf, which is not a finite number \(example 'q/1'\)"),
        (returning(0, 1e39, 1, 2), r"returned float 1e\+39, which is not a finite number \(example 'q/1'\)"),
        (returning(0, 10**400, 1, 2), r"returned int 1000.*, which is not a finite number \(example 'q/1'\)"),
        (returning("1", 0, 0, 0), r"returned str '1', which is not a finite number \(example 'q/0'\)"),
        (returning([1], 0, 0, 0), r"returned list \[1\], which is not a finite number \(example 'q/0'\)"),
        (returning(1 + 0j, 0, 0, 0), r"returned complex \(1\+0j\), which is not a finite number"),
        (named(lambda completions: 1.0), r"returned float 1.0 instead of a list with one value per completion"),
        (named(lambda completions: None), r"returned NoneType None instead of a list"),
        (named(lambda completions: "1111"), r"returned str '1111' instead of a list"),
        (named(lambda completions: torch.tensor(1.0)), r"returned Tensor tensor\(1\.\) instead of a list"),
        (named(lambda completions: dict.fromkeys(range(4), 1.0)), r"returned dict .* instead of a list"),
        (named(lambda completions: (x for x in completions)), r"returned generator .* instead of a list"),
    ],
)
def test_failures_name_reward_example_and_value(reward: NamedReward, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        score(transcripts(4), [reward])


def test_skip_makes_only_the_failing_trajectories_invalid() -> None:
    good = named(lambda completions: [10.0] * len(completions), "good")
    scores = score(transcripts(4), [named(fails_on_two, "bad"), good], on_error="skip")
    assert same(scores.rewards["bad"], 0.0, 1.0, math.nan, 3.0)
    assert same(scores.rewards["good"], 10.0, 10.0, 10.0, 10.0)
    assert same(scores.total, 10.0, 11.0, math.nan, 13.0)
    assert scores.invalid == (InvalidReward(2, "bad", "raised KeyError: 'q/2'", "q/2"),)


def test_skip_with_values_that_are_no_rewards() -> None:
    scores = score(transcripts(4), [returning(1.0, math.nan, None, "x")], on_error="skip")
    assert same(scores.total, 1.0, math.nan, math.nan, math.nan)
    assert [(failure.index, failure.reason) for failure in scores.invalid] == [
        (1, "returned float nan, which is not a finite number"),
        (3, "returned str 'x', which is not a finite number"),
    ]


def test_skip_with_a_function_that_leaves_completions_out() -> None:
    def reward(completions: Any) -> list[float]:
        return [1.0 for said in completions if len(said) != 1]

    scores = score(transcripts(3), [named(reward)], on_error="skip")
    assert same(scores.total, 1.0, math.nan, 1.0)
    assert [(failure.index, failure.reason) for failure in scores.invalid] == [
        (1, "returned 0 values for 1 completions")
    ]


def test_two_rewards_may_fail_on_one_trajectory() -> None:
    scores = score(transcripts(3), [named(fails_on_two, "a"), named(fails_on_two, "b")], on_error="skip")
    assert [(failure.index, failure.reward) for failure in scores.invalid] == [(2, "a"), (2, "b")]


def hangs_on_two(completions: Any) -> list[float]:
    while any(len(said) == 2 for said in completions):
        pass
    return [float(len(said)) for said in completions]


def test_overrunning_is_a_failure() -> None:
    with pytest.raises(RewardError, match=r"reward 'r' took longer than 0.05 s \(first example 'q/0'\)"):
        score(transcripts(3), [named(hangs_on_two)], timeout=0.05)
    started = time.monotonic()
    scores = score(transcripts(4), [named(hangs_on_two)], timeout=0.05, on_error="skip")
    assert time.monotonic() - started < 2
    assert same(scores.total, 0.0, 1.0, math.nan, 3.0)
    assert scores.invalid == (InvalidReward(2, "r", "took longer than 0.05 s", "q/2"),)


def test_overrunning_on_another_thread() -> None:
    results: list[Scores] = []

    def work() -> None:
        results.append(score(transcripts(4), [named(hangs_on_two)], timeout=0.1, on_error="skip"))

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(5)
    assert same(results[0].total, 0.0, 1.0, math.nan, 3.0)


def test_a_keyboard_interrupt_is_not_a_failed_reward() -> None:
    def reward(completions: Any) -> list[float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(transcripts(1), [named(reward)], on_error="skip")

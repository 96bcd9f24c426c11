"""A policy's own answers, judged and written as the rows of a preference data set."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, Literal

from polopt.core.errors import UsageError
from polopt.core.example import Example, Text
from polopt.core.policy import Policy, Request
from polopt.core.rollout import Rollout
from polopt.filters.preferences import BestWorst, Ranked
from polopt.rewards.scoring import Scorer, transcripts
from polopt.rollouts.groups import Groups

Form = Literal["pairs", "lists", "labels"]
CHUNK: Final = 64
"""Prompts that are answered at a time."""


def answer_rows(
    policy: Policy,
    examples: Sequence[Example],
    scorer: Scorer,
    draw: Groups,
    *,
    group: int,
    form: Form,
    limit: int,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Rows that a data set reader takes for pairs, lists or labelled singles; ``group`` answers are drawn per prompt.

    - ``pairs``: ``chosen`` and ``rejected`` are the best and the worst answer, with ``chosen_score``,
      ``rejected_score``; prompts whose answers are equally good give no row.
    - ``lists``: ``completions`` are the different answers and ``labels`` their scores; the same prompts give no row.
    - ``labels``: a row per different answer, ``label`` says whether its score is 1. Raises UsageError where a score is
      neither 0 nor 1.

    A row also has ``prompt``, ``answer`` and the columns of its example, and in the first two forms its ``id``. Answers
    without a valid score are in no row. ``progress`` is told how many prompts are done, of how many.
    """
    for number, start in enumerate(range(0, len(examples), CHUNK)):
        asked = examples[start : start + CHUNK]
        requests = [Request(example, group) for example in asked]
        # Far apart, whatever seed the next data set has.
        rollout = draw(policy, requests, limit=limit, seed=seed * 1_000_003 + number)
        rollout, _ = scorer(rollout)
        yield from _rows(rollout, form)
        if progress is not None:
            progress(start + len(asked), len(examples))


def _rows(rollout: Rollout, form: Form) -> Iterator[dict[str, Any]]:
    if form != "labels":
        rollout = (BestWorst() if form == "pairs" else Ranked())(rollout)
    members = sorted(
        zip(rollout.group.tolist(), transcripts(rollout), rollout.reward.tolist(), strict=True), key=lambda m: m[0]
    )
    for _, found in itertools.groupby(members, key=lambda member: member[0]):
        judged = [(transcript, score) for _, transcript, score in found if score == score]
        if not judged:
            continue
        example = judged[0][0].example
        # One answer may have been drawn several times.
        scores = {transcript.completion: score for transcript, score in judged}
        answers = [_like(example.prompt, text) for text in scores]
        row = _described(example)
        if form == "pairs":
            if len(scores) < 2:
                continue  # equal texts, judged differently
            (best, high), (worst, low) = sorted(scores.items(), key=lambda item: -item[1])
            pair = {"chosen": _like(example.prompt, best), "rejected": _like(example.prompt, worst)}
            yield {**row, **pair, "chosen_score": high, "rejected_score": low}
        elif form == "lists":
            yield {**row, "completions": answers, "labels": list(scores.values())}
        else:
            del row["id"]
            for answer, score in zip(answers, scores.values(), strict=True):
                if score not in (0.0, 1.0):
                    raise UsageError(
                        f"an answer to example {example.id!r} has the score {score:g}; labels are for rewards that "
                        f"are 0 or 1, take pairs or lists"
                    )
                yield {**row, "completion": answer, "label": bool(score)}


def _described(example: Example) -> dict[str, Any]:
    """What a row says besides the answers; of the columns those that JSON can hold."""
    kept = {name: value for name, value in example.columns.items() if _is_json(value)}
    prompt = example.prompt if isinstance(example.prompt, str) else [dict(message) for message in example.prompt]
    row: dict[str, Any] = {**kept, "id": example.id, "prompt": prompt}
    return row if example.answer is None else row | {"answer": example.answer}


def _like(prompt: Text, answer: str) -> str | list[Mapping[str, str]]:
    """An answer as the data set of the prompt would hold it: a message where the prompt is a chat."""
    return answer if isinstance(prompt, str) else [{"role": "assistant", "content": answer}]


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True

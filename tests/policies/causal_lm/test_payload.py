"""Token payloads: selection and concatenation against lists of trajectories."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polopt.core.example import Example
from polopt.core.rollout import Rollout
from polopt.policies.causal_lm.payload import TokenPayload


@dataclasses.dataclass(frozen=True)
class Row:
    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    temperature: float
    name: str


def build(rows: list[Row]) -> TokenPayload:
    return TokenPayload.build(
        [row.prompt for row in rows],
        [row.completion for row in rows],
        torch.tensor([row.temperature for row in rows]),
        [Example(row.name, "p" + row.name) for row in rows],
        ["t" + row.name for row in rows],
        ["c" + row.name for row in rows],
    )


def rows_of(payload: TokenPayload) -> list[Row]:
    """Back to lists, checking every field on the way."""
    names = [example.id for example in payload.examples]
    assert list(payload.prompt_texts) == ["t" + name for name in names]
    assert list(payload.completions) == ["c" + name for name in names]
    prompts = [payload.prompts[i] for i in payload.prompt_of.tolist()]
    assert payload.prompt_lengths.tolist() == [len(prompt) for prompt in prompts]
    return [Row(*row) for row in zip(prompts, payload.completion_ids, payload.temperature.tolist(), names, strict=True)]


tokens = st.lists(st.integers(0, 3), min_size=1, max_size=3).map(tuple)
batches = st.lists(
    st.builds(Row, tokens, tokens, st.sampled_from([0.5, 1.0]), st.sampled_from("abc")), min_size=1, max_size=5
)


@given(batches, st.data())
def test_select_is_indexing(rows: list[Row], data: Any) -> None:
    index = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=6))
    chosen = build(rows).select(torch.tensor(index, dtype=torch.int64))
    assert rows_of(chosen) == [rows[i] for i in index]
    assert set(chosen.prompts) == {rows[i].prompt for i in index}  # none is kept for nothing


@given(st.lists(batches, min_size=1, max_size=3))
def test_concat_is_addition_and_stores_each_prompt_once(parts: list[list[Row]]) -> None:
    first, *others = [build(rows) for rows in parts]
    joined = first.concat(others)
    assert rows_of(joined) == [row for rows in parts for row in rows]
    assert sorted(joined.prompts) == sorted({row.prompt for rows in parts for row in rows})


def test_it_follows_the_rollout_through_select_concat_and_split() -> None:
    rows = [Row((1, 2), (3,) * n, 1.0, str(n)) for n in (2, 1, 3)]
    rollout = Rollout(torch.tensor([2, 1, 3]), torch.tensor([0, 1, 1]), payload=build(rows))
    assert rows_of(rollout.select(torch.tensor([False, True, True])).payload) == rows[1:]
    assert rows_of(Rollout.concat([rollout, rollout.select(torch.tensor([2, 0]))]).payload) == [*rows, rows[2], rows[0]]
    pieces = rollout.split("group", [4, 3, 5], budget=5)
    assert sorted(row.name for piece in pieces for row in rows_of(piece.payload)) == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"completions": ("a",)}, "completions has 1 entries for 2 trajectories"),
        ({"ids": torch.zeros(7, dtype=torch.int64)}, "add up to 2, but there are 7 tokens"),
        ({"prompt_of": torch.tensor([0, 4])}, "prompts up to 4 of 1"),
    ],
)
def test_sizes_that_disagree_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(build([Row((1,), (2,), 1.0, "a")] * 2), **change)

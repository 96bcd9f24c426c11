"""Uniform: every prompt once per epoch, in an order that a resumed run repeats."""

from __future__ import annotations

import pytest
import torch

from polopt.core.errors import UsageError
from polopt.core.example import Example
from polopt.curricula.uniform import Uniform

POOL = [Example(str(i), f"prompt {i}") for i in range(10)]


def draw(curriculum: Uniform, prompts: int, generator: torch.Generator, pool: list[Example] = POOL) -> list[str]:
    requests = curriculum(pool, prompts=prompts, group=4, generator=generator)
    assert all(request.count == 4 and request.prompt is None for request in requests)
    return [request.example.id for request in requests]


@pytest.mark.parametrize("prompts", [1, 3, 7, 10, 25])
def test_every_prompt_once_per_epoch(prompts: int) -> None:
    curriculum, generator = Uniform(), torch.Generator().manual_seed(0)
    drawn: list[str] = []
    while len(drawn) < 40:
        batch = draw(curriculum, prompts, generator)
        assert len(batch) == prompts
        drawn += batch
    epochs = [drawn[i : i + 10] for i in range(0, 40, 10)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(example.id for example in POOL)
    assert epochs[0] != epochs[1]


def test_a_run_is_a_function_of_its_seed() -> None:
    once, again, other = (draw(Uniform(), 10, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert once == again
    assert once != other


def test_a_resumed_run_goes_on_exactly() -> None:
    curriculum, generator = Uniform(), torch.Generator().manual_seed(0)
    draw(curriculum, 7, generator)
    state, noise = curriculum.state_dict(), generator.get_state()
    expected = [draw(curriculum, 4, generator) for _ in range(5)]
    resumed, generator = Uniform(), torch.Generator()
    resumed.load_state_dict(state)
    generator.set_state(noise)
    assert [draw(resumed, 4, generator) for _ in range(5)] == expected


def test_an_empty_pool_is_an_error() -> None:
    with pytest.raises(UsageError, match="no example"):
        draw(Uniform(), 1, torch.Generator(), [])


def test_another_pool_is_an_error_not_an_index_out_of_range() -> None:
    curriculum, generator = Uniform(), torch.Generator().manual_seed(0)
    draw(curriculum, 3, generator)
    with pytest.raises(UsageError, match="order of 10 examples, the pool now has 4"):
        draw(curriculum, 3, generator, POOL[:4])

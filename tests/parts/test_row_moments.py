"""Adam's direction for rows, against torch's own Adam; moments of rows that come and go."""

from __future__ import annotations

import pytest
import torch

from polopt.updates.row_moments import RowAdam
from tests.support import f64, same


def gradients(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(count, 4, 3, generator=generator, dtype=torch.float64))


def test_the_direction_is_that_of_torchs_adam() -> None:
    weight = torch.nn.Parameter(torch.zeros(4, 3, dtype=torch.float64))
    optimizer = torch.optim.Adam([weight], lr=1.0, betas=(0.8, 0.95), eps=1e-6)
    adam, moments = RowAdam(0.8, 0.95, 1e-6), {}
    rows = torch.arange(4)
    for gradient in gradients(4):
        before = weight.detach().clone()
        weight.grad = gradient.clone()
        optimizer.step()
        same(adam.direction(moments, rows, gradient), before - weight.detach())
        moments = adam.advance(moments, rows, gradient)


def test_rows_that_are_not_seen_keep_their_moments() -> None:
    adam = RowAdam()
    one, two, three = gradients(3)
    moments = adam.advance({}, torch.tensor([7, 2]), one[:2])
    assert moments["rows"].tolist() == [2, 7] and moments["count"] == 1
    later = adam.advance(moments, torch.tensor([5]), two[:1])
    assert later["rows"].tolist() == [2, 5, 7] and later["count"] == 2
    assert torch.equal(later["first"][[0, 2]], moments["first"])
    same(later["first"][1], 0.1 * two[0])
    same(later["second"][1], 0.001 * two[0] ** 2)
    # A row that was never seen starts from 0, whatever the count.
    fresh = adam.direction(later, torch.tensor([3]), three[:1])
    same(fresh, (0.1 * three[:1] / (1 - 0.9**3)) / ((0.001 * three[:1] ** 2 / (1 - 0.999**3)).sqrt() + 1e-8))


def test_nothing_seen_counts_as_a_step() -> None:
    adam = RowAdam()
    (one,) = gradients(1)
    moments = adam.advance(adam.advance({}, torch.tensor([1]), one[:1]), torch.tensor([], dtype=torch.int64), one[:0])
    assert moments["count"] == 2 and moments["rows"].tolist() == [1]


@pytest.mark.parametrize("chunk", [1, 2**23])
def test_moves_and_means_against_loops(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polopt.updates.row_moments.CHUNK", chunk)
    generator = torch.Generator().manual_seed(1)
    ids = torch.tensor([[4, 1], [1, 9], [4, 9]])
    slopes = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    h = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    adam = RowAdam()
    moments = adam.advance({}, torch.tensor([1, 3]), torch.randn(2, 5, generator=generator, dtype=torch.float64))
    moved = adam.moved(moments, ids, slopes, h)
    for t in range(3):
        for k in range(2):
            direction = adam.direction(moments, ids[t, k : k + 1], (slopes[t, k] * h[t])[None])
            same(moved[t, k], direction[0] @ h[t])
    expected = adam.advance(
        moments,
        torch.tensor([1, 4, 9]),
        torch.stack(
            [
                (slopes[0, 1] * h[0] + slopes[1, 0] * h[1]) / 2,
                (slopes[0, 0] * h[0] + slopes[2, 0] * h[2]) / 2,
                (slopes[1, 1] * h[1] + slopes[2, 1] * h[2]) / 2,
            ]
        ),
    )
    found = adam.advance_by_mean(moments, ids, slopes, h)
    assert torch.equal(found["rows"], expected["rows"]) and found["count"] == expected["count"]
    same(found["first"], expected["first"])
    same(found["second"], expected["second"])


def test_a_look_ahead_changes_nothing() -> None:
    adam = RowAdam()
    one, two = gradients(2)
    moments = adam.advance({}, torch.arange(4), f64(one))
    kept = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in moments.items()}
    adam.direction(moments, torch.arange(4), two)
    adam.advance(moments, torch.arange(4), two)
    assert all(torch.equal(moments[n], kept[n]) for n in ("rows", "first", "second"))

"""Steps that are picked out of a batch: how many, the largest, and a draw that belongs to the batch's content."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from polopt.core.rollout import Rollout
from polopt.objectives.selection import chosen, lottery
from polopt.policies.values import soft_minimum
from tests.support import close, f64, same, with_advantage, worked


def random_batch(steps: int, seed: int) -> Rollout:
    """One-step responses."""
    generator = torch.Generator().manual_seed(seed)
    old = -0.1 - 2 * torch.rand(steps, generator=generator, dtype=torch.float64)
    advantage = torch.randn(steps, generator=generator, dtype=torch.float64)
    return Rollout.from_arrays(range(steps), [0] * steps, step={"logp": old, "advantage": advantage})


def test_the_draw_does_not_depend_on_order_or_on_pieces() -> None:
    rollout = random_batch(50, 0)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    drawn = lottery(rollout)
    assert torch.equal(lottery(rollout.select(order)), drawn[order])
    assert torch.equal(lottery(rollout.piece(torch.arange(20, 30))), drawn[20:30])
    longer = with_advantage(worked(), [1.0, 1, 1, -1, -1, 0.5, 0.5, -0.5, -0.5, -0.5])
    assert torch.equal(lottery(longer)[3:5], lottery(longer.select(torch.tensor([1])))[:2])


def test_equal_log_probs_at_different_places_draw_apart() -> None:
    same_everywhere = {"logp": f64([-0.5] * 10), "advantage": f64([1.0] * 10)}
    one = Rollout.from_arrays([0] * 10, [0], step=same_everywhere)
    assert len(set(lottery(one).tolist())) == 10


def test_the_draw_is_uniform() -> None:
    """Which of eight candidates is drawn, over 2000 batches: chi square with 7 degrees of freedom."""
    counts = np.zeros(8)
    ranks = np.zeros(8)
    for seed in range(2000):
        rollout = random_batch(8, seed)
        first = int(lottery(rollout).argmin())
        counts[first] += 1
        ranks[int((rollout.logp < rollout.logp[first]).sum())] += 1
    for found in (counts, ranks):
        assert ((found - 250) ** 2 / 250).sum() < 24.3, "p below 0.001"


@pytest.mark.parametrize(("share", "count"), [(0.01, 1), (0.19, 1), (0.35, 3), (1.0, 6)])
def test_the_largest_candidates_are_chosen(share: float, count: int) -> None:
    rollout = random_batch(10, 1)
    candidates = torch.arange(10) % 5 != 0
    candidates[1:3] = False
    by = f64([9, 8, 7, 1, 3, 6, 2, 5, 4, 0])
    expected = [t for t in by.argsort(descending=True).tolist() if candidates[t]][:count]
    found = chosen(rollout, candidates, share, by=by)
    assert sorted(expected) == found.nonzero().flatten().tolist()
    # By lot: the same number, and of equal measures the same ones.
    drawn = chosen(rollout, candidates, share)
    assert int(drawn.sum()) == count and bool((candidates | ~drawn).all())
    assert torch.equal(drawn, chosen(rollout, candidates, share, by=torch.zeros(10)))


def test_no_candidate_means_nothing_chosen() -> None:
    rollout = random_batch(5, 0)
    assert not chosen(rollout, torch.zeros(5, dtype=torch.bool), 0.5).any()


def test_the_soft_minimum_lies_between_the_smallest_and_the_mean() -> None:
    values = f64([[1.0, -0.5, 0.2], [0.4, -0.5, 0.9], [2.0, -0.5, 0.1]])
    loop = [-0.3 * math.log(sum(math.exp(-float(v) / 0.3) for v in column) / 3) for column in values.T]
    same(soft_minimum(values, 0.3), loop)
    close(soft_minimum(values, 1e6), values.mean(0), digits=5)
    close(soft_minimum(values, 1e-6), values.amin(0), digits=5)
    same(soft_minimum(values, 0.3)[1], -0.5)

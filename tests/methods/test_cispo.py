"""The card of CISPO: a bounded weight under stop-gradient, worked example."""

from __future__ import annotations

import math

import pytest
import torch

from polopt.aggregations import TokenMean
from polopt.methods.base.cispo import ClippedWeight, cispo
from polopt.methods.base.reinforce import reinforce
from polopt.objectives.clipped_surrogate import ClippedSurrogate
from tests.support import DELTA, OLD, close, f64, now, same, value_and_gradient, with_advantage, worked

MOVED = f64(OLD) + f64(DELTA)
ADVANTAGE = [1.0, -1.0, 0.5, -0.5]
narrow = cispo | {"objective": ClippedWeight(cap=1.2)}


def test_worked_example() -> None:
    loss, gradient = value_and_gradient(narrow, now(MOVED), with_advantage(worked(), ADVANTAGE))
    close(loss, -0.0485922630, digits=9)
    close(gradient, [-0.12, -0.090484, -0.105127, 0.12, 0.060653, -0.05, -0.06, 0.037041, 0.055259, 0.047561])


def test_at_the_sampling_policy_it_is_token_mean_reinforce() -> None:
    rollout = cispo.credit(worked())
    _, gradient = value_and_gradient(cispo, now(OLD), rollout)
    same(gradient, -rollout.advantage / 10)
    same(gradient, value_and_gradient(reinforce | {"aggregation": TokenMean()}, now(OLD), rollout)[1])


def test_without_bounds_its_gradient_is_that_of_the_unclipped_surrogate() -> None:
    rollout = with_advantage(worked(), ADVANTAGE)
    open_weight = cispo | {"objective": ClippedWeight(cap=math.inf)}
    surrogate = cispo | {"objective": ClippedSurrogate(math.inf, math.inf)}
    loss, gradient = value_and_gradient(open_weight, now(MOVED), rollout)
    other, expected = value_and_gradient(surrogate, now(MOVED), rollout)
    same(gradient, expected)
    assert loss != pytest.approx(other)


@pytest.mark.parametrize("seed", range(3))
def test_inside_the_bounds_it_is_ppo_and_outside_it_keeps_the_bound(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    delta = 0.4 * torch.randn(10, generator=generator, dtype=torch.float64)
    advantage = torch.randn(4, generator=generator, dtype=torch.float64)
    rollout = with_advantage(worked(), advantage)
    method = cispo | {"objective": ClippedWeight(cap=1.28, floor=0.8)}
    _, ours = value_and_gradient(method, now(f64(OLD) + delta), rollout)
    _, ppo = value_and_gradient(cispo | {"objective": ClippedSurrogate(0.2, 0.28)}, now(f64(OLD) + delta), rollout)
    ratio = delta.exp()
    inside = (ratio >= 0.8) & (ratio <= 1.28)
    same(ours[inside], ppo[inside])
    same(ours, -ratio.clamp(0.8, 1.28) * rollout.advantage / 10)
    blocked = ((rollout.advantage > 0) & (ratio > 1.28)) | ((rollout.advantage < 0) & (ratio < 0.8))
    assert (ppo[blocked] == 0).all()
    assert (ours != 0).all()


def test_its_weight_is_held_fixed_by_finite_differences() -> None:
    rollout = with_advantage(worked(), ADVANTAGE)
    weight = f64(DELTA).exp().clamp(max=1.2)
    _, gradient = value_and_gradient(narrow, now(MOVED), rollout)
    for t in range(10):
        moved = [MOVED.clone(), MOVED.clone()]
        moved[0][t] += 1e-6
        moved[1][t] -= 1e-6
        up, down = (float(-(weight * rollout.advantage * logp).mean()) for logp in moved)
        same(gradient[t], (up - down) / 2e-6, rtol=1e-7, atol=1e-9)


def test_the_cap_is_the_weight_itself() -> None:
    """As in TRL: the configured number bounds the weight, not the weight minus one."""
    rollout = with_advantage(worked(), [1.0, 1.0, 1.0, 1.0])
    _, gradient = value_and_gradient(cispo, now(f64(OLD) + 3.0), rollout)
    same(gradient, [-0.5] * 10)


def test_a_runaway_ratio_stays_finite() -> None:
    rollout = with_advantage(worked(), ADVANTAGE)
    loss, gradient = value_and_gradient(cispo, now(f64(OLD) + 5000.0), rollout)
    assert math.isfinite(loss)
    assert torch.isfinite(gradient).all()

"""The card of SAPO: the sigmoid gate, its limits, worked example."""

from __future__ import annotations

import math

import pytest
import torch

from polopt.core.method import Method
from polopt.methods.base.grpo import grpo
from polopt.methods.base.sapo import SigmoidGate, sapo
from polopt.objectives.clipped_surrogate import ClippedSurrogate
from tests.support import DELTA, OLD, close, f64, now, same, value_and_gradient, with_advantage, worked

MOVED = f64(OLD) + f64(DELTA)
ADVANTAGE = [1.0, -1.0, 0.5, -0.5]
DIVISOR = 4 * f64([3, 3, 3, 2, 2, 2, 2, 3, 3, 3])


def gate_weight(method: Method, delta: float, advantage: float) -> float:
    """4 p (1 - p): the gradient over that of the unclipped surrogate."""
    rollout = with_advantage(worked(), [advantage] * 4)
    _, gradient = value_and_gradient(method, now(f64(OLD) + delta), rollout)
    return float(gradient[0] * DIVISOR[0] / (-math.exp(delta) * advantage))


def test_worked_example() -> None:
    loss, gradient = value_and_gradient(sapo, now(MOVED), with_advantage(worked(), ADVANTAGE))
    close(loss, -0.1063298993, digits=9)
    close(
        gradient,
        [-0.109115, -0.075233, -0.087548, 0.174578, 0.072671, -0.0625, -0.096617, 0.030303, 0.045909, 0.039609],
    )


def test_at_the_sampling_policy_it_is_grpo() -> None:
    rollout = sapo.credit(worked())
    loss, gradient = value_and_gradient(sapo, now(OLD), rollout)
    same(gradient, -rollout.advantage / DIVISOR)
    same(gradient, value_and_gradient(grpo, now(OLD), rollout)[1])
    # f(1) = 2 / tau, tau by the sign of the advantage.
    tau = torch.where(rollout.advantage > 0, f64(1.0), f64(1.05))
    same(loss, -(2 / tau * rollout.advantage / DIVISOR).sum())


def test_a_small_temperature_is_the_unclipped_surrogate() -> None:
    rollout = with_advantage(worked(), ADVANTAGE)
    unclipped = grpo | {"objective": ClippedSurrogate(math.inf, math.inf)}
    _, expected = value_and_gradient(unclipped, now(MOVED), rollout)

    def error(tau: float) -> float:
        method = sapo | {"objective": SigmoidGate(tau, tau)}
        return float((value_and_gradient(method, now(MOVED), rollout)[1] - expected).abs().max())

    assert error(1e-3) < 1e-6
    assert error(1e-2) == pytest.approx(100 * error(1e-3), rel=0.05)  # second order in tau


def test_far_ratios_and_steep_gates_fade() -> None:
    assert gate_weight(sapo, math.log(3.0), 1.0) == pytest.approx(0.42, abs=0.005)
    assert gate_weight(sapo, math.log(30.0), 1.0) < 1e-10
    assert gate_weight(sapo | {"objective": SigmoidGate(200.0, 200.0)}, 0.2, 1.0) < 1e-10
    assert 0 < gate_weight(sapo, -3.0, 1.0) < 1


@pytest.mark.parametrize("distance", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_the_gate_is_even_in_the_distance_from_one(distance: float, advantage: float) -> None:
    same(gate_weight(sapo, math.log(1 + distance), advantage), gate_weight(sapo, math.log(1 - distance), advantage))


@pytest.mark.parametrize("delta", [-0.7, -0.1, 0.2, 0.9])
def test_bad_steps_are_attenuated_more(delta: float) -> None:
    assert gate_weight(sapo, delta, -1.0) < gate_weight(sapo, delta, 1.0) < 1


def test_no_kinks() -> None:
    """Finite differences agree also on the bounds of a clip."""
    rollout = with_advantage(worked(), ADVANTAGE)
    edges = f64([math.log(x) for x in (1.2, 0.8, 1.0, 0.8, 1.2, 1.28, 1.0, 1.2, 0.8, 1.0)])
    point = f64(OLD) + edges
    _, gradient = value_and_gradient(sapo, now(point), rollout)
    for t in range(10):
        slopes = []
        for width in (1e-5, -1e-5):
            moved = point.clone()
            moved[t] += width
            there, _ = value_and_gradient(sapo, now(moved), rollout)
            here, _ = value_and_gradient(sapo, now(point), rollout)
            slopes.append((there - here) / width)
        # One-sided differences meet: no kink.
        same(slopes[0], slopes[1], rtol=0, atol=1e-5)
        same(sum(slopes) / 2, gradient[t], rtol=0, atol=1e-8)


def test_small_similar_log_ratios_make_it_a_function_of_the_gspo_ratio() -> None:
    generator = torch.Generator().manual_seed(0)
    delta = 0.1 + 0.003 * torch.randn(10, generator=generator, dtype=torch.float64)
    rollout = with_advantage(worked(), ADVANTAGE)
    _, gradient = value_and_gradient(sapo, now(f64(OLD) + delta), rollout)
    for i, a in enumerate(ADVANTAGE):
        mine = rollout.trajectory == i
        s, tau = float(delta[mine].mean().exp()), 1.0 if a > 0 else 1.05
        p = 1 / (1 + math.exp(-tau * (s - 1)))
        same(gradient[mine].sum(), -4 * p * (1 - p) * s * a / 4, rtol=1e-3)


def test_a_step_without_advantage_contributes_nothing() -> None:
    rollout = with_advantage(worked(), [0.0, 0.0, 0.0, 0.0])
    loss, gradient = value_and_gradient(sapo, now(MOVED), rollout)
    assert loss == 0
    assert (gradient == 0).all()

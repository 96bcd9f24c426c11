"""The card of TOPR: weights of whole responses by the sign of their reward, special cases, boundedness, composition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from polopt.aggregations import SequenceSum
from polopt.core.rollout import Rollout
from polopt.methods.base.reinforce import PolicyGradient
from polopt.methods.trust_region.topr import SignedReward, TaperedReinforce, topr
from tests.support import IDS, close, f64, now, same, value_and_gradient, with_advantage, worked

MU = [-0.5, -1.0, -0.2, -0.7, -1.5, -0.3, -2.0, -0.4, -0.9, -1.2]
DELTA = [0.3, -0.1, 0.05, -0.4, -0.5, 0.0, -0.6, 0.3, 0.1, 0.05]
MOVED = f64(MU) + f64(DELTA)
REWARD = [1.0, -1.0, 1.0, -1.0]
LENGTH = [3, 2, 2, 3]
CARD = with_advantage(worked(), REWARD)
INF = math.inf
naive = topr | {"objective": TaperedReinforce((1.0, 1.0), (1.0, 1.0))}


def tapered(positive: tuple[float, float], negative: tuple[float, float]) -> Tensor:
    method = topr | {"objective": TaperedReinforce(positive, negative)}
    return value_and_gradient(method, now(MOVED), CARD)[1]


def by_loop(
    moved: Tensor, advantage: list[float], positive: tuple[float, float], negative: tuple[float, float]
) -> Tensor:
    """-w_i A_i / (M |y_i|) response by response."""
    out = []
    for i, a in enumerate(advantage):
        steps = [t for t, owner in enumerate(IDS) if owner == i]
        ratio = float(np.prod([np.exp(float(moved[t]) - MU[t]) for t in steps]))
        low, high = positive if a >= 0 else negative
        out += [-min(max(ratio, low), high) * a / (4 * len(steps))] * len(steps)
    return f64(out)


def test_worked_example() -> None:
    loss, gradient = value_and_gradient(topr, now(MOVED), CARD)
    close(loss, 0.1549542569, digits=10)
    close(gradient, [-0.083333] * 3 + [0.050821] * 2 + [-0.125] * 2 + [0.083333] * 3)
    ratio = f64([1.284025, 0.406570, 0.548812, 1.568312])
    slopes = tapered((0.0, INF), (0.0, INF))
    close(-slopes[[0, 3, 5, 7]] * 4 * f64(LENGTH) / f64(REWARD), ratio)


def test_at_the_sampling_policy_it_is_reinforce() -> None:
    _, gradient = value_and_gradient(topr, now(MU), CARD)
    same(gradient, value_and_gradient(topr | {"objective": PolicyGradient()}, now(MU), CARD)[1])
    same(gradient, by_loop(f64(MU), REWARD, (1, 1), (1, 1)))


@pytest.mark.parametrize(
    ("positive", "negative"),
    [
        ((1, 1), (0, 0)),
        ((1, 1), (1, 1)),
        ((0, INF), (0, INF)),
        ((0, 1), (0, 1)),
        ((1, 1), (0, 1)),
        ((0.8, 1.1), (0.5, 1.3)),
    ],
)
def test_special_cases(positive: tuple[float, float], negative: tuple[float, float]) -> None:
    same(tapered(positive, negative), by_loop(MOVED, REWARD, positive, negative))


def test_positives_only_and_naive_reinforce() -> None:
    wrong = CARD.advantage < 0
    supervised = tapered((1, 1), (0, 0))
    assert (supervised[wrong] == 0).all()
    same(supervised[~wrong], value_and_gradient(topr, now(MOVED), CARD)[1][~wrong])
    same(tapered((1, 1), (1, 1)), value_and_gradient(topr | {"objective": PolicyGradient()}, now(MOVED), CARD)[1])


def test_importance_weighting_has_the_gradient_of_the_sequence_ratio() -> None:
    """With the sum over steps, d/dlogp of -(1/M) sum_i rho_i R_i."""
    logp = MOVED.clone().requires_grad_()
    rho = CARD.sum_steps(logp - f64(MU)).exp()
    (expected,) = torch.autograd.grad(-(rho * f64(REWARD)).mean(), logp)
    method = topr | {"objective": TaperedReinforce((0, INF), (0, INF)), "aggregation": SequenceSum()}
    same(value_and_gradient(method, now(MOVED), CARD)[1], expected)


@pytest.mark.parametrize("shift", [-30.0, -1.0, 0.0, 2.0])
def test_the_gradient_of_a_positive_does_not_depend_on_the_ratio(shift: float) -> None:
    _, gradient = value_and_gradient(topr, now(MOVED + shift), CARD)
    same(gradient[CARD.advantage > 0], [-1 / 12] * 3 + [-1 / 8] * 2)


def test_a_negative_has_at_most_the_weight_one() -> None:
    for shift, expected in ((0.5, 1.0), (-0.5, math.exp(-1.0))):
        _, gradient = value_and_gradient(topr, now(f64(MU) + shift), CARD)
        same(gradient[3:5], [expected / 8] * 2)


def test_what_the_policy_has_forgotten_costs_nothing() -> None:
    """The card: every log pi of a negative lowered by 50; the naive loss falls without end."""
    negative = with_advantage(worked(), [0.0, -1.0, 0.0, 0.0])
    by = {}
    for down in (0.0, 50.0, 500.0):
        moved = MOVED.clone()
        moved[3:5] -= down
        by[down] = (
            value_and_gradient(topr, now(moved), negative)[0],
            value_and_gradient(naive, now(moved), negative)[0],
        )
    assert by[0.0][0] < -0.1
    assert abs(by[50.0][0]) < 1e-40 and abs(by[500.0][0]) < 1e-40
    same(by[50.0][1], by[0.0][1] - 12.5)
    same(by[500.0][1], by[0.0][1] - 125.0)
    close(value_and_gradient(naive, now(f64(MU) - 50 * (CARD.advantage < 0)), negative)[0], -12.775, digits=3)


def test_the_weight_is_held_fixed() -> None:
    weight = f64([1.0, math.exp(-0.9), 1.0, 1.0])

    def frozen(logp: Tensor) -> float:
        return float(-(weight * f64(REWARD) * CARD.mean_steps(logp)).mean())

    _, gradient = value_and_gradient(topr, now(MOVED), CARD)
    for t in range(10):
        step = torch.zeros(10, dtype=torch.float64)
        step[t] = 1e-6
        same(gradient[t], (frozen(MOVED + step) - frozen(MOVED - step)) / 2e-6, rtol=1e-6)


def test_masked_steps_are_not_in_the_ratio() -> None:
    mask = torch.ones(10, dtype=torch.bool)
    mask[4] = False
    rollout = with_advantage(worked().with_columns(step={"mask": mask}), REWARD)
    _, gradient = value_and_gradient(topr, now(MOVED), rollout)
    same(gradient[3:5], [math.exp(-0.4) / 4, 0.0])


def rewarded(rewards: list[float]) -> Rollout:
    return Rollout.from_arrays(range(len(rewards)), [0] * len(rewards), trajectories={"reward": f64(rewards)})


def test_rewards_become_signs() -> None:
    assert SignedReward()(rewarded([1.0, 0.0, math.nan, -1.0, 0.3])).tolist() == [1, -1, 0, -1, -1]
    same(SignedReward(baseline=-0.5)(rewarded([1.0, 0.0, math.nan])), [1.5, -0.5, 0.0])
    same(SignedReward(baseline=0.25, threshold=None)(rewarded([1.0, 0.3, math.nan])), [0.75, 0.05, 0.0])
    assert (SignedReward()(rewarded([math.nan] * 2)) == 0).all()


@pytest.mark.parametrize("baseline", [-1.0, -0.5, 0.0, 0.3, 0.9])
@pytest.mark.parametrize("right", [1, 5, 9])
def test_the_baseline_is_a_choice_of_data(baseline: float, right: int) -> None:
    """Both forms of the effective share of positives."""
    p = right / 10
    advantage = SignedReward(baseline)(rewarded([1.0] * right + [0.0] * (10 - right)))
    share = float(advantage.clamp(min=0).sum() / advantage.abs().sum())
    same(share, p * (1 - baseline) / (p * (1 - baseline) + (1 - p) * (1 + baseline)))
    same(share, p * (1 - baseline) / (1 + (1 - 2 * p) * baseline))
    if baseline == 0.0:
        same(share, p)
    if baseline == -1.0:
        assert share == 1.0 and (advantage[right:] == 0).all()


def test_a_runaway_ratio_stays_finite() -> None:
    for shift in (5000.0, -5000.0):
        method = topr | {"objective": TaperedReinforce((0, INF), (0, INF))}
        loss, gradient = value_and_gradient(method, now(f64(MU) + shift), CARD)
        assert math.isfinite(loss) and torch.isfinite(gradient).all()


def test_what_it_declares() -> None:
    assert (topr.unit, topr.vanishes_with) == ("trajectory", "advantage")
    assert topr.models_in_use == {} and topr.regularizer is None
    assert (topr.schedule.epochs, topr.advantage.baseline) == (1, 0.0)

"""The card of DISPO: four bounds on the weight, by sign of the advantage and side of one, worked example."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from polopt.aggregations import TokenMean
from polopt.core.override import override
from polopt.methods.base.cispo import ClippedWeight, cispo
from polopt.methods.base.dapo import DynamicSampling, SoftOverlong
from polopt.methods.base.reinforce import reinforce
from polopt.methods.trust_region.dispo import DecoupledWeight, dispo
from polopt.objectives.clipped_surrogate import ClippedSurrogate
from tests.support import close, f64, now, same, value_and_gradient, with_advantage, worked

OLD = [-0.5, -3.0, -0.2, -0.7, -1.5, -0.3, -2.0, -0.4, -0.9, -6.0]
DELTA = [0.3, 2.6, -0.6, 0.4, -2.0, 0.0, -0.1, -0.3, 0.1, 5.0]
MOVED = f64(OLD) + f64(DELTA)
CARD = with_advantage(worked().with_columns(step={"logp": f64(OLD)}), [1.0, -1.0, 0.5, -0.5])
INF = math.inf


def slope(*bounds: float, logp: Tensor = MOVED) -> Tensor:
    return value_and_gradient(dispo | {"objective": DecoupledWeight(*bounds)}, now(logp), CARD)[1]


def test_worked_example() -> None:
    loss, gradient = value_and_gradient(dispo, now(MOVED), CARD)
    close(loss, -4.5712524595, digits=9)
    weight = [1.349859, 11, 0.8, 1.491825, 0.135335, 1, 0.904837, 0.740818, 1.105171, 101]
    close(-gradient * 10 / CARD.advantage, weight)
    close(gradient, [-0.134986, -1.1, -0.08, 0.149182, 0.013534, -0.05, -0.045242, 0.037041, 0.055259, 5.05])


def test_at_the_sampling_policy_it_is_token_mean_reinforce() -> None:
    _, gradient = value_and_gradient(dispo, now(OLD), CARD)
    same(gradient, value_and_gradient(reinforce | {"aggregation": TokenMean()}, now(OLD), CARD)[1])


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.28), (0.0, 3.0), (1.0, 0.1)])
def test_equal_bounds_are_those_of_cispo(low: float, high: float) -> None:
    expected = value_and_gradient(cispo | {"objective": ClippedWeight(1 + high, 1 - low)}, now(MOVED), CARD)[1]
    same(slope(low, high, low, high), expected)


def test_without_width_it_is_uncorrected_reinforce() -> None:
    same(slope(0, 0, 0, 0), value_and_gradient(reinforce | {"aggregation": TokenMean()}, now(MOVED), CARD)[1])


def test_without_bounds_it_is_the_unclipped_surrogate() -> None:
    open_surrogate = dispo | {"objective": ClippedSurrogate(INF, INF)}
    same(slope(1, INF, 1, INF), value_and_gradient(open_surrogate, now(MOVED), CARD)[1])


def test_topr_per_step() -> None:
    ratio = f64(DELTA).exp()
    weight = torch.where(CARD.advantage > 0, 1.0, ratio.clamp(max=1.0))
    same(slope(0, 0, 1, 0), -weight * CARD.advantage / 10)


@pytest.mark.parametrize("changed", range(4))
def test_a_bound_acts_on_its_regime_alone(changed: int) -> None:
    wide = [1.0, INF, 1.0, INF]
    tight = [*wide]
    tight[changed] = 0.0
    moved = slope(*tight) != slope(*wide)
    ratio, right = f64(DELTA), CARD.advantage > 0
    regime = (right if changed < 2 else ~right) & (ratio < 0 if changed % 2 == 0 else ratio > 0)
    assert regime.any() and torch.equal(moved, regime)


def test_a_step_without_advantage_has_no_gradient_and_every_other_has() -> None:
    rollout = with_advantage(CARD, [1.0, 0.0, 0.5, -0.5])
    _, gradient = value_and_gradient(dispo, now(MOVED), rollout)
    assert (gradient[3:5] == 0).all() and (gradient[[0, 1, 2, *range(5, 10)]] != 0).all()


def test_the_weight_is_held_fixed_by_finite_differences() -> None:
    _, gradient = value_and_gradient(dispo, now(MOVED), CARD)
    weight = f64(
        [
            1.349858807576,
            11,
            0.8,
            1.491824697641,
            0.135335283237,
            1,
            0.904837418036,
            0.740818220682,
            1.105170918076,
            101,
        ]
    )
    for t in range(10):
        ends = []
        for by in (1e-6, -1e-6):
            logp = MOVED.clone()
            logp[t] += by
            ends.append(float(-(weight * CARD.advantage * logp).mean()))
        same(gradient[t], (ends[0] - ends[1]) / 2e-6, rtol=1e-6, atol=1e-8)


def test_masked_steps_and_runaway_ratios() -> None:
    mask = torch.arange(10) != 9
    rollout = with_advantage(CARD.with_columns(step={"mask": mask}), [1.0, -1.0, 0.5, -0.5])
    _, gradient = value_and_gradient(dispo, now(MOVED), rollout)
    assert gradient[9] == 0
    close(gradient[1], -11 / 9)
    loss, gradient = value_and_gradient(dispo, now(MOVED + 5000.0), CARD)
    assert math.isfinite(loss) and gradient.abs().max() <= 10.1 + 1e-9


def test_the_shares_at_a_bound_are_logged() -> None:
    _, metrics = dispo.loss(now(MOVED), CARD)
    close(metrics["clip_ratio/low_mean"], 0.1)
    close(metrics["clip_ratio/high_mean"], 0.2)


def test_the_recipe() -> None:
    assert isinstance(dispo.filter, DynamicSampling) and isinstance(dispo.reward, SoftOverlong)
    assert dispo.objective == DecoupledWeight(0.2, 10.0, 1.0, 100.0)
    assert override(dispo, {"objective.negative_high": "0"}).objective.negative_high == 0
    credited = dispo.credit(worked(rewards=[1.0, 1.0, 0.5, 0.5]))
    assert (credited.advantage == 0).all(), "a group of one reward teaches nothing"

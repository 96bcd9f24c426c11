"""The card of GRPO-D: the schedule, the reward, loss and gradient affine in beta, worked example."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from polopt.claims.exact import start
from polopt.claims.trust_region.grpo_d import Backwards, two_tasks
from polopt.core.errors import UsageError
from polopt.core.method import Method
from polopt.core.override import override
from polopt.core.rollout import Rollout
from polopt.methods.base.grpo import grpo
from polopt.methods.trust_region.grpo_d import DynamicKL, WeightedRewards, grpo_d
from polopt.regularizers.kl import KL
from polopt.training.budget import Budget
from tests.support import DELTA, IDS, OLD, REF, close, f64, now, same, value_and_gradient, worked

COUNTING = DynamicKL()


def beta(progress: float, control: DynamicKL = COUNTING) -> float:
    return control({"progress": progress})["regularizer.beta"]


def at(coefficient: float) -> Method:
    return grpo_d | {"regularizer": KL(beta=coefficient), "reward": None}


def card(**step: Any) -> Rollout:
    return worked(logp__ref=REF, **step)


# --- the schedule -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.07), (15, 0.055), (30, 0.04), (31, 0.0408571), (65, 0.07), (100, 0.1)]
)
def test_worked_example_of_the_schedule(step: int, expected: float) -> None:
    close(beta(step / 100), expected, 7)


@pytest.mark.parametrize("control", [COUNTING, DynamicKL(0.0, 0.02, 0.5), DynamicKL(turn=0.05)])
def test_down_from_the_middle_then_up_to_the_top(control: DynamicKL) -> None:
    same(beta(0.0, control), (control.low + control.high) / 2)
    same(beta(control.turn, control), control.low)
    same(beta(1.0, control), control.high)
    grid = np.linspace(0, 1, 1001)
    course = [beta(p, control) for p in grid]
    assert all(control.low - 1e-15 <= b <= control.high + 1e-15 for b in course)
    slopes = np.diff(course)
    assert (slopes[grid[1:] <= control.turn] < 0).all() and (slopes[grid[:-1] >= control.turn] > 0).all()
    same(beta(control.turn + 1e-12, control), control.low, atol=1e-11)  # no jump


def test_equal_ends_are_a_constant() -> None:
    assert {round(beta(p, DynamicKL(0.05, 0.05)), 15) for p in np.linspace(0, 1, 17)} == {0.05}


def test_before_the_first_iteration_it_is_the_middle() -> None:
    assert COUNTING({}) == {"regularizer.beta": pytest.approx(0.07)}
    assert override(grpo_d, COUNTING({})).regularizer == grpo_d.regularizer


@pytest.mark.parametrize("turn", [0.0, 1.0, -0.1, math.nan])
def test_a_turn_out_of_range_is_named(turn: float) -> None:
    with pytest.raises(UsageError, match=f"got {turn}"):
        DynamicKL(turn=turn)


def test_a_run_follows_it_and_drops_the_reference_where_it_is_zero() -> None:
    method = grpo_d | {"controller": DynamicKL(0.0, 0.02, 0.5), "regularizer": KL(beta=0.01)}
    run = start(two_tasks(0), method, seed=0, group=2)
    run.trainer.budget = Budget(steps=4)
    betas, needed = [], []
    for _ in range(4):
        betas.append(run.trainer.method.regularizer.beta)
        needed.append("logp/ref" in run.trainer.method.needs)
        run.step()
    same(betas, [0.01, 0.005, 0.0, 0.01])
    assert needed == [True, True, False, True]


# --- the reward -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("a", [1.0, 0.5, 0.0])
def test_accuracy_and_weighted_format(a: float) -> None:
    form = [0.0, 1.0, 1.0, 1.0]
    named = {"reward/correct": [1.0, 0.0, 1.0, math.nan], "reward/format": form, "reward/length": [math.nan] * 4}
    columns = {name: f64(values) for name, values in named.items()}
    rollout = worked().with_columns(trajectory=columns)
    found = WeightedRewards({"format": a, "length": 0.0})(rollout)
    torch.testing.assert_close(found.reward, f64([1.0, a, 1 + a, math.nan]), equal_nan=True)
    assert all(torch.equal(found[name].nan_to_num(), columns[name].nan_to_num()) for name in columns)


def test_the_recipe_leaves_the_worksheets_length_out() -> None:
    columns = {f"reward/{name}": f64(v) for name, v in {"correct": [1, 0], "format": [1, 1], "length": [1, 0]}.items()}
    rollout = Rollout.from_arrays([0, 1], [0, 0], trajectories=columns)
    same(grpo_d.shape_reward(rollout).reward, [2.0, 1.0])
    half = override(grpo_d, {"reward.weights": "format=0.5,length=0"})
    same(half.shape_reward(rollout).reward, [1.5, 0.5])


def test_without_weights_it_is_the_sum() -> None:
    columns = {"reward/first": f64([1.0, 0.25]), "reward/second": f64([-2.0, 0.5])}
    same(WeightedRewards()(Rollout.from_arrays([0, 1], [0, 0], trajectories=columns)).reward, [-1.0, 0.75])


def test_no_weight_at_all_is_named() -> None:
    rollout = Rollout.from_arrays([0], [0], trajectories={"reward/only": f64([1.0])})
    with pytest.raises(UsageError, match="every reward the weight 0"):
        WeightedRewards({"only": 0.0})(rollout)


# --- loss and gradient ------------------------------------------------------------------------------------------------


def test_worked_example_of_the_loss() -> None:
    rollout = grpo.credit(card())
    for coefficient, loss in ((0.0, -0.0095391954), (0.04, -0.0065640624), (0.1, -0.0021013628)):
        value, _ = value_and_gradient(at(coefficient), now(f64(OLD) + f64(DELTA)), rollout)
        close(value, loss, 10)


@pytest.mark.parametrize("coefficient", [0.0, 0.04, 0.1])
def test_gradient_against_a_loop(coefficient: float) -> None:
    rollout = grpo.credit(card())
    logp = np.array(OLD) + np.array(DELTA)
    lengths = np.bincount(IDS)
    expected = []
    for t, i in enumerate(IDS):
        ratio, advantage = math.exp(DELTA[t]), float(rollout.advantage[t])
        clipped = (advantage > 0 and ratio > 1.2) or (advantage < 0 and ratio < 0.8)
        slope = 0.0 if clipped else -ratio * advantage
        expected.append((slope + coefficient * (1 - math.exp(REF[t] - logp[t]))) / (4 * lengths[i]))
    _, gradient = value_and_gradient(at(coefficient), now(logp), rollout)
    same(gradient, expected)


def test_loss_and_gradient_are_affine_in_beta() -> None:
    rollout, evaluation = grpo.credit(card()), now(f64(OLD) + f64(DELTA))
    loss, gradient = value_and_gradient(at(0.0), evaluation, rollout)
    slopes, rows = [], []
    for coefficient in (0.01, 0.04, 0.1, 3.0):
        value, found = value_and_gradient(at(coefficient), evaluation, rollout)
        slopes.append((value - loss) / coefficient)
        rows.append((found - gradient) / coefficient)
    same(slopes[1:], [slopes[0]] * 3, rtol=1e-6)  # a loss is float32 by itself
    for row in rows[1:]:
        same(row, rows[0], atol=1e-11)


def test_without_beta_it_is_grpo() -> None:
    rollout, evaluation = grpo.credit(card()), now(f64(OLD) + f64(DELTA))
    value, gradient = value_and_gradient(at(0.0), evaluation, rollout)
    expected, slopes = value_and_gradient(grpo, evaluation, rollout)
    assert value == expected and torch.equal(gradient, slopes)
    assert "logp/ref" not in at(0.0).needs


def test_at_the_reference_the_schedule_has_no_effect() -> None:
    logp = f64(OLD) + f64(DELTA)
    rollout = grpo.credit(worked(logp__ref=logp))
    found = [value_and_gradient(at(coefficient), now(logp), rollout) for coefficient in (0.0, 0.04, 0.1)]
    for value, gradient in found[1:]:
        assert value == found[0][0]
        same(gradient, found[0][1], rtol=0, atol=0)


def test_masked_steps_and_invalid_rewards() -> None:
    mask = torch.ones(10, dtype=torch.bool)
    mask[[2, 7]] = False
    rollout = worked(rewards=[1.0, 0.0, math.nan, 0.5], logp__ref=np.where(mask, REF, np.nan), mask=mask)
    rollout = rollout.with_columns(step={"mask": mask})
    credited = grpo.credit(rollout)
    assert (credited.advantage[5:] == 0).all()  # one valid response of two is a group of one
    _, gradient = value_and_gradient(at(0.1), now(f64(OLD) + f64(DELTA)), credited)
    assert gradient.isfinite().all() and (gradient[~mask] == 0).all()
    assert (gradient[mask & (torch.tensor(IDS) >= 2)] != 0).all()  # the anchor holds them all the same


def test_the_schedule_backwards() -> None:
    control = Backwards(COUNTING)
    course = [control({"progress": p})["regularizer.beta"] for p in (0.0, 0.7, 1.0)]
    same(course, [0.1, 0.04, 0.07])


def test_what_differs_from_grpo() -> None:
    changed = {slot for slot, value in grpo_d.slots().items() if value != grpo.slots().get(slot)}
    assert changed == {"reward", "regularizer", "controller"}
    assert grpo_d.task == "worksheet"

"""The card of GRPO: group z-scores, per-response means, k3 in the loss, worked example."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from polopt.advantages.group import GroupCenter, GroupZScore
from polopt.aggregations import FixedLength, TokenMean
from polopt.core.method import Method
from polopt.core.rollout import Rollout
from polopt.methods.base.grpo import grpo
from polopt.objectives.clipped_surrogate import ClippedSurrogate
from polopt.regularizers.kl import KL
from tests.support import DELTA, OLD, REF, close, f64, now, same, value_and_gradient, with_advantage, worked

MOVED = [old + delta for old, delta in zip(OLD, DELTA, strict=True)]
LENGTHS = f64([3, 2, 2, 3])
with_kl = grpo | {"regularizer": KL(beta=0.04)}


def test_worked_example() -> None:
    rollout = grpo.credit(worked())
    close(rollout.mean_steps(rollout.advantage), [0.707007, -0.707007, 0.706907, -0.706907])
    loss, gradient = value_and_gradient(grpo, now(MOVED), rollout)
    close(loss, -0.0095391954, digits=9)
    close(gradient, [0, -0.053311, -0.061938, 0.131841, 0, -0.088363, 0, 0, 0.065104, 0.056036])


def test_worked_example_with_the_kl() -> None:
    rollout = with_kl.credit(worked(logp__ref=REF))
    loss, gradient = value_and_gradient(with_kl, now(MOVED), rollout)
    close(loss, -0.0065640624, digits=9)
    _, without = value_and_gradient(grpo, now(MOVED), rollout)
    weight = rollout.spread(1 / (4 * LENGTHS))
    same(gradient - without, weight * 0.04 * (1 - (f64(REF) - f64(MOVED)).exp()))


def test_group_scores_against_numpy() -> None:
    rewards, groups = [0.3, 1.2, -0.7, 0.1, 0.9, 2.0], [1, 0, 1, 0, 1, 2]
    rollout = Rollout.from_arrays(range(6), groups, trajectories={"reward": f64(rewards)})
    expected = np.zeros(6)
    for g in range(3):
        mine = [i for i, owner in enumerate(groups) if owner == g]
        values = np.array(rewards)[mine]
        expected[mine] = (values - values.mean()) / (values.std(ddof=1) + 1e-4) if len(mine) > 1 else 0.0
    same(GroupZScore()(rollout), expected)
    same(f64([float(f64(expected)[f64(groups) == g].sum()) for g in range(3)]), [0, 0, 0])
    population = GroupZScore(eps=0.0, unbiased=False)(rollout)
    same(population[[1, 3]], [1, -1])


@pytest.mark.parametrize("value", [0.1, 1e8, -3.3])
def test_equal_rewards_give_exactly_nothing(value: float) -> None:
    rollout = grpo.credit(worked(rewards=[value] * 4, groups=[0, 0, 0, 0]))
    assert (rollout.advantage == 0).all()
    _, gradient = value_and_gradient(grpo, now(MOVED), rollout)
    assert (gradient == 0).all()


def test_without_eps_the_score_ignores_scale_and_offset() -> None:
    score = GroupZScore(eps=0.0)
    same(score(worked(rewards=[7.5, -2.5, 7.5, 2.5])), score(worked()))


@pytest.mark.parametrize(("high", "low"), [(1.0, 0.0), (0.3, 0.29), (100.0, -5.0)])
def test_a_pair_gives_plus_minus_one_over_root_two(high: float, low: float) -> None:
    same(GroupZScore(eps=0.0)(worked(rewards=[high, low, low, high])), f64([1, -1, -1, 1]) / math.sqrt(2))


def test_at_the_sampling_policy() -> None:
    rollout = with_kl.credit(worked(logp__ref=REF))
    _, gradient = value_and_gradient(with_kl, now(OLD), rollout)
    kl_part = 0.04 * (1 - (f64(REF) - f64(OLD)).exp())
    same(gradient, rollout.spread(1 / (4 * LENGTHS)) * (-rollout.advantage + kl_part))


def test_beta_enters_linearly_and_vanishes_at_the_reference() -> None:
    def difference(beta: float) -> tuple[float, torch.Tensor]:
        method: Method = grpo | {"regularizer": KL(beta=beta)}
        rollout = method.credit(worked(logp__ref=REF))
        loss, gradient = value_and_gradient(method, now(MOVED), rollout)
        base, without = value_and_gradient(grpo, now(MOVED), rollout)
        return loss - base, gradient - without

    once, thrice = difference(0.01), difference(0.03)
    same(thrice[0], 3 * once[0], rtol=1e-9)
    same(thrice[1], 3 * once[1], rtol=1e-9)
    at_reference = with_kl.credit(worked(logp__ref=MOVED))
    loss, gradient = value_and_gradient(with_kl, now(MOVED), at_reference)
    base, without = value_and_gradient(grpo, now(MOVED), at_reference)
    same(loss, base)
    same(gradient, without)


def test_clip_conditions_step_by_step() -> None:
    rollout = with_advantage(worked(), [1.0, -1.0, 0.5, -0.5])
    method = grpo | {"objective": ClippedSurrogate(low=0.1, high=0.3), "aggregation": TokenMean()}
    _, gradient = value_and_gradient(method, now(MOVED), rollout)
    expected = []
    for d, a in zip(DELTA, rollout.advantage.tolist(), strict=True):
        rho = math.exp(d)
        blocked = (a > 0 and rho > 1.3) or (a < 0 and rho < 0.9)
        expected.append(0.0 if blocked else -rho * a / 10)
    same(gradient, expected)


def test_the_two_sided_bound_caps_the_ratio_of_bad_steps() -> None:
    rollout = with_advantage(worked(), [1.0, -1.0, 0.5, -0.5])
    method = grpo | {"objective": ClippedSurrogate(cap=1.4), "aggregation": TokenMean()}
    loss, gradient = value_and_gradient(method, now(MOVED), rollout)
    expected_loss = 0.0
    for d, a in zip(DELTA, rollout.advantage.tolist(), strict=True):
        rho = math.exp(d)
        expected_loss -= min(min(rho, 1.4) * a, min(max(rho, 0.8), 1.2) * a) / 10
    same(loss, expected_loss)
    assert float(gradient[3]) == 0.0  # A < 0, rho = 1.49


def test_it_reduces_to_dr_grpo_and_to_the_token_mean_of_dapo() -> None:
    dr_grpo = grpo | {"advantage": GroupCenter(), "aggregation": FixedLength(4)}
    close(value_and_gradient(dr_grpo, now(MOVED), dr_grpo.credit(worked()))[0], -0.0167526139, digits=9)
    token_mean = grpo | {"aggregation": TokenMean(), "objective": ClippedSurrogate(0.2, 0.28)}
    moved = f64(OLD) + f64([0.22, *DELTA[1:]])
    close(value_and_gradient(token_mean, now(moved), token_mean.credit(worked()))[0], -0.0236169750, digits=9)


def test_an_unscorable_reward_is_excluded() -> None:
    rollout = worked(groups=[0, 0, 0, 1], rewards=[1.0, float("nan"), 0.0, 0.5])
    root = math.sqrt(0.5)
    same(GroupZScore()(rollout), [0.5 / (root + 1e-4), 0.0, -0.5 / (root + 1e-4), 0.0])


def test_no_reference_forward_without_a_kl() -> None:
    assert not any(name.startswith("logp/") for name in grpo.needs)
    assert "logp/ref" in with_kl.needs
    assert grpo.unit == "trajectory"

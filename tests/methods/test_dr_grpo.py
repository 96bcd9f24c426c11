"""The card of Dr. GRPO: no division by the spread, a constant divisor, exact expectation, worked example."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from polopt.advantages.group import GroupCenter, LeaveOneOut
from polopt.aggregations import FixedLength
from polopt.core.rollout import Rollout
from polopt.methods.base.dr_grpo import dr_grpo
from polopt.methods.base.grpo import grpo
from tests.methods.enumeration import bandit_gradient, expected_gradient
from tests.support import DELTA, OLD, close, now, same, value_and_gradient, with_advantage, worked

MOVED = [old + delta for old, delta in zip(OLD, DELTA, strict=True)]
four = dr_grpo | {"aggregation": FixedLength(4)}


def test_worked_example() -> None:
    rollout = four.credit(worked())
    same(rollout.mean_steps(rollout.advantage), [0.5, -0.5, 0.25, -0.25])
    loss, gradient = value_and_gradient(four, now(MOVED), rollout)
    close(loss, -0.0167526139, digits=9)
    close(gradient, [0, -0.028276, -0.032852, 0.04662, 0, -0.015625, 0, 0, 0.017268, 0.014863])


def test_the_divisor_is_the_budget_of_the_run_where_none_is_given() -> None:
    rollout = dr_grpo.credit(worked().with_columns(trajectory={"limit": torch.full((4,), 4)}))
    same(value_and_gradient(dr_grpo, now(MOVED), rollout)[0], value_and_gradient(four, now(MOVED), rollout)[0])
    assert FixedLength().needs == {"limit"}
    assert FixedLength(4).needs == frozenset()


def test_advantages_sum_to_zero_and_are_rloo_times_g_minus_one_over_g() -> None:
    rewards = torch.randn(7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rollout = Rollout.from_arrays(range(7), [0, 1, 0, 1, 1, 2, 0], trajectories={"reward": rewards})
    advantage = GroupCenter()(rollout)
    size = torch.bincount(rollout.group)[rollout.group].double()
    same([float(advantage[rollout.group == g].sum()) for g in range(3)], [0, 0, 0])
    same(advantage, (size - 1) / size * LeaveOneOut()(rollout))


@pytest.mark.parametrize("length", [1, 8, 3000])
def test_the_loss_is_proportional_to_one_over_the_budget(length: int) -> None:
    rollout = four.credit(worked())
    other = dr_grpo | {"aggregation": FixedLength(length)}
    loss, gradient = value_and_gradient(four, now(MOVED), rollout)
    scaled_loss, scaled = value_and_gradient(other, now(MOVED), rollout)
    same(scaled_loss * length, loss * 4)
    same(scaled * length, gradient * 4)


def test_a_longer_response_weighs_more() -> None:
    def total(repeats: int) -> float:
        count = 2 * repeats + 1
        rollout = Rollout.from_arrays([0] * (count - 1) + [1], [0, 0], step={"logp": -torch.ones(count).double()})
        rollout = with_advantage(rollout, [1.0, -1.0])
        _, gradient = value_and_gradient(four, now([-1.0] * count), rollout)
        return float(gradient[:-1].sum())

    same(total(3), 3 * total(1))


def test_scaling_the_rewards_scales_the_loss() -> None:
    def result(scale: float, method: object = four) -> tuple[float, torch.Tensor]:
        rollout = method.credit(worked(rewards=[scale * r for r in (1, 0, 1, 0.5)]))  # type: ignore[attr-defined]
        return value_and_gradient(method, now(MOVED), rollout)  # type: ignore[arg-type]

    same(result(10)[0], 10 * result(1)[0])
    same(result(10)[1], 10 * result(1)[1])
    # GRPO does not scale (up to its eps).
    same(result(10, grpo)[0], result(1, grpo)[0], rtol=1e-2)


LOGITS = [0.3, -0.5, 1.1]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("arms", [[1.0, 0.0, 0.0], [1.0, 0.2, -0.4]])
def test_exact_expectation(size: int, arms: list[float]) -> None:
    truth = bandit_gradient(LOGITS, arms)
    same(-expected_gradient(four, LOGITS, arms, size), (size - 1) / size * truth / 4)


def test_the_expectation_of_grpo_is_not_proportional_to_the_true_gradient() -> None:
    middle, hard = [0.0, 0.0], [-3.0, 0.0]  # two prompts with success rates 0.5 and 0.05
    factors = [
        -expected_gradient(grpo, logits, [1.0, 0.0], 4)[0] / bandit_gradient(logits, [1.0, 0.0])[0]
        for logits in (middle, hard)
    ]
    assert abs(factors[1] / factors[0] - 1) > 0.05
    ours = [
        -expected_gradient(four, logits, [1.0, 0.0], 4)[0] / bandit_gradient(logits, [1.0, 0.0])[0]
        for logits in (middle, hard)
    ]
    assert np.isclose(ours[0], ours[1])


def test_equal_rewards_have_no_gradient() -> None:
    rollout = four.credit(worked(rewards=[0.1, 0.1, 0.7, 0.7]))
    assert (rollout.advantage == 0).all()
    assert (value_and_gradient(four, now(MOVED), rollout)[1] == 0).all()

"""The card of RLOO: leave-one-out identities, exact expectation, sequence ratio, worked example."""

from __future__ import annotations

import pytest
import torch

from polopt.advantages.group import GroupCenter, LeaveOneOut
from polopt.core.override import override
from polopt.core.rollout import Rollout
from polopt.methods.base.reinforce import BatchBaseline, reinforce
from polopt.methods.base.rloo import rloo
from polopt.rewards.shaping import ClipReward, KLPenalty
from tests.methods.enumeration import bandit_gradient, expected_gradient
from tests.support import DELTA, OLD, REF, close, f64, now, same, value_and_gradient, with_advantage, worked

plain = rloo | {"reward": None}
MOVED = [old + delta for old, delta in zip(OLD, DELTA, strict=True)]


def test_worked_example() -> None:
    rollout = plain.credit(worked())
    same(rollout.mean_steps(rollout.advantage), [1, -1, 0.5, -0.5])
    loss, gradient = value_and_gradient(plain, now(MOVED), rollout)
    close(rollout.sum_steps(f64(DELTA)).exp(), [1.284025, 0.904837, 1.822119, 0.778801])
    close(loss, -0.1237906, digits=7)
    close(gradient, [0, 0, 0, 0.226209, 0.226209, 0, 0, 0, 0, 0])


def test_worked_example_with_the_kl_inside_the_reward() -> None:
    rollout = rloo.credit(rloo.shape_reward(worked(logp__ref=REF)))
    close(rollout.mean_steps(rollout.advantage), [0.985, -0.985, 0.5, -0.5])


def random_groups(seed: int) -> Rollout:
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(7, generator=generator, dtype=torch.float64)
    return Rollout.from_arrays(
        [0, 0, 1, 2, 2, 3, 4, 5, 6],
        [1, 0, 1, 0, 1, 2, 1],
        step={"logp": -torch.ones(9)},
        trajectories={"reward": rewards},
    )


@pytest.mark.parametrize("seed", range(3))
def test_against_a_loop_over_the_siblings(seed: int) -> None:
    rollout = random_groups(seed)
    rewards, groups = rollout.reward.tolist(), rollout.group.tolist()
    expected = []
    for i, own in enumerate(groups):
        others = [rewards[j] for j, g in enumerate(groups) if g == own and j != i]
        expected.append(rewards[i] - sum(others) / len(others) if others else 0.0)
    advantage = LeaveOneOut()(rollout)
    same(advantage, expected)
    same([float(advantage[rollout.group == g].sum()) for g in range(3)], [0, 0, 0])


def test_it_is_dr_grpo_times_g_over_g_minus_one() -> None:
    same(LeaveOneOut()(worked()), 2 * GroupCenter()(worked()))
    rollout = worked(groups=[0, 0, 0, 0])
    same(LeaveOneOut()(rollout), 4 / 3 * GroupCenter()(rollout))


def test_a_pair_gives_the_difference() -> None:
    advantage = LeaveOneOut()(worked(rewards=[0.9, 0.2, -1.0, 3.0]))
    same(advantage, [0.7, -0.7, -4.0, 4.0])


def test_an_unscorable_sibling_is_left_out() -> None:
    rollout = worked(groups=[0, 0, 0, 1], rewards=[1.0, float("nan"), 0.0, 5.0])
    same(LeaveOneOut()(rollout), [1.0, 0.0, -1.0, 0.0])


def test_on_policy_it_is_reinforce_with_the_leave_one_out_baseline() -> None:
    rollout = plain.credit(worked(groups=[0, 0, 0, 0]))
    loss, gradient = value_and_gradient(plain, now(OLD), rollout)
    same(loss, 0.0)
    same(gradient, -rollout.advantage / 4)
    twin = reinforce | {"advantage": BatchBaseline(baseline="leave-one-out")}
    same(gradient, value_and_gradient(twin, now(OLD), twin.credit(worked(groups=[0, 0, 0, 0])))[1])


@pytest.mark.parametrize("size", [2, 3])
def test_exact_expectation(size: int) -> None:
    logits, rewards = [0.3, -0.5, 1.1], [1.0, 0.2, -0.4]
    same(-expected_gradient(plain, logits, rewards, size), bandit_gradient(logits, rewards))


def test_a_constant_on_every_reward_of_a_prompt_changes_nothing() -> None:
    same(LeaveOneOut()(worked(rewards=[4, 3, -1, -1.5])), LeaveOneOut()(worked(rewards=[1, 0, 1, 0.5])))


def test_normalisation_over_the_batch() -> None:
    advantage = LeaveOneOut()(worked())
    expected = (advantage - advantage.mean()) / (advantage.std() + 1e-4)
    same(LeaveOneOut(normalize=True)(worked()), expected)


def test_the_clip_is_one_decision_per_response() -> None:
    rollout = with_advantage(worked(), [1, -1, 0.5, -0.5])
    wide = override(rloo, {"objective.low": 10.0, "objective.high": 10.0})
    loss, gradient = value_and_gradient(wide, now(MOVED), rollout)
    ratio = rollout.sum_steps(f64(DELTA)).exp()
    same(loss, -(ratio * f64([1, -1, 0.5, -0.5])).mean())
    same(gradient, -rollout.spread(ratio) * rollout.advantage / 4)


def test_rewards_are_clipped_before_the_kl_is_subtracted() -> None:
    method = plain | {"reward": ClipReward(-0.5, 0.5) | KLPenalty(beta=0.05)}
    rollout = method.shape_reward(worked(logp__ref=REF))
    close(rollout.trajectory_return, [0.495, 0.01, 0.5, 0.5])


def test_a_very_long_response_does_not_overflow() -> None:
    rollout = with_advantage(worked(), [-1, -1, -1, -1])
    loss, gradient = value_and_gradient(rloo, now(f64(OLD) + 1000), rollout)
    assert torch.isfinite(torch.tensor(loss))
    assert torch.isfinite(gradient).all()

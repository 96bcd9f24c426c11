"""The card of REINFORCE: identities, exact expectations, worked example."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from polopt.advantages.group import GroupCenter
from polopt.aggregations import TokenMean
from polopt.core.method import Method
from polopt.core.override import override
from polopt.core.rollout import Rollout
from polopt.methods import get_method
from polopt.methods.base.reinforce import BatchBaseline, PolicyGradient, reinforce
from polopt.rewards.shaping import KLPenalty
from tests.methods.enumeration import bandit_gradient, expected_gradient
from tests.support import OLD, REF, close, f64, now, same, value_and_gradient, with_advantage, worked

LOGP = [-0.2, -1.1, -0.15, -0.3, -2.0, -0.3, -1.4, -0.7, -0.8, -1.25]
LENGTHS = torch.tensor([3, 2, 2, 3])


def credited(method: Method, rollout: Rollout) -> torch.Tensor:
    """The advantage of each trajectory."""
    fresh = method.clone()
    made = fresh.credit(fresh.shape_reward(rollout))
    return made.mean_steps(made.advantage)


def with_baseline(name: str) -> Method:
    return override(reinforce, {"advantage.baseline": name})


def test_worked_example_with_the_batch_mean() -> None:
    rollout = reinforce.credit(reinforce.shape_reward(worked()))
    close(rollout.mean_steps(rollout.advantage), [0.375, -0.625, 0.375, -0.125])
    loss, gradient = value_and_gradient(reinforce, now(LOGP), rollout)
    same(loss, -0.15)
    same(gradient, -rollout.advantage / 4)
    loss, gradient = value_and_gradient(reinforce | {"aggregation": TokenMean()}, now(LOGP), rollout)
    same(loss, -0.06)
    same(gradient, -rollout.advantage / 10)


def test_worked_example_leave_one_out() -> None:
    close(credited(with_baseline("leave-one-out"), worked()), [0.5, -0.8333, 0.5, -0.1667], digits=4)


def test_worked_example_with_the_kl_inside_the_reward() -> None:
    method = reinforce | {"reward": KLPenalty(beta=0.05), "advantage": BatchBaseline(baseline="none")}
    close(credited(method, worked(logp__ref=REF)), [0.995, 0.01, 1.0, 0.5])


def test_worked_example_of_the_moving_average() -> None:
    baseline = BatchBaseline(baseline="moving-average", start=0.5, decay=0.9)
    same(baseline(worked()), f64([1, 0, 1, 0.5]) - 0.5)  # the value used is that from before the batch
    same(baseline.state_dict()["average"], 0.5125)
    same(baseline(worked()), f64([1, 0, 1, 0.5]) - 0.5125)


def test_running_mean_is_the_mean_of_the_earlier_batches() -> None:
    baseline = BatchBaseline(baseline="running-mean", start=0.3)
    batches: list[list[float]] = [[1, 0, 1, 0.5], [0, 0, 0, 1], [2, 2, 0, 0], [1, 1, 1, 1]]
    means = [np.mean(rewards) for rewards in batches]
    for index, rewards in enumerate(batches):
        expected = 0.3 if index == 0 else np.mean(means[:index])
        same(baseline(worked(rewards=rewards)), f64(rewards) - expected)


@pytest.mark.parametrize("name", ["mean", "leave-one-out"])
def test_advantages_of_a_batch_sum_to_zero(name: str) -> None:
    rewards = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    same(credited(with_baseline(name), worked(rewards=rewards.tolist())).sum(), 0.0)


def test_leave_one_out_is_m_over_m_minus_one_times_the_batch_mean() -> None:
    rewards = [0.3, -1.2, 4.0, 0.9]
    same(
        credited(with_baseline("leave-one-out"), worked(rewards=rewards)),
        4 / 3 * credited(with_baseline("mean"), worked(rewards=rewards)),
    )


def test_invalid_rewards_enter_no_baseline() -> None:
    rewards = [1.0, float("nan"), 0.0, 0.5]
    same(credited(with_baseline("mean"), worked(rewards=rewards)), [0.5, 0, -0.5, 0])
    same(credited(with_baseline("leave-one-out"), worked(rewards=rewards)), [0.75, 0, -0.75, 0])


LOGITS, ARMS = [0.3, -0.5, 1.1], [1.0, 0.2, -0.4]


@pytest.mark.parametrize("baseline", [-2.0, 0.0, 0.7])
def test_the_exact_gradient_does_not_depend_on_a_constant_baseline(baseline: float) -> None:
    method = reinforce | {"advantage": BatchBaseline(baseline="moving-average", start=baseline)}
    same(-expected_gradient(method, LOGITS, ARMS, 2), bandit_gradient(LOGITS, ARMS))


@pytest.mark.parametrize("size", [2, 3])
def test_the_batch_mean_shrinks_the_exact_gradient_and_leave_one_out_does_not(size: int) -> None:
    truth = bandit_gradient(LOGITS, ARMS)
    same(-expected_gradient(with_baseline("mean"), LOGITS, ARMS, size), (size - 1) / size * truth)
    same(-expected_gradient(with_baseline("leave-one-out"), LOGITS, ARMS, size), truth)


def test_token_mean_and_sequence_sum_differ_by_their_divisor() -> None:
    rollout = with_advantage(worked(), [0.3, -1.0, 2.0, 0.1])
    by_step, _ = value_and_gradient(reinforce | {"aggregation": TokenMean()}, now(LOGP), rollout)
    by_sequence, _ = value_and_gradient(reinforce, now(LOGP), rollout)
    same(by_step * 10, by_sequence * 4)


@pytest.mark.parametrize("slug", ["ppo", "grpo", "dapo", "cispo", "sapo", "gspo"])
def test_ratio_losses_have_its_gradient_at_the_sampling_policy(slug: str) -> None:
    # GSPO divides by the length inside its ratio, so that only the sequence mean can match.
    other = get_method(slug)
    aggregation = other.aggregation if slug == "gspo" else TokenMean()
    objective = override(other, {"objective": "clipped-surrogate"}).objective if slug == "ppo" else other.objective
    rollout = with_advantage(worked(), [0.3, -1.0, 2.0, -0.1])
    _, expected = value_and_gradient(reinforce | {"aggregation": aggregation}, now(OLD), rollout)
    _, actual = value_and_gradient(reinforce | {"objective": objective, "aggregation": aggregation}, now(OLD), rollout)
    same(actual, expected)


@pytest.mark.parametrize("name", ["none", "mean", "leave-one-out"])
def test_scaling_and_shifting_the_rewards(name: str) -> None:
    method = with_baseline(name)

    def gradient(rewards: list[float]) -> torch.Tensor:
        return value_and_gradient(method, now(LOGP), method.credit(worked(rewards=rewards)))[1]

    base = gradient([1, 0, 1, 0.5])
    same(gradient([3, 0, 3, 1.5]), 3 * base)
    if name != "none":
        same(gradient([8, 7, 8, 7.5]), base)


def test_only_the_log_probs_of_the_policy_carry_gradient() -> None:
    reward = f64([1, 0, 1, 0.5]).requires_grad_()
    method = reinforce | {"advantage": GroupCenter()}
    rollout = method.credit(worked().with_columns(trajectory={"reward": reward}))
    assert not rollout.advantage.requires_grad


def test_the_reference_model_runs_only_for_a_kl() -> None:
    assert isinstance(reinforce.objective, PolicyGradient)
    assert "logp/ref" not in reinforce.needs
    assert "logp/ref" in override(reinforce, {"reward.beta": 0.1}).needs

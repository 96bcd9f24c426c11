"""Rewards as a method changes them."""

from __future__ import annotations

import torch

from polopt.rewards.shaping import ClipReward, KLPenalty
from tests.support import OLD, REF, f64, same, worked


def test_the_penalty_is_the_log_ratio_of_each_trainable_step() -> None:
    mask = torch.arange(10) != 4
    ref = f64(REF).masked_fill(~mask, float("nan"))
    rollout = KLPenalty(beta=0.1)(worked(logp__ref=ref).with_columns(step={"mask": mask}))
    expected = -0.1 * (f64(OLD) - f64(REF))
    expected[4] = 0.0
    same(rollout["step_reward"], expected)
    assert (rollout.reward == worked().reward).all()


def test_penalties_add_up() -> None:
    chain = KLPenalty(beta=0.1) | KLPenalty(beta=0.2, model="teacher")
    rollout = chain(worked(logp__ref=REF, logp__teacher=[-1.0] * 10))
    same(rollout["step_reward"], -0.1 * (f64(OLD) - f64(REF)) - 0.2 * (f64(OLD) + 1))


def test_no_penalty_needs_no_model() -> None:
    assert KLPenalty(beta=0.0).needs == frozenset()
    assert KLPenalty(beta=0.1, model="teacher").needs == {"logp", "logp/teacher"}
    same(KLPenalty(beta=0.0)(worked())["step_reward"], [0.0] * 10)


def test_clipped_rewards() -> None:
    nan = float("nan")
    rollout = ClipReward(-1.0, 2.0)(worked(rewards=[-5.0, 0.5, 9.0, nan]))
    torch.testing.assert_close(rollout.reward, f64([-1.0, 0.5, 2.0, nan]), equal_nan=True)

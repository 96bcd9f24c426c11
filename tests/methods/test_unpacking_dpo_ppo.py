"""The card of the study of DPO and PPO: its exact PPO, its reward model's loss, and DPO as that loss."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from polopt.core.override import override
from polopt.core.rollout import Rollout
from polopt.methods.base.ppo import GAE, ppo
from polopt.methods.preference.dpo import dpo
from polopt.methods.preference.reward_model import reward_model
from polopt.methods.preference.unpacking_dpo_ppo import EndedScore, unpacking_dpo_ppo
from tests.methods.pairs import POLICY, card, sums
from tests.support import close, f64, now, same, value_and_gradient

OLD, REF = [-0.5, -1.0, -0.2, -0.8, -1.4], [-0.7, -0.9, -0.4, -0.6, -1.2]
VALUE = [0.1, 0.2, 0.4, -0.3, 0.0]
MOVED = [old + d for old, d in zip(OLD, [0.1, -0.3, 0.05, 0.4, -0.1], strict=True)]
NEW_VALUE = [v + d for v, d in zip(VALUE, [0.1, 0.3, -0.1, 0.25, -0.5], strict=True)]


def answers(scores: tuple[float, float] = (1.5, 0.7), cut: tuple[bool, bool] = (False, True)) -> Rollout:
    """The worked example: one answer that ends and one that does not."""
    return Rollout.from_arrays(
        [0, 0, 0, 1, 1],
        [0, 1],
        step={"logp": f64(OLD), "logp/ref": f64(REF), "value": f64(VALUE)},
        trajectories={"reward": f64(scores), "truncated": torch.tensor(cut)},
    )


def test_worked_example_of_rewards_and_advantages() -> None:
    rollout = unpacking_dpo_ppo.shape_reward(answers())
    close(rollout.reward, [1.5, -10.0])
    close(rollout["step_reward"], [-0.01, 0.005, -0.01, 0.01, 0.01])
    plain = override(unpacking_dpo_ppo, {"advantage.whiten": False}).credit(rollout)
    close(plain.advantage, [1.268475, 1.2405, 1.09, -9.1805, -9.99])
    whitened = unpacking_dpo_ppo.credit(rollout)
    close(whitened.advantage, [0.74102838, 0.73629844, 0.71085232, -1.02565556, -1.16252359], digits=8)
    close(whitened["return"], [1.368475, 1.4405, 1.49, -9.4805, -9.99])


def test_worked_example_of_the_loss() -> None:
    rollout = unpacking_dpo_ppo.credit(unpacking_dpo_ppo.shape_reward(answers()))
    evaluation = now(MOVED, value=NEW_VALUE)
    loss, gradient = value_and_gradient(unpacking_dpo_ppo, evaluation, rollout)
    close(loss, 1.9804787063, digits=10)
    close(gradient, [-0.1637926, -0.10909266, -0.1494597, 0.30601966, 0.21037897], digits=8)
    _, gradient = value_and_gradient(unpacking_dpo_ppo, now(MOVED, value=NEW_VALUE), rollout, "value")
    close(gradient, [-0.0233695, 0, -0.0238, 0.18861, 0], digits=7)


def test_worked_example_of_the_reward_model() -> None:
    rollout = Rollout.from_arrays([0, 1, 2, 3], [0, 0, 1, 1], trajectories={"label": f64([1, 0, 1, 0])})
    loss, _ = value_and_gradient(reward_model, now([0.0] * 4, value=[1.0, 0.0, 0.2, 0.5]), rollout, "value")
    close(loss, 0.5838084660, digits=10)


@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_dpo_is_the_reward_models_loss_of_implicit_rewards(beta: float) -> None:
    implicit = beta * sums(POLICY)
    rollout = Rollout.from_arrays([0, 1, 2, 3], [0, 0, 1, 1], trajectories={"label": f64([1, 0, 1, 0])})
    expected, _ = value_and_gradient(reward_model, now([0.0] * 4, value=implicit), rollout, "value")
    loss, _ = value_and_gradient(override(dpo, {"objective.beta": beta}), now(POLICY), card())
    same(loss, expected)


def test_without_discount_an_advantage_is_what_is_to_come_less_the_value() -> None:
    rollout = unpacking_dpo_ppo.shape_reward(answers())
    made = GAE(lam=1.0, whiten=False)(rollout)
    reward = np.array([-0.01, 0.005, 1.49, 0.01, -9.99])
    to_come = np.concatenate([reward[:3][::-1].cumsum()[::-1], reward[3:][::-1].cumsum()[::-1]])
    same(made["return"], to_come)
    same(made["advantage"], to_come - np.array(VALUE))


def test_whitened_advantages_have_nearly_the_variance_one() -> None:
    rollout = unpacking_dpo_ppo.shape_reward(answers())
    plain = GAE(whiten=False)(rollout)["advantage"].var()
    advantage = unpacking_dpo_ppo.credit(rollout).advantage
    same(advantage.mean(), 0.0)
    same(advantage.var(), plain / (plain + 1e-6))


def test_the_first_update_is_the_policy_gradient() -> None:
    rollout = unpacking_dpo_ppo.credit(unpacking_dpo_ppo.shape_reward(answers()))
    _, gradient = value_and_gradient(unpacking_dpo_ppo, now(OLD, value=VALUE), rollout)
    same(gradient, -rollout.advantage / 5)


def test_shaping_adds_up_to_the_penalty_of_the_answer() -> None:
    rollout = unpacking_dpo_ppo.shape_reward(answers())
    ratio = [sum(OLD[:3]) - sum(REF[:3]), sum(OLD[3:]) - sum(REF[3:])]
    same(rollout.sum_steps(rollout["step_reward"]), -0.05 * f64(ratio))
    free = override(unpacking_dpo_ppo, {"reward.beta": 0.0})
    same(free.shape_reward(answers(cut=(False, False))).trajectory_return, [1.5, 0.7])


def test_scores_are_scaled_before_they_are_replaced() -> None:
    part = EndedScore(gain=2.0, bias=-1.0)
    same(part(answers()).reward, [2.0, -10.0])
    same(part(answers(cut=(False, False))).reward, [2.0, 0.4])


def test_an_invalid_score_is_not_replaced_and_teaches_nothing() -> None:
    rollout = unpacking_dpo_ppo.shape_reward(answers((1.5, math.nan)))
    assert bool(rollout.reward.isnan()[1])
    credited = unpacking_dpo_ppo.credit(rollout)
    same(credited.advantage[3:], [0.0, 0.0])
    same(credited["return"][3:], VALUE[3:])
    assert bool((credited.advantage[:3] != 0).all())


def test_what_differs_from_the_base_recipe() -> None:
    rollout = answers(cut=(False, False))
    ours, theirs = (m.credit(m.shape_reward(rollout)) for m in (unpacking_dpo_ppo, ppo))
    # One eps, of 1e-6 in the place of 1e-8.
    spread = GAE(whiten=False)(unpacking_dpo_ppo.shape_reward(rollout))["advantage"].var()
    same(ours.advantage, theirs.advantage * ((spread + 1e-8) / (spread + 1e-6)).sqrt())
    assert (unpacking_dpo_ppo.schedule.epochs, unpacking_dpo_ppo.schedule.minibatches) == (1, 8)

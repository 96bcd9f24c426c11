"""The card of PPO: advantages by a loop, the clipped surrogate, the clipped value loss, worked example."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from polopt.core.override import override
from polopt.core.rollout import Rollout
from polopt.methods.base.ppo import GAE, ClippedValueLoss, ppo
from polopt.methods.base.reinforce import reinforce
from polopt.objectives.clipped_surrogate import ClippedSurrogate
from polopt.rewards.shaping import KLPenalty
from tests.support import DELTA, OLD, REF, close, f64, now, same, value_and_gradient, with_advantage, worked

VALUE = [0.5, 0.6, 0.7, 0.4, 0.3, 0.5, 0.8, 0.2, 0.4, 0.6]
NEW_VALUE = [0.9, 0.6, 0.8, 0.1, 0.2, 0.5, 1.1, 0.2, 0.5, 0.5]
MOVED = [old + delta for old, delta in zip(OLD, DELTA, strict=True)]

policy_loss = ppo | {"objective": ClippedSurrogate()}
value_loss = ppo | {"objective": ClippedValueLoss(coefficient=1.0)}


def shaped() -> Rollout:
    return ppo.shape_reward(worked(logp__ref=REF, value=VALUE))


def test_worked_example_of_the_rewards_and_advantages() -> None:
    rollout = shaped()
    close(rollout["step_reward"], [-0.005, 0.005, -0.005, 0, 0.01, -0.01, 0.01, 0, -0.005, 0.005])
    made = GAE(whiten=False)(rollout)
    close(
        made["advantage"],
        [0.460987, 0.38525, 0.295, -0.3755, -0.29, 0.4895, 0.21, 0.299512, 0.10475, -0.095],
        # the card prints 6 digits of some and fewer of others, all rounded
    )
    close(made["return"], [0.960987, 0.98525, 0.995, 0.0245, 0.01, 0.9895, 1.01, 0.499512, 0.50475, 0.505])
    whitened = ppo.credit(rollout)
    close(whitened.advantage[:3], [1.019328, 0.772314, 0.477967])
    close(whitened["return"], made["return"], digits=12)
    same(whitened.advantage.mean(), 0)
    close(whitened.advantage.var(), 1.0, digits=6)


def test_worked_example_of_the_policy_loss() -> None:
    loss, gradient = value_and_gradient(policy_loss, now(MOVED), policy_loss.credit(shaped()))
    close(loss, 0.0463388768, digits=9)
    close(gradient, [0, -0.069882, -0.050247, 0.254929, 0, -0.111232, 0, -0.036499, 0.015752, 0.075528])


def test_worked_example_of_the_value_loss() -> None:
    rollout = value_loss.credit(shaped())
    loss, gradient = value_and_gradient(value_loss, now(OLD, value=NEW_VALUE), rollout, "value")
    close(loss, 0.0329461419, digits=9)
    close(gradient, [0, -0.038525, -0.0195, 0, 0.019, -0.04895, 0.009, -0.029951, -0.000475, -0.0005])


def test_the_total_is_the_sum_with_the_value_coefficient() -> None:
    rollout = ppo.credit(shaped())
    evaluation = now(MOVED, value=NEW_VALUE)
    total, metrics = ppo.loss(evaluation, rollout)
    same(total.detach(), 0.0463388768 + 0.1 * 0.0329461419, rtol=1e-7)
    assert {"value/error", "clip_ratio/region_mean"} <= set(metrics)


def packed(seed: int, *, masked: bool = False) -> Rollout:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([4, 1, 6, 3])
    ids = torch.arange(4).repeat_interleave(lengths)
    step = {
        name: torch.randn(14, generator=generator, dtype=torch.float64) for name in ("value", "step_reward", "logp")
    }
    if masked:
        step["mask"] = torch.rand(14, generator=generator) > 0.4
    score = torch.randn(4, generator=generator, dtype=torch.float64)
    return Rollout.from_arrays(ids, [0, 0, 1, 1], step=step, trajectories={"reward": score})


def gae_by_loop(rollout: Rollout, gamma: float, lam: float) -> list[float]:
    """Backwards over the trainable steps of each trajectory, as the recursion is written."""
    out = np.zeros(rollout.n_steps)
    steps = np.arange(rollout.n_steps)
    for i in range(rollout.n_trajectories):
        mine = steps[(rollout.trajectory == i).numpy() & rollout.mask.numpy()]
        later_value = later_advantage = 0.0
        for place, t in reversed(list(enumerate(mine))):
            reward = float(rollout["step_reward"][t]) + (float(rollout.reward[i]) if place == len(mine) - 1 else 0.0)
            delta = reward + gamma * later_value - float(rollout["value"][t])
            later_advantage = delta + gamma * lam * later_advantage
            later_value = float(rollout["value"][t])
            out[t] = later_advantage
    return out.tolist()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.97, 0.0)])
def test_gae_against_the_recursion(gamma: float, lam: float, masked: bool) -> None:
    rollout = packed(3, masked=masked)
    made = GAE(gamma, lam, whiten=False)(rollout)
    expected = f64(gae_by_loop(rollout, gamma, lam))
    same(made["advantage"], expected)
    same(made["return"][rollout.mask], (expected + rollout["value"])[rollout.mask])


def test_lambda_one_is_the_return_to_come_minus_the_value() -> None:
    rollout = packed(0)
    made = GAE(lam=1.0, whiten=False)(rollout)
    to_come = []
    for t in range(rollout.n_steps):
        mine = rollout.trajectory == rollout.trajectory[t]
        later = mine & (torch.arange(rollout.n_steps) >= t)
        to_come.append(float(rollout["step_reward"][later].sum() + rollout.reward[rollout.trajectory[t]]))
    same(made["advantage"], f64(to_come) - rollout["value"])


def test_without_critic_and_kl_every_step_gets_the_score() -> None:
    rollout = worked(value=[0.0] * 10)
    same(GAE(lam=1.0, whiten=False)(rollout)["advantage"], rollout.spread(rollout.reward))
    method = policy_loss | {"advantage": GAE(lam=1.0, whiten=False), "reward": None}
    _, gradient = value_and_gradient(method, now(OLD), method.credit(rollout))
    plain = override(reinforce, {"advantage.baseline": "none", "aggregation": "token-mean"})
    _, expected = value_and_gradient(plain, now(OLD), plain.credit(worked()))
    same(gradient, expected)


@pytest.mark.parametrize("seed", range(3))
def test_whitened_advantages(seed: int) -> None:
    rollout = packed(seed, masked=True)
    advantage = GAE()(rollout)["advantage"][rollout.mask]
    assert float(advantage.mean()) == pytest.approx(0, abs=1e-12)
    assert float(advantage.var()) == pytest.approx(1, abs=1e-6)


def test_at_the_sampling_policy_nothing_is_clipped() -> None:
    rollout = policy_loss.credit(shaped())
    loss, gradient = value_and_gradient(policy_loss, now(OLD), rollout)
    same(loss, 0.0)
    same(gradient, -rollout.advantage / 10)


def test_without_bounds_it_is_the_importance_weighted_surrogate() -> None:
    rollout = policy_loss.credit(shaped())
    wide = override(policy_loss, {"objective.low": float("inf"), "objective.high": float("inf")})
    loss, gradient = value_and_gradient(wide, now(MOVED), rollout)
    ratio = f64(DELTA).exp()
    same(loss, -(ratio * rollout.advantage).mean())
    same(gradient, -ratio * rollout.advantage / 10)


@pytest.mark.parametrize("width", [None, float("inf")])
def test_without_a_band_the_value_loss_is_half_the_squared_error(width: float | None) -> None:
    rollout = value_loss.credit(shaped())
    method = ppo | {"objective": ClippedValueLoss(coefficient=1.0, width=width)}
    loss, gradient = value_and_gradient(method, now(OLD, value=NEW_VALUE), rollout, "value")
    error = f64(NEW_VALUE) - rollout["return"]
    same(loss, 0.5 * error.square().mean())
    same(gradient, error / 10)


def test_dual_clip_bounds_the_loss_of_bad_steps() -> None:
    delta = [2.0, 0.5, -0.3, 2.0, 1.0, 0, 0, 0, 0, 0]
    rollout = with_advantage(worked(), [-1, 1, 0.5, -0.5])
    dual = policy_loss | {"objective": ClippedSurrogate(dual=3.0)}
    loss, gradient = value_and_gradient(dual, now(f64(OLD) + f64(delta)), rollout)
    expected_loss, expected = 0.0, []
    for d, a in zip(delta, rollout.advantage.tolist(), strict=True):
        rho = float(np.exp(d))
        gain = min(rho * a, min(max(rho, 0.8), 1.2) * a)
        blocked = (a > 0 and rho > 1.2) or (a < 0 and rho < 0.8) or (a < 0 and rho > 3.0)
        expected_loss -= max(gain, 3.0 * a) / 10 if a < 0 else gain / 10
        expected.append(0.0 if blocked else -rho * a / 10)
    same(loss, expected_loss)
    same(gradient, expected)


def test_a_step_outside_the_value_band_learns_only_if_its_error_is_the_larger() -> None:
    # V_old 0, band 0.2, Ret 0: V = 1 has error 1 > 0.04, so it learns; with Ret 2 the clipped error is the larger.
    for target, expected in ((0.0, 0.5), (2.0, 0.0)):
        rollout = Rollout.from_arrays(
            [0, 0], [0], step={"logp": f64([-1, -1]), "value": f64([0, 0]), "return": f64([target, target])}
        )
        evaluation = now([-1, -1], value=[1.0, 0.1])
        _, gradient = value_and_gradient(value_loss, evaluation, rollout, "value")
        same(gradient[0], expected)
        same(gradient[1], (0.1 - target) / 2)


def test_the_penalty_needs_the_reference_and_the_critic() -> None:
    assert {"logp", "logp/ref", "value", "reward"} <= ppo.needs
    assert ppo.evaluates == {"logp", "value"}
    assert KLPenalty(beta=0.0).needs == frozenset()


def test_an_invalid_score_teaches_neither_policy_nor_baseline() -> None:
    rollout = worked(rewards=[1, float("nan"), 1, 0.5], value=VALUE)
    made = GAE(whiten=False)(rollout)
    same(made["advantage"][3:5], [0, 0])
    same(made["return"][3:5], VALUE[3:5])
    others = rollout.trajectory != 1
    whitened = GAE()(rollout)["advantage"]
    same(whitened[3:5], [0, 0])
    kept = made["advantage"][others]
    same(whitened[others], (kept - kept.mean()) / torch.sqrt(kept.var() + 1e-8))

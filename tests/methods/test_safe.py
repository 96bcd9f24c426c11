"""The card of SAFE: soft minimum, credit of responses, the sum of Huber losses, the gated penalty, worked examples."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from polopt.advantages.running import START, standardised, with_batch
from polopt.controllers import KLThreshold
from polopt.core.method import Method
from polopt.core.override import override
from polopt.core.rollout import Rollout
from polopt.methods.base.reinforce import reinforce
from polopt.methods.trust_region.safe import ResponseValue, ResponseValueLoss, response_value, safe
from polopt.objectives.clipped_surrogate import ClippedSurrogate
from polopt.regularizers.gated_kl import EntropyGatedKL
from tests.support import DELTA, OLD, REF, close, f64, now, same, value_and_gradient, worked

MOVED = [old + delta for old, delta in zip(OLD, DELTA, strict=True)]
LAST = [2, 4, 6, 9]
FIRST_HEAD = [9.0, 9.0, 0.2, 9.0, 0.5, 9.0, 0.3, 9.0, 9.0, -0.4]
SECOND_HEAD = [9.0, 9.0, 0.8, 9.0, -0.5, 9.0, 0.3, 9.0, 9.0, 0.1]
ENTROPY = [1.0] * 10
penalised = safe | {"objective": None, "regularizer": EntropyGatedKL()}


def shaped(**columns: Any) -> Rollout:
    step = {"value__1": FIRST_HEAD, "value__2": SECOND_HEAD, "logp__ref": REF, "entropy": ENTROPY}
    return worked(**{**step, **columns})


def soft_min(first: float, second: float, a: float = 0.3) -> float:
    return -a * math.log((math.exp(-first / a) + math.exp(-second / a)) / 2)


# --- the value of a response ------------------------------------------------------------------------------------------


def one(first: Any, second: Any) -> Rollout:
    """Responses of one step."""
    heads = {"value/1": f64(first), "value/2": f64(second)}
    return Rollout.from_arrays(range(len(first)), [0] * len(first), step=heads)


def test_worked_example_of_the_soft_minimum() -> None:
    given = one([0.2, 0.5], [0.8, -0.5])
    close(response_value(given, given, 0.3), [0.369866, -0.302572])
    evaluation = now([0.0, 0.0], **{"value/1": [0.2, 0.5], "value/2": [0.8, -0.5]})
    response_value(evaluation, given, 0.3).sum().backward()
    slopes = [evaluation[f"value/{k}"].grad for k in (1, 2)]
    close(slopes[0][0], 0.880797)  # type: ignore[index]
    same(slopes[0] + slopes[1], [1.0, 1.0])  # type: ignore[operator]


def test_the_soft_minimum_lies_between_the_minimum_and_the_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 50, generator=generator, dtype=torch.float64)
    given = one(first, second)
    value = response_value(given, given, 0.3)
    least, mean = torch.minimum(first, second), (first + second) / 2
    assert bool(((least <= value) & (value <= mean)).all())
    same(response_value(given, given, 1e-6), least, atol=1e-6)
    same(response_value(given, given, 1e5), mean, atol=1e-4)
    same(response_value(one(first, first), given, 0.3), first)


def test_the_value_is_that_of_the_last_trainable_step() -> None:
    given = shaped()
    same(response_value(given, given, 0.3), [soft_min(FIRST_HEAD[t], SECOND_HEAD[t]) for t in LAST])
    mask = torch.ones(10, dtype=torch.bool)
    mask[[2, 9, 8, 7, 3]] = False
    masked = given.with_columns(step={"mask": mask})
    same(response_value(masked, masked, 0.3), [9.0, soft_min(0.5, -0.5), 0.3, 0.0])


# --- credit -----------------------------------------------------------------------------------------------------------


def test_running_moments_are_those_of_everything_seen() -> None:
    generator = np.random.default_rng(0)
    batches = [generator.normal(size=n) for n in (5, 1, 8)]
    count, mean, variance = 1e-4, 0.0, 1.0
    moments: Any = START
    for values in batches:
        n = len(values)
        total = variance * count + (values.var(ddof=1) * n if n > 1 else 0.0)
        total += (values.mean() - mean) ** 2 * count * n / (count + n)
        mean, count, variance = (mean * count + values.sum()) / (count + n), count + n, total / (count + n)
        moments = with_batch(moments, f64([*values, math.nan]))
    same(list(moments.values()), [count, mean, variance])
    assert with_batch(moments, f64([math.nan])) == moments
    same(standardised(moments, f64([1.0])), [(1.0 - mean) / (math.sqrt(variance) + 1e-8)])


def test_the_advantage_is_the_whitened_error_of_the_value() -> None:
    part = ResponseValue()
    made = part(shaped())
    rewards = np.array([1.0, 0.0, 1.0, 0.5])
    moments = with_batch(START, f64(rewards))
    target = (rewards - moments["mean"]) / (math.sqrt(moments["variance"]) + 1e-8)
    error = target - [soft_min(FIRST_HEAD[t], SECOND_HEAD[t]) for t in LAST]
    same(made["return"], target)
    same(made["advantage"], (error - error.mean()) / np.sqrt(error.var(ddof=1) + 1e-8))
    assert part.moments == moments
    credited = safe.clone().credit(shaped())
    same(credited.advantage, credited.spread(made["advantage"]))


def test_moments_carry_over_and_resume() -> None:
    running = ResponseValue()
    running(shaped())
    resumed = ResponseValue()
    resumed.load_state_dict(running.state_dict())
    again = worked(rewards=[3.0, 0.0, -1.0, 2.0], value__1=FIRST_HEAD, value__2=SECOND_HEAD)
    same(resumed(again)["return"], running(again)["return"])
    assert not torch.allclose(ResponseValue()(again)["return"], running(again)["return"])


def test_an_invalid_reward_takes_no_part() -> None:
    three = worked(rewards=[1.0, math.nan, 1.0, 0.5], value__1=FIRST_HEAD, value__2=SECOND_HEAD)
    part = ResponseValue()
    made = part(three)
    same(part.moments["count"], 3 + 1e-4)
    others = ResponseValue()(three.select(torch.tensor([0, 2, 3])))
    same(made["advantage"][[0, 2, 3]], others["advantage"])
    assert made["advantage"][1] == 0 and bool(made["return"][1].isnan())
    method = safe | {"objective": ResponseValueLoss(), "regularizer": None}
    credited = method.clone().credit(three)
    heads = {"value/1": [v + 1 for v in FIRST_HEAD], "value/2": SECOND_HEAD}
    loss, gradient = value_and_gradient(method, now(OLD, **heads), credited, "value/1")
    assert math.isfinite(loss) and gradient[[3, 4]].tolist() == [0.0, 0.0] and gradient[2] != 0


# --- the loss of the value --------------------------------------------------------------------------------------------


def value_loss(now_: list[float], old: list[float], target: list[float], **options: Any) -> tuple[float, torch.Tensor]:
    """Loss and gradient in V, both heads being V."""
    method = reinforce | {"objective": ResponseValueLoss(**options)}
    given = one(old, old).with_columns(step={"return": f64(target)})
    evaluation = now([0.0] * len(old), **{"value/1": now_, "value/2": now_})
    loss, _ = method.loss(evaluation, given)
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach()), evaluation["value/1"].grad + evaluation["value/2"].grad  # type: ignore[operator]


def test_worked_example_of_the_value_loss() -> None:
    loss, gradient = value_loss([0.9, 0.1, 2.0], [0.5, 0.0, 1.9], [1.0, 0.0, 0.5], coefficient=1.0)
    close(loss, 0.2183333333, digits=9)
    close(gradient, [-0.016667, 0.033333, 0.166667])
    half, _ = value_loss([0.9, 0.1, 2.0], [0.5, 0.0, 1.9], [1.0, 0.0, 0.5])
    same(half, loss / 2)


def test_the_two_errors_are_added_not_maximised() -> None:
    """Where the clip is active the other error still has a gradient: PPO's maximum would have dropped it."""
    loss, gradient = value_loss([0.9], [0.5], [1.0], coefficient=1.0)
    same(loss, 0.5 * (0.1**2 / 2 + 0.3**2 / 2))
    same(gradient, [-0.05])


# --- the penalty ------------------------------------------------------------------------------------------------------


def penalty(kl: float, **options: Any) -> float:
    """Of ten steps whose signed KL is the same."""
    method: Method = safe | {"objective": None, "regularizer": EntropyGatedKL(**options)}
    evaluation = now([ref + kl for ref in REF])
    return float(method.loss(evaluation, shaped())[0].detach())


def test_worked_example_of_threshold_and_penalty() -> None:
    control = KLThreshold()
    taus, averages, penalties = [], [0.0], []
    for call in range(8):
        written = control({"reward": 0.5 + 0.02 * call, "kl": 1.0})
        taus.append(written["regularizer.threshold"])
        penalties.append(penalty(1.0, threshold=taus[-1], average=averages[-1]))
        averages.append(written["regularizer.average"])
    close(averages[1:], [0.1, 0.19, 0.271, 0.3439, 0.40951, 0.468559, 0.521703, 0.569533])
    close(taus, [0.45, 0.45, 0.450513, 0.450943, 0.451366, 0.451783, 0.452192, 0.452596])
    assert penalties[:5] == [0.0] * 5
    close(penalties[5:], [5.117e-5, 8.785e-4, 2.48624e-3], digits=7)


def test_below_the_threshold_there_is_no_penalty_and_above_it_grows() -> None:
    fixed = {"threshold": 0.3, "average": 0.3}
    assert penalty(0.2999, **fixed) == 0 and penalty(-50.0, **fixed) == 0
    grown = [penalty(0.3 + x, **fixed) for x in (1e-6, 0.1, 0.5, 2.0)]
    assert 0 < grown[0] < 1e-14 and grown == sorted(grown)


@pytest.mark.parametrize(("entropy", "gate"), [(0.0, 20.0), (1.0, 2 / 1.1), (3.9, 0.5), (50.0, 0.5)])
def test_the_gate_falls_with_entropy_down_to_a_half(entropy: float, gate: float) -> None:
    part = EntropyGatedKL(threshold=0.0)
    method: Method = safe | {"objective": None, "regularizer": part}
    given = shaped(entropy=[entropy] * 10)
    loss, _ = method.loss(now([ref + 1.0 for ref in REF]), given)
    same(loss.detach(), 0.1 * 0.1**2 * gate)


def test_the_penalty_has_a_gradient_unless_it_is_the_codes() -> None:
    method = penalised | {"regularizer": EntropyGatedKL(threshold=0.1, average=0.2)}
    evaluation = now(MOVED)
    _, gradient = value_and_gradient(method, evaluation, shaped())
    kl = np.mean(np.array(MOVED) - np.array(REF))
    k = 0.9 * 0.2 + 0.1 * kl
    same(gradient, [0.2 * (k - 0.1) * (2 / 1.1) * 0.1 / 10] * 10)
    constant = override(method, {"regularizer.differentiable": False})
    loss, metrics = constant.loss(evaluation, shaped())
    assert not loss.requires_grad
    same(loss, 0.1 * (k - 0.1) ** 2 * (2 / 1.1))
    close(metrics["penalty/kl"], kl)


def test_the_recipe_moves_its_own_threshold() -> None:
    moved = override(safe, safe.clone().controller({"reward": 0.5, "penalty/kl": 2.0}))
    gate = moved.regularizer.parts[0]
    assert gate.threshold == pytest.approx(0.45 - 0.3 * 0.001 * 1.5 - 0.01 * 0.001 * 1.5 - 0.05 * 0.001 * 1.5)
    assert gate.average == pytest.approx(0.2 + 0.9 * 0.2)  # twice per iteration, as in two epochs


# --- the whole --------------------------------------------------------------------------------------------------------


def test_without_penalty_and_with_equal_heads_it_is_ppo_on_responses() -> None:
    plain = safe | {"objective": ClippedSurrogate(), "regularizer": None}
    credited = plain.clone().credit(shaped(value__2=FIRST_HEAD))
    loss, gradient = value_and_gradient(plain, now(MOVED), credited)
    ratio, a = np.exp(DELTA), credited.advantage.numpy()
    terms = -np.minimum(ratio * a, np.clip(ratio, 0.8, 1.2) * a)
    same(loss, terms.mean(), rtol=1e-7)
    assert bool((gradient != 0).any())


def test_the_total_adds_up() -> None:
    credited = safe.clone().credit(shaped())
    columns = {"value/1": FIRST_HEAD, "value/2": [v - 0.1 for v in SECOND_HEAD], "entropy": ENTROPY}
    whole, _ = safe.loss(now(MOVED, **columns), credited)
    parts = [
        safe | {"objective": ClippedSurrogate(), "regularizer": None},
        safe | {"objective": ResponseValueLoss(), "regularizer": None},
        penalised,
    ]
    added = sum(float(method.loss(now(MOVED, **columns), credited)[0].detach()) for method in parts)
    same(whole.detach(), added - 0.01, rtol=1e-6)

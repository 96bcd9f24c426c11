"""Adaptive KL: the coefficient moves towards the target, at most a fifth per horizon."""

from __future__ import annotations

import json
import math

import pytest

from polopt.controllers import AdaptiveKL, Follow, KLThreshold, LinearSchedule
from polopt.core.errors import UsageError
from polopt.core.override import override
from polopt.methods.base.ppo import ppo


@pytest.mark.parametrize(
    ("kl", "factor"),
    [(6.0, 1.0), (6.6, 1 + 0.1 * 256 / 10_000), (60.0, 1 + 0.2 * 256 / 10_000), (0.0, 1 - 0.2 * 256 / 10_000)],
)
def test_one_step(kl: float, factor: float) -> None:
    control = AdaptiveKL(target=6.0, horizon=10_000, initial=0.05)
    assert control({"kl": kl, "trajectories": 256}) == {"reward.beta": pytest.approx(0.05 * factor)}


def test_steps_compound_and_resume() -> None:
    control = AdaptiveKL(target=1.0, horizon=100, initial=0.2)
    for _ in range(3):
        last = control({"kl": 9.0, "trajectories": 50})
    assert last == {"reward.beta": pytest.approx(0.2 * 1.1**3)}
    other = AdaptiveKL(target=1.0, horizon=100, initial=0.2)
    other.load_state_dict(control.state_dict())
    assert other({"kl": 0.0, "trajectories": 50}) == {"reward.beta": pytest.approx(0.2 * 1.1**3 * 0.9)}


def test_without_a_measurement_nothing_moves() -> None:
    assert AdaptiveKL(initial=0.3)({"trajectories": 8}) == {"reward.beta": 0.3}


def test_what_it_returns_is_an_override_of_the_method() -> None:
    changed = override(ppo, AdaptiveKL(initial=0.07)({}))
    assert changed.reward.beta == 0.07


# --- linear schedule --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("progress", "value"), [(0.0, 2.0), (0.25, 1.5), (1.0, 0.0)])
def test_a_linear_schedule_follows_the_budget(progress: float, value: float) -> None:
    control = LinearSchedule({"a.b": 2.0, "c": 1.0}, {"a.b": 0.0, "c": 1.0})
    assert control({"progress": progress}) == {"a.b": value, "c": 1.0}


def test_a_linear_schedule_starts_at_its_start_and_is_read_from_the_command_line() -> None:
    made = override(ppo, {"controller": LinearSchedule()})
    made = override(made, {"controller.start": "reward.beta=0.2", "controller.end": "reward.beta=0.4"})
    assert made.controller({}) == {"reward.beta": 0.2}
    assert override(made, made.controller({"progress": 0.5})).reward.beta == pytest.approx(0.3)


def test_a_linear_schedule_needs_both_ends() -> None:
    with pytest.raises(UsageError, match="'c' in only one of start and end"):
        LinearSchedule({"a": 1.0}, {"a": 2.0, "c": 3.0})({})


# --- follow -----------------------------------------------------------------------------------------------------------


def test_follow_copies_a_statistic_and_keeps_the_value_without_one() -> None:
    control = Follow("learning_rate", "reward.beta")
    assert control({}) == {} and control({"learning_rate": math.nan}) == {}
    assert override(ppo, control({"learning_rate": 0.3})).reward.beta == 0.3


# --- KL threshold -----------------------------------------------------------------------------------------------------


def threshold(written: dict[str, float]) -> float:
    return written["regularizer.threshold"]


def by_loop(rewards: list[float], base: float = 0.3) -> list[float]:
    """Thresholds after each reward, unclipped rules written out."""
    found, mean, integral, before, output = [], None, 0.0, 0.0, 0.0
    for i, reward in enumerate(rewards):
        if mean is None:
            mean = reward
        else:
            new = 0.95 * mean + 0.05 * reward
            error = (new - mean) - 0.001
            integral = min(1.0, max(-1.0, integral + error))
            output = 0.3 * error + 0.01 * integral + 0.05 * (error - before)
            mean, before = new, error
        seen = rewards[: i + 1]
        factor = 1.5
        if len(seen) >= 50:
            recent = seen[-50:]
            old = seen[-100:-50] if len(seen) >= 100 else recent
            average = sum(recent) / 50
            spread = math.sqrt(sum((r - average) ** 2 for r in recent) / 50)
            factor = 0.8
            if average > sum(old) / 50 + 0.01:
                factor = 1.2
            elif spread < 0.02 and average > 0.7:
                factor = 1.0
        found.append(min(0.6, max(0.1, (base + output) * factor)))
    return found


CURVES = {
    "climbs": [0.3 + 0.004 * i for i in range(180)],
    "converges": [min(0.8, 0.1 * i) for i in range(180)],
    "stays low": [0.4] * 180,
    "swings": [math.sin(i) for i in range(180)],
}


@pytest.mark.parametrize("name", CURVES)
def test_the_threshold_follows_velocity_and_phase(name: str) -> None:
    control = KLThreshold()
    found = [threshold(control({"reward": reward})) for reward in CURVES[name]]
    assert found == pytest.approx(by_loop(CURVES[name]), abs=1e-12)
    phases = {"climbs": 1.2, "converges": 1.0, "stays low": 0.8, "swings": 0.8}
    assert control.factor == phases[name] and len(control.history) == 100


def test_a_constant_reward_winds_the_integral_down_to_its_bound() -> None:
    control = KLThreshold()
    for _ in range(2000):
        control({"reward": 0.5})
    assert control.integral == -1.0 and control.error == pytest.approx(-0.001)
    half = KLThreshold()
    for _ in range(501):
        half({"reward": 0.5})
    assert half.integral == pytest.approx(-0.5)


def test_the_kl_average_starts_at_zero_and_calls_repeat() -> None:
    control = KLThreshold(calls=2, kl_statistic="my/kl")
    assert control({})["regularizer.average"] == 0.0
    assert control({"my/kl": 1.0})["regularizer.average"] == pytest.approx(0.19)
    assert control({"reward": math.nan, "my/kl": math.nan})["regularizer.average"] == pytest.approx(0.19)
    assert control.mean is None and threshold(control({})) == pytest.approx(0.45)


def test_the_threshold_resumes() -> None:
    running, resumed = KLThreshold(), KLThreshold()
    for reward in CURVES["swings"][:70]:
        running({"reward": reward, "kl": reward})
    resumed.load_state_dict(json.loads(json.dumps(running.state_dict())))
    for reward in CURVES["swings"][70:]:
        assert resumed({"reward": reward, "kl": 1.0}) == running({"reward": reward, "kl": 1.0})


@pytest.mark.parametrize(("base", "expected"), [(5.0, 0.6), (-5.0, 0.1)])
def test_the_threshold_is_clipped(base: float, expected: float) -> None:
    assert threshold(KLThreshold(base=base)({})) == expected

"""Adaptive KL: the coefficient moves towards the target, at most a fifth per horizon."""

from __future__ import annotations

import pytest

from polopt.controllers import AdaptiveKL, LinearSchedule
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

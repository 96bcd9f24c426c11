"""The card of GSPO: one geometric-mean ratio per response, its token form, worked example."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from polopt.core.rollout import Rollout
from polopt.methods.base.grpo import grpo
from polopt.methods.base.gspo import GeometricSequenceSurrogate, gspo
from polopt.objectives.clipped_surrogate import ClippedSurrogate
from tests.support import DELTA, IDS, OLD, close, f64, now, same, value_and_gradient, with_advantage, worked

MOVED = f64(OLD) + f64(DELTA)
ADVANTAGE = [1.0, -1.0, 0.5, -0.5]
STARTS = [0, 3, 5, 7, 10]
tenth = gspo | {"objective": GeometricSequenceSurrogate(0.1, 0.1)}


def sequence_form(delta: list[float], advantage: list[float], low: float, high: float) -> tuple[float, list[float]]:
    """L = -(1/M) sum_i min(s_i A_i, clip(s_i) A_i) and its gradient, response by response."""
    loss, gradient = 0.0, []
    for i, a in enumerate(advantage):
        mine = delta[STARTS[i] : STARTS[i + 1]]
        s = float(np.exp(np.mean(mine)))
        loss -= min(s * a, min(max(s, 1 - low), 1 + high) * a) / 4
        blocked = (a > 0 and s > 1 + high) or (a < 0 and s < 1 - low)
        gradient += [0.0 if blocked else -s * a / (4 * len(mine))] * len(mine)
    return loss, gradient


def test_worked_example() -> None:
    rollout = with_advantage(worked(), ADVANTAGE)
    close(rollout.mean_steps(f64(DELTA)).exp(), [1.086904, 0.951229, 1.349859, 0.920044])
    loss, gradient = value_and_gradient(tenth, now(MOVED), rollout)
    close(loss, -0.0564131044, digits=9)
    close(gradient, [-0.090575] * 3 + [0.118904] * 2 + [0.0] * 2 + [0.038335] * 3)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bounds", [(3e-4, 4e-4), (0.1, 0.2)])
def test_the_token_form_equals_the_sequence_form(seed: int, bounds: tuple[float, float]) -> None:
    generator = torch.Generator().manual_seed(seed)
    delta = 0.2 * torch.randn(10, generator=generator, dtype=torch.float64)
    advantage = torch.randn(4, generator=generator, dtype=torch.float64).tolist()
    method = gspo | {"objective": GeometricSequenceSurrogate(*bounds)}
    loss, gradient = value_and_gradient(method, now(f64(OLD) + delta), with_advantage(worked(), advantage))
    expected_loss, expected = sequence_form(delta.tolist(), advantage, *bounds)
    same(loss, expected_loss)
    same(gradient, expected)


def test_an_advantage_per_step_is_clipped_by_its_own_sign() -> None:
    advantage = f64([1, -1, 2, 0.5, -0.5, 1, -1, 1, -2, 3])
    rollout = worked().with_columns(step={"advantage": advantage})
    _, gradient = value_and_gradient(tenth, now(MOVED), rollout)
    expected = []
    for t, a in enumerate(advantage.tolist()):
        i = IDS[t]
        s = float(np.exp(np.mean(DELTA[STARTS[i] : STARTS[i + 1]])))
        blocked = (a > 0 and s > 1.1) or (a < 0 and s < 0.9)
        expected.append(0.0 if blocked else -s * a / (4 * (STARTS[i + 1] - STARTS[i])))
    same(gradient, expected)


def test_one_step_responses_are_token_clipping() -> None:
    old = f64([-0.5, -1.0, -0.2, -0.7])
    rollout = with_advantage(Rollout.from_arrays(range(4), [0, 0, 1, 1], step={"logp": old}), ADVANTAGE)
    new = old + f64([0.3, -0.1, 0.05, -0.4])
    token = grpo | {"objective": ClippedSurrogate(0.1, 0.1)}
    loss, gradient = value_and_gradient(tenth, now(new), rollout)
    expected_loss, expected = value_and_gradient(token, now(new), rollout)
    same(loss, expected_loss)
    same(gradient, expected)


def test_only_the_mean_log_ratio_of_a_response_matters() -> None:
    rollout = with_advantage(worked(), ADVANTAGE)
    order = [2, 0, 1, 4, 3, 6, 5, 8, 9, 7]
    shuffled = f64(OLD) + f64(DELTA)[order]
    same(value_and_gradient(tenth, now(shuffled), rollout)[0], value_and_gradient(tenth, now(MOVED), rollout)[0])
    same(value_and_gradient(tenth, now(shuffled), rollout)[1], value_and_gradient(tenth, now(MOVED), rollout)[1])


def test_at_the_sampling_policy_it_is_grpo() -> None:
    rollout = gspo.credit(worked())
    _, gradient = value_and_gradient(gspo, now(OLD), rollout)
    same(gradient, -rollout.advantage / (4 * rollout.spread(f64([3, 2, 2, 3]))))
    same(gradient, value_and_gradient(grpo, now(OLD), rollout)[1])


def test_doubling_every_step_leaves_the_ratio_alone() -> None:
    twice = [i for i in range(10) for _ in range(2)]
    doubled = Rollout.from_arrays([IDS[i] for i in twice], [0, 0, 1, 1], step={"logp": f64([OLD[i] for i in twice])})
    doubled = with_advantage(doubled, ADVANTAGE)
    loss, gradient = value_and_gradient(tenth, now(MOVED[twice]), doubled)
    base_loss, base = value_and_gradient(tenth, now(MOVED), with_advantage(worked(), ADVANTAGE))
    same(loss, base_loss)
    same(gradient, base[twice] / 2)


def test_masked_steps_are_not_part_of_the_mean() -> None:
    mask = torch.tensor([True, False, True, True, True, True, True, True, True, False])
    rollout = with_advantage(worked().with_columns(step={"mask": mask}), ADVANTAGE)
    _, gradient = value_and_gradient(tenth, now(MOVED), rollout)
    same(gradient[:3], [0.0, 0.0, 0.0])  # s = exp(0.175) = 1.19 lies above the bound, A > 0
    s = float(np.exp((-0.3 + 0.1) / 2))  # 0.905 lies inside
    same(gradient[7:], [s * 0.5 / 8, s * 0.5 / 8, 0.0])


def test_what_it_declares() -> None:
    assert gspo.unit == "trajectory"
    assert gspo.vanishes_with == "advantage"
    assert gspo.schedule.minibatches == 4

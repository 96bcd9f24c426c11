"""The card of SimPO: mean log-probs for rewards, a target margin, no reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from polopt.core.rollout import Rollout
from polopt.methods.preference.simpo import SimPO, simpo
from tests.methods.pairs import LENGTHS, POLICY, card, on_card, random_logp, slopes, softplus, spread, sums
from tests.support import close, f64, now, same, value_and_gradient


def test_worked_example() -> None:
    loss, gradient = on_card(simpo, gamma=1.0)
    close(loss, 0.7718757277, digits=10)
    close(gradient, spread([-0.16111317, 0.24166975, -0.29330879, 0.14665439]), digits=8)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", [0.0, 0.5])
def test_loss_and_gradient_by_a_loop(seed: int, shape: float) -> None:
    logp, beta, gamma, wrong = random_logp(seed), 2.5, 0.4, 0.2

    def oracle(x: NDArray[np.float64]) -> float:
        m = sums(x, None) / np.array(LENGTHS)
        r = (1 - np.exp(m) ** -shape) / shape if shape else m
        terms = [beta * (r[w] - r[w + 1]) - gamma for w in (0, 2)]
        return float(np.mean([(1 - wrong) * softplus(-z) + wrong * softplus(z) for z in terms]))

    loss, gradient = on_card(simpo, logp, beta=beta, gamma=gamma, label_smoothing=wrong, shape=shape)
    same(loss, oracle(logp.numpy()))
    same(gradient, slopes(oracle, logp), rtol=1e-6, atol=1e-8)


def test_the_shaped_reward() -> None:
    close(SimPO(shape=0.5).score(f64([-0.7]), f64([1.0])), [-0.8381350972], digits=10)
    same(SimPO(shape=1e-9).score(f64([-1.4]), f64([2.0])), [-0.7], rtol=1e-8)


def test_equal_means() -> None:
    same(on_card(simpo, [-0.4] * 11)[0], math.log1p(math.exp(0.5)))
    assert on_card(simpo, gamma=1.0)[0] > on_card(simpo, gamma=0.5)[0]


def test_repeating_every_step_changes_nothing_but_the_slope_of_a_step() -> None:
    ids = [i for i, length in enumerate(LENGTHS) for _ in range(2 * length)]
    twice = Rollout.from_arrays(ids, [0, 0, 1, 1], trajectories={"label": f64([1, 0, 1, 0])})
    loss, gradient = value_and_gradient(simpo, now([x for x in POLICY for _ in range(2)]), twice)
    same(loss, on_card(simpo)[0])
    same(gradient, [g / 2 for g in on_card(simpo)[1].tolist() for _ in range(2)])


def test_masked_steps_are_no_part_of_the_length() -> None:
    mask = torch.ones(11, dtype=torch.bool)
    mask[1] = mask[9] = False
    loss, _ = value_and_gradient(simpo, now(POLICY), card().with_columns(step={"mask": mask}))
    means = [(-0.5 - 0.2) / 2, -1.1, -0.45, (-1.1 - 0.4 - 0.7) / 3]
    same(loss, np.mean([softplus(0.5 - 2 * (means[w] - means[w + 1])) for w in (0, 2)]))


def test_the_logged_reward_is_that_of_the_loss() -> None:
    _, metrics = simpo.loss(now(POLICY), card())
    means = [sum(POLICY[0:3]) / 3, -1.1, -0.45, sum(POLICY[7:]) / 4]
    same(metrics["rewards/margins"], 2 * (means[0] - means[1] + means[2] - means[3]) / 2)
    assert not simpo.models

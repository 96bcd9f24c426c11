"""The card of ORPO: cross-entropy of the winner and a penalty on the odds of the loser."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from polopt.methods.preference.orpo import ORPO, orpo
from tests.methods.pairs import LENGTHS, POLICY, on_card, random_logp, slopes, softplus, spread, sums
from tests.support import close, f64, same


def test_worked_example() -> None:
    loss, gradient = on_card(orpo)
    close(loss, 0.5559059023, digits=9)
    close(gradient, spread([-0.21061722, 0.01032678, -0.22254742, 0.0075752]), digits=8)
    close(on_card(orpo, coefficient=0.0)[0], 0.1 * 0.3590590225, digits=10)
    close(on_card(orpo, coefficient=0.0, sequence_nll=1.0)[0], 0.5442392356, digits=10)


@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradient_by_a_loop(seed: int) -> None:
    logp, beta, alpha = random_logp(seed), 0.3, 0.8

    def oracle(x: NDArray[np.float64]) -> float:
        s = sums(x, None)
        p = np.exp(s / np.array(LENGTHS))
        logit = np.log(p / (1 - p))
        odds = np.mean([softplus(logit[w + 1] - logit[w]) for w in (0, 2)])
        return float(beta * odds - alpha * (s[0] + s[2]) / 5)

    loss, gradient = on_card(orpo, logp, beta=beta, coefficient=alpha)
    same(loss, oracle(logp.numpy()))
    same(gradient, slopes(oracle, logp), rtol=1e-6, atol=1e-8)


def test_equal_odds() -> None:
    same(on_card(orpo, [-0.4] * 11, coefficient=0.0)[0], 0.1 * math.log(2))


@pytest.mark.parametrize("mean", [-60.0, -5.0, -math.log(2), -0.1, -1e-5])
def test_log_odds_are_exact_and_their_slope_is_finite(mean: float) -> None:
    at = f64([mean]).requires_grad_()
    odds = ORPO()._log_odds(at)
    (slope,) = torch.autograd.grad(odds.sum(), at)
    same(odds.detach(), [mean - math.log(-math.expm1(mean))])
    same(slope, [1 / -math.expm1(mean)])


def test_a_certain_answer_has_finite_odds() -> None:
    certain = f64(POLICY).clone()
    certain[:3] = 0.0
    loss, gradient = on_card(orpo, certain)
    assert math.isfinite(loss) and bool(torch.isfinite(gradient).all())


def test_of_unlikely_answers_it_is_the_logistic_loss_of_mean_log_probs() -> None:
    low = f64(POLICY) - 30
    means = sums(low, None) / np.array(LENGTHS)
    expected = np.mean([softplus(means[w + 1] - means[w]) for w in (0, 2)])
    same(on_card(orpo, low, coefficient=0.0, beta=1.0)[0], expected, rtol=1e-8)


def test_what_it_declares() -> None:
    assert orpo.unit == "group" and not orpo.models and orpo.masks == {"mask", "mask/chosen"}

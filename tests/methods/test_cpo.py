"""The card of CPO: DPO with a uniform reference and the cross-entropy of the winners, per step or per answer."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from polopt.methods.preference.cpo import cpo
from polopt.methods.preference.dpo import dpo
from tests.methods.pairs import POLICY, card, on_card, random_logp, slopes, softplus, spread, sums
from tests.support import close, f64, now, same


def test_worked_example() -> None:
    loss, gradient = on_card(cpo)
    close(loss, 1.1488223335, digits=10)
    close(gradient, spread([-0.22437513, 0.02437513, -0.22226104, 0.02226104]), digits=8)
    close(on_card(cpo, coefficient=0.0)[0], 0.6288223335, digits=10)
    close(on_card(cpo, coefficient=0.0, sequence_nll=1.0)[0], 1.9288223335, digits=10)


@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradient_by_a_loop(seed: int) -> None:
    logp, beta, wrong, alpha, whole = random_logp(seed), 0.4, 0.1, 0.7, 0.3

    def oracle(x: NDArray[np.float64]) -> float:
        s = sums(x, None)
        terms = []
        for w in (0, 2):
            z = beta * (s[w] - s[w + 1])
            terms.append((1 - wrong) * softplus(-z) + wrong * softplus(z) - whole * s[w])
        return float(np.mean(terms) - alpha * (s[0] + s[2]) / 5)

    loss, gradient = on_card(cpo, logp, beta=beta, label_smoothing=wrong, coefficient=alpha, sequence_nll=whole)
    same(loss, oracle(logp.numpy()))
    same(gradient, slopes(oracle, logp), rtol=1e-6, atol=1e-8)


def test_without_cross_entropy_it_is_dpo_without_a_reference() -> None:
    one, other = on_card(cpo, coefficient=0.0), on_card(dpo, reference_free=True)
    same(one[0], other[0])
    same(one[1], other[1])
    assert not cpo.models and "logp/ref" not in cpo.needs


def test_equal_log_probs() -> None:
    even = f64(POLICY).clone()
    even[3:5] = -0.85
    even[7:] = -0.225
    same(on_card(cpo, even, coefficient=0.0)[0], math.log(2))


def test_the_winners_of_all_groups_share_one_mean_per_step() -> None:
    _, metrics = cpo.loss(now(POLICY), card())
    close(metrics["nll"], 0.52, digits=9)
    # A list: the best answer alone is imitated.
    best = card((0.2, 0.9, 0.5, 0.1), (0, 0, 0, 0))
    _, metrics = cpo.loss(now(POLICY), best)
    close(metrics["nll"], 1.1, digits=9)

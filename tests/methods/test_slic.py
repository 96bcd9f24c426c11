"""The card of SLiC-HF: a hinge of log-probs with a margin, and the cross-entropy of the winner."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from polopt.core.override import override
from polopt.methods.preference.dpo import dpo
from polopt.methods.preference.slic import slic
from tests.methods.pairs import LENGTHS, POLICY, REFERENCE, card, on_card, random_logp, slopes, spread, sums
from tests.support import close, f64, now, same


def test_worked_example() -> None:
    loss, gradient = on_card(slic)
    close(loss, 0.38, digits=9)
    close(gradient, spread([-0.55, 0.5, -0.05, 0.0]), digits=9)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("per_step", [True, False])
def test_loss_and_gradient_by_a_loop(seed: int, per_step: bool) -> None:
    logp = random_logp(seed)

    def oracle(x: NDArray[np.float64]) -> float:
        s = sums(x, None) / (np.array(LENGTHS) if per_step else 1.0)
        return float(np.mean([max(0.0, 0.7 - 1.3 * (s[w] - s[w + 1])) - 0.2 * s[w] for w in (0, 2)]))

    loss, gradient = on_card(slic, logp, margin=0.7, beta=1.3, nll=0.2, per_step=per_step)
    same(loss, oracle(logp.numpy()))
    same(gradient, slopes(oracle, logp), rtol=1e-6, atol=1e-8)


def test_beyond_the_margin_only_the_cross_entropy_is_left() -> None:
    apart = f64(POLICY).clone()
    apart[3:5] -= 2.0
    apart[7:] -= 2.0
    assert on_card(slic, apart, nll=0.0)[0] == 0.0
    same(on_card(slic, apart, nll=0.0)[1], [0.0] * 11)
    same(on_card(slic, apart)[1], spread([-0.05, 0.0, -0.05, 0.0]))


def test_no_reference_is_read() -> None:
    assert slic.needs == frozenset() and not slic.models
    same(slic.loss(now(POLICY), card())[0].detach(), on_card(slic)[0])


def test_the_hinge_of_implicit_rewards() -> None:
    normed = override(dpo, {"objective": "hinge"})
    loss, gradient = on_card(normed)
    close(loss, 0.96, digits=9)
    close(gradient, spread([-0.05, 0.05, -0.05, 0.05]), digits=9)
    same(on_card(normed, REFERENCE)[0], 1.0)

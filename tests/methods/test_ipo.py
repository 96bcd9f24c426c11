"""The card of IPO: regression of the gap on 1 / (2 tau), summed and per step, its optimum in a table."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from polopt.core.rollout import Rollout
from polopt.methods.preference.dpo import dpo
from polopt.methods.preference.ipo import IPO, ipo
from tests.methods.pairs import LENGTHS, POLICY, REFERENCE, on_card, random_logp, slopes, spread, sums
from tests.support import close, f64, now, same


def test_worked_example() -> None:
    loss, gradient = on_card(ipo)
    close(loss, 23.29625, digits=9)
    close(gradient, spread([-1.56666667, 2.35, -2.475, 1.2375]), digits=8)
    summed, gradient = on_card(ipo, per_step=False)
    close(summed, 21.25, digits=9)
    close(gradient, spread([-4.3, 4.3, -4.9, 4.9]), digits=9)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("per_step", [True, False])
def test_loss_and_gradient_by_a_loop(seed: int, per_step: bool) -> None:
    logp, tau = random_logp(seed), 0.3

    def oracle(x: NDArray[np.float64]) -> float:
        s = sums(x) / (np.array(LENGTHS) if per_step else 1.0)
        return float(np.mean([(s[0] - s[1] - 1 / (2 * tau)) ** 2, (s[2] - s[3] - 1 / (2 * tau)) ** 2]))

    loss, gradient = on_card(ipo, logp, beta=tau, per_step=per_step)
    same(loss, oracle(logp.numpy()))
    same(gradient, slopes(oracle, logp), rtol=1e-6, atol=1e-8)


def test_at_the_reference() -> None:
    same(on_card(ipo, REFERENCE)[0], 25.0)


def test_beyond_the_target_the_gradient_turns() -> None:
    reached = f64(REFERENCE).clone()
    reached[:3] += 5.0
    reached[5:7] += 5.0
    loss, gradient = on_card(ipo, reached)
    same(loss, 0.0)
    same(gradient, [0.0] * 11)
    assert float(on_card(ipo, reached + f64(spread([1, 0, 0, 0])))[1][0]) > 0
    # Of DPO every gap is too small, however large.
    assert float(on_card(dpo, reached)[1][0]) < 0


def test_a_constant_added_to_both_log_ratios_changes_nothing() -> None:
    moved = f64(POLICY) + f64(spread([0.3 / n for n in LENGTHS]))
    same(on_card(ipo, moved, per_step=False)[0], on_card(ipo, per_step=False)[0])


def population(logits: torch.Tensor, preference: torch.Tensor, law: torch.Tensor, tau: float) -> torch.Tensor:
    """Expected loss of labelled pairs of a law over three one-step answers, through the part."""
    reference = f64([0.5, 0.3, 0.2])
    pairs = [(i, j) for i in range(3) for j in range(3)]
    members = torch.tensor([k for pair in pairs for k in pair])
    groups = torch.arange(9).repeat_interleave(2)
    expected = logits.new_zeros(())
    for label in ([1.0, 0.0], [0.0, 1.0]):
        rollout = Rollout.from_arrays(
            torch.arange(18),
            groups,
            step={"logp/ref": reference.log()[members]},
            trajectories={"label": f64(label * 9)},
        )
        evaluation = now([0.0])
        evaluation.columns["logp"] = logits.log_softmax(-1)[members]  # type: ignore[index]
        terms = IPO(beta=tau)(evaluation, rollout).value
        chance = torch.stack([preference[i, j] if label[0] else preference[j, i] for i, j in pairs])
        weight = torch.stack([law[i] * law[j] for i, j in pairs])
        expected = expected + (weight * chance * terms).sum()
    return expected


def test_the_population_loss_is_stationary_at_the_cards_optimum() -> None:
    preference = f64([[0.5, 0.9, 0.2], [0.1, 0.5, 0.7], [0.8, 0.3, 0.5]])
    law, tau = f64([0.3, 0.3, 0.4]), 0.5
    logits = (f64([0.5, 0.3, 0.2]).log() + preference @ law / tau).requires_grad_()
    close(logits.detach().softmax(-1), [0.50540673, 0.27992953, 0.21466374], digits=8)
    (gradient,) = torch.autograd.grad(population(logits, preference, law, tau), logits)
    assert float(gradient.abs().max()) < 1e-12
    elsewhere = (logits.detach() + f64([0.3, 0, 0])).requires_grad_()
    (away,) = torch.autograd.grad(population(elsewhere, preference, law, tau), elsewhere)
    assert float(away.abs().max()) > 1e-3


def test_what_it_declares() -> None:
    assert ipo.unit == "group" and ipo.offline and ipo.objective.beta == 0.1

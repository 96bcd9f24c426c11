"""The card of the study of online and offline alignment: its losses, where they settle, what data cannot say."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from polopt.claims.preference.online_offline_gap import accuracy
from polopt.core.loss import Evaluation
from polopt.core.method import Method
from polopt.core.override import override
from polopt.core.rollout import Rollout
from polopt.methods.preference.online_offline_gap import online_offline_gap
from polopt.objectives.best_of_n import BestOfN
from polopt.policies.exact.divergences import kl
from polopt.policies.exact.game import PreferenceGame
from tests.support import close, f64, now, same, value_and_gradient

LOGP = [-0.5, -1, -0.2, -0.7, -0.4, -0.9, -1.1]
REFERENCE = [-0.6, -0.9, -0.3, -0.6, -0.8, -0.7, -1]

REWARDS = f64([0, 0.5, 1, 2])
REF, PI, DATA = f64([0.4, 0.3, 0.2, 0.1]), f64([0.3, 0.3, 0.2, 0.2]), f64([0.6, 0.3, 0.1, 0])
GAME = PreferenceGame.bradley_terry(REWARDS[None])
FIXED = [0.35171204, 0.29490194, 0.22007551, 0.13331051]

best_of_2 = online_offline_gap | {"objective": BestOfN()}


def pairs(label: Sequence[float] = (1, 0, 1, 0)) -> Rollout:
    return Rollout.from_arrays(
        [0, 0, 1, 1, 1, 2, 3], [0, 0, 1, 1], step={"logp/ref": f64(REFERENCE)}, trajectories={"label": f64(label)}
    )


def test_worked_example() -> None:
    loss, gradient = value_and_gradient(override(online_offline_gap, {"objective.beta": 0.5}), now(LOGP), pairs())
    close(loss, 1.585, digits=9)
    close(gradient, [-1.4, -1.4, 1.4, 1.4, 1.4, -1.1, 1.1], digits=9)
    loss, gradient = value_and_gradient(best_of_2, now(LOGP), pairs())
    close(loss, 1.2, digits=9)
    close(gradient, [-0.5, -0.5, 0, 0, 0, -0.5, 0], digits=9)


def population(method: Method, logits: Tensor, law: Tensor) -> Tensor:
    """Expected loss of pairs of a law, labelled by the game, over one-step answers; in the logits."""
    expected = logits.new_zeros(())
    logp = logits.log_softmax(0)
    for i in range(len(law)):
        for j in range(len(law)):
            for label in ([1.0, 0.0], [0.0, 1.0]):
                rollout = Rollout.from_arrays(
                    [0, 1], [0, 0], step={"logp/ref": REF.log()[[i, j]]}, trajectories={"label": f64(label)}
                )
                loss, _ = method.loss(Evaluation({"logp": logp[[i, j]]}), rollout)
                first = GAME.preference[0, i, j]
                expected = expected + law[i] * law[j] * (first if label[0] else 1 - first) * loss
    return expected


def slope(method: Method, policy: Tensor, law: Tensor) -> tuple[float, Tensor]:
    logits = policy.log().requires_grad_()
    loss = population(method, logits, law)
    (gradient,) = torch.autograd.grad(loss, logits)
    return float(loss.detach()), gradient


IPO1 = override(online_offline_gap, {"objective.beta": 1.0})


def test_worked_bandit() -> None:
    loss, gradient = slope(IPO1, PI, PI)
    close(loss, 0.28963163, digits=8)
    close(gradient, [-0.21707755, -0.00126702, -0.08973478, 0.30807935], digits=8)
    loss, gradient = slope(IPO1, PI, DATA)
    close(loss, 0.24840699, digits=8)
    close(gradient, [-0.13255001, 0.13365549, -0.00110548, 0], digits=8)
    close(kl(PI, REF), 0.05232481, digits=8)
    close(GAME.win_rate(PI[None], REF[None]), [0.54148321], digits=8)


def test_worked_accuracy() -> None:
    """Pairs of the data law, the better answer by reward; equal log-ratios count one half."""
    close(accuracy(PI[None], REF[None], REWARDS[None], DATA[None]), [0.94444444], digits=8)


def test_online_it_settles_at_the_regularised_equilibrium() -> None:
    settled = GAME.regularised_nash(REF[None], 1.0)[0]
    close(settled, FIXED, digits=8)
    _, gradient = slope(IPO1, settled, settled)
    assert float(gradient.abs().max()) < 1e-12
    assert float(slope(IPO1, PI, PI)[1].abs().max()) > 1e-2


@pytest.mark.parametrize("tau", [0.3, 1.0])
def test_a_fixed_sampler_settles_at_the_tilt_by_its_win_rate(tau: float) -> None:
    sampler = f64([0.1, 0.2, 0.3, 0.4])
    settled = (REF.log() + GAME.payoff(sampler[None])[0] / tau).softmax(0)
    method = override(online_offline_gap, {"objective.beta": tau})
    _, gradient = slope(method, settled, sampler)
    assert float(gradient.abs().max()) < 1e-12
    # Another sampler, another end.
    assert float(slope(method, settled, DATA)[1].abs().max()) > 1e-2


@pytest.mark.parametrize("loss", ["ipo", "best-of-2"])
def test_what_the_data_lack_is_not_ranked(loss: str) -> None:
    """Tabular and offline: of the answers that the data lack IPO moves no logit, best-of-2 all alike."""
    data = f64([0.7, 0.3, 0, 0])
    _, gradient = slope(IPO1 if loss == "ipo" else best_of_2, PI, data)
    if loss == "ipo":
        assert float(gradient[2:].abs().max()) < 1e-15 < float(gradient[:2].abs().min())
    else:
        same(gradient[2:], PI[2:])


@pytest.mark.parametrize("chance", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("tau", [0.1, 0.5])
def test_the_expectation_over_labels(chance: float, tau: float) -> None:
    method = override(online_offline_gap, {"objective.beta": tau})
    s = [sum(LOGP[a:b]) - sum(REFERENCE[a:b]) for a, b in ((0, 2), (2, 5), (5, 6), (6, 7))]
    gaps = [s[0] - s[1], s[2] - s[3]]
    total = 0.0
    for a, p in ((1, chance), (0, 1 - chance)):
        for b, q in ((1, chance), (0, 1 - chance)):
            loss, _ = value_and_gradient(method, now(LOGP), pairs((a, 1 - a, b, 1 - b)))
            total += p * q * loss
    closed = [m**2 - m * (2 * chance - 1) / tau + 1 / (4 * tau**2) for m in gaps]
    same(total, sum(closed) / 2)


@pytest.mark.parametrize("method", [online_offline_gap, best_of_2], ids=["ipo", "best-of-2"])
def test_the_order_of_a_pair_does_not_matter(method: Method) -> None:
    swapped = pairs((0, 1, 1, 0)).select(torch.tensor([1, 0, 2, 3]))
    logp = [*LOGP[2:5], *LOGP[:2], *LOGP[5:]]
    expected, gradient = value_and_gradient(method, now(LOGP), pairs((0, 1, 1, 0)))
    loss, slope = value_and_gradient(method, now(logp), swapped)
    same(loss, expected)
    same(slope, torch.cat([gradient[2:5], gradient[:2], gradient[5:]]))


@pytest.mark.parametrize("method", [online_offline_gap, best_of_2], ids=["ipo", "best-of-2"])
def test_answers_without_a_step_or_a_label_take_no_part(method: Method) -> None:
    mask = torch.tensor([1, 1, 1, 1, 1, 1, 0], dtype=torch.bool)
    loss, gradient = value_and_gradient(method, now(LOGP), pairs((1, math.nan, 1, 0)).with_columns(step={"mask": mask}))
    if method is best_of_2:
        # Whoever remains is the best of its group.
        same(loss, (1.5 + 0.9) / 2)
        same(gradient, [-0.5, -0.5, 0, 0, 0, -0.5, 0])
    else:
        assert loss == 0 and not bool(gradient.any())


def test_pairs_are_fresh_and_labels_drawn() -> None:
    """The recipe labels the first two answers by a draw from the proxy's preference, again in every batch."""
    count = 4000
    scores = torch.tensor([1.0, 0.0, 5.0]).repeat(count)
    rollout = Rollout.from_arrays(
        range(3 * count), [g for g in range(count) for _ in range(3)], trajectories={"score": scores}
    )
    filtered = online_offline_gap.clone().filter
    first, second = filtered(rollout), filtered(rollout)
    for made in (first, second):
        assert made.n_trajectories == 2 * count and float(made["score"].max()) == 1.0
        share = float(made["label"][made["score"] == 1.0].mean())
        assert share == pytest.approx(1 / (1 + math.exp(-1)), abs=4 * math.sqrt(0.2 / count))
    assert not torch.equal(first["label"], second["label"])
    assert not online_offline_gap.offline

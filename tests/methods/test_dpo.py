"""The card of DPO: worked example, identities, f-divergences, the optimum that it is derived from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from polopt.core.errors import UsageError
from polopt.core.override import override
from polopt.core.rollout import Rollout
from polopt.methods.preference.dpo import DPO, dpo
from polopt.objectives.preference import Pairs
from tests.methods.pairs import LENGTHS, POLICY, REFERENCE, card
from tests.support import close, f64, now, same, value_and_gradient


def ours(
    rollout: Rollout | None = None, logp: Sequence[float] | Tensor = POLICY, **fields: Any
) -> tuple[float, Tensor]:
    method = dpo | {"objective": DPO(**fields)}
    return value_and_gradient(method, now(logp), card() if rollout is None else rollout)


def shaped(s: float, divergence: str, alpha: float) -> float:
    """f'(exp(s)) of the divergence, from its definition in t = pi / ref."""
    t = math.exp(s)
    return {
        "reverse-kl": math.log(t),
        "forward-kl": 1 - 1 / t,
        "js": math.log(2 * t / (1 + t)),
        "alpha": math.log(t) if alpha == 1 else (t ** (alpha - 1) - 1) / (alpha - 1),
    }[divergence]


def by_hand(
    s: Sequence[float],
    groups: Sequence[Sequence[tuple[int, int]]],
    beta: float,
    smoothing: float = 0.0,
    divergence: str = "reverse-kl",
    alpha: float = 0.5,
) -> float:
    """Mean over groups of the mean over their pairs (w, l), pair by pair."""
    total = 0.0
    for pairs in groups:
        terms = []
        for winner, loser in pairs:
            h = beta * (shaped(s[winner], divergence, alpha) - shaped(s[loser], divergence, alpha))
            terms.append((1 - smoothing) * math.log1p(math.exp(-h)) + smoothing * math.log1p(math.exp(h)))
        total += float(np.mean(terms)) if terms else 0.0
    return total / len(groups)


def test_worked_example() -> None:
    loss, gradient = ours()
    close(loss, 0.6734596180, digits=10)
    close(gradient, [-0.0241253570] * 3 + [0.0241253570] * 2 + [-0.0248750010] * 2 + [0.0248750010] * 4, digits=9)
    close(ours(label_smoothing=0.2)[0], 0.6814596180, digits=10)
    close(ours(divergence="forward-kl")[0], 0.6723510379, digits=10)
    close(ours(divergence="js")[0], 0.6830437965, digits=10)


def test_metrics_are_those_of_the_pairs() -> None:
    _, metrics = dpo.loss(now(POLICY), card())
    expected = {
        "rewards/chosen": 0.1 * (0.3 + 0.1) / 2,
        "rewards/rejected": 0.1 * (-0.4 + 0.0) / 2,
        "rewards/accuracies": 1.0,
        "rewards/margins": 0.1 * (0.7 + 0.1) / 2,
        "logps/chosen": (-1.7 - 0.9) / 2,
        "logps/rejected": (-2.2 - 3.1) / 2,
    }
    assert set(metrics) == set(expected)
    for name, value in expected.items():
        close(metrics[name], value, digits=9)


def test_at_the_reference_the_loss_is_log_two() -> None:
    loss, gradient = ours(logp=REFERENCE)
    same(loss, math.log(2))
    # -+ beta / (2 P) with P = 2 pairs.
    same(gradient, [-0.025] * 3 + [0.025] * 2 + [-0.025] * 2 + [0.025] * 4)
    _, metrics = dpo.loss(now(REFERENCE), card())
    assert float(metrics["rewards/accuracies"]) == 0.0


@pytest.mark.parametrize("divergence", ["reverse-kl", "forward-kl", "js", "alpha"])
@pytest.mark.parametrize("alpha", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_every_divergence_pair_by_pair(divergence: str, alpha: float, smoothing: float) -> None:
    s = [0.3, -0.4, 0.1, 0.0]
    fields: dict[str, Any] = {"divergence": divergence, "alpha": alpha, "label_smoothing": smoothing, "beta": 0.7}
    loss, gradient = ours(**fields)
    pairs = [[(0, 1)], [(2, 3)]]
    same(loss, by_hand(s, pairs, 0.7, smoothing, divergence, alpha))
    width = 1e-6
    for i, start in enumerate((0, 3, 5, 7)):
        up, down = (
            by_hand([v + sign * width * (i == k) for k, v in enumerate(s)], pairs, 0.7, smoothing, divergence, alpha)
            for sign in (1, -1)
        )
        same(gradient[start : start + LENGTHS[i]], [(up - down) / (2 * width)] * LENGTHS[i], rtol=1e-6, atol=1e-9)


def test_alpha_one_is_the_reverse_and_alpha_zero_the_forward_kl() -> None:
    assert ours(divergence="alpha", alpha=1.0)[0] == ours()[0]
    same(ours(divergence="alpha", alpha=0.0)[0], ours(divergence="forward-kl")[0])
    same(ours(divergence="alpha", alpha=0.0)[1], ours(divergence="forward-kl")[1])


def test_half_smoothing_sees_no_order() -> None:
    one, other = ours(label_smoothing=0.5), ours(card((0, 1, 0, 1)), label_smoothing=0.5)
    same(one[0], other[0])
    same(one[1], other[1])
    assert abs(ours()[0] - ours(card((0, 1, 0, 1)))[0]) > 0.01


def test_a_constant_added_to_both_answers_changes_nothing() -> None:
    moved = f64(POLICY)
    moved[:3] += 0.5 / 3
    moved[3:5] += 0.5 / 2
    same(ours(logp=moved)[0], ours()[0])
    same(ours(logp=moved)[1], ours()[1])


def test_without_a_reference_it_is_the_log_probs_that_count() -> None:
    same(ours(reference_free=True)[0], by_hand([-1.7, -2.2, -0.9, -3.1], [[(0, 1)], [(2, 3)]], 0.1))
    assert "logp/ref" not in DPO(reference_free=True).needs
    assert not override(dpo, {"objective.reference_free": True}).models_in_use


def test_a_list_is_all_its_pairs() -> None:
    """Labels .2 < .5 = .5 < .9 make five pairs; the group of one and the tie add nothing."""
    rollout = card((0.5, 0.2, 0.9, 0.5), (0, 0, 0, 0))
    assert set(zip(Pairs.of(rollout).winner.tolist(), Pairs.of(rollout).loser.tolist(), strict=True)) == {
        (0, 1),
        (2, 0),
        (2, 1),
        (2, 3),
        (3, 1),
    }
    same(ours(rollout)[0], by_hand([0.3, -0.4, 0.1, 0.0], [[(0, 1), (2, 0), (2, 1), (2, 3), (3, 1)]], 0.1))


def test_groups_count_alike_whatever_their_pairs() -> None:
    rollout = card((1, 0, 0.5, 7), (0, 0, 0, 1))
    same(ours(rollout)[0], by_hand([0.3, -0.4, 0.1, 0.0], [[(0, 1), (0, 2), (2, 1)], []], 0.1))


def test_an_answer_that_does_not_train_is_no_rival() -> None:
    rollout = card((1, 0, 0.5, 0), (0, 0, 0, 1))
    mask = torch.ones(11, dtype=torch.bool)
    mask[3:5] = False
    same(ours(rollout.with_columns(step={"mask": mask}))[0], by_hand([0.3, 0, 0.1, 0], [[(0, 2)], []], 0.1))
    unlabelled = rollout.with_columns(trajectory={"label": f64([1, torch.nan, 0.5, 0])})
    same(ours(unlabelled)[0], by_hand([0.3, 0, 0.1, 0], [[(0, 2)], []], 0.1))


def test_large_gaps_stay_finite() -> None:
    far = f64(POLICY).clone()
    far[:3] -= 1e4
    for divergence in ("reverse-kl", "js"):
        loss, gradient = ours(logp=far, divergence=divergence)
        assert math.isfinite(loss) and bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("field", ["beta", "label_smoothing"])
def test_values_out_of_range(field: str) -> None:
    with pytest.raises(UsageError, match=field):
        override(dpo, {f"objective.{field}": -0.1})


# --- the optimum that the loss is derived from ----------------------------------------------------------------------


def population_loss(logits: Tensor, reference: Tensor, reward: Tensor, law: Tensor, beta: float) -> Tensor:
    """Expected loss over all pairs of a law with Bradley-Terry labels, through the method."""
    count = len(logits)
    first, second = torch.meshgrid(torch.arange(count), torch.arange(count), indexing="ij")
    members = torch.stack([first.flatten(), second.flatten()], dim=1).flatten()
    groups = torch.arange(count * count).repeat_interleave(2)
    terms = []
    # Every ordered pair once with the first and once with the second as the winner.
    for label in ([1.0, 0.0], [0.0, 1.0]):
        rollout = Rollout.from_arrays(
            torch.arange(len(members)),
            groups,
            step={"logp/ref": reference.log()[members]},
            trajectories={"label": f64(label * (count * count))},
        )
        evaluation = now(logits)
        evaluation.columns["logp"] = logits.log_softmax(-1)[members]  # type: ignore[index]
        terms.append(DPO(beta=beta)(evaluation, rollout).value)
    chance = torch.sigmoid(reward[first] - reward[second]).flatten()
    weight = (law[first] * law[second]).flatten()
    return (weight * (chance * terms[0] + (1 - chance) * terms[1])).sum()


@pytest.mark.parametrize("seed", range(3))
def test_the_population_loss_is_stationary_at_the_regularised_optimum(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    reference, law = (torch.randn(5, generator=generator, dtype=torch.float64).softmax(-1) for _ in range(2))
    reward, beta = torch.randn(5, generator=generator, dtype=torch.float64), 0.4
    optimum = (reference.log() + reward / beta).requires_grad_()
    (there,) = torch.autograd.grad(population_loss(optimum, reference, reward, law, beta), optimum)
    assert float(there.abs().max()) < 1e-12
    (shifted,) = torch.autograd.grad(population_loss(optimum, reference, reward + 3.0, law, beta), optimum)
    same(shifted, there, atol=1e-12)
    elsewhere = (reference.log() + reward).requires_grad_()
    (away,) = torch.autograd.grad(population_loss(elsewhere, reference, reward, law, beta), elsewhere)
    assert float(away.abs().max()) > 1e-3


def test_the_tabular_optimum_of_the_card() -> None:
    reference, reward, beta = f64([0.5, 0.3, 0.2]), f64([0, 1, -0.5]), 0.5
    logits = reference.log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], lr=1, max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-16)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = population_loss(logits, reference, reward, f64([1 / 3] * 3), beta)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    close(logits.detach().softmax(-1), [0.17919267, 0.79443881, 0.02636852], digits=6)


def test_what_it_declares() -> None:
    assert dpo.unit == "group"
    assert dpo.offline
    assert dpo.needs == {"logp/ref"} and "label" in dpo.rollout.gives
    assert dpo.rollout.form == "pairs" and dpo.rollout.end

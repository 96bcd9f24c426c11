"""The card of RPO: worked example, what it adds to DPO, its two normalisations, TRL's DPO plus its NLL."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.trl_loss import pair_loss
from polopt.core.errors import UsageError
from polopt.core.override import override
from polopt.core.rollout import Rollout
from polopt.methods.preference.dpo import DPO, dpo
from polopt.methods.preference.rpo import RegularisedDPO, rpo
from tests.support import close, f64, now, same, value_and_gradient

LENGTHS = [2, 3, 1, 1]
IDS = [0, 0, 1, 1, 1, 2, 3]
POLICY = [-0.5, -1.0, -0.2, -0.7, -0.4, -0.9, -1.1]
REFERENCE = [-0.6, -0.9, -0.3, -0.6, -0.8, -0.7, -1.0]


def card(labels: Any = (1, 0, 1, 0), groups: Any = (0, 0, 1, 1), reference: Any = REFERENCE) -> Rollout:
    """The worked example's two pairs."""
    return Rollout.from_arrays(IDS, groups, step={"logp/ref": f64(reference)}, trajectories={"label": f64(labels)})


def ours(rollout: Rollout | None = None, logp: Any = POLICY, **fields: Any) -> tuple[float, Tensor]:
    method = rpo | {"objective": RegularisedDPO(**{"beta": 0.1, "eta": 0.2, **fields})}
    return value_and_gradient(method, now(logp), card() if rollout is None else rollout)


def plain(rollout: Rollout | None = None, logp: Any = POLICY, beta: float = 0.1) -> tuple[float, Tensor]:
    return value_and_gradient(dpo | {"objective": DPO(beta=beta)}, now(logp), card() if rollout is None else rollout)


def test_worked_example() -> None:
    same(plain()[0], 0.7057534238679481)
    loss, gradient = ours()
    same(loss, 0.7297534238679483)
    close(gradient, [-0.03549993] * 2 + [0.02549993] * 3 + [-0.035125, 0.025125], digits=8)
    loss, gradient = ours(normalise="mean")
    same(loss, 0.8707534238679482)
    close(gradient, [-0.07549993] * 2 + [0.02549993] * 3 + [-0.125125, 0.025125], digits=8)


@pytest.mark.parametrize("normalise", ["sum", "mean"])
def test_without_the_second_term_it_is_dpo(normalise: str) -> None:
    loss, gradient = ours(eta=0.0, normalise=normalise)
    assert loss == plain()[0]
    assert torch.equal(gradient, plain()[1])


@pytest.mark.parametrize("seed", range(3))
def test_what_is_added_depends_on_the_winners_alone(seed: int) -> None:
    """eta beta mean(-log pi(y_w)), whatever the losers and the reference."""
    rng = np.random.default_rng(seed)
    logp, reference = -rng.random(7) - 0.1, -rng.random(7) - 0.1
    beta, eta = 0.3, 0.7
    added = {
        "sum": eta * beta * -(logp[:2].sum() + logp[5]) / 2,
        "mean": eta * -(logp[:2].mean() + logp[5]) / 2,
    }
    rollout = card(reference=reference)
    for normalise, expected in added.items():
        loss, gradient = ours(rollout, logp, beta=beta, eta=eta, normalise=normalise)
        without = plain(rollout, logp, beta)
        same(loss - without[0], expected)
        same((gradient - without[1])[[2, 3, 4, 6]], [0.0] * 4)


def test_a_settled_margin_leaves_the_pull_on_the_winner() -> None:
    far = f64(POLICY)
    far[2:5] -= 1e4
    far[6] -= 1e4
    assert float(plain(logp=far)[1].abs().max()) == 0.0
    same(ours(logp=far)[1], [-0.2 * 0.1 / 2] * 2 + [0.0] * 3 + [-0.2 * 0.1 / 2, 0.0])


def test_likelihood_of_both_sides_matters() -> None:
    """A constant on both log pi of each pair: nothing to DPO, -eta beta constant to RPO."""
    constant = 0.6
    moved = f64(POLICY) + constant * f64([1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 3, 1, 1])
    same(plain(logp=moved)[0], plain()[0])
    same(ours(logp=moved)[0] - ours()[0], -0.2 * 0.1 * constant)


@pytest.mark.parametrize("pair", [(0, 1), (2, 3)])
def test_the_sum_is_the_mean_with_another_eta(pair: tuple[int, int]) -> None:
    one = card().select(torch.tensor(pair))
    logp = torch.cat([f64(POLICY).split(LENGTHS)[i] for i in pair])
    summed = ours(one, logp, eta=0.2)
    mean = ours(one, logp, eta=0.2 * 0.1 * LENGTHS[pair[0]], normalise="mean")
    same(summed[0], mean[0])
    same(summed[1], mean[1])


def by_hand(groups: list[list[tuple[int, int]]], beta: float, eta: float, logp: Any = POLICY) -> float:
    parts, ref = (f64(values).split(LENGTHS) for values in (logp, REFERENCE))
    total = 0.0
    for pairs in groups:
        terms = []
        for w, lo in pairs:
            h = float((parts[w] - ref[w]).sum() - (parts[lo] - ref[lo]).sum())
            terms.append(math.log1p(math.exp(-beta * h)) - eta * beta * float(parts[w].sum()))
        total += float(np.mean(terms)) if terms else 0.0
    return total / len(groups)


def test_lists_unequal_groups_and_what_cannot_be_compared() -> None:
    every = [(0, 1), (2, 1), (2, 0), (2, 3), (0, 3)]
    same(ours(card((0.5, 0, 1, 0), (0, 0, 0, 0)))[0], by_hand([every], 0.1, 0.2))
    # A group of one and a tie have no pair: nothing is imitated there.
    loss, gradient = ours(card((1, 0, 1, 1), (0, 0, 1, 2)))
    same(loss, by_hand([[(0, 1)], [], []], 0.1, 0.2))
    assert bool((gradient[5:] == 0).all())
    assert ours(card((1, 1, 0, 0)))[0] == 0.0
    # Nor of a winner that has no label or no trainable step.
    loss, gradient = ours(card((torch.nan, 0, 1, 0)))
    same(loss, by_hand([[], [(2, 3)]], 0.1, 0.2))
    assert bool((gradient[:5] == 0).all())
    mask = torch.tensor([True] * 5 + [False, True])
    same(ours(card().with_columns(step={"mask": mask}))[0], by_hand([[(0, 1)], []], 0.1, 0.2))


def test_masked_steps_count_in_neither_normalisation() -> None:
    masked = card().with_columns(step={"mask": torch.tensor([True, False] + [True] * 5)})
    extra = -0.2 * (-0.5 - 0.9) / 2
    changed = f64(POLICY)
    changed[1] = REFERENCE[1]
    same(ours(masked, normalise="mean")[0], plain(logp=changed)[0] + extra)
    same(ours(masked)[0], plain(logp=changed)[0] + 0.1 * extra)


def test_metrics_say_what_is_imitated() -> None:
    for normalise, expected in (("sum", (1.5 + 0.9) / 2), ("mean", (0.75 + 0.9) / 2)):
        _, metrics = override(rpo, {"objective.normalise": normalise}).loss(now(POLICY), card())
        close(metrics["nll"], expected, digits=9)
        close(metrics["rewards/accuracies"], 0.0, digits=9)


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(UsageError, match="eta"):
        override(rpo, {"objective.eta": -0.1})


def test_the_mean_is_trls_dpo_with_its_nll() -> None:
    """TRL averages over the tokens of all winners: the same where they are equally long."""
    trainer = pytest.importorskip("trl.trainer.dpo_trainer", reason="the parity tests compare with TRL").DPOTrainer
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(5)[None] < torch.tensor([3, 3, 5, 1])[:, None]  # two winners, then their losers
    logp, reference = -torch.rand(2, 4, 5, generator=generator, dtype=torch.float64)
    logp.requires_grad_()
    terms = {"loss_types": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]}
    expected = pair_loss(trainer, logp, reference, mask.long(), beta=0.4, **terms)
    (slopes,) = torch.autograd.grad(expected, logp)
    rollout = Rollout.from_padded(
        mask, [0, 1, 0, 1], step={"logp/ref": reference}, trajectories={"label": f64([1, 1, 0, 0])}
    )
    loss, gradient = ours(rollout, logp.detach()[mask], beta=0.4, eta=0.3, normalise="mean")
    same(loss, expected.detach())
    same(gradient, slopes[mask])

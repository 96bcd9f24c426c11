"""The card of INPO: worked loss and step, the population loss, anchors, the fixed point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from polopt.claims.exact import start
from polopt.core.errors import UsageError
from polopt.core.method import Schedule
from polopt.core.override import override
from polopt.core.rollout import Rollout
from polopt.filters.preferences import RandomPair
from polopt.methods.preference.inpo import INPO, inpo
from polopt.methods.preference.ipo import ipo
from polopt.policies.exact.game import PreferenceGame
from polopt.rewards.judges import MatrixJudge
from polopt.tasks.problems import problem
from tests.support import close, f64, now, same, value_and_gradient

Floats = NDArray[np.float64]
IDS = [0, 0, 1, 1, 1, 2, 3]
POLICY = [-0.5, -1.0, -0.2, -0.7, -0.4, -0.9, -1.1]
REF = [-0.6, -0.9, -0.3, -0.6, -0.8, -0.7, -1.0]
ANCHOR = [-0.5, -0.8, -0.3, -0.7, -0.6, -0.9, -1.2]
TABLE = np.array([[0.5, 0.9, 0.2], [0.1, 0.5, 0.8], [0.8, 0.2, 0.5]])
START, REFERENCE = np.array([0.6, 0.3, 0.1]), np.array([0.5, 0.3, 0.2])
ETA, TAU = 0.5, 0.1


def card(labels: Sequence[float] = (1, 0, 1, 0), **more: Any) -> Rollout:
    step = {"logp/ref": f64(REF), "logp/anchor": f64(ANCHOR), **more}
    return Rollout.from_arrays(IDS, [0, 0, 1, 1], step=step, trajectories={"label": f64(list(labels))})


def ours(rollout: Rollout | None = None, **fields: Any) -> tuple[float, Tensor]:
    made = inpo | {"objective": INPO(**{"beta": ETA, **fields})}
    return value_and_gradient(made, now(POLICY), card() if rollout is None else rollout)


def mirror(
    p: Floats, table: Floats = TABLE, reference: Floats = REFERENCE, eta: float = ETA, tau: float = TAU
) -> Floats:
    made = np.exp(table @ p / eta) * reference ** (tau / eta) * p ** (1 - tau / eta)
    return np.asarray(made / made.sum())


def population(logits: Tensor, p: Floats, reference: Floats = REFERENCE, table: Floats = TABLE) -> Tensor:
    """Expected loss over pi_t x pi_t with drawn labels, each pair of answers through the method."""
    objective, size = INPO(beta=ETA, ratio=TAU / ETA), len(p)
    first, second = (index.flatten() for index in torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij"))
    members = torch.stack([first, second], 1).flatten()
    groups = torch.arange(size * size).repeat_interleave(2)
    terms = []
    for label in ([1.0, 0.0], [0.0, 1.0]):
        rollout = Rollout.from_arrays(
            torch.arange(len(members)),
            groups,
            step={"logp/ref": f64(np.log(reference))[members], "logp/anchor": f64(np.log(p))[members]},
            trajectories={"label": f64(label * (size * size))},
        )
        evaluation = now([0.0] * len(members))
        evaluation.columns["logp"] = logits.log_softmax(-1)[members]  # type: ignore[index]
        terms.append(objective(evaluation, rollout).value)
    chance = f64(table)[first, second]
    return (f64(p)[first] * f64(p)[second] * (chance * terms[0] + (1 - chance) * terms[1])).sum()


def test_worked_loss() -> None:
    value, gradient = ours()
    close(value, 1.6805555556, digits=10)
    close(gradient, [-1.46666667] * 2 + [1.46666667] * 3 + [-1.1, 1.1], digits=8)


def test_worked_step() -> None:
    step = mirror(START)
    close(step, [0.67423784, 0.19188573, 0.13387643], digits=8)
    logits = f64(np.log(step)).requires_grad_()
    value = population(logits, START)
    close(value.detach(), 0.8488, digits=4)
    (gradient,) = torch.autograd.grad(value, logits)
    same(gradient, [0, 0, 0], atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_the_mirror_step_is_the_only_minimum(seed: int) -> None:
    rng = np.random.default_rng(seed)
    margin = rng.uniform(-0.5, 0.5, (4, 4))
    table = 0.5 + (margin - margin.T) / 2
    p, reference = rng.dirichlet(np.ones(4)), rng.dirichlet(np.ones(4))
    step = np.log(mirror(p, table, reference))
    least = f64(step).requires_grad_()
    value = population(least, p, reference, table)
    (gradient,) = torch.autograd.grad(value, least)
    same(gradient, np.zeros(4), atol=1e-11)
    for _ in range(5):
        away = f64(step + 0.1 * rng.normal(size=4)).requires_grad_()
        worse = population(away, p, reference, table)
        assert float(worse.detach()) > float(value.detach())
        assert float(torch.autograd.grad(worse, away)[0].abs().max()) > 1e-4


def test_ratio_one_is_ipo_on_fresh_pairs() -> None:
    value, gradient = ours(ratio=1.0)
    plain = override(ipo, {"objective.per_step": False, "objective.beta": ETA})
    expected = value_and_gradient(plain, now(POLICY), card())
    same(value, expected[0])
    same(gradient, expected[1])
    assert abs(ours()[0] - value) > 0.01


def test_ratio_zero_does_not_see_the_reference() -> None:
    elsewhere = card(**{"logp/ref": f64(REF) * 2})
    assert ours(ratio=0.0)[0] == ours(elsewhere, ratio=0.0)[0]
    assert abs(ours()[0] - ours(elsewhere)[0]) > 0.01


def test_equal_anchors_make_the_ratio_indifferent() -> None:
    rollout = card(**{"logp/anchor": f64(REF)})
    for ratio in (0.0, 0.4, 1.0):
        same(ours(rollout, ratio=ratio)[0], ours(rollout)[0])


def test_the_fixed_point_is_the_nash_policy() -> None:
    game = PreferenceGame(f64(TABLE)[None])
    star = np.asarray(game.regularised_nash(f64(REFERENCE)[None], TAU)[0])
    close(star, [0.40088885, 0.21182226, 0.38728889], digits=8)
    same(mirror(star), star, rtol=1e-9)
    p = START
    for _ in range(300):
        p = mirror(p)
    same(p, star, rtol=1e-8)
    assert float(game.regularised_gap(f64(p)[None], f64(REFERENCE)[None], TAU)) < 1e-9


def test_with_a_bradley_terry_preference_it_is_not_the_optimum_of_its_reward() -> None:
    reward = np.array([0.0, 1.0, -0.5])
    table = 1 / (1 + np.exp(reward[None] - reward[:, None]))
    p = START
    for _ in range(300):
        p = mirror(p, table)
    own = REFERENCE * np.exp(table @ p / TAU)
    same(p, own / own.sum(), rtol=1e-8)
    optimum = REFERENCE * np.exp(reward / TAU)
    assert float(np.abs(p - optimum / optimum.sum()).max()) > 0.05


def test_what_does_not_train_is_in_no_pair() -> None:
    mask = torch.ones(7, dtype=torch.bool)
    mask[[0, 6]] = False
    value, gradient = ours(card(mask=mask))
    third, most = 1 / 3, 2 / 3
    first = (-1.0 + third * 0.9 + most * 0.8) - (-1.3 + third * 1.7 + most * 1.6)
    # The second pair has lost its loser: its group counts with 0.
    same(value, (first - 1) ** 2 / 2)
    same(gradient, [0, first - 1, *[1 - first] * 3, 0, 0])


def test_equal_labels_and_invalid_ones_teach_nothing() -> None:
    value, gradient = ours(card((1, 1, 1, torch.nan)))
    assert value == 0.0 and not bool(gradient.any())


def test_the_anchor_is_the_policy_that_sampled() -> None:
    """Through the trainer: in every iteration both pairs' anchors are the sampler's own log-probs, ref is the start."""
    made = problem("intransitive-preferences", batch=4, seed=0)
    method = inpo | {
        "reward": MatrixJudge(),
        "filter": RandomPair(column="beats"),
        "objective": INPO(beta=ETA, ratio=0.2),
        "schedule": Schedule(minibatches=2),
    }
    run = start(made, method, seed=0, group=4)
    seen: list[Rollout] = []
    collect: Any = run.trainer.collect

    def watched(*arguments: Any) -> Any:
        batch = collect(*arguments)
        seen.append(batch.kept)
        return batch

    run.trainer.collect = watched  # type: ignore[assignment]
    for _ in range(3):
        run.step()
    for rollout in seen:
        same(rollout["logp/anchor"], rollout.logp)
        assert rollout.group.bincount().tolist() == [2] * 4
    same(seen[0]["logp/ref"], seen[0].logp)
    assert float((seen[2]["logp/ref"] - seen[2].logp).abs().max()) > 1e-3


def test_values_out_of_range() -> None:
    for fields in ({"ratio": 1.1}, {"ratio": -0.1}, {"beta": 0.0}):
        with pytest.raises(UsageError, match="inpo"):
            INPO(**fields)

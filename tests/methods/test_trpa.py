"""The card of TRPA: worked example, levels, what the order of levels decides, the penalty of the rollout policy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from polopt.core.rollout import Rollout
from polopt.methods.preference.trpa import PreferenceApproximation, PreferenceLevels, RolloutKL, trpa
from polopt.objectives.preference import Pairs
from tests.support import close, f64, now, same, value_and_gradient

LENGTHS = [3, 2, 2, 4]
POLICY = [-0.5, -1.0, -0.2, -0.8, -1.4, -0.3, -0.6, -1.1, -0.4, -0.9, -0.7]
REFERENCE = [-0.7, -0.9, -0.4, -0.6, -1.2, -0.5, -0.5, -1.0, -0.5, -1.0, -0.6]
OLD = [-0.6, -0.9, -0.3, -0.7, -1.3, -0.3, -0.7, -1.0, -0.5, -0.9, -0.6]
GROUPS, LEVELS = [0, 0, 0, 1], [1, 2, 4, 1]


def card(
    levels: Sequence[float] = LEVELS, groups: Sequence[int] = GROUPS, old: Sequence[float] = OLD, **step: Any
) -> Rollout:
    ids = [i for i, length in enumerate(LENGTHS) for _ in range(length)]
    return Rollout.from_arrays(
        ids,
        list(groups),
        step={"logp/ref": f64(REFERENCE), "logp": f64(old), **step},
        trajectories={"label": 1 - f64(levels)},
    )


def of(
    rollout: Rollout, logp: Sequence[float] | Tensor = POLICY, coefficient: float = 0.0, **fields: Any
) -> tuple[float, Tensor]:
    made = trpa | {
        "objective": PreferenceApproximation(**fields),
        "regularizer": RolloutKL(coefficient),
    }
    return value_and_gradient(made, now(logp), rollout)


def by_hand(
    means: Sequence[float], levels: Sequence[float], groups: Sequence[int], beta: float = 0.1, kappa: float = 2.5
) -> float:
    """Pair by pair, then the fallback, from the mean log-ratios."""
    terms = []
    for i, j in itertools.permutations(range(len(means)), 2):
        if groups[i] == groups[j] and levels[i] < levels[j]:
            h = (kappa if levels[i] == 1 else 1.0) * beta * (means[i] - means[j])
            terms.append(math.log1p(math.exp(-h)))
    if not terms:
        terms = [
            math.log1p(math.exp(-s if level == 1 else s))
            for s, level in zip(means, levels, strict=True)
            if not math.isnan(level)
        ]
    return float(np.mean(terms))


MEANS = [0.1, -0.2, 0.05, 0.0]


def test_worked_example() -> None:
    rollout = card()
    pairs = Pairs.of(rollout)
    assert set(zip(pairs.winner.tolist(), pairs.loser.tolist(), strict=True)) == {(0, 1), (0, 2), (1, 2)}
    close(of(rollout)[0], 0.6829973853, digits=10)
    close(of(rollout, coefficient=1.0)[0] - of(rollout)[0], 0.0041094784, digits=10)
    total, gradient = of(rollout, coefficient=0.5)
    close(total, 0.6850521246, digits=10)
    close(
        gradient[:6],
        [-0.02284481, -0.03195088, -0.02284481, 0.00683446, 0.00683446, 0.02914062],
        digits=8,
    )
    same(of(rollout)[0], by_hand(MEANS, LEVELS, GROUPS))


def test_at_the_rollout_policy_the_penalty_and_its_gradient_are_zero() -> None:
    rollout = card(old=POLICY)
    for unbiased in (False, True):
        value, gradient = value_and_gradient(
            trpa | {"objective": RolloutKL(1.0, unbiased), "regularizer": None}, now(POLICY), rollout
        )
        assert value == 0 and not gradient.any()


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("root", [False, True])
def test_the_penalty_is_what_a_loop_says(unbiased: bool, root: bool) -> None:
    """k3 of every trainable step, at most 10 and then without gradient."""
    logp = list(POLICY)
    logp[2] = OLD[2] - 4.0 * (-1 if unbiased else 1)
    mask = torch.ones(11, dtype=torch.bool)
    mask[7:9] = False
    terms = []
    for new, old, kept in zip(logp, OLD, mask.tolist(), strict=True):
        d = (new - old) if unbiased else (old - new)
        terms += [min(math.exp(d) - d - 1, 10.0)] if kept else []
    mean = sum(terms) / 9
    value, gradient = value_and_gradient(
        trpa | {"objective": RolloutKL(0.3, unbiased, root), "regularizer": None}, now(logp), card(mask=mask)
    )
    same(value, 0.3 * (math.sqrt(mean + 0.25) if root else mean))
    assert gradient[2] == 0 and (gradient[~mask] == 0).all()
    slope = 0.3 * (1 / (2 * math.sqrt(mean + 0.25)) if root else 1.0) / 9
    d = OLD[0] - logp[0]
    same(gradient[0], slope * ((math.exp(-d) - 1) if unbiased else (1 - math.exp(d))))


def test_at_the_reference_every_pair_is_log_two() -> None:
    same(of(card(), REFERENCE)[0], math.log(2))


def test_two_answers_are_dpo_on_mean_log_ratios() -> None:
    rollout = card([1, 2, 1, 2], [0, 0, 1, 1])
    loss, gradient = of(rollout, kappa=1.0)
    h = [0.1 * (MEANS[0] - MEANS[1]), 0.1 * (MEANS[2] - MEANS[3])]
    same(loss, np.mean([math.log1p(math.exp(-x)) for x in h]))
    slopes = [0.1 / (1 + math.exp(x)) / 2 for x in h]
    expected = [-slopes[0] / 3] * 3 + [slopes[0] / 2] * 2 + [-slopes[1] / 2] * 2 + [slopes[1] / 4] * 4
    same(gradient, expected)


def test_only_the_order_of_levels_matters_and_the_top() -> None:
    three = [1, 2, 4, 1]
    assert of(card(three))[0] == of(card([1, 2, 3, 1]))[0]
    # Without the top level the first pair loses its emphasis.
    below = of(card([2, 3, 4, 2]))[0]
    same(below, by_hand(MEANS, [2, 3, 4, 2], GROUPS))
    assert abs(below - of(card(three))[0]) > 1e-3


def test_one_level_and_a_single_answer_contribute_nothing() -> None:
    loss, gradient = of(card([1, 2, 3, 3], [0, 0, 1, 1]))
    same(loss, by_hand(MEANS[:2], [1, 2], [0, 0]))
    assert not gradient[5:].any()
    same(of(card([1, 2, 4, 1], [0, 0, 0, 1]))[0], of(card([1, 2, 4, 3], [0, 0, 0, 1]))[0])


def test_a_constant_added_to_a_group_changes_nothing() -> None:
    moved = f64(POLICY)
    moved[:7] += 0.7
    same(of(card(), moved)[0], of(card())[0])
    same(of(card(), moved)[1], of(card())[1])


def test_the_number_of_pairs() -> None:
    levels, groups = [1, 1, 2, 3, 3, 3, 2, 2, 1], [0, 0, 0, 0, 0, 0, 1, 1, 1]
    rollout = Rollout.from_arrays(range(9), groups, trajectories={"label": 1 - f64(levels)})
    counted = 0
    for group in range(2):
        n = [sum(1 for v, g in zip(levels, groups, strict=True) if g == group and v == level) for level in (1, 2, 3)]
        counted += n[0] * n[1] + n[0] * n[2] + n[1] * n[2]
    assert len(Pairs.of(rollout).winner) == counted == 13


def test_all_pairs_of_the_batch_count_alike() -> None:
    """Three pairs of one group and one of another: a plain mean of the four."""
    means = [0.1, -0.2, 0.05, 0.0]
    rollout = card([1, 2, 2, 2], [0, 0, 0, 0])
    same(of(rollout)[0], by_hand(means, [1, 2, 2, 2], [0] * 4))
    _, metrics = trpa.loss(now(POLICY), card())
    close(metrics["rewards/accuracies"], 2 / 3)
    close(metrics["rewards/margins"], 0.1 * (0.3 + 0.05 - 0.25) / 3)


@pytest.mark.parametrize("levels", [[1, 1, 1, 1], [2, 2, 2, 3], [2, math.nan, 2, 1]])
def test_without_any_pair_answers_are_labelled_one_by_one(levels: list[float]) -> None:
    rollout = card(levels)
    loss, gradient = of(rollout)
    kept = [(s, level) for s, level in zip(MEANS, levels, strict=True) if not math.isnan(level)]
    same(loss, by_hand([s for s, _ in kept], [level for _, level in kept], range(len(kept))))
    sign = [1.0 if level == 1 else -1.0 for level in levels]
    same(gradient[0], -sign[0] / (1 + math.exp(sign[0] * MEANS[0])) / 3 / len(kept))


def test_invalid_and_masked_answers_are_no_rivals() -> None:
    mask = torch.ones(11, dtype=torch.bool)
    mask[5:7] = False
    loss, gradient = of(card(mask=mask))
    same(loss, by_hand(MEANS[:2], [1, 2], [0, 0]))
    loss, gradient = of(card([1, math.nan, 4, 1]))
    same(loss, by_hand([MEANS[0], MEANS[2]], [1, 4], [0, 0]))
    assert not gradient[3:5].any()
    nothing, gradient = of(card([math.nan] * 4))
    assert nothing == 0 and not gradient.any()


def test_the_gradient_of_a_pair_is_bounded() -> None:
    far = f64(POLICY).clone()
    far[:3] -= 1e3
    _, gradient = of(card([1, 2, 1, 1], [0, 0, 1, 2]), far)
    same(gradient[:3], [-2.5 * 0.1 / 3] * 3)


# --- levels -----------------------------------------------------------------------------------------------------------


def levelled(part: PreferenceLevels, rewards: Mapping[str, Sequence[float]]) -> list[float]:
    count = len(next(iter(rewards.values())))
    columns = {f"reward/{name}": f64(values) for name, values in rewards.items()}
    rollout = Rollout.from_arrays(range(count), [0] * count, trajectories=columns)
    return (1 - part(rollout)["label"]).tolist()


def test_levels_of_the_puzzles() -> None:
    """1 format and answers right; 2 wrong; 3 no answer to read; 4 bad format, whatever else."""
    gates = PreferenceLevels(("format", "answered", "correct"))
    rewards = {"correct": [1, 0, 0, 1, 1.0], "answered": [1, 1, 0, 1, 0.0], "format": [1, 1, 1, 0, 1.0]}
    assert levelled(gates, rewards) == [1, 2, 3, 4, 3]
    assert levelled(PreferenceLevels(), rewards) == [1, 2, 2, 3, 1]
    assert levelled(PreferenceLevels(("correct",)), rewards) == [1, 2, 2, 1, 1]
    assert levelled(PreferenceLevels(), {"correct": rewards["correct"]}) == [1, 2, 2, 1, 1]
    # Rewards of other names: the first is the last gate.
    assert levelled(PreferenceLevels(), {"first": [1, 0, 0.5, 1], "second": [1, 1, 1, 0.2]}) == [1, 2, 2, 3]


def test_an_invalid_reward_has_no_level() -> None:
    found = levelled(PreferenceLevels(), {"format": [1.0, math.nan, 0.0], "correct": [1.0, 1.0, math.nan]})
    assert found[0] == 1 and all(math.isnan(v) for v in found[1:])


def test_what_it_declares() -> None:
    assert trpa.unit == "batch" and trpa.task == "worksheet" and not trpa.offline
    assert "reward/*" in trpa.needs and "label" not in trpa.needs
    assert PreferenceLevels(("format", "correct")).needs == {"reward/format", "reward/correct"}
    assert trpa.objective == PreferenceApproximation(0.1, 2.5) and trpa.regularizer.coefficient == 0.001

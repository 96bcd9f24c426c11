"""The card of BNPO: the fit, the density, its special cases and its optimality, several rewards, worked example."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from polopt.aggregations import SequenceSum
from polopt.core.rollout import Rollout
from polopt.methods.base.grpo import grpo
from polopt.methods.credit.bnpo import BetaNormalized, bnpo, optimal_density
from tests.support import close, f64, same

NAN = math.nan
FOURS = [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
RIGHT = [1, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1]


def made(reward: Sequence[float], groups: Sequence[int] = FOURS, **named: Sequence[float]) -> Rollout:
    columns = {"reward": f64(reward), **{f"reward/{name}": f64(values) for name, values in named.items()}}
    return Rollout.from_arrays(range(len(reward)), groups, trajectories=columns)


def looped(reward: np.ndarray, groups: Sequence[int], cap: float = 1e6) -> np.ndarray:
    """The card's steps with SciPy's density; NaN rewards are in no rate."""
    rates = {g: np.nanmean(reward[np.array(groups) == g]) for g in sorted(set(groups))}
    values = np.array(list(rates.values()))
    mean, variance = values.mean(), values.var(ddof=1)
    concentration = mean * (1 - mean) / variance - 1
    alpha, beta = max(1, 1 + concentration * mean / 3), max(1, 1 + concentration * (1 - mean) / 3)
    out = np.zeros(len(reward))
    for i, group in enumerate(groups):
        density = stats.beta.pdf(rates[group], alpha, beta)
        weight = cap if density == 0 else min(1 / density, cap)
        out[i] = 0.0 if np.isnan(reward[i]) else weight * (reward[i] - rates[group])
    return out


def test_worked_example() -> None:
    close(optimal_density(f64([0.25, 0.5, 0.75, 1.0])), [1.260417, 1.15625])
    low = [0.754575] + [-0.251525] * 3
    even = [0.447437] * 2 + [-0.447437] * 2
    high = [0.224327] * 3 + [-0.672980]
    close(BetaNormalized()(made(RIGHT)), [*low, *even, *high, 0, 0, 0, 0])
    centred = made(RIGHT).group_center(f64(RIGHT))
    close((BetaNormalized()(made(RIGHT)) / centred)[[0, 4, 8]], [1.006100, 0.894874, 0.897307])


def test_random_rewards_against_a_loop() -> None:
    generator = np.random.default_rng(0)
    groups = [1, 0, 0, 2, 1, 2, 1, 0, 1, 2, 0, 3, 3]
    for index in range(20):
        reward = generator.random(13)
        if index % 2:
            reward = (reward < 0.4).astype(float)
            reward[:3] = 1, 1, 0
        reward[generator.integers(4, 11)] = NAN
        same(BetaNormalized()(made(reward.tolist(), groups)), looped(reward, groups))


def test_a_flat_density_leaves_the_centred_reward() -> None:
    same(BetaNormalized(alpha=1.0, beta=1.0)(made(RIGHT)), made(RIGHT).group_center(f64(RIGHT)))


def test_a_density_of_three_halves_is_grpo_up_to_a_factor() -> None:
    rollout = made(RIGHT)
    expected = math.pi / 8 * rollout.group_zscore(rollout.reward, eps=0.0, unbiased=False)
    same(BetaNormalized(alpha=1.5, beta=1.5)(rollout), expected)


def test_exact_moments_give_the_parameters() -> None:
    # Two rates with mean 1/3 and sample variance 1/45: those of Beta(3, 6).
    half = math.sqrt(1 / 90)
    close(optimal_density(f64([1 / 3 - half, 1 / 3 + half])), [2, 3], digits=9)


def moment(alpha: float, beta: float, a: float, b: float) -> float:
    """E[p (1 - p) / f(p)^2] for p ~ Beta(a, b), by quadrature."""
    return float(
        integrate.quad(lambda p: p * (1 - p) * stats.beta.pdf(p, a, b) / stats.beta.pdf(p, alpha, beta) ** 2, 0, 1)[0]
    )


@pytest.mark.parametrize(("a", "b"), [(3, 6), (4, 4), (2.2, 7.5)])
def test_the_parameters_have_the_smallest_second_moment(a: float, b: float) -> None:
    best = moment(1 + a / 3, 1 + b / 3, a, b)
    if (a, b) == (3, 6):
        close([best, moment(1.5, 1.5, a, b), moment(1, 1, a, b)], [0.097222, 0.154213, 0.2])
    for da, db in itertools.product((-0.15, 0, 0.15), repeat=2):
        assert moment(1 + a / 3 + da, 1 + b / 3 + db, a, b) >= best
    mean, variance = a / (a + b), a * b / ((a + b) ** 2 * (a + b + 1))
    half = math.sqrt(variance / 2)
    close(optimal_density(f64([mean - half, mean + half])), [1 + a / 3, 1 + b / 3], digits=9)


@pytest.mark.parametrize("rates", [[0.3], [0.3, 0.3, 0.3], [0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.0, 1.0, 0.0, 1.0]])
def test_without_a_density_to_fit_it_is_flat(rates: list[float]) -> None:
    """One prompt, equal rates, or a variance of at least m (1 - m), which no Beta distribution has."""
    assert optimal_density(f64(rates)) == (1.0, 1.0)


def test_credit_sums_to_zero_in_each_group_and_is_zero_where_all_are_right_or_wrong() -> None:
    reward = [*RIGHT, 0, 0, 0, 0, 1, 0, 1, 0]
    rollout = made(reward, [*FOURS, 4, 4, 4, 4, 5, 5, 5, 5])
    advantage = BetaNormalized()(rollout)
    same(rollout.group_mean(advantage), [0] * 6, atol=1e-12)
    assert (advantage[12:20] == 0).all()
    assert (advantage[[0, 20]] != 0).all()


def test_a_weight_stops_at_its_cap() -> None:
    # Nearly all rates are one half: the density at the outer one is almost 0.
    reward = [0.5 + s for s in (0.1, -0.1)] * 30 + [0.003, 0.001]
    groups = [i // 2 for i in range(62)]
    for cap in (10.0, 1e6):
        advantage = BetaNormalized(cap=cap)(made(reward, groups))
        same(advantage[-2:], [cap * 0.001, -cap * 0.001], rtol=1e-9)
        assert advantage[:-2].abs().max() < 0.1


def test_rewards_of_another_range_are_scaled() -> None:
    wide = [-3 + 5 * value for value in RIGHT]
    same(BetaNormalized(low=-3.0, high=2.0)(made(wide)), BetaNormalized()(made(RIGHT)))
    # The default range is widened to the rewards at hand, and not narrowed.
    same(BetaNormalized()(made(wide)), BetaNormalized()(made(RIGHT)))
    narrow = np.array([0.2 + 0.5 * value for value in RIGHT])
    same(BetaNormalized()(made(narrow.tolist())), looped(narrow, FOURS))


def test_several_rewards_are_fitted_each_by_itself() -> None:
    other = np.random.default_rng(1).random(16).tolist()
    rollout = made([r + o for r, o in zip(RIGHT, other, strict=True)], first=RIGHT, second=other)
    expected = (looped(np.array(RIGHT, float), FOURS) + looped(np.array(other), FOURS)) / 2
    same(BetaNormalized(decompose=True)(rollout), expected)
    weighed = rollout.with_columns(trajectory={"reward_weight/second": torch.full((16,), 0.25, dtype=torch.float64)})
    expected = (looped(np.array(RIGHT, float), FOURS) + looped(np.array(other), FOURS) / 4) / 2
    same(BetaNormalized(decompose=True)(weighed), expected)
    twice = made(RIGHT, first=RIGHT, second=RIGHT, third=RIGHT)
    same(BetaNormalized(decompose=True)(twice), BetaNormalized()(made(RIGHT)))
    assert BetaNormalized(decompose=True).needs == {"reward", "reward/*"} != BetaNormalized().needs


@pytest.mark.parametrize("decompose", [False, True])
def test_an_invalid_total_teaches_nothing_and_moves_nobody(decompose: bool) -> None:
    part = BetaNormalized(decompose=decompose)
    spoilt = [NAN, *RIGHT]
    advantage = part(made(spoilt, [1, *FOURS], first=[0.9, *RIGHT]))
    assert float(advantage[0]) == 0
    same(advantage[1:], part(made(RIGHT, first=RIGHT)))
    assert (part(made([NAN] * 16, first=RIGHT)) == 0).all()


def test_a_group_of_one_teaches_nothing_and_counts_in_the_fit() -> None:
    rollout = made([*RIGHT, 1.0], [*FOURS, 4])
    advantage = BetaNormalized()(rollout)
    assert float(advantage[-1]) == 0
    same(advantage, looped(np.array([*RIGHT, 1.0]), [*FOURS, 4]))
    assert (advantage[:4] - BetaNormalized()(made(RIGHT))[:4]).abs().min() > 1e-3


def test_training_in_single_precision_is_as_good() -> None:
    reward = (np.random.default_rng(2).random(512) < 0.5).astype(float)
    groups = [i // 16 for i in range(512)]
    single = Rollout.from_arrays(range(512), groups, trajectories={"reward": torch.tensor(reward, dtype=torch.float32)})
    advantage = BetaNormalized()(single)
    assert advantage.dtype == torch.float32
    # Rates of 32 coins that are all fair: the density is narrow.
    same(advantage, looped(reward, groups), rtol=1e-3, atol=1e-5)


def test_the_recipe() -> None:
    assert bnpo.task is None and bnpo.aggregation == SequenceSum()
    objective = bnpo.objective
    assert (objective.low, objective.high, objective.dual) == (0.2, 0.28, 10.0)
    assert bnpo.schedule == grpo.schedule

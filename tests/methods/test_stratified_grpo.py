"""The card of Stratified GRPO: normalisation inside structural strata, its blend, worked example."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from polopt.core.errors import UsageError
from polopt.core.rollout import Rollout
from polopt.methods.base.grpo import grpo
from polopt.methods.credit.stratified_grpo import Stratified, stratified_grpo
from tests.support import close, f64, outcome, same

REWARDS = [0, 0.2, 0.1, 0.9, 1, 0.5, 0.8, 0.3]
STRATA = [0, 0, 0, 1, 1, 1, 1, 2]
SAN = [-1.224745, 1.224745, 0, 0.534522, 1.069045, -1.603567, 0, 0]
GN = [-1.320591, -0.764553, -1.042572, 1.181582, 1.459601, 0.069505, 0.903562, -0.486534]
BLEND = [-1.243914, 0.826885, -0.208514, 0.663934, 1.147156, -1.268953, 0.180712, -0.097307]


def groups(rewards: Any, strata: Any, owner: Any = None) -> Rollout:
    """One-step trajectories with their label in column ``stratum``."""
    count = len(rewards)
    return Rollout.from_arrays(
        range(count),
        [0] * count if owner is None else owner,
        step={"logp": torch.full((count,), -0.5, dtype=torch.float64)},
        trajectories={"reward": f64(rewards), "stratum": torch.as_tensor(strata)},
    )


def by_column(alpha: float, **settings: Any) -> Stratified:
    return Stratified(alpha, strata="stratum", **{"eps": 0.0, **settings})


@pytest.mark.parametrize(("alpha", "expected"), [(1.0, SAN), (0.0, GN), (0.8, BLEND)])
def test_worked_example(alpha: float, expected: list[float]) -> None:
    close(by_column(alpha)(groups(REWARDS, STRATA)), expected)


def test_the_bias_of_the_group_baseline_in_the_worked_example() -> None:
    rewards, strata = np.asarray(REWARDS), np.asarray(STRATA)
    rollout = groups(REWARDS, STRATA)
    deviation = np.asarray([rewards[strata == k].std() for k in strata])
    within = by_column(1.0)(rollout).numpy() * deviation
    close(within, [-0.1, 0.1, 0, 0.1, 0.2, -0.3, 0, 0])
    bias = rollout.group_center(rollout.reward).numpy() - within
    close(bias, [-0.375] * 3 + [0.325] * 4 + [-0.175])
    # The law of total variance, from the part's own numbers.
    total = float(rollout.group_center(rollout.reward).square().mean())
    same(total, np.mean(within**2) + np.mean(bias**2))
    assert np.mean(within**2) < total


def random_groups(seed: int) -> tuple[Rollout, list[list[int]]]:
    """Two groups in mixed order, and the members of every stratum: four, three and one of the first, five and four."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(17, generator=generator)
    owner = torch.tensor([0] * 8 + [1] * 9)[order]
    strata = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 0, 0, 0, 0, 0, 2, 2, 2, 2])[order]
    rewards = torch.randn(17, generator=generator, dtype=torch.float64)
    pairs = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 2)]
    members = [((owner == g) & (strata == k)).nonzero().flatten().tolist() for g, k in pairs]
    return groups(rewards, strata, owner), members


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("unbiased", [False, True])
def test_it_is_the_loop_over_groups_and_strata(seed: int, alpha: float, unbiased: bool) -> None:
    rollout, members = random_groups(seed)
    rewards = rollout.reward.numpy()

    def standard(index: list[int]) -> Any:
        chosen = rewards[index]
        spread = chosen.std(ddof=int(unbiased)) if len(index) > 1 else 0.0
        return (chosen - chosen.mean()) / (spread + 1e-6)

    expected = np.zeros(17)
    for index in members:
        expected[index] += alpha * standard(index)
    for g in (0, 1):
        index = (rollout.group == g).nonzero().flatten().tolist()
        expected[index] += (1 - alpha) * standard(index)
    same(by_column(alpha, eps=1e-6, unbiased=unbiased)(rollout), expected, atol=1e-11)


@pytest.mark.parametrize("seed", range(4))
def test_every_stratum_has_mean_zero_and_variance_one(seed: int) -> None:
    rollout, members = random_groups(seed)
    credit = by_column(1.0)(rollout)
    for index in members:
        # The gradient of a choice that all members share: the sum of their advantages.
        same(credit[index].sum(), 0.0, atol=1e-12)
        if len(index) > 1:
            same(credit[index].var(unbiased=False), 1.0)
    # The second group has no stratum of one: the same holds over all of it.
    second = credit[rollout.group == 1]
    same(second.mean(), 0.0, atol=1e-12)
    same(second.var(unbiased=False), 1.0)


@pytest.mark.parametrize("seed", range(4))
def test_only_the_order_within_a_stratum_matters(seed: int) -> None:
    rollout, _ = random_groups(seed)
    scale, shift = f64([2.0, 0.3, 5.0]), f64([-1.0, 4.0, 0.5])
    label = rollout["stratum"]
    moved = rollout.with_columns(trajectory={"reward": scale[label] * rollout.reward + shift[label]})
    same(by_column(1.0)(moved), by_column(1.0)(rollout), atol=1e-11)
    assert not torch.allclose(by_column(0.8)(moved), by_column(0.8)(rollout))
    renamed = rollout.with_columns(trajectory={"stratum": torch.tensor([7, 3, -2])[label]})
    same(by_column(0.8)(renamed), by_column(0.8)(rollout))
    order = torch.randperm(17, generator=torch.Generator().manual_seed(seed))
    same(by_column(0.8)(rollout.select(order)), by_column(0.8)(rollout)[order])


def test_one_stratum_or_no_blend_is_grpo() -> None:
    rollout, _ = random_groups(0)
    plain = rollout.group_zscore(rollout.reward, eps=1e-4)
    same(by_column(0.0, eps=1e-4, unbiased=True)(rollout), plain)
    alike = rollout.with_columns(trajectory={"stratum": torch.full((17,), 4)})
    same(by_column(1.0, eps=1e-4, unbiased=True)(alike), plain)
    method = stratified_grpo | {"advantage": by_column(0.0, eps=1e-4, unbiased=True)}
    moved = rollout.with_columns(step={"now/logp": rollout.logp + 0.1})
    actual, expected = (outcome(m, m.credit(moved)) for m in (method, grpo))
    same(actual.loss, expected.loss)
    same(actual.gradient["now/logp"], expected.gradient["now/logp"])


def test_strata_of_one_teach_only_through_the_group() -> None:
    rollout = groups(REWARDS, range(8))
    assert (by_column(1.0)(rollout) == 0).all()
    close(by_column(0.5)(rollout), f64(GN) / 2)
    assert (by_column(0.8)(groups([0.4] * 8, STRATA)) == 0).all()


def test_a_cap_pools_high_labels() -> None:
    rollout = groups(REWARDS, [0, 0, 0, 2, 3, 4, 9, 1])
    pooled = groups(REWARDS, [0, 0, 0, 2, 2, 2, 2, 1])
    same(by_column(0.8, cap=2)(rollout), by_column(0.8)(pooled))
    close(by_column(0.8, cap=2)(rollout), BLEND)


def test_an_invalid_reward_is_in_no_stratum() -> None:
    rewards = [*REWARDS, math.nan, math.nan]
    close(by_column(0.8)(groups(rewards, [*STRATA, 0, 5])), [*BLEND, 0, 0])


def test_the_label_is_the_largest_turn_that_the_policy_acted_in() -> None:
    # Lengths 3, 2, 2, 1. An answer that the policy did not go on from is no structure of its own.
    turn = [0, 1, 2, 0, 0, 0, 1, 1]
    mask = [True, False, True, True, True, True, False, True]
    rollout = Rollout.from_arrays(
        [0, 0, 0, 1, 1, 2, 2, 3],
        [0, 0, 0, 0],
        step={"turn": torch.tensor(turn), "mask": torch.tensor(mask)},
        trajectories={"reward": f64([1, 2, 3, 4])},
    )
    assert Stratified().labels(rollout).tolist() == [2, 0, 0, 1]
    by_turn = Stratified(1.0, eps=0.0)(rollout)
    close(by_turn, [0, -1, 1, 0])
    nothing = rollout.with_columns(step={"mask": torch.zeros(8, dtype=torch.bool)})
    assert Stratified().labels(nothing).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan])
def test_alpha_is_a_share(alpha: float) -> None:
    with pytest.raises(UsageError, match=r"alpha is .* must lie in"):
        Stratified(alpha)

"""The card of GD2PO: conflicts, consensus, weights of prompts, whitening, worked example."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from polopt.core.errors import UsageError
from polopt.core.rollout import Rollout
from polopt.methods.credit.gd2po import ConflictFilter, gd2po
from polopt.methods.credit.gdpo_multireward import DecoupledZScore
from tests.support import close, f64, same

NAN = math.nan
GROUPS = [0] * 4 + [1] * 4
REWARDS = [(1, 0), (1, 0.9), (0, 1), (0, 0.1), (1, 0.5), (0, 0.2), (1, 0.9), (0, 0.65)]
# Two rewards whose order is the same in both groups.
AGREED = [(1, 0.9), (0, 0.2), (1, 0.8), (0, 0.1), (0, 0.3), (1, 0.5), (1, 0.7), (0, 0.2)]


def made(
    rewards: Sequence[Sequence[float]],
    groups: Sequence[int] = GROUPS,
    lengths: Sequence[int] | None = None,
    total: Sequence[float] | None = None,
) -> Rollout:
    table = f64(rewards)
    lengths = lengths or [1] * len(table)
    ids = torch.arange(len(table)).repeat_interleave(torch.tensor(lengths))
    columns = {f"reward/r{k}": table[:, k] for k in range(table.shape[1])}
    columns["reward"] = table.sum(1) if total is None else f64(total)
    return Rollout.from_arrays(ids, groups, trajectories=columns)


def credit(rollout: Rollout, **options: object) -> Tensor:
    return rollout.mean_steps(ConflictFilter(**options)(rollout))  # type: ignore[arg-type]


def looped(
    rewards: np.ndarray, groups: Sequence[int], lengths: Sequence[int], mode: str, tau: float, whiten: bool
) -> np.ndarray:
    """The card's seven steps, one response after the other."""
    m, count = rewards.shape
    a = np.zeros((m, count))
    for g in set(groups):
        mine = [i for i in range(m) if groups[i] == g]
        for k in range(count):
            values = rewards[mine, k]
            a[mine, k] = (values - values.mean()) / ((values.std(ddof=1) if len(mine) > 1 else 0.0) + 1e-6)
    keep = []
    for row in a:
        conflict = any(row > 1e-8) and any(row < -1e-8)
        ratio = row.sum() / (np.abs(row).sum() + 1e-8)
        keep.append(not conflict if mode == "hard" else not (conflict and abs(ratio) < tau))
    pre = np.zeros(m)
    for i in range(m):
        mine = [j for j in range(m) if groups[j] == groups[i]]
        pre[i] = keep[i] * np.mean([keep[j] for j in mine]) * a[i].sum()
    if not whiten:
        return pre
    tokens = np.array([pre[i] for i in range(m) if keep[i] for _ in range(lengths[i])])
    if len(tokens) < 2:
        return np.zeros(m)
    return np.where(keep, (pre - tokens.mean()) / np.sqrt(tokens.var(ddof=1) + 1e-8), 0.0)


def test_worked_example() -> None:
    even = credit(made(REWARDS), mode="hard")
    close(even, [0, 0.769701, 0, -0.749804, 0, -0.970458, 0.950561, 0])
    uneven = credit(made(REWARDS, lengths=range(1, 9)), mode="hard")
    close(uneven, [0, 0.868235, 0, -0.775148, 0, -1.013792, 1.063839, 0])
    raw = credit(made(REWARDS), mode="hard", whiten=False)
    close(raw, [0, 0.815557, 0, -0.815557, 0, -1.052419, 1.009701, 0])
    severe = credit(made(REWARDS), tau=0.2)
    close(severe, [0, 0.560504, 0, -0.560504, 0.448396, -1.446581, 1.387864, -0.389679])


@pytest.mark.parametrize("whiten", [True, False])
@pytest.mark.parametrize(("mode", "tau"), [("hard", 0.8), ("snr", 0.2), ("snr", 0.8)])
def test_random_rewards_against_a_loop(mode: str, tau: float, whiten: bool) -> None:
    generator = np.random.default_rng(0)
    groups = [1, 0, 0, 2, 1, 2, 1, 0, 1, 2, 3]
    for _ in range(20):
        rewards = generator.normal(size=(11, 3))
        lengths = generator.integers(1, 6, size=11).tolist()
        actual = credit(made(rewards.tolist(), groups, lengths), mode=mode, tau=tau, whiten=whiten)
        same(actual, looped(rewards, groups, lengths, mode, tau, whiten))


def test_without_conflicts_it_is_gdpo_over_tokens() -> None:
    rollout = made(AGREED, lengths=range(1, 9))
    expected = DecoupledZScore(batch="token", eps=1e-6)(rollout)
    for mode in ("hard", "snr"):
        same(ConflictFilter(mode=mode)(rollout), expected)  # type: ignore[arg-type]


def test_a_ratio_of_zero_drops_nothing_and_one_drops_every_conflict() -> None:
    rollout = made(REWARDS, lengths=range(1, 9))
    same(ConflictFilter(tau=0.0)(rollout), DecoupledZScore(batch="token", eps=1e-6)(rollout))
    same(ConflictFilter(tau=1.0)(rollout), ConflictFilter(mode="hard")(rollout))


def test_one_reward_or_copies_of_it_never_conflict() -> None:
    values = torch.rand(8, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    single, twice = made(values.tolist()), made(values.expand(8, 2).tolist())
    scores = single.group_zscore(single.reward, eps=1e-6)
    same(credit(single, mode="hard", whiten=False), scores)
    same(credit(twice, mode="hard", whiten=False), 2 * scores)


def test_fewer_are_kept_the_higher_the_ratio_must_be() -> None:
    rewards = np.random.default_rng(1).normal(size=(40, 3)).tolist()
    rollout = made(rewards, [i // 8 for i in range(40)])
    kept = [int((credit(rollout, tau=tau, whiten=False) != 0).sum()) for tau in (0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] == 40 and kept[-1] < kept[2] < 40


def test_the_scale_and_offset_of_a_reward_do_not_matter() -> None:
    moved = [(1000 * a - 3, 0.02 * b + 5) for a, b in REWARDS]
    for mode in ("hard", "snr"):
        same(credit(made(moved), mode=mode, eps=0.0), credit(made(REWARDS), mode=mode, eps=0.0), rtol=1e-6)


def test_kept_steps_have_mean_zero_and_variance_one() -> None:
    rollout = made(REWARDS, lengths=range(1, 9))
    steps = ConflictFilter(mode="hard")(rollout)
    kept = steps[steps != 0]
    assert len(kept) == 2 + 4 + 6 + 7
    same(kept.mean(), 0.0, atol=1e-9)
    same(kept.var(), 1.0, rtol=1e-6)


def test_a_reward_that_does_not_vary_causes_no_conflict() -> None:
    constant = [(value, 0.4) for value, _ in REWARDS]
    single = [(value,) for value, _ in REWARDS]
    same(credit(made(constant), mode="hard"), credit(made(single), mode="hard"))


def test_the_weight_of_a_reward_scales_its_score() -> None:
    weighed = made(AGREED).with_columns(trajectory={"reward_weight/r1": f64([3.0] * 8)})
    first, second = (made([(row[k],) for row in AGREED]) for k in (0, 1))
    expected = credit(first, whiten=False) + 3 * credit(second, whiten=False)
    same(credit(weighed, whiten=False), expected)
    # What counts against an answer conflicts with what counts for it.
    against = made(AGREED).with_columns(trajectory={"reward_weight/r1": f64([-3.0] * 8)})
    assert (credit(against, mode="hard") == 0).all()


@pytest.mark.parametrize("whiten", [True, False])
def test_strictly_opposed_rewards_teach_nothing(whiten: bool) -> None:
    opposed = [(value, -2 * value) for value in (0.1, 0.9, 0.4, 0.3, 0.7, 0.2, 0.4, 0.6)]
    for mode in ("hard", "snr"):
        assert (credit(made(opposed), mode=mode, whiten=whiten) == 0).all()


@pytest.mark.parametrize("whiten", [True, False])
def test_an_invalid_total_teaches_nothing_and_moves_nobody(whiten: bool) -> None:
    spoilt = [*REWARDS[:3], (9.0, -9.0), *REWARDS[3:]]
    groups = [0] * 5 + [1] * 4
    rollout = made(spoilt, groups, total=[0, 0, 0, NAN, 0, 0, 0, 0, 0])
    advantage = credit(rollout, tau=0.2, whiten=whiten)
    assert float(advantage[3]) == 0
    same(advantage[[0, 1, 2, 4, 5, 6, 7, 8]], credit(made(REWARDS), tau=0.2, whiten=whiten))


def test_masked_steps_do_not_count() -> None:
    rollout = made(REWARDS, lengths=[2] * 8)
    mask = torch.arange(16) % 2 == 1
    masked = ConflictFilter()(rollout.with_columns(step={"mask": mask}))
    assert (masked[~mask] == 0).all()
    same(masked[mask], ConflictFilter()(made(REWARDS)))


def test_nothing_to_compare_gives_exactly_zero() -> None:
    assert (credit(made([(0.3, 0.7)] * 4, [0, 0, 1, 1])) == 0).all()
    assert (credit(made([(0.3, 0.7), (0.1, 0.9)], [0, 1])) == 0).all()
    assert (credit(made([(NAN, NAN)] * 2, [0, 0])) == 0).all()


@pytest.mark.parametrize("tau", [-0.1, 1.5])
def test_a_ratio_out_of_range_is_refused(tau: float) -> None:
    with pytest.raises(UsageError, match=rf"tau .*\[0, 1\], got {tau}"):
        ConflictFilter(tau=tau)


def test_the_recipe() -> None:
    assert gd2po.task == "worksheet"
    assert (gd2po.advantage.mode, gd2po.advantage.tau) == ("snr", 0.8)

"""The card of GDPO: decoupled normalisation, the batch's scale, conditioned rewards, worked example."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from polopt.core.errors import UsageError
from polopt.core.rollout import Rollout
from polopt.methods.base.grpo import grpo
from polopt.methods.credit.gd2po import ConflictFilter
from polopt.methods.credit.gdpo_multireward import ConditionedReward, DecoupledZScore, gdpo_multireward
from tests.support import close, f64, same

NAN = math.nan
GROUPS = [0, 0, 1, 1, 2, 2, 2, 2]
BINARY = [(0, 0), (1, 0), (0, 0), (1, 1), (0, 1), (1, 0), (1, 1), (0, 0)]
SUMMED = [-0.707007, 0.707007, -1.414014, 1.414014, 0, 0, 1.731751, -1.731751]


def made(
    rewards: Sequence[Sequence[float]],
    groups: Sequence[int] = GROUPS,
    lengths: Sequence[int] | None = None,
    total: Sequence[float] | None = None,
) -> Rollout:
    """A rollout with the rewards r1, r2, ... of each trajectory; the total is their sum where it is not given."""
    table = f64(rewards)
    lengths = lengths or [1] * len(table)
    columns = {f"reward/r{k + 1}": table[:, k] for k in range(table.shape[1])}
    ids = torch.arange(len(table)).repeat_interleave(torch.tensor(lengths))
    columns["reward"] = table.nansum(1) if total is None else f64(total)
    return Rollout.from_arrays(ids, groups, trajectories=columns)


def per_trajectory(part: DecoupledZScore, rollout: Rollout) -> Tensor:
    return rollout.mean_steps(rollout.spread(part(rollout)))


def looped(rewards: np.ndarray, groups: Sequence[int], weights: Sequence[float], eps: float) -> np.ndarray:
    """S by loops over groups and rewards; NaN rewards are in no mean and add nothing."""
    out = np.zeros(len(rewards))
    for group in set(groups):
        mine = [i for i, g in enumerate(groups) if g == group]
        for k, weight in enumerate(weights):
            known = [i for i in mine if not np.isnan(rewards[i, k])]
            if len(known) > 1:
                values = rewards[known, k]
                for i in known:
                    out[i] += weight * (rewards[i, k] - values.mean()) / (values.std(ddof=1) + eps)
    return out


def test_worked_example() -> None:
    close(DecoupledZScore(batch="off")(made(BINARY)), SUMMED)
    expected = [-0.564041, 0.564041, -1.128082, 1.128082, 0, 0, 1.381568, -1.381568]
    close(DecoupledZScore()(made(BINARY)), expected)
    plain = grpo.advantage(made(BINARY))
    close(plain, [-0.707007, 0.707007, -0.707057, 0.707057, 0, 0, 1.224595, -1.224595])


def test_worked_example_by_token() -> None:
    rollout = made(BINARY, lengths=range(1, 9))
    expected = [-0.546069, 0.529620, -1.083913, 1.067464, -0.008225, -0.008225, 1.309219, -1.325668]
    steps = DecoupledZScore(batch="token", eps=1e-6)(rollout)
    assert steps.shape == (36,)
    close(rollout.mean_steps(steps), expected)
    same(steps.mean(), 0.0)
    same(steps.var(), 1.0, rtol=1e-7)


def test_random_rewards_against_a_loop() -> None:
    generator = np.random.default_rng(0)
    groups = [2, 0, 0, 1, 2, 1, 0, 2, 1, 2, 3]
    for _ in range(20):
        rewards = generator.normal(size=(11, 3)) * [1, 100, 0.01]
        rewards[generator.integers(11), generator.integers(3)] = NAN
        weights = {"r1": 0.5, "r3": 2.0}
        rollout = made(rewards.tolist(), groups)
        summed = looped(rewards, groups, [0.5, 1.0, 2.0], 1e-4)
        same(DecoupledZScore(weights, "off")(rollout), summed)
        # The mean of the batch is subtracted here, and is 0 although groups are unequal.
        same(DecoupledZScore(weights)(rollout), (summed - summed.mean()) / (summed.std(ddof=1) + 1e-4), atol=1e-9)


def test_one_reward_is_grpo() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(8, 1, generator=generator, dtype=torch.float64)
    for batch in ("rollout", "token", "off"):
        same(DecoupledZScore(batch=batch)(made(values.tolist())), grpo.advantage(made(values.tolist())))


@pytest.mark.parametrize("count", [2, 5])
def test_identical_rewards_are_as_many_times_grpo(count: int) -> None:
    values = torch.rand(8, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    single = grpo.advantage(made(values.tolist()))
    same(DecoupledZScore(batch="off")(made(values.expand(8, count).tolist())), count * single)
    # The batch's scale takes the number of rewards out again.
    same(DecoupledZScore(eps=0.0)(made(values.expand(8, count).tolist())).std(), 1.0)


def test_the_scale_and_offset_of_a_reward_do_not_matter_its_weight_does() -> None:
    rewards = torch.rand(8, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    moved = rewards * f64([1000.0, 1e-3]) + f64([-7.0, 40.0])
    part = DecoupledZScore(eps=0.0)
    same(part(made(moved.tolist())), part(made(rewards.tolist())), rtol=1e-6)
    plain = [grpo.advantage(made(values.tolist())) for values in (rewards, moved)]
    assert (plain[0] - plain[1]).abs().max() > 0.1
    weighed = DecoupledZScore({"r1": 5.0}, eps=0.0)(made(rewards.tolist()))
    assert (weighed - part(made(rewards.tolist()))).abs().max() > 0.1


def test_mean_and_deviation_of_group_and_batch() -> None:
    rewards = torch.rand(8, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    rollout = made(rewards.tolist())
    advantage = DecoupledZScore(eps=0.0)(rollout)
    same(rollout.group_mean(advantage), [0, 0, 0])
    same(advantage.std(), 1.0)


def test_rollout_and_token_agree_where_every_length_is_one() -> None:
    rewards = torch.rand(8, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    rollout = made(rewards.tolist())
    by_rollout, by_token = (DecoupledZScore(batch=batch, eps=0.0)(rollout) for batch in ("rollout", "token"))
    same(by_rollout, by_token, rtol=1e-7)
    assert (by_rollout - by_token).abs().max() > 0


@pytest.mark.parametrize(("size", "count"), [(2, 2), (3, 2), (2, 3), (4, 2)])
def test_it_tells_more_patterns_of_rewards_apart(size: int, count: int) -> None:
    values: dict[str, set[float]] = {"gdpo": set(), "grpo": set()}
    for pattern in itertools.product(itertools.product((0, 1), repeat=count), repeat=size):
        rollout = made(pattern, [0] * size)
        values["gdpo"] |= {round(float(a), 4) + 0.0 for a in DecoupledZScore(batch="off", eps=1e-9)(rollout)}
        values["grpo"] |= {round(float(a), 4) + 0.0 for a in rollout.group_zscore(rollout.reward, eps=1e-9)}
    assert len(values["gdpo"]) >= len(values["grpo"])
    if (size, count) == (2, 2):
        assert values["grpo"] == {0.0, 0.7071, -0.7071}
        assert values["gdpo"] == {0.0, 0.7071, -0.7071, 1.4142, -1.4142}


@pytest.mark.parametrize("batch", ["rollout", "token", "off"])
def test_an_invalid_total_teaches_nothing_and_moves_nobody(batch: str) -> None:
    part = DecoupledZScore(batch=batch)  # type: ignore[arg-type]
    without = part(made(BINARY[:4] + BINARY[5:], GROUPS[:-1]))
    spoilt = [*BINARY[:4], (5.0, 1.0), *BINARY[5:]]
    total = [0, 1, 0, 2, NAN, 1, 2, 0]
    kept = part(made(spoilt, total=total))
    assert float(kept[4]) == 0
    same(kept[[0, 1, 2, 3, 5, 6, 7]], without)


def test_masked_steps_do_not_count_in_the_tokens() -> None:
    rollout = made(BINARY, lengths=[2] * 8)
    mask = torch.ones(16, dtype=torch.bool)
    mask[::2] = False
    masked = DecoupledZScore(batch="token")(rollout.with_columns(step={"mask": mask}))
    assert (masked[::2] == 0).all()
    same(masked[1::2], DecoupledZScore(batch="token")(made(BINARY)))


@pytest.mark.parametrize("batch", ["rollout", "token", "off"])
def test_nothing_to_compare_gives_exactly_zero(batch: str) -> None:
    part = DecoupledZScore(batch=batch)  # type: ignore[arg-type]
    assert (part(made([(0.3, 0.7)] * 4, [0, 0, 1, 1])) == 0).all()
    assert (part(made([(0.3, 0.1), (0.9, 0.4)], [0, 1])) == 0).all()
    assert (part(made([(NAN, NAN)] * 2, [0, 0], total=[NAN, NAN])) == 0).all()
    if batch != "token":
        # A constant reward beside one that varies contributes 0.
        same(part(made([(0.3, 0), (0.3, 1)], [0, 0])), part(made([(0.8, 0), (0.8, 1)], [0, 0])))


def test_a_weight_of_no_reward_is_refused() -> None:
    with pytest.raises(UsageError, match="no reward 'lenght' to weigh; the run has r1, r2"):
        DecoupledZScore({"lenght": 0.5})(made(BINARY))


def conditioned(easy: Sequence[float], hard: Sequence[float], total: Sequence[float], **options: float) -> Rollout:
    columns = {"reward/length": f64(easy), "reward/correct": f64(hard), "reward": f64(total)}
    rollout = Rollout.from_arrays(range(len(easy)), [0] * len(easy), trajectories=columns)
    return ConditionedReward(**options)(rollout)  # type: ignore[arg-type]


def test_an_easy_reward_is_paid_where_the_hard_one_is_met() -> None:
    made_so = conditioned([1, 1, 0, 0, 0.5], [1, 0, 1, 0, 0.9], [2, 1, 1, 0, 1.4])
    same(made_so["reward/length"], [1, 0, 0, 0, 0])
    same(made_so["reward/correct"], [1, 0, 1, 0, 0.9])
    same(made_so.reward, [2, 0, 1, 0, 0.9])
    lower = conditioned([1, 1, 0.5], [1, 0, 0.9], [1.2, 0.2, 1.0], threshold=0.9, weight=0.2)
    same(lower["reward/length"], [1, 0, 0.5])
    same(lower.reward, [1.2, 0.0, 1.0])


def test_what_cannot_be_judged_stays_invalid() -> None:
    made_so = conditioned([1, NAN, NAN, 1], [NAN, 1, 0, NAN], [NAN, 1, 0, 1])
    same(made_so["reward/length"].isnan(), [1, 1, 0, 1])
    assert float(made_so["reward/length"][2]) == 0
    # An invalid total stays so; one to which a reward did not apply loses what it was paid.
    assert math.isnan(float(made_so.reward[0]))
    same(made_so.reward[1:], [1, 0, 0])


def test_the_recipe() -> None:
    assert gdpo_multireward.task == "worksheet"
    assert {s: v for s, v in gdpo_multireward.slots().items() if s != "advantage"} == {
        s: v for s, v in grpo.slots().items() if s != "advantage"
    }


def test_the_weights_of_the_run_are_those_of_the_sum_unless_the_part_has_its_own() -> None:
    first, second = f64([0, 1, 0, 1, 1, 0]), f64([0.3, 0.1, 0.9, 0.2, 0.2, 0.4])
    three = torch.full((6,), 3.0, dtype=torch.float64)
    columns = {"reward": first + 3 * second, "reward/a": first, "reward/b": second, "reward_weight/b": three}
    rollout = Rollout.from_arrays(range(6), [0, 0, 0, 1, 1, 1], trajectories=columns)
    part = DecoupledZScore(batch="off", eps=0.0)

    def scores(values: Tensor) -> Tensor:
        groups = values.view(2, 3)
        return ((groups - groups.mean(1, keepdim=True)) / groups.std(1, keepdim=True)).flatten()

    same(part(rollout), scores(first) + 3 * scores(second))
    own = dataclasses.replace(part, weights={"b": 0.5})
    same(own(rollout), scores(first) + 0.5 * scores(second))


def test_rewards_of_steps_are_refused() -> None:
    rollout = made(BINARY).with_columns(step={"step_reward": torch.zeros(8)})
    for part in (DecoupledZScore(), ConflictFilter()):
        with pytest.raises(UsageError, match="rewards of single steps"):
            part(rollout)

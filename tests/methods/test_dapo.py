"""The card of DAPO: clip-higher, token mean, dynamic sampling, soft overlong penalty, worked example."""

from __future__ import annotations

import pytest
import torch

from polopt.aggregations import SequenceMean
from polopt.core.rollout import Rollout
from polopt.methods.base.dapo import DynamicSampling, OverlongFilter, SoftOverlong, dapo
from polopt.methods.base.grpo import grpo
from polopt.objectives.clipped_surrogate import ClippedSurrogate
from tests.support import DELTA, OLD, close, f64, now, same, value_and_gradient, worked

DELTA_HIGH = [0.22, *DELTA[1:]]
MOVED = f64(OLD) + f64(DELTA_HIGH)
symmetric = dapo | {"objective": ClippedSurrogate(0.2, 0.2)}


def test_worked_example() -> None:
    rollout = dapo.credit(worked())
    loss, gradient = value_and_gradient(dapo, now(MOVED), rollout)
    close(loss, -0.0236169750, digits=9)
    close(gradient, [-0.088098, -0.063973, -0.074326, 0.105473, 0, -0.070691, 0, 0, 0.078125, 0.067243])
    loss, other = value_and_gradient(symmetric, now(MOVED), rollout)
    close(loss, -0.0147040641, digits=9)
    assert float(other[0]) == 0.0
    same(other[1:], gradient[1:])


def test_worked_example_of_the_filter() -> None:
    flags = f64([1, 0, 1, 1])
    rollout = worked().with_columns(trajectory={"score": flags, "place": torch.arange(4)})
    kept = DynamicSampling()(rollout)
    assert kept["place"].tolist() == [0, 1]
    _, gradient = value_and_gradient(dapo, now(MOVED), dapo.credit(rollout))
    _, alone = value_and_gradient(dapo, now(MOVED[:5]), dapo.credit(kept))
    same(alone, 2 * gradient[:5])


def test_worked_example_of_the_penalty() -> None:
    lengths = torch.tensor([10, 16, 17, 18, 20, 21])
    rollout = Rollout(lengths, torch.zeros(6, dtype=torch.int64), {"trajectory": {"reward": torch.ones(6)}})
    made = SoftOverlong(max_length=20, cache=4)(rollout)
    same(made["reward/overlong"], [0, 0, -0.25, -0.5, -1, -1])
    same(made.reward, [1, 1, 0.75, 0.5, 0, 0])


def test_the_penalty_is_continuous_and_bounded() -> None:
    for length in range(1, 60):
        rollout = Rollout(
            torch.tensor([length]), torch.tensor([0]), {"trajectory": {"reward": f64([0.0]), "limit": f64([40.0])}}
        )
        expected = 0.0 if length <= 32 else (-1.0 if length > 40 else (32 - length) / 8)
        same(SoftOverlong()(rollout).reward, [expected], atol=1e-6)


def test_groups_are_judged_on_the_score_not_on_the_penalised_reward() -> None:
    rollout = worked(rewards=[1, 0.5, 1, 0.5]).with_columns(trajectory={"score": f64([1, 1, 0, 1])})
    assert DynamicSampling()(rollout).reward.tolist() == [1, 0.5]
    assert DynamicSampling(column="reward")(rollout).n_groups == 2


@pytest.mark.parametrize("right", [0, 1])
def test_a_degenerate_batch_leaves_nothing(right: int) -> None:
    kept = DynamicSampling()(worked().with_columns(trajectory={"score": f64([right] * 4)}))
    assert (kept.n_steps, kept.n_trajectories, kept.n_groups) == (0, 0, 0)


def test_invalid_scores_do_not_make_a_group_vary() -> None:
    nan = float("nan")
    kept = DynamicSampling()(worked().with_columns(trajectory={"score": f64([1, nan, 0, 1])}))
    assert kept.n_trajectories == 2


def test_with_equal_bounds_it_is_grpo_with_the_token_mean() -> None:
    twin = symmetric | {"aggregation": SequenceMean()}
    rollout = grpo.credit(worked())
    same(value_and_gradient(twin, now(MOVED), rollout)[1], value_and_gradient(grpo, now(MOVED), rollout)[1])


def test_for_equal_lengths_the_token_mean_is_the_mean_of_means() -> None:
    generator = torch.Generator().manual_seed(0)
    old = -torch.rand(12, generator=generator, dtype=torch.float64)
    rollout = Rollout.from_arrays(
        torch.arange(4).repeat_interleave(3),
        [0, 0, 1, 1],
        step={"logp": old},
        trajectories={"reward": f64([1, 0, 0.3, 0.9])},
    )
    new = old + 0.3 * torch.randn(12, generator=generator, dtype=torch.float64)
    rollout = grpo.credit(rollout)
    loss, gradient = value_and_gradient(symmetric, now(new), rollout)
    expected_loss, expected = value_and_gradient(grpo, now(new), rollout)
    same(loss, expected_loss)
    same(gradient, expected)


def test_a_higher_upper_bound_only_adds_gradient() -> None:
    generator = torch.Generator().manual_seed(2)
    rollout = dapo.credit(worked(rewards=[1, 0, 0.2, 0.8]))
    for _ in range(20):
        new = f64(OLD) + 0.3 * torch.randn(10, generator=generator, dtype=torch.float64)
        _, wide = value_and_gradient(dapo, now(new), rollout)
        _, narrow = value_and_gradient(symmetric, now(new), rollout)
        added = (wide != 0) & (narrow == 0)
        ratio = (new - f64(OLD)).exp()
        assert (added == ((rollout.advantage > 0) & (ratio > 1.2) & (ratio <= 1.28))).all()
        same(wide[~added], narrow[~added])


def test_removing_a_group_rescales_the_rest() -> None:
    rollout = dapo.credit(worked())
    _, gradient = value_and_gradient(dapo, now(MOVED), rollout)
    _, rest = value_and_gradient(dapo, now(MOVED[5:]), rollout.select(torch.tensor([2, 3])))
    same(rest, gradient[5:] * 10 / 5)


def test_the_overlong_filter_masks_cut_responses() -> None:
    rollout = worked().with_columns(trajectory={"truncated": torch.tensor([False, True, False, True])})
    masked = OverlongFilter()(rollout)
    assert masked.mask.tolist() == [True, True, True, False, False, True, True, False, False, False]
    # Their rewards still count in the group, their steps do not train.
    credited = dapo.credit(masked)
    same(credited.mean_steps(credited.advantage)[[0, 2]], dapo.credit(rollout).advantage[[0, 5]])
    _, gradient = value_and_gradient(dapo, now(MOVED), credited)
    assert (gradient[~masked.mask] == 0).all()
    _, full = value_and_gradient(dapo, now(MOVED), dapo.credit(rollout))
    same(gradient[masked.mask], full[masked.mask] * 10 / 5)

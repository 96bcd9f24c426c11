"""The default checks: their numbers against NumPy, silent in a good run, fatal under ``strict``."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from polopt.core.loss import Evaluation
from polopt.core.rollout import Rollout
from polopt.training.checks import (
    CheckFailed,
    RatioStatistics,
    check_finite,
    check_first_update,
    check_rewards,
    check_versions,
)

NEW = [-1.0, -0.2, -3.0, -0.5, -0.7, -9.0]
OLD = [-1.1, -0.2, -2.5, -0.9, -0.6, -1.0]
MASK = [True, True, True, True, True, False]


def rollout(**trajectories: object) -> Rollout:
    step = {"logp": torch.tensor(OLD), "mask": torch.tensor(MASK)}
    return Rollout.from_arrays([0, 0, 0, 1, 1, 2], [0, 0, 1], step=step, trajectories=trajectories)


def statistics(pieces: list[list[int]]) -> RatioStatistics:
    found = RatioStatistics()
    whole = rollout().with_columns(step={"now": torch.tensor(NEW)})
    for chosen in pieces:
        piece = whole.piece(torch.tensor(chosen))
        found.add(Evaluation({"logp": piece["now"]}), piece)
    return found


@pytest.mark.parametrize("pieces", [[[0, 1, 2]], [[1], [0], [2]], [[2, 0], [1]]], ids=repr)
def test_ratio_statistics_are_those_of_the_trainable_steps_however_they_are_cut(pieces: list[list[int]]) -> None:
    gap = (np.array(NEW) - np.array(OLD))[np.array(MASK)]
    ratio = np.exp(gap)
    expected = {
        "policy/logp_difference_mean": np.abs(gap).mean(),
        "policy/logp_difference_max": np.abs(gap).max(),
        "policy/kl_to_sampler": (ratio - 1 - gap).mean(),
        "policy/effective_sample_size": ratio.sum() ** 2 / (ratio**2).sum() / len(gap),
    }
    assert statistics(pieces).metrics() == pytest.approx(expected, rel=1e-5)


def test_nothing_seen_is_nothing_said() -> None:
    assert RatioStatistics().metrics() == {}
    assert check_first_update(RatioStatistics(), 0.0, strict=True) == {}


def test_the_first_update_must_start_at_ratio_one() -> None:
    found = statistics([[0, 1, 2]])
    assert check_first_update(found, 0.01, strict=False)["policy/first_update_gap"] == pytest.approx(0.22)
    with pytest.raises(CheckFailed, match=r"0\.22"):
        check_first_update(found, 0.01, strict=True)
    check_first_update(found, 0.3, strict=True)


def test_a_gap_that_is_not_a_number_is_not_small() -> None:
    whole = rollout()
    found = RatioStatistics()
    found.add(Evaluation({"logp": torch.full((6,), torch.nan)}), whole)
    with pytest.raises(CheckFailed):
        check_first_update(found, 0.3, strict=True)


def test_the_age_of_the_data() -> None:
    batch = rollout(version=torch.tensor([3, 5, 4]))
    assert check_versions(batch, 5, strict=True) == {"policy/age_mean": 1.0, "policy/age_max": 2.0}
    assert check_versions(rollout(), 5, strict=True) == {}
    with pytest.raises(CheckFailed, match="version 5 > 4"):
        check_versions(batch, 4, strict=True)


def test_the_share_of_invalid_rewards() -> None:
    good = rollout(reward=torch.tensor([0.0, 1.0, 0.5]))
    bad = rollout(reward=torch.tensor([0.0, torch.nan, 0.5]))
    assert check_rewards(good, strict=True) == {"frac_reward_invalid": 0.0}
    assert check_rewards(bad, strict=False) == {"frac_reward_invalid": pytest.approx(1 / 3)}
    with pytest.raises(CheckFailed, match=r"33\.3%"):
        check_rewards(bad, strict=True)


def test_a_rejected_update_is_fatal_under_strict_alone() -> None:
    check_finite({}, False, "the loss is nan")
    with pytest.raises(CheckFailed, match="the loss is nan"):
        check_finite({}, True, "the loss is nan")

"""Filters that make preferences of sampled groups, against loops over the groups."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from polopt.core.rollout import Rollout
from polopt.filters.preferences import Best, BestWorst, RandomPair, Ranked, with_labels

NAN = math.nan
GROUPS = (1, 0, 1, 1, 2, 0, 0, 1, 3, 3)
SCORES = (0.5, 1.0, NAN, 0.9, 1.0, 0.0, 1.0, -0.2, 0.3, 0.3)


def rollout(scores: Sequence[float] = SCORES, groups: Sequence[int] = GROUPS, **columns: torch.Tensor) -> Rollout:
    place = torch.arange(len(groups))
    made = {"score": torch.tensor(scores), "place": place, **columns}
    return Rollout.from_arrays(place, list(groups), trajectories=made)


def members(made: Rollout) -> dict[int, float]:
    """The label of each kept trajectory by its place before."""
    return dict(zip(made["place"].tolist(), made["label"].tolist(), strict=True))


def test_best_and_worst_of_each_group() -> None:
    made = BestWorst()(rollout())
    # Group 0: the first of two best ones; group 2 is alone; group 3 is a tie.
    assert members(made) == {1: 1.0, 5: 0.0, 3: 1.0, 7: 0.0}
    assert made.n_groups == 2
    assert made["mask/chosen"].tolist() == [label == 1.0 for label in made["label"].tolist()]


@pytest.mark.parametrize("seed", range(5))
def test_best_and_worst_by_a_loop(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 4, (40,), generator=generator).float()
    scores[torch.rand(40, generator=generator) < 0.2] = NAN
    groups = torch.randint(0, 9, (40,), generator=generator).tolist()
    expected: dict[int, float] = {}
    for group in set(groups):
        valid = [i for i in range(40) if groups[i] == group and not math.isnan(float(scores[i]))]
        if len({float(scores[i]) for i in valid}) > 1:
            expected[max(valid, key=lambda i: float(scores[i]))] = 1.0
            expected[min(valid, key=lambda i: float(scores[i]))] = 0.0
    assert members(BestWorst()(rollout(scores.tolist(), groups))) == expected


def test_another_column() -> None:
    win = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.2])
    assert members(BestWorst("win")(rollout(win=win))) == {0: 0.0, 7: 1.0, 1: 0.0, 6: 1.0, 8: 1.0, 9: 0.0}
    assert BestWorst("win").needs == {"win"}


def test_nothing_is_left_where_all_are_equal() -> None:
    for part in (BestWorst(), Ranked()):
        assert part(rollout([0.5] * 10)).n_trajectories == 0


def test_a_ranked_group_keeps_every_valid_member() -> None:
    made = Ranked()(rollout())
    expected = {0: 0.5, 3: 0.9, 7: -0.2, 1: 1.0, 5: 0.0, 6: 1.0}
    assert members(made) == pytest.approx(expected)
    # Both best ones of a group are to be imitated.
    assert {p for p, c in zip(made["place"].tolist(), made["mask/chosen"].tolist(), strict=True) if c} == {1, 3, 6}


def test_the_best_must_be_good_enough() -> None:
    assert members(Best()(rollout())) == {1: 1.0, 3: 1.0, 4: 1.0, 8: 1.0}
    assert members(Best(above=0.95)(rollout())) == {1: 1.0, 4: 1.0}


def test_what_can_be_imitated() -> None:
    labels = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.5, 0.5, NAN, 0.2])
    made = Rollout.from_arrays(torch.arange(8), [0, 0, 1, 2, 3, 3, 4, 4])
    mask = torch.tensor([True] * 7 + [False])
    found = with_labels(made.with_columns(step={"mask": mask}), labels)
    assert found["mask/chosen"].tolist() == [True, False, False, True, True, True, False, False]


def test_a_random_pair_is_the_first_two_valid_members() -> None:
    part = RandomPair(certain=True, scale=1.0)
    # Group 1: members 0 and 3; group 0: 1 and 5; group 3 is a tie, which says nothing.
    assert members(part(rollout())) == {0: 0.0, 3: 1.0, 1: 1.0, 5: 0.0}


def test_labels_of_random_pairs_follow_the_preference() -> None:
    count, gap, scale = 4000, 0.7, 1.5
    groups = [g for g in range(count) for _ in range(2)]
    part = RandomPair(scale=scale)
    made = part(rollout([gap, 0.0] * count, groups))
    share = float(made["label"][made["place"] % 2 == 0].mean())
    chance = 1 / (1 + math.exp(-scale * gap))
    assert abs(share - chance) < 4 * math.sqrt(chance * (1 - chance) / count)
    assert bool((made["label"].view(-1, 2).sum(1) == 1).all())
    again = part(rollout([gap, 0.0] * count, groups))
    assert not torch.equal(again["label"], made["label"])
    repeated = RandomPair(scale=scale)
    assert torch.equal(repeated(rollout([gap, 0.0] * count, groups))["label"], made["label"])
    resumed = RandomPair(scale=scale)
    resumed.load_state_dict({"batches": 1})
    assert torch.equal(resumed(rollout([gap, 0.0] * count, groups))["label"], again["label"])


def test_a_judges_table_is_looked_up_by_member() -> None:
    """Row i of ``beats`` is against the members of its group in the order that the judge saw."""
    beats = torch.tensor(
        [[0.5, 0.1, 1.0], [0.9, 0.5, 0.2], [0.0, 0.8, 0.5], [NAN] * 3, [0.5, 1.0, NAN], [0.0, 0.5, NAN]]
    )
    made = rollout([0.0] * 6, [0, 0, 0, 1, 1, 1], beats=beats, member=torch.tensor([0, 1, 2, 2, 0, 1]))
    found = RandomPair(column="beats", certain=True)(made)
    assert members(found) == {0: 0.0, 1: 1.0, 4: 1.0, 5: 0.0}
    assert members(RandomPair(column="beats", certain=True)(made.select(torch.tensor([2, 0])))) == {2: 0.0, 0: 1.0}

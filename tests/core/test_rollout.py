"""The data that every method sees, against loops over trajectories and groups."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

import jaxtyping
import numpy as np
import pytest
import torch
from torch import Tensor

from polopt.core import segments
from polopt.core.rollout import Counts, MissingColumn, Rollout
from tests.support import f64, same

NAN = float("nan")


@dataclasses.dataclass(frozen=True)
class Names:
    """A payload: one string per trajectory."""

    names: tuple[str, ...]

    def select(self, trajectories: Tensor) -> Self:
        return type(self)(tuple(self.names[i] for i in trajectories.tolist()))

    def concat(self, others: Sequence[Self]) -> Self:
        return type(self)(self.names + tuple(name for other in others for name in other.names))


def sample(seed: int = 0, **step: Any) -> Rollout:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([3, 1, 4, 2, 2])
    ids = torch.arange(5).repeat_interleave(lengths)
    return Rollout.from_arrays(
        ids,
        [1, 0, 1, 2, 0],
        step={"logp": -torch.rand(12, generator=generator, dtype=torch.float64), "place": torch.arange(12), **step},
        trajectories={"reward": torch.randn(5, generator=generator, dtype=torch.float64), "who": torch.arange(5)},
        groups={"level": f64([10, 11, 12])},
        payload=Names(("a", "b", "c", "d", "e")),
    )


# --- construction ---------------------------------------------------------------------------------------------------


def test_sizes_and_index_columns() -> None:
    rollout = sample()
    assert (rollout.n_steps, rollout.n_trajectories, rollout.n_groups) == (12, 5, 3)
    assert rollout.trajectory.tolist() == [0, 0, 0, 1, 2, 2, 2, 2, 3, 3, 4, 4]
    assert rollout.step_group.tolist() == [1, 1, 1, 0, 1, 1, 1, 1, 2, 2, 0, 0]
    assert rollout.mask.all()
    assert rollout.counts == Counts(12.0, 5.0, 3.0)
    assert rollout.level("logp") == "step"
    assert rollout.level("who") == "trajectory"
    assert rollout.level("level") == "group"
    assert "reward" in rollout
    assert "value" not in rollout
    assert set(rollout.names()) == {"logp", "place", "reward", "who", "level"}


def test_counts_leave_masked_steps_out() -> None:
    mask = torch.ones(12, dtype=torch.bool)
    mask[[0, 3, 11]] = False
    rollout = sample(mask=mask)
    assert rollout.counts == Counts(9.0, 5.0, 3.0)
    same(rollout.active_lengths, [2, 0, 4, 2, 1])


@pytest.mark.parametrize(
    ("ids", "group", "words"),
    [
        ([0, 0, 2], [0, 0, 0], "without gaps"),
        ([1, 1], [0], "without gaps"),
        ([0, 1, 0], [0, 0], "without gaps"),
        ([0, 1], [0, 0, 0], "3 entries of group"),
    ],
)
def test_ids_that_do_not_fit(ids: list[int], group: list[int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Rollout.from_arrays(ids, group)


def test_columns_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"'logp' at level step has shape \(2,\), expected 3 rows"):
        Rollout.from_arrays([0, 0, 1], [0, 0], step={"logp": [0.0, 0.0]})
    with pytest.raises(ValueError, match="'reward' at level trajectory"):
        sample().with_columns(trajectory={"reward": torch.zeros(4)})
    with pytest.raises(ValueError, match="at least one step"):
        Rollout(torch.tensor([1, 0]), torch.tensor([0, 0]))


def test_a_missing_column_is_named() -> None:
    rollout = sample()
    for read in (lambda: rollout["value"], lambda: rollout.level("value"), lambda: rollout.advantage):
        with pytest.raises(MissingColumn, match=r"no column '(value|advantage)'; it has level, logp"):
            read()


def test_the_empty_rollout() -> None:
    empty = sample().select(torch.tensor([], dtype=torch.int64))
    assert (empty.n_steps, empty.n_trajectories, empty.n_groups) == (0, 0, 0)
    assert empty.reward.shape == (0,)
    assert empty.group_mean(empty.reward).shape == (0,)
    assert empty.whiten(empty.logp).shape == (0,)
    assert float(empty.batch_mean(empty.logp)) == 0.0


def test_with_columns_replaces_also_at_another_level() -> None:
    rollout = sample().with_columns(step={"reward": torch.zeros(12)})
    assert rollout.level("reward") == "step"
    assert "reward" not in rollout.columns["trajectory"]
    assert sample().level("reward") == "trajectory"


@pytest.mark.parametrize("seed", range(5))
def test_padding_there_and_back(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(6, 8, generator=generator) > 0.4
    mask[2] = False
    values = torch.randn(6, 8, generator=generator, dtype=torch.float64).requires_grad_()
    rollout = Rollout.from_padded(mask, [0, 0, 1, 1, 2, 0], step={"x": values})
    position = np.arange(1, 9)
    lengths = np.maximum((mask.numpy() * position).max(1), 1)
    assert rollout.lengths.tolist() == lengths.tolist()
    assert rollout.n_trajectories == 6
    start = 0
    for row, length in enumerate(lengths):
        same(rollout["x"][start : start + length].detach(), values[row, :length].detach())
        assert rollout.mask[start : start + length].tolist() == mask[row, :length].tolist()
        start += int(length)
    padded = rollout.pad(rollout["x"], fill=-7.0)
    inside = torch.arange(padded.shape[1])[None] < rollout.lengths[:, None]
    same(padded.detach(), torch.where(inside, values[:, : padded.shape[1]], -7.0).detach())
    padded[inside].square().sum().backward()  # type: ignore[no-untyped-call]
    assert values.grad is not None
    same(values.grad[:, : padded.shape[1]], torch.where(inside, 2 * values.detach()[:, : padded.shape[1]], 0.0))


def test_masks_of_any_dtype() -> None:
    for dtype in (torch.bool, torch.int64, torch.float32):
        rollout = Rollout.from_padded(torch.tensor([[1, 1, 0], [1, 0, 0]]).to(dtype), [0, 0])
        assert rollout.lengths.tolist() == [2, 1]
    with pytest.raises(ValueError, match="'x' has shape"):
        Rollout.from_padded(torch.ones(2, 3, dtype=torch.bool), [0, 0], step={"x": torch.ones(2, 4)})


# --- reductions -----------------------------------------------------------------------------------------------------


def test_spread() -> None:
    rollout = sample()
    same(rollout.spread(rollout["who"]), rollout.trajectory)
    same(rollout.spread(rollout["level"], level="group"), 10 + rollout.step_group)
    same(rollout.spread(rollout.logp), rollout.logp)
    with pytest.raises(ValueError, match="expected 5 trajectory or 12 step values, got 7"):
        rollout.spread(torch.zeros(7))


@pytest.mark.parametrize("seed", range(3))
def test_reductions_against_loops(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(12, generator=generator) > 0.5
    spoilt = torch.randn(12, generator=generator, dtype=torch.float64).masked_fill(~mask, NAN)
    rollout = sample(seed, mask=mask, x=spoilt)
    for i in range(5):
        mine = spoilt[(rollout.trajectory == i) & mask].numpy()
        assert float(rollout.sum_steps(spoilt)[i]) == pytest.approx(mine.sum())
        assert float(rollout.mean_steps(spoilt)[i]) == pytest.approx(mine.mean() if mine.size else 0.0)
        assert float(rollout.at_last_step(spoilt)[i]) == (mine[-1] if mine.size else 0.0)
    same(rollout.batch_mean(spoilt), float(np.nansum(spoilt.numpy()) / max(int(mask.sum()), 1)))


def test_group_statistics_leave_invalid_values_out() -> None:
    rollout = Rollout.from_arrays(range(8), [0, 0, 0, 1, 1, 2, 3, 3])
    values = f64([1.0, NAN, 3.0, NAN, 2.0, NAN, 0.1, 0.1])
    same(rollout.group_mean(values), [2.0, 2.0, 0.0, 0.1])
    same(rollout.group_std(values), [np.sqrt(2), 0.0, 0.0, 0.0])
    same(rollout.group_std(values, unbiased=False), [1.0, 0.0, 0.0, 0.0])
    same(rollout.group_count(values), [2, 1, 0, 2])
    assert rollout.group_center(values).tolist() == [-1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    score = 1 / (np.sqrt(2) + 1e-4)
    same(rollout.group_zscore(values), [-score, 0, score, 0, 0, 0, 0, 0])
    assert (rollout.group_zscore(values, eps=0.0)[3:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e7 + 0.1, -1e-30])
def test_equal_values_centre_to_exactly_zero(value: float, dtype: torch.dtype) -> None:
    rollout = Rollout.from_arrays(range(7), [0, 0, 0, 1, 1, 1, 1])
    values = torch.full((7,), value, dtype=dtype)
    assert (rollout.group_center(values) == 0).all()
    assert (rollout.group_zscore(values) == 0).all()


def test_whitening_steps_and_trajectories() -> None:
    mask = torch.ones(12, dtype=torch.bool)
    mask[[1, 5]] = False
    rollout = sample(mask=mask)
    x = rollout.logp.masked_fill(~mask, NAN)
    kept = rollout.logp[mask]
    expected = torch.zeros(12, dtype=torch.float64)
    expected[mask] = (kept - kept.mean()) / torch.sqrt(kept.var() + 1e-8)
    same(rollout.whiten(x), expected)
    reward = rollout.reward.clone()
    reward[2] = NAN
    valid = torch.tensor([True, True, False, True, True])
    scaled = (reward[valid] - reward[valid].mean()) / reward[valid].std()
    same(rollout.whiten(reward)[valid], scaled, rtol=1e-6)
    assert float(rollout.whiten(reward)[2]) == 0.0
    assert rollout.select(torch.tensor([1])).whiten(f64([3.0])).tolist() == [0.0]


def test_returns_add_the_rewards_of_trainable_steps() -> None:
    mask = torch.ones(12, dtype=torch.bool)
    mask[4] = False
    rollout = sample(mask=mask, step_reward=torch.ones(12, dtype=torch.float64))
    same(rollout.trajectory_return, rollout.reward + f64([3, 1, 3, 2, 2]))
    same(sample().trajectory_return, sample().reward)


# --- select, concat, split ------------------------------------------------------------------------------------------


def test_select_takes_trajectories_in_the_order_asked_for() -> None:
    rollout = sample()
    chosen = rollout.select(torch.tensor([3, 0, 2]))
    assert chosen["who"].tolist() == [3, 0, 2]
    assert chosen["place"].tolist() == [8, 9, 0, 1, 2, 4, 5, 6, 7]
    assert chosen.group.tolist() == [1, 0, 0]  # group 0 is gone, the others keep their order
    assert chosen["level"].tolist() == [11, 12]
    assert chosen.payload == Names(("d", "a", "c"))
    assert chosen.counts == Counts(9.0, 3.0, 2.0)


def test_select_by_mask_and_with_repeats() -> None:
    rollout = sample()
    assert rollout.select(rollout["who"] > 2)["who"].tolist() == [3, 4]
    twice = rollout.select(torch.tensor([1, 1, 4]))
    assert twice["place"].tolist() == [3, 3, 10, 11]
    assert twice.group.tolist() == [0, 0, 0]


def test_select_is_differentiable() -> None:
    leaf = torch.zeros(12, requires_grad=True)
    piece = sample(now=leaf).select(torch.tensor([4, 1]))
    (piece["now"] * f64([1, 2, 3])).sum().backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    assert leaf.grad.tolist() == [0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 1, 2]


def test_concat_keeps_groups_apart() -> None:
    first, second = sample(0), sample(1)
    both = Rollout.concat([first, second])
    assert both.group.tolist() == [1, 0, 1, 2, 0, 4, 3, 4, 5, 3]
    same(both.reward, torch.cat([first.reward, second.reward]))
    same(both.logp, torch.cat([first.logp, second.logp]))
    assert both["level"].tolist() == [10, 11, 12] * 2
    assert both.payload == Names(("a", "b", "c", "d", "e") * 2)
    again = both.select(torch.arange(5, 10))
    assert again.group.tolist() == second.group.tolist()
    same(again.logp, second.logp)


def test_concat_names_the_column_that_is_missing() -> None:
    with pytest.raises(ValueError, match="only one of them has column 'extra'"):
        Rollout.concat([sample(), sample(extra=torch.zeros(12))])


@pytest.mark.parametrize("unit", ["step", "trajectory", "group", "batch"])
@pytest.mark.parametrize("budget", [1, 4, 6, 9, 100])
def test_split(unit: Any, budget: int) -> None:
    rollout = sample()
    cost = [5, 1, 3, 2, 4]
    pieces = rollout.split(unit, cost, budget)
    whole = {"step": [[i] for i in range(5)], "trajectory": [[i] for i in range(5)]}
    whole |= {"group": [[1, 4], [0, 2], [3]], "batch": [list(range(5))]}
    seen = [piece["who"].tolist() for piece in pieces]
    assert sorted(i for piece in seen for i in piece) == list(range(5))
    for unit_members in whole[unit]:
        assert sum(set(unit_members) <= set(piece) for piece in seen) == 1
    for piece, members in zip(pieces, seen, strict=True):
        assert piece.counts == rollout.counts
        alone = any(sorted(members) == m for m in whole[unit])
        assert alone or len(members) * max(cost[i] for i in members) <= budget
    if unit != "batch":
        assert len(rollout.split(unit, cost, 25)) == 1


def test_shares_of_pieces_add_up() -> None:
    mask = torch.ones(12, dtype=torch.bool)
    mask[[0, 7]] = False
    rollout = sample(mask=mask)
    pieces = rollout.split("trajectory", rollout.lengths.tolist(), 3)
    assert len(pieces) > 2
    same(sum(piece.batch_mean(piece.logp) for piece in pieces), rollout.batch_mean(rollout.logp))


def test_a_piece_keeps_its_normalisers_whatever_happens_to_its_columns() -> None:
    rollout = sample()
    piece = rollout.piece(torch.tensor([0])).with_columns(step={"mask": torch.zeros(3, dtype=torch.bool)})
    assert piece.counts == rollout.counts
    assert piece.select(torch.tensor([0])).counts == Counts(0.0, 1.0, 1.0)


def test_shapes_are_checked_at_run_time() -> None:
    """The import hook of the test suite is at work."""
    with pytest.raises(jaxtyping.TypeCheckError):
        segments.segment_sum(torch.zeros(3), torch.zeros(4, dtype=torch.int64), 1)
    with pytest.raises(jaxtyping.TypeCheckError):
        sample().sum_steps(torch.zeros(12, 2))


def test_group_labels_may_be_any_integers() -> None:
    labelled = Rollout.from_arrays([0, 1, 2], [7, -3, 7], trajectories={"reward": [1.0, 2.0, 3.0]})
    assert labelled.group.tolist() == [1, 0, 1]
    assert labelled.counts.groups == 2.0


def test_a_part_with_a_mask_of_its_own_sees_its_steps_and_their_count() -> None:
    mask = torch.tensor([True, False, True, False, True])
    critic = torch.tensor([False, False, True, True, True])
    rollout = Rollout.from_arrays([0, 0, 1, 1, 1], [0, 0], step={"mask": mask, "mask/critic": critic})
    assert rollout.under("mask") is rollout
    seen = rollout.under("mask/critic")
    assert torch.equal(seen.mask, critic) and torch.equal(rollout.mask, mask)
    # Of a piece the counts are those of the whole batch, for both; and again of what is saved.
    piece = Rollout.from_state(rollout.piece(torch.tensor([1])).state_dict())
    assert piece.counts.steps == 3 and piece.under("mask/critic").counts.steps == 3
    assert rollout.select(torch.tensor([1])).under("mask/critic").counts.steps == 3
    one = rollout.select(torch.tensor([0]))
    assert one.counts.steps == 1 and one.under("mask/critic").counts.steps == 0
    with pytest.raises(MissingColumn, match="mask/actor"):
        rollout.under("mask/actor")

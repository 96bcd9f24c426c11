"""The card of D3S: the subset of largest advantage variance, its decisive steps, the schedule, worked example."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from polopt.controllers import LinearSchedule
from polopt.core.errors import UsageError
from polopt.core.override import override
from polopt.core.rollout import Rollout
from polopt.methods.base.grpo import grpo
from polopt.methods.credit.d3s import DualLevel, d3s, most_varied
from tests.support import close, f64, now, same, value_and_gradient, with_advantage

EXAMPLE = [1.5, -0.5, -0.5, -0.5, 0, 0, 0, 0, 0.5, 0.5, 0.5, -1.5]
GROUPS = [0] * 4 + [1] * 4 + [2] * 4
ENTROPY = [0.1, 1.0, 0.5, 0.2] * 6
RATIO = np.linspace(-0.3, 0.3, 24)


def example(advantage: list[float] = EXAMPLE, entropy: list[float] = ENTROPY, **step: object) -> Rollout:
    """Two steps per rollout, old log-prob -1."""
    columns = {"logp": f64([-1.0] * 24), "entropy": f64(entropy), **step}
    rollout = Rollout.from_arrays(
        np.repeat(np.arange(12), 2), GROUPS, step=columns, trajectories={"reward": f64([1.0] * 12)}
    )
    return with_advantage(rollout, advantage)


def masked(part: DualLevel, rollout: Rollout) -> Rollout:
    return rollout.with_columns(step=part(rollout))


def test_worked_example() -> None:
    rollout = example()
    half = DualLevel(rollouts=0.5, steps=0.5)
    assert half.select(rollout).nonzero().flatten().tolist() == [0, 1, 2, 9, 10, 11]
    close(np.var(EXAMPLE), 0.5)
    close(np.var([EXAMPLE[i] for i in (0, 1, 2, 9, 10, 11)]), 0.916667)
    after = masked(half, rollout)
    assert after.mask.nonzero().flatten().tolist() == [1, 2, 5, 21, 22, 23]
    assert after.counts.steps == 6
    loss, gradient = value_and_gradient(d3s, now(-1 + RATIO), after)
    close(loss, 0.513143)
    expected = np.zeros(24)
    expected[[1, 2, 5, 21, 22, 23]] = [-0.190100, 0, 0.070336, 0, 0.328775, 0.337465]
    close(gradient, expected)
    schedule = LinearSchedule({"weight.rollouts": 4}, {"weight.rollouts": 12})
    assert schedule({"progress": 0.5}) == {"weight.rollouts": 8}


@pytest.mark.parametrize("seed", range(6))
def test_the_scan_is_the_best_of_all_subsets(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(9, generator=generator, dtype=torch.float64) + 5
    if seed % 2:
        values = values.round()  # ties
    for count in range(1, 10):
        found = most_varied(values, count)
        assert len(set(found.tolist())) == count
        best = max(np.var(values[list(s)].numpy()) for s in itertools.combinations(range(9), count))
        assert float(values[found].var(correction=0)) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_subsets_of_a_standardised_set_vary_at_least_as_much(seed: int) -> None:
    values = torch.randn(20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values = (values - values.mean()) / values.std(correction=0)
    for count in range(2, 21):
        assert float(values[most_varied(values, count)].var(correction=0)) >= 1 - 1e-12


@pytest.mark.parametrize("scope", ["batch", "query"])
def test_everything_kept_is_the_base_method(scope: str) -> None:
    rollout = example(np.linspace(-2, 1.5, 12).tolist())
    logp = now(-1 + RATIO)
    base = grpo | {"aggregation": d3s.aggregation}
    whole = masked(DualLevel(1.0, 1.0, scope), rollout)  # type: ignore[arg-type]
    found, expected = value_and_gradient(d3s, logp, whole), value_and_gradient(base, logp, rollout)
    assert found[0] == expected[0] and torch.equal(found[1], expected[1])


def test_uninformative_groups_are_left_out_while_others_last() -> None:
    for share, zeros in ((0.25, 0), (0.5, 0), (8 / 12, 0), (0.75, 1)):
        kept = DualLevel(share, 1.0).select(example())
        assert int(kept[4:8].sum()) == zeros
    within = DualLevel(0.5, 1.0, "query").select(example())
    assert [int(within[g : g + 4].sum()) for g in (0, 4, 8)] == [2, 2, 2]
    assert bool(within[0]) and bool(within[11])


def test_within_a_query_is_each_query_by_itself() -> None:
    generator = torch.Generator().manual_seed(1)
    advantage = torch.randn(12, generator=generator, dtype=torch.float64)
    found = DualLevel(0.5, 1.0, "query").select(example(advantage.tolist()))
    for g in range(3):
        alone = most_varied(advantage[4 * g : 4 * g + 4], 2).tolist()
        assert found[4 * g : 4 * g + 4].nonzero().flatten().tolist() == sorted(alone)


@pytest.mark.parametrize("factor", [1e-3, 7.0, 1e4])
def test_the_scale_of_entropy_and_of_credit_does_not_matter(factor: float) -> None:
    generator = torch.Generator().manual_seed(2)
    advantage = torch.randn(12, generator=generator, dtype=torch.float64)
    entropy = torch.rand(24, generator=generator, dtype=torch.float64)
    part = DualLevel(0.5, 0.4)
    expected = part(example(advantage.tolist(), entropy.tolist()))["mask"]
    assert torch.equal(part(example((factor * advantage).tolist(), entropy.tolist()))["mask"], expected)
    assert torch.equal(part(example(advantage.tolist(), (factor * entropy).tolist()))["mask"], expected)


def test_steps_without_entropy_come_last() -> None:
    entropy = [0.0, 0.01] * 12
    advantage = np.linspace(0.1, 1.2, 12).tolist()
    for share in (0.25, 0.5, 0.75):
        kept = DualLevel(1.0, share)(example(advantage, entropy))["mask"].reshape(12, 2)
        count = round(24 * share)
        assert int(kept.sum()) == count
        assert int(kept[:, 1].sum()) == min(count, 12)


def test_all_steps_of_the_selected_rollouts_may_normalise() -> None:
    part = DualLevel(0.5, 0.5, normalizer="all")
    kept, everything = masked(DualLevel(0.5, 0.5), example()), masked(part, example())
    assert everything.counts.steps == 12 and everything.mask.reshape(12, 2)[[0, 1, 2, 9, 10, 11]].all()
    logp = now(-1 + RATIO)
    (loss, gradient), (half, slope) = (value_and_gradient(d3s, logp, r) for r in (kept, everything))
    same(half, loss / 2)
    same(slope, gradient / 2)


def test_only_steps_that_train_are_selected_and_counted() -> None:
    mask = torch.ones(24, dtype=torch.bool)
    mask[[0, 1, 22]] = False  # all of rollout 0, the largest; half of rollout 11
    spoilt = torch.where(mask, f64(ENTROPY), torch.nan)
    part = DualLevel(6 / 11, 0.5)
    found = part(example(mask=mask, entropy=spoilt.tolist()))["mask"]
    assert part.select(example(mask=mask)).nonzero().flatten().tolist() == [1, 2, 8, 9, 10, 11]
    # |A| H of the eleven steps left: .25 .1 | .05 .5 | .05 .5 .25 .1 | .05 .5 | .3; six of them.
    assert int(found.sum()) == 6 and not bool((found & ~mask).any())
    assert found.nonzero().flatten().tolist() == [2, 5, 17, 18, 21, 23]
    nothing = DualLevel()(example(mask=torch.zeros(24, dtype=torch.bool)))["mask"]
    assert not bool(nothing.any())


def test_an_unscored_rollout_teaches_nothing() -> None:
    rollout = example().with_columns(trajectory={"reward": f64([1, 0, 0, 0, 1, 1, 1, 1, 1, 1, 0, torch.nan])})
    credited = (d3s | {"weight": DualLevel(1.0, 1.0)}).credit(rollout)
    loss, gradient = value_and_gradient(d3s, now(-1 + RATIO), credited)
    assert not bool(gradient[22:].any()) and bool(gradient[:4].any()) and np.isfinite(loss)


def test_a_per_step_advantage_is_judged_by_its_mean_and_by_itself() -> None:
    steps = f64(np.stack([EXAMPLE, np.zeros(12)], 1).reshape(-1))  # all credit on the first step of each rollout
    rollout = example().with_columns(step={"advantage": steps})
    part = DualLevel(0.5, 0.25)
    assert part.select(rollout).nonzero().flatten().tolist() == [0, 1, 2, 9, 10, 11]
    # The keys: |A| H of first steps is .15 .25 .05 .25 .05 .75 in turn.
    assert part(rollout)["mask"].nonzero().flatten().tolist() == [2, 18, 22]


def test_the_schedule_is_linear_and_reaches_the_method() -> None:
    control = d3s.controller
    assert control({}) == control({"progress": 0.0}) == {"weight.rollouts": 0.25, "weight.steps": 0.2}
    assert control({"progress": 1.0}) == {"weight.rollouts": 0.75, "weight.steps": 0.8}
    for p in (0.1, 0.5, 0.9):
        close(list(control({"progress": p}).values()), [0.25 + 0.5 * p, 0.2 + 0.6 * p], digits=12)
    made = override(d3s, control({"progress": 0.5}))
    assert (made.weight.rollouts, made.weight.steps) == (0.5, 0.5)
    assert override(d3s, control({})).weight == d3s.weight


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5])
def test_a_share_outside_its_range_is_refused(share: float) -> None:
    with pytest.raises(UsageError, match=r"shares in \(0, 1\]"):
        DualLevel(rollouts=share)
    with pytest.raises(UsageError, match=r"shares in \(0, 1\]"):
        DualLevel(steps=share)

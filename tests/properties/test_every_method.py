"""What must hold for every registered method, whatever its parts; no method is chosen or skipped by name."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from polopt.core.errors import UsageError
from polopt.core.example import Example
from polopt.core.loss import Evaluation
from polopt.core.method import Method
from polopt.core.part import flatten
from polopt.core.rollout import Rollout
from polopt.methods import methods
from tests.support import (
    LAYOUTS,
    MIXED,
    NOW,
    Layout,
    Outcome,
    batch,
    evaluated,
    flow,
    live,
    needed,
    outcome,
    same,
    stop_gradients,
)

# The same mixture of groups with an invalid reward and without a fully masked trajectory.
DENSE = dataclasses.replace(MIXED, masked=(0, 6, 16), invalid=(5,))
EVERY = [pytest.param(method, id=slug) for slug, method in methods().items()]
every_method = pytest.mark.parametrize("method", EVERY)


def agree(actual: Outcome, expected: Outcome) -> None:
    same(actual.loss, expected.loss)
    for name, gradient in expected.gradient.items():
        same(actual.gradient[name], gradient)
    assert set(actual.metrics) == set(expected.metrics)
    for name, value in expected.metrics.items():
        # Metrics may be shares in float32.
        same(actual.metrics[name], value, rtol=1e-5, atol=1e-6)


@every_method
@pytest.mark.parametrize("layout", [pytest.param(layout, id=name) for name, layout in LAYOUTS.items()])
def test_loss_and_gradient_are_finite(method: Method, layout: Layout) -> None:
    result = outcome(method, flow(method, batch(method, layout)))
    assert torch.isfinite(result.loss)
    for name, gradient in result.gradient.items():
        assert torch.isfinite(gradient).all(), name
    for name, value in result.metrics.items():
        assert torch.isfinite(value), name


@every_method
@pytest.mark.parametrize("layout", ["mixed", "invalid rewards", "all rewards invalid", "equal rewards"])
def test_the_filter_leaves_a_batch_that_trains(method: Method, layout: str) -> None:
    fresh = method.clone()
    rollout = fresh.shape_reward(batch(method, LAYOUTS[layout]))
    kept = rollout if fresh.filter is None else fresh.filter(rollout)
    assert kept.n_trajectories <= rollout.n_trajectories
    result = outcome(method, fresh.credit(kept))
    assert torch.isfinite(result.loss)
    assert all(torch.isfinite(gradient).all() for gradient in result.gradient.values())


@every_method
@pytest.mark.parametrize("budget", [1, 9, 10_000])
def test_micro_batches_add_up(method: Method, budget: int) -> None:
    rollout = flow(method, batch(method))
    cost = (rollout.lengths + 2).tolist()
    index = rollout.with_columns(trajectory={"place": torch.arange(rollout.n_trajectories)})
    pieces = [piece["place"] for piece in index.split(method.unit, cost, budget)]
    assert sorted(torch.cat(pieces).tolist()) == list(range(rollout.n_trajectories))
    if method.unit in ("step", "trajectory"):
        assert len(pieces) == {1: 8, 10_000: 1}.get(budget, len(pieces))
    agree(outcome(method, rollout, pieces), outcome(method, rollout))


@every_method
def test_order_does_not_matter(method: Method) -> None:
    rollout = batch(method, dataclasses.replace(MIXED, invalid=(5,)))
    order = torch.tensor([6, 2, 0, 7, 3, 5, 1, 4])
    labels = torch.tensor([2, 0, 1])
    moved = rollout.with_columns(step={"place": torch.arange(rollout.n_steps)}).select(order)
    relabelled = Rollout(moved.lengths, labels[moved.group], moved.columns)
    expected, actual = outcome(method, flow(method, rollout)), outcome(method, flow(method, relabelled))
    back = torch.argsort(moved["place"])
    agree(dataclasses.replace(actual, gradient={n: g[back] for n, g in actual.gradient.items()}), expected)


@every_method
@pytest.mark.parametrize("extra", [0, 1, 7])
def test_padding_does_not_matter(method: Method, extra: int) -> None:
    rollout = batch(method, dataclasses.replace(MIXED, invalid=(5,)))

    def padded(values: Tensor) -> Tensor:
        matrix = rollout.pad(values)
        # What padding holds is anything but zero.
        matrix = matrix.masked_fill(rollout.pad(torch.ones_like(values)) == 0, 1)
        return torch.cat([matrix, matrix.new_ones(len(matrix), extra, *values.shape[1:])], dim=1)

    columns = {name: padded(value) for name, value in rollout.columns["step"].items() if name != "mask"}
    mask = torch.nn.functional.pad(rollout.pad(rollout.mask.long()), (0, extra))
    packed = Rollout.from_padded(mask, rollout.group, step=columns, trajectories=rollout.columns["trajectory"])
    expected, actual = outcome(method, flow(method, rollout)), outcome(method, flow(method, packed))
    trimmed = {}
    for name, gradient in actual.gradient.items():
        matrix = packed.pad(gradient)
        matrix = torch.nn.functional.pad(matrix, (0, int(rollout.lengths.max()) - matrix.shape[1]))
        trimmed[name] = matrix[rollout.pad(torch.ones(rollout.n_steps)) > 0]
    agree(dataclasses.replace(actual, gradient=trimmed), expected)


@every_method
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, -1e30])
def test_masked_steps_do_not_matter(method: Method, garbage: float) -> None:
    rollout = batch(method, dataclasses.replace(MIXED, invalid=(5,)))
    spoilt = rollout.with_columns(
        step={
            name: value.masked_fill(~rollout.mask.view(-1, *[1] * (value.ndim - 1)), garbage)
            for name, value in rollout.columns["step"].items()
            if value.is_floating_point()
        }
    )
    expected, actual = outcome(method, flow(method, rollout)), outcome(method, flow(method, spoilt))
    agree(actual, expected)
    for name, gradient in actual.gradient.items():
        assert (gradient[~rollout.mask] == 0).all(), name


@every_method
@pytest.mark.parametrize("seed", [1, 2])
def test_gradient_is_that_of_finite_differences(method: Method, seed: int) -> None:
    rollout, leaves = live(flow(method, batch(method, DENSE, seed)))
    tape: list[Tensor] = []
    with stop_gradients(tape, replay=False):
        loss, _ = method.loss(evaluated(rollout), rollout)
    gradient = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    generator = torch.Generator().manual_seed(seed)
    width = 1e-6

    def moved(directions: list[Tensor], by: float) -> float:
        points = {n: v.detach() + by * d for (n, v), d in zip(leaves.items(), directions, strict=True)}
        there = rollout.with_columns(step=points)
        with stop_gradients(tape, replay=True):
            return float(method.loss(evaluated(there), there)[0])

    scale = math.sqrt(sum(float(g.square().sum()) for g in gradient))
    for _ in range(3):
        ways = [torch.randn(v.shape, generator=generator, dtype=torch.float64) for v in leaves.values()]
        numeric = (moved(ways, width) - moved(ways, -width)) / (2 * width)
        exact = sum(float((g * d).sum()) for g, d in zip(gradient, ways, strict=True))
        assert exact == pytest.approx(numeric, rel=1e-5, abs=1e-6 * scale + 1e-9)


@every_method
def test_the_gradient_vanishes_with_what_the_method_says(method: Method) -> None:
    rollout = flow(method, batch(method, DENSE))
    column = method.vanishes_with
    if column is None:
        if "advantage" in rollout:
            still = outcome(method, rollout.with_columns(step={"advantage": torch.zeros_like(rollout.advantage)}))
            assert any((g != 0).any() for g in still.gradient.values()), "it could say vanishes_with = 'advantage'"
        return
    nothing = outcome(method, rollout.with_columns(step={column: torch.zeros_like(rollout[column])}))
    assert all((g == 0).all() for g in nothing.gradient.values())
    # Also for one trajectory, or one group where the unit is the group; the others still learn.
    silent = (rollout.trajectory == 5) if method.unit != "group" else (rollout.step_group == int(rollout.group[5]))
    part = outcome(method, rollout.with_columns(step={column: rollout[column].masked_fill(silent, 0.0)}))
    assert all((g[silent] == 0).all() for g in part.gradient.values())
    assert any((g[~silent] != 0).any() for g in part.gradient.values())


@every_method
def test_an_invalid_reward_teaches_nothing(method: Method) -> None:
    rollout = flow(method, batch(method, DENSE))
    if "advantage" not in rollout:
        pytest.skip("the method has no advantage")
    ours = rollout.trajectory == DENSE.invalid[0]
    assert (rollout.advantage[ours] == 0).all()
    assert (rollout.advantage[~ours] != 0).any()


@every_method
def test_the_first_update_is_the_policy_gradient(method: Method) -> None:
    if method.vanishes_with != "advantage":
        pytest.skip("the loss is more than a credited surrogate")
    rollout = flow(method, batch(method, DENSE, on_policy=True))
    result = outcome(method, rollout)
    plain, leaves = live(rollout)
    logp = leaves[f"{NOW}logp"]
    surrogate = torch.where(plain.mask, -plain.advantage * plain.weight * logp, 0.0)
    (expected,) = torch.autograd.grad(method.aggregation(surrogate, plain), logp)
    same(result.gradient[f"{NOW}logp"], expected)
    assert (expected != 0).any()


# --- declarations and state ------------------------------------------------------------------------------------------


@every_method
def test_a_missing_column_is_named_with_its_part(method: Method) -> None:
    method.check(method.needs)
    for column in method.needs:
        stem = column.removesuffix("*") if column.endswith("/*") else None
        covers = {f"{column.rpartition('/')[0]}/*", column}
        without = frozenset(n for n in method.needs if n not in covers and not (stem and n.startswith(stem)))
        members = [m for slot in method.slots().values() for m in flatten(slot) if column in getattr(m, "needs", ())]
        with pytest.raises(UsageError) as error:
            method.check(without)
        assert repr(column) in str(error.value)
        assert any(member.name in str(error.value) for member in members)


@every_method
def test_nothing_is_needed_that_no_part_reads(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    """A column asked for in vain costs a forward pass or a model."""
    read: set[str] = set()
    plain = Rollout.__getitem__

    def watched(rollout: Rollout, name: str) -> Tensor:
        read.add(name)
        return plain(rollout, name)

    rollout = batch(method, DENSE)
    monkeypatch.setattr(Rollout, "__getitem__", watched)
    fresh = method.clone()
    shaped = fresh.shape_reward(rollout)
    if fresh.filter is not None:
        fresh.filter(shaped)
    credited = fresh.credit(shaped)
    # The evaluation is put together here, so that its columns do not count as read.
    evaluation = Evaluation({n.removeprefix(NOW): plain(credited, n) for n in credited.names() if n.startswith(NOW)})
    fresh.loss(evaluation, credited)
    wanted = {name for name in method.needs if not name.endswith("/*")}
    assert wanted <= read, f"needed and never read: {sorted(wanted - read)}"


def exercise(method: Method, seed: int, generator: torch.Generator) -> list[Any]:
    """One iteration as the parts with state see it, and what came out of them."""
    pool = [Example(str(i), "prompt") for i in range(7)]
    requests = method.curriculum(pool, prompts=3, group=2, generator=generator)
    rollout = method.credit(method.shape_reward(batch(method, DENSE, seed)))
    result = outcome(method, rollout)
    out: list[Any] = [[r.example.id for r in requests], rollout.advantage if "advantage" in rollout else None]
    out += [result.loss, list(result.gradient.values())]
    if method.controller is not None:
        statistics = {"kl": 1.0 + seed, "entropy": 0.5 + seed, "trajectories": 8.0, "ess": 0.5}
        out += [m(statistics) for m in flatten(method.controller)]
    return out


def through_disk(state: Any) -> Any:
    """State as a checkpoint holds it: JSON, with tensors beside it."""
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, Mapping):
        assert all(isinstance(key, str) for key in state), f"keys must be strings: {list(state)}"
        return {key: through_disk(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [through_disk(value) for value in state]
    return json.loads(json.dumps(state, allow_nan=False))


def identical(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and a.keys() == b.keys() and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(identical, a, b))
    return bool(a == b)


@every_method
def test_state_resumes_exactly(method: Method) -> None:
    running, generator = method.clone(), torch.Generator().manual_seed(0)
    for seed in range(2):
        exercise(running, seed, generator)
    saved, noise = through_disk(running.state_dict()), generator.get_state()
    expected = [exercise(running, seed, generator) for seed in range(2, 5)]
    resumed, generator = method.clone(), torch.Generator()
    resumed.load_state_dict(saved)
    generator.set_state(noise)
    actual = [exercise(resumed, seed, generator) for seed in range(2, 5)]
    assert identical(actual, expected)


@every_method
def test_a_run_leaves_the_registered_method_alone(method: Method) -> None:
    before = through_disk(method.state_dict())
    exercise(method.clone(), 0, torch.Generator().manual_seed(0))
    assert identical(through_disk(method.state_dict()), before)


@every_method
def test_needs_can_be_synthesised(method: Method) -> None:
    """The batch that these tests run on has what the method needs."""
    rollout = batch(method)
    for name in needed(method):
        assert any(n == name or (name.endswith("/*") and n.startswith(name[:-1])) for n in rollout.names()), name

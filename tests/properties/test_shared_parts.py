"""Advantages that many methods share, against plain loops; which credit may look beyond its group; which way a ratio
that has moved is pulled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from polopt.core.method import Method
from polopt.core.part import flatten
from polopt.methods import methods
from tests.support import MIXED, NOW, batch, flow, outcome, same

DENSE = dataclasses.replace(MIXED, masked=(0, 6, 16), invalid=(5,))
EVERY = [pytest.param(method, id=slug) for slug, method in methods().items()]

Loop = Callable[[Any, list[float], int], float]
"""Advantage of one trajectory, from its part, the valid returns of its group and its place among them."""


def centred(part: Any, returns: list[float], place: int) -> float:
    return returns[place] - float(np.mean(returns))


def zscore(part: Any, returns: list[float], place: int) -> float:
    if len(returns) < 2:
        return 0.0
    deviation = float(np.std(returns, ddof=1 if part.unbiased else 0))
    return centred(part, returns, place) / (deviation + part.eps)


def leave_one_out(part: Any, returns: list[float], place: int) -> float:
    others = returns[:place] + returns[place + 1 :]
    return returns[place] - float(np.mean(others)) if others else 0.0


LOOPS: dict[str, Loop] = {"group-center": centred, "group-zscore": zscore, "leave-one-out": leave_one_out}


@pytest.mark.parametrize("method", EVERY)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_shared_advantage_is_what_a_loop_says(method: Method, seed: int) -> None:
    loop = LOOPS.get(getattr(method.advantage, "name", ""))
    if loop is None:
        pytest.skip("the advantage is the method's own")
    rollout = flow(method, batch(method, DENSE, seed))
    returns, groups = rollout.trajectory_return.tolist(), rollout.group.tolist()
    expected = []
    for i in range(rollout.n_trajectories):
        mine = [j for j in range(rollout.n_trajectories) if groups[j] == groups[i] and not np.isnan(returns[j])]
        expected.append(loop(method.advantage, [returns[j] for j in mine], mine.index(i)) if i in mine else 0.0)
    actual = rollout.mean_steps(rollout.advantage)
    trains = rollout.active_lengths > 0
    same(actual[trains], torch.tensor(expected)[trains], rtol=1e-6, atol=1e-6)
    assert any(value != 0 for value in expected)


@pytest.mark.parametrize("method", EVERY)
def test_credit_stays_in_its_group_where_it_should(method: Method) -> None:
    """The credit of a group is the same without the groups beside it."""
    rollout = batch(method, DENSE)
    if "advantage" not in flow(method, rollout):
        pytest.skip("the method has no advantage")
    members = (*flatten(method.reward), *flatten(method.advantage), *flatten(method.weight))
    crosses = any(getattr(member, "unit", "step") == "batch" for member in members)
    together = flow(method, rollout)
    differs = False
    for group in range(rollout.n_groups):
        alone = flow(method, rollout.select(rollout.group == group))
        mine = together.step_group == group
        for name in ("advantage", "weight"):
            if name in together:
                differs |= not torch.allclose(together[name][mine], alone[name], rtol=1e-6, atol=1e-7)
    assert differs == crosses


@pytest.mark.parametrize("method", EVERY)
@pytest.mark.parametrize("move", [0.3, 1.0])
def test_a_step_that_moved_against_its_advantage_is_corrected(method: Method, move: float) -> None:
    """Whatever bounds the ratio, it binds on the side that the advantage asks for: good steps that fell and bad ones
    that rose keep their gradient, towards the advantage."""
    if method.vanishes_with != "advantage":
        pytest.skip("the loss is more than a credited surrogate")
    rollout = flow(method, batch(method, DENSE, on_policy=True))
    logp = rollout[f"{NOW}logp"]
    rollout = rollout.with_columns(step={f"{NOW}logp": logp - move * rollout.advantage.sign()})
    slope = outcome(method, rollout).gradient[f"{NOW}logp"]
    trains = rollout.mask & (rollout.advantage * rollout.weight != 0)
    assert (slope * rollout.advantage)[trains].max() < 0

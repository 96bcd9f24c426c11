"""Groups: the policy's samples for each request, with what the curriculum attached to it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from polopt.core.errors import UsageError
from polopt.core.example import Example
from polopt.core.policy import Request
from polopt.policies.exact import ExactPolicy, SequenceSpace
from polopt.rollouts.groups import Groups

ASKED = [
    Request(Example("1", "a"), 2, columns={"baseline": 0.1, "n": 3}),
    Request(Example("0", "b"), 0, columns={"other": 9.0}),  # asks for nothing, so that nothing is wrong with it
    Request(Example("0", "b"), 1, columns={"n": 5.0, "baseline": 1 / 3}),
    Request(Example("1", "c"), 3, columns={"baseline": -2.0, "n": 0.0}),
]


def policy(dtype: torch.dtype = torch.float64) -> ExactPolicy:
    return ExactPolicy(SequenceSpace(3, 2), 2, dtype=dtype)


def sample(requests: list[Request], made: Any = None) -> Any:
    return Groups()(made or policy(), requests, limit=2, seed=0)


def test_what_a_request_carries_is_a_column_of_its_trajectories() -> None:
    rollout = sample(ASKED)
    assert rollout.level("baseline") == rollout.level("n") == "trajectory"
    assert rollout["baseline"].tolist() == [0.1, 0.1, 1 / 3, -2.0, -2.0, -2.0]
    assert rollout["n"].tolist() == [3, 3, 5, 0, 0, 0]
    assert "other" not in rollout
    assert rollout["limit"].tolist() == [2] * 6
    assert [example.id for example in rollout.examples] == ["1", "1", "0", "1", "1", "1"]


def test_in_the_precision_of_the_policy() -> None:
    assert sample(ASKED)["baseline"].dtype == torch.float64
    assert sample(ASKED, policy(torch.float32))["baseline"].dtype == torch.float32


def test_nothing_attached_nothing_added() -> None:
    plain = [replace(request, columns={}) for request in ASKED]
    assert set(sample(plain).names()) == set(sample(ASKED).names()) - {"baseline", "n"}


@pytest.mark.parametrize("odd", [{}, {"baseline": 1.0}, {"baseline": 1.0, "n": 2.0, "more": 1.0}])
def test_requests_with_different_columns_are_an_error(odd: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=r"same columns: of examples '1' and '0' only one has '(baseline|n|more)'"):
        sample([ASKED[0], replace(ASKED[2], columns=odd)])

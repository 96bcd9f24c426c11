"""The harness finds faults: each of six, planted in a copy of a part, fails some check that the original passes."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from inspect import signature
from typing import Any

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from polopt.advantages.group import GroupCenter, GroupZScore
from polopt.aggregations import TokenMean
from polopt.core.loss import Evaluation, Loss, per_step
from polopt.core.method import Method
from polopt.core.rollout import Rollout
from polopt.methods import get_method
from polopt.methods.base.gspo import GeometricSequenceSurrogate
from polopt.objectives.clipped_surrogate import ClippedSurrogate
from polopt.objectives.ratio import log_ratio
from tests.properties import test_every_method, test_shared_parts


def checks() -> Iterator[tuple[str, Callable[[Method], None]]]:
    """Every test of the harness that takes a method, once per case of its other parameters."""
    for module in (test_every_method, test_shared_parts):
        for name, function in vars(module).items():
            marks = [mark for mark in getattr(function, "pytestmark", ()) if mark.name == "parametrize"]
            if not name.startswith("test_") or "method" not in {mark.args[0] for mark in marks}:
                continue
            others = [mark for mark in marks if mark.args[0] != "method"]
            for values in itertools.product(*(mark.args[1] for mark in others)):
                arguments = {
                    mark.args[0]: getattr(value, "values", (value,))[0]
                    for mark, value in zip(others, values, strict=True)
                }

                def check(method: Method, function: Any = function, arguments: Any = arguments) -> None:
                    with pytest.MonkeyPatch.context() as patch:
                        fixtures = {"monkeypatch": patch} if "monkeypatch" in signature(function).parameters else {}
                        function(method=method, **arguments, **fixtures)

                yield name.removeprefix("test_"), check


def findings(method: Method) -> set[str]:
    """Names of the checks that the method fails."""
    found = set()
    for name, check in checks():
        try:
            check(method)
        except pytest.skip.Exception:
            continue
        except Exception:
            # A part that breaks down is found as well as one that computes something else.
            found.add(name)
    return found


@dataclasses.dataclass(frozen=True)
class SwappedStd(GroupZScore):
    """The population's standard deviation where the sample's is meant, and the other way round."""

    def __call__(self, rollout: Rollout) -> Float[Tensor, " trajectory"]:
        return rollout.group_zscore(rollout.trajectory_return, eps=self.eps, unbiased=not self.unbiased)


@dataclasses.dataclass(frozen=True)
class MissingMask(GeometricSequenceSurrogate):
    """The mean log-ratio of a response counts steps that the policy did not choose."""

    def __call__(self, evaluation: Evaluation, rollout: Rollout) -> Loss:
        everywhere = rollout.with_columns(step={"mask": torch.ones_like(rollout.mask)})
        return super().__call__(evaluation, everywhere)


@dataclasses.dataclass(frozen=True)
class MicroBatchMean(TokenMean):
    """Divides by the steps at hand instead of those of the whole batch."""

    def __call__(self, losses: Float[Tensor, " step"], rollout: Rollout) -> Float[Tensor, ""]:
        return losses.sum() / rollout.mask.sum().clamp_min(1)


@dataclasses.dataclass(frozen=True)
class WrongSignOfClip(ClippedSurrogate):
    """The better of the clipped and the unclipped gain instead of the worse."""

    def __call__(self, evaluation: Evaluation, rollout: Rollout) -> Loss:
        ratio = log_ratio(evaluation, rollout).exp()
        clipped = ratio.clamp(1 - self.low, 1 + self.high)
        return per_step(-torch.maximum(ratio * rollout.advantage, clipped * rollout.advantage))


@dataclasses.dataclass(frozen=True)
class LeakAcrossGroups(GroupCenter):
    """Takes the mean of the next group."""

    def __call__(self, rollout: Rollout) -> Float[Tensor, " trajectory"]:
        returns = rollout.trajectory_return
        return (returns - rollout.group_mean(returns).roll(-1)[rollout.group]).nan_to_num(0.0)


@dataclasses.dataclass(frozen=True)
class DetachedRatio(ClippedSurrogate):
    """The right loss, whose gradient is nothing."""

    def __call__(self, evaluation: Evaluation, rollout: Rollout) -> Loss:
        stopped = Evaluation({name: value.detach() for name, value in evaluation.columns.items()})
        loss = super().__call__(stopped, rollout)
        return dataclasses.replace(loss, value=loss.value + 0 * evaluation.logp)


MUTATIONS = {
    "swapped std": ("grpo", "advantage", SwappedStd(), "a_shared_advantage_is_what_a_loop_says"),
    "missing mask": ("gspo", "objective", MissingMask(), "masked_steps_do_not_matter"),
    "micro-batch mean": ("cispo", "aggregation", MicroBatchMean(), "micro_batches_add_up"),
    "wrong sign of clip": (
        "grpo",
        "objective",
        WrongSignOfClip(),
        "a_step_that_moved_against_its_advantage_is_corrected",
    ),
    "reward leak across groups": (
        "dr-grpo",
        "advantage",
        LeakAcrossGroups(),
        "credit_stays_in_its_group_where_it_should",
    ),
    "detached ratio": ("grpo", "objective", DetachedRatio(), "the_first_update_is_the_policy_gradient"),
}


@pytest.mark.parametrize("slug", sorted({slug for slug, *_ in MUTATIONS.values()}))
def test_the_originals_pass(slug: str) -> None:
    assert findings(get_method(slug)) == set()


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutation_is_found(mutation: str) -> None:
    slug, slot, part, finder = MUTATIONS[mutation]
    assert finder in findings(get_method(slug) | {slot: part})

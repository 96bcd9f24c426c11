"""A step that is tried out and taken back, and one that is shortened by what it would have moved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch.nn import Parameter

from polopt.core.rollout import Rollout
from polopt.policies.exact import SequenceSpace, kl
from polopt.tasks.problems import problem
from polopt.training.profile import Profiler
from polopt.training.update import BatchStep
from polopt.updates.kl_scaled import KLScaled
from tests.support import same
from tests.training.conftest import CountingPolicy, collected, make_step, short


@dataclass
class FakeStep:
    """A step whose preview is given."""

    kl: float
    gradients: list[float]
    finite: bool = True
    scales: list[float] = field(default_factory=list)
    chunk_square_norms: Sequence[float] = ()

    def __post_init__(self) -> None:
        self.parameters = [Parameter(torch.zeros(len(self.gradients), dtype=torch.float64))]

    def gradient(self, chunks: int = 1) -> dict[str, float]:
        if self.gradients:
            self.parameters[0].grad = torch.tensor(self.gradients, dtype=torch.float64)
        return {"loss": 1.0}

    def preview(self) -> float:
        return self.kl

    def apply(self, scale: float = 1.0) -> None:
        self.scales.append(scale)

    def reject(self, reason: str) -> None:
        self.finite = False


@pytest.mark.parametrize(("kl", "scale"), [(2.0, 0.25), (0.5, 1.0), (0.1, 1.0), (0.0, 1.0)])
def test_worked_example_of_the_scale(kl: float, scale: float) -> None:
    step = FakeStep(kl, [3.0, 4.0])
    metrics = KLScaled()(step)  # type: ignore[arg-type]
    assert step.scales == [scale] and metrics["update/rate_share"] == scale and metrics["update/preview_kl"] == kl
    assert metrics["grad_norm"] == pytest.approx(5.0)
    grad = step.parameters[0].grad
    assert grad is not None
    same(grad, [0.6, 0.8], rtol=1e-5)  # clipped before the preview


def test_what_is_not_finite_moves_nothing() -> None:
    broken = FakeStep(1.0, [math.nan])
    KLScaled()(broken)  # type: ignore[arg-type]
    assert broken.scales == [] and not broken.finite
    rejected = FakeStep(1.0, [1.0], finite=False)
    assert KLScaled()(rejected) == {"loss": 1.0} and rejected.scales == []  # type: ignore[arg-type]


def state(step: BatchStep) -> list[torch.Tensor]:
    """Parameters, gradients and moments."""
    moments = [v for values in step.optimizer.state_dict()["state"].values() for v in values.values()]
    found = [*step.parameters, *(p.grad for p in step.parameters if p.grad is not None), *moments]
    return [value.detach().clone() for value in found]


@pytest.mark.parametrize("steps", [0, 2])
def test_a_preview_changes_nothing_and_tells_what_a_step_does(policy: CountingPolicy, steps: int) -> None:
    batch = short("grpo").credit(collected(short("grpo"), policy))
    step = make_step(policy, short("grpo"), batch, 10_000)
    for _ in range(steps):
        step.gradient()
        step.apply()
    step.gradient()
    before, version = state(step), policy.version
    found = step.preview()
    after = state(step)
    assert len(before) == len(after) and all(map(torch.equal, before, after)) and policy.version == version
    old = policy.evaluate(batch, frozenset({"logp"})).logp.detach()
    step.apply()
    gap = (policy.evaluate(batch, frozenset({"logp"})).logp.detach() - old)[batch.mask]
    assert found == pytest.approx(float((gap.exp() - gap - 1).mean()), rel=1e-2, abs=1e-7) and found > 0


def test_the_preview_estimates_the_kl_of_the_step() -> None:
    """Of one-token sequences in proportion to their chance: the estimate is then the exact KL."""
    made = problem("random-rewards", space=SequenceSpace(3, 1), seed=0, spread=0.0)
    policy = made.policy()
    before = policy.probabilities().detach()
    rollout = policy.rollout(torch.zeros(3, dtype=torch.int64), torch.arange(3), torch.zeros(3, dtype=torch.int64))
    step = BatchStep(
        policy,
        short("grpo"),
        Rollout(rollout.lengths, rollout.group, rollout.columns, rollout.payload),
        torch.optim.SGD(policy.parameters(), 0.7),
        1000,
        lambda reason, batch: None,
        Profiler(enabled=False),
    )
    policy.logits.grad = torch.tensor([[[1.0, -2.0, 0.5]]], dtype=torch.float64)
    found = step.preview()
    step.apply()
    same(found, kl(before, policy.probabilities().detach())[0])

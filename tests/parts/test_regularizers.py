"""KL estimators and entropy against exact values on a small softmax."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from polopt.core.loss import Evaluation
from polopt.core.rollout import Rollout
from polopt.regularizers.entropy import Entropy
from polopt.regularizers.kl import KL, kl_estimate
from tests.support import DELTA, OLD, REF, f64, now, same, worked

P, Q = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.2, 0.4, 0.1, 0.3])
FORWARD = float((P * np.log(P / Q)).sum())


@pytest.mark.parametrize(("estimator", "unbiased"), [("k1", True), ("k2", False), ("k3", True)])
def test_expected_value(estimator: str, unbiased: bool) -> None:
    values = kl_estimate(f64(np.log(Q / P)), estimator).numpy()  # type: ignore[arg-type]
    assert (math.isclose(float(P @ values), FORWARD)) == unbiased


@pytest.mark.parametrize(("estimator", "target"), [("k1", "nothing"), ("k2", "forward"), ("k3", "reverse")])
def test_expected_gradient(estimator: str, target: str) -> None:
    """Differentiated through log pi on samples of pi, in the logits."""
    logits = f64(np.log(P)).requires_grad_()
    logp = torch.log_softmax(logits, dim=0)
    estimate = (f64(P) * kl_estimate(f64(np.log(Q)) - logp, estimator)).sum()  # type: ignore[arg-type]
    (actual,) = torch.autograd.grad(estimate, logits)
    pi = torch.softmax(logits, dim=0)
    q = f64(Q)
    exact = {
        "nothing": 0 * logits.sum(),
        "forward": (pi * (pi.log() - q.log())).sum(),
        "reverse": (q * (q.log() - pi.log())).sum(),
    }[target]
    (expected,) = torch.autograd.grad(exact, logits)
    same(actual, expected)


def test_k3_against_numpy_and_its_sign() -> None:
    gap = np.array([0.0, 1e-9, -1e-9, 0.3, -2.0, 5.0])
    values = kl_estimate(f64(gap), "k3").numpy()
    assert (values >= 0).all()
    np.testing.assert_allclose(values[3:], np.exp(gap[3:]) - gap[3:] - 1)
    small = kl_estimate(torch.tensor([1e-4]), "k3")  # float32 would cancel without expm1
    assert float(small) == pytest.approx(0.5e-8, rel=0.1)


def test_a_huge_gap_stays_finite() -> None:
    gap = torch.tensor([1e4, -1e4], requires_grad=True)
    value = kl_estimate(gap, "k3").sum()
    value.backward()  # type: ignore[no-untyped-call]
    assert torch.isfinite(value)
    assert gap.grad is not None
    assert torch.isfinite(gap.grad).all()


def test_kl_terms_and_metric() -> None:
    rollout = worked(logp__ref=REF, logp__teacher=OLD)
    evaluation = now(f64(OLD) + f64(DELTA))
    gap = f64(REF) - evaluation.logp.detach()
    loss = KL(beta=0.3)(evaluation, rollout)
    same(loss.value.detach(), 0.3 * (gap.exp() - gap - 1))
    same(loss.metrics["kl"], (gap.exp() - gap - 1).mean())
    same(KL(beta=1.0, estimator="k1", model="teacher")(evaluation, rollout).value.detach(), DELTA)
    (slope,) = torch.autograd.grad(loss.value.sum(), evaluation.logp)
    same(slope, 0.3 * (1 - gap.exp()))


def test_without_weight_the_reference_is_not_asked_for() -> None:
    assert KL(beta=0.0).needs == frozenset()
    assert KL(beta=0.1, model="teacher").needs == {"logp/teacher"}
    assert (KL(beta=0.0)(now(OLD), worked()).value == 0).all()


def test_entropy_is_rewarded() -> None:
    logits = torch.randn(10, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    logp = torch.log_softmax(logits, dim=1)
    entropy = -(logp.exp() * logp).sum(1)
    rollout: Rollout = worked()
    loss = Entropy(0.02)(Evaluation({"logp": logp[:, 0], "entropy": entropy}), rollout)
    same(loss.value.detach(), -0.02 * entropy.detach())
    assert Entropy().evaluates == {"entropy"}
    # A step down the loss raises the entropy.
    (slope,) = torch.autograd.grad(loss.value.sum(), logits)
    after = torch.log_softmax(logits.detach() - slope, dim=1)
    assert float(-(after.exp() * after).sum()) > float(entropy.sum().detach())

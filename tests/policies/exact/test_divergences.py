"""Divergences against closed forms and their defining inequalities."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polopt.core.errors import UsageError
from polopt.policies.exact import GENERATORS, ExactPolicy, SequenceSpace, alpha, f_divergence, kl

NAMES = [*GENERATORS, "alpha:0.5", "alpha:-1", "alpha:3"]
every_name = pytest.mark.parametrize("name", NAMES)


def distribution(seed: int, size: int = 6) -> Tensor:
    return torch.randn(2, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(-1)


@every_name
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31), other=st.integers(0, 2**31))
def test_positive_unless_equal(name: str, seed: int, other: int) -> None:
    p, q = distribution(seed), distribution(other)
    if seed != other:
        assert (f_divergence(p, q, name) > 1e-6).all()
    assert float(f_divergence(p, p, name).abs().max()) < 1e-12


@pytest.mark.parametrize(
    ("name", "closed"),
    [
        ("kl", lambda p, q: p * math.log(p / q)),
        ("reverse-kl", lambda p, q: q * math.log(q / p)),
        ("js", lambda p, q: (p * math.log(2 * p / (p + q)) + q * math.log(2 * q / (p + q))) / 2),
        ("chi2", lambda p, q: (p - q) ** 2 / q),
        ("hellinger", lambda p, q: (math.sqrt(p) - math.sqrt(q)) ** 2 / 2),
        ("tv", lambda p, q: abs(p - q) / 2),
        ("alpha:0.5", lambda p, q: 2 * (math.sqrt(p) - math.sqrt(q)) ** 2),
        ("alpha:2", lambda p, q: (p - q) ** 2 / q / 2),
        ("alpha:-1", lambda p, q: (p - q) ** 2 / p / 2),
    ],
)
def test_closed_forms(name: str, closed: object) -> None:
    p, q = distribution(1), distribution(2)
    for b in range(2):
        expected = sum(closed(x, y) for x, y in zip(p[b].tolist(), q[b].tolist(), strict=True))  # type: ignore[operator]
        assert float(f_divergence(p, q, name)[b]) == pytest.approx(expected, rel=1e-12)


def test_kl_and_symmetries() -> None:
    p, q = distribution(1), distribution(2)
    torch.testing.assert_close(kl(p, q), f_divergence(p, q, "kl"), rtol=1e-12, atol=0)
    torch.testing.assert_close(kl(q, p), f_divergence(p, q, "reverse-kl"), rtol=1e-12, atol=0)
    for name in ("js", "tv", "hellinger"):
        torch.testing.assert_close(f_divergence(p, q, name), f_divergence(q, p, name), rtol=1e-12, atol=0)
    for near, order in (("kl", 1 + 1e-6), ("reverse-kl", 1e-6)):
        torch.testing.assert_close(f_divergence(p, q, alpha(order)), f_divergence(p, q, near), rtol=1e-4, atol=0)


def test_support() -> None:
    p = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64)
    q = torch.tensor([[0.0, 0.5, 0.5]], dtype=torch.float64)
    expected = {
        "kl": math.inf,
        "reverse-kl": math.inf,
        "js": math.log(2) / 2,
        "chi2": math.inf,
        "hellinger": 0.5,
        "tv": 0.5,
        "alpha:0.5": 2.0,
        "alpha:-1": math.inf,
        "alpha:3": math.inf,
    }
    assert {name: float(f_divergence(p, q, name)) for name in NAMES} == pytest.approx(expected)
    assert float(kl(p, q)) == math.inf
    inside = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64)
    for name in ("kl", "js", "chi2", "hellinger", "tv", "alpha:0.5", "alpha:3"):
        assert float(f_divergence(inside, inside, name)) == pytest.approx(0.0, abs=1e-15)


@every_name
def test_gradients_against_finite_differences(name: str) -> None:
    space = SequenceSpace(3, 2)
    policy = ExactPolicy(space, 2, distribution(3, 12).view(2, 4, 3))
    target = distribution(4, 9)

    def value(logits: Tensor) -> Tensor:
        return f_divergence(ExactPolicy(space, 2, logits).probabilities(), target, name).sum()

    loss = f_divergence(policy.probabilities(), target, name).sum()
    (found,) = torch.autograd.grad(loss, policy.logits)
    for place in range(12):
        step = torch.zeros(2, 4, 3, dtype=torch.float64)
        step.flatten(1)[0, place] = 1e-5
        difference = (value(policy.logits + step) - value(policy.logits - step)) / 2e-5
        assert float(found.flatten(1)[0, place]) == pytest.approx(float(difference.detach()), abs=1e-8)


def test_unknown_names_and_orders() -> None:
    p = distribution(0)
    with pytest.raises(UsageError, match="unknown divergence 'kll'; did you mean 'kl'"):
        f_divergence(p, p, "kll")
    with pytest.raises(UsageError, match="'alpha:x' needs an order"):
        f_divergence(p, p, "alpha:x")
    with pytest.raises(UsageError, match="finite, got inf"):
        alpha(math.inf)

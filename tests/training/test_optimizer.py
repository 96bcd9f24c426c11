"""AdamW against its equations, the course of the learning rate, and a state that restores it to the bit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from polopt.core.errors import UsageError
from polopt.training.checkpoint import load_checkpoint, save_checkpoint
from polopt.training.optimizer import (
    learning_rate,
    load_optimizer_state,
    make_optimizer,
    optimizer_state,
    set_learning_rate,
)


def parameters(seed: int = 0) -> list[Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 4), (4,), (2, 3))]


def advance(optimizer: torch.optim.Optimizer, values: list[Parameter], steps: int, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for value in values:
            value.grad = torch.randn(value.shape, generator=generator)
        optimizer.step()


def adamw(value: np.ndarray, gradients: list[np.ndarray], lr: float, decay: float, b1: float, b2: float) -> np.ndarray:
    """Loshchilov and Hutter 2019, algorithm 2, in float64."""
    m = v = np.zeros_like(value)
    for t, g in enumerate(gradients, 1):
        value = value * (1 - lr * decay)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        value = value - lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + 1e-8)
    return value


def test_matrices_decay_and_vectors_do_not() -> None:
    values = parameters()
    before = [p.detach().double().numpy().copy() for p in values]
    generator = torch.Generator().manual_seed(1)
    gradients = [[torch.randn(p.shape, generator=generator).double().numpy() for p in values] for _ in range(4)]
    advance(make_optimizer(values, 0.1, weight_decay=0.3, betas=(0.8, 0.9)), values, 4)
    for i, value in enumerate(values):
        decay = 0.3 if value.ndim > 1 else 0.0
        expected = adamw(before[i], [g[i] for g in gradients], 0.1, decay, 0.8, 0.9)
        np.testing.assert_allclose(value.detach().numpy(), expected, rtol=1e-5, atol=1e-6)


def test_a_restored_optimizer_goes_on_to_the_bit(tmp_path: object) -> None:
    whole, first, second = parameters(), parameters(), parameters(9)
    uninterrupted = make_optimizer(whole, 0.01, weight_decay=0.1, betas=(0.9, 0.99))
    advance(uninterrupted, whole, 3)
    advance(uninterrupted, whole, 3, seed=2)
    before = make_optimizer(first, 0.01, weight_decay=0.1, betas=(0.9, 0.99))
    advance(before, first, 3)
    path = save_checkpoint(tmp_path, 3, {"optimizer": optimizer_state(before)})  # type: ignore[arg-type]
    after = make_optimizer(second, 0.01, weight_decay=0.1, betas=(0.9, 0.99))
    with torch.no_grad():
        for old, new in zip(first, second, strict=True):
            new.copy_(old)
    load_optimizer_state(after, load_checkpoint(path)["optimizer"])
    advance(after, second, 3, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(whole, second, strict=True))


def test_the_settings_are_the_runs_not_the_checkpoints() -> None:
    values = parameters()
    saved = make_optimizer(values, 0.5, weight_decay=0.0, betas=(0.9, 0.99))
    advance(saved, values, 1)
    now = make_optimizer(parameters(), 0.25, weight_decay=0.0, betas=(0.5, 0.99))
    load_optimizer_state(now, optimizer_state(saved))
    assert {(g["lr"], tuple(g["betas"])) for g in now.param_groups} == {(0.25, (0.5, 0.99))}


def test_moments_of_another_model_are_refused() -> None:
    values = parameters()
    saved = make_optimizer(values, 0.1, weight_decay=0.0, betas=(0.9, 0.99))
    advance(saved, values, 1)
    other = make_optimizer([Parameter(torch.zeros(5, 5))], 0.1, weight_decay=0.0, betas=(0.9, 0.99))
    with pytest.raises(UsageError, match="optimizer state does not fit the policy"):
        load_optimizer_state(other, optimizer_state(saved))


def test_the_course_of_the_learning_rate() -> None:
    assert [learning_rate(8.0, "constant", fraction=0.9, step=s, warmup=3) for s in range(5)] == [2, 4, 6, 8, 8]
    assert [learning_rate(2.0, "linear", fraction=f, step=0, warmup=0) for f in (0, 0.5, 1)] == [2, 1, 0]
    half = [learning_rate(2.0, "cosine", fraction=f, step=0, warmup=0) for f in (0, 1 / 3, 0.5, 1)]
    assert half == pytest.approx([2, 1 + math.cos(math.pi / 3), 1, 0])


def test_one_rate_for_all() -> None:
    optimizer = make_optimizer(parameters(), 0.1, weight_decay=0.1, betas=(0.9, 0.99))
    set_learning_rate(optimizer, 0.025)
    assert len(optimizer.param_groups) == 2
    assert {group["lr"] for group in optimizer.param_groups} == {0.025}

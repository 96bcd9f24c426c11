"""The fused output layer against plain torch in float64, its memory, and its precision under autocast."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from polopt.policies.causal_lm import tiled
from polopt.policies.causal_lm.fused import (
    DIVERGENCES,
    linear_divergences,
    linear_functionals,
    logit_divergences,
)
from polopt.policies.causal_lm.tiled import FUNCTIONALS


def plain(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
) -> dict[str, Tensor]:
    """The definition, with all logits at once."""
    logits = torch.nn.functional.linear(hidden, weight, bias) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / torch.as_tensor(temperature, dtype=logits.dtype).expand(len(hidden))[:, None]
    logp = logits.log_softmax(-1)
    return {
        "logp": logp[torch.arange(len(targets)), targets],
        "entropy": torch.distributions.Categorical(logits=logits).entropy(),
        "lse": logits.logsumexp(-1),
        "collision": logp.exp().square().sum(-1),
    }


def problem(
    n: int = 7, tokens: int = 11, size: int = 5, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, size, generator=generator, dtype=dtype)
    weight = torch.randn(tokens, size, generator=generator, dtype=dtype)
    return hidden, weight, torch.randint(tokens, (n,), generator=generator)


OPTIONS = [
    {},
    {"temperature": 0.6},
    {"temperature": torch.linspace(0.5, 2.0, 7, dtype=torch.float64)},
    {"softcap": 1.5},
    {"softcap": 1.5, "scale": 0.3, "temperature": torch.linspace(0.5, 2.0, 7, dtype=torch.float64)},
    {"scale": 0.25, "temperature": 0.7},
]


@pytest.mark.parametrize("tile", [None, (1, 1), (3, 4), (100, 100), (100, 1)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_values_and_gradients_equal_plain_torch(options: dict, with_bias: bool, tile: tuple[int, int] | None) -> None:
    hidden, weight, targets = problem()
    bias = torch.linspace(-1, 1, 11, dtype=torch.float64) if with_bias else None
    inputs = [x for x in (hidden, weight, bias) if x is not None]
    mix = torch.randn(len(FUNCTIONALS), 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = []
    for function, extra in ((plain, {}), (linear_functionals, {"names": FUNCTIONALS, "tile": tile})):
        for x in inputs:
            x.requires_grad_().grad = None
        found = function(hidden, weight, targets, bias=bias, **options, **extra)
        sum((mix[i] * found[name]).sum() for i, name in enumerate(sorted(FUNCTIONALS))).backward()
        gradients.append((found, [x.grad.clone() for x in inputs]))
    (expected, expected_grads), (actual, actual_grads) = gradients
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-12, atol=1e-12)
    for one, other in zip(actual_grads, expected_grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("tile", [None, (2, 5)])
@pytest.mark.parametrize("name", sorted(FUNCTIONALS))
def test_gradcheck_of_each_functional_alone(name: str, tile: tuple[int, int] | None) -> None:
    hidden, weight, targets = problem(4, 6, 3)
    bias = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    temperature = torch.tensor([0.5, 1.0, 2.0, 0.7], dtype=torch.float64)

    def function(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return linear_functionals(
            h, w, targets, frozenset({name}), bias=b, temperature=temperature, softcap=2.0, scale=0.5, tile=tile
        )[name]

    assert torch.autograd.gradcheck(function, (hidden.requires_grad_(), weight.requires_grad_(), bias))


def test_rows_without_gradient_are_left_out_of_the_backward_pass_exactly() -> None:
    hidden, weight, targets = problem()
    keep = torch.tensor([True, False, True, False, False, True, False])
    expected = linear_functionals(hidden.requires_grad_(), weight.requires_grad_(), targets, frozenset({"logp"}))
    torch.where(keep, expected["logp"], 0).sum().backward()
    reference = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    found = linear_functionals(hidden, weight, targets, FUNCTIONALS, tile=(2, 4))
    (torch.where(keep, found["logp"], 0) + 0 * found["entropy"]).sum().backward()
    torch.testing.assert_close((hidden.grad, weight.grad), reference)
    assert (hidden.grad[~keep] == 0).all()


def test_a_frozen_weight_gets_no_gradient_and_the_graph_can_be_used_twice() -> None:
    hidden, weight, targets = problem()
    found = linear_functionals(hidden.requires_grad_(), weight, targets, FUNCTIONALS)
    (first,) = torch.autograd.grad(found["entropy"].sum(), hidden, retain_graph=True)
    (second,) = torch.autograd.grad(found["entropy"].sum(), hidden)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert weight.grad is None


def test_large_logits_stay_finite() -> None:
    hidden, weight, targets = problem(dtype=torch.float32)
    found = linear_functionals(hidden * 1e4, weight, targets, FUNCTIONALS)
    expected = plain((hidden * 1e4).double(), weight.double(), targets)
    for name in FUNCTIONALS:
        torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-5, atol=1e-3)


def test_no_positions() -> None:
    hidden, weight, _ = problem()
    found = linear_functionals(hidden[:0], weight, torch.zeros(0, dtype=torch.int64), FUNCTIONALS)
    assert all(value.shape == (0,) for value in found.values())


def test_an_unknown_functional_is_named() -> None:
    with pytest.raises(ValueError, match="unknown functional 'kurtosis'"):
        linear_functionals(*problem(), frozenset({"kurtosis", "logp"}))


@pytest.mark.parametrize("tile", [None, (16, 300)])
def test_autocast_multiplies_in_bfloat16_and_sums_in_float32(tile: tuple[int, int] | None) -> None:
    hidden, weight, targets = problem(64, 1000, 32, torch.float32)
    hidden.requires_grad_()
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_functionals(hidden, weight, targets, FUNCTIONALS, tile=tile)
    assert {value.dtype for value in found.values()} == {torch.float32}
    # The only roundings are those of the inputs and of the logits; the softmax of exactly these logits is float32.
    logits = torch.mm(hidden.detach().bfloat16(), weight.detach().bfloat16().t()).float()
    torch.testing.assert_close(found["lse"], logits.logsumexp(-1), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(
        found["logp"], logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0], rtol=1e-6, atol=1e-5
    )
    (found["logp"] + found["entropy"]).sum().backward()
    exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    expected = plain(exact_hidden, exact_weight, targets)
    (expected["logp"] + expected["entropy"]).sum().backward()
    for x, exact in ((hidden, exact_hidden), (weight, exact_weight)):
        assert x.grad.dtype == torch.float32
        assert (x.grad - exact.grad).norm() < 0.02 * exact.grad.norm()


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensor storage alive at once among tensors made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[object, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_flatten(out)[0]:
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                key = storage._cdata
                if key not in self.live or self.live[key][0]() is None:
                    self.live[key] = (weakref.ref(storage), storage.nbytes())
        self.live = {k: v for k, v in self.live.items() if v[0]() is not None}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return out


@pytest.mark.parametrize("kept", [0.0, 0.5])
def test_memory_beyond_inputs_outputs_and_gradients_is_a_few_tiles_and_the_store(
    kept: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiled, "_KEPT_SHARE", kept)
    hidden, weight, targets = problem(512, 32_000, 16, torch.float32)
    hidden.requires_grad_()
    weight.requires_grad_()
    materialised = 512 * 32_000 * 4
    gradients = hidden.nbytes + weight.nbytes
    shares = {}
    for name, function, extra in (
        ("fused", linear_functionals, {"names": FUNCTIONALS, "tile": (512, 500)}),
        ("plain", plain, {}),
    ):
        with LiveBytes() as tracker:
            found = function(hidden, weight, targets, **extra)
            sum(value.sum() for value in found.values()).backward()
        hidden.grad = weight.grad = None
        shares[name] = (tracker.peak - gradients) / materialised
    assert shares["plain"] > 2  # the tracker sees what is there
    assert kept < shares["fused"] + 0.02 < kept + 0.15


def test_without_gradient_nothing_is_kept() -> None:
    hidden, weight, targets = problem(512, 32_000, 16, torch.float32)
    with LiveBytes() as tracker, torch.no_grad():
        linear_functionals(hidden.requires_grad_(), weight.requires_grad_(), targets, FUNCTIONALS, tile=(512, 500))
    assert tracker.peak < 0.15 * 512 * 32_000 * 4


# --- two models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [None, 1, 3, 100])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_divergences_equal_their_definitions(options: dict, with_bias: bool, chunk: int | None) -> None:
    hidden, weight, targets = problem()
    # The other model may have another width.
    generator = torch.Generator().manual_seed(2)
    other = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    other_weight = torch.randn(11, 3, generator=generator, dtype=torch.float64)
    bias = torch.linspace(-1, 1, 11, dtype=torch.float64) if with_bias else None
    every = [torch.full_like(targets, token) for token in range(11)]
    p = torch.stack([plain(hidden, weight, t, bias=bias, **options)["logp"].exp() for t in every], dim=1)
    q = torch.stack([plain(other, other_weight, t, **options)["logp"].exp() for t in every], dim=1)
    found = linear_divergences(
        hidden.requires_grad_(), weight, other, other_weight, DIVERGENCES, bias=bias, chunk=chunk, **options
    )
    assert found.keys() == DIVERGENCES and not any(value.requires_grad for value in found.values())
    torch.testing.assert_close(found["hellinger"], 1 - (p * q).sqrt().sum(-1), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(found["kl"], torch.nn.functional.kl_div(q.log(), p, reduction="none").sum(-1))


def test_equal_models_are_at_distance_zero_and_disjoint_ones_at_one() -> None:
    hidden, weight, _ = problem(dtype=torch.float32)
    same = linear_divergences(hidden, weight, hidden, weight, DIVERGENCES, chunk=2)
    assert not same["hellinger"].any() and not same["kl"].any()
    certain = torch.tensor([[100.0, -100.0], [-torch.inf, 0.0]])
    apart = logit_divergences(certain, certain.flip(1), DIVERGENCES)
    torch.testing.assert_close(apart["hellinger"], torch.ones(2))
    torch.testing.assert_close(apart["kl"], torch.tensor([200.0, torch.inf]))
    # A token that both rule out costs nothing.
    ruled_out = torch.tensor([[0.0, 0.0, -torch.inf]])
    both = logit_divergences(ruled_out, ruled_out, DIVERGENCES)
    assert not both["hellinger"].any() and not both["kl"].any()


def test_an_unknown_divergence_is_named() -> None:
    hidden, weight, _ = problem()
    with pytest.raises(ValueError, match="unknown divergence 'tv'"):
        linear_divergences(hidden, weight, hidden, weight, frozenset({"tv"}))


def test_two_models_take_a_few_chunks_of_memory() -> None:
    hidden, weight, _ = problem(512, 32_000, 16, torch.float32)
    other = weight + 0.1
    with LiveBytes() as tracker:
        linear_divergences(hidden, weight, hidden, other, DIVERGENCES, chunk=16)
    assert tracker.peak / (512 * 32_000 * 4) < 0.3

"""f-divergences between distributions over sequences.

D_f(p || q) = sum_y q(y) f(p(y) / q(y)) with f convex and f(1) = 0; where q(y) = 0 the term is p(y) lim_{t->inf} f(t)/t
(Csiszar 1967; Liese and Vajda 2006, IEEE Trans. Inf. Theory 52:4394). Distributions are probabilities [..., S].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.core.errors import UsageError
from polopt.core.part import suggest


@dataclass(frozen=True)
class Generator:
    """The function f of an f-divergence, and its slope lim_{t -> inf} f(t) / t."""

    function: Callable[[Tensor], Tensor]
    slope: float


def _forward(t: Tensor) -> Tensor:
    return torch.xlogy(t, t)


def _jensen_shannon(t: Tensor) -> Tensor:
    return (torch.xlogy(t, t) - torch.xlogy(t + 1, (t + 1) / 2)) / 2


GENERATORS: Mapping[str, Generator] = MappingProxyType(
    {
        "kl": Generator(_forward, math.inf),
        "reverse-kl": Generator(lambda t: -t.log(), 0.0),
        "js": Generator(_jensen_shannon, math.log(2) / 2),
        "chi2": Generator(lambda t: (t - 1).square(), math.inf),
        "hellinger": Generator(lambda t: (1 - t.sqrt()).square() / 2, 0.5),
        "tv": Generator(lambda t: (t - 1).abs() / 2, 0.5),
    }
)
"""By name: ``kl`` KL(p || q), ``reverse-kl`` KL(q || p), ``js`` Jensen-Shannon (at most log 2), ``chi2`` Pearson's
sum (p - q)^2 / q, ``hellinger`` the squared distance (1/2) sum (sqrt p - sqrt q)^2, ``tv`` (1/2) sum |p - q|."""


def alpha(order: float) -> Generator:
    """f(t) = (t^a - a t - (1 - a)) / (a (a - 1)); a -> 1 is ``kl``, a -> 0 ``reverse-kl``, a = 2 half of ``chi2``.

    Raises UsageError for an order that is not finite.
    """
    if not math.isfinite(order):
        raise UsageError(f"the order of an alpha-divergence must be finite, got {order}")
    if order == 1:
        return GENERATORS["kl"]
    if order == 0:
        return GENERATORS["reverse-kl"]
    scale = order * (order - 1)
    return Generator(
        lambda t: (t.pow(order) - order * t - (1 - order)) / scale, math.inf if order > 1 else 1 / (1 - order)
    )


def generator(name: str) -> Generator:
    """The generator of a name in `GENERATORS`, or of ``alpha:ORDER``.

    Raises UsageError when there is none.
    """
    if name in GENERATORS:
        return GENERATORS[name]
    kind, _, order = name.partition(":")
    if kind == "alpha":
        try:
            return alpha(float(order))
        except ValueError as error:
            raise UsageError(f"divergence {name!r} needs an order, as in 'alpha:0.5'") from error
    raise UsageError(f"unknown divergence {name!r}; {suggest(name, [*GENERATORS, 'alpha:0.5'])}")


def f_divergence(
    p: Float[Tensor, "*batch sequence"], q: Float[Tensor, "*batch sequence"], f: str | Generator
) -> Float[Tensor, "*batch"]:
    """D_f(p || q) >= 0, in nats where it is one; differentiable where both have full support.

    Raises UsageError for an unknown name.
    """
    rule = generator(f) if isinstance(f, str) else f
    outside = q == 0
    safe = torch.where(outside, 1.0, q)
    # t^a of a ratio that overflows is meant to: the divergence is infinite then.
    terms = torch.where(outside, 0.0, q * rule.function(torch.where(outside, 1.0, p / safe)))
    beyond = torch.where(outside, p, 0.0).sum(-1)
    if not bool((beyond.detach() > 0).any()):
        return terms.sum(-1)
    return terms.sum(-1) + torch.where(beyond > 0, beyond * rule.slope, 0.0)


def kl(p: Float[Tensor, "*batch sequence"], q: Float[Tensor, "*batch sequence"]) -> Float[Tensor, "*batch"]:
    """KL(p || q) = sum_y p(y) log(p(y) / q(y)), nats; infinite where q lacks support that p has."""
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(-1)


def check_positive(name: str, value: float) -> None:
    """Raises UsageError unless the value is a positive, finite number."""
    if not (math.isfinite(value) and value > 0):
        raise UsageError(f"{name} must be a positive number, got {value}")

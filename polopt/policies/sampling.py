"""How one next token is drawn from logits: temperature, truncation, and randomness that belongs to a trajectory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from polopt.core.policy import Sampling
from polopt.policies.nucleus import pack


class Draw(NamedTuple):
    """One token per row and its log-probs (float32); the columns of ``Generations``."""

    token: Int[Tensor, "row"]
    logp: Float[Tensor, "row"]
    logp_sampled: Float[Tensor, "row"] | None
    entropy: Float[Tensor, "row"] | None
    kept: UInt8[Tensor, "row byte"] | None = None


# Constants of splitmix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"), as int64.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of int64, whose ``>>`` copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def uniforms(seeds: Int[Tensor, "*rows"], steps: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
    """u(s, t) in [0, 1), float64: a pure function of the trajectory's seed s and its step t (shapes broadcast).

    u = top 52 bits of mix(mix(s) + (t + 1) * golden) / 2^52, the splitmix64 stream seeded with mix(s), so that
    neighbouring seeds are unrelated. 52 bits rather than 53 keep ``u * total < total`` exact for any float64 total.
    """
    return _shift_right(_mix(_mix(seeds + _GOLDEN) + (steps + 1) * _GOLDEN), 12).double() * 2.0**-52


def kept_tokens(probs: Float[Tensor, "row vocab"], sampling: Sampling) -> Bool[Tensor, "row vocab"]:
    """Which tokens top-k, top-p and min-p leave.

    top-k keeps the k most likely tokens; top-p, of what is left and renormalised, the fewest most likely tokens whose
    mass reaches top_p; min-p those with p >= min_p * max p. Each is a threshold on p, so that tokens of exactly equal
    probability stay or go together and the choice cannot depend on how a sort breaks ties.
    """
    threshold = sampling.min_p * probs.amax(-1, keepdim=True)
    k = min(sampling.top_k or probs.shape[-1], probs.shape[-1])
    if sampling.top_p < 1:
        ranked = probs.topk(k, dim=-1).values if k < probs.shape[-1] else probs.sort(-1, descending=True).values
        before = ranked.cumsum(-1, dtype=torch.float64)
        total = before[:, -1:].clone()
        before -= ranked
        last = (before < sampling.top_p * total).sum(-1, keepdim=True) - 1
        threshold = torch.maximum(threshold, ranked.gather(-1, last.clamp_(min=0)))
    elif k < probs.shape[-1]:
        threshold = torch.maximum(threshold, probs.topk(k, dim=-1).values[:, -1:])
    return probs >= threshold


def draw(
    logits: Float[Tensor, "row vocab"],
    uniform: Float[Tensor, "row"],
    sampling: Sampling,
    entropy: bool = False,
    allowed: Bool[Tensor, "row vocab"] | None = None,
    other: Float[Tensor, "row vocab"] | None = None,
) -> Draw:
    """Draw one token per row by inverting the cumulative distribution at ``uniform``.

    p = softmax(logits / temperature) in float32; the token is the first whose cumulative (kept) mass exceeds
    u * total. ``logp`` = log q[token] and ``entropy`` = -sum q log q in nats, q = softmax(logits / policy temperature),
    which is p where none is given and that of temperature 1 at temperature 0, where the token is the argmax;
    ``logp_sampled`` = log(p[token] / kept mass), 0 for a certain choice, None where that is ``logp``
    (`Sampling.differs`). Nothing but ``allowed`` is drawn, where that is given; ``kept`` is then what could be. With
    the logits of an ``other`` model p is of (1 - b) logits + b other, b the mixture weight.
    """
    logits = logits.float()
    own = _tempered(logits, sampling.trained_temperature)
    if other is not None:
        logits = torch.lerp(logits, other.to(logits), sampling.mixture_weight)
    logp_sampled = left = None
    if sampling.temperature == 0:
        left = allowed
        best = own if other is None else logits
        token = (best if allowed is None else best.masked_fill(~allowed, -torch.inf)).argmax(-1, keepdim=True)
        if sampling.differs:
            logp_sampled = own.new_zeros(len(own))
    else:
        same = other is None and sampling.temperature == sampling.trained_temperature
        logps = own if same else _tempered(logits, sampling.temperature)
        probs = logps.exp()
        if sampling.truncates:
            left = kept_tokens(probs, sampling)
            left = left if allowed is None else left & allowed
        kept = probs if left is None else probs.masked_fill(~left, 0)
        cumulative = kept.cumsum(-1, dtype=torch.float64)
        total = cumulative[:, -1:]
        # The clamp only matters for NaN logits, which the caller reports; an index out of range would kill a device.
        token = torch.searchsorted(cumulative, uniform[:, None] * total, right=True).clamp_(max=logits.shape[-1] - 1)
        if sampling.differs:
            logp_sampled = logps.gather(-1, token).squeeze(-1)
            if sampling.truncates:
                logp_sampled = logp_sampled - total.squeeze(-1).log().float()
    return Draw(
        token.squeeze(-1),
        own.gather(-1, token).squeeze(-1),
        logp_sampled,
        torch.special.entr(own.exp()).sum(-1) if entropy else None,
        None if allowed is None or left is None else pack(left),
    )


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature)."""
    return (logits if temperature == 1 else logits / temperature).log_softmax(-1)

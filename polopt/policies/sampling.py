"""How one next token is drawn from logits: temperature, truncation, and randomness that belongs to a trajectory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from polopt.core.policy import Sampling


class Draw(NamedTuple):
    """One token per row and its log-probs (float32); the columns of ``Generations``."""

    token: Int[Tensor, "row"]
    logp: Float[Tensor, "row"]
    logp_sampled: Float[Tensor, "row"] | None
    entropy: Float[Tensor, "row"] | None


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
    logits: Float[Tensor, "row vocab"], uniform: Float[Tensor, "row"], sampling: Sampling, entropy: bool = False
) -> Draw:
    """Draw one token per row by inverting the cumulative distribution at ``uniform``.

    p = softmax(logits / temperature) in float32; the token is the first whose cumulative (kept) mass exceeds
    u * total. ``logp`` = log p[token]; ``logp_sampled`` = log(p[token] / kept mass), None when nothing is truncated;
    ``entropy`` = -sum p log p in nats over the full p. At temperature 0 the token is the argmax, ``logp`` and
    ``entropy`` are those of temperature 1, and ``logp_sampled`` is that of a certain choice, 0.
    """
    logits = logits.float()
    greedy = sampling.temperature == 0
    if not greedy and sampling.temperature != 1:
        logits = logits / sampling.temperature
    logps = logits.log_softmax(-1)
    probs = logps.exp() if entropy or not greedy else logps
    logp_sampled = None
    if greedy:
        token = logps.argmax(-1, keepdim=True)
        logp = logps.gather(-1, token).squeeze(-1)
        logp_sampled = torch.zeros_like(logp) if sampling.truncates else None
    else:
        kept = probs.masked_fill(~kept_tokens(probs, sampling), 0) if sampling.truncates else probs
        cumulative = kept.cumsum(-1, dtype=torch.float64)
        total = cumulative[:, -1:]
        # The clamp only matters for NaN logits, which the caller reports; an index out of range would kill a device.
        token = torch.searchsorted(cumulative, uniform[:, None] * total, right=True).clamp_(max=logits.shape[-1] - 1)
        logp = logps.gather(-1, token).squeeze(-1)
        if sampling.truncates:
            logp_sampled = logp - total.squeeze(-1).log().float()
    return Draw(token.squeeze(-1), logp, logp_sampled, torch.special.entr(probs).sum(-1) if entropy else None)

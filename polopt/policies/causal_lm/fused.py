"""Log-probs, entropies and log-sum-exps of a linear output layer, without ever holding the logits of a whole batch.

With n positions, hidden size d and V tokens, the logits of position i are ``z_i = cap(scale * (W h_i + b)) / T_i``,
``cap(x) = c tanh(x / c)`` where the model caps its logits. What has a gradient is computed tile by
tile (`polopt.policies.causal_lm.tiled`), what has none by chunks of positions, so that the memory beyond inputs,
outputs and gradients does not grow with n * V.
"""

from __future__ import annotations

from typing import Final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from polopt.policies.causal_lm.tiled import Layer, Tile, heats_of, tile_of, tiled_functionals

DIVERGENCES: Final = frozenset({"hellinger", "kl"})
"""What `linear_divergences` can compute."""

# Logits up to this size go through in one piece with torch's own backward pass, which keeps them: computing them again
# would cost more time than it is worth in memory.
_KEEP_BYTES: Final = 64 * 2**20
# A chunk's logits take this much, or this share of all logits where that is more: wide chunks use the hardware better,
# and some three buffers of this size plus a half-precision copy of the weight are all that is ever held.
_CHUNK_BYTES: Final = 64 * 2**20
_CHUNK_SHARE: Final = 0.02
_CHUNK_BYTES_MOST: Final = 512 * 2**20


def linear_functionals(
    hidden: Float[Tensor, "position hidden"],
    weight: Float[Tensor, "token hidden"],
    targets: Int[Tensor, " position"],
    names: frozenset[str],
    *,
    bias: Float[Tensor, " token"] | None = None,
    temperature: float | Float[Tensor, " position"] = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    tile: Tile | None = None,
) -> dict[str, Float[Tensor, " position"]]:
    """Functionals of softmax(z_i) for each position, differentiable once in ``hidden``, ``weight`` and ``bias``.

    ``logp`` = z_i[y_i] - lse_i, ``lse`` = log sum_v exp z_i[v], ``entropy`` = -sum_v p_i[v] log p_i[v] in nats,
    ``collision`` = sum_v p_i[v]^2 (the chance that two draws agree), with z as above. The matrix product runs in the
    autocast dtype, or else in the wider dtype of ``hidden`` and ``weight``; everything after it in float32 (float64 for
    float64), which is also the dtype returned. ``temperature`` (one, or one per position, positive) is a constant.
    ``logp@1.2`` is the functional at 1.2 in its place: one matrix product serves all temperatures. ``tile`` positions
    times tokens are worked on at a time; None chooses by the device.

    Raises ValueError for an unknown name.
    """
    heats = heats_of(names)
    compute, full = _dtypes(hidden, weight)
    if tile is None:
        if hidden.shape[0] * weight.shape[0] * full.itemsize <= _KEEP_BYTES:
            z = torch.mm(hidden.to(compute), weight.to(compute).t()).to(full)
            z = z if bias is None else z + bias
            z = z if scale == 1.0 else z * scale
            z = z if softcap is None else torch.tanh(z / softcap) * softcap
            return logit_functionals(z, targets, names, temperature=temperature)
        tile = tile_of(hidden.shape[0], hidden.device, full)
    layer = Layer(compute, full, softcap, scale)
    alike = not isinstance(temperature, Tensor) and temperature == 1.0
    inverse = None if alike else _inverse(temperature, full, hidden)
    outputs = tiled_functionals(hidden, weight, bias, targets, inverse, heats, layer, tile)
    return dict(zip((name for heat in heats for name in heat.names), outputs, strict=True))


def logit_functionals(
    logits: Float[Tensor, "position token"],
    targets: Int[Tensor, " position"],
    names: frozenset[str],
    *,
    temperature: float | Float[Tensor, " position"] = 1.0,
) -> dict[str, Float[Tensor, " position"]]:
    """The functionals of `linear_functionals` from logits that are there already, in float32 (float64 for float64)."""
    full = torch.promote_types(logits.dtype, torch.float32)
    found: dict[str, Tensor] = {}
    for heat in heats_of(names):
        t = temperature if heat.temperature is None else heat.temperature
        z = logits.to(full)
        if isinstance(t, Tensor) or t != 1.0:
            z = z * torch.as_tensor(t, dtype=full, device=z.device).reciprocal().expand(z.shape[0])[:, None]
        found |= zip(heat.names, _plainly(z, targets, heat.functionals), strict=True)
    return found


def _plainly(z: Tensor, targets: Tensor, functionals: tuple[str, ...]) -> list[Tensor]:
    """Functionals of tempered logits by torch's own operations."""
    found: dict[str, Tensor] = {}
    if {"logp", "entropy", "collision"} & set(functionals):
        logp = z.log_softmax(-1)
        found["logp"] = logp.gather(-1, targets[:, None]).squeeze(-1)
        if "collision" in functionals:
            found["collision"] = (2 * logp).exp().sum(-1)
        if "entropy" in functionals:
            # A model may rule tokens out with logits of -inf; 0 * log 0 is 0.
            found["entropy"] = -(logp.exp() * logp.clamp_min(torch.finfo(z.dtype).min)).sum(-1)
    if "lse" in functionals:
        found["lse"] = z.logsumexp(-1)
    return [found[name] for name in functionals]


@torch.no_grad()
def linear_top(
    hidden: Float[Tensor, "position hidden"],
    weight: Float[Tensor, "token hidden"],
    count: int,
    *,
    bias: Float[Tensor, " token"] | None = None,
    temperature: float | Float[Tensor, " position"] = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk: int | None = None,
) -> dict[str, Tensor]:
    """``top_id`` and ``top_logp`` [n, min(count, V)]: the most likely tokens and their log-probs, constants.

    Logits are those of `linear_functionals`; ``chunk`` rows go through at a time.
    """
    compute, full = _dtypes(hidden, weight)
    layer = Layer(compute, full, softcap, scale)
    inverse = _inverse(temperature, full, hidden)
    chunk = chunk or _rows_at_once(hidden, weight, full)
    found: list[dict[str, Tensor]] = []
    with torch.autocast(hidden.device.type, enabled=False):
        w = weight.to(compute)
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            found.append(
                logit_top(
                    layer.logits(torch.mm(hidden[rows].to(compute), w.t()), bias).mul_(inverse[rows, None]), count
                )
            )
    return {name: torch.cat([each[name] for each in found]) for name in ("top_id", "top_logp")}


@torch.no_grad()
def logit_top(
    logits: Float[Tensor, "position token"], count: int, *, temperature: float | Float[Tensor, " position"] = 1.0
) -> dict[str, Tensor]:
    """What `linear_top` gives, from logits that are there already, in float32 (float64 for float64)."""
    full = torch.promote_types(logits.dtype, torch.float32)
    z = logits.to(full) * _inverse(temperature, full, logits)[:, None]
    top, ids = z.topk(min(count, z.shape[1]))
    return {"top_id": ids, "top_logp": top - z.logsumexp(-1, keepdim=True)}


@torch.no_grad()
def linear_divergences(
    hidden: Float[Tensor, "position hidden"],
    weight: Float[Tensor, "token hidden"],
    other_hidden: Float[Tensor, "position other_hidden"],
    other_weight: Float[Tensor, "token other_hidden"],
    names: frozenset[str],
    *,
    bias: Float[Tensor, " token"] | None = None,
    other_bias: Float[Tensor, " token"] | None = None,
    temperature: float | Float[Tensor, " position"] = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk: int | None = None,
) -> dict[str, Float[Tensor, " position"]]:
    """Divergences of p_i = softmax(z_i) and q_i = softmax(z'_i) at each position, constants, in float32 or float64.

    ``hellinger`` and ``kl`` as in `logit_divergences`. Logits of both models are those of `linear_functionals`;
    ``chunk`` rows go through at a time, so that never more than two chunks of logits are held.

    Raises ValueError for an unknown name.
    """
    if unknown := names - DIVERGENCES:
        raise ValueError(f"unknown divergence {min(unknown)!r} (known: {', '.join(sorted(DIVERGENCES))})")
    compute, full = _dtypes(hidden, weight)
    layer = Layer(compute, full, softcap, scale)
    inverse = _inverse(temperature, full, hidden)
    chunk = chunk or _rows_at_once(hidden, weight, full)
    found = {name: hidden.new_empty(hidden.shape[0], dtype=full) for name in names}
    with torch.autocast(hidden.device.type, enabled=False):
        w, v = weight.to(compute), other_weight.to(compute)
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            z = layer.logits(torch.mm(hidden[rows].to(compute), w.t()), bias).mul_(inverse[rows, None])
            other = layer.logits(torch.mm(other_hidden[rows].to(compute), v.t()), other_bias).mul_(inverse[rows, None])
            for name, value in logit_divergences(z, other, names).items():
                found[name][rows] = value
    return found


@torch.no_grad()
def logit_divergences(
    logits: Float[Tensor, "position token"],
    other: Float[Tensor, "position token"],
    names: frozenset[str],
    *,
    temperature: float | Float[Tensor, " position"] = 1.0,
) -> dict[str, Float[Tensor, " position"]]:
    """Divergences of p = softmax(z / T) and q = softmax(z' / T), constants, in float32 (float64 for float64).

    ``hellinger`` = 1 - sum_v sqrt(p_v q_v), the squared distance, in [0, 1]; ``kl`` = sum_v p_v log(p_v / q_v) in nats.
    """
    full = torch.promote_types(logits.dtype, torch.float32)
    inverse = _inverse(temperature, full, logits)[:, None]
    p, q = (z.to(full).mul(inverse).log_softmax(-1) for z in (logits, other))
    found: dict[str, Tensor] = {}
    if "hellinger" in names:
        # The same as 1 - sum exp((log p + log q) / 2), but exactly 0 for equal models and precise near there.
        found["hellinger"] = ((p / 2).exp() - (q / 2).exp()).square().sum(-1).div(2).clamp(max=1)
    if "kl" in names:
        # A token that the first model rules out adds nothing, whatever the second says.
        found["kl"] = torch.where(p.isneginf(), 0.0, p.exp() * (p - q)).sum(-1).clamp_min(0)
    return found


def _dtypes(hidden: Tensor, weight: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Dtypes of the matrix product and of everything after it."""
    device = hidden.device.type
    compute = torch.promote_types(hidden.dtype, weight.dtype)
    if torch.is_autocast_enabled(device) and compute != torch.float64:
        compute = torch.get_autocast_dtype(device)
    return compute, torch.float64 if compute == torch.float64 else torch.float32


def _inverse(temperature: float | Tensor, full: torch.dtype, rows: Tensor) -> Tensor:
    return torch.as_tensor(temperature, dtype=full, device=rows.device).reciprocal().expand(rows.shape[0])


def _rows_at_once(hidden: Tensor, weight: Tensor, full: torch.dtype) -> int:
    row = weight.shape[0] * full.itemsize
    return max(1, int(min(max(_CHUNK_BYTES, _CHUNK_SHARE * hidden.shape[0] * row), _CHUNK_BYTES_MOST) / row))

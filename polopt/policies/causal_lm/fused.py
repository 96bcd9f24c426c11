"""Log-probs, entropies and log-sum-exps of a linear output layer, without ever holding the logits of a whole batch.

With n positions, hidden size d and V tokens, the logits of position i are ``z_i = cap(scale * (W h_i + b)) / T_i``,
``cap(x) = c tanh(x / c)`` where the model caps its logits. Rows go through in chunks; the backward pass computes the
logits of a chunk again, so that the memory beyond inputs, outputs and gradients does not grow with n * V.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from polopt.core.policy import TEMPERED, split_temperature

FUNCTIONALS: Final = frozenset(TEMPERED)
"""What `linear_functionals` can compute, at any temperature. One more is one line each in `_values` and `_gradient`."""

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
# Rows of the weight whose half-precision gradient is held at once before it is added in full precision.
_WEIGHT_ROWS: Final = 4096


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
    chunk: int | None = None,
) -> dict[str, Float[Tensor, " position"]]:
    """Functionals of softmax(z_i) for each position, differentiable once in ``hidden``, ``weight`` and ``bias``.

    ``logp`` = z_i[y_i] - lse_i, ``lse`` = log sum_v exp z_i[v], ``entropy`` = -sum_v p_i[v] log p_i[v] in nats,
    ``collision`` = sum_v p_i[v]^2 (the chance that two draws agree), with z as above. The matrix product runs in the
    autocast dtype, or else in the wider dtype of ``hidden`` and ``weight``; everything after it in float32 (float64 for
    float64), which is also the dtype returned. ``temperature`` (one, or one per position, positive) is a constant.
    ``logp@1.2`` is the functional at 1.2 in its place: one matrix product serves all temperatures. ``chunk`` rows go
    through at a time; None chooses by memory.

    Raises ValueError for an unknown name.
    """
    heats = _heats(names)
    compute, full = _dtypes(hidden, weight)
    inverse = _inverse(temperature, full, hidden)
    if chunk is None:
        if hidden.shape[0] * weight.shape[0] * full.itemsize <= _KEEP_BYTES:
            z = torch.mm(hidden.to(compute), weight.to(compute).t()).to(full)
            z = z if bias is None else z + bias
            z = z if scale == 1.0 else z * scale
            z = z if softcap is None else torch.tanh(z / softcap) * softcap
            return logit_functionals(z, targets, names, temperature=temperature)
        chunk = _rows_at_once(hidden, weight, full)
    layer = _Layer(compute, full, softcap, scale)
    outputs = _apply(hidden, weight, bias, targets, inverse, heats, layer, chunk)
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
    for heat in _heats(names):
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
    layer = _Layer(compute, full, softcap, scale)
    inverse = _inverse(temperature, full, hidden)
    chunk = chunk or _rows_at_once(hidden, weight, full)
    found: list[dict[str, Tensor]] = []
    with torch.autocast(hidden.device.type, enabled=False):
        w = weight.to(compute)
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            found.append(logit_top(layer.logits(hidden[rows].to(compute), w, bias, inverse[rows]), count))
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
    layer = _Layer(compute, full, softcap, scale)
    inverse = _inverse(temperature, full, hidden)
    chunk = chunk or _rows_at_once(hidden, weight, full)
    found = {name: hidden.new_empty(hidden.shape[0], dtype=full) for name in names}
    with torch.autocast(hidden.device.type, enabled=False):
        w, v = weight.to(compute), other_weight.to(compute)
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            z = layer.logits(hidden[rows].to(compute), w, bias, inverse[rows])
            other = layer.logits(other_hidden[rows].to(compute), v, other_bias, inverse[rows])
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


class _Heat(NamedTuple):
    """The functionals that are wanted at one temperature (None: at each position's own), and their names there."""

    temperature: float | None
    functionals: tuple[str, ...]
    names: tuple[str, ...]

    def inverse(self, own: Tensor) -> Tensor:
        """1 / T of each position, [n]."""
        return own if self.temperature is None else torch.full_like(own, 1 / self.temperature)


def _heats(names: frozenset[str]) -> tuple[_Heat, ...]:
    """The names by temperature, the positions' own first."""
    wanted: dict[str, list[str]] = {}
    for name in sorted(names):
        functional, temperature = name.partition("@")[::2]
        if functional not in FUNCTIONALS:
            raise ValueError(f"unknown functional {name!r} (known: {', '.join(sorted(FUNCTIONALS))})")
        wanted.setdefault(temperature, []).append(name)
    return tuple(
        _Heat(split_temperature(group[0])[1], tuple(name.partition("@")[0] for name in group), tuple(group))
        for _, group in sorted(wanted.items())
    )


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


class _Layer:
    """How logits follow from hidden states, and gradients of logits go back."""

    def __init__(self, compute: torch.dtype, full: torch.dtype, softcap: float | None, scale: float) -> None:
        self.compute = compute
        self.full = full
        self.softcap = softcap
        self.scale = scale

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, inverse: Tensor) -> Tensor:
        """Logits [c, V] of a chunk, divided by the temperature. ``hidden`` and ``weight`` have the compute dtype."""
        z = torch.mm(hidden, weight.t()).to(self.full)
        if bias is not None:
            z += bias
        if self.softcap is not None:
            z.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap * inverse[:, None])
        elif self.scale != 1.0:
            z.mul_(self.scale * inverse[:, None])
        else:
            z.mul_(inverse[:, None])
        return z

    def slope(self, logp: Tensor, lse: Tensor, inverse: Tensor) -> Tensor:
        """Derivative of the logits with respect to W h + b: [c, 1], or [c, V] under a cap."""
        factor = self.scale * inverse[:, None]
        if self.softcap is None:
            return factor
        capped = (logp + lse[:, None]).div_(inverse[:, None] * self.softcap)
        return capped.square_().neg_().add_(1).mul_(factor)


def _values(names: tuple[str, ...], z: Tensor, targets: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The functionals [c] by name and the log-sum-exp [c] of logits ``z`` [c, V], which are overwritten."""
    top = z.amax(-1, keepdim=True)
    z -= top  # shifted, so that nothing below subtracts large numbers from each other
    p = z.exp()
    total = p.sum(-1, keepdim=True)
    log_sum = total.log()
    lse = (log_sum + top).squeeze(-1)
    found = {"lse": lse, "logp": (z.gather(-1, targets[:, None]) - log_sum).squeeze(-1)}
    if "entropy" in names:
        found["entropy"] = (log_sum - torch.bmm(p[:, None], z[:, :, None])[:, 0] / total).squeeze(-1)
    if "collision" in names:
        found["collision"] = p.div_(total).square_().sum(-1)
    return {name: found[name] for name in names}, lse


def _gradient(logp: Tensor, targets: Tensor, values: Mapping[str, Tensor], grads: Mapping[str, Tensor]) -> Tensor:
    """Derivative [c, V] with respect to the logits of the functionals weighted by ``grads`` [c].

    d logp = 1[y] - p,  d lse = p,  d entropy = -p (log p + entropy),  d collision = 2 p (p - collision). Overwrites
    ``logp`` [c, V].
    """
    p = logp.exp()
    row = torch.zeros_like(logp[:, 0])
    if "lse" in grads:
        row = row + grads["lse"]
    if "logp" in grads:
        row = row - grads["logp"]
    if "collision" in grads:
        row = row - 2 * grads["collision"] * values["collision"]
    if "entropy" in grads:
        row = row - grads["entropy"] * values["entropy"]
        slope = logp.mul_(-grads["entropy"][:, None]).add_(row[:, None])
        if "collision" in grads:
            slope.addcmul_(p, 2 * grads["collision"][:, None])
    elif "collision" in grads:
        slope = torch.mul(p, 2 * grads["collision"][:, None], out=logp).add_(row[:, None])
    else:
        slope = row[:, None]
    p.mul_(slope)
    if "logp" in grads:
        p.scatter_add_(-1, targets[:, None], grads["logp"][:, None])
    return p


class _LinearFunctionals(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        inverse: Tensor,
        heats: tuple[_Heat, ...],
        layer: _Layer,
        chunk: int,
    ) -> tuple[Tensor, ...]:
        n = hidden.shape[0]
        outputs = [[hidden.new_empty(n, dtype=layer.full) for _ in heat.functionals] for heat in heats]
        lse = hidden.new_empty(len(heats), n, dtype=layer.full)
        with torch.autocast(hidden.device.type, enabled=False):
            w = weight.to(layer.compute)
            for start in range(0, n, chunk):
                rows = slice(start, start + chunk)
                h = hidden[rows].to(layer.compute)
                for k, z in enumerate(_each_heat(heats, layer, h, w, bias, inverse[rows])):
                    values, lse[k, rows] = _values(heats[k].functionals, z, targets[rows])
                    for output, value in zip(outputs[k], values.values(), strict=True):
                        output[rows] = value
        ctx.heats, ctx.layer, ctx.chunk = heats, layer, chunk
        ctx.set_materialize_grads(False)
        flat = tuple(output for group in outputs for output in group)
        ctx.save_for_backward(hidden, weight, bias, targets, inverse, lse, *flat)
        return flat

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, inverse, lse, *outputs = ctx.saved_tensors
        layer: _Layer = ctx.layer
        # Temperatures at which nothing is differentiated cost nothing here.
        heats, values, grads, sums = [], [], [], []
        given = iter(zip(outputs, grad_outputs, strict=True))
        for heat, sum_ in zip(ctx.heats, lse, strict=True):
            own = {name: next(given) for name in heat.functionals}
            if any(g is not None for _, g in own.values()):
                heats.append(heat)
                sums.append(sum_)
                values.append({name: value for name, (value, _) in own.items()})
                grads.append({name: g for name, (_, g) in own.items() if g is not None})
        if not grads:
            return (None,) * 8
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.zeros_like(hidden) if need_hidden else None
        d_weight = torch.zeros_like(weight, dtype=layer.full) if need_weight else None
        d_bias = torch.zeros_like(bias, dtype=layer.full) if need_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            w = weight.to(layer.compute)
            live = [grad for group in grads for grad in group.values()]
            for rows in _live_chunks(live, hidden.shape[0], ctx.chunk):
                h = hidden[rows].to(layer.compute)
                g = None
                for k, z in enumerate(_each_heat(heats, layer, h, w, bias, inverse[rows])):
                    logp = z.sub_(sums[k][rows, None])
                    slope = layer.slope(logp, sums[k][rows], heats[k].inverse(inverse[rows]))
                    part = _gradient(
                        logp,
                        targets[rows],
                        {name: value[rows] for name, value in values[k].items()},
                        {name: grad[rows].to(layer.full) for name, grad in grads[k].items()},
                    ).mul_(slope)
                    g = part if g is None else g.add_(part)
                    del z, logp, slope, part
                assert g is not None
                if d_bias is not None:
                    d_bias += g.sum(0)
                g = g.to(layer.compute)
                if d_hidden is not None:
                    d_hidden[rows] = torch.mm(g, w).to(d_hidden.dtype)
                if d_weight is not None:
                    _add_outer(d_weight, g, h)
        return (
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),
            *(None,) * 5,
        )


_apply: Callable[..., tuple[Tensor, ...]] = _LinearFunctionals.apply


def _each_heat(
    heats: Sequence[_Heat], layer: _Layer, hidden: Tensor, weight: Tensor, bias: Tensor | None, own: Tensor
) -> Iterator[Tensor]:
    """Logits [c, V] of a chunk at each temperature, from one matrix product; each is the caller's to overwrite."""
    first, *others = (heat.inverse(own) for heat in heats)
    z = layer.logits(hidden, weight, bias, first)
    for number, inverse in enumerate([first, *others]):
        if number == len(others):
            yield z.mul_((inverse / first)[:, None]) if others else z
        else:
            yield z * (inverse / first)[:, None]


def _live_chunks(grads: Sequence[Tensor], n: int, chunk: int) -> list[Any]:
    """Row indices of each chunk of the backward pass; rows whose gradients are all zero cost nothing."""
    live = torch.stack([grad != 0 for grad in grads]).any(0).nonzero().flatten()
    if live.numel() == n:
        return [slice(start, start + chunk) for start in range(0, n, chunk)]
    return list(torch.split(live, chunk)) if live.numel() else []


def _add_outer(total: Tensor, g: Tensor, h: Tensor) -> None:
    """``total += g.T @ h`` in place, in the precision of ``total`` across chunks."""
    if g.dtype == total.dtype:
        total.addmm_(g.t(), h)
        return
    for start in range(0, total.shape[0], _WEIGHT_ROWS):
        block = slice(start, start + _WEIGHT_ROWS)
        total[block] += torch.mm(g[:, block].t(), h)

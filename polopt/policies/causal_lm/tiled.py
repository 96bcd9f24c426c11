"""Functionals of a linear output layer and their gradient, tile by tile of positions times tokens.

Most logits exist while their tile is worked on, and no longer: the memory beyond inputs, outputs and gradients is a few
tiles and a bounded store, and a tile that fits the cache makes everything but the matrix products nearly free. The
backward pass computes logits again that were not stored, walks the tokens in its outer loop, and so finishes one piece
of the weight's gradient at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from polopt.core.policy import TEMPERED, split_temperature

FUNCTIONALS: Final = frozenset(TEMPERED)
"""What can be computed, at any temperature. One more is one line each in `_Sums` and `_gradient`."""

# Positions of a tile, and the bytes of its logits: within a processor's cache; on a GPU enough to fill it.
_ROWS: Final = {"cpu": 2048, "cuda": 8192}
_BYTES: Final = {"cpu": 8 * 2**20, "cuda": 128 * 2**20}
# Matrix products are most of the time, and logits that are kept spare the backward pass one of four: this share of them
# is, up to so many bytes. The plain computation holds all of them some four times.
_KEPT_SHARE: Final = 0.6
_KEPT_BYTES: Final = 512 * 2**20

Tile = tuple[int, int]
"""Positions and tokens of a tile."""


def tile_of(rows: int, device: torch.device, full: torch.dtype) -> Tile:
    """The tile that suits the device."""
    kind = "cpu" if device.type == "cpu" else "cuda"
    height = max(1, min(rows, _ROWS[kind]))
    return height, max(1, _BYTES[kind] // (height * full.itemsize))


class Heat(NamedTuple):
    """The functionals that are wanted at one temperature (None: at each position's own), and their names there."""

    temperature: float | None
    functionals: tuple[str, ...]
    names: tuple[str, ...]

    def inverse(self, z: Tensor, own: Tensor | None) -> Tensor | None:
        """1 / T of each position of the logits ``z``, [n]; None where it is 1 for all. ``own`` are the positions'."""
        if self.temperature is None or self.temperature == 1:
            return own if self.temperature is None else None
        return z.new_full((len(z),), 1 / self.temperature)


def heats_of(names: frozenset[str]) -> tuple[Heat, ...]:
    """The names by temperature, the positions' own first."""
    wanted: dict[str, list[str]] = {}
    for name in sorted(names):
        functional, temperature = name.partition("@")[::2]
        if functional not in FUNCTIONALS:
            raise ValueError(f"unknown functional {name!r} (known: {', '.join(sorted(FUNCTIONALS))})")
        wanted.setdefault(temperature, []).append(name)
    return tuple(
        Heat(split_temperature(group[0])[1], tuple(name.partition("@")[0] for name in group), tuple(group))
        for _, group in sorted(wanted.items())
    )


@dataclass(frozen=True)
class Layer:
    """How logits follow from hidden states, and gradients of logits go back."""

    compute: torch.dtype
    full: torch.dtype
    softcap: float | None
    scale: float

    def logits(self, product: Tensor, bias: Tensor | None) -> Tensor:
        """Logits [n, V] at temperature 1 from ``product`` = W h in the compute dtype, which may be overwritten."""
        z = product.to(self.full)
        if bias is not None:
            z += bias
        if self.softcap is not None:
            z.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap)
        elif self.scale != 1.0:
            z.mul_(self.scale)
        return z

    def slope(self, z: Tensor, inverse: Tensor | None) -> Tensor | float:
        """Derivative of the tempered logits ``z`` [n, V] with respect to W h + b: a number, [n, 1], or [n, V] under a
        cap.
        """
        factor = self.scale if inverse is None else self.scale * inverse[:, None]
        if self.softcap is None:
            return factor
        capped = z / self.softcap if inverse is None else z / (inverse[:, None] * self.softcap)
        return capped.square_().neg_().add_(1).mul_(factor)


def tiled_functionals(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    inverse: Tensor | None,
    heats: Sequence[Heat],
    layer: Layer,
    tile: Tile,
) -> tuple[Tensor, ...]:
    """The functionals [n] of all heats in turn, differentiable once in ``hidden``, ``weight`` and ``bias``.

    ``inverse`` [n] is 1 / T of each position, None for 1 everywhere.
    """
    differentiable = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _apply(hidden, weight, bias, targets, inverse, tuple(heats), layer, tile, differentiable)


class _Sums:
    """What a functional needs to know of the tokens seen so far, relative to their largest logit, [n] each."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.top: Tensor | None = None

    def add(self, z: Tensor) -> None:
        """Take in the logits of more tokens [n, c], which are overwritten."""
        top = z.amax(-1)
        z -= top[:, None]  # shifted, so that nothing below subtracts large numbers from each other
        p = z.exp()
        total = p.sum(-1)
        weighted = torch.linalg.vecdot(p, z) if "entropy" in self.names else None
        squares = p.square_().sum(-1) if "collision" in self.names else None
        if self.top is None:
            self.top, self.total, self.weighted, self.squares = top, total, weighted, squares
            return
        highest = torch.maximum(self.top, top)
        old, new = self.top - highest, top - highest
        a, b = old.exp(), new.exp()
        if weighted is not None and self.weighted is not None:
            self.weighted = a * (self.weighted + old * self.total) + b * (weighted + new * total)
        if squares is not None and self.squares is not None:
            self.squares = a.square() * self.squares + b.square() * squares
        self.total = a * self.total + b * total
        self.top = highest

    def values(self, chosen: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The functionals by name and the log-sum-exp; ``chosen`` are the logits of the targets."""
        assert self.top is not None
        log_sum = self.total.log()
        lse = self.top + log_sum
        found = {"lse": lse, "logp": (chosen - self.top) - log_sum}
        if self.weighted is not None:
            found["entropy"] = log_sum - self.weighted / self.total
        if self.squares is not None:
            found["collision"] = self.squares / self.total.square()
        return {name: found[name] for name in self.names}, lse


@dataclass(frozen=True, eq=False)
class _Slopes:
    """Derivatives with respect to a heat's logits of its functionals, weighted by what comes from above, [n] each.

    d logp = 1[y] - p,  d lse = p,  d entropy = -p (log p + entropy),  d collision = 2 p (p - collision). Together
    p (row + by_logp log p + by_p p) + by_target 1[y].
    """

    row: Tensor
    by_logp: Tensor | None
    by_p: Tensor | None
    by_target: Tensor | None

    @classmethod
    def of(cls, values: Mapping[str, Tensor], grads: Mapping[str, Tensor], full: torch.dtype) -> _Slopes:
        """From the functionals' values and their gradients."""
        given = {name: grad.to(full) for name, grad in grads.items()}
        row = torch.zeros_like(next(iter(values.values())))
        for name, sign in (("lse", 1), ("logp", -1)):
            if name in given:
                row = row + sign * given[name]
        if "collision" in given:
            row = row - 2 * given["collision"] * values["collision"]
        if "entropy" in given:
            row = row - given["entropy"] * values["entropy"]
        by_logp = -given["entropy"] if "entropy" in given else None
        by_p = 2 * given["collision"] if "collision" in given else None
        return cls(row, by_logp, by_p, given.get("logp"))

    def at(self, live: Tensor) -> _Slopes:
        """Those of some positions."""
        by_logp, by_p, by_target = (None if x is None else x[live] for x in (self.by_logp, self.by_p, self.by_target))
        return _Slopes(self.row[live], by_logp, by_p, by_target)

    def gradient(self, logp: Tensor, rows: slice, first: int, targets: Tensor) -> Tensor:
        """Of a tile whose log-probs [n, c] begin with token ``first``; these are overwritten."""
        p = logp.exp()
        slope = self.row[rows, None]
        if self.by_logp is not None:
            slope = torch.addcmul(slope, logp, self.by_logp[rows, None], out=logp)
        if self.by_p is not None:
            slope = torch.addcmul(slope, p, self.by_p[rows, None])
        p.mul_(slope)
        if self.by_target is not None:
            here = _inside(targets, first, p.shape[1])
            p[here, targets[here] - first] += self.by_target[rows][here]
        return p


class _TiledFunctionals(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        inverse: Tensor | None,
        heats: tuple[Heat, ...],
        layer: Layer,
        tile: Tile,
        differentiable: bool,
    ) -> tuple[Tensor, ...]:
        n, tokens = hidden.shape[0], weight.shape[0]
        outputs = [[hidden.new_empty(n, dtype=layer.full) for _ in heat.functionals] for heat in heats]
        lse = hidden.new_empty(len(heats), n, dtype=layer.full)
        size = n * tokens * layer.compute.itemsize
        store = _Store(min(_KEPT_BYTES, int(_KEPT_SHARE * size)) if differentiable else 0)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _pieces(n, tile[0]):
                h, y = hidden[rows].to(layer.compute), targets[rows]
                sums = [_Sums(heat.functionals) for heat in heats]
                chosen = lse.new_empty(len(heats), h.shape[0])
                for block in _pieces(tokens, tile[1]):
                    w, b = weight[block].to(layer.compute), None if bias is None else bias[block]
                    here = _inside(y, block.start, w.shape[0])
                    product = store.keep((rows.start, block.start), torch.mm(h, w.t()))
                    for k, z in enumerate(_each_heat(heats, layer.logits(product, b), _part(inverse, rows))):
                        chosen[k, here] = z[here, y[here] - block.start]
                        sums[k].add(z)
                for k, sum_ in enumerate(sums):
                    values, lse[k, rows] = sum_.values(chosen[k])
                    for output, value in zip(outputs[k], values.values(), strict=True):
                        output[rows] = value
        ctx.heats, ctx.layer, ctx.tile, ctx.store = heats, layer, tile, store
        ctx.set_materialize_grads(False)
        flat = tuple(output for group in outputs for output in group)
        ctx.save_for_backward(hidden, weight, bias, targets, inverse, lse, *flat)
        return flat

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, inverse, lse, *outputs = ctx.saved_tensors
        layer: Layer = ctx.layer
        # Temperatures at which nothing is differentiated cost nothing here.
        heats, slopes, sums, live = [], [], [], torch.zeros_like(targets, dtype=torch.bool)
        given = iter(zip(outputs, grad_outputs, strict=True))
        for heat, sum_ in zip(ctx.heats, lse, strict=True):
            own = {name: next(given) for name in heat.functionals}
            grads = {name: grad for name, (_, grad) in own.items() if grad is not None}
            if grads:
                heats.append(heat)
                sums.append(sum_)
                slopes.append(_Slopes.of({name: value for name, (value, _) in own.items()}, grads, layer.full))
                live |= torch.stack([grad != 0 for grad in grads.values()]).any(0)
        if not heats:
            return (None,) * 9
        # Rows whose gradients are all zero cost nothing either.
        everywhere = bool(live.all())
        states = hidden if everywhere else hidden[live]
        if not everywhere:
            slopes = [slope.at(live) for slope in slopes]
            sums, targets = [sum_[live] for sum_ in sums], targets[live]
            inverse = None if inverse is None else inverse[live]
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        d_states = torch.zeros_like(states, dtype=layer.full) if need_hidden else None
        d_weight = torch.empty_like(weight) if need_weight else None
        d_bias = torch.empty_like(bias) if need_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            for block in _pieces(weight.shape[0], ctx.tile[1]):
                w, b = weight[block].to(layer.compute), None if bias is None else bias[block]
                block_weight, block_bias = _Total(layer.full), _Total(layer.full)
                for rows in _pieces(len(targets), ctx.tile[0]):
                    h, part = states[rows].to(layer.compute), _part(inverse, rows)
                    g = _Total(layer.full)
                    product = ctx.store.copy((rows.start, block.start)) if everywhere else None
                    product = torch.mm(h, w.t()) if product is None else product
                    for k, z in enumerate(_each_heat(heats, layer.logits(product, b), part)):
                        slope = layer.slope(z, heats[k].inverse(z, part))
                        logp = z.sub_(sums[k][rows, None])
                        one = slopes[k].gradient(logp, rows, block.start, targets[rows])
                        g.add(one if isinstance(slope, float) and slope == 1 else one.mul_(slope))
                    if d_bias is not None:
                        block_bias.add(g.value.sum(0))
                    half = g.value.to(layer.compute)
                    if d_states is not None:
                        _add_product(d_states[rows], half, w)
                    if d_weight is not None:
                        block_weight.add(torch.mm(half.t(), h))
                if d_weight is not None:
                    d_weight[block] = block_weight.value
                if d_bias is not None:
                    d_bias[block] = block_bias.value
        return _scattered(d_states, hidden, live), d_weight, d_bias, *(None,) * 6


_apply: Callable[..., tuple[Tensor, ...]] = _TiledFunctionals.apply


class _Store:
    """Products of the forward pass that the backward pass need not compute again, by tile, up to so many bytes."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.kept: dict[tuple[int, int], Tensor] = {}

    def keep(self, tile: tuple[int, int], product: Tensor) -> Tensor:
        """The product, for the caller to overwrite; a copy stays where there is room."""
        if product.nbytes > self.room:
            return product
        self.room -= product.nbytes
        self.kept[tile] = product
        return product.clone()

    def copy(self, tile: tuple[int, int]) -> Tensor | None:
        """What was kept of the tile, for the caller to overwrite."""
        return self.kept[tile].clone() if tile in self.kept else None


class _Total:
    """A sum in full precision; its first term is taken as it is."""

    def __init__(self, full: torch.dtype) -> None:
        self.full = full
        self.value: Tensor = torch.zeros(())

    def add(self, term: Tensor) -> None:
        self.value = term if not self.value.ndim else self.value.to(self.full).add_(term)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b`` in the precision of ``total``."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += torch.mm(a, b)


def _scattered(d_states: Tensor | None, hidden: Tensor, live: Tensor) -> Tensor | None:
    """Gradients of the live rows in their places."""
    if d_states is None or len(d_states) == len(hidden):
        return None if d_states is None else d_states.to(hidden.dtype)
    whole = torch.zeros_like(hidden)
    whole[live] = d_states.to(hidden.dtype)
    return whole


def _pieces(size: int, width: int) -> list[slice]:
    return [slice(start, min(start + width, size)) for start in range(0, size, width)]


def _part(column: Tensor | None, rows: slice) -> Tensor | None:
    return None if column is None else column[rows]


def _inside(targets: Tensor, first: int, count: int) -> Tensor:
    """Which positions' targets are among ``count`` tokens from ``first`` on."""
    return ((targets >= first) & (targets < first + count)).nonzero().flatten()


def _each_heat(heats: Sequence[Heat], z: Tensor, own: Tensor | None) -> Iterator[Tensor]:
    """Logits ``z`` [n, c] of a tile at each temperature; each is the caller's to overwrite."""
    for number, heat in enumerate(heats):
        inverse = heat.inverse(z, own)
        last = number == len(heats) - 1
        if inverse is None:
            yield z if last else z.clone()
        else:
            yield z.mul_(inverse[:, None]) if last else z * inverse[:, None]

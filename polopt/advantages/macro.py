"""Where macro actions start: runs of consecutive steps that share one advantage (Chai et al. 2024, arXiv:2410.02743).

Boundaries are counted in trainable steps: a masked step belongs to no macro action, one may span it. All rules are
functions of a trajectory alone, whatever else is in its batch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from polopt.core.errors import UsageError
from polopt.core.rollout import Rollout
from polopt.core.segments import segment_cumsum, segment_is_last, segment_shift, segment_sum
from polopt.policies.sampling import uniforms

Boundary = Literal["fixed", "randomised", "perplexity", "parsing"]
Pool = Literal["equal", "unit", "position"]
LENGTHS: Final = (1, 2, 3, 5, 10)
"""Lengths of randomised n-grams."""


@dataclass(frozen=True)
class MacroActions:
    """How a trajectory is divided into macro actions.

    - ``fixed``: ``n`` steps each, the whole answer where ``n`` is None;
    - ``randomised``: lengths 1, 2, 3, 5 and 10, each ``repeats`` times in an order drawn from ``seed`` and the actions,
      then the rest;
    - ``perplexity``: one starts where the perplexity under ``model`` (None: the sampling policy) rises to the next;
    - ``parsing``: one starts where the step column ``macro`` changes; `constituents` finds it in a parse.

    ``isolate`` makes the last step one of its own. Raises UsageError for n or repeats below 1.
    """

    boundary: Boundary = "fixed"
    n: int | None = 5
    repeats: int = 1
    seed: int = 0
    model: str | None = "ref"
    isolate: bool = True

    def __post_init__(self) -> None:
        if self.repeats < 1 or (self.n is not None and self.n < 1):
            raise UsageError(f"macro actions need n >= 1 and repeats >= 1, got {self.n} and {self.repeats}")

    @property
    def columns(self) -> frozenset[str]:
        """Step columns that the rule reads."""
        logp = "logp" if self.model is None else f"logp/{self.model}"
        needed = {"randomised": {"action"}, "perplexity": {logp}, "parsing": {"macro"}}
        return frozenset(needed.get(self.boundary, ()))

    def starts(self, rollout: Rollout) -> Bool[Tensor, " step"]:
        """Whether a macro action starts at a step; False where masked."""
        match self.boundary:
            case "fixed":
                found = fixed(rollout, self.n)
            case "randomised":
                found = randomised(rollout, self.repeats, self.seed)
            case "perplexity":
                found = perplexity(rollout, rollout["logp" if self.model is None else f"logp/{self.model}"])
            case "parsing":
                found = changes(rollout, rollout["macro"])
        if not self.isolate:
            return found
        return found | segment_is_last(rollout.trajectory, rollout.n_trajectories, mask=rollout.mask)


def place(rollout: Rollout) -> Int[Tensor, " step"]:
    """Number of trainable steps before each step of its trajectory."""
    one = torch.ones(rollout.n_steps, device=rollout.device)
    count = segment_cumsum(one, rollout.trajectory, rollout.n_trajectories, mask=rollout.mask, exclusive=True)
    return count.round().long()


def fixed(rollout: Rollout, n: int | None) -> Bool[Tensor, " step"]:
    """Starts of macro actions of ``n`` steps each; None makes the whole answer one."""
    where = place(rollout)
    return rollout.mask & ((where == 0) if n is None else (where % n == 0))


def randomised(rollout: Rollout, repeats: int, seed: int) -> Bool[Tensor, " step"]:
    """Starts of macro actions of lengths `LENGTHS`, each ``repeats`` times in a random order; the rest is one.

    The order is drawn from ``seed`` and the trajectory's actions: the same answer is always cut in the same way.
    """
    where, mask, trajectory = place(rollout), rollout.mask, rollout.trajectory
    # Whole numbers below 2^32 add up exactly in float64, in whatever order.
    word = (uniforms(rollout["action"] + seed, where) * 2.0**32).floor()
    content = segment_sum(word, trajectory, rollout.n_trajectories, mask=mask).long()
    lengths = torch.tensor(LENGTHS, device=rollout.device).repeat_interleave(repeats)
    order = uniforms(content[:, None], torch.arange(len(lengths), device=rollout.device)).argsort(dim=1)
    longest = int(rollout.lengths.max()) if rollout.n_trajectories else 0
    starts = torch.zeros(rollout.n_trajectories, longest + 1, dtype=torch.bool, device=rollout.device)
    starts.scatter_(1, lengths[order].cumsum(1).clamp(max=longest), True)
    return mask & (starts[trajectory, where] | (where == 0))


def perplexity(rollout: Rollout, logp: Float[Tensor, " step"]) -> Bool[Tensor, " step"]:
    """Starts at t where ppl_{t+1} > ppl_t, ppl = exp(-``logp``), the next trainable step being t+1; and at the first.

    A macro action is thus a run of falling perplexity, counted from the step before it.
    """
    later = segment_shift(logp, rollout.trajectory, by=1, fill=torch.inf, mask=rollout.mask)
    return rollout.mask & ((later < logp) | (place(rollout) == 0))


def changes(rollout: Rollout, column: Tensor) -> Bool[Tensor, " step"]:
    """Starts where a step column takes another value than at the trainable step before."""
    value = column.double()
    before = segment_shift(value, rollout.trajectory, by=-1, fill=torch.nan, mask=rollout.mask)
    return rollout.mask & (value != before)


def shares(
    macro: Int[Tensor, " step"], within: Float[Tensor, " step"], mask: Bool[Tensor, " step"], count: int, pool: Pool
) -> Float[Tensor, " step"]:
    """sigma_j of each step, summing to 1 over the trainable steps of its macro action.

    ``equal`` 1 / n, ``unit`` 1 on the last, ``position`` proportional to 1 / (j + 1); ``within`` is j.
    """
    match pool:
        case "equal":
            share = torch.ones_like(within)
        case "unit":
            share = segment_is_last(macro, count, mask=mask).to(within)
        case "position":
            share = 1 / (within + 1)
    return share / segment_sum(share, macro, count, mask=mask)[macro]


def constituents(tree: str, cutoff: int = 5, sizes: Sequence[int] | None = None) -> tuple[int, ...]:
    """Boundaries 0 = b_0 < ... < b_K = T of the macro actions that a parse makes of its T tokens.

    ``tree`` is bracketed, ``(S (NP (D the) (N cat)) (V sat))``; several trees (sentences) may follow each other.
    ``sizes`` are the tokens of each leaf, one where it is left out. From the root down, a constituent of fewer than
    ``cutoff`` tokens is a macro action; one of a single leaf joins the macro action before it, leading ones are one of
    their own; a larger one is divided into its children. Raises UsageError for brackets that do not match or sizes
    that do not fit the leaves. arXiv:2410.02743, section 3.2, and its code (`parsing_selection`).
    """
    forest = _read(iter(re.findall(r"[()]|[^\s()]+", tree)), tree, nested=False)
    leaves = [leaf for root in forest for leaf in _leaves(root)]
    tokens = [1] * len(leaves) if sizes is None else list(sizes)
    if len(tokens) != len(leaves):
        raise UsageError(f"sizes has {len(tokens)} entries for the {len(leaves)} leaves of the parse {tree[:60]!r}")
    remaining = iter(tokens)
    bounds = [0]
    for root in forest:
        # A sentence starts anew: only what is in it joins.
        local: list[int] = []
        end = bounds[-1]
        for many, count in _pieces(root, cutoff, remaining):
            end += count
            if many or not local:
                local.append(end)
            else:
                local[-1] = end
        bounds += local
    return tuple(bounds)


_Tree = Any  # a leaf, or a list of trees


def _read(words: Iterator[str], tree: str, *, nested: bool = True) -> list[_Tree]:
    """Trees up to the closing bracket; what follows an opening bracket directly is the label, and dropped."""
    found: list[_Tree] = []
    first = nested
    for word in words:
        if word == "(":
            found.append(_read(words, tree))
        elif word == ")":
            if nested:
                return found
            break
        elif not first:
            found.append(word)
        first = False
    else:
        if not nested:
            return found
    raise UsageError(f"the brackets of the parse {tree[:60]!r} do not match")


def _leaves(tree: _Tree) -> list[str]:
    return [tree] if isinstance(tree, str) else [leaf for child in tree for leaf in _leaves(child)]


def _pieces(tree: _Tree, cutoff: int, sizes: Iterator[int]) -> list[tuple[bool, int]]:
    """The constituents into which a tree is divided: whether each has several leaves, and its tokens."""
    count = len(_leaves(tree))
    if count <= 1:
        return [(False, sum(next(sizes) for _ in range(count)))] * count
    own = [next(sizes) for _ in range(count)]
    if sum(own) < cutoff:
        return [(True, sum(own))]
    inner = iter(own)
    return [piece for child in tree for piece in _pieces(child, cutoff, inner)]

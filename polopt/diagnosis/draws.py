"""Groups of sequences and how likely each is: all there are, or a sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from polopt.policies.exact import ExactPolicy

LARGEST: Final = 20_000
"""Most groups that are enumerated; beyond it they are sampled."""

NEGLIGIBLE: Final = 1e-12
"""Groups of smaller probability are left out where only expectations are wanted."""


@dataclass(frozen=True, eq=False)
class Draws:
    """G groups of trajectories, T in all: ``problem``, ``sequence`` and ``group`` [T]; ``chance`` [G] sums to 1.

    ``exact`` says that these are all groups there are, with their probabilities.
    """

    problem: Int[Tensor, " trajectory"]
    sequence: Int[Tensor, " trajectory"]
    group: Int[Tensor, " trajectory"]
    chance: Float[Tensor, " group"]
    exact: bool


def count_groups(sequences: int, sizes: Sequence[int]) -> int:
    """Number of distinct groups: sum_b C(S + n_b - 1, n_b), since the order within a group does not matter."""
    return sum(math.comb(sequences + size - 1, size) for size in sizes)


def enumerated(behaviour: ExactPolicy, sizes: Sequence[int]) -> Draws:
    """Every multiset of n_b sequences of every problem b, with probability (1/B) n! / prod_s c_s! prod_s p_s^c_s."""
    with torch.no_grad():
        logp = behaviour.log_probabilities()
    parts = [_multisets(logp.shape[1], size) for size in sizes]
    log_chances = []
    for b, members in enumerate(parts):
        size = members.shape[1]
        # How often the entry at a place occurred before it: the product over places of 1/(1 + that) is prod 1/c_s!.
        before = torch.stack([(members[:, :i] == members[:, i : i + 1]).sum(1) for i in range(size)], dim=1)
        log_chances.append(math.lgamma(size + 1) + (logp[b, members] - (before + 1).to(logp).log()).sum(1))
    chance = torch.cat(log_chances).exp() / len(parts)
    return _packed(parts, chance / chance.sum(), exact=True)


def sampled(behaviour: ExactPolicy, sizes: Sequence[int], groups: int, *, seed: int) -> Draws:
    """``groups`` groups whose prompts go round the problems, each as likely as the other."""
    rounds = math.ceil(groups / len(sizes))
    drawn = behaviour.sample_sequences(rounds * max(sizes), seed=seed)
    parts = [drawn[b, : rounds * size].view(rounds, size) for b, size in enumerate(sizes)]
    count = rounds * len(sizes)
    packed = _packed(parts, torch.full((count,), 1 / count, dtype=torch.float64), exact=False)
    # Group r of problem b becomes group r B + b: any consecutive groups hold a mixture of prompts.
    place = packed.group % rounds * len(sizes) + packed.group.div(rounds, rounding_mode="floor")
    order = place.argsort(stable=True)
    return Draws(packed.problem[order], packed.sequence[order], place[order], packed.chance, exact=False)


def likely(draws: Draws) -> Draws:
    """Without groups of negligible probability."""
    keep = draws.chance > NEGLIGIBLE
    if bool(keep.all()):
        return draws
    mine = keep[draws.group]
    chance = draws.chance[keep]
    renumbered = keep.cumsum(0) - 1
    return Draws(
        draws.problem[mine],
        draws.sequence[mine],
        renumbered[draws.group[mine]],
        chance / chance.sum(),
        draws.exact,
    )


def _multisets(kinds: int, size: int) -> Int[Tensor, "group member"]:
    """All non-decreasing rows of ``size`` numbers below ``kinds``."""
    rows = torch.arange(kinds)[:, None]
    for _ in range(size - 1):
        last = rows[:, -1]
        following = kinds - last
        start = following.cumsum(0) - following
        step = torch.arange(int(following.sum())) - start.repeat_interleave(following)
        rows = torch.cat(
            [rows.repeat_interleave(following, 0), (last.repeat_interleave(following) + step)[:, None]], dim=1
        )
    return rows


def _packed(parts: Sequence[Tensor], chance: Tensor, *, exact: bool) -> Draws:
    counts = torch.tensor([len(part) for part in parts])
    sizes = torch.tensor([part.shape[1] for part in parts])
    problem_of = torch.arange(len(parts)).repeat_interleave(counts)
    size_of = sizes[problem_of]
    return Draws(
        problem_of.repeat_interleave(size_of),
        torch.cat([part.flatten() for part in parts]),
        torch.arange(len(problem_of)).repeat_interleave(size_of),
        chance,
        exact,
    )

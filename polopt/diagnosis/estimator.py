"""Mean and spread of a method's gradient at one policy: by enumeration of all groups, or from a sample of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from polopt.core.policy import of_critic
from polopt.core.rollout import Rollout
from polopt.diagnosis import draws as drawing
from polopt.diagnosis.draws import Draws
from polopt.diagnosis.world import CHANCE, Catalogue, World, decisions, expected_counts
from polopt.policies.exact import ExactPolicy

Kind = Literal["exact", "sampled groups", "sampled batches"]
"""``exact``: every group, weighted by its probability. ``sampled groups``: groups stand by themselves, but are too
many. ``sampled batches``: what a group contributes depends on the rest of its batch."""

GROUPS: Final = 20_000
MEMORY: Final = 20_000_000
"""Most numbers that the groups' gradients may have together."""
BATCHES: Final = 256
ROUNDING: Final = 1e-12
"""An expectation this much shorter than the groups' gradients is zero."""
REFILLS: Final = 8
"""Batches drawn in place of one whose groups a filter drops, at most."""


@dataclass(frozen=True, eq=False)
class Estimate:
    """Ascent directions (minus the gradient of the loss), flat in the logits, D = B P V.

    ``rows`` [G, D] is what each group that the filter keeps contributes, ``chance`` [G] its probability among those;
    ``mean`` [D] their expectation, for a batch of any size. ``noise`` is the trace of the covariance of a batch's
    gradient times the trajectories drawn for it; ``error`` the same per draw of this estimate, its squared standard
    error (0 where exact). ``kept`` is the share of groups that the filter keeps. ``right``, ``wrong`` [G]: every
    response of the group is right, or wrong; ``right_before``, ``wrong_before`` are their shares before the filter.
    """

    kind: Kind
    rows: Float[Tensor, "group parameter"]
    chance: Float[Tensor, " group"]
    mean: Float[Tensor, " parameter"]
    noise: float
    error: float
    kept: float
    draws: int
    blocks: Float[Tensor, "block parameter"] | None
    right: Bool[Tensor, " group"]
    wrong: Bool[Tensor, " group"]
    right_before: float
    wrong_before: float

    @property
    def length(self) -> float:
        """|mean|; 0 where it is but the rounding of groups that cancel."""
        length, whole = float(self.mean.norm()), float(self.chance @ self.rows.norm(dim=1))
        return length if length > ROUNDING * whole else 0.0


def estimate(
    world: World,
    policy: ExactPolicy,
    behaviour: ExactPolicy,
    *,
    prompts: int = 8,
    seed: int = 0,
    limit: int = drawing.LARGEST,
    batches: int = BATCHES,
    tell: Callable[[str], None] = lambda text: None,
) -> Estimate:
    """The gradient of a first update at ``policy`` on data of ``behaviour``.

    Groups of the sizes of the problem; ``prompts`` groups make a batch where that matters, ``limit`` is the most groups
    to enumerate. A filter's batch is refilled: expectations are conditional on what it keeps.
    """
    sizes = world.problem.group_sizes
    room = max(MEMORY // policy.logits.numel(), 1)
    if drawing.count_groups(world.problem.space.n_sequences, sizes) <= min(limit, room):
        chosen = drawing.enumerated(behaviour, sizes)
    else:
        chosen = drawing.sampled(behaviour, sizes, min(GROUPS, room), seed=seed)
    rollout = world.rollout(policy, behaviour, chosen)
    if world.is_local(policy, rollout):
        return _by_group(world, policy, rollout, chosen)
    return _by_batch(world, policy, behaviour, prompts, batches, seed, tell)


def expected_direction(world: World, policy: ExactPolicy, draws: Draws, catalogue: Catalogue) -> Tensor:
    """E[ascent direction] on-policy, [D]: `Estimate.mean` without what belongs to single groups."""
    kept = world.filtered(world.rollout(policy, policy, drawing.likely(draws)))
    if not kept.n_trajectories:
        return torch.zeros_like(policy.logits).flatten()
    chance = kept[CHANCE] / kept[CHANCE].sum()
    slopes = world.slopes(policy, kept, expected_counts(kept, chance))
    place, share = decisions(kept, policy), chance[kept.step_group]
    size = policy.problems * policy.space.n_nodes * policy.space.vocabulary
    coefficients = {n: share.new_zeros(size).index_add(0, place, -share * slope) for n, slope in slopes.items()}
    return catalogue.expected(policy, coefficients)


def _by_group(world: World, policy: ExactPolicy, rollout: Rollout, draws: Draws) -> Estimate:
    kept = world.filtered(rollout)
    if not kept.n_trajectories:
        return _nothing(policy, "exact" if draws.exact else "sampled groups", rollout.n_groups)
    share = float(kept[CHANCE].sum())
    chance = kept[CHANCE] / kept[CHANCE].sum()
    slopes = world.slopes(policy, kept, expected_counts(kept, chance))
    rows = _rows(policy, kept, slopes)
    mean = chance @ rows
    variance = float((chance @ (rows - mean).square()).sum())
    drawn = float(draws.chance @ torch.bincount(draws.group).to(draws.chance)) / share
    blocks = None if draws.exact else torch.stack([block.mean(0) for block in rows.chunk(20)])
    return Estimate(
        "exact" if draws.exact else "sampled groups",
        rows,
        chance,
        mean,
        variance * drawn,
        0.0 if draws.exact else variance / len(rows),
        min(share, 1.0),
        rollout.n_groups,
        blocks,
        *_all_right(world, kept),
        *(float(draws.chance[which].sum()) for which in _all_right(world, rollout)),
    )


def _by_batch(
    world: World,
    policy: ExactPolicy,
    behaviour: ExactPolicy,
    prompts: int,
    batches: int,
    seed: int,
    tell: Callable[[str], None],
) -> Estimate:
    sizes = world.problem.group_sizes
    rows: list[Tensor] = []
    right: list[Tensor] = []
    wrong: list[Tensor] = []
    means: list[Tensor] = []
    drawn = kept_groups = drawn_trajectories = 0
    before = [0, 0]
    jacobians = _jacobians(world, policy)
    pool, at = None, 0
    for batch in range(batches):
        pieces: list[Rollout] = []
        filled = 0
        for _ in range(REFILLS):
            if pool is None or at + prompts > pool.n_groups:
                # Groups are made a few hundred at a time and handed out in batches.
                made = drawing.sampled(behaviour, sizes, max(64, 8 * prompts), seed=seed + 1 + drawn)
                pool, at = world.rollout(policy, behaviour, made), 0
            piece = pool.select((pool.group >= at) & (pool.group < at + prompts))
            at += prompts
            drawn += prompts
            drawn_trajectories += piece.n_trajectories
            before = [n + int(which.sum()) for n, which in zip(before, _all_right(world, piece), strict=True)]
            left = world.filtered(piece)
            kept_groups += left.n_groups
            if left.n_trajectories:
                pieces.append(left)
                filled += left.n_groups
            if filled >= prompts:
                break
        if not pieces:
            continue
        whole = Rollout.concat(pieces)
        whole = whole.select(whole.group < prompts)
        mine = _rows(policy, whole, world.slopes(policy, whole), jacobians)
        means.append(mine.sum(0))
        rows.append(mine * len(mine))
        for found, which in zip((right, wrong), _all_right(world, whole), strict=True):
            found.append(which)
        tell(f"batch {batch + 1}/{batches}")
    if not means:
        return _nothing(policy, "sampled batches", drawn)
    each = torch.stack(means)
    mean = each.mean(0)
    variance = float(each.var(0, unbiased=True).sum()) if len(each) > 1 else math.nan
    flat = torch.cat(rows)
    weight = torch.cat([torch.full((len(r),), 1 / (len(r) * len(rows)), dtype=mean.dtype) for r in rows])
    return Estimate(
        "sampled batches",
        flat,
        weight,
        mean,
        variance * drawn_trajectories / len(each),
        variance / len(each),
        kept_groups / drawn,
        drawn,
        torch.stack([block.mean(0) for block in each.chunk(20)]),
        torch.cat(right),
        torch.cat(wrong),
        *(count / drawn for count in before),
    )


def _nothing(policy: ExactPolicy, kind: Kind, draws: int) -> Estimate:
    size = policy.logits.numel()
    none = torch.zeros(0, dtype=policy.logits.dtype)
    return Estimate(
        *(kind, none.new_zeros(0, size), none, none.new_zeros(size), 0.0, 0.0, 0.0, draws, None),
        *(none.bool(), none.bool(), math.nan, math.nan),
    )


def _jacobians(world: World, policy: ExactPolicy) -> dict[str, Tensor]:
    catalogue = Catalogue.of(policy)
    return {n: catalogue.jacobian(policy, n) for n in sorted(world.method.evaluates) if not of_critic([n])}


def _rows(
    policy: ExactPolicy, rollout: Rollout, slopes: dict[str, Tensor], jacobians: dict[str, Tensor] | None = None
) -> Float[Tensor, "group parameter"]:
    """Ascent direction of each group: minus the sum over its steps of slope times gradient of the functional."""
    if jacobians is None:
        catalogue = Catalogue.of(policy)
        jacobians = {n: catalogue.jacobian(policy, n) for n in slopes if not of_critic([n])}
    size = policy.problems * policy.space.n_nodes * policy.space.vocabulary
    index = rollout.step_group * size + decisions(rollout, policy)
    rows = torch.zeros(rollout.n_groups, policy.logits.numel(), dtype=policy.logits.dtype)
    for name, jacobian in jacobians.items():
        taken = rows.new_zeros(rollout.n_groups * size).index_add(0, index, -slopes[name].to(rows))
        by_prefix = taken.view(rollout.n_groups, *jacobian.shape[:2])
        rows = rows + torch.einsum("gkv,kvw->gkw", by_prefix, jacobian).flatten(1)
    return rows


def _all_right(world: World, rollout: Rollout) -> tuple[Bool[Tensor, " group"], Bool[Tensor, " group"]]:
    """Groups whose responses are all right, all wrong: scores above, not above, the middle of the problem's range."""
    reward = world.problem.reward
    middle = (reward.amin(1) + reward.amax(1)) / 2
    payload: object = rollout.payload
    problem: Int[Tensor, " trajectory"] = payload.problem  # type: ignore[attr-defined]
    right = (rollout["score"] > middle[problem]).to(torch.int64)
    count = torch.zeros(rollout.n_groups, dtype=torch.int64).index_add(0, rollout.group, right)
    size = torch.bincount(rollout.group, minlength=rollout.n_groups)
    return count == size, count == 0

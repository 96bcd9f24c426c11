"""Where a method leads: its expected gradient followed from the initial policy, on-policy at every step."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from polopt.diagnosis import draws as drawing
from polopt.diagnosis.estimator import expected_direction
from polopt.diagnosis.world import Catalogue, World
from polopt.policies.exact import ExactPolicy, entropy, expected_reward, f_divergence, kl, tilted

LONGEST: Final = 0.25
"""Most that a logit moves in a step."""
SMALL: Final = 1e-4
"""Converged: the direction is this much shorter than the longest on the way."""
SAMPLE: Final = 512
"""Groups of a step's batch where the expectation cannot be enumerated."""
PATIENCE: Final = 5
"""Sampled directions that must vanish in a row: one batch may happen to hold no contrast."""


@dataclass(frozen=True)
class FixedPoint:
    """What the policy became. Means over problems; nats.

    ``target_tv`` and ``target_kl`` = KL(policy || target) are the distances to the reward-tilted target
    reference(y) exp(r(y) / beta) / Z of a method with a KL to its reference, None without; ``best`` is the mass on the
    sequences of greatest reward. ``exact``: the expectation was enumerated, else each step took a batch of `SAMPLE`
    groups. ``rewards`` and ``entropies`` are those before every step and at the end.
    """

    converged: bool
    exact: bool
    steps: int
    reward: float
    entropy: float
    best: float
    target_tv: float | None
    target_kl: float | None
    rewards: tuple[float, ...]
    entropies: tuple[float, ...]
    policy: ExactPolicy


def follow(
    world: World,
    *,
    local: bool,
    steps: int = 400,
    seconds: float = 10.0,
    seed: int = 0,
    limit: int = drawing.LARGEST,
    tell: Callable[[str], None] = lambda text: None,
) -> FixedPoint:
    """theta <- theta + size * E[direction], until the direction vanishes, or ``steps`` or ``seconds`` are over.

    The size is Barzilai and Borwein's (1988, BB2) where the direction shrinks along the path, and never moves a logit
    by more than `LONGEST`. Where groups are not ``local`` or too many, the direction is that of a sampled batch and the
    longest step falls as 1 / (1 + step / 50).
    """
    policy = world.policy()
    catalogue = Catalogue.of(policy)
    sizes = world.problem.group_sizes
    exact = local and drawing.count_groups(policy.space.n_sequences, sizes) <= limit
    started = time.monotonic()
    rewards, entropies = [], []
    longest, converged, still = 0.0, False, 0
    before: tuple[Tensor, Tensor] | None = None
    for step in range(steps + 1):
        with torch.no_grad():
            rewards.append(float(expected_reward(policy, world.problem.reward).mean()))
            entropies.append(float(entropy(policy).mean()))
        if step == steps or time.monotonic() - started > seconds:
            break
        if exact:
            chosen = drawing.enumerated(policy, sizes)
        else:
            chosen = drawing.sampled(policy, sizes, SAMPLE, seed=seed + step)
        direction = expected_direction(world, policy, chosen, catalogue)
        length = float(direction.norm())
        longest = max(longest, length)
        still = still + 1 if length <= SMALL * longest else 0
        if still == (1 if exact else PATIENCE):
            converged = True
            break
        if not length:
            continue
        reach = LONGEST if exact else LONGEST / (1 + step / 50)
        size = reach / float(direction.abs().max())
        with torch.no_grad():
            here = policy.logits.flatten().clone()
            if exact and before is not None:
                moved, turned = here - before[0], before[1] - direction
                if (slope := float(moved @ turned)) > 0:
                    size = min(size, slope / float(turned @ turned))
            policy.logits.add_(direction.view_as(policy.logits), alpha=size)
        before = (here, direction)
        tell(f"step {step + 1}")
    return _described(world, policy, converged, exact, rewards, entropies)


@torch.no_grad()
def _described(
    world: World, policy: ExactPolicy, converged: bool, exact: bool, rewards: list[float], entropies: list[float]
) -> FixedPoint:
    reward, chance = world.problem.reward, policy.probabilities()
    best = (chance * (reward >= reward.amax(1, keepdim=True) - 1e-12)).sum(1).mean()
    tv = distance = None
    if (beta := world.beta()) > 0:
        reference = ExactPolicy(policy.space, policy.problems, world.problem.reference).probabilities()
        target = tilted(reference, reward, beta)
        tv = float(f_divergence(chance, target, "tv").mean())
        distance = float(kl(chance, target).mean())
    return FixedPoint(
        converged,
        exact,
        len(rewards) - 1,
        rewards[-1],
        entropies[-1],
        float(best),
        tv,
        distance,
        tuple(rewards),
        tuple(entropies),
        policy,
    )

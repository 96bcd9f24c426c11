"""Stratified GRPO: strata against cross-stratum bias, and what a pure one cannot learn (Zhu et al. 2025,
arXiv:2510.06214).

Design, fixed before the first run. Exact world: the first of three tokens chooses a structure z in {0, 1, 2}, two more
act in it. Each prompt has a random right action for either place. Structure 0 pays 0.3, and 0.2 more for a right first
action; structure 1 pays 0.75 for a right first action, structure 2 pays 1 for both right: the initial policy (logits
normal with standard deviation 0.2) earns about 0.37, 0.25 and 0.11 in them, their best are 0.5, 0.75 and 1. 8 prompts,
groups of 8, Adam at rate 0.1, 60 iterations; the stratum of a trajectory is its first token.

Arms: GRPO, RLOO (its KL off), GRPO with an entropy bonus of 0.01, and the stratified advantage with alpha 0.5, 0.8 (the
default) and 1. Measured at the end, mean over the prompts: exact expected reward, exact probability of structure 0, and
exact expected reward given another structure. A collapse is a prompt whose probability of structure 0 is above 0.9.
"Moves to structure 0" compares its probability with the initial one.

No preference: gradient of one batch of 8 groups of 8 per prompt from the initial policy; the norm of its part in the
logits of the first token over the whole norm, with alpha 1, is at most 1e-6. (Trained probabilities would not do: Adam
divides rounding errors by their own size: a trial on two seeds showed it, before the first full run.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from polopt.claims.claim import Claim
from polopt.claims.exact import Run, batch, credited, gradient, start
from polopt.core.method import Method
from polopt.core.override import override
from polopt.core.rollout import Rollout
from polopt.methods.base.grpo import grpo
from polopt.methods.base.rloo import rloo
from polopt.methods.credit.stratified_grpo import Stratified, stratified_grpo
from polopt.policies.exact import SequenceSpace
from polopt.regularizers.entropy import Entropy
from polopt.rollouts.groups import Groups
from polopt.tasks.problems import Problem

SPACE = SequenceSpace(3, 3)
PROMPTS, GROUP, ITERATIONS = 8, 8, 60


@dataclass(frozen=True)
class StructuredGroups(Groups):
    """Groups with the trajectory column ``stratum``: the first action; for experiments."""

    gives = Groups.gives | {"stratum"}

    def finish(self, rollout: Rollout, seed: int) -> Rollout:
        return with_strata(rollout)


def with_strata(rollout: Rollout) -> Rollout:
    """The rollout with the first action of each trajectory as ``stratum``."""
    first = rollout.lengths.cumsum(0) - rollout.lengths
    return rollout.with_columns(trajectory={"stratum": rollout["action"][first]})


def two_stages(seed: int) -> Problem:
    """The prompts of the design."""
    generator = torch.Generator().manual_seed(seed)
    shape = (PROMPTS, SPACE.n_nodes, SPACE.vocabulary)
    initial = 0.2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    target = torch.randint(0, SPACE.vocabulary, (PROMPTS, 2), generator=generator)
    right = SPACE.sequences[None, :, 1:] == target[:, None]
    first, both = right[..., 0].double(), right.all(-1).double()
    structure = SPACE.sequences[:, 0].expand(PROMPTS, -1)
    reward = torch.stack([0.3 + 0.2 * first, 0.75 * first, both]).gather(0, structure[None])[0]
    return Problem("two-stages", SPACE, {"reward": reward}, initial, initial, {}, (GROUP,) * PROMPTS)


def stratified(alpha: float) -> Method:
    """The stratified advantage by first action."""
    return stratified_grpo | {"advantage": Stratified(alpha, strata="stratum")}


ARMS = {
    "grpo": grpo,
    "rloo": override(rloo, {"reward.beta": 0.0}),
    "entropy": grpo | {"regularizer": Entropy(0.01)},
    "alpha 0.5": stratified(0.5),
    "alpha 0.8": stratified(0.8),
    "alpha 1": stratified(1.0),
}


def _measured(run: Run, name: str) -> dict[str, float]:
    with torch.no_grad():
        chance = run.policy.probabilities()
    other = chance * (SPACE.sequences[:, 0] > 0)
    within = (other * run.problem.reward).sum(-1) / other.sum(-1)
    zero = 1 - other.sum(-1)
    return {
        f"{name}/reward": run.reward,
        f"{name}/zero": float(zero.mean()),
        f"{name}/collapsed": float((zero > 0.9).double().mean()),
        f"{name}/within": float(within.mean()),
    }


def learning(seed: int, quick: bool) -> Mapping[str, float]:
    """Reward, probability of structure 0 and reward in the other structures, of every arm at the end."""
    made = two_stages(seed)
    found: dict[str, float] = {}
    for name, method in ARMS.items():
        run = start(made, method | {"rollout": StructuredGroups()}, seed=seed, group=GROUP)
        if not found:
            found |= _measured(run, "initial")
        for _ in range(2 if quick else ITERATIONS):
            run.step()
        found |= _measured(run, name)
    return found


def preference(seed: int, quick: bool) -> Mapping[str, float]:
    """Share of the gradient that reaches the choice of structure, purely stratified and blended."""
    made = two_stages(seed)
    policy = made.policy()
    rollout = with_strata(batch(made, policy, seed=seed, sizes=[GROUP] * (2 if quick else 8)))
    found = {}
    for name in ("alpha 1", "alpha 0.8"):
        slope = gradient(ARMS[name], policy, credited(ARMS[name], policy, rollout))
        found[name] = float(slope[:, 0].norm() / slope.norm())
    return found


CLAIMS = (
    Claim(
        "stratified-grpo",
        "grpo-moves-to-structure-zero",
        "GRPO moves to the structure that is better while the others are untrained.",
        "exact",
        "the initial policy",
        "exact probability of structure 0",
        "higher",
        "grpo/zero",
        "initial/zero",
        measure=learning,
    ),
    Claim(
        "stratified-grpo",
        "collapse",
        "Fewer prompts than with GRPO collapse to that structure.",
        "exact",
        "grpo",
        "share of prompts whose probability of structure 0 is above 0.9",
        "lower",
        "alpha 0.8/collapsed",
        "grpo/collapsed",
        measure=learning,
    ),
    Claim(
        "stratified-grpo",
        "reward-grpo",
        "Stratified GRPO ends with a higher reward than GRPO.",
        "exact",
        "grpo",
        "exact expected reward",
        "higher",
        "alpha 0.8/reward",
        "grpo/reward",
        measure=learning,
    ),
    Claim(
        "stratified-grpo",
        "reward-rloo",
        "Stratified GRPO ends with a higher reward than RLOO.",
        "exact",
        "rloo",
        "exact expected reward",
        "higher",
        "alpha 0.8/reward",
        "rloo/reward",
        measure=learning,
    ),
    Claim(
        "stratified-grpo",
        "reward-entropy",
        "Stratified GRPO ends with a higher reward than GRPO with an entropy bonus.",
        "exact",
        "grpo, entropy bonus 0.01",
        "exact expected reward",
        "higher",
        "alpha 0.8/reward",
        "entropy/reward",
        measure=learning,
    ),
    Claim(
        "stratified-grpo",
        "within",
        "It goes on improving inside the structures that GRPO gives up.",
        "exact",
        "grpo",
        "exact expected reward given a structure other than 0",
        "higher",
        "alpha 0.8/within",
        "grpo/within",
        measure=learning,
    ),
    Claim(
        "stratified-grpo",
        "no-preference",
        "With alpha 1 nothing teaches which structure is better.",
        "exact",
        "no gradient",
        "share of the gradient's norm in the logits of the structure",
        "equal",
        "alpha 1",
        None,
        margin=1e-6,
        measure=preference,
    ),
    Claim(
        "stratified-grpo",
        "blend-prefers",
        "The blend does teach it.",
        "exact",
        "alpha 1",
        "share of the gradient's norm in the logits of the structure",
        "higher",
        "alpha 0.8",
        "alpha 1",
        measure=preference,
    ),
    Claim(
        "stratified-grpo",
        "blend",
        "The blend ends with a higher reward than the purely stratified advantage.",
        "exact",
        "alpha 1",
        "exact expected reward",
        "higher",
        "alpha 0.8/reward",
        "alpha 1/reward",
        measure=learning,
    ),
    Claim(
        "stratified-grpo",
        "half-blend",
        "An even blend ends with a higher reward than the purely stratified advantage.",
        "exact",
        "alpha 1",
        "exact expected reward",
        "higher",
        "alpha 0.5/reward",
        "alpha 1/reward",
        measure=learning,
    ),
)

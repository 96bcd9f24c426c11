"""GD2PO: what leaving out contradictory responses does (Liu et al. 2026, arXiv:2606.16771).

Design, fixed before the first run. Exact world: 5 tokens, length 4, 8 prompts, groups of 8, Adam at rate 0.1, one
update per rollout. Two binary rewards, each on a random 30% of the sequences, worth 1. Opposed: 3% of the sequences
have both (independent rewards: 9%); aligned: 25% have both. Initial logits are normal with standard deviation 0.5.

- Effective advantage: mean |A| over the responses with A != 0 at the initial policy, 20 batches, opposed rewards; GD2PO
  (tau 0.8) against GDPO, both whitened over steps.
- Joint improvement: iterations until both expected rewards are at least 0.8, at most 100 (counted as 100). Arms: GRPO
  on the sum, GDPO (over steps, eps 1e-6: what GD2PO is without conflicts), GD2PO with tau 0.8, GD2PO hard, and a
  control that drops as many responses of each group as GD2PO with tau 0.8, at random.
- Aligned rewards: the same for GDPO and GD2PO; "no difference" means less than 3 iterations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from polopt.claims.claim import Claim
from polopt.claims.exact import Run, batch, credited, start
from polopt.core.rollout import Rollout
from polopt.methods.base.grpo import grpo
from polopt.methods.credit.gd2po import ConflictFilter, gd2po
from polopt.methods.credit.gdpo_multireward import DecoupledZScore, gdpo_multireward
from polopt.policies.exact import SequenceSpace
from polopt.tasks.problems import Problem, problem

SPACE = SequenceSpace(5, 4)
GROUP = 8
LIMIT = 100
SHARE, OPPOSED, ALIGNED = 0.3, 0.03, 0.25
GDPO = gdpo_multireward | {"advantage": DecoupledZScore(batch="token", eps=1e-6)}


@dataclass(frozen=True)
class RandomDrop(ConflictFilter):
    """Drops as many responses of every group as the filter, at random; the draw is a function of the version."""

    def dropped(self, rollout: Rollout, scores: Float[Tensor, "reward trajectory"]) -> Bool[Tensor, " trajectory"]:
        flags = super().dropped(rollout, scores)
        generator = torch.Generator().manual_seed(int(rollout["version"][0]))
        noise = torch.rand(len(flags), generator=generator, dtype=torch.float64)
        before, after = rollout.group.argsort(stable=True), (rollout.group + noise).argsort()
        moved = torch.empty_like(flags)
        moved[after] = flags[before]
        return moved


def two_rewards(seed: int, both: float) -> Problem:
    """Two rewards of 1 on a share `SHARE` of the sequences, a share ``both`` has the two."""
    base = problem("random-rewards", space=SPACE, batch=8, seed=seed)
    size = SPACE.n_sequences
    order = torch.rand((8, size), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).argsort(1)
    each, joint = round(SHARE * size), round(both * size)
    first, second = order < each, (order >= each - joint) & (order < 2 * each - joint)
    return replace(base, name="two-rewards", rewards={"first": first.double(), "second": second.double()})


def _until_both(run: Run, limit: int) -> float:
    for done in range(limit):
        if min(run.rewards.values()) >= 0.8:
            return float(done)
        run.step()
    return float(limit)


def opposed(seed: int, quick: bool) -> Mapping[str, float]:
    """Iterations until both rewards are reached, opposed rewards."""
    arms = {
        "grpo": grpo,
        "gdpo": GDPO,
        "snr": gd2po,
        "hard": gd2po | {"advantage": ConflictFilter(mode="hard")},
        "random": gd2po | {"advantage": RandomDrop()},
    }
    made = two_rewards(seed, OPPOSED)
    limit = 2 if quick else LIMIT
    return {name: _until_both(start(made, m, seed=seed, group=GROUP), limit) for name, m in arms.items()}


def aligned(seed: int, quick: bool) -> Mapping[str, float]:
    """Iterations until both rewards are reached, aligned rewards."""
    made = two_rewards(seed, ALIGNED)
    limit = 2 if quick else LIMIT
    arms = {"gdpo": GDPO, "snr": gd2po}
    return {name: _until_both(start(made, m, seed=seed, group=GROUP), limit) for name, m in arms.items()}


def effective(seed: int, quick: bool) -> Mapping[str, float]:
    """Mean |A| of the responses that train, opposed rewards."""
    made = two_rewards(seed, OPPOSED)
    policy = made.policy()
    found: dict[str, list[Tensor]] = {"gdpo": [], "snr": []}
    for index in range(2 if quick else 20):
        rollout = batch(made, policy, seed=1000 * seed + index, sizes=[GROUP])
        for name, method in {"gdpo": GDPO, "snr": gd2po}.items():
            advantage = credited(method, policy, rollout).advantage
            found[name].append(advantage[advantage != 0].abs())
    return {name: float(torch.cat(values).mean()) for name, values in found.items()}


ITERATIONS = "iterations until both expected rewards are at least 0.8"

CLAIMS = (
    Claim(
        "gd2po",
        "effective-advantage",
        "With opposed rewards the responses that train have larger advantages than under GDPO.",
        "exact",
        "gdpo over steps",
        "mean |A| of the responses with A != 0",
        "higher",
        "snr",
        "gdpo",
        measure=effective,
    ),
    Claim(
        "gd2po",
        "faster-than-gdpo",
        "With opposed rewards both are reached in fewer iterations than under GDPO.",
        "exact",
        "gdpo over steps",
        ITERATIONS,
        "lower",
        "snr",
        "gdpo",
        measure=opposed,
    ),
    Claim(
        "gd2po",
        "hard-faster-than-gdpo",
        "With opposed rewards both are reached in fewer iterations by the hard filter than under GDPO.",
        "exact",
        "gdpo over steps",
        ITERATIONS,
        "lower",
        "hard",
        "gdpo",
        measure=opposed,
    ),
    Claim(
        "gd2po",
        "faster-than-grpo",
        "With opposed rewards both are reached in fewer iterations than by GRPO on the sum.",
        "exact",
        "grpo",
        ITERATIONS,
        "lower",
        "snr",
        "grpo",
        measure=opposed,
    ),
    Claim(
        "gd2po",
        "faster-than-random",
        "With opposed rewards both are reached in fewer iterations than when random responses are dropped.",
        "exact",
        "gd2po that drops as many responses at random",
        ITERATIONS,
        "lower",
        "snr",
        "random",
        measure=opposed,
    ),
    Claim(
        "gd2po",
        "aligned-rewards",
        "With aligned rewards it makes no difference.",
        "exact",
        "gdpo over steps",
        ITERATIONS,
        "equal",
        "snr",
        "gdpo",
        margin=3.0,
        measure=aligned,
    ),
)

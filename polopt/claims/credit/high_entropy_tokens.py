"""High-entropy tokens: a fifth of the steps does the work of all (Wang et al. 2025, arXiv:2506.01939).

Design, fixed before the first run. Exact world: 3 tokens, length 10, 8 prompts, tabular. Two positions of ten decide
(drawn per prompt); their initial logits are normal with standard deviation 0.5. The other eight are forced: one token,
drawn per prefix, has the initial probability 0.97, the others share the rest, so that forced steps have about 0.16 nats
and decisions about 1. The reward is 1 iff both decisions are the prompt's targets and every forced token was copied,
else 0; the initial policy gets about 0.09.

All arms are DAPO without dynamic sampling and without the overlong penalty (all responses have the same length), 8
responses per prompt, Adam at rate 0.1, one update per rollout, 60 iterations. Arms: every step; the 20% of highest
entropy; the other 80%; a random 20% of the steps, drawn anew for every rollout.

- Exact expected reward after the last iteration. "Matches full training": not worse by more than 0.05.
- Overlap: on 64 responses per prompt of the policy after full training, the share of its own top 20% of steps that are
  in the top 20% of the initial policy too; high means above 0.8.
- Gradient: of the squared norm of the gradient of full training before the first update, the share of the rows at which
  a kept step is; "most" means above a half, which is 2.5 times their share of the steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.claims.claim import Claim
from polopt.claims.exact import batch, credited, gradient, start
from polopt.core.part import Part
from polopt.core.rollout import Rollout
from polopt.methods.base.dapo import dapo
from polopt.methods.credit.high_entropy_tokens import HighEntropy
from polopt.policies.exact import SequenceSpace
from polopt.tasks.problems import Problem, problem

SPACE = SequenceSpace(3, 10)
PROMPTS, GROUP, ITERATIONS, DECISIONS = 8, 8, 60, 2
FORCED = 0.97

every = dapo | {"reward": None, "filter": None}


@dataclass(frozen=True)
class RandomSteps(Part):
    """w_t = 1 for a random share of the steps of a rollout, else 0; a function of ``seed`` and the policy's version."""

    fraction: float = 0.2
    seed: int = 0

    needs = frozenset({"version"})

    def __call__(self, rollout: Rollout) -> Float[Tensor, " step"]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + int(rollout["version"][0]))
        count = round(self.fraction * rollout.n_steps)
        weight = torch.zeros(rollout.n_steps, dtype=torch.float64)
        weight[torch.randperm(rollout.n_steps, generator=generator)[:count]] = 1.0
        return weight


def forks(seed: int) -> Problem:
    """Two decisions among forced tokens."""
    base = problem("random-rewards", space=SPACE, batch=PROMPTS, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    decides = torch.rand(PROMPTS, SPACE.length, generator=generator).argsort(1) < DECISIONS
    copied = torch.randint(3, (PROMPTS, SPACE.n_nodes), generator=generator)
    target = torch.randint(3, (PROMPTS, SPACE.length), generator=generator)
    fork = decides[:, SPACE.depths]
    wanted = torch.where(fork, target[:, SPACE.depths], copied)
    forced = torch.full_like(base.initial, (1 - FORCED) / 2).scatter(-1, copied[..., None], FORCED).log()
    initial = torch.where(fork[..., None], base.initial, forced)
    right = (wanted[:, SPACE.nodes] == SPACE.sequences).all(-1).double()
    return replace(base, name="forks", rewards={"correct": right}, initial=initial, reference=initial)


def reward(seed: int, quick: bool) -> Mapping[str, float]:
    """Expected reward after training on every step, the top 20%, the bottom 80%, a random 20%; overlap."""
    made = forks(seed)
    arms = {"every": None, "top": HighEntropy(), "bottom": HighEntropy(lowest=True), "random": RandomSteps(seed=seed)}
    found: dict[str, float] = {}
    for name, weight in arms.items():
        run = start(made, every | {"weight": weight}, seed=seed, group=GROUP)
        for _ in range(2 if quick else ITERATIONS):
            run.step()
        found[name] = run.reward
        if weight is None:
            rollout = batch(made, run.policy, seed=seed, sizes=[64])
            with torch.no_grad():
                before = made.policy().evaluate(rollout, frozenset({"entropy"})).entropy
            top = HighEntropy()
            after, first = top(rollout), top(rollout.with_columns(step={"entropy": before}))
            found |= {"overlap": float((after * first).sum() / after.sum()), "high": 0.8}
    return found


def share(seed: int, quick: bool) -> Mapping[str, float]:
    """Share of the squared gradient norm that the top 20% of the steps carry."""
    made = forks(seed)
    policy = made.policy()
    rollout = credited(every, policy, batch(made, policy, seed=seed, sizes=[GROUP if quick else 8 * GROUP]))
    whole = gradient(every, policy, rollout)
    kept = gradient(
        every | {"weight": HighEntropy()}, policy, rollout.with_columns(step={"weight": HighEntropy()(rollout)})
    )
    return {"share": float(kept.square().sum() / whole.square().sum()), "half": 0.5}


METRIC = "exact expected reward after 60 iterations"
CLAIMS = (
    Claim(
        "high-entropy-tokens",
        "top-matches-full",
        "Training on the fifth of the steps with the highest entropy gets as far as training on all.",
        "exact",
        "dapo on every step",
        METRIC,
        "higher",
        "top",
        "every",
        margin=0.05,
        measure=reward,
    ),
    Claim(
        "high-entropy-tokens",
        "bottom-falls-short",
        "Training on the other four fifths gets less far than training on all.",
        "exact",
        "dapo on every step",
        METRIC,
        "lower",
        "bottom",
        "every",
        measure=reward,
    ),
    Claim(
        "high-entropy-tokens",
        "bottom-below-top",
        "Training on the other four fifths gets less far than training on the fifth of highest entropy.",
        "exact",
        "top 20% by entropy",
        METRIC,
        "lower",
        "bottom",
        "top",
        measure=reward,
    ),
    Claim(
        "high-entropy-tokens",
        "random-below-top",
        "A random fifth of the steps gets less far than the fifth of highest entropy.",
        "exact",
        "top 20% by entropy",
        METRIC,
        "lower",
        "random",
        "top",
        measure=reward,
    ),
    Claim(
        "high-entropy-tokens",
        "pattern-inherited",
        "After full training the steps of high entropy are those of the initial policy.",
        "exact",
        "an overlap of 0.8",
        "share of the trained policy's top 20% that is in the initial policy's top 20%",
        "higher",
        "overlap",
        "high",
        measure=reward,
    ),
    Claim(
        "high-entropy-tokens",
        "gradient-share",
        "The fifth of the steps with the highest entropy carries most of the gradient.",
        "exact",
        "half of it",
        "share of the squared gradient norm before the first update",
        "higher",
        "share",
        "half",
        measure=share,
    ),
)

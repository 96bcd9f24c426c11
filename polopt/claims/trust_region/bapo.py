"""BAPO: adaptive bounds hold the positive share and the entropy (Xi et al. 2025, arXiv:2510.18927).

Design, fixed before the first run. Exact world: 2 tokens and an end, at most 8 steps, 8 prompts. Initial logits are
normal with standard deviation 0.5, those of the end lower by 1, so that answers take about 5 steps. An answer is right
iff its first token is the prompt's target and it has at most 4 steps: as in the paper wrong answers are longer, and
steps with A < 0 carry most of the loss.

Token mean, groups of 16, SGD at rate 20, 8 updates per rollout, each on all of it. Arms: BAPO as published; the fixed
clip 0.2; the fixed clip 0.2 below and 0.28 above. Fixed clips are written as BAPO with ranges of one point, which is
the same objective and logs the same share P / (P + Q).

- Share: mean over the updates of 30 rollouts; "near the target" is the mean over rollouts of |share - 0.4|.
- Entropy: exact, of the distribution over sequences, after the first rollout with an expected reward of 0.8, at most
  100.
- Reward: expected, after 30 rollouts; "not lower": by at most 0.02.
- Stability: 16 updates per rollout, 30 rollouts, largest fall of the expected reward below its earlier maximum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from polopt.claims.claim import Claim
from polopt.claims.exact import iterations_until, largest_fall, start, with_updates
from polopt.methods.trust_region.bapo import AdaptiveClip, bapo
from polopt.policies.exact import SequenceSpace
from polopt.tasks.problems import Problem, problem

SPACE = SequenceSpace(3, 8, end=True)
PROMPTS, GROUP, ROLLOUTS, UPDATES, MANY, SHORT = 8, 16, 30, 8, 16, 4


def fixed(low: float, high: float) -> AdaptiveClip:
    """A clip that does not adapt."""
    return AdaptiveClip(low=(low, low, 1.0), high=(high, high, 1.0))


ARMS = {
    "bapo": bapo,
    "clip": bapo | {"objective": fixed(0.8, 1.2)},
    "clip-higher": bapo | {"objective": fixed(0.8, 1.28)},
}


def made(seed: int) -> Problem:
    """The problem of the docstring."""
    base = problem("random-rewards", space=SPACE, batch=PROMPTS, seed=seed)
    target = torch.randint(0, 2, (PROMPTS,), generator=torch.Generator().manual_seed(seed))
    first = SPACE.sequences[None, :, 0] == target[:, None]
    right = (first & (SPACE.lengths <= SHORT)).double()
    initial = base.initial.clone()
    initial[..., SPACE.vocabulary - 1] -= 1.0
    return replace(base, name="short", rewards={"correct": right}, initial=initial, reference=initial)


def training(seed: int, quick: bool) -> Mapping[str, float]:
    """Share, distance from the target and final reward; entropy at equal reward."""
    found: dict[str, float] = {}
    for name, method in ARMS.items():
        run = start(made(seed), with_updates(method, UPDATES), seed=seed, group=GROUP, optimizer="sgd")
        shares = []
        for _ in range(2 if quick else ROLLOUTS):
            run.step()
            shares.append(run.metrics["positive_share"])
        found |= {
            f"{name}/share": sum(shares) / len(shares),
            f"{name}/distance": sum(abs(share - 0.4) for share in shares) / len(shares),
            f"{name}/reward": run.reward,
        }
        run = start(made(seed), with_updates(method, UPDATES), seed=seed, group=GROUP, optimizer="sgd")
        iterations_until(run, 0.8, 2 if quick else 100)
        found[f"{name}/entropy"] = run.entropy
    return {**found, "target": 0.4}


def staleness(seed: int, quick: bool) -> Mapping[str, float]:
    """Largest fall of the reward at 16 updates per rollout."""
    found: dict[str, float] = {}
    for name in ("bapo", "clip"):
        run = start(made(seed), with_updates(ARMS[name], MANY), seed=seed, group=GROUP, optimizer="sgd")
        rewards = [run.reward]
        for _ in range(2 if quick else ROLLOUTS):
            run.step()
            rewards.append(run.reward)
        found[name] = largest_fall(rewards)
    return found


ENTROPY = "exact entropy when the expected reward is 0.8, nats"

CLAIMS = (
    Claim(
        "bapo",
        "clip-share",
        "Under the fixed clip the share of positive steps in the loss is below 0.4.",
        "exact",
        "a share of 0.4",
        "share P / (P + Q), mean over the updates",
        "lower",
        "clip/share",
        "target",
        measure=training,
    ),
    Claim(
        "bapo",
        "share-near-target",
        "BAPO holds the share nearer to its target than the fixed clip.",
        "exact",
        "clip 0.2",
        "|share - 0.4|, mean over the rollouts",
        "lower",
        "bapo/distance",
        "clip/distance",
        measure=training,
    ),
    Claim(
        "bapo",
        "entropy",
        "BAPO keeps a higher entropy than the fixed clip.",
        "exact",
        "clip 0.2",
        ENTROPY,
        "higher",
        "bapo/entropy",
        "clip/entropy",
        measure=training,
    ),
    Claim(
        "bapo",
        "entropy-clip-higher",
        "BAPO keeps a higher entropy than clip-higher.",
        "exact",
        "clip 0.2 below and 0.28 above",
        ENTROPY,
        "higher",
        "bapo/entropy",
        "clip-higher/entropy",
        measure=training,
    ),
    Claim(
        "bapo",
        "accuracy",
        "BAPO is not less accurate than the fixed clip.",
        "exact",
        "clip 0.2",
        "expected reward after 240 updates",
        "higher",
        "bapo/reward",
        "clip/reward",
        margin=0.02,
        measure=training,
    ),
    Claim(
        "bapo",
        "stability",
        "With 16 updates per rollout BAPO is more stable than the fixed clip.",
        "exact",
        "clip 0.2",
        "largest fall of the expected reward below its earlier maximum",
        "lower",
        "bapo",
        "clip",
        measure=staleness,
    ),
)

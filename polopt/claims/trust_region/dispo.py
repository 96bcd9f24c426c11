"""DISPO: four bounds on the weight, one for each regime (Karaman et al. 2026, arXiv:2602.00983).

Design, fixed before the first run. Exact world. No arm has the filter and the length penalty, which are DAPO's.

- One step. 5 tokens, length 4, 8 prompts of pass rate 0.25, reward 1 on a random quarter of the sequences, 64 responses
  per prompt. 8 updates of SGD at rate 20 without bounds take the policy away from the one that sampled. There, the
  slope of the exact entropy (sum over the prompts) along the next update of some steps alone, in two arms. Exploration:
  right steps (A > 0) of ratio above 1 that the sampling policy gave less than 1/5, weighted by their ratio up to 11
  (the default) or by 1. Distillation: right steps of ratio below 1, weighted by their ratio or by 1.
- Training. The same prompts, groups of 16, 16 updates per rollout, SGD at rate 20, 20 rollouts: DISPO, DAPO's clip (0.2
  and 0.28), CISPO (cap 5), and DISPO with one bound changed. Entropy: exact, after the first rollout with an expected
  reward of 0.8, at most 60. Reward: expected, after 20 rollouts. Fall: the largest of the expected reward below its
  earlier maximum.
- Length. 2 tokens and an end, at most 8 steps, reward 1 on a random quarter of the sequences at pass rate 0.25, as
  above: exact mean length after 20 rollouts, with the lower bound for wrong responses open (low- = 1) and closed (0).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from polopt.claims.claim import Claim
from polopt.claims.exact import (
    SGD,
    Run,
    batch,
    credited,
    curve,
    gradient,
    iterations_until,
    largest_fall,
    start,
    with_updates,
)
from polopt.core.override import override
from polopt.methods.base.cispo import cispo
from polopt.methods.trust_region.dispo import DecoupledWeight, dispo
from polopt.objectives.clipped_surrogate import ClippedSurrogate
from polopt.policies.exact import SequenceSpace, enumeration
from polopt.tasks.problems import problem

SPACE, LENGTHS = SequenceSpace(5, 4), SequenceSpace(3, 8, end=True)
PROMPTS, GROUP, MANY, UPDATES, ROLLOUTS = 8, 16, 64, 16, 20
BEFORE = 8
RARE = 1 / 5
INF = float("inf")

DISPO = dispo | {"reward": None, "filter": None}
ARMS = {
    "dispo": DISPO,
    "dapo": DISPO | {"objective": ClippedSurrogate(low=0.2, high=0.28)},
    "cispo": DISPO | {"objective": cispo.objective},
    "positive high 0": override(DISPO, {"objective.positive_high": 0.0}),
    "positive low 1": override(DISPO, {"objective.positive_low": 1.0}),
}


def one_step(seed: int, quick: bool) -> Mapping[str, float]:
    """Slope of the entropy along an update of the steps of one regime, weighted by their ratio or by 1."""
    made = problem("binary-verifier", space=SPACE, batch=PROMPTS, pass_rate=0.25, seed=seed)
    policy = made.policy()
    rollout = credited(DISPO, policy, batch(made, policy, seed=seed, sizes=[8 if quick else MANY]))
    free = DISPO | {"objective": DecoupledWeight(1.0, INF, 1.0, INF)}
    for _ in range(BEFORE):
        step = gradient(free, policy, rollout)
        with torch.no_grad():
            policy.logits.add_(step, alpha=SGD)
    with torch.no_grad():
        gap = policy.evaluate(rollout, frozenset({"logp"})).logp - rollout.logp
    uphill = enumeration.gradient(policy, enumeration.entropy(policy))
    right = rollout.advantage > 0
    regimes = {"exploration": right & (gap > 0) & (rollout.logp.exp() < RARE), "distillation": right & (gap < 0)}
    bounds = {"weighted": DecoupledWeight(1.0, 10.0), "one": DecoupledWeight(0.0, 0.0)}
    found: dict[str, float] = {}
    for regime, steps in regimes.items():
        alone = rollout.with_columns(step={"advantage": torch.where(steps, rollout.advantage, 0.0)})
        for name, objective in bounds.items():
            slope = gradient(DISPO | {"objective": objective}, policy, alone)
            found[f"{regime}/{name}"] = float((uphill * slope).sum())
    return found


def training(seed: int, quick: bool) -> Mapping[str, float]:
    """Entropy at equal reward, reward and largest fall of each arm."""
    made = problem("binary-verifier", space=SPACE, batch=PROMPTS, pass_rate=0.25, seed=seed)
    found: dict[str, float] = {}
    for name, method in ARMS.items():
        run = start(made, with_updates(method, UPDATES), seed=seed, group=GROUP, optimizer="sgd")
        rewards = curve(run, 2 if quick else ROLLOUTS)
        found |= {f"{name}/reward": rewards[-1], f"{name}/fall": largest_fall(rewards)}
        run = start(made, with_updates(method, UPDATES), seed=seed, group=GROUP, optimizer="sgd")
        iterations_until(run, 0.8, 2 if quick else 60)
        found[f"{name}/entropy"] = run.entropy
    return found


def length(seed: int, quick: bool) -> Mapping[str, float]:
    """Mean length by the lower bound of wrong responses."""

    def mean(run: Run) -> float:
        with torch.no_grad():
            return float((run.policy.probabilities() * LENGTHS.lengths).sum(-1).mean())

    made = problem("binary-verifier", space=LENGTHS, batch=PROMPTS, pass_rate=0.25, seed=seed)
    found: dict[str, float] = {}
    for low in (1.0, 0.0):
        method = with_updates(override(DISPO, {"objective.negative_low": low}), UPDATES)
        run = start(made, method, seed=seed, group=GROUP, optimizer="sgd")
        found[f"low {low:g}"] = curve(run, 2 if quick else ROLLOUTS, mean)[-1]
    return found


SLOPE = "slope of the exact entropy along one update of these steps, nats"
ENTROPY = "exact entropy when the expected reward is 0.8, nats"

CLAIMS = (
    Claim(
        "dispo",
        "exploration-step",
        "Weighting unlikely right steps by a ratio above 1 raises the entropy relative to a weight of 1.",
        "exact",
        "weight 1",
        SLOPE,
        "higher",
        "exploration/weighted",
        "exploration/one",
        measure=one_step,
    ),
    Claim(
        "dispo",
        "distillation-step",
        "Weighting right steps by a ratio below 1 lowers the entropy relative to a weight of 1.",
        "exact",
        "weight 1",
        SLOPE,
        "lower",
        "distillation/weighted",
        "distillation/one",
        measure=one_step,
    ),
    Claim(
        "dispo",
        "exploration",
        "A larger upper bound on right responses keeps a higher entropy.",
        "exact",
        "dispo with weights of at most 1 on right responses",
        ENTROPY,
        "higher",
        "dispo/entropy",
        "positive high 0/entropy",
        measure=training,
    ),
    Claim(
        "dispo",
        "distillation",
        "Allowing weights down to 0 on right responses lowers the entropy.",
        "exact",
        "dispo, weights of at least 0.8 on right responses",
        ENTROPY,
        "lower",
        "positive low 1/entropy",
        "dispo/entropy",
        measure=training,
    ),
    Claim(
        "dispo",
        "above-dapo",
        "DISPO ends above DAPO.",
        "exact",
        "clip 0.2 below and 0.28 above",
        "expected reward after 320 updates",
        "higher",
        "dispo/reward",
        "dapo/reward",
        measure=training,
    ),
    Claim(
        "dispo",
        "stability",
        "DISPO declines less from its peak than CISPO.",
        "exact",
        "cispo, cap 5",
        "largest fall of the expected reward below its earlier maximum",
        "lower",
        "dispo/fall",
        "cispo/fall",
        measure=training,
    ),
    Claim(
        "dispo",
        "length",
        "A closed lower bound on wrong responses makes responses shorter.",
        "exact",
        "dispo, weights down to 0 on wrong responses",
        "exact mean length after 320 updates, steps",
        "lower",
        "low 0",
        "low 1",
        measure=length,
    ),
    Claim(
        "dispo",
        "repetition",
        "A closed upper bound on wrong responses makes the policy repeat itself.",
        "exact",
        "dispo",
        "share of repeated tokens",
        "higher",
        untestable="A tabular policy has no common cause by which a token would repeat across contexts, and answers in "
        "the small world are too short for repetition.",
    ),
)

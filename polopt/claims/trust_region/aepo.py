"""AEPO: entropy at any chosen level (Wang et al. 2025, arXiv:2510.08141).

Design, fixed before the first run. Exact world, that of DCPO's claims: 6 tokens, length 2, 8 prompts, tabular; a third
of the sequences is right (reward 1, else 0), with unequal prior probabilities and 0.25 together. 64 responses a prompt,
one update per rollout, Adam at rate 0.1, 160 iterations; an iteration holds the entropy at 2 of the 8 prompts only.
Targets H0 of 0.25, 0.5 and 1 nat per step; the right responses alone could have up to 1.24. At most a quarter of the
responses is replaced (`most` = 0.25), which here is all that is drawn at T: 60 of 2,560 would be 12 of 512.

Arms: AEPO at each target; GRPO with AEPO's normalisation and clip; GRPO with an entropy bonus of 0.003, 0.01, 0.03 or
0.1; GRPO with the entropy of each step in the advantage, A + min(0.4 H_t, |A| / 2) (Cheng et al. 2025,
arXiv:2506.14758); AEPO at 0.5 that keeps the tempered responses of negative z-score too and trains on the z-scores.

- Tracking: |H - H0|, H the exact mean entropy per step, mean over the last 80 iterations. The bonus counts with the
  coefficient that tracks best for the seed.
- Slope: least-squares slope of H (mean over the last 80 iterations) on H0 over the three targets; "near 1" means within
  0.25.
- Collapse: H of GRPO after the last iteration against a tenth of what it was before the first.
- Reward: exact expected reward after the last iteration; an interior best is two claims, at 0.5 above that at 0.25 and
  above that at 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.advantages.group import GroupZScore
from polopt.claims.claim import Claim
from polopt.claims.exact import several_right, start
from polopt.controllers import TargetEntropy
from polopt.core.method import Method, Schedule
from polopt.core.part import Part
from polopt.core.rollout import Rollout
from polopt.methods.trust_region.aepo import TemperedPositives, aepo
from polopt.regularizers.entropy import Entropy
from polopt.rollouts.groups import Groups

GROUP, ITERATIONS, LATE = 64, 160, 80
TARGETS = {"low": 0.25, "mid": 0.5, "high": 1.0}
BONUSES = (0.003, 0.01, 0.03, 0.1)

on_policy = aepo | {"schedule": Schedule(), "filter": TemperedPositives(most=0.25)}
plain = on_policy | {
    "rollout": Groups(),
    "filter": None,
    "advantage": GroupZScore(eps=1e-6),
    "controller": None,
}


@dataclass(frozen=True)
class EntropyInAdvantage(Part):
    """A_i + min(scale H_t, |A_i| / bound), [N]."""

    scale: float = 0.4
    bound: float = 2.0

    needs = frozenset({"reward", "entropy"})

    def __call__(self, rollout: Rollout) -> Float[Tensor, " step"]:
        group = rollout.spread(GroupZScore(eps=1e-6)(rollout))
        return group + torch.minimum(self.scale * rollout["entropy"], group.abs() / self.bound)


def at(target: float) -> Method:
    """AEPO with a target entropy."""
    return on_policy | {"controller": TargetEntropy(target=target)}


def control(seed: int, quick: bool) -> Mapping[str, float]:
    """Entropy over training and final reward of every arm."""
    made = several_right(seed)
    arms = {"grpo": plain, **{name: at(target) for name, target in TARGETS.items()}}
    both = {"filter": TemperedPositives(most=0.25, threshold=-math.inf), "advantage": GroupZScore(eps=1e-6)}
    arms |= {"negatives": at(TARGETS["mid"]) | both, "advantage": plain | {"advantage": EntropyInAdvantage()}}
    arms |= {f"bonus {c}": plain | {"regularizer": Entropy(c)} for c in BONUSES}
    found: dict[str, float] = {}
    courses: dict[str, list[float]] = {}
    for name, method in arms.items():
        run = start(made, method, seed=seed, group=GROUP)
        courses[name] = [run.step_entropy]
        for _ in range(2 if quick else ITERATIONS):
            run.step()
            courses[name].append(run.step_entropy)
        found[f"{name}/reward"] = run.reward

    def late(name: str) -> Tensor:
        return torch.tensor(courses[name][-LATE:], dtype=torch.float64)

    def error(name: str, target: float) -> float:
        return float((late(name) - target).abs().mean())

    for level, target in TARGETS.items():
        found |= {f"{level}/error": error(level, target), f"grpo/error at {level}": error("grpo", target)}
    mid = TARGETS["mid"]
    found |= {f"{name}/error": error(name, mid) for name in ("negatives", "advantage")}
    found["bonus/error"] = min(error(f"bonus {c}", mid) for c in BONUSES)
    held = torch.stack([late(name).mean() for name in TARGETS])
    wanted = torch.tensor(list(TARGETS.values()), dtype=torch.float64)
    centred = wanted - wanted.mean()
    found |= {"slope": float((held * centred).sum() / centred.square().sum()), "one": 1.0}
    return found | {"grpo/end": courses["grpo"][-1], "grpo/tenth": courses["grpo"][0] / 10}


ERROR = "mean |H - H0| over the last 80 of 160 iterations, nats per step"
REWARD = "exact expected reward after 160 iterations"


def _claim(
    name: str,
    statement: str,
    baseline: str,
    metric: str,
    direction: Any,
    treatment: str,
    against: str,
    margin: float = 0.0,
) -> Claim:
    return Claim("aepo", name, statement, "exact", baseline, metric, direction, treatment, against, margin, control)


CLAIMS = (
    _claim(
        "grpo-collapses",
        "Under GRPO the entropy falls towards 0.",
        "a tenth of the initial entropy",
        "entropy per step after 160 iterations, nats",
        "lower",
        "grpo/end",
        "grpo/tenth",
    ),
    *(
        _claim(
            f"tracks-{level}",
            f"AEPO holds the entropy per step near {target:g}.",
            "grpo",
            ERROR,
            "lower",
            f"{level}/error",
            f"grpo/error at {level}",
        )
        for level, target in TARGETS.items()
    ),
    _claim(
        "slope",
        "The entropy follows its target one to one.",
        "a slope of 1",
        "slope of the entropy on its target over three targets",
        "equal",
        "slope",
        "one",
        margin=0.25,
    ),
    _claim(
        "better-than-bonus",
        "AEPO is nearer to a target of 0.5 nats than any entropy bonus of fixed weight.",
        "the best of four entropy bonuses",
        ERROR,
        "lower",
        "mid/error",
        "bonus/error",
    ),
    _claim(
        "better-than-advantage",
        "AEPO is nearer to a target of 0.5 nats than GRPO with entropy in the advantage.",
        "entropy in the advantage",
        ERROR,
        "lower",
        "mid/error",
        "advantage/error",
    ),
    _claim(
        "negatives",
        "With negative responses among the tempered ones the entropy leaves its target.",
        "aepo with negatives",
        ERROR,
        "lower",
        "mid/error",
        "negatives/error",
    ),
    _claim(
        "reward-above-low",
        "A target of 0.5 nats gives a higher reward than one of 0.25.",
        "a target of 0.25 nats",
        REWARD,
        "higher",
        "mid/reward",
        "low/reward",
    ),
    _claim(
        "reward-above-high",
        "A target of 0.5 nats gives a higher reward than one of 1.",
        "a target of 1 nat",
        REWARD,
        "higher",
        "mid/reward",
        "high/reward",
    ),
)

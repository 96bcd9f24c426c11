"""DCPO: entropy held at a target without sampling elsewhere (Li et al. 2026, arXiv:2601.12730).

Design, fixed before the first run. Exact world: 6 tokens, length 2, 8 prompts, tabular; a third of the sequences is
right (reward 1, else 0); the initial logits have standard deviation 1 and are then tilted so that a right response
has probability 0.25: right responses of unequal prior probability. 64 responses a prompt, one update per rollout (what
the claims are about is on policy), Adam at rate 0.1, 120 iterations. Targets H0 of 0.25, 0.5 and 1 nat per step; the
right responses alone could have up to 1.24.

Arms: GRPO with DCPO's normalisation and clip (which is DCPO without its REINFORCE term); GRPO with an entropy bonus of
0.003, 0.01, 0.03 or 0.1; DCPO at each target; DCPO at 0.5 with w = 1 (both temperatures 1).

- Tracking: |H - H0|, H the exact mean entropy per step, mean over the last 60 iterations. The bonus counts with the
  coefficient that tracks best for the seed.
- Collapse: H of GRPO after the last iteration against a tenth of what it was before the first.
- Reward: exact expected reward after the last iteration. "Non-monotone in H0" is two claims: at 0.5 above that at 0.25,
  and above that at 1.
- Distinct: exact expected number of distinct right responses among 64 draws after the last iteration, DCPO at 0.5
  against GRPO.

Not compared, for want of a direction on the card: w on all responses, right or wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from polopt.advantages.group import GroupZScore
from polopt.claims.claim import Claim
from polopt.claims.exact import Run, several_right, start
from polopt.controllers import TargetEntropy
from polopt.core.method import Method, Schedule
from polopt.methods.trust_region.dcpo_entropy import dcpo_entropy
from polopt.regularizers.entropy import Entropy

GROUP, ITERATIONS, LATE = 64, 120, 60
TARGETS = {"low": 0.25, "mid": 0.5, "high": 1.0}
BONUSES = (0.003, 0.01, 0.03, 0.1)

on_policy = dcpo_entropy | {"schedule": Schedule()}
plain = on_policy | {"advantage": GroupZScore(eps=1e-6), "controller": None}


def at(target: float, low: float = 0.8, high: float = 1.2) -> Method:
    """DCPO with a target entropy and two temperatures."""
    shipped: TargetEntropy = on_policy.controller
    return on_policy | {"controller": replace(shipped, target=target, low=low, high=high)}


def distinct(run: Run) -> float:
    """Expected number of distinct right responses among GROUP draws, mean over the prompts."""
    with torch.no_grad():
        seen = 1 - (1 - run.policy.probabilities()).pow(GROUP)
        return float((seen * run.problem.reward).sum(-1).mean())


def control(seed: int, quick: bool) -> Mapping[str, float]:
    """Entropy over training, reward and distinct right responses of every arm."""
    made = several_right(seed)
    arms = {"grpo": plain, **{name: at(target) for name, target in TARGETS.items()}}
    arms |= {"unit": at(TARGETS["mid"], low=1.0, high=1.0)}
    arms |= {f"bonus {c}": plain | {"regularizer": Entropy(c)} for c in BONUSES}
    found: dict[str, float] = {}
    courses: dict[str, list[float]] = {}
    for name, method in arms.items():
        run = start(made, method, seed=seed, group=GROUP)
        courses[name] = [run.step_entropy]
        for _ in range(2 if quick else ITERATIONS):
            run.step()
            courses[name].append(run.step_entropy)
        found |= {f"{name}/reward": run.reward, f"{name}/distinct": distinct(run)}

    def error(name: str, target: float) -> float:
        late = courses[name][-LATE:]
        return sum(abs(entropy - target) for entropy in late) / len(late)

    for level, target in TARGETS.items():
        found |= {f"{level}/error": error(level, target), f"grpo/error at {level}": error("grpo", target)}
    mid = TARGETS["mid"]
    found |= {"unit/error": error("unit", mid), "bonus/error": min(error(f"bonus {c}", mid) for c in BONUSES)}
    return found | {"grpo/end": courses["grpo"][-1], "grpo/tenth": courses["grpo"][0] / 10}


ERROR = "mean |H - H0| over the last 60 of 120 iterations, nats per step"
REWARD = "exact expected reward after 120 iterations"


def _claim(
    name: str, statement: str, baseline: str, metric: str, direction: Any, treatment: str, against: str
) -> Claim:
    return Claim(
        "dcpo-entropy", name, statement, "exact", baseline, metric, direction, treatment, against, 0.0, control
    )


CLAIMS = (
    _claim(
        "grpo-collapses",
        "Under GRPO the entropy falls towards 0.",
        "a tenth of the initial entropy",
        "entropy per step after 120 iterations, nats",
        "lower",
        "grpo/end",
        "grpo/tenth",
    ),
    *(
        _claim(
            f"tracks-{level}",
            f"DCPO holds the entropy per step near {target:g}.",
            "grpo",
            ERROR,
            "lower",
            f"{level}/error",
            f"grpo/error at {level}",
        )
        for level, target in TARGETS.items()
    ),
    _claim(
        "better-than-bonus",
        "DCPO is nearer to a target of 0.5 nats than any entropy bonus of fixed weight.",
        "the best of four entropy bonuses",
        ERROR,
        "lower",
        "mid/error",
        "bonus/error",
    ),
    _claim(
        "ratio-needed",
        "Without the ratio to the tempered policy the entropy leaves its target.",
        "dcpo-entropy with w = 1",
        ERROR,
        "lower",
        "mid/error",
        "unit/error",
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
    _claim(
        "distinct",
        "DCPO keeps more of the right responses than GRPO.",
        "grpo",
        "expected number of distinct right responses among 64",
        "higher",
        "mid/distinct",
        "grpo/distinct",
    ),
)

"""ReMix, whole and without each of its parts, by the number of rollouts (Liang et al. 2025, arXiv:2507.06892).

Design, fixed before the first run. Exact world: 8 prompts, 5 tokens, length 4, reward 1 on a random share of the
sequences, pass rate 0.25 at the start; 8 responses of every prompt that is sampled in an iteration; SGD at rate 20. All
arms are trained until they have sampled 4,800 rollouts; replayed ones cost nothing. beta is 0.04 in every arm, so that
the anchor is felt, and there is no entropy bonus. Arms:

- on-policy: GRPO with the KL to the initial policy, one update per batch;
- mixed: replay (0.4 of the groups, window 2) and two updates throughout, no KL;
- remix: as published, the switch after 50 iterations;
- ReMix without reuse (one update per batch), without the convex anchor (lam = 1), without reincarnation (no switch).

"Fast" is the number of rollouts until the exact expected reward is half way between its start and 1 (4,800 where it is
not reached), "final" the reward at the end.

- Length: the same in a space with an end token (4 tokens and the end, at most 5 steps), the objective's clip around the
  iterate, no KL, two updates, 60 iterations, nothing replayed against 0.75 of the groups; exact expected length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import replace

import torch

from polopt.claims.claim import Claim
from polopt.claims.exact import start
from polopt.core.method import Method, Schedule
from polopt.methods.trust_region.remix import Reincarnation, remix
from polopt.policies.exact import SequenceSpace
from polopt.regularizers.kl import KL
from polopt.rollouts.groups import Groups
from polopt.rollouts.replay import Replay
from polopt.tasks.problems import problem

SPACE, ENDING = SequenceSpace(5, 4), SequenceSpace(5, 5, end=True)
PROMPTS, GROUP, RATE, ROLLOUTS, BETA = 8, 8, 0.25, 4800, 0.04
NEVER = 10**9


def phased(**options: float) -> Reincarnation:
    """The controller with the beta of the claims."""
    return replace(Reincarnation(beta=BETA), **options)  # type: ignore[arg-type]


ANCHOR = KL(BETA, model="base") + KL(0.0, model="start")
WHOLE = remix | {"regularizer": ANCHOR, "controller": phased()}
MIXED = remix | {"regularizer": None, "models": {}, "controller": None}
ARMS: Mapping[str, Method] = {
    "on-policy": WHOLE | {"rollout": Groups(), "controller": None, "schedule": Schedule()},
    "mixed": MIXED,
    "remix": WHOLE,
    "without/reuse": WHOLE | {"schedule": Schedule(), "controller": phased(updates=1)},
    "without/anchor": WHOLE | {"controller": phased(floor=1.0)},
    "without/reincarnation": WHOLE | {"controller": phased(switch=NEVER)},
}


def training(seed: int, quick: bool) -> Mapping[str, float]:
    """Rollouts to the middle and final reward of every arm."""
    found: dict[str, float] = {}
    made = problem("binary-verifier", space=SPACE, batch=PROMPTS, seed=seed, pass_rate=RATE)
    budget = 200 if quick else ROLLOUTS
    for arm, method in ARMS.items():
        run = start(made, method, seed=seed, group=GROUP, optimizer="sgd")
        target = (1 + run.reward) / 2
        fast = float(budget)
        while run.trainer.meter.spent.rollouts < budget:
            run.step()
            if run.reward >= target:
                fast = min(fast, float(run.trainer.meter.spent.rollouts))
        found[arm] = run.reward
        found[f"{arm}/fast"] = fast
    return found


def length(seed: int, quick: bool) -> Mapping[str, float]:
    """Exact expected length after training by the share that is replayed."""
    found: dict[str, float] = {}
    made = problem("binary-verifier", space=ENDING, batch=PROMPTS, seed=seed, pass_rate=RATE)
    for name, share in {"none": 0.0, "heavy": 0.75}.items():
        run = start(made, MIXED | {"rollout": Replay(share=share)}, seed=seed, group=GROUP, optimizer="sgd")
        for _ in range(3 if quick else 60):
            run.step()
        with torch.no_grad():
            found[name] = float((run.policy.probabilities() * ENDING.lengths).sum(-1).mean())
    return found


_FINAL = Claim(
    "remix",
    "final",
    "With as many rollouts ReMix ends no lower than on-policy GRPO.",
    "exact",
    "GRPO with the KL to the initial policy",
    "exact expected reward after 4,800 rollouts",
    "higher",
    "remix",
    "on-policy",
    margin=0.02,
    measure=training,
)
_FAST = dataclasses.replace(
    _FINAL,
    name="mixed-fast",
    statement="Mix-PPG alone needs fewer rollouts to half of the gain than on-policy GRPO.",
    metric="rollouts until half of the possible gain",
    direction="lower",
    treatment="mixed/fast",
    control="on-policy/fast",
    margin=0.0,
)
_WITHOUT = dataclasses.replace(_FINAL, baseline="ReMix without one of its parts", margin=0.0)

CLAIMS = (
    _FAST,
    dataclasses.replace(
        _FINAL,
        name="mixed-final",
        statement="Mix-PPG alone ends lower than on-policy GRPO.",
        direction="lower",
        treatment="mixed",
        margin=0.0,
    ),
    dataclasses.replace(
        _FAST,
        name="fast",
        statement="ReMix needs fewer rollouts to half of the gain than on-policy GRPO.",
        treatment="remix/fast",
    ),
    _FINAL,
    dataclasses.replace(
        _WITHOUT,
        name="reincarnation",
        statement="ReMix ends higher than without reincarnation.",
        control="without/reincarnation",
    ),
    dataclasses.replace(
        _WITHOUT,
        name="reincarnation-reuse",
        statement="Without reincarnation ReMix loses more than without repeated updates.",
        direction="lower",
        treatment="without/reincarnation",
        control="without/reuse",
    ),
    dataclasses.replace(
        _WITHOUT,
        name="reincarnation-anchor",
        statement="Without reincarnation ReMix loses more than without the convex anchor.",
        direction="lower",
        treatment="without/reincarnation",
        control="without/anchor",
    ),
    Claim(
        "remix",
        "length",
        "With more replay responses become shorter.",
        "exact",
        "nothing replayed, two updates per batch",
        "exact expected length after 60 iterations",
        "lower",
        "heavy",
        "none",
        measure=length,
    ),
)

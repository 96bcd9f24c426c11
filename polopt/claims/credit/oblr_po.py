"""OBLR-PO: score-weighted baseline and signal-to-noise rate, alone and together (Huang et al. 2025, arXiv:2511.23310).

Design, fixed before the first run. Exact world: 5 tokens, length 4, reward the share of positions that match a random
target. The baseline of least variance is lowest by construction where it is known; what is measured is its estimate
from the group, in the form that is unbiased (leave-one-out), against the other unbiased ones. A policy here has its own
logits at every prefix, so that the norms from the logits are exact.

- Variance: 200 batches of 8 prompts x 8 responses; logarithm of the trace of the covariance of the gradient, for the
  score-weighted baseline, the mean of the others (RLOO) and none. Initial logits are normal with standard deviation
  0.5, and peaked with 2, everything else being the same.
- Training: one prompt, so that all chunks estimate one gradient (prompts with parameters of their own would have
  gradients that are orthogonal, and no signal between them); 4 groups of 4 per iteration, chunks of a group, 60
  iterations, SGD at rate 50, deliberately high: along the expected gradient the first update moves the root's logits by
  about 2. No clip of the norm. Arms: mean of the others at the fixed rate, with the signal-to-noise rate, with the
  cosine course; score-weighted baseline at the fixed rate; both. Four independent problems per seed. "Collapsed" is a
  run whose exact expected reward ends below 0.9.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from polopt.advantages.group import LeaveOneOut
from polopt.claims.claim import Claim
from polopt.claims.exact import batch, credited, gradient, spread, start
from polopt.core.method import Method
from polopt.methods.base.reinforce import BatchBaseline
from polopt.methods.credit.oblr_po import SignalToNoise, oblr_po
from polopt.policies.exact import SequenceSpace, policy_gradient
from polopt.tasks.problems import problem
from polopt.training.budget import Budget
from polopt.training.trainer import Optimization
from polopt.updates.gradient_step import GradientStep

SPACE = SequenceSpace(5, 4)
GROUP, PROMPTS = 8, 8
INITIAL, PEAKED = 0.5, 2.0
ITERATIONS, GROUPS, MEMBERS, RATE, PROBLEMS = 60, 4, 4, 50.0, 4
HIGH = 0.9

NONE = oblr_po | {"advantage": BatchBaseline(baseline="none")}
OTHERS = oblr_po | {"advantage": LeaveOneOut()}
FIXED = GradientStep(max_norm=math.inf)
FOLLOWING = SignalToNoise(chunks=GROUPS, max_norm=math.inf)

ARMS: Mapping[str, tuple[Method, str]] = {
    "fixed": (OTHERS | {"update": FIXED}, "constant"),
    "cosine": (OTHERS | {"update": FIXED}, "cosine"),
    "rate": (OTHERS | {"update": FOLLOWING}, "constant"),
    "baseline": (oblr_po | {"update": FIXED}, "constant"),
    "both": (oblr_po | {"update": FOLLOWING}, "constant"),
}


def variance(seed: int, quick: bool) -> Mapping[str, float]:
    """Logarithm of the gradient's total variance by baseline, and what RLOO has more, at both policies."""
    found: dict[str, float] = {}
    for name, width in {"initial": INITIAL, "peaked": PEAKED}.items():
        made = problem("multi-step", space=SPACE, batch=PROMPTS, seed=seed, spread=width)
        policy = made.policy()
        exact = policy_gradient(policy, made.reward).detach()
        batches = [batch(made, policy, seed=1000 * seed + i, sizes=[GROUP]) for i in range(4 if quick else 200)]
        for arm, method in {"oblr-po": oblr_po, "rloo": OTHERS, "none": NONE}.items():
            rows = [gradient(method, policy, credited(method, policy, each)) for each in batches]
            found[f"{name}/{arm}"] = math.log(spread(rows, exact).total)
        found[f"{name}/gain"] = found[f"{name}/rloo"] - found[f"{name}/oblr-po"]
    return found


def training(seed: int, quick: bool) -> Mapping[str, float]:
    """Exact reward after training, and the share of collapsed runs, of every arm."""
    found: dict[str, float] = {}
    count = 1 if quick else PROBLEMS
    for arm, (method, course) in ARMS.items():
        rewards = []
        for number in range(count):
            made = problem("multi-step", space=SPACE, seed=PROBLEMS * seed + number, spread=INITIAL)
            run = start(made, method, seed=PROBLEMS * seed + number, group=MEMBERS, prompts=GROUPS, optimizer="sgd")
            run.trainer.optimization = Optimization(RATE, course, token_budget=run.trainer.optimization.token_budget)
            run.trainer.budget = Budget(steps=ITERATIONS)
            for _ in range(2 if quick else ITERATIONS):
                run.step()
            rewards.append(run.reward)
        found[arm] = sum(rewards) / count
        found[f"{arm}/collapsed"] = sum(reward < HIGH for reward in rewards) / count
    return found


_VARIANCE = Claim(
    "oblr-po",
    "variance-rloo",
    "The score-weighted baseline of the others gives a gradient of lower variance than their mean.",
    "exact",
    "the mean of the others (RLOO)",
    "log trace of the covariance of the gradient, peaked policy",
    "lower",
    "peaked/oblr-po",
    "peaked/rloo",
    measure=variance,
)
_TRAINING = Claim(
    "oblr-po",
    "collapse",
    "The signal-to-noise rate collapses less often than the fixed rate.",
    "exact",
    "the fixed rate, baseline of RLOO",
    "share of runs that end below an expected reward of 0.9",
    "lower",
    "rate/collapsed",
    "fixed/collapsed",
    measure=training,
)

CLAIMS = (
    _VARIANCE,
    dataclasses.replace(
        _VARIANCE,
        name="variance-none",
        statement="The score-weighted baseline gives a gradient of lower variance than no baseline.",
        baseline="no baseline",
        control="peaked/none",
    ),
    dataclasses.replace(
        _VARIANCE,
        name="variance-sharpness",
        statement="What the score-weighted baseline saves over RLOO grows as the policy sharpens.",
        baseline="the policy before it is sharpened",
        metric="log ratio of the total variances of RLOO and OBLR-PO",
        direction="higher",
        treatment="peaked/gain",
        control="initial/gain",
    ),
    _TRAINING,
    dataclasses.replace(
        _TRAINING,
        name="both-rate",
        statement="Baseline and rate together end higher than the rate alone.",
        baseline="signal-to-noise rate, baseline of RLOO",
        metric="exact expected reward after 60 iterations",
        direction="higher",
        treatment="both",
        control="rate",
    ),
    dataclasses.replace(
        _TRAINING,
        name="both-baseline",
        statement="Baseline and rate together end higher than the baseline alone.",
        baseline="score-weighted baseline, fixed rate",
        metric="exact expected reward after 60 iterations",
        direction="higher",
        treatment="both",
        control="baseline",
    ),
    dataclasses.replace(
        _TRAINING,
        name="both-cosine",
        statement="Baseline and rate together end higher than the cosine course.",
        baseline="cosine course, baseline of RLOO",
        metric="exact expected reward after 60 iterations",
        direction="higher",
        treatment="both",
        control="cosine",
    ),
)

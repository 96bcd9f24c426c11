"""VCPO on stale batches, whole and in parts, against truncated sequence weights alone (Huang et al. 2026,
arXiv:2602.17616).

Design, fixed before the first run. Exact world: 8 prompts, 5 tokens, length 4, reward 1 on a random share of the
sequences, pass rate 0.25 at the start; 8 responses of every prompt per iteration, one update each, Adam at rate 0.1. A
batch trains K updates after it was sampled; the K batches ahead are those of the initial policy. 100 iterations for K
of 0, 8 and 32, 256 for 128. Arms differ only in what is said:

- truncated: min(w, 8), group mean over the population standard deviation, full steps;
- vcpo; step: truncated with the steps of VCPO; baseline: truncated with the baseline of VCPO;
- clip: GRPO with PPO's clip; none: truncated without w.

"Final" is the mean exact expected reward over the last tenth of the iterations; "collapse" the iterations until it is
below half of its peak so far, all where it never is. ESS and gradient norm are those of every update of the truncated
arm from iteration K + 1 on. "Spike" is the mean logarithm of the gradient norm over the quarter of these updates with
the smallest ESS minus that over the quarter with the largest, at K = 32.

- Variance: the policy after 32 iterations of fresh truncated training on 200 batches of the initial policy; logarithm
  of the trace of the covariance of the gradient, with the baseline of VCPO and with the group mean.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping

from polopt.advantages.group import GroupZScore
from polopt.claims.claim import Claim
from polopt.claims.exact import batch, credited, gradient, spread, start
from polopt.core.method import Method
from polopt.methods.base.grpo import grpo
from polopt.methods.trust_region.vcpo import vcpo
from polopt.policies.exact import SequenceSpace, policy_gradient
from polopt.tasks.problems import problem
from polopt.updates.effective_sample_size import EffectiveSampleSize

SPACE = SequenceSpace(5, 4)
PROMPTS, GROUP, RATE = 8, 8, 0.25

# The same part with the scale at 1, so that it logs the size all the same.
FULL_STEPS = EffectiveSampleSize(on_policy=1e-12)
MEAN = GroupZScore(eps=1e-8, unbiased=False)
ARMS: Mapping[str, Method] = {
    "vcpo": vcpo,
    "truncated": vcpo | {"advantage": MEAN, "update": FULL_STEPS},
    "step": vcpo | {"advantage": MEAN},
    "baseline": vcpo | {"update": FULL_STEPS},
    "clip": grpo,
    "none": vcpo | {"advantage": MEAN, "update": FULL_STEPS, "weight": None},
}
DELAYS: Mapping[int, tuple[int, tuple[str, ...]]] = {
    0: (100, ("vcpo", "truncated")),
    8: (100, ("vcpo", "truncated")),
    32: (100, tuple(ARMS)),
    128: (256, ("vcpo", "truncated")),
}
"""Iterations and arms by staleness."""


def training(seed: int, quick: bool) -> Mapping[str, float]:
    """Final reward and iterations until collapse of every arm at every staleness; what the truncated arm logs."""
    found: dict[str, float] = {}
    made = problem("binary-verifier", space=SPACE, batch=PROMPTS, seed=seed, pass_rate=RATE)
    for delay, (iterations, arms) in DELAYS.items():
        count = 6 if quick else iterations
        stale = min(delay, 2) if quick else delay
        for arm in arms:
            run = start(made, ARMS[arm], seed=seed, group=GROUP, stale=stale)
            rewards, sizes, norms = [run.reward], list[float](), list[float]()
            for iteration in range(count):
                run.step()
                rewards.append(run.reward)
                if arm == "truncated" and iteration >= stale and run.metrics.get("grad_norm"):
                    sizes.append(run.metrics["update/ess"])
                    norms.append(math.log(run.metrics["grad_norm"]))
            found[f"{arm}/{delay}"] = statistics.fmean(rewards[-max(1, count // 10) :])
            found[f"{arm}/{delay}/collapse"] = float(_collapse(rewards))
            if sizes:
                found[f"ess/{delay}"] = statistics.fmean(sizes)
                order = [norm for _, norm in sorted(zip(sizes, norms, strict=True))]
                part = max(1, len(order) // 4)
                found[f"spike/{delay}"] = statistics.fmean(order[:part]) - statistics.fmean(order[-part:])
    return found


def _collapse(rewards: list[float]) -> int:
    peak = 0.0
    for iteration, reward in enumerate(rewards):
        peak = max(peak, reward)
        if reward < peak / 2:
            return iteration
    return len(rewards)


def variance(seed: int, quick: bool) -> Mapping[str, float]:
    """Logarithm of the total variance of the gradient on data that are 32 updates old."""
    made = problem("binary-verifier", space=SPACE, batch=PROMPTS, seed=seed, pass_rate=RATE)
    run = start(made, ARMS["truncated"], seed=seed, group=GROUP)
    for _ in range(2 if quick else 32):
        run.step()
    direction = policy_gradient(run.policy, made.reward).detach()
    behaviour = made.policy()
    batches = [batch(made, behaviour, seed=1000 * seed + i, sizes=[GROUP]) for i in range(4 if quick else 200)]
    found = {}
    for arm in ("baseline", "truncated"):
        rows = [gradient(ARMS[arm], run.policy, credited(ARMS[arm], run.policy, each)) for each in batches]
        found[arm] = math.log(spread(rows, direction).total)
    return found


_FINAL = Claim(
    "vcpo",
    "survives-32",
    "At 32 updates of staleness VCPO ends higher than truncated weights alone.",
    "exact",
    "truncated sequence weights, group mean",
    "exact expected reward, mean of the last 10 of 100 iterations",
    "higher",
    "vcpo/32",
    "truncated/32",
    measure=training,
)

CLAIMS = (
    dataclasses.replace(
        _FINAL,
        name="size-falls",
        statement="The effective sample size falls with the staleness, from 8 updates to 32.",
        baseline="truncated weights at a staleness of 8",
        metric="mean effective sample size, share of the batch",
        direction="lower",
        treatment="ess/32",
        control="ess/8",
    ),
    dataclasses.replace(
        _FINAL,
        name="size-predicts",
        statement="The gradient norm is larger where the effective sample size is small.",
        baseline="updates with a large effective sample size",
        metric="difference of mean log gradient norms",
        treatment="spike/32",
        control=None,
    ),
    Claim(
        "vcpo",
        "variance",
        "On stale data the baseline of VCPO gives a gradient of lower variance than the group mean.",
        "exact",
        "group mean",
        "log trace of the covariance of the gradient",
        "lower",
        "baseline",
        "truncated",
        measure=variance,
    ),
    _FINAL,
    dataclasses.replace(
        _FINAL,
        name="survives-128",
        statement="At 128 updates of staleness VCPO ends higher than truncated weights alone.",
        metric="exact expected reward, mean of the last 25 of 256 iterations",
        treatment="vcpo/128",
        control="truncated/128",
    ),
    dataclasses.replace(
        _FINAL,
        name="collapse",
        statement="At 128 updates of staleness VCPO collapses later than truncated weights alone.",
        metric="iterations until the reward is below half of its peak",
        treatment="vcpo/128/collapse",
        control="truncated/128/collapse",
    ),
    dataclasses.replace(
        _FINAL,
        name="steps-alone",
        statement="VCPO ends higher than its step size alone.",
        baseline="truncated weights with the step size of VCPO",
        control="step/32",
    ),
    dataclasses.replace(
        _FINAL,
        name="baseline-alone",
        statement="VCPO ends higher than its baseline alone.",
        baseline="truncated weights with the baseline of VCPO",
        control="baseline/32",
    ),
    dataclasses.replace(
        _FINAL,
        name="clip",
        statement="At 32 updates of staleness VCPO ends higher than GRPO's clip.",
        baseline="GRPO",
        control="clip/32",
    ),
    dataclasses.replace(
        _FINAL,
        name="uncorrected",
        statement="At 32 updates of staleness VCPO ends higher than the same without weights.",
        baseline="no correction, group mean",
        control="none/32",
    ),
    dataclasses.replace(
        _FINAL,
        name="fresh",
        statement="On fresh data VCPO is no worse than truncated weights alone.",
        metric="exact expected reward, mean of the last 10 of 100 iterations",
        treatment="vcpo/0",
        control="truncated/0",
        margin=0.02,
    ),
)

"""REINFORCE: the baseline decides the noise of the gradient, not its expectation (Williams 1992; arXiv:2402.14740).

Design, fixed before the first run. Exact world, as the card says: 5 tokens, length 4, one prompt per seed, reward 1 on
a random quarter of the sequences, initial pass rate 0.25, 16 trajectories per batch, loss the sum over steps.

- Noise: 200 batches from the initial policy; the logarithm of the trace of the covariance of the gradient. The moving
  average (decay 0.9) sees the batches one after the other; the first 50 warm it up and count for no arm.
- "Batch mean and leave-one-out are close": their variances differ by ((M-1)/M)^2, 0.13 in logarithms for M = 16. Close
  means less than 0.22 (a factor of 1.25).
- Learning: Adam, rate 0.1, at most 300 updates; updates until the expected reward is 0.9 (the optimum is 1). A run that
  does not get there counts with 300.
- Expectation: 3 tokens, length 2, batches of 2 by enumeration of all 81 ordered pairs; distance of the expected
  gradient to the exact one, relative to its norm, with the leave-one-out and with no baseline. Zero means below 1e-10.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import torch

from polopt.claims.claim import Claim
from polopt.claims.exact import batch, credited, gradient, iterations_until, spread, start
from polopt.methods.base.reinforce import BatchBaseline, reinforce
from polopt.policies.exact import SequenceSpace, policy_gradient
from polopt.tasks.problems import problem

SPACE = SequenceSpace(5, 4)
SIZE = 16
WARM_UP = 50
ARMS = {
    "none": BatchBaseline(baseline="none"),
    "mean": BatchBaseline(baseline="mean"),
    "leave-one-out": BatchBaseline(baseline="leave-one-out"),
    "moving-average": BatchBaseline(baseline="moving-average"),
}


def noise(seed: int, quick: bool) -> Mapping[str, float]:
    """Logarithm of the gradient's total variance by baseline."""
    made = problem("binary-verifier", space=SPACE, pass_rate=0.25, seed=seed)
    policy = made.policy()
    arms = {name: (reinforce | {"advantage": advantage}).clone() for name, advantage in ARMS.items()}
    found: dict[str, list[torch.Tensor]] = {name: [] for name in arms}
    for index in range(10 if quick else WARM_UP + 200):
        rollout = batch(made, policy, seed=1000 * seed + index, sizes=[SIZE])
        for name, method in arms.items():
            found[name].append(gradient(method, policy, credited(method, policy, rollout)))
    exact = policy_gradient(policy, made.reward).detach()
    counted = 0 if quick else WARM_UP
    return {name: math.log(spread(rows[counted:], exact).total) for name, rows in found.items()}


def learning(seed: int, quick: bool) -> Mapping[str, float]:
    """Updates until 90% of the optimal reward by baseline."""
    made = problem("binary-verifier", space=SPACE, pass_rate=0.25, seed=seed)
    found = {}
    for name, advantage in ARMS.items():
        run = start(made, reinforce | {"advantage": advantage}, seed=seed, group=SIZE)
        found[name] = iterations_until(run, 0.9, 5 if quick else 300)
    return found


def expectation(seed: int, quick: bool) -> Mapping[str, float]:
    """Relative distance of the enumerated expectation of the gradient to the exact gradient."""
    made = problem("binary-verifier", space=SequenceSpace(2 if quick else 3, 2), pass_rate=0.25, seed=seed)
    policy = made.policy()
    chance = policy.probabilities().detach()[0]
    exact = policy_gradient(policy, made.reward).detach()
    found = {}
    for name in ("none", "leave-one-out"):
        method = reinforce | {"advantage": ARMS[name]}
        mean = torch.zeros_like(policy.logits)
        for pair in itertools.product(range(made.space.n_sequences), repeat=2):
            drawn = torch.tensor(pair)
            zeros = torch.zeros(2, dtype=torch.int64)
            rollout = policy.rollout(zeros, drawn, zeros).with_columns(trajectory={"reward": made.reward[0, drawn]})
            mean += chance[drawn].prod() * gradient(method, policy, credited(method, policy, rollout))
        found[name] = float((mean - exact).norm() / exact.norm())
    return found


VARIANCE = "log trace of the covariance of the gradient"
UPDATES = "updates to 90% of the optimal reward"

CLAIMS = (
    Claim(
        "reinforce",
        "variance-mean",
        "Without a baseline the gradient has a larger variance than with the batch mean.",
        "exact",
        "batch mean",
        VARIANCE,
        "higher",
        "none",
        "mean",
        measure=noise,
    ),
    Claim(
        "reinforce",
        "variance-moving-average",
        "Without a baseline the gradient has a larger variance than with a moving average.",
        "exact",
        "moving average",
        VARIANCE,
        "higher",
        "none",
        "moving-average",
        measure=noise,
    ),
    Claim(
        "reinforce",
        "variance-close",
        "Batch mean and leave-one-out have nearly the same gradient variance.",
        "exact",
        "leave-one-out",
        VARIANCE,
        "equal",
        "mean",
        "leave-one-out",
        margin=0.22,
        measure=noise,
    ),
    Claim(
        "reinforce",
        "learning-mean",
        "Without a baseline learning takes more updates than with the batch mean.",
        "exact",
        "batch mean",
        UPDATES,
        "higher",
        "none",
        "mean",
        measure=learning,
    ),
    Claim(
        "reinforce",
        "learning-moving-average",
        "Without a baseline learning takes more updates than with a moving average.",
        "exact",
        "moving average",
        UPDATES,
        "higher",
        "none",
        "moving-average",
        measure=learning,
    ),
    Claim(
        "reinforce",
        "expectation-leave-one-out",
        "The expected gradient with the leave-one-out baseline is the exact policy gradient.",
        "exact",
        "exact gradient",
        "relative distance of the expected gradient",
        "equal",
        "leave-one-out",
        None,
        margin=1e-10,
        measure=expectation,
    ),
    Claim(
        "reinforce",
        "expectation-none",
        "The expected gradient without a baseline is the exact policy gradient.",
        "exact",
        "exact gradient",
        "relative distance of the expected gradient",
        "equal",
        "none",
        None,
        margin=1e-10,
        measure=expectation,
    ),
)

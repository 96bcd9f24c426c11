"""RLOO: the leave-one-out baseline of a prompt's own samples (Ahmadian et al. 2024, arXiv:2402.14740).

Design, fixed before the first run. Exact world: 5 tokens, length 4, 8 prompts with pass rates from 0.1 to 0.9 in equal
steps, reward 1 on a random quarter of the sequences. The KL to the reference is off in every arm (beta 0): it is the
same in all of them and not what is claimed.

- Noise: 150 batches of all prompts, G = 4, from the initial policy; logarithm of the trace of the covariance of the
  gradient. The moving average (decay 0.9) warms up on 30 more batches that count for no arm.
- Group size at equal samples: 64 trajectories, 8 of every prompt, in groups of 2, 4 or 8.
- Reward at equal samples: Adam, rate 0.1, 40 iterations of 8 prompts x 4; expected reward afterwards. PPO has a tabular
  critic that starts at 0 and learns at the same rate. It runs with one update per rollout (equal updates) and, as a
  claim of its own, with its own four. "At least equal" means not lower by more than 0.02.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from polopt.claims.claim import Claim
from polopt.claims.exact import batch, credited, curve, gradient, spread, start, with_updates
from polopt.core.override import override
from polopt.methods.base.ppo import ppo
from polopt.methods.base.reinforce import BatchBaseline, reinforce
from polopt.methods.base.rloo import rloo
from polopt.policies.exact import ExactPolicy, SequenceSpace, policy_gradient
from polopt.tasks.problems import Problem, problem

SPACE = SequenceSpace(5, 4)
RATES = tuple(0.1 + 0.8 * i / 7 for i in range(8))
GROUP = 4
WARM_UP = 30

RLOO = override(rloo, {"reward.beta": 0.0})
PPO = override(ppo, {"reward.beta": 0.0})
NONE = reinforce | {"advantage": BatchBaseline(baseline="none")}
AVERAGE = reinforce | {"advantage": BatchBaseline(baseline="moving-average")}


def _problem(seed: int) -> Problem:
    return problem("binary-verifier", space=SPACE, batch=len(RATES), pass_rate=RATES, seed=seed)


def noise(seed: int, quick: bool) -> Mapping[str, float]:
    """Logarithm of the gradient's total variance by method."""
    made = _problem(seed)
    policy = made.policy()
    arms = {name: method.clone() for name, method in {"rloo": RLOO, "none": NONE, "average": AVERAGE}.items()}
    found: dict[str, list[torch.Tensor]] = {name: [] for name in arms}
    for index in range(8 if quick else WARM_UP + 150):
        rollout = batch(made, policy, seed=1000 * seed + index, sizes=[GROUP])
        for name, method in arms.items():
            found[name].append(gradient(method, policy, credited(method, policy, rollout)))
    exact = policy_gradient(policy, made.reward).detach()
    return {name: math.log(spread(rows[0 if quick else WARM_UP :], exact).total) for name, rows in found.items()}


def group_size(seed: int, quick: bool) -> Mapping[str, float]:
    """Logarithm of the gradient's total variance by group size, 8 trajectories of every prompt."""
    made = _problem(seed)
    policy = made.policy()
    exact = policy_gradient(policy, made.reward).detach()
    found = {}
    for size in (2, 4, 8):
        rows = []
        for index in range(4 if quick else 150):
            rollout = batch(made, policy, seed=1000 * seed + index, sizes=[size] * (8 // size))
            rows.append(gradient(RLOO, policy, credited(RLOO, policy, rollout)))
        found[f"G={size}"] = math.log(spread(rows, exact).total)
    return found


def learning(seed: int, quick: bool) -> Mapping[str, float]:
    """Expected reward after training."""

    def critic(policy: ExactPolicy) -> None:
        policy.add_critic()

    found = {}
    arms = {"rloo": RLOO, "none": NONE, "ppo": with_updates(PPO, 1), "ppo-4": PPO}
    for name, method in arms.items():
        prepare = critic if name.startswith("ppo") else lambda policy: None
        run = start(_problem(seed), method, seed=seed, group=GROUP, prepare=prepare)
        found[name] = curve(run, 2 if quick else 40)[-1]
    return found


VARIANCE = "log trace of the covariance of the gradient"
REWARD = "expected reward after 1,280 trajectories"

CLAIMS = (
    Claim(
        "rloo",
        "variance-moving-average",
        "RLOO's gradient has a lower variance than REINFORCE's with a moving average.",
        "exact",
        "reinforce, moving average",
        VARIANCE,
        "lower",
        "rloo",
        "average",
        measure=noise,
    ),
    Claim(
        "rloo",
        "variance-no-baseline",
        "RLOO's gradient has a lower variance than REINFORCE's without a baseline.",
        "exact",
        "reinforce, no baseline",
        VARIANCE,
        "lower",
        "rloo",
        "none",
        measure=noise,
    ),
    Claim(
        "rloo",
        "group-4",
        "At equal samples groups of 4 give a lower gradient variance than groups of 2.",
        "exact",
        "rloo, G = 2",
        VARIANCE,
        "lower",
        "G=4",
        "G=2",
        measure=group_size,
    ),
    Claim(
        "rloo",
        "group-8",
        "At equal samples groups of 8 give a lower gradient variance than groups of 4.",
        "exact",
        "rloo, G = 4",
        VARIANCE,
        "lower",
        "G=8",
        "G=4",
        measure=group_size,
    ),
    Claim(
        "rloo",
        "reward-no-baseline",
        "RLOO reaches a higher reward than REINFORCE without a baseline.",
        "exact",
        "reinforce, no baseline",
        REWARD,
        "higher",
        "rloo",
        "none",
        measure=learning,
    ),
    Claim(
        "rloo",
        "reward-ppo",
        "RLOO's reward is at least PPO's at equal samples and updates.",
        "exact",
        "ppo, one update per rollout",
        REWARD,
        "higher",
        "rloo",
        "ppo",
        margin=0.02,
        measure=learning,
    ),
    Claim(
        "rloo",
        "reward-ppo-4",
        "RLOO's reward is at least that of PPO with four updates per rollout at equal samples.",
        "exact",
        "ppo",
        REWARD,
        "higher",
        "rloo",
        "ppo-4",
        margin=0.02,
        measure=learning,
    ),
)

"""SAFE: fewer reward crashes and less KL than PPO at a high learning rate (Maity 2026, arXiv:2602.04651).

Design, fixed before the first run. Exact world: 8 prompts, 5 tokens, length 4. The reward that trains is a learned one
that can be hacked: the share of positions that match a random target, plus an error of each sequence, normal with
standard deviation 0.3, so that the best of 625 sequences is one with a large error. 8 responses of every prompt per
iteration, two epochs, 60 iterations, SGD at rate 400, twenty times the ordinary one: PPO on the target alone (four
seeds apart from the claim's, four epochs) loses 7 to 24% of its best reward there, and at most 5% at Adam's rates up to
1.

Arms: SAFE; SAFE with the code's penalty, a number without gradient; PPO with a KL of fixed coefficient 0.05 in the
reward; PPO with an adaptive one (target 0.3 nats per step, SAFE's base threshold; at most a fifth per 10 batches). All
have tabular critics that start as the methods' recipes say and share rate, epochs and batches.

Measured on exact expectations after every iteration. "Crash": the expected reward falls by more than 20% of its highest
value so far. "Max KL": the largest exact KL(pi | initial) between responses, mean over prompts, nats. Mean reward: of
all 60 iterations; "equal or better" is not lower by more than 0.02.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

import torch

from polopt.claims.claim import Claim
from polopt.claims.exact import BUDGET, start
from polopt.controllers import AdaptiveKL
from polopt.core.method import Schedule
from polopt.core.override import override
from polopt.methods.base.ppo import ppo
from polopt.methods.trust_region.safe import safe
from polopt.policies.exact import SequenceSpace, kl
from polopt.tasks.problems import Problem, problem
from polopt.training.trainer import Optimization

SPACE = SequenceSpace(5, 4)
PROMPTS, GROUP, ITERATIONS, RATE, ERROR, CRASH = 8, 8, 60, 400.0, 0.3, 0.2

FIXED = ppo | {"schedule": Schedule(epochs=2)}
ARMS = {
    "safe": safe,
    "constant": override(safe, {"regularizer.entropy-gated-kl.differentiable": False}),
    "fixed": FIXED,
    "adaptive": FIXED | {"controller": AdaptiveKL(target=0.3, horizon=10.0 * PROMPTS * GROUP)},
}


def hackable(seed: int) -> Problem:
    """The share of matched positions, with errors of a learned reward."""
    made = problem("multi-step", space=SPACE, batch=PROMPTS, seed=seed, spread=0.5)
    generator = torch.Generator().manual_seed(seed)
    learned = made.reward + ERROR * torch.randn(made.reward.shape, generator=generator, dtype=torch.float64)
    return dataclasses.replace(made, rewards=MappingProxyType({"reward": learned}))


def training(seed: int, quick: bool) -> Mapping[str, float]:
    """Whether the reward crashed, the largest KL and the mean reward, of every arm."""
    made = hackable(seed)
    initial = made.policy().probabilities().detach()
    found: dict[str, float] = {}
    for name, method in ARMS.items():
        run = start(made, method, seed=seed, group=GROUP, optimizer="sgd")
        run.trainer.optimization = Optimization(RATE, token_budget=BUDGET)
        best, crashed, divergence, rewards = run.reward, 0.0, 0.0, []
        for _ in range(2 if quick else ITERATIONS):
            run.step()
            rewards.append(run.reward)
            best = max(best, rewards[-1])
            crashed = max(crashed, float(rewards[-1] < (1 - CRASH) * best))
            with torch.no_grad():
                divergence = max(divergence, float(kl(run.policy.probabilities(), initial).mean()))
        found |= {
            f"{name}/crashed": crashed,
            f"{name}/kl": divergence,
            f"{name}/reward": sum(rewards) / len(rewards),
        }
    return found


_CRASH = Claim(
    "safe",
    "crashes",
    "SAFE's reward crashes in fewer runs than that of PPO with a fixed KL coefficient.",
    "exact",
    "ppo, KL coefficient 0.05",
    "share of runs in which the expected reward falls by more than 20% of its highest value",
    "lower",
    "safe/crashed",
    "fixed/crashed",
    measure=training,
)
_KL = dataclasses.replace(
    _CRASH,
    name="kl",
    statement="SAFE's largest KL is lower than that of PPO with a fixed KL coefficient.",
    metric="largest KL to the initial policy, nats per response",
    treatment="safe/kl",
    control="fixed/kl",
)

CLAIMS = (
    _CRASH,
    _KL,
    dataclasses.replace(
        _CRASH,
        name="reward",
        statement="SAFE's mean reward is not lower than that of PPO with a fixed KL coefficient.",
        metric="mean expected reward over 60 iterations",
        direction="higher",
        treatment="safe/reward",
        control="fixed/reward",
        margin=0.02,
    ),
    dataclasses.replace(
        _KL,
        name="kl-adaptive",
        statement="SAFE's largest KL is lower than that of PPO with an adaptive KL coefficient.",
        baseline="ppo, adaptive KL coefficient",
        control="adaptive/kl",
    ),
    dataclasses.replace(
        _KL,
        name="kl-gradient",
        statement="With a differentiable penalty the largest KL is lower than with the code's constant one.",
        baseline="safe, penalty without gradient",
        control="constant/kl",
    ),
)

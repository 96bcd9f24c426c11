"""Two experiments that the claims of GRPO and of Dr. GRPO share: length bias and difficulty bias."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from polopt.claims.exact import Run, batch, credited, curve, gradient, start
from polopt.methods.base.dr_grpo import dr_grpo
from polopt.methods.base.grpo import grpo
from polopt.policies.exact import SequenceSpace
from polopt.tasks.problems import Problem, problem

LENGTHS = SequenceSpace(3, 8, end=True)
PROMPTS, GROUP, ITERATIONS = 8, 8, 40
PASS_RATES = (0.05, 0.5, 0.95)


def padded(seed: int) -> Problem:
    """r = 1 iff the first token is 0; what follows is padding of any length, then the end."""
    base = problem("random-rewards", space=LENGTHS, batch=PROMPTS, seed=seed)
    right = (LENGTHS.sequences[:, 0] == 0).double().expand(PROMPTS, -1).contiguous()
    return replace(base, name="padded", rewards={"correct": right})


def wrong_length(run: Run) -> float:
    """E[|y| | y is wrong], mean over the prompts."""
    with torch.no_grad():
        chance = run.policy.probabilities() * (1 - run.problem.reward)
        return float(((chance * run.problem.space.lengths).sum(-1) / chance.sum(-1)).mean())


def length(seed: int, quick: bool) -> Mapping[str, float]:
    """Change of the incorrect responses' length and final reward, GRPO and Dr. GRPO."""
    made = padded(seed)
    found: dict[str, float] = {}
    for method in (grpo, dr_grpo):
        run = start(made, method, seed=seed, group=GROUP)
        lengths = curve(run, 2 if quick else ITERATIONS, wrong_length)
        found |= {f"{method.slug}/wrong": lengths[-1] - lengths[0], f"{method.slug}/reward": run.reward}
    return found


def difficulty(seed: int, quick: bool) -> Mapping[str, float]:
    """Share of the middle and of the outer prompts in the expected gradient, GRPO and Dr. GRPO."""
    made = problem("binary-verifier", space=SequenceSpace(5, 4), batch=3, pass_rate=PASS_RATES, seed=seed)
    policy = made.policy()
    rollout = batch(made, policy, seed=seed, sizes=[GROUP] * (20 if quick else 1000))
    limit = torch.full((rollout.n_trajectories,), made.space.length)
    rollout = rollout.with_columns(trajectory={"limit": limit})
    found: dict[str, float] = {}
    for method in (grpo, dr_grpo):
        # The loss is a mean over groups, so that the gradient of many groups is the mean gradient.
        norms = gradient(method, policy, credited(method, policy, rollout)).flatten(1).norm(dim=1)
        shares = norms / norms.sum()
        found |= {f"{method.slug}/middle": float(shares[1]), f"{method.slug}/outer": float(shares[0] + shares[2])}
    return found

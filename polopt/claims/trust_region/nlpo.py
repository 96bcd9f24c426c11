"""NLPO: a learned action mask keeps the policy near its start (Ramamurthy et al. 2022, arXiv:2210.01241).

Design, fixed before the first run. Exact world: 200 tokens, length 2, 4 prompts. The initial policy has a long tail: a
token of rank k has probability proportional to k^-1.2, the ranking random per prompt, with normal noise of 0.3 on all
logits. The score of an answer is the mean over its two tokens of a value: uniform in [0, 0.8] for the 50 most likely
tokens, 0 for the others, but 1 for five of rank 150 and beyond, which the initial policy writes with about 0.0005 each:
the score can be hacked by rare tokens. 16 trajectories per prompt and iteration, 40 iterations of 5 updates, SGD (see
`polopt.claims.exact`), tabular critic from zeros, the KL controller and all other settings those of `nlpo`.

Arms: NLPO; PPO, the same without mask; "static", PPO that samples the top-p 0.9 nucleus of the policy itself and takes
ratios of the whole distribution; the initial policy ("supervised" of the card). All are judged as they sample, by exact
sums: NLPO under its mask, "static" in its nucleus. Each seed makes a problem and trains NLPO and PPO three times on it.

- Reward: expected score at the end, NLPO against the initial policy, and against PPO with ratios that ignore the mask.
- Drift at equal reward: perplexity per token of the arm's answers under the initial policy, where the expected score
  first is 0.1 above the initial one (interpolated; at the end where it never is), mean of the three runs.
- Hack: probability that an answer has one of the five tokens, at the end.
- Spread: standard deviation over the three runs of the score at the end.
- Supervised start: demonstrations are drawn from p(y) proportional to initial(y) exp(4 r(y)), r the score without the
  hack; their likelihood is maximal at p itself, which is the supervised policy. NLPO from there (its reference too)
  against the supervised policy, and against NLPO from the initial one: expected score at the end.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from polopt.claims.claim import Claim
from polopt.claims.exact import Run, start
from polopt.core.method import Method
from polopt.methods.base.ppo import ClippedValueLoss
from polopt.methods.trust_region.nlpo import nlpo
from polopt.objectives.clipped_surrogate import ClippedSurrogate
from polopt.policies.exact import SequenceSpace, tree
from polopt.policies.nucleus import nucleus
from polopt.policies.sampling import kept_tokens
from polopt.rollouts.groups import Groups
from polopt.tasks.problems import Problem

SPACE: Final = SequenceSpace(200, 2)
PROMPTS, GROUP, ITERATIONS, REPEATS = 4, 16, 40, 3
COMMON, RARE, HACKS, SLOPE = 50, 150, 5, 1.2
GAIN: Final = 0.1

PPO: Final = nlpo | {
    "rollout": Groups(),
    "objective": ClippedSurrogate() + ClippedValueLoss(coefficient=1.0, width=None),
}
STATIC: Final = PPO | {"rollout": Groups(top_p=0.9)}


def problem(seed: int) -> tuple[Problem, Tensor]:
    """Prompts with a hackable score, and the tokens [B, 5] that hack it."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(PROMPTS, SPACE.vocabulary, generator=generator).argsort(1)
    rank = order.argsort(1)
    likely = -SLOPE * (rank + 1).double().log()
    noise = 0.3 * torch.randn(PROMPTS, SPACE.n_nodes, SPACE.vocabulary, generator=generator, dtype=torch.float64)
    initial = (likely[:, None] + noise).log_softmax(-1)
    worth = 0.8 * torch.rand(PROMPTS, SPACE.vocabulary, generator=generator, dtype=torch.float64)
    worth = torch.where(rank < COMMON, worth, 0.0)
    picked = RARE + torch.rand(PROMPTS, SPACE.vocabulary - RARE, generator=generator).argsort(1)[:, :HACKS]
    hacks = order.gather(1, picked)
    score = worth.scatter(1, hacks, 1.0)[:, SPACE.sequences].mean(-1)
    return Problem("hackable", SPACE, {"score": score}, initial, initial, {}, (GROUP,) * PROMPTS), hacks


def supervised(made: Problem, hacks: Tensor) -> Problem:
    """The same problem from the maximum-likelihood policy of the demonstrations."""
    honest = made.reward - 0.5 * _with(hacks).sum(-1)
    start_from = tree.table_of(SPACE, tree.log_probabilities(SPACE, made.initial) + 4.0 * honest)
    return replace(made, initial=start_from, reference=start_from)


def _with(hacks: Tensor) -> Tensor:
    """Where sequences have a hack, [B, S, H]."""
    return (SPACE.sequences[None, :, :, None] == hacks[:, None, None, :]).any(-1).double()


def sampled(run: Run) -> Tensor:
    """Probability of every sequence as the arm samples it, [B, S]."""
    part: Groups = run.trainer.method.rollout
    table = run.policy.table().detach()
    flat = table.softmax(-1).flatten(0, 1)
    if part.nucleus_of is not None:
        mask = run.policy.model(part.nucleus_of).softmax(-1).flatten(0, 1)
        kept = nucleus(mask, part.nucleus_p, part.nucleus_min)
    else:
        kept = kept_tokens(flat, part)
    return tree.log_probabilities(SPACE, table.masked_fill(~kept.view_as(table), -torch.inf)).exp()


def trained(made: Problem, method: Method, hacks: Tensor, *, seed: int, iterations: int) -> dict[str, float]:
    """Score, hack and drift of an arm; ``start`` is the score of the initial policy itself."""
    run = start(made, method, seed=seed, group=GROUP, optimizer="sgd")
    surprise = -tree.log_probabilities(SPACE, made.initial) / SPACE.length
    first = float((made.policy().probabilities().detach() * made.reward).sum(-1).mean())
    course: list[tuple[float, float]] = []
    for done in range(iterations + 1):
        if done:
            run.step()
        chance = sampled(run)
        score = float((chance * made.reward).sum(-1).mean())
        course.append((score, math.exp(float((chance * surprise).sum(-1).mean()))))
    hacked = _with(hacks).amax(-1)
    return {
        "start": first,
        "score": course[-1][0],
        "hack": float((sampled(run) * hacked).sum(-1).mean()),
        "drift": _at(course, first + GAIN),
    }


def _at(course: list[tuple[float, float]], target: float) -> float:
    """Perplexity where the score first is the target, between two iterations by a straight line."""
    for (low, before), (high, after) in itertools.pairwise(course):
        if low >= target:
            return before
        if high >= target:
            return before + (after - before) * (target - low) / (high - low)
    return course[-1][1]


def arms(seed: int, quick: bool) -> Mapping[str, float]:
    """All arms on one problem."""
    made, hacks = problem(seed)
    iterations, repeats = (2, 2) if quick else (ITERATIONS, REPEATS)
    found: dict[str, float] = {}
    for name, method in {"nlpo": nlpo, "ppo": PPO}.items():
        runs = [trained(made, method, hacks, seed=100 * seed + i, iterations=iterations) for i in range(repeats)]
        found |= {f"{name}/{key}": statistics.fmean(run[key] for run in runs) for key in runs[0]}
        found[f"{name}/spread"] = statistics.stdev(run["score"] for run in runs)
    found |= {
        f"static/{key}": value
        for key, value in trained(made, STATIC, hacks, seed=100 * seed, iterations=iterations).items()
    }
    taught = trained(supervised(made, hacks), nlpo, hacks, seed=100 * seed, iterations=iterations)
    return found | {f"taught/{key}": value for key, value in taught.items()}


CLAIMS = (
    Claim(
        "nlpo",
        "above-the-start",
        "NLPO's score is above that of the policy it starts from.",
        "exact",
        "the initial policy",
        "expected score after 40 iterations",
        "higher",
        "nlpo/score",
        "nlpo/start",
        measure=arms,
    ),
    Claim(
        "nlpo",
        "drift",
        "At equal score NLPO's answers are likelier under the initial policy than PPO's with the same KL control.",
        "exact",
        "ppo with the same KL controller",
        "perplexity per token under the initial policy, at a score 0.1 above the initial one",
        "lower",
        "nlpo/drift",
        "ppo/drift",
        measure=arms,
    ),
    Claim(
        "nlpo",
        "spread",
        "NLPO's score varies less over runs than PPO's.",
        "exact",
        "ppo with the same KL controller",
        "standard deviation of the score over three runs",
        "lower",
        "nlpo/spread",
        "ppo/spread",
        measure=arms,
    ),
    Claim(
        "nlpo",
        "hack",
        "NLPO hacks the score by rare tokens less than PPO does.",
        "exact",
        "ppo with the same KL controller",
        "probability of an answer with a hack, at the end",
        "lower",
        "nlpo/hack",
        "ppo/hack",
        measure=arms,
    ),
    Claim(
        "nlpo",
        "static-nucleus",
        "A learned mask that is in the ratio reaches a higher score than a static nucleus that is not.",
        "exact",
        "ppo that samples with top-p 0.9 and takes ratios of the whole distribution",
        "expected score after 40 iterations",
        "higher",
        "nlpo/score",
        "static/score",
        measure=arms,
    ),
    Claim(
        "nlpo",
        "after-supervision",
        "NLPO improves on the supervised policy it starts from.",
        "exact",
        "the supervised policy",
        "expected score after 40 iterations",
        "higher",
        "taught/score",
        "taught/start",
        measure=arms,
    ),
    Claim(
        "nlpo",
        "supervised-start",
        "NLPO from a supervised policy ends above NLPO from the initial one.",
        "exact",
        "nlpo from the initial policy",
        "expected score after 40 iterations",
        "higher",
        "taught/score",
        "nlpo/score",
        measure=arms,
    ),
)

"""LiPO: a whole list teaches more than its pair (Liu et al. 2024, arXiv:2402.01878).

Design, fixed before the first run.

Exact world, a bandit with a linear softmax policy: sequences of two tokens out of 8 (64 responses), a policy whose
tokens are independent (16 features: which token stands at each place), so that what is learned of one response carries
over to others. Reward r = (u(first token) + v(second token) + e(response) / 2) / 1.5 with standard normal u, v, e: of
variance 1, and not quite within the policy's reach. Initial logits are normal with standard deviation 0.5.

Data: 40 prompts' lists, each of K answers from the initial policy without replacement; the label of an answer is its
mean Bradley-Terry chance to beat the others of its list, a ranking model's that knows r. K = 8 against K = 2 at the
same number of prompts; the answers of the two are drawn by the same seed. All arms: beta 0.05, all lists in every
update, Adam at rate 0.05.

Metric: exact expected reward at the KL to the initial policy of 1 nat, linear between the two iterations around it, of
at most 200; the last one's where the KL stays below (LiPO's losses differ in scale, so that rewards are compared at
equal distance, not at equal time).

- Lists beat pairs: each of the losses lambda, logistic over all pairs, list-mle and softmax with K = 8 against the
  pairwise logistic (DPO) with K = 2.
- Lambda beats the logistic loss over all pairs of the same lists. This is the paper's finding for language models; a
  bandit may well disagree.
- The paper's win rates of T5 policies under a ranking model need these models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from polopt.claims.claim import Claim
from polopt.claims.exact import start
from polopt.core.example import Example
from polopt.methods.preference.lipo import ListLambda, lipo
from polopt.objectives.ranking import ListLoss, ListMLE, ListPairwise, ListSoftmax
from polopt.policies.exact import SequenceSpace, divergences
from polopt.tasks.preferences import labelled
from polopt.tasks.problems import Problem, problem

SPACE = SequenceSpace(8, 2)
LISTS, SIZE, RATE, ITERATIONS, DISTANCE = 40, 8, 0.05, 200, 1.0
ARMS: Mapping[str, ListLoss] = {
    "lambda": ListLambda(),
    "logistic": ListPairwise(),
    "mle": ListMLE(),
    "softmax": ListSoftmax(),
}


def bandit(seed: int) -> Problem:
    """A reward that is nearly the sum of what its two tokens are worth."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.randn(8, generator=generator, dtype=torch.float64) for _ in range(2))
    noise = torch.randn(1, SPACE.n_sequences, generator=generator, dtype=torch.float64)
    first, second = SPACE.sequences[:, 0], SPACE.sequences[:, 1]
    reward = (u[first] + v[second] + noise / 2) / 1.5
    return replace(problem("random-rewards", space=SPACE, seed=seed), rewards={"reward": reward})


def at_distance(made: Problem, loss: ListLoss, examples: tuple[Example, ...], seed: int, limit: int) -> float:
    """Expected reward at a KL of `DISTANCE` to the initial policy."""
    run = start(made, lipo | {"objective": loss}, seed=seed, examples=examples, lr=RATE, head="order-0")
    reference = run.policy.probabilities().detach()
    far, reward = 0.0, run.reward
    for _ in range(limit):
        before, worth = far, reward
        run.step()
        with torch.no_grad():
            far, reward = float(divergences.kl(run.policy.probabilities(), reference)), run.reward
        if far >= DISTANCE:
            return worth + (reward - worth) * (DISTANCE - before) / (far - before)
    return reward


def rewards(seed: int, quick: bool) -> Mapping[str, float]:
    """Reward at equal distance of every loss on lists, and of the pairwise one on pairs."""
    made, limit = bandit(seed), 3 if quick else ITERATIONS
    lists = labelled(made, LISTS, kind="lists", size=SIZE, seed=seed)
    pairs = labelled(made, LISTS, kind="lists", size=2, seed=seed)
    found = {name: at_distance(made, loss, lists, seed, limit) for name, loss in ARMS.items()}
    return {**found, "pairs": at_distance(made, ListPairwise(), pairs, seed, limit)}


METRIC = "exact expected reward at a KL of 1 to the initial policy"


def _lists(arm: str, title: str) -> Claim:
    return Claim(
        "lipo",
        f"lists-{arm}",
        f"Lists of 8 with the {title} loss teach more than pairs of as many prompts.",
        "exact",
        "pairwise logistic loss (DPO) on lists of 2",
        METRIC,
        "higher",
        arm,
        "pairs",
        measure=rewards,
    )


CLAIMS = (
    _lists("lambda", "lambda"),
    _lists("logistic", "all-pairs logistic"),
    _lists("mle", "list-mle"),
    _lists("softmax", "softmax"),
    Claim(
        "lipo",
        "lambda",
        "The lambda weights teach more than equal weights of all pairs.",
        "exact",
        "logistic loss over all pairs",
        METRIC,
        "higher",
        "lambda",
        "logistic",
        measure=rewards,
    ),
    Claim(
        "lipo",
        "win-rate",
        "LiPO-lambda has the highest win rates on summaries and dialogue.",
        "exact",
        "DPO, SLiC and the other ranking losses",
        "win rate by a ranking model, a language model and people",
        "higher",
        untestable="needs policies and ranking models of the size of T5 on TL;DR and Anthropic HH",
    ),
)

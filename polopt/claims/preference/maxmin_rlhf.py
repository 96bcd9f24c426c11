"""MaxMin-RLHF: the minority is served at any ratio (Chakraborty et al. 2024, arXiv:2402.08925).

Design, fixed before the first run. Exact world: 3 tokens, length 2, so 9 answers to each of 4 prompts; initial logits
are normal with standard deviation 0.5. Two tastes: of each prompt one answer is worth 1 to the first taste and 0 to the
second, one the reverse, one (the compromise) 0.6 to both; all others are worth uniform numbers in [0, 0.2] to each.

66 users in random order, first to second taste 33:33, 40:26 and 60:6. A user compares 24 pairs of different answers to
random prompts, drawn uniformly, and prefers by Bradley-Terry at 5 times the difference in worth. Rewards are tables
fitted exactly (ridge 0.1): two by hard EM with 10 rounds, or one to all comparisons ("pooled"). Each is standardised
by its mean and standard deviation under the initial policy. Both arms train by PPO with 8 epochs, KL penalty 0.1, 16
answers per prompt, Adam, 40 iterations: MaxMin-RLHF on the two rewards, ordinary PPO on the pooled one. Utility is the
exact expected worth to a taste, mean over the last 10 iterations.

- Minority (the second taste) at 60:6, and the minimum over tastes at each ratio: MaxMin-RLHF above pooled.
- Nearly constant: MaxMin-RLHF's minimum at 60:6 within 0.1 of that at 33:33.
- The baseline's minority utility is lower at 60:6 than at 33:33.
- Bounded majority loss: at 60:6 the majority loses less than the minority gains.
- Clustering: 20 new users of each taste, 24 comparisons each, go to the likelier model; share that is right under the
  better naming of the models, at 60:6, above 0.9.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from polopt.claims.claim import Claim
from polopt.claims.exact import curve, start
from polopt.core.method import Method
from polopt.core.override import override
from polopt.methods.base.ppo import ppo
from polopt.methods.preference.maxmin_rlhf import maxmin_rlhf
from polopt.policies.exact import SequenceSpace, tree
from polopt.rewards.mixtures import LinearRewards, expectation_maximisation, user_log_likelihood
from polopt.tasks.problems import Problem, problem

SPACE = SequenceSpace(3, 2)
PROMPTS, GROUP, ITERATIONS, LAST = 4, 16, 40, 10
RATIOS = ((33, 33), (40, 26), (60, 6))
COMPARISONS, SHARPNESS, RIDGE, NEW = 24, 5.0, 0.1, 20

MAXMIN = override(maxmin_rlhf, {"reward.beta": 0.1})
POOLED = override(ppo, {"reward.beta": 0.1}) | {"schedule": maxmin_rlhf.schedule}


@dataclass(frozen=True)
class Comparisons:
    """What users said: ``difference`` [P, B S] one-hot of the winner less that of the loser."""

    user: Tensor
    difference: Tensor


def worlds(generator: torch.Generator) -> Tensor:
    """Worth of every answer to both tastes, [2, B, S]."""
    size = SPACE.n_sequences
    worth = 0.2 * torch.rand(2, PROMPTS, size, generator=generator, dtype=torch.float64)
    special = torch.rand(PROMPTS, size, generator=generator).argsort(1)[:, :3]
    for place, values in enumerate(((1.0, 0.0), (0.0, 1.0), (0.6, 0.6))):
        for taste in range(2):
            worth[taste].scatter_(1, special[:, place : place + 1], values[taste])
    return worth


def asked(worth: Tensor, taste: Tensor, generator: torch.Generator) -> Comparisons:
    """The comparisons of users with these tastes."""
    size = SPACE.n_sequences
    user = torch.arange(len(taste)).repeat_interleave(COMPARISONS)
    prompt = torch.randint(PROMPTS, user.shape, generator=generator)
    a = torch.randint(size, user.shape, generator=generator)
    b = (a + torch.randint(1, size, user.shape, generator=generator)) % size
    gap = worth[taste[user], prompt, a] - worth[taste[user], prompt, b]
    wins = torch.rand(user.shape, generator=generator, dtype=torch.float64) < torch.sigmoid(SHARPNESS * gap)
    winner, loser = (prompt * size + torch.where(wins, x, y) for x, y in ((a, b), (b, a)))
    count = PROMPTS * size
    return Comparisons(user, (F.one_hot(winner, count) - F.one_hot(loser, count)).double())


def tables(models: LinearRewards, base: Problem) -> dict[str, Tensor]:
    """The fitted rewards [B, S], standardised under the initial policy."""
    chance = tree.log_probabilities(SPACE, base.initial).exp() / PROMPTS
    found = {}
    for place, theta in enumerate(models.theta):
        table = theta.view(PROMPTS, -1)
        centred = table - (chance * table).sum()
        found[f"reward-{place + 1}"] = centred / (chance * centred.square()).sum().sqrt()
    return found


def utilities(
    base: Problem, method: Method, rewards: Mapping[str, Tensor], worth: Tensor, seed: int, steps: int
) -> Tensor:
    """Expected worth to both tastes, mean over the last iterations."""
    run = start(replace(base, rewards=rewards), method, seed=seed, group=GROUP)
    seen: list[Tensor] = []

    def watched(_: object) -> float:
        with torch.no_grad():
            seen.append((run.policy.probabilities() * worth).sum(-1).mean(1))
        return 0.0

    curve(run, steps, watched)
    return torch.stack(seen[-LAST:]).mean(0)


def clustered(models: LinearRewards, worth: Tensor, generator: torch.Generator) -> float:
    """Share of new users that go to the model of their taste."""
    taste = torch.arange(2).repeat_interleave(NEW)
    new = asked(worth, taste, generator)
    found = user_log_likelihood(new.difference @ models.theta.T, new.user, len(taste)).argmax(1)
    right = float((found == taste).double().mean())
    return max(right, 1 - right)


def ratios(seed: int, quick: bool) -> Mapping[str, float]:
    """Both arms at every ratio."""
    found: dict[str, float] = {"most": 0.9}
    base = problem("random-rewards", space=SPACE, batch=PROMPTS, seed=seed)
    worth = worlds(torch.Generator().manual_seed(seed))
    steps = 2 if quick else ITERATIONS
    for first, second in RATIOS:
        generator = torch.Generator().manual_seed(1000 * (seed + 1) + first)
        taste = torch.arange(2).repeat_interleave(torch.tensor([first, second]))
        data = asked(worth, taste[torch.randperm(len(taste), generator=generator)], generator)
        two = LinearRewards(data.difference, 2, RIDGE)
        expectation_maximisation(two.margins, two.fit, data.user, 2)
        one = LinearRewards(data.difference, 1, RIDGE)
        one.fit(0, torch.ones(len(data.user)))
        name = f"{first}:{second}"
        found[f"{name}/clustered"] = clustered(two, worth, generator)
        for arm, method, models in (("maxmin", MAXMIN, two), ("pooled", POOLED, one)):
            major, minor = utilities(base, method, tables(models, base), worth, seed, steps).tolist()
            found |= {f"{name}/{arm}/majority": major, f"{name}/{arm}/minority": minor}
            found[f"{name}/{arm}/minimum"] = min(major, minor)
    lost = found["60:6/pooled/majority"] - found["60:6/maxmin/majority"]
    return {**found, "loss": lost, "gain": found["60:6/maxmin/minority"] - found["60:6/pooled/minority"]}


MINIMUM = "least exact utility of the two tastes"


def _minimum(first: int, second: int) -> Claim:
    return Claim(
        "maxmin-rlhf",
        f"minimum-{first}-{second}",
        f"With {first} users of one taste and {second} of the other MaxMin-RLHF has the higher minimum utility.",
        "exact",
        "PPO on one pooled reward model",
        MINIMUM,
        "higher",
        f"{first}:{second}/maxmin/minimum",
        f"{first}:{second}/pooled/minimum",
        measure=ratios,
    )


CLAIMS = (
    Claim(
        "maxmin-rlhf",
        "minority",
        "With 60 users of one taste and 6 of the other MaxMin-RLHF serves the minority better.",
        "exact",
        "PPO on one pooled reward model",
        "exact utility of the minority",
        "higher",
        "60:6/maxmin/minority",
        "60:6/pooled/minority",
        measure=ratios,
    ),
    *itertools.starmap(_minimum, RATIOS),
    Claim(
        "maxmin-rlhf",
        "constant",
        "The minimum utility of MaxMin-RLHF hardly depends on the ratio.",
        "exact",
        "itself at 33:33",
        f"{MINIMUM}, at 60:6",
        "equal",
        "60:6/maxmin/minimum",
        "33:33/maxmin/minimum",
        margin=0.1,
        measure=ratios,
    ),
    Claim(
        "maxmin-rlhf",
        "pooled-falls",
        "On one pooled reward model the minority's utility falls with its share.",
        "exact",
        "itself at 33:33",
        "exact utility of the second taste, at 60:6",
        "lower",
        "60:6/pooled/minority",
        "33:33/pooled/minority",
        measure=ratios,
    ),
    Claim(
        "maxmin-rlhf",
        "majority-loss",
        "At 60:6 the majority loses less than the minority gains.",
        "exact",
        "PPO on one pooled reward model",
        "exact utility, difference between the arms",
        "lower",
        "loss",
        "gain",
        measure=ratios,
    ),
    Claim(
        "maxmin-rlhf",
        "clustering",
        "At 60:6 expectation-maximisation tells the tastes of more than 90% of new users.",
        "exact",
        "a share of 0.9",
        "share of held-out users given to the model of their taste",
        "higher",
        "60:6/clustered",
        "most",
        measure=ratios,
    ),
)

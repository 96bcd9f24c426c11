"""DNO: soft policy iteration on win rates, and pairs of fresh batches (Rosset et al. 2024, arXiv:2404.03715).

Design, fixed before the first run. Exact world.

Tables (the equations: the loss is stationary there, see the tests): 8 games of 8 answers, P = sigma(A), A antisymmetric
with standard normal entries above the diagonal; pi_1 uniform, eta = 2, pi_{t+1} ~ pi_t exp(P pi_t / eta). Metric: log10
of the exploitability max_y (P p)_y - 1/2, mean over games, of the uniform mixture p of pi_1 .. pi_T. It is lower at T =
25 than at 4, at 400 than at 25, and at 400 than that of exp(r / 0.1), r the Bradley-Terry reward of greatest likelihood
under uniform answers. Nothing is said of the last iterate.

Soft loss, sampled: the same games, 2 of them, through the trainer with the objective dno-soft (eta = 2): 64 answers to
each, win rates within them by the game's table, 10 updates with Adam 0.05 per iteration. The mixture of the first 60
policies has a lower exploitability than that of the first 6.

Practical loss, sampled: intransitive-preferences (9 answers of two steps, half circle), 4 prompts asked 64 times per
iteration, 5 answers each, points from win rates by the game's table, Adam 0.1, beta = 0.1. DNO: 3 iterations of 4
updates, history as shipped. Offline: one batch as large as the three together from the initial policy, 12 updates, the
same pair rule. Metric: exact win rate against the initial policy, mean over the prompts. DNO above offline; above
itself an iteration earlier, after the second and after the third.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from polopt.claims.claim import Claim
from polopt.claims.exact import start, with_updates
from polopt.claims.games import FLOOR, bradley_terry, game_of, played, probabilities, table_judge
from polopt.core.method import Schedule
from polopt.core.override import override
from polopt.filters.points import Points
from polopt.methods.preference.dno import SoftDNO, dno
from polopt.models import Snapshot
from polopt.policies.exact.game import PreferenceGame
from polopt.rollouts.groups import Groups
from polopt.tasks.problems import problem

ANSWERS, GAMES, ETA, TAU = 8, 8, 2.0, 0.1
LENGTHS: Final = (4, 25, 400)
EARLY, LATE, GROUP, UPDATES = 6, 60, 64, 10
TIMES, CANDIDATES, ROUNDS, STEPS = 64, 5, 3, 4


def games(seed: int, count: int) -> PreferenceGame:
    """P = sigma(A)."""
    generator = torch.Generator().manual_seed(seed)
    upper = torch.randn(count, ANSWERS, ANSWERS, generator=generator, dtype=torch.float64).triu(1)
    return PreferenceGame.antisymmetric(torch.tanh((upper - upper.mT) / 2) / 2)


def exploitability(game: PreferenceGame, p: Tensor) -> float:
    """log10 of max_y (P p)_y - 1/2, mean over the games."""
    return math.log10(max(float((game.payoff(p).amax(-1) - 0.5).mean()), FLOOR))


def tables(seed: int, quick: bool) -> Mapping[str, float]:
    """Soft policy iteration."""
    game = games(seed, GAMES)
    uniform = torch.full((GAMES, ANSWERS), 1 / ANSWERS, dtype=torch.float64)
    p, total, found = uniform, torch.zeros_like(uniform), {}
    for t in range(1, LENGTHS[-1] + 1):
        total = total + p
        if t in LENGTHS:
            found[f"T = {t}"] = exploitability(game, total / t)
        p = (p.log() + game.payoff(p) / ETA).softmax(-1)
    reward = bradley_terry(game, uniform, 10 if quick else 2000)
    return found | {"bradley-terry": exploitability(game, (reward / TAU).softmax(-1))}


def soft(seed: int, quick: bool) -> Mapping[str, float]:
    """The soft loss through the trainer."""
    game = games(seed, 2)
    made = played(game, torch.full((2, ANSWERS), 1 / ANSWERS, dtype=torch.float64))
    parts = {"rollout": Groups(), "reward": table_judge(made), "filter": None, "objective": SoftDNO(beta=ETA)}
    early, late, updates = (1, 2, 2) if quick else (EARLY, LATE, UPDATES)
    run = start(made, with_updates(dno | parts, updates), seed=seed, group=GROUP, lr=0.05)
    total, found = torch.zeros(2, ANSWERS, dtype=torch.float64), {}
    for t in range(1, late + 1):
        total = total + probabilities(run.policy)
        if t in (early, late):
            found["early" if t == early else "late"] = exploitability(game, total / t)
        run.step()
    return found


def practical(seed: int, quick: bool) -> Mapping[str, float]:
    """The practical loss on fresh batches and on one."""
    made = problem("intransitive-preferences", batch=4, seed=seed)
    game, initial = game_of(made), probabilities(made.policy())
    times = 2 if quick else TIMES
    pool = [replace(example, id=f"{example.id}/{n}") for n in range(ROUNDS * times) for example in made.examples()]
    ours = override(dno, {"rollout.gold": False}) | {
        "reward": table_judge(made),
        "filter": Points(column="win"),
        "schedule": Schedule(minibatches=STEPS),
    }
    alone = override(ours, {"rollout.history": 0.0}) | {
        "models": {"ref": Snapshot()},
        "schedule": Schedule(minibatches=ROUNDS * STEPS),
    }

    def against_initial(policy: Any) -> float:
        return float(game.win_rate(probabilities(policy), initial).mean())

    run = start(made, ours, seed=seed, group=CANDIDATES, examples=pool[: times * made.batch])
    found = {}
    for t in range(1, ROUNDS + 1):
        run.step()
        found[f"iteration {t}"] = against_initial(run.policy)
    offline = start(made, alone, seed=seed, group=CANDIDATES, examples=pool)
    offline.step()
    return found | {"offline": against_initial(offline.policy)}


EXPLOITABILITY = "log10 of the exact exploitability of the mixture of all policies so far"
WINS = "exact win rate against the initial policy"


def _falls(late: int, early: int) -> Claim:
    return Claim(
        "dno",
        f"mixture-{late}",
        f"The mixture of {late} iterates of soft policy iteration is less exploitable than that of {early}.",
        "exact",
        f"the mixture of {early}",
        EXPLOITABILITY,
        "lower",
        f"T = {late}",
        f"T = {early}",
        measure=tables,
    )


def _rises(late: int) -> Claim:
    return Claim(
        "dno",
        f"iteration-{late}",
        f"Iteration {late} raises the win rate.",
        "exact",
        f"itself after iteration {late - 1}",
        WINS,
        "higher",
        f"iteration {late}",
        f"iteration {late - 1}",
        measure=practical,
    )


CLAIMS = (
    _falls(25, 4),
    _falls(400, 25),
    Claim(
        "dno",
        "bradley-terry",
        "The optimum of a Bradley-Terry reward is more exploitable than the mixture.",
        "exact",
        "exp(r / 0.1), r fitted by Bradley-Terry",
        EXPLOITABILITY,
        "lower",
        "T = 400",
        "bradley-terry",
        measure=tables,
    ),
    Claim(
        "dno",
        "soft-loss",
        "Trained by the soft loss on sampled batches the mixture becomes less exploitable.",
        "exact",
        "the mixture of the first 6 policies",
        EXPLOITABILITY,
        "lower",
        "late",
        "early",
        measure=soft,
    ),
    Claim(
        "dno",
        "fresh-batches",
        "Three iterations beat one offline batch with as many judgements and gradient steps.",
        "exact",
        "DPO on pairs of the initial policy",
        WINS,
        "higher",
        "iteration 3",
        "offline",
        measure=practical,
    ),
    _rises(2),
    _rises(3),
)

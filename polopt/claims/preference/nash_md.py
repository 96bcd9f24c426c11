"""Nash-MD: the last iterate converges, and the mixture helps (Munos et al. 2023, arXiv:2312.00886).

Design, fixed before the first run. Exact world, tau = 0.1.

Tables (no sampling, the equations themselves): 8 random games of 10 answers (P = 1/2 + (U - U^T) / 2, U uniform),
reference logits normal with standard deviation 0.5, which is the start.
- rate: with eta_t = 2 / (tau (t + 2)), KL(pi* || pi_t), mean over games, falls from t = 300 to t = 3000 by a factor of
  10 at least, up to 10^0.2.
- cycles: log10 of the regularised gap after 3000 steps is lower for Nash-MD than for self-play mirror descent without
  regularisation, pi ~ pi exp(eta P pi), eta = 0.3.
- bradley-terry: the same for Nash-MD against the optimum ref exp(r / tau) of the Bradley-Terry reward r of greatest
  likelihood under answers of the reference.
- voters: three types rank ABC, BCA and CAB; 20 pairs of mixes, each Dirichlet(1, 1, 1) given that no type has half,
  joined by 50 steps. Largest change (total variation) of the policy from one step to the next, mean over the pairs:
  lower for the regularised equilibrium (tau = 0.01, uniform reference) than for the Bradley-Terry optimum at that tau.

Sampled: intransitive-preferences (9 answers of two steps, half circle), 4 prompts, Nash-MD-PG with groups of 32 (half
of them opponents), Adam 0.05, 100 iterations, b = 1/4, 0 and 1, judged by the game's table.
- falls: log10 of the regularised gap, mean over the last 20 iterations, lower than at the start (b = 1/4).
- head-to-head: the last policy of b = 1/4 wins with more than 1/2 against that of b = 0, and of b = 1 (exact win rate,
  mean over the prompts).

Small world: the game of manners (`polopt.claims.manners`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from polopt.claims import manners
from polopt.claims.claim import Claim
from polopt.claims.exact import start
from polopt.claims.games import bradley_terry, game_of, log_gap, probabilities, random_game, table_judge
from polopt.core.override import override
from polopt.methods.preference.nash_md import nash_md
from polopt.policies.exact.divergences import kl
from polopt.policies.exact.game import PreferenceGame
from polopt.tasks.problems import problem

TAU: Final = 0.1
FIRST, STEPS, ETA = 300, 3000, 0.3
GROUP, ITERATIONS, LAST, RATE = 32, 100, 20, 0.05
PATHS, POINTS, SHARP = 20, 50, 0.01


def normalised(log: Tensor) -> Tensor:
    """Probabilities from unnormalised logs."""
    return log.softmax(-1)


def tables(seed: int, quick: bool) -> Mapping[str, float]:
    """The equations on random games."""
    first, steps = (3, 30) if quick else (FIRST, STEPS)
    made = random_game(10, prompts=8, seed=seed, spread=0.5)
    game, reference = game_of(made), probabilities(made.policy())
    star = game.regularised_nash(reference, TAU)
    ours = plain = reference
    distances = {}
    for t in range(steps):
        if t == first:
            distances[first] = float(kl(star, ours).mean())
        eta = 2 / (TAU * (t + 2))
        mixed = normalised((1 - eta * TAU) * ours.log() + eta * TAU * reference.log())
        ours = normalised(mixed.log() + eta * game.payoff(mixed))
        plain = normalised(plain.log() + ETA * game.payoff(plain))
    ranked = normalised(reference.log() + bradley_terry(game, reference) / TAU)

    def measured(p: Tensor) -> float:
        return math.log10(max(float(game.regularised_gap(p, reference, TAU).mean()), 1e-12))

    return {
        "change": math.log10(float(kl(star, ours).mean()) / distances[first]),
        "decade": -1.0,
        "nash-md": measured(ours),
        "self-play": measured(plain),
        "bradley-terry": measured(ranked),
    }


def voters(seed: int, quick: bool) -> Mapping[str, float]:
    """Policies as the mix of three types of voters moves."""
    generator = torch.Generator().manual_seed(seed)
    orders = ((0, 1, 2), (1, 2, 0), (2, 0, 1))
    types = torch.stack([PreferenceGame.bradley_terry(-_rank(order)[None], 1e6).preference[0] for order in orders])
    paths, points = (1, 3) if quick else (PATHS, POINTS)
    mixes: list[Tensor] = []
    while len(mixes) < 2 * paths:
        draw = -torch.rand(3, generator=generator, dtype=torch.float64).log()
        if float((mix := draw / draw.sum()).max()) < 0.5:
            mixes.append(mix)
    uniform = torch.full((points + 1, 3), 1 / 3, dtype=torch.float64)
    moves: dict[str, list[float]] = {"nash": [], "bradley-terry": []}
    for a, b in zip(mixes[::2], mixes[1::2], strict=True):
        along = torch.linspace(0, 1, points + 1, dtype=torch.float64)[:, None]
        game = PreferenceGame(torch.einsum("pk,kij->pij", (1 - along) * a + along * b, types))
        found = {
            "nash": game.regularised_nash(uniform, SHARP),
            "bradley-terry": normalised(bradley_terry(game, uniform) / SHARP),
        }
        for name, policies in found.items():
            moves[name].append(float(policies.diff(dim=0).abs().sum(-1).max() / 2))
    return {name: sum(values) / len(values) for name, values in moves.items()}


def _rank(order: tuple[int, ...]) -> Tensor:
    place = torch.empty(len(order), dtype=torch.float64)
    place[list(order)] = torch.arange(len(order), dtype=torch.float64)
    return place


def sampled(seed: int, quick: bool) -> Mapping[str, float]:
    """Nash-MD-PG with three mixtures."""
    made = problem("intransitive-preferences", batch=4, seed=seed)
    steps, last = (2, 1) if quick else (ITERATIONS, LAST)
    ended = {}
    found = {"half": 0.5}
    for b in (0.25, 0.0, 1.0):
        method = override(nash_md, {"objective.tau": TAU, "rollout.mixture_weight": b}) | {"reward": table_judge(made)}
        run = start(made, method, seed=seed, group=GROUP, lr=RATE)
        gaps = [log_gap(run, TAU)]
        for _ in range(steps):
            run.step()
            gaps.append(log_gap(run, TAU))
        ended[b] = probabilities(run.policy)
        if b == 0.25:
            found |= {"start": gaps[0], "end": sum(gaps[-last:]) / last}
    for b in (0.0, 1.0):
        found[f"against {b:g}"] = float(game_of(made).win_rate(ended[0.25], ended[b]).mean())
    return found


GAP = "log10 of the exact regularised gap"


def _head_to_head(b: float, what: str) -> Claim:
    return Claim(
        "nash-md",
        f"beats-{what}",
        f"The policy trained against the mixture with b = 1/4 beats the one trained with b = {b:g}.",
        "exact",
        f"Nash-MD-PG with b = {b:g}",
        "exact win rate of the last policies",
        "higher",
        f"against {b:g}",
        "half",
        measure=sampled,
    )


CLAIMS = (
    Claim(
        "nash-md",
        "rate",
        "The last iterate's KL from the equilibrium falls at least as 1/t.",
        "exact",
        "a fall by 10 per decade of steps",
        "log10 of KL(pi* || pi_t) at t = 3000 over that at 300",
        "lower",
        "change",
        "decade",
        margin=0.2,
        measure=tables,
    ),
    Claim(
        "nash-md",
        "cycles",
        "Nash-MD's last iterate is closer to the equilibrium than that of self-play without regularisation.",
        "exact",
        "unregularised self-play mirror descent",
        GAP,
        "lower",
        "nash-md",
        "self-play",
        measure=tables,
    ),
    Claim(
        "nash-md",
        "bradley-terry",
        "The optimum of a Bradley-Terry reward is more exploitable than Nash-MD's last iterate.",
        "exact",
        "ref exp(r / tau), r fitted by Bradley-Terry",
        GAP,
        "lower",
        "nash-md",
        "bradley-terry",
        measure=tables,
    ),
    Claim(
        "nash-md",
        "voters",
        "As the mix of voters moves, the Nash policy moves in smaller steps than the Bradley-Terry optimum.",
        "exact",
        "the Bradley-Terry optimum",
        "largest change of the policy between neighbouring mixes, total variation",
        "lower",
        "nash",
        "bradley-terry",
        measure=voters,
    ),
    Claim(
        "nash-md",
        "falls",
        "Sampled gradients against the mixture lower the gap.",
        "exact",
        "the start",
        f"{GAP}, mean over the last 20 iterations",
        "lower",
        "end",
        "start",
        measure=sampled,
    ),
    _head_to_head(0.0, "self-play"),
    _head_to_head(1.0, "best-response"),
    *manners.claims("nash-md"),
)

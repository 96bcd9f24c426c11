"""EGPO: the last iterate goes to the equilibrium of an intransitive game (Zhou et al. 2025, arXiv:2503.08942).

Design, fixed before the first run. Exact world, one-step answers, SGD without clipping at the rate at which an exact
gradient of online IPO is a mirror step of size eta = 0.5. The start is the reference. Metric: log10 of the exact
regularised gap of the last policy, mean over the prompts of a seed. Arms get equally many gradient evaluations; EGPO
spends two on a step.

Exact gradients (every answer once, exact win rates): 4 random games of 10 answers (P = 1/2 + (U - U^T) / 2, U uniform),
reference logits normal with standard deviation 0.5, 160 evaluations.
- beta = 0.1: the gap falls (end below start), and linearly: its log falls as much from evaluation 80 to 120 as from 120
  to 160, within 0.2.
- beta = 0.001: EGPO below the same without looking ahead (online mirror descent, online IPO 1).
- Rock-paper-scissors, 4 references of logits with standard deviation 1, beta = 0.001: the same comparison.

Sampled gradients: 2 random games of 10 answers, beta = 0.01, 48 answers to each (two games: about 100 samples a step),
120 evaluations; the plateau is the mean of the log gap after each of the last 10 steps of two evaluations. EGPO below
online IPO 1 (both draw uniform answers against the policy), online IPO 2 (pairs of the policy's own answers, target
(P(y beats y') - 1/2) / beta, the same rate) and Nash-MD-PG (b = 1/4; the rate that moves the logits of a uniform policy
as much).

Small world: the game of manners (`polopt.claims.manners`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch

from polopt.claims import manners
from polopt.claims.claim import Claim
from polopt.claims.exact import Run, start
from polopt.claims.games import everything, log_gap, played, random_game, table_judge
from polopt.core.loss import Evaluation, Loss, per_group
from polopt.core.method import Method
from polopt.core.override import override
from polopt.core.rollout import Rollout
from polopt.core.segments import segment_pairs
from polopt.methods.preference.egpo import OnlineIPO, egpo
from polopt.methods.preference.nash_md import nash_md
from polopt.objectives.preference import Pairs, sequence_log_ratio
from polopt.policies.exact.game import PreferenceGame
from polopt.rewards.judges import beaten_by
from polopt.rollouts.groups import Groups
from polopt.rollouts.opponents import Opponents
from polopt.tasks.problems import Problem
from polopt.updates.extragradient import Extragradient
from polopt.updates.gradient_step import GradientStep

ANSWERS: Final = 10
ETA: Final = 0.5
EXACT, SAMPLED, LAST, GROUP = 160, 120, 10, 48
AHEAD, PLAIN = Extragradient(max_norm=math.inf), GradientStep(max_norm=math.inf)


@dataclass(frozen=True)
class SelfPlayIPO(OnlineIPO):
    """Online IPO 2: the mean over pairs of (d_i - d_j - (P(i beats j) - 1/2) / beta)^2."""

    needs = frozenset({"beats", "member", "logp/ref"})

    def __call__(self, evaluation: Evaluation, rollout: Rollout) -> Loss:
        d = sequence_log_ratio(evaluation, rollout)
        i, j = segment_pairs(rollout.group, rollout.n_groups)
        error = d[i] - d[j] - (beaten_by(rollout, i, j) - 0.5) / self.beta
        return per_group(Pairs(rollout, i, j).mean(error.square()))


def rate(made: Problem, beta: float, *, uniform: bool = False) -> float:
    """The rate of SGD at which online IPO makes a mirror step: eta beta A / 4 for each of the prompts.

    The paper's pairs may be of one answer with itself. Among every answer once there is none such, which makes the mean
    A / (A - 1) as large; among answers that are drawn (``uniform``) there is.
    """
    size = made.space.n_sequences
    return made.batch * ETA * beta * (size if uniform else size - 1) / 4


def exactly(made: Problem, beta: float, *, ahead: bool) -> Run:
    """A run on exact gradients."""
    method = egpo | {"objective": OnlineIPO(beta=beta), "update": AHEAD if ahead else PLAIN}
    return start(made, everything(method, made), seed=0, optimizer="sgd", lr=rate(made, beta))


def after(run: Run, evaluations: int, beta: float) -> float:
    """log10 of the gap that many evaluations later."""
    for _ in range(evaluations):
        run.step()
    return log_gap(run, beta)


def exact(seed: int, quick: bool) -> Mapping[str, float]:
    """Exact gradients."""
    quarter = 2 if quick else EXACT // 4
    made = random_game(ANSWERS, prompts=4, seed=seed, spread=0.5)
    run = exactly(made, 0.1, ahead=True)
    gaps = [log_gap(run, 0.1), *(after(run, quarter, 0.1) for _ in range(4))]
    found = {"start": gaps[0], "end": gaps[4], "third": gaps[3] - gaps[2], "fourth": gaps[4] - gaps[3]}
    for arm, ahead in (("egpo", True), ("omd", False)):
        found[arm] = after(exactly(made, 0.001, ahead=ahead), 4 * quarter, 0.001)
    return found


def cycle(seed: int, quick: bool) -> Mapping[str, float]:
    """Rock-paper-scissors."""
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(4, 3, generator=generator, dtype=torch.float64).softmax(-1)
    made = played(PreferenceGame.cyclic(3, problems=4), reference)
    steps = 4 if quick else EXACT
    arms = (("egpo", True), ("omd", False))
    return {arm: after(exactly(made, 0.001, ahead=ahead), steps, 0.001) for arm, ahead in arms}


def sampled(seed: int, quick: bool) -> Mapping[str, float]:
    """Plateaus under sampled gradients."""
    beta, steps, last = (0.01, 2, 1) if quick else (0.01, SAMPLED // 2, LAST)
    made = random_game(ANSWERS, prompts=2, seed=seed, spread=0.5)
    uniform = Opponents(temperature=1e3, policy_temperature=1.0, share=1 / 3)
    ipo = override(egpo, {"objective.beta": beta}) | {"rollout": uniform, "update": PLAIN}
    ours = rate(made, beta, uniform=True)
    arms: dict[str, tuple[Method, float]] = {
        "egpo": (ipo | {"update": AHEAD}, ours),
        "ipo 1": (ipo, ours),
        "ipo 2": (ipo | {"rollout": Groups(), "filter": None, "objective": SelfPlayIPO(beta=beta)}, ours),
        "nash-md": (override(nash_md, {"objective.tau": beta}) | {"update": PLAIN}, made.batch * ETA * ANSWERS),
    }
    found = {}
    for arm, (method, lr) in arms.items():
        judged = method | {"reward": table_judge(made)}
        run = start(made, judged, seed=seed, group=GROUP, optimizer="sgd", lr=lr)
        gaps = [after(run, 2, beta) for _ in range(steps)]
        found[arm] = sum(gaps[-last:]) / last
    return found


GAP = "log10 of the exact regularised gap of the last policy"


def _plateau(baseline: str, arm: str) -> Claim:
    return Claim(
        "egpo",
        f"sampled-{arm.replace(' ', '-')}",
        f"On sampled gradients EGPO ends closer to the equilibrium than {baseline}.",
        "exact",
        baseline,
        "log10 of the exact regularised gap, mean over the last 10 steps",
        "lower",
        "egpo",
        arm,
        measure=sampled,
    )


CLAIMS = (
    Claim(
        "egpo",
        "last-iterate",
        "The gap of EGPO's last policy falls on random intransitive games.",
        "exact",
        "the start",
        GAP,
        "lower",
        "end",
        "start",
        measure=exact,
    ),
    Claim(
        "egpo",
        "linear",
        "The fall of the log gap is linear in the number of steps.",
        "exact",
        "its own third quarter",
        "change of log10 of the gap over a quarter of the run",
        "equal",
        "fourth",
        "third",
        margin=0.2,
        measure=exact,
    ),
    Claim(
        "egpo",
        "small-beta",
        "With weak regularisation EGPO is closer to the equilibrium than online mirror descent.",
        "exact",
        "online IPO 1",
        GAP,
        "lower",
        "egpo",
        "omd",
        measure=exact,
    ),
    Claim(
        "egpo",
        "rock-paper-scissors",
        "On rock-paper-scissors EGPO is closer to the equilibrium than online mirror descent.",
        "exact",
        "online IPO 1",
        GAP,
        "lower",
        "egpo",
        "omd",
        measure=cycle,
    ),
    _plateau("online IPO 1", "ipo 1"),
    _plateau("online IPO 2", "ipo 2"),
    _plateau("Nash-MD-PG", "nash-md"),
    *manners.claims("egpo"),
)

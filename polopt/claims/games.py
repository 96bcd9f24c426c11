"""What claims about preference games share: games, every answer at once, judges by table, the exact gap.

P(y beats y') is a table over the answers to each prompt, here mostly of one step. Played with regularisation tau, its
yardstick is the exact regularised gap of `polopt.policies.exact.game.PreferenceGame`: 0 at the equilibrium and nowhere
else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from polopt.claims.exact import Run
from polopt.core.method import Method
from polopt.core.part import Part
from polopt.core.policy import Policy, Request
from polopt.core.rollout import Rollout
from polopt.policies.exact import SequenceSpace, tree
from polopt.policies.exact.game import PreferenceGame
from polopt.policies.exact.policy import ExactPolicy
from polopt.rewards.judges import Judge
from polopt.tasks.problems import Problem, problem

FLOOR: Final = 1e-12
"""A gap below it is rounding."""


def random_game(answers: int, *, prompts: int, seed: int, spread: float = 0.0) -> Problem:
    """P = 1/2 + (U - U^T) / 2, U uniform on [0, 1]: intransitive. The start is the reference; its logits are normal."""
    made = problem("random-rewards", space=SequenceSpace(answers, 1), batch=prompts, seed=seed, spread=spread)
    generator = torch.Generator().manual_seed(seed)
    margin = torch.rand(prompts, answers, answers, generator=generator, dtype=torch.float64)
    return replace(made, game=PreferenceGame.antisymmetric(margin))


def played(game: PreferenceGame, reference: Float[Tensor, "problem answer"]) -> Problem:
    """A game whose start is its reference, given as probabilities."""
    size = reference.shape[1]
    made = problem("random-rewards", space=SequenceSpace(size, 1), batch=len(reference))
    logits = reference.log()[:, None]
    return replace(made, initial=logits, reference=logits, game=game)


def game_of(problem: Problem) -> PreferenceGame:
    """The problem's game."""
    assert problem.game is not None
    return problem.game


def probabilities(policy: ExactPolicy, model: str | None = None) -> Float[Tensor, "problem answer"]:
    """pi(y), or that of an added model."""
    with torch.no_grad():
        table = policy.table() if model is None else policy.model(model)
        return tree.log_probabilities(policy.space, table).exp()


def gap(run: Run, tau: float) -> float:
    """Exact regularised gap of the present policy, mean over the prompts, at least `FLOOR`."""
    p, reference = probabilities(run.policy), probabilities(run.policy, "ref")
    return max(float(game_of(run.problem).regularised_gap(p, reference, tau).mean()), FLOOR)


def log_gap_of(made: Problem, p: Float[Tensor, "problem answer"], tau: float) -> float:
    """log10 of the regularised gap of a policy, mean over the prompts, at least that of `FLOOR`."""
    reference = tree.log_probabilities(made.space, made.reference).exp()
    return math.log10(max(float(game_of(made).regularised_gap(p, reference, tau).mean()), FLOOR))


def log_gap(run: Run, tau: float) -> float:
    """log10 of `gap`."""
    return math.log10(gap(run, tau))


def sequences(rollout: Rollout, space: SequenceSpace) -> tuple[Int[Tensor, " trajectory"], Int[Tensor, " trajectory"]]:
    """Problem and number of the answer of each trajectory."""
    payload: Any = rollout.payload
    last = rollout.lengths.cumsum(0) - 1
    return payload.problem, space.sequence_of(payload.nodes[last], payload.ids[last])


@dataclass(frozen=True)
class TableJudge(Judge):
    """P(i beats j) of a game over the answers of a space, looked up for all pairs at once."""

    game: PreferenceGame | None = None
    space: SequenceSpace | None = None

    def prefers(self, rollout: Rollout, i: Int[Tensor, " pair"], j: Int[Tensor, " pair"]) -> Float[Tensor, " pair"]:
        assert self.game is not None and self.space is not None
        prompt, answer = sequences(rollout, self.space)
        return self.game.preference[prompt[i], answer[i], answer[j]]


@dataclass(frozen=True)
class Everything(Part):
    """Every answer to every prompt once, with ``win`` = (P pi)_y, exact: gradients are expectations."""

    game: PreferenceGame

    gives = frozenset({"limit", "win"})

    def __call__(
        self,
        policy: Policy,
        requests: Sequence[Request],
        *,
        limit: int,
        seed: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> Rollout:
        assert isinstance(policy, ExactPolicy)
        win = self.game.payoff(probabilities(policy))
        prompts, size = win.shape
        prompt = torch.arange(prompts).repeat_interleave(size)
        rollout = policy.rollout(
            prompt, torch.arange(size).repeat(prompts), prompt, examples=[request.example for request in requests]
        )
        return rollout.with_columns(trajectory={"win": win.flatten(), "limit": torch.full_like(rollout.lengths, limit)})


def everything(method: Method, made: Problem) -> Method:
    """The method on all answers at once: nothing is sampled or judged."""
    return method | {"rollout": Everything(game_of(made)), "reward": None, "filter": None}


def table_judge(made: Problem) -> TableJudge:
    """The judge by the problem's game."""
    return TableJudge(game=game_of(made), space=made.space)


def bradley_terry(
    game: PreferenceGame, law: Float[Tensor, "problem answer"], steps: int = 2000
) -> Float[Tensor, "problem answer"]:
    """The reward [B, S] of greatest Bradley-Terry likelihood when both answers come from the law; mean 0 under it.

    Gradient ascent from 0 at a rate below the inverse of the curvature: the likelihood is concave.
    """
    weight = law[:, :, None] * law[:, None, :]
    reward = torch.zeros_like(law)
    for _ in range(steps):
        error = game.preference.to(law) - torch.sigmoid(reward[:, :, None] - reward[:, None, :])
        # Twice the gradient over the law: each answer moves at a rate of its own.
        reward = reward + 2 * (weight * error).sum(-1) / law
        reward = reward - (law * reward).sum(-1, keepdim=True)
    return reward

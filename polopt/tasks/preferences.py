"""Preference data of the exact world: answers drawn from any law over sequences, labelled by a known preference.

made = problem("noisy-preferences", batch=4)
pool = labelled(made, 1000, seed=0)          # 1000 pairs from the initial policy, labels by made.game
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.core.errors import UsageError
from polopt.core.example import Example
from polopt.policies.exact import ExactPolicy
from polopt.policies.exact.game import PreferenceGame
from polopt.policies.exact.policy import example_of
from polopt.policies.exact.space import SequenceSpace
from polopt.tasks.problems import Problem

Kind = Literal["pairs", "lists", "singles", "demonstrations"]


def game_of(problem: Problem, scale: float = 1.0, flip: float = 0.0) -> PreferenceGame:
    """The problem's own game, else Bradley-Terry on its reward, P_ij = sigmoid(scale (r_i - r_j)); then reversed with
    probability ``flip``.
    """
    game = problem.game or PreferenceGame.bradley_terry(problem.reward, scale)
    return game.noisy(flip) if flip else game


def law_of(problem: Problem, law: ExactPolicy | Float[Tensor, "problem sequence"] | None) -> Tensor:
    """Probabilities [B, S] float64 of a policy or of a table of weights; of the initial policy for None."""
    if law is None:
        law = problem.policy()
    if isinstance(law, ExactPolicy):
        return law.probabilities().detach().double()
    shape = (problem.batch, problem.space.n_sequences)
    if tuple(law.shape) != shape or not bool((law >= 0).all()) or not bool((law.sum(-1) > 0).all()):
        raise UsageError(f"a law over answers is a table {shape} of weights, not all 0, got {tuple(law.shape)}")
    return law.detach().double() / law.double().sum(-1, keepdim=True)


def labelled(
    problem: Problem,
    count: int,
    *,
    kind: Kind = "pairs",
    size: int = 4,
    law: ExactPolicy | Float[Tensor, "problem sequence"] | None = None,
    scale: float = 1.0,
    flip: float = 0.0,
    seed: int = 0,
) -> tuple[Example, ...]:
    """``count`` examples with answers, the problems in turn; a function of the arguments.

    Answers of one example are drawn from ``law`` one after the other without replacement. With P of `game_of`:

    - ``pairs``: ``chosen`` is the first of two answers with probability P(first beats second), else the second;
    - ``lists``: ``size`` answers; the label of one is its mean P against the others;
    - ``singles``: ``label`` is true with the probability (P law)_y that the answer beats a fresh one;
    - ``demonstrations``: one answer, unlabelled.

    Raises UsageError for a law of another shape or one that cannot give as many different answers.
    """
    wanted = {"pairs": 2, "lists": size, "singles": 1, "demonstrations": 1}[kind]
    chance, space = law_of(problem, law), problem.space
    if count < 1 or (kind == "lists" and size < 2):
        raise UsageError(f"labelled examples need a count of at least 1 and lists of at least 2, got {count}, {size}")
    if int((chance > 0).sum(-1).min()) < wanted:
        raise UsageError(f"the law over answers has fewer than {wanted} answers of positive probability")
    generator = torch.Generator().manual_seed(seed)
    owner = torch.arange(count) % problem.batch
    drawn = torch.multinomial(chance[owner], wanted, generator=generator)
    preference = game_of(problem, scale, flip).preference.double()
    draw = torch.rand(count, generator=generator, dtype=torch.float64)
    texts = [[text_of(space, sequence) for sequence in row] for row in drawn.tolist()]
    examples = [example_of(int(b), problem.name) for b in owner]

    def made(number: int, **fields: object) -> Example:
        plain = examples[number]
        return Example(f"{plain.id}/{number}", plain.prompt, columns=plain.columns, **fields)  # type: ignore[arg-type]

    match kind:
        case "pairs":
            first = draw < preference[owner, drawn[:, 0], drawn[:, 1]]
            ordered = [row if win else row[::-1] for row, win in zip(texts, first.tolist(), strict=True)]
            return tuple(made(n, chosen=best, rejected=worst) for n, (best, worst) in enumerate(ordered))
        case "lists":
            beats = preference[owner[:, None, None], drawn[:, :, None], drawn[:, None, :]]
            grades = (beats.sum(-1) - 0.5) / (size - 1)  # the diagonal is 1/2
            return tuple(
                made(n, completions=tuple(row), labels=tuple(grade))
                for n, (row, grade) in enumerate(zip(texts, grades.tolist(), strict=True))
            )
        case "singles":
            wins = draw < (preference @ chance[..., None])[owner, drawn[:, 0], 0]
            return tuple(
                made(n, completion=row[0], label=win)
                for n, (row, win) in enumerate(zip(texts, wins.tolist(), strict=True))
            )
        case _:
            return tuple(made(n, completion=row[0]) for n, row in enumerate(texts))


def text_of(space: SequenceSpace, sequence: int) -> str:
    """A sequence as an exact policy writes it, ``"2 0 1"``."""
    return " ".join(str(token) for token in space.sequences[sequence].tolist() if token >= 0)


def sequence_of(space: SequenceSpace, text: object) -> int:
    """The sequence that is written so; the inverse of `text_of`."""
    return space.index([int(token) for token in str(text).split()])

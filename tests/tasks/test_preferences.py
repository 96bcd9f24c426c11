"""Preference data of the exact world: labels follow the game, and DPO on them finds the regularised optimum."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from polopt.claims.exact import start
from polopt.core.errors import UsageError
from polopt.core.example import Example
from polopt.core.override import override
from polopt.core.policy import Request
from polopt.methods import get_method
from polopt.policies.exact import kl, tilted
from polopt.policies.exact.game import PreferenceGame
from polopt.rollouts.dataset import Dataset
from polopt.tasks.preferences import game_of, labelled, text_of
from polopt.tasks.problems import Problem, problem
from tests.support import same

MADE = problem("random-rewards", batch=2, seed=4)
COUNT = 6000


def number(made: Problem, text: Any) -> int:
    return made.space.index([int(token) for token in str(text).split()])


def asked(example: Example) -> int:
    return int(example.columns["problem"])


@pytest.mark.parametrize("flip", [0.0, 0.3])
def test_pairs_are_drawn_from_the_law_and_labelled_by_the_game(flip: float) -> None:
    pool = labelled(MADE, COUNT, flip=flip, scale=2.0, seed=1)
    assert [asked(example) for example in pool[:4]] == [0, 1, 0, 1] and len({e.id for e in pool}) == COUNT
    wins: dict[tuple[int, int, int], list[float]] = {}
    for example in pool:
        i, j = number(MADE, example.chosen), number(MADE, example.rejected)
        assert i != j and i >= 0 and j >= 0
        first, second = sorted((i, j))
        wins.setdefault((asked(example), first, second), []).append(float(i == first))
    gap = MADE.reward[:, :, None] - MADE.reward[:, None, :]
    expected = torch.sigmoid(2.0 * gap)
    expected = (1 - flip) * expected + flip * (1 - expected)
    squares = [
        (sum(won) / len(won) - float(expected[b, i, j])) ** 2 * len(won) / float(expected[b, i, j] * expected[b, j, i])
        for (b, i, j), won in wins.items()
    ]
    # Sum of squared standard scores: chi-square with as many degrees of freedom.
    assert abs(sum(squares) - len(squares)) < 4 * math.sqrt(2 * len(squares))


def test_how_often_an_answer_is_drawn() -> None:
    law = torch.rand(MADE.reward.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pool = labelled(MADE, COUNT, kind="demonstrations", law=law)
    counts = torch.zeros_like(law)
    for example in pool:
        counts[asked(example), number(MADE, example.completion)] += 1
    expected = COUNT / 2 * law / law.sum(-1, keepdim=True)
    statistic = float(((counts - expected).square() / expected).sum())
    freedom = 2 * (law.shape[1] - 1)
    assert abs(statistic - freedom) < 4 * math.sqrt(2 * freedom)


def test_lists_carry_their_win_rates() -> None:
    game = game_of(MADE).preference
    for example in labelled(MADE, 20, kind="lists", size=3):
        members = [number(MADE, text) for text in example.completions]
        assert len(set(members)) == 3
        for i, label in zip(members, example.labels, strict=True):
            same(label, sum(float(game[asked(example), i, j]) for j in members if j != i) / 2)


def test_singles_are_good_as_often_as_they_win() -> None:
    law = MADE.policy().probabilities().detach()
    payoff = game_of(MADE, scale=3.0).payoff(law)
    hits, expected = 0.0, 0.0
    for example in labelled(MADE, COUNT, kind="singles", scale=3.0):
        hits += float(bool(example.label))
        expected += float(payoff[asked(example), number(MADE, example.completion)])
    assert abs(hits - expected) < 4 * math.sqrt(COUNT / 4)


def test_the_problems_own_game_comes_first() -> None:
    made = problem("intransitive-preferences", seed=2)
    assert made.game is not None
    same(game_of(made).preference, made.game.preference)
    same(game_of(MADE, scale=2.0).preference, PreferenceGame.bradley_terry(MADE.reward, 2.0).preference)


def test_a_data_set_is_a_function_of_its_seed() -> None:
    assert labelled(MADE, 50, seed=3) == labelled(MADE, 50, seed=3) != labelled(MADE, 50, seed=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count"),
        ({"count": 5, "kind": "lists", "size": 1}, "lists of at least 2"),
        ({"count": 5, "kind": "lists", "size": 10}, "fewer than 10"),
        ({"count": 5, "law": torch.ones(2, 3)}, "table"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        labelled(MADE, **options)


# --- the trainer on such data ---------------------------------------------------------------------------------------


def test_the_gradient_of_all_pairs_is_that_of_the_expected_loss() -> None:
    """Every ordered pair, weighted by how likely it is: against autograd of the formula in the table of sequences."""
    beta = 0.3
    policy = MADE.policy()
    with torch.no_grad():
        policy.logits.add_(0.4 * torch.randn(policy.logits.shape, generator=torch.Generator().manual_seed(1)).double())
    method = override(get_method("dpo"), {"objective.beta": beta})
    count = MADE.space.n_sequences
    pairs = [(b, i, j) for b in range(2) for i in range(count) for j in range(count) if i != j]
    pool = [
        Example(
            f"{b}/{i}/{j}",
            "p",
            chosen=text_of(MADE.space, i),
            rejected=text_of(MADE.space, j),
            columns={"problem": b},
        )
        for b, i, j in pairs
    ]
    rollout = Dataset()(policy, [Request(example, 1) for example in pool], limit=MADE.space.length, seed=0)
    reference = policy.evaluate(rollout, frozenset({"logp/ref"}))["logp/ref"]
    rollout = rollout.with_columns(step={"logp/ref": reference})
    terms = method.objective(policy.evaluate(rollout, frozenset({"logp"})), rollout).value
    law = MADE.policy().probabilities().detach()
    game = game_of(MADE).preference
    weight = torch.stack([law[b, i] * law[b, j] * game[b, i, j] for b, i, j in pairs])
    (ours,) = torch.autograd.grad((weight * terms).sum(), policy.logits)

    ratio = policy.log_probabilities() - MADE.policy().log_probabilities().detach()
    gap = beta * (ratio[:, :, None] - ratio[:, None, :])
    expected = law[:, :, None] * law[:, None, :] * game * torch.nn.functional.softplus(-gap)
    expected = (expected * ~torch.eye(count, dtype=torch.bool)).sum()
    (theirs,) = torch.autograd.grad(expected, policy.logits)
    same(ours, theirs)
    assert float(ours.abs().max()) > 1e-3


def test_training_on_many_pairs_approaches_the_tilted_reference() -> None:
    beta = 1.0
    pool = labelled(MADE, 4000, seed=5)
    run = start(MADE, override(get_method("dpo"), {"objective.beta": beta}), seed=0, examples=pool)
    reference = run.policy.probabilities().detach()
    target = tilted(reference, MADE.reward, beta)
    before = float(kl(reference, target).mean())
    for _ in range(40):
        run.step()
    after = float(kl(run.policy.probabilities().detach(), target).mean())
    assert after < 0.05 * before
    assert run.metrics["rewards/accuracies"] > 0.5 and run.metrics["loss"] < math.log(2)


def test_a_resumed_run_is_the_run_that_was_never_stopped(tmp_path: Path) -> None:
    pool = labelled(MADE, 64, seed=5)

    def fresh() -> Any:
        return start(MADE, get_method("dpo"), seed=3, prompts=16, examples=pool)

    whole, first, second = fresh(), fresh(), fresh()
    for _ in range(6):
        whole.step()
    for _ in range(3):
        first.step()
    first.trainer.run = tmp_path
    second.trainer.resume(first.trainer.save())
    for _ in range(3):
        second.step()
    assert torch.equal(second.policy.logits, whole.policy.logits)

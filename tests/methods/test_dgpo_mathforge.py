"""The card of DGPO (MathForge): advantage by mean absolute deviation, difficulty weight, valid questions only, MQR."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from polopt.aggregations import TokenMean
from polopt.core.errors import UsageError
from polopt.core.example import Example
from polopt.core.method import Method
from polopt.core.rollout import Rollout
from polopt.curricula.reformulations import REWRITES, Reformulations, sub_sum
from polopt.curricula.uniform import Uniform
from polopt.methods.base.grpo import grpo
from polopt.methods.credit.dgpo_mathforge import Difficulty, GroupMAD, dgpo_mathforge
from polopt.tasks.arithmetic import Arithmetic
from tests.support import close, f64, outcome, same

exact = dgpo_mathforge | {"advantage": GroupMAD(eps=0.0)}
Rows = Sequence[Sequence[float]]
SUCCESSES = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]


def groups(rewards: Rows, scores: Rows | None = None, seed: int = 0) -> Rollout:
    """One group per row, lengths 1, 2, 1, 2, ...; the policy has moved by log-ratios from -0.25 to 0.25."""
    flat = f64([r for row in rewards for r in row])
    score = flat if scores is None else f64([s for row in scores for s in row])
    lengths = torch.arange(len(flat)) % 2 + 1
    steps = int(lengths.sum())
    old = -torch.rand(steps, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.3
    return Rollout.from_arrays(
        torch.arange(len(flat)).repeat_interleave(lengths),
        [g for g, row in enumerate(rewards) for _ in row],
        step={"logp": old, "now/logp": old + torch.linspace(-0.25, 0.25, steps, dtype=torch.float64)},
        trajectories={"reward": flat, "score": score},
    )


def run(method: Method, rollout: Rollout) -> Rollout:
    """Filtered and credited, as the trainer does."""
    return method.credit(rollout if method.filter is None else method.filter(rollout))


def test_worked_example() -> None:
    rollout = groups(SUCCESSES)
    credit = GroupMAD(eps=0.0)(rollout).view(4, 4)
    weight = Difficulty()(rollout).view(4, 4)
    third = 2 / 3
    close(credit, [[2, -third, -third, -third], [1, 1, -1, -1], [third, third, third, -2], [0] * 4])
    close(weight[:, 0], [1.127270, 0.994812, 0.877918, 1])
    close((weight * credit)[0], [2.254539] + [-0.751513] * 3)
    close((weight * credit)[1], [0.994812] * 2 + [-0.994812] * 2)
    close((weight * credit)[2], [0.585279] * 3 + [-1.755837])
    credited = run(exact, rollout)
    assert credited.counts.steps == 18
    result = outcome(exact, credited)
    close(result.loss, 0.167999)
    close(result.gradient["now/logp"][0], -0.097546)


def test_the_format_case() -> None:
    rollout = groups([[0.1, 0, 0, 0], [1, 1, 0, 0]], [[0] * 4, [1, 1, 0, 0]])
    close(Difficulty()(rollout).view(2, 4)[:, 0], [0.875647, 1.124353])
    named = rollout.with_columns(trajectory={"reward/correct": rollout["score"], "score": rollout.reward})
    same(Difficulty(column="reward/correct")(named), Difficulty()(rollout))


@pytest.mark.parametrize("seed", range(4))
def test_every_question_weighs_as_many_as_it_has_responses(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = [2, 5, 8, 3]
    rewards = [torch.randn(n, generator=generator, dtype=torch.float64).tolist() for n in sizes]
    credit = GroupMAD(eps=0.0)(groups(rewards))
    moved = GroupMAD(eps=0.0)(groups([[3.5 * r - 2 for r in row] for row in rewards]))
    same(moved, credit, atol=1e-11)
    for values, found in zip(rewards, credit.split(sizes), strict=True):
        deviation = np.asarray(values) - np.mean(values)
        same(found, deviation / np.mean(np.abs(deviation)))
        same(found.abs().sum(), len(values))
        same(found.sum(), 0.0, atol=1e-11)


@pytest.mark.parametrize("right", range(1, 8))
def test_binary_rewards_against_grpo(right: int) -> None:
    rollout = groups([[1.0] * right + [0.0] * (8 - right)])
    p = right / 8
    zscore = rollout.group_zscore(rollout.reward, eps=0.0, unbiased=False)
    same(GroupMAD(eps=0.0)(rollout), zscore / (2 * math.sqrt(p * (1 - p))))
    same(zscore.abs().sum(), 2 * 8 * math.sqrt(p * (1 - p)))
    # The code's eps is 1e-4 beside the sum of absolute deviations.
    centred = np.asarray([1 - p] * right + [-p] * (8 - right))
    same(GroupMAD()(rollout), 8 * centred / (np.abs(centred).sum() + 1e-4))


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_the_weights_are_a_softmax_over_valid_questions(temperature: float) -> None:
    rewards = [[1.0] * k + [0.0] * (8 - k) for k in (0, 1, 3, 6, 8, 7)]
    weight = Difficulty(temperature)(groups(rewards)).view(6, 8)[:, 0]
    valid = [1, 2, 3, 5]
    same(weight[[0, 4]], [1.0, 1.0])
    same(weight[valid].sum(), 4.0)
    assert (weight[valid].diff() < 0).all()
    same(weight[1] / weight[5], math.exp((7 / 8 - 1 / 8) / temperature))
    same(Difficulty(1e12)(groups(rewards)), torch.ones(48), rtol=1e-10)
    same(Difficulty(temperature)(groups([[1.0, 0.0, 0.0]])), torch.ones(3))


@pytest.mark.parametrize("constant", [0.0, 1.0, 0.4])
def test_a_question_without_spread_changes_nothing(constant: float) -> None:
    short, long = groups(SUCCESSES[:3]), groups([*SUCCESSES[:3], [constant] * 5])
    long = long.with_columns(step={n: torch.cat([short[n], long[n][short.n_steps :]]) for n in ("logp", "now/logp")})
    alone, beside = (outcome(exact, run(exact, rollout)) for rollout in (short, long))
    same(beside.loss, alone.loss)
    same(beside.gradient["now/logp"][: short.n_steps], alone.gradient["now/logp"])
    # As in the official code: everything in the token mean, scaled by all steps over those of valid questions.
    plain = exact | {"filter": None}
    kept = outcome(plain, plain.credit(long))
    same(kept.loss * long.n_steps / short.n_steps, alone.loss)


def test_without_its_parts_it_is_grpo_with_the_token_mean() -> None:
    rollout = groups(SUCCESSES[:3])
    hot = exact | {"advantage": grpo.advantage, "weight": Difficulty(1e12)}
    actual, expected = (outcome(m, run(m, rollout)) for m in (hot, grpo | {"aggregation": TokenMean()}))
    same(actual.loss, expected.loss, rtol=1e-10)
    same(actual.gradient["now/logp"], expected.gradient["now/logp"], rtol=1e-10)


def test_invalid_rewards_count_nowhere() -> None:
    rollout = groups([[1, 0, math.nan, 0], [math.nan, math.nan], [1], [math.nan, 0.5]])
    close(GroupMAD(eps=0.0)(rollout), [2.25 * 2 / 3, -0.75, 0, -0.75, 0, 0, 0, 0, 0])
    same(Difficulty()(rollout), torch.ones(9))
    # Accuracies 1/3 and 1/2, not 1/4.
    two = groups([[1, 0, math.nan, 0], [1, 0]])
    same(Difficulty()(two)[0] / Difficulty()(two)[4], math.exp((1 / 2 - 1 / 3) / 2))


# --- MQR ----------------------------------------------------------------------------------------------------------


def pool() -> list[Example]:
    columns: list[dict[str, object]] = [{"reformulations": ["a1", "a2"], "level": 1}, {}, {"reformulations": ("c1",)}]
    return [
        Example(name, name, answer=name.upper(), steps=("worked",), columns=given)
        for name, given in zip("abc", columns, strict=True)
    ]


def test_originals_and_reformulations_are_drawn_alike() -> None:
    curriculum, generator = Reformulations(), torch.Generator().manual_seed(0)
    drawn = [r for _ in range(4) for r in curriculum(pool(), prompts=3, group=5, generator=generator)]
    assert all(request.count == 5 and request.prompt is None for request in drawn)
    for epoch in (drawn[:6], drawn[6:]):
        assert sorted(r.example.id for r in epoch) == ["a", "a/1", "a/2", "b", "c", "c/1"]
    by_id = {r.example.id: r.example for r in drawn}
    assert [by_id[n].prompt for n in ("a", "a/1", "a/2", "c/1")] == ["a", "a1", "a2", "c1"]
    assert [by_id[n].answer for n in ("a/1", "a/2", "c/1")] == ["A", "A", "C"]
    assert by_id["a/1"].columns["level"] == 1
    # The worked solution is the original's.
    assert by_id["a"].steps == ("worked",) and by_id["a/1"].steps == ()


def test_without_reformulations_it_is_uniform() -> None:
    plain = [Example(str(i), "?") for i in range(7)]
    curricula = Reformulations(), Uniform()
    a, b = (
        [
            r.example.id
            for _ in range(5)
            for r in c(plain, prompts=3, group=2, generator=torch.Generator().manual_seed(1))
        ]
        for c in curricula
    )
    assert a == b


def test_one_prompt_is_no_list_of_prompts() -> None:
    wrong = [Example("x", "x", columns={"reformulations": "another"})]
    with pytest.raises(UsageError, match="'reformulations' of example 'x' must be a list of prompts, got a str"):
        Reformulations()(wrong, prompts=1, group=1, generator=torch.Generator())


def test_an_empty_pool_is_an_error() -> None:
    with pytest.raises(UsageError, match="no example"):
        Reformulations()([], prompts=1, group=1, generator=torch.Generator())


def test_a_sub_sum_keeps_the_answer_and_adds_an_operation() -> None:
    rng = random.Random(0)
    for example in Arithmetic().examples(200, seed=3):
        question = str(example.prompt)
        harder = sub_sum(question, rng)
        assert harder is not None and harder.endswith("=?\n")
        terms = [[int(t) for t in re.findall(r"[+-]?[0-9]+", text)] for text in (question, harder)]
        assert sum(terms[1]) == sum(terms[0]) == int(str(example.answer))
        assert len(terms[1]) == len(terms[0]) + 1 and 0 not in terms[1]
        totals = [np.cumsum(t) for t in terms]
        assert min(totals[1]) >= 0 and max(totals[1]) <= max(totals[0])


def test_a_question_without_a_number_to_split_has_no_sub_sum() -> None:
    assert sub_sum("1+1=?", random.Random(0)) is None
    assert sub_sum("1+2=?", random.Random(0)) == "1+1+1=?"
    assert sub_sum("9-2=?", random.Random(0)) in {"9-1-1=?"} | {f"{k}+{9 - k}-2=?" for k in range(1, 9)}


@pytest.mark.parametrize("kind", ["background", "term", "sub-problem"])
def test_a_rewrite_asks_about_the_question_and_its_answer(kind: str) -> None:
    text = REWRITES[kind].format(question="How many?", answer="42")
    assert "How many?" in text and "42" in text and "{" not in text

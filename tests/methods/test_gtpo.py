"""The card of GTPO: conflict runs against a loop over tokens, entropy term and filter, worked example."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from polopt.core.rollout import Rollout
from polopt.methods.base.dr_grpo import dr_grpo
from polopt.methods.base.grpo import grpo
from polopt.methods.credit.gtpo import ConflictTokens, EntropyPenalised, gtpo
from tests.support import close, f64, now, same, value_and_gradient

TOKENS = [[5, 1, 2, 3, 9], [5, 1, 7, 8, 3, 9], [5, 4, 7, 3, 9], [6, 1, 2, 9]]
REWARDS = [1.0, 1.0, 0.0, 0.0]
ENTROPIES = [
    [0.1, 0.3, 0.5, 0.2, 0.1],
    [0.2, 0.2, 0.9, 0.5, 0.2, 0.1],
    [1.0, 0.9, 0.8, 0.9, 0.6],
    [0.5, 0.5, 0.6, 0.4],
]
LAMBDA = [[2, 2, 2, 4, 4], [2, 2, 2, 1, 2, 2], [0, 1, 1, 0, 0], [1, 1, 1, 0]]
plain = gtpo | {"advantage": EntropyPenalised(gamma=0.0, filter="never")}


def flat(rows: Sequence[Sequence[Any]]) -> list[Any]:
    return [value for row in rows for value in row]


def responses(
    tokens: Sequence[Sequence[int]],
    rewards: Sequence[float],
    groups: Sequence[int] | None = None,
    entropies: Sequence[Sequence[float]] | None = None,
    mask: Sequence[Sequence[bool]] | None = None,
) -> Rollout:
    """Responses given by their tokens, one group unless ``groups`` says otherwise."""
    owner = flat([[i] * len(row) for i, row in enumerate(tokens)])
    step = {
        "action": torch.tensor(flat(tokens)),
        "logp": torch.full((len(owner),), -1.0, dtype=torch.float64),
        "entropy": f64(flat(entropies) if entropies else [0.3] * len(owner)),
    }
    if mask is not None:
        step["mask"] = torch.tensor(flat(mask))
    return Rollout.from_arrays(owner, groups or [0] * len(tokens), step=step, trajectories={"reward": f64(rewards)})


def card() -> Rollout:
    return responses(TOKENS, REWARDS, entropies=ENTROPIES)


def runs(tokens: Sequence[Sequence[int]], signs: Sequence[int]) -> list[list[bool]]:
    """Forward conflicts of one group as the card defines them, token by token."""
    found = []
    for i, row in enumerate(tokens):
        unbroken, flags = signs[i] != 0, []
        for t, token in enumerate(row):
            there = {signs[j] for j, other in enumerate(tokens) if t < len(other) and other[t] == token}
            unbroken = unbroken and {1, -1} <= there
            flags.append(unbroken)
        found.append(flags)
    return found


def oracle(tokens: Sequence[Sequence[int]], signs: Sequence[int], boost: float = 2.0) -> list[list[float]]:
    """lambda of one group: the product of the factors of both directions."""
    forward = runs(tokens, signs)
    backward = [row[::-1] for row in runs([list(row)[::-1] for row in tokens], signs)]
    factor = {1: boost, -1: 0.0, 0: 1.0}
    return [
        [(factor[signs[i]] if f else 1.0) * (factor[signs[i]] if b else 1.0) for f, b in zip(ff, bb, strict=True)]
        for i, (ff, bb) in enumerate(zip(forward, backward, strict=True))
    ]


def test_worked_example() -> None:
    method = gtpo.clone()
    rollout = method.credit(card())
    close(rollout.weight, flat(LAMBDA))
    starts = rollout.lengths.cumsum(0) - 1
    close(rollout.advantage[starts], [0.476, 0.465, 0.0, -0.55])
    loss, gradient = value_and_gradient(method, now(rollout.logp), rollout)
    close(loss, -0.443200)
    close(gradient[:5], [-0.0476, -0.0476, -0.0476, -0.0952, -0.0952])
    assert (gradient[11:16] == 0).all()
    close(gradient[16:], [0.034375, 0.034375, 0.034375, 0.0])
    # d loss / d logp_it = -c_i lambda_it / (G |o_i|)
    close(gradient[5:11], [-0.465 * weight / (4 * 6) for weight in LAMBDA[1]])


@pytest.mark.parametrize("seed", range(12))
def test_the_runs_are_those_of_a_loop_over_tokens(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, low: int = 0) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    tokens: list[list[int]] = []
    expected: list[list[float]] = []
    rewards: list[int] = []
    groups: list[int] = []
    for group in range(6):
        size = draw(7, 1)
        rows = [[draw(2 + seed % 3) for _ in range(draw(8, 1))] for _ in range(size)]
        scores = [draw(3) - 1 for _ in range(size)]
        centred = f64(scores) - f64(scores).mean()
        # Thirds are not exact: what is equal to the mean is 0.
        signs = [int(math.copysign(1, a)) if abs(a) > 1e-9 else 0 for a in centred.tolist()]
        tokens, rewards, groups = tokens + rows, rewards + scores, groups + [group] * size
        expected += oracle(rows, signs)
    order = torch.randperm(len(tokens), generator=generator).tolist()
    rollout = responses([tokens[i] for i in order], [float(rewards[i]) for i in order], [groups[i] for i in order])
    assert ConflictTokens()(rollout).tolist() == flat([expected[i] for i in order])


def test_what_a_run_needs() -> None:
    def weights(tokens: list[list[int]], rewards: list[float]) -> list[float]:
        return ConflictTokens()(responses(tokens, rewards)).tolist()

    disjoint = [[1, 5, 2], [3, 5, 4]]
    assert weights(disjoint, [1.0, 0.0]) == [1.0] * 6, "shared in the middle only"
    assert weights([[1, 2, 3]] * 2, [1.0, 0.0]) == [4.0] * 3 + [0.0] * 3, "identical: w^2 and 0"
    for rewards in ([1.0, 1.0], [0.3, 0.3], [math.nan, 1.0]):
        assert weights([[1, 2, 3]] * 2, rewards) == [1.0] * 6, "nothing to be in conflict with"
    assert weights([[1, 2], [1, 3], [1, 4]], [1.0, 0.5, 0.0]) == [2, 1, 1, 1, 0, 1], "A = 0 carries no conflict"
    assert weights([[1, 2], [1, 3], [4, 5]], [1.0, 0.5, 0.0]) == [1.0] * 6, "and causes none"
    assert ConflictTokens()(responses([[1, 2], [1, 2]], [1.0, 0.0], [0, 1])).tolist() == [1.0] * 4, "other prompts"


def test_lambda_never_boosts_a_wrong_response_and_does_not_know_the_names_of_tokens() -> None:
    rollout = card()
    weight = ConflictTokens()(rollout)
    assert float(weight[rollout.spread(rollout.reward) == 0].max()) == 1.0
    names = torch.tensor([0, 7, 3, 9, 1, 40, 2, 11, 5, 8])
    assert torch.equal(ConflictTokens()(rollout.with_columns(step={"action": names[rollout["action"]]})), weight)


def test_steps_without_weight_have_no_gradient() -> None:
    rollout = plain.clone().credit(card())
    _, gradient = value_and_gradient(plain, now(rollout.logp + 0.05), rollout)
    assert torch.equal(gradient == 0, rollout.weight == 0)


@pytest.mark.parametrize("tokens", [[[1, 5, 2], [3, 5, 4], [6, 0, 7]], [[1, 2, 3], [1, 2, 3], [4, 2, 5]]])
def test_without_conflicts_entropy_and_filter_it_is_the_centred_reward(tokens: list[list[int]]) -> None:
    rewards = [1.0, 1.0, 0.0]
    rollout = responses(tokens, rewards)
    centred = dr_grpo.advantage(rollout)
    base = grpo | {"advantage": lambda rollout: centred}
    loss, gradient = value_and_gradient(plain, now(rollout.logp), plain.clone().credit(rollout))
    expected_loss, expected = value_and_gradient(base, now(rollout.logp), base.credit(rollout))
    same(loss, expected_loss)
    same(gradient, expected)
    same(gradient, -rollout.spread(centred) / 9)


def test_the_filter_judges_a_response_by_its_own_entropy() -> None:
    entropies = [[0.6, 0.8], [0.69, 0.69], [0.0, 1.4], [2.0, 2.0]]
    rollout = responses([[1, 2]] * 4, [1.0, 0.0, 1.0, 0.0], entropies=entropies)
    quiet = EntropyPenalised(gamma=0.0, filter="always")
    close(quiet(rollout), [0, -0.5, 0, 0])
    close(EntropyPenalised(gamma=0.0, threshold=0.7, filter="always")(rollout), [0.5, -0.5, 0.5, 0])
    turned = rollout.with_columns(trajectory={"reward": 1 - rollout.reward})
    assert torch.equal(quiet(turned) == 0, quiet(rollout) == 0)


def test_the_initial_entropy_is_remembered_and_lifts_the_filter() -> None:
    high = responses([[1, 2]] * 2, [1.0, 0.0], entropies=[[0.9, 0.9], [0.6, 0.8]])
    low = responses([[1, 2]] * 2, [1.0, 0.0], entropies=[[0.9, 0.9], [0.1, 0.1]])
    for first, exempt in ((high, True), (low, False)):
        part = EntropyPenalised(gamma=0.1)
        part(first)
        close(part.state_dict()["initial"], 0.8 if exempt else 0.5)
        for later in (high, low):
            close(part(later)[0], 0.5 - 0.09 if exempt else 0.0)
        close(part.state_dict()["initial"], 0.8 if exempt else 0.5)
    never = EntropyPenalised(gamma=0.1, filter="never")
    close(never(low), [0.5 - 0.09, -0.5 - 0.01])


def test_the_entropy_term_stays_where_rewards_are_equal_and_goes_where_they_are_invalid() -> None:
    rollout = responses([[1], [2], [3]], [1.0, 1.0, math.nan], entropies=[[0.2], [0.4], [0.1]])
    close(EntropyPenalised()(rollout), [-0.02, -0.04, 0.0])
    alone = responses([[1, 2]], [1.0], entropies=[[0.2, 0.4]])
    close(EntropyPenalised()(alone), [-0.03])


def test_a_dropped_response_still_counts_and_still_shares_its_tokens() -> None:
    rollout = gtpo.clone().credit(card())
    without = gtpo.clone().credit(card().select(torch.tensor([0, 1, 3])))
    assert rollout.weight[:3].tolist() == [2, 2, 2] and without.weight[:3].tolist() == [1, 1, 1]
    assert rollout.counts.trajectories == 4


def test_masked_steps_are_neither_shared_nor_counted() -> None:
    # An answer of an environment in the middle, and one at the end.
    tokens = [[1, 99, 2, 3, 77], [1, 2, 4, 3, 77], [1, 2, 3, 3, 5]]
    mask = [[True, False, True, True, False], [True] * 4 + [False], [True] * 3 + [False, False]]
    entropies = [[0.1, math.nan, 0.2, 0.3, math.inf], [0.4, 0.4, 0.2, 0.2, math.nan], [0.6, 0.3, 0.0, 9.0, 9.0]]
    rollout = responses(tokens, [1.0, 0.0, 0.0], mask=mask, entropies=entropies)
    weight = ConflictTokens()(rollout)
    short = oracle([[1, 2, 3], [1, 2, 4, 3], [1, 2, 3]], [1, -1, -1])
    assert weight[rollout.mask].tolist() == flat(short)
    assert weight[~rollout.mask].tolist() == [1.0] * 5
    nothing = rollout.with_columns(step={"mask": torch.zeros(15, dtype=torch.bool)})
    assert ConflictTokens()(nothing).tolist() == [1.0] * 15
    part = EntropyPenalised()
    part(nothing)
    assert part.state_dict() == {"initial": None}
    part(rollout)
    close(part.state_dict()["initial"], (0.2 + 0.3 + 0.3) / 3)


def test_per_conflict_divides_by_the_tokens_in_either_run() -> None:
    weight, divided = ConflictTokens()(card()), ConflictTokens(per_conflict=True)(card())
    # Response 0: all five; 1: all but one; 2: first and last two; 3: the last.
    same(divided, weight / f64([5] * 5 + [5] * 6 + [3] * 5 + [1] * 4))
    free = responses([[1, 2], [3, 4]], [1.0, 0.0])
    assert ConflictTokens(per_conflict=True)(free).tolist() == [1.0] * 4


def test_the_order_of_responses_does_not_matter() -> None:
    order = torch.tensor([2, 0, 3, 1])
    rollout = gtpo.clone().credit(card())
    moved = gtpo.clone().credit(card().select(order))
    expected = rollout.select(order)
    same(moved.weight, expected.weight)
    same(moved.advantage, expected.advantage)


def test_what_it_declares() -> None:
    assert gtpo.needs == {"reward", "entropy", "action", "logp"}
    assert gtpo.regularizer is None and not gtpo.needs & {"logp/ref"}
    assert gtpo.weight == ConflictTokens(boost=2.0) and gtpo.advantage == EntropyPenalised(0.1, math.log(2))

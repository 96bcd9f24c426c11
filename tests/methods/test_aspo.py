"""The card of ASPO: a bounded bias on the advantage of right answers that called the tool, worked example."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from polopt.advantages.group import GroupZScore
from polopt.core.override import override
from polopt.core.part import flatten
from polopt.core.rollout import Rollout
from polopt.methods.base.grpo import grpo
from polopt.methods.credit.aspo import EarlyCall, aspo
from polopt.rollouts.turns import Turns
from tests.support import close, f64, same

REWARD = [1.0, 1, 1, 0, 1, 0, 1, 1]
CALL = [10, 40, 100, 5, None, None, 20, 30]
LENGTH = [100, 100, 160, 90, 80, 60, 50, 50]
GROUP = [0] * 6 + [1] * 2
CARD = EarlyCall(eps=0.0)


def called(
    reward: list[float],
    call: list[int | None],
    length: list[int],
    group: list[int],
    *,
    answer: int = 3,
    score: list[float] | None = None,
) -> Rollout:
    """Answers whose environment speaks ``answer`` masked steps after ``call`` steps of the policy."""
    turn: list[int] = []
    mask: list[bool] = []
    ids: list[int] = []
    for i, (p, n) in enumerate(zip(call, length, strict=True)):
        said = answer if p is not None else 0
        first = n if p is None else p
        turn += [0] * first + [1] * (said + n - first)
        mask += [True] * first + [False] * said + [True] * (n - first)
        ids += [i] * (n + said)
    return Rollout.from_arrays(
        ids,
        group,
        step={"turn": turn, "mask": torch.tensor(mask)},
        trajectories={"reward": f64(reward), "score": f64(reward if score is None else score)},
    )


CARDS = called(REWARD, CALL, LENGTH, GROUP)
BASE = [0.645497, 0.645497, 0.645497, -1.290994, 0.645497, -1.290994, 0, 0]


def bias(part: EarlyCall, rollout: Rollout) -> torch.Tensor:
    return part(rollout) - GroupZScore(part.eps, part.unbiased)(rollout)


def by_loop(
    reward: list[float], call: list[int | None], length: list[int], group: list[int], delta: float, k: float
) -> list[float]:
    """Group by group, as the equations are written."""
    out = np.zeros(len(reward))
    for g in set(group):
        valid = [i for i in range(len(reward)) if group[i] == g and not math.isnan(reward[i])]
        r = np.array([reward[i] for i in valid])
        std = r.std(ddof=1) if len(r) > 1 else 0.0
        for i in valid:
            out[i] = (reward[i] - r.mean()) / std if std > 0 else 0.0
        eligible = [i for i in valid if reward[i] > 0 and call[i] is not None]
        if not eligible:
            continue
        mean_p = np.mean([call[i] for i in eligible])
        mean_l = np.mean([length[i] for i in eligible])
        for i in eligible:
            raw = delta * (call[i] - mean_p) / mean_l
            out[i] += min(max(raw, -k * abs(out[i])), k * abs(out[i]))
    return out.tolist()


def test_worked_example() -> None:
    close(GroupZScore(eps=0.0)(CARDS), BASE)
    unclipped = EarlyCall(eps=0.0, k=1e9)
    close(bias(unclipped, CARDS), [0.666667, 0.166667, -0.833333, 0, 0, 0, 0, 0])
    close(bias(CARD, CARDS), [0.451848, 0.166667, -0.451848, 0, 0, 0, 0, 0])
    close(CARD(CARDS), [1.097345, 0.812164, 0.193649, -1.290994, 0.645497, -1.290994, 0, 0])


def test_every_step_of_a_response_gets_it() -> None:
    rollout = aspo.credit(CARDS)
    same(rollout.advantage, EarlyCall()(CARDS)[rollout.trajectory])


@pytest.mark.parametrize(("delta", "k"), [(-2.0, 0.7), (-2.5, 0.9), (1.5, 0.3)])
@pytest.mark.parametrize("seed", range(5))
def test_against_the_equations(seed: int, delta: float, k: float) -> None:
    draw = np.random.default_rng(seed)
    group = [0, 1, 1, 0, 2, 1, 0, 1, 0, 3, 0, 1]
    reward = draw.integers(0, 2, 12).astype(float).tolist()
    reward[3] = math.nan
    length = draw.integers(6, 12, 12).tolist()
    call = [None if draw.random() < 0.3 else int(draw.integers(1, n)) for n in length]
    rollout = called(reward, call, length, group)
    same(EarlyCall(0.0, True, delta, k)(rollout), by_loop(reward, call, length, group, delta, k))


@pytest.mark.parametrize("part", [EarlyCall(delta=0.0), EarlyCall(k=0.0)])
def test_without_strength_or_bound_it_is_grpo(part: EarlyCall) -> None:
    same(part(CARDS), grpo.credit(CARDS).advantage[CARDS.lengths.cumsum(0) - 1])


def test_without_eligible_answers_it_is_grpo() -> None:
    nobody = called(REWARD, [None] * 8, LENGTH, GROUP)
    same(EarlyCall()(nobody), GroupZScore()(nobody))
    wrong_callers = called([0.0, 0, 1, 1], [3, 5, None, None], [9] * 4, [0] * 4)
    same(EarlyCall()(wrong_callers), GroupZScore()(wrong_callers))


def test_a_single_eligible_answer_has_no_bias() -> None:
    alone = called([1.0, 0, 0, 1], [3, 5, None, None], [9] * 4, [0] * 4)
    same(EarlyCall()(alone), GroupZScore()(alone))


def test_where_all_are_right_there_is_no_signal() -> None:
    right = called([1.0] * 4, [1, 3, 5, None], [9] * 4, [0] * 4)
    assert (EarlyCall()(right) == 0).all()
    bonus = right.with_columns(trajectory={"reward": f64([1.4, 1.3, 1.2, 1.0])})
    assert (GroupZScore()(bonus) < 0).sum() == 2, "the bonus in the reward punishes half of the right answers"


@pytest.mark.parametrize("seed", range(4))
def test_the_sign_of_the_base_is_kept_and_others_are_left_alone(seed: int) -> None:
    draw = np.random.default_rng(seed)
    call = [None if draw.random() < 0.3 else int(n) for n in draw.integers(1, 30, 8)]
    rollout = called(REWARD, call, [30] * 8, GROUP)
    base, made = GroupZScore()(rollout), EarlyCall(k=0.9)(rollout)
    right = f64(REWARD) > 0
    assert (made[right & (base > 0)] > 0).all()
    assert (made <= 1.9 * base + 1e-12)[base > 0].all() and (made >= 0.1 * base - 1e-12)[base > 0].all()
    outside = ~right | torch.tensor([p is None for p in call])
    same(made[outside], base[outside])


def test_unclipped_biases_cancel_and_fall_with_the_position() -> None:
    unclipped = bias(EarlyCall(k=1e9), CARDS)
    same(unclipped[:6].sum(), 0.0)
    clipped = bias(EarlyCall(), CARDS)
    assert unclipped[0] > unclipped[1] > unclipped[2] and clipped[0] >= clipped[1] >= clipped[2]
    late = bias(EarlyCall(delta=2.0), CARDS)
    same(late, -clipped)


def test_shifts_and_scales_of_the_positions() -> None:
    expected = bias(EarlyCall(k=1e9), CARDS)
    shifted = called(REWARD, [None if p is None else p + 20 for p in CALL], LENGTH, GROUP)
    same(bias(EarlyCall(k=1e9), shifted), expected)
    scaled = called(REWARD, [None if p is None else 3 * p for p in CALL], [3 * n for n in LENGTH], GROUP)
    same(bias(EarlyCall(k=1e9), scaled), expected)


def test_what_the_environment_says_is_no_length() -> None:
    long = called(REWARD, CALL, LENGTH, GROUP, answer=50)
    same(EarlyCall()(long), EarlyCall()(CARDS))


def test_an_invalid_reward_is_in_no_mean() -> None:
    spoilt = called([1.0, 1, 0, math.nan], [2, 6, None, 20], [10, 10, 10, 40], [0] * 4, score=[1, 1, 0, 1])
    made = EarlyCall()(spoilt)
    assert made[3] == 0
    same(made[:3], EarlyCall()(spoilt.select(torch.tensor([0, 1, 2]))))


def test_right_is_the_tasks_score_not_the_shaped_reward() -> None:
    shaped = called([0.2, 0.9, -0.5, 0.1], [2, 4, 6, 8], [10] * 4, [0] * 4, score=[1, 1, 1, 0])
    base, made = GroupZScore()(shaped), EarlyCall()(shaped)
    assert base[2] < 0 and made[2] < base[2], "a right answer whose base is negative may be biased, within k |A|"
    assert (made - base).abs().le(0.7 * base.abs() + 1e-12).all()
    assert made[3] == base[3] and made[0] != base[0]


def test_any_feature_in_the_place_of_the_position() -> None:
    feature = f64([10, 40, 100, 5, math.nan, math.nan, 20, 30])
    ours = torch.tensor([True, True, True, False, False, False, True, True])
    feature = torch.where(ours, feature / torch.where(f64(GROUP) == 0, 120.0, 50.0), feature)
    given = CARDS.with_columns(trajectory={"feature/share": feature})
    part = EarlyCall(feature="feature/share")
    same(part(given), EarlyCall()(CARDS))
    assert part.needs == {"reward", "score", "feature/share"}


def test_a_call_that_was_masked_counts_and_a_masked_answer_does_not() -> None:
    base = called([1.0, 1, 0], [2, 6, None], [10] * 3, [0] * 3)
    mask = base.mask.clone()
    mask[base.trajectory == 1] = False
    silent = base.with_columns(step={"mask": mask})
    same(EarlyCall()(silent), GroupZScore()(silent))


def test_what_it_declares() -> None:
    assert isinstance(aspo.rollout, Turns) and aspo.rollout.environment == "calculator"
    assert {"turn", "score", "reward"} <= flatten(aspo.advantage)[0].needs
    assert aspo.advantage == EarlyCall(delta=-2.0, k=0.7)
    aggressive = override(aspo, {"advantage.delta": "-2.5", "advantage.k": "0.9"})
    assert aggressive.advantage == EarlyCall(delta=-2.5, k=0.9)
    assert aspo.objective == grpo.objective

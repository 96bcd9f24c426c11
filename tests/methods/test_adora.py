"""The card of ADORA: three rules for the weight of a prompt, their boundary cases, worked example."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from polopt.core.rollout import Rollout
from polopt.methods.base.grpo import grpo
from polopt.methods.credit.adora import LengthAdvantage, adora
from tests.support import batch, close, f64, flow, outcome, same

RULES = {"attenuate": 1, "attenuate-vlm": 2, "amplify": 3}
REWARDS = [[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]
LENGTHS = [[90, 40, 50, 60], [30, 20, 25, 80], [30, 95, 60, 100], [9] * 4, [7] * 4]
CARD = {
    "attenuate": [1, 0.1, 1, 0.1, 1],
    "attenuate-vlm": [1, 0.1, 1, 1, 0.1],
    "amplify": [2, 1, 2, 1, 1],
}


def groups(rewards: Sequence[Sequence[float]], lengths: Sequence[Sequence[int]]) -> Rollout:
    """One group per row; the score is the reward, and what has 100 steps was cut."""
    flat = [length for row in lengths for length in row]
    owner = [g for g, row in enumerate(rewards) for _ in row]
    reward = f64([r for row in rewards for r in row])
    trajectory = torch.arange(len(flat)).repeat_interleave(torch.tensor(flat))
    named = {"reward": reward, "score": reward, "truncated": torch.tensor(flat) >= 100}
    return Rollout.from_arrays(
        trajectory,
        owner,
        step={"logp": torch.full((sum(flat),), -0.5, dtype=torch.float64)},
        trajectories=named,
    )


def oracle(rule: int, score: list[float], length: list[int], cut: float, criteria: str = "and") -> float:
    """The card's formulas with lambda = 0.1, w+ = 2, tau = theta = 0.5, for one group."""
    right = [n for s, n in zip(score, length, strict=True) if s > 0.5]
    wrong = [n for s, n in zip(score, length, strict=True) if s <= 0.5 and n < cut]
    longest = max(right, default=-math.inf)
    typical = sum(wrong) / len(wrong) if wrong else (math.inf if rule == 2 else -math.inf)
    longer, hard = longest > typical, len(right) / len(score) <= 0.5
    if rule == 3:
        return 2.0 if ((longer and hard) if criteria == "and" else (longer or hard)) else 1.0
    return 1.0 if longer or (rule == 2 and not right) else 0.1


def per_group(rollout: Rollout, weight: Tensor) -> list[float]:
    """The weight of each group, which must be one number."""
    found = [weight[rollout.group == g].unique().tolist() for g in range(rollout.n_groups)]
    assert all(len(values) == 1 for values in found)
    return [values[0] for values in found]


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("cutoff", [100, None])
def test_the_weights_of_the_worked_example(rule: str, cutoff: int | None) -> None:
    rollout = groups(REWARDS, LENGTHS)
    weight = LengthAdvantage(rule=rule, cutoff=cutoff)(rollout)  # type: ignore[arg-type]
    same(per_group(rollout, weight), CARD[rule])


def test_the_advantages_of_the_worked_example() -> None:
    rollout = adora.credit(groups(REWARDS, LENGTHS))
    first = rollout.lengths.cumsum(0) - rollout.lengths
    credit = (rollout.advantage * rollout.weight)[first].view(5, 4)
    close(credit[0], [1.499997] + [-0.499999] * 3)
    close(credit[1], [0.05, 0.05, 0.05, -0.15])
    close(credit[2], [0.866024, 0.866024, -0.866024, -0.866024])
    assert (credit[3:] == 0).all()
    close(credit.sum(1), [0.0] * 5)


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("criteria", ["and", "or"])
@pytest.mark.parametrize("seed", range(5))
def test_the_rules_are_those_of_the_card_on_random_groups(rule: str, criteria: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = [1, 2, 5, 8, 3, 4]
    scores = [torch.randint(2, (n,), generator=generator).tolist() for n in sizes]
    lengths = [torch.randint(1, 12, (n,), generator=generator).tolist() for n in sizes]
    rollout = groups(scores, lengths)
    part = LengthAdvantage(rule=rule, criteria=criteria, cutoff=10)  # type: ignore[arg-type]
    expected = [oracle(RULES[rule], s, n, 10, criteria) for s, n in zip(scores, lengths, strict=True)]
    same(per_group(rollout, part(rollout)), expected)
    scaled = groups(scores, [[7 * n for n in row] for row in lengths])
    same(dataclasses.replace(part, cutoff=70)(scaled), part(rollout))


@pytest.mark.parametrize("rule", list(RULES))
def test_the_score_decides_not_the_shaped_reward(rule: str) -> None:
    rollout = groups(REWARDS, LENGTHS)
    part = LengthAdvantage(rule=rule)  # type: ignore[arg-type]
    shaped = rollout.with_columns(trajectory={"reward": 1 - rollout.reward})
    same(part(shaped), part(rollout))
    named = shaped.with_columns(trajectory={"reward/correct": rollout.reward, "score": shaped.reward})
    same(dataclasses.replace(part, column="reward/correct")(named), part(rollout))


def test_an_invalid_score_counts_nowhere() -> None:
    # Without the NaN: one success of 3 steps against a failure of 2, one success in two.
    rollout = groups([[1, 0, math.nan, math.nan]], [[3, 2, 9, 9]])
    same(per_group(rollout, LengthAdvantage("attenuate")(rollout)), [1])
    same(per_group(rollout, LengthAdvantage("amplify")(rollout)), [2])
    # As failures the two would make the mean wrong answer the longer one; as members they would make it a hard prompt.
    easy = groups([[1, 1, 0, math.nan, math.nan]], [[3, 3, 2, 9, 9]])
    same(per_group(easy, LengthAdvantage("amplify")(easy)), [1])


def test_masked_steps_are_no_length() -> None:
    rollout = groups([[1, 0]], [[5, 3]])
    mask = torch.tensor([True, True, False, False, False, True, True, True])
    same(per_group(rollout, LengthAdvantage()(rollout)), [1])
    masked = rollout.with_columns(step={"mask": mask})
    same(per_group(masked, LengthAdvantage()(masked)), [0.1])


@pytest.mark.parametrize(("name", "value"), [("attenuation", 1.0), ("amplification", 1.0)])
def test_weights_of_one_are_grpo(name: str, value: float) -> None:
    rule = "amplify" if name == "amplification" else "attenuate"
    part = LengthAdvantage(rule, **{name: value})  # type: ignore[arg-type]
    plain = grpo | {"advantage": adora.advantage}
    rollout = batch(adora)
    actual, expected = (outcome(m, flow(m, rollout)) for m in (plain | {"weight": part}, plain))
    same(actual.loss, expected.loss)
    same(actual.gradient["now/logp"], expected.gradient["now/logp"])


def test_a_weight_of_zero_stops_a_disadvantageous_prompt() -> None:
    rollout = groups([[1, 0], [1, 0]], [[5, 3], [3, 5]])
    method = adora | {"weight": LengthAdvantage(attenuation=0.0)}
    credited = method.credit(rollout.with_columns(step={"now/logp": rollout.logp + 0.1}))
    gradient = outcome(method, credited).gradient["now/logp"]
    assert (gradient[rollout.step_group == 0] != 0).all()
    assert (gradient[rollout.step_group == 1] == 0).all()


def test_the_weight_scales_the_clipped_loss_as_the_advantage_would() -> None:
    rollout = flow(adora, batch(adora))
    assert rollout.weight.unique().numel() > 1
    inside = rollout.with_columns(
        step={"advantage": rollout.advantage * rollout.weight, "weight": torch.ones_like(rollout.weight)}
    )
    actual, expected = outcome(adora, rollout), outcome(adora, inside)
    same(actual.loss, expected.loss)
    same(actual.gradient["now/logp"], expected.gradient["now/logp"])

"""The card of EMPG: modulation and clarity bonus per turn, its premise on the gradient of a softmax, worked example."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from polopt.core.rollout import Rollout
from polopt.methods.base.grpo import grpo
from polopt.methods.credit.empg import EntropyModulated, empg
from polopt.policies.exact import ExactPolicy, SequenceSpace, enumeration
from tests.support import close, f64, now, same, value_and_gradient

Turns = Sequence[Sequence[Sequence[float]]]
CARD: Turns = [[[0.3], [1.1], [0.1]], [[0.5], [2.1], [0.6]]]
UNEVEN: Turns = [[[0.3, 0.6], [1.1]], [[0.2, 0.9, 0.1], [0.5], [2.1, 1.9]], [[0.6]], [[0.3], [0.8, 1.2]]]
UNEVEN_REWARDS = [1.0, 0.0, 0.5, 0.25]


def made(entropies: Turns, rewards: Sequence[float], groups: Sequence[int] | None = None) -> Rollout:
    """Trajectories given by the token entropies of their turns, one group unless ``groups`` says otherwise."""
    found = [(i, t, h) for i, turns in enumerate(entropies) for t, tokens in enumerate(turns) for h in tokens]
    owner, turn, entropy = zip(*found, strict=True)
    step = {"turn": torch.tensor(turn), "entropy": f64(entropy), "logp": f64([-1.0] * len(turn))}
    group = list(groups) if groups else [0] * len(entropies)
    return Rollout.from_arrays(list(owner), group, step=step, trajectories={"reward": f64(rewards)})


def unit() -> Rollout:
    """The card's six turns of one step with A = (1, -1).

    A sample z-score of two is not that; a third trajectory, of reward 0 and without a step that trains, makes it so.
    The rewards are large beside the z-score's eps.
    """
    rollout = made([*CARD, [[9.0]]], [1e8, -1e8, 0.0])
    return rollout.with_columns(step={"mask": torch.arange(7) < 6})


def oracle(
    entropies: Turns, advantage: Sequence[float], k: float = 1.0, k_future: float = 1.0, zeta: float = 0.1
) -> NDArray[np.float64]:
    """A_final on every step, turn by turn."""
    mean = [[float(np.mean(tokens)) for tokens in turns] for turns in entropies]
    every = np.concatenate([np.asarray(row) for row in mean])
    low, high = every.min(), every.max()

    def scaled(h: float) -> float:
        return float((h - low) / (high - low + 1e-8))

    average = np.mean([math.exp(-k * scaled(h)) for h in every]) + 1e-8
    modulated = []
    for i, row in enumerate(mean):
        for t, h in enumerate(row):
            bonus = math.exp(-k_future * scaled(row[t + 1])) if t + 1 < len(row) else 0.0
            modulated.append(advantage[i] * math.exp(-k * scaled(h)) / average + zeta * bonus)
    centred = np.asarray(modulated) - np.mean(modulated)
    return np.repeat(centred, [len(tokens) for turns in entropies for tokens in turns])


def test_worked_example() -> None:
    rollout, steps = unit(), slice(0, 6)
    gain = EntropyModulated(zeta=0.0, center=False)(rollout)[steps] * f64([1, 1, 1, -1, -1, -1])
    close(gain, [1.212708, 0.812902, 1.340249, 1.097303, 0.493050, 1.043787])
    bonus = EntropyModulated(zeta=1.0, center=False)(rollout) - EntropyModulated(zeta=0.0, center=False)(rollout)
    close(bonus[steps], [0.606531, 1, 0, 0.367879, 0.778801, 0])
    modulated = EntropyModulated(center=False)(rollout)[steps]
    close(modulated, [1.273361, 0.912902, 1.340249, -1.060515, -0.415170, -1.043787])
    final = EntropyModulated()(rollout)
    close(final[steps], [1.105521, 0.745062, 1.172409, -1.228355, -0.583010, -1.211627])
    assert float(final[6]) == 0.0


@pytest.mark.parametrize(("k", "k_future", "zeta"), [(1.0, 1.0, 0.1), (2.5, 0.3, 0.05), (0.0, 1.0, 0.2)])
def test_turns_of_several_tokens_equal_a_loop(k: float, k_future: float, zeta: float) -> None:
    rollout = made(UNEVEN, UNEVEN_REWARDS)
    values = np.asarray(UNEVEN_REWARDS)
    zscore = (values - values.mean()) / (values.std(ddof=1) + 1e-4)
    same(EntropyModulated(k, k_future, zeta)(rollout), oracle(UNEVEN, zscore.tolist(), k, k_future, zeta))


def first_steps(rollout: Rollout) -> Tensor:
    """The first step of each turn."""
    keys = rollout.trajectory * 100 + rollout["turn"]
    return torch.cat([torch.ones(1, dtype=torch.bool), keys.diff() != 0])


def gains(rollout: Rollout, k: float = 1.0) -> Tensor:
    """g of every turn: the advantage without bonus and centre over the z-score."""
    plain = EntropyModulated(k, zeta=0.0, center=False)(rollout)
    return (plain / rollout.spread(rollout.group_zscore(rollout.reward)))[first_steps(rollout)]


@pytest.mark.parametrize("k", [0.5, 1.0, 3.0])
def test_gains_average_to_one_and_fall_with_the_entropy(k: float) -> None:
    rollout = made(UNEVEN, UNEVEN_REWARDS)
    gain = gains(rollout, k)
    same(gain.mean(), 1.0, rtol=2e-8)
    mean = f64([np.mean(tokens) for turns in UNEVEN for tokens in turns])
    assert (gain[mean.argsort()].diff() < 0).all()


@pytest.mark.parametrize(("scale", "shift"), [(2.0, 0.0), (0.1, 3.0)])
def test_gains_do_not_depend_on_scale_and_origin_of_the_entropy(scale: float, shift: float) -> None:
    rollout = made(UNEVEN, UNEVEN_REWARDS)
    other = rollout.with_columns(step={"entropy": scale * rollout["entropy"] + shift})
    same(gains(other), gains(rollout), rtol=1e-6)


def test_turns_sum_to_zero_each_counting_once() -> None:
    rollout = made(UNEVEN, UNEVEN_REWARDS)
    advantage = EntropyModulated()(rollout)
    same(advantage[first_steps(rollout)].sum(), 0.0)
    assert abs(float(advantage.sum())) > 0.1
    assert torch.equal(advantage[first_steps(rollout)][rollout["turn"].new_tensor([0, 0, 1])], advantage[:3])


def test_without_modulation_it_is_the_group_zscore() -> None:
    rollout = made(UNEVEN, UNEVEN_REWARDS)
    off = EntropyModulated(k=0.0, zeta=0.0, center=False)
    expected = rollout.spread(rollout.group_zscore(rollout.reward))
    same(off(rollout), expected, rtol=2e-8)
    loss, gradient = value_and_gradient(empg, now(rollout.logp), (empg | {"advantage": off}).credit(rollout))
    base_loss, base = value_and_gradient(grpo, now(rollout.logp), grpo.credit(rollout))
    same(loss, base_loss, rtol=2e-8, atol=1e-8)
    same(gradient, base, rtol=2e-8)


def test_equal_entropies_leave_only_the_bonus_of_every_turn_but_the_last() -> None:
    rollout = made(UNEVEN, UNEVEN_REWARDS)
    level = rollout.with_columns(step={"entropy": torch.full_like(rollout["entropy"], 0.7)})
    extra = EntropyModulated(center=False)(level) - rollout.spread(rollout.group_zscore(rollout.reward))
    close(extra, [0.1, 0.1, 0.0, 0.1, 0.1, 0.1, 0.1, 0.0, 0.0, 0.0, 0.1, 0.0, 0.0])


def test_sure_errors_are_hit_hardest() -> None:
    advantage = EntropyModulated(zeta=0.0, center=False)(unit())
    assert float(advantage[2]) > float(advantage[0]) > float(advantage[1]) > 0  # entropies 0.1, 0.3, 1.1
    assert float(advantage[3]) < float(advantage[5]) < float(advantage[4]) < 0  # entropies 0.5, 0.6, 2.1


def test_a_single_turn_has_no_bonus() -> None:
    rollout = made([[[0.1, 0.2]], [[0.5]], [[0.9]]], [1.0, 0.0, 0.0])
    assert torch.equal(EntropyModulated(zeta=5.0)(rollout), EntropyModulated(zeta=0.0)(rollout))


def test_a_group_of_equal_rewards_keeps_the_clarity_signal() -> None:
    rollout = made(CARD, [1.0, 1.0])
    clarity = 0.1 * f64([0.606531, 1, 0, 0.367879, 0.778801, 0])
    close(EntropyModulated()(rollout), clarity - clarity.mean())


def test_an_invalid_reward_takes_no_part() -> None:
    rollout = made([*UNEVEN, [[7.0], [0.0]]], [*UNEVEN_REWARDS, math.nan])
    advantage = EntropyModulated()(rollout)
    same(advantage[:-2], EntropyModulated()(made(UNEVEN, UNEVEN_REWARDS)))
    assert (advantage[-2:] == 0).all()
    assert (EntropyModulated()(made(CARD, [math.nan, math.nan])) == 0).all()


def test_what_the_environment_said_is_no_turn() -> None:
    # The answer opens the turn that the policy goes on with; another one ends the trajectory.
    entropies = [[[0.3, 0.5], [math.nan, 8.0, 1.1]], [[0.2, 0.9, 0.1], [math.inf, 0.5], [-1.0]], [[0.6]], [[0.4]]]
    mask = torch.tensor([1, 1, 0, 0, 1, 1, 1, 1, 0, 1, 0, 1, 1]).bool()
    rollout = made(entropies, UNEVEN_REWARDS).with_columns(step={"mask": mask})
    said = made([[[0.3, 0.5], [1.1]], [[0.2, 0.9, 0.1], [0.5]], [[0.6]], [[0.4]]], UNEVEN_REWARDS)
    advantage = EntropyModulated()(rollout)
    same(advantage[mask], EntropyModulated()(said))
    assert (advantage[~mask] == 0).all()


def test_segments_by_step_and_by_another_column() -> None:
    rollout = made(UNEVEN, UNEVEN_REWARDS)
    alone = made([[[h] for tokens in turns for h in tokens] for turns in UNEVEN], UNEVEN_REWARDS)
    expected = EntropyModulated()(alone)
    same(EntropyModulated(segment=None)(rollout), expected)
    named = rollout.with_columns(step={"thought": torch.arange(rollout.n_steps) % 2 + 5})
    same(EntropyModulated(segment="thought")(named), expected)
    assert "turn" not in EntropyModulated(segment=None).needs and "thought" in EntropyModulated(segment="thought").needs


def test_groups_are_compared_within_and_turns_across() -> None:
    rollout = made(UNEVEN, UNEVEN_REWARDS, [0, 1, 0, 1])
    zscore = rollout.group_zscore(rollout.reward)
    same(EntropyModulated()(rollout), oracle(UNEVEN, zscore.tolist()))


@pytest.mark.parametrize("seed", range(4))
def test_the_premise_holds_exactly(seed: int) -> None:
    """E||grad_z log pi(a)||^2 = 1 - sum_a pi(a)^2 = 1 - exp(-H_2), by enumeration of a one-token policy."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(6, 1, 5, generator=generator, dtype=torch.float64)
    policy = ExactPolicy(SequenceSpace(5, 1), 6, logits)
    norms = enumeration.scores(policy).flatten(2).square().sum(-1)
    expected = (policy.probabilities() * norms).sum(-1)
    collision = logits.softmax(-1).square().sum((-1, -2))
    same(expected, 1 - collision, rtol=1e-12)
    order = (-collision.log()).argsort()
    assert (expected[order].diff() > 0).all()


def test_what_it_declares() -> None:
    assert {"reward", "entropy", "logp"} <= empg.needs
    assert "turn" in empg.advantage.needs and "turn" in empg.rollout.gives and "turn" not in empg.needs
    assert empg.advantage == EntropyModulated(k=1.0, k_future=1.0, zeta=0.1)
    assert {slot for slot, value in empg.slots().items() if value != grpo.slots().get(slot)} == {"rollout", "advantage"}

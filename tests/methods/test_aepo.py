"""The card of AEPO: the direction of tempered samples, which of them train and how, the controller, worked examples."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from polopt.advantages.group import GroupZScore
from polopt.claims.exact import start
from polopt.controllers import TargetEntropy
from polopt.core.loss import Evaluation
from polopt.core.override import override
from polopt.core.rollout import Rollout, Source
from polopt.methods.base.grpo import grpo
from polopt.methods.base.reinforce import PolicyGradient
from polopt.methods.trust_region.aepo import TemperedPositives, TemperedReinforce, aepo
from polopt.policies.exact import ExactPolicy, SequenceSpace
from polopt.rollouts.tempered import TemperedGroups
from polopt.tasks.problems import problem
from tests.support import close, f64, now, same, value_and_gradient

Floats = NDArray[np.float64]


def softmax(z: Any, temperature: float = 1.0) -> Floats:
    weights = np.exp((np.asarray(z, dtype=np.float64) - np.max(z)) / temperature)
    return np.asarray(weights / weights.sum())


def mixed(ordinary: list[list[float]], tempered: list[list[float]], lengths: Any = None) -> Rollout:
    """Groups of rewards as they are drawn: ordinary ones first; two steps each where no lengths are given."""
    rewards = [*ordinary, *tempered]
    group = [g for g, members in enumerate(rewards) for _ in members]
    flat = [r for members in rewards for r in members]
    count = sum(map(len, ordinary))
    each = list(lengths or [2] * len(flat))
    ids = [i for i, length in enumerate(each) for _ in range(length)]
    source = [Source.POLICY] * count + [Source.TEMPERED] * (len(flat) - count)
    generator = torch.Generator().manual_seed(0)
    logp = -0.1 - torch.rand(len(ids), generator=generator, dtype=torch.float64)
    return Rollout.from_arrays(
        ids,
        group,
        step={"logp": logp, "action": torch.arange(len(ids))},
        trajectories={"reward": f64(flat), "source": torch.tensor(source), "place": torch.arange(len(flat))},
    )


# --- the direction ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("temperature", "direction", "change"),
    [
        (1.2, [-0.054688, 0.027185, 0.027503], 0.0255594866),
        (0.8, [0.071179, -0.038909, -0.03227], -0.0333071875),
        (1.0, [0, 0, 0], 0),
    ],
)
def test_worked_example_of_the_direction(temperature: float, direction: list[float], change: float) -> None:
    """By the exact policy's own tempered probabilities."""
    policy = ExactPolicy(SequenceSpace(3, 1), 1, f64([0.7, 0.2, 0.1]).log()[None, None])
    with torch.no_grad():
        pi, tempered = policy.probabilities()[0], policy.probabilities(temperature)[0]
    close(tempered - pi, direction)
    centred = pi.log() - (pi * pi.log()).sum()
    close(-(pi * centred * (tempered - pi)).sum(), change, 10)


def test_hotter_samples_raise_the_entropy_and_cooler_ones_lower_it() -> None:
    rng = np.random.default_rng(0)
    for _ in range(2000):
        z = rng.normal(size=rng.integers(2, 9)) * rng.uniform(0.2, 3)
        pi = softmax(z)

        def change(direction: Floats, pi: Floats = pi) -> float:
            return float(-(pi * (np.log(pi) - pi @ np.log(pi)) * direction).sum())

        assert change(softmax(z, 1.2) - pi) > 0 > change(softmax(z, 0.8) - pi)


@pytest.mark.parametrize("temperature", [1.2, 0.8])
def test_reinforce_on_right_tempered_samples_by_enumeration(temperature: float) -> None:
    """E_{a ~ pi^T}[R grad log pi] = pi^T R - (pi^T . R) pi, through the loss of every tempered response."""
    rng = np.random.default_rng(1)
    z = rng.normal(size=5)
    right = np.array([1.0, 0, 1, 1, 0])
    pi, hot = softmax(z), softmax(z, temperature)
    leaf = f64(z).requires_grad_()
    logp = leaf.log_softmax(0)
    expected = np.zeros(5)
    for action in range(5):
        if not right[action]:
            continue
        rollout = Rollout.from_arrays(
            [0],
            [0],
            step={"logp": logp[[action]].detach()},
            trajectories={"reward": f64([1.0]), "source": torch.tensor([Source.TEMPERED])},
        )
        credited = aepo.credit(rollout)
        loss, _ = aepo.loss(Evaluation({"logp": logp[[action]]}), credited)
        (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        expected -= hot[action] * gradient.numpy()
    same(expected, hot * right - (hot @ right) * pi)


# --- which tempered responses train -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("gap", "positives", "kept"), [(0.0, 100, 60), (-1e-9, 100, 30), (0.3, 7, 7), (-0.3, 7, 3)])
def test_worked_example_of_the_counts(gap: float, positives: int, kept: int) -> None:
    """2,560 ordinary responses; groups of two with one right response give one positive each."""
    rollout = mixed([[1.0, 0.0]] * 1280, [[0.0, 1.0]] * positives, [1] * (2560 + 2 * positives))
    found = TemperedPositives(gap=gap)(rollout)
    assert int((found["source"] == Source.TEMPERED).sum()) == kept
    assert found.n_trajectories == 2560 + kept
    assert float(found.mask.sum()) == 2560  # as many steps train as without
    assert not found.mask[:kept].any() and found.mask[kept:].all()


def test_only_positives_are_kept_the_first_of_them() -> None:
    ordinary = [[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]
    tempered = [[0.0, 1.0, 0.0], [1.0, 1.0, 1.0], [1.0, math.nan, 0.0], [0.5, 0.4, 1.0]]
    rollout = mixed(ordinary, tempered)
    all_of_them = TemperedPositives(most=1.0)(rollout)
    # A group of equal rewards has no positive; nor has an invalid reward.
    assert all_of_them["place"].tolist() == [0, 1, 2, 3, 4, 5, 7, 12, 17]
    assert all_of_them.mask.tolist() == [False] * 6 + [True] * 12
    two = TemperedPositives(most=0.3)(rollout)
    assert two["place"].tolist() == [0, 1, 2, 3, 4, 5, 7, 12]
    assert two.mask.tolist() == [False] * 4 + [True] * 12
    assert TemperedPositives(most=1.0, threshold=0.6)(rollout)["place"].tolist()[6:] == [7, 12, 17]
    assert TemperedPositives(most=1.0, threshold=1.155)(rollout)["place"].tolist()[6:] == []


def test_what_is_masked_stays_in_its_group() -> None:
    rollout = mixed([[1.0, 0.0, 0.5], [0.0, 1.0]], [[0.0, 1.0]])
    kept = TemperedPositives(most=0.2)(rollout)
    assert kept.mask.tolist() == [False] * 2 + [True] * 10
    before = GroupZScore(eps=1e-6)(rollout)
    same(TemperedReinforce()(kept), [*before[:5].repeat_interleave(2), 1.0, 1.0])


def test_without_tempered_responses_it_is_grpo() -> None:
    """n_aux = 0: loss and gradient of GRPO with the same normalisation and clip."""
    alone = mixed([[1.0, 0.0, 0.5], [0.0, 1.0]], [])
    plain = aepo | {"advantage": GroupZScore(eps=1e-6), "filter": None}
    results = []
    for rollout in (alone, mixed([[1.0, 0.0, 0.5], [0.0, 1.0]], [[0.0, 0.0], [1.0, 1.0]])):
        kept = aepo.filter(rollout)
        credited = aepo.credit(kept)
        results.append(value_and_gradient(aepo, now(kept.logp + 0.1), credited))
    reference = plain.credit(alone)
    results.append(value_and_gradient(plain, now(alone.logp + 0.1), reference))
    for value, gradient in results[1:]:
        assert value == results[0][0] and torch.equal(gradient, results[0][1])


def test_nothing_is_halved_below_one() -> None:
    rollout = mixed([[1.0, 0.0]], [[0.0, 1.0]])
    assert TemperedPositives(most=0.5, gap=-1.0)(rollout)["place"].tolist() == [0, 1]


# --- what they are worth ----------------------------------------------------------------------------------------------


def test_mixed_form_at_ratio_one() -> None:
    """Gradient -A / N per step, A = 1 on tempered responses."""
    kept = TemperedPositives(most=1.0)(mixed([[1.0, 0.0], [0.3, 0.0, 0.1]], [[1.0, 0.0], [0.0, 2.0]], range(1, 10)))
    credited = aepo.credit(kept)
    _, gradient = value_and_gradient(aepo, now(kept.logp), credited)
    steps = float(kept.mask.sum())
    tempered = kept.spread(kept["source"] == Source.TEMPERED)
    assert int(tempered.sum()) == 6 + 9 and steps < kept.n_steps
    same(gradient[tempered], [-1 / steps] * 15)
    same(gradient[~kept.mask], torch.zeros(int((~kept.mask).sum())))
    same(gradient, -credited.advantage * kept.mask / steps)


def sum_form(rollout: Rollout, logp: Tensor, alpha: float) -> Tensor:
    """-alpha (1 / K) sum_i (1 / |o_i|) sum_t log pi_t over tempered responses, in a loop."""
    tempered = (rollout["source"] == Source.TEMPERED).nonzero().flatten().tolist()
    means = [logp[rollout.trajectory == i].mean() for i in tempered]
    return -alpha * torch.stack(means).sum() / len(means)


@pytest.mark.parametrize("ordinary", [[[1.0, 0.0]], [[1.0, 0.0, 0.2], [0.5, 0.1]], [[0.5, 0.5]]])
def test_sum_form_whatever_the_main_batch(ordinary: list[list[float]]) -> None:
    tempered = [[1.0, 0.0], [0.0, 1.0]]
    lengths = [3] * sum(map(len, ordinary)) + [2, 1, 4, 1]
    kept = TemperedPositives(most=1.0)(mixed(ordinary, tempered, lengths))
    part = TemperedReinforce(alpha=0.1)
    method = aepo | {"advantage": part}
    _, gradient = value_and_gradient(method, now(kept.logp), method.credit(kept))
    ours = kept.spread(kept["source"] == Source.TEMPERED)
    count = int((kept["source"] == Source.TEMPERED).sum())
    each = kept.spread(kept.lengths)[ours].double()
    same(gradient[ours], -0.1 / (count * each))
    leaf = kept.logp.clone().requires_grad_()
    (expected,) = torch.autograd.grad(sum_form(kept, leaf, 0.1), leaf)
    same(gradient[ours], expected[ours])


def test_worked_example_of_the_sum_form() -> None:
    """Two tempered responses with log pi (-0.9, -1.1) and (-0.4): 0.07 more loss, gradients -0.025, -0.025, -0.05."""
    logp = f64([-0.9, -1.1, -0.4])
    rollout = Rollout.from_arrays(
        [0, 0, 1],
        [0, 1],
        step={"logp": logp},
        trajectories={"reward": f64([1.0, 1.0]), "source": torch.tensor([Source.TEMPERED] * 2)},
    )
    method = aepo | {"advantage": TemperedReinforce(alpha=0.1), "objective": PolicyGradient()}
    value, gradient = value_and_gradient(method, now(logp), method.credit(rollout))
    same(value, 0.07)
    same(gradient, [-0.025, -0.025, -0.05])
    _, clipped = value_and_gradient(
        aepo | {"advantage": TemperedReinforce(alpha=0.1)}, now(logp), method.credit(rollout)
    )
    same(clipped, gradient)


def test_masked_steps_and_invalid_rewards_are_no_part_of_the_sum_form() -> None:
    mask = torch.tensor([True, False, True, True, False, True])
    rollout = Rollout.from_arrays(
        [0, 0, 0, 1, 2, 3],
        [0, 0, 0, 1],
        step={"logp": f64([-1.0] * 6), "mask": mask},
        trajectories={"reward": f64([1.0, math.nan, 1.0, 0.4]), "source": torch.tensor([Source.TEMPERED] * 4)},
    )
    # Trajectory 1 is invalid, 2 has no step that trains: K = 2, N = 4.
    credit = TemperedReinforce(alpha=0.3)(rollout)
    same(credit, [*[0.3 * 4 / (2 * 2)] * 3, 0.0, 0.0, 0.3 * 4 / (2 * 1)])
    same(TemperedReinforce()(rollout), [1.0, 1.0, 1.0, 0.0, 0.0, 1.0])


# --- the controller ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("linear", "entropy", "temperature"),
    [(False, 0.4, 1.2), (False, 0.5, 1.2), (False, 0.6, 0.8), (True, 0.4, 1.1), (True, 0.6, 0.9), (True, 0.5, 1.0)],
)
def test_worked_example_of_the_temperature(linear: bool, entropy: float, temperature: float) -> None:
    found = TargetEntropy(linear=linear)({"entropy": entropy})
    assert found == {"rollout.other": pytest.approx(temperature), "filter.gap": pytest.approx(0.5 - entropy)}


def test_the_linear_rule_is_clipped() -> None:
    control = TargetEntropy(linear=True)
    assert control({"entropy": 0.0})["rollout.other"] == 1.2
    assert control({"entropy": 3.0})["rollout.other"] == 0.8


def test_the_entropy_of_the_last_iteration_that_had_one_counts() -> None:
    control = TargetEntropy()
    assert control({}) == {"rollout.other": 1.2, "filter.gap": 0.5}
    assert control({"entropy": 0.75})["rollout.other"] == 0.8
    for missing in ({}, {"entropy": math.nan}):
        assert control(missing) == {"rollout.other": 0.8, "filter.gap": -0.25}
    other = TargetEntropy()
    other.load_state_dict(control.state_dict())
    assert other({}) == {"rollout.other": 0.8, "filter.gap": -0.25}


def test_what_it_returns_changes_the_method() -> None:
    changed = override(aepo, TargetEntropy(target=0.2)({"entropy": 0.5}))
    assert changed.rollout == TemperedGroups(other=0.8)
    assert changed.filter.gap == pytest.approx(-0.3) and changed.filter.most == 60 / 2560


@pytest.mark.parametrize(("target", "temperature"), [(0.01, 0.8), (1.3, 1.2)])
def test_a_run_draws_at_the_temperature_it_is_told(target: float, temperature: float) -> None:
    made = problem("binary-verifier", space=SequenceSpace(4, 2), batch=4, seed=0, spread=1.0)
    method = aepo | {"controller": TargetEntropy(target=target), "filter": TemperedPositives(most=0.25)}
    run = start(made, method, seed=0, group=8)
    run.step()
    run.step()
    assert run.trainer.method.rollout.other == temperature
    assert target - run.trainer.method.filter.gap == pytest.approx(run.metrics["entropy"])
    batch = run.trainer.collect(run.trainer.method, run.trainer.generator)
    drawn = batch.drawn
    assert int((drawn["source"] == Source.TEMPERED).sum()) == 8
    hot = drawn.spread(drawn["source"] == Source.TEMPERED)
    with torch.no_grad():
        name = f"logp@{temperature}"
        same(drawn["logp/sampled"][hot], run.policy.evaluate(drawn, frozenset({name}))[name][hot])
        same(drawn.logp, run.policy.evaluate(drawn, frozenset({"logp@1.0"}))["logp@1.0"])
    assert batch.kept is not None
    assert batch.kept.n_trajectories <= drawn.n_trajectories
    assert batch.answers.n_trajectories == 32


def test_tempered_right_responses_move_the_entropy_as_told() -> None:
    """The expected tempered part of the gradient, by sampling many: its slope on the entropy has the sign of T - 1."""
    generator = torch.Generator().manual_seed(3)
    policy = ExactPolicy(SequenceSpace(5, 1), 1, 1.5 * torch.randn(1, 1, 5, generator=generator, dtype=torch.float64))
    p = policy.probabilities().detach()[0]
    slope = -p * (p.log() - (p * p.log()).sum())
    for temperature, sign in ((1.2, 1), (0.8, -1)):
        chance = policy.probabilities(temperature).detach()[0]
        rollout = policy.rollout(torch.zeros(5).long(), torch.arange(5), torch.arange(5))
        columns = {"reward": torch.ones(5, dtype=torch.float64), "source": torch.full((5,), int(Source.TEMPERED))}
        credited = aepo.credit(rollout.with_columns(trajectory=columns))
        gradient = torch.zeros(5, dtype=torch.float64)
        for action in range(5):
            one = credited.select(torch.tensor([action]))
            loss, _ = aepo.loss(policy.evaluate(one, frozenset({"logp"})), one)
            gradient -= chance[action] * torch.autograd.grad(loss, policy.logits)[0][0, 0]
        same(gradient, chance - p)
        assert sign * float((slope * gradient).sum()) > 0


def test_what_differs_from_grpo() -> None:
    changed = {slot for slot, value in aepo.slots().items() if value != grpo.slots().get(slot)}
    assert changed == {"rollout", "filter", "advantage", "objective", "aggregation", "controller", "schedule"}
    assert aepo.objective.dual == 3.0 and list(itertools.chain(aepo.models)) == ["ref"]

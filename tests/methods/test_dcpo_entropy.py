"""The card of DCPO: the steering term and its expectation, the mixing weight, the controller, worked example."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from polopt.advantages.group import GroupZScore
from polopt.claims.exact import start
from polopt.controllers import TargetEntropy
from polopt.core.loss import Evaluation
from polopt.core.override import override
from polopt.core.policy import Request
from polopt.core.rollout import Rollout
from polopt.methods.base.grpo import grpo
from polopt.methods.trust_region.dcpo_entropy import DistributionCentric, dcpo_entropy
from polopt.policies.exact import ExactPolicy, SequenceSpace
from polopt.policies.exact.policy import example_of
from polopt.rollouts.groups import Groups
from polopt.tasks.problems import problem
from tests.support import DELTA, IDS, OLD, close, f64, now, same, value_and_gradient, with_advantage

TEMPERED = [-0.55, -1, -0.25, -0.72, -1.4, -0.36, -1.8, -0.46, -0.9, -1.1]
SCORES = [1.0, 0.0, 1.0, 0.0]
STEPS = np.array(IDS)


def card(scores: Any = SCORES, rewards: Any = None, tempered: Any = TEMPERED, **step: Any) -> Rollout:
    """Two groups of two; the group z-scores of one right and one wrong response are +-0.7071 (1e-6 in the divisor)."""
    return Rollout.from_arrays(
        IDS,
        [0, 0, 1, 1],
        step={"logp": f64(OLD), "logp@1.2": f64(tempered), **step},
        trajectories={"reward": f64(scores if rewards is None else rewards), "score": f64(scores)},
    )


# --- worked example ---------------------------------------------------------------------------------------------------


def test_worked_example(monkeypatch: pytest.MonkeyPatch) -> None:
    part = DistributionCentric(gap=0.10)
    same(part.alpha(0.5), 1 / 6)
    # The card gives the group advantages, +-0.7.
    monkeypatch.setattr(GroupZScore, "__call__", lambda self, rollout: f64([0.7, -0.7, 0.7, -0.7]))
    credit = part(card())
    close(
        credit,
        [0.741872, 0.75, 0.741872, -0.583333, -0.583333, 0.740294, 0.7869, -0.583333, -0.583333, -0.583333],
    )
    rollout = with_advantage(card(), credit)
    value, gradient = value_and_gradient(dcpo_entropy, now(f64(OLD) + f64(DELTA)), rollout)
    close(value, -0.1030225455, 10)
    close(gradient, [0, -0.067863, -0.077991, 0.087023, 0, -0.074029, 0, 0, 0.064468, 0.055488])


@pytest.mark.parametrize("gap", [0.03, -0.07, 0.1, -4.0])
@pytest.mark.parametrize("scores", [SCORES, [1.0, 0.2, 0.04, 0.0], [0.0, 0.0, 1.0, 0.5]])
def test_against_a_loop(gap: float, scores: list[float]) -> None:
    s = np.array(scores)
    share = sum(1 for x in s if x > 0.05) / 4
    a = min(abs(gap), 0.1) / share
    alpha = a / (1 + a)
    group = np.concatenate([(s[g] - s[g].mean()) / (s[g].std(ddof=1) + 1e-6) for g in ([0, 1], [2, 3])])
    expected = [
        (1 - alpha) * group[i] + alpha * float(s[i] > 0.05) * math.exp(t - o)
        for i, t, o in zip(IDS, TEMPERED, OLD, strict=True)
    ]
    same(DistributionCentric(gap=gap)(card(scores)), expected)


# --- identities -------------------------------------------------------------------------------------------------------


def test_at_the_target_it_is_grpo() -> None:
    rollout = card()
    at_target = dcpo_entropy | {"advantage": DistributionCentric(gap=0.0)}
    same(at_target.advantage(rollout), rollout.spread(GroupZScore(eps=1e-6)(rollout)), rtol=0, atol=0)
    plain = dcpo_entropy | {"advantage": GroupZScore(eps=1e-6)}
    evaluation = now(f64(OLD) + f64(DELTA))
    (value, gradient), (expected, slopes) = (
        value_and_gradient(method, evaluation, method.credit(rollout)) for method in (at_target, plain)
    )
    assert value == expected and torch.equal(gradient, slopes)


def test_far_from_the_target_only_the_share_of_right_responses_counts() -> None:
    rollout = card()
    far = DistributionCentric(gap=0.1)(rollout)
    for gap in (-0.1, 0.5, -3.0):
        assert torch.equal(DistributionCentric(gap=gap)(rollout), far)
    assert not torch.equal(DistributionCentric(gap=0.09)(rollout), far)


def test_the_mixing_weight() -> None:
    gaps = [DistributionCentric(gap=gap).alpha(0.5) for gap in np.linspace(0, 0.1, 11)]
    assert gaps[0] == 0 and all(a < b < 1 for a, b in itertools.pairwise(gaps))
    shares = [DistributionCentric(gap=0.05).alpha(share) for share in np.linspace(0.1, 1, 10)]
    assert all(a > b > 0 for a, b in itertools.pairwise(shares))
    same(shares[-1], 0.05 / 1.05)


def test_wrong_responses_are_never_touched_by_the_ratio() -> None:
    moved = card(tempered=np.array(TEMPERED) + np.where(np.isin(STEPS, [1, 3]), 7.0, 0.0))
    same(DistributionCentric()(moved), DistributionCentric()(card()), rtol=0, atol=0)


def test_at_temperature_one_the_extra_term_is_reinforce_on_right_responses() -> None:
    part = DistributionCentric(gap=0.05)
    credit = part(card(tempered=OLD))
    alpha = part.alpha(0.5)
    group = GroupZScore(eps=1e-6)(card())
    same(credit, ((1 - alpha) * group + alpha * f64(SCORES))[list(IDS)])


def test_where_nothing_is_right_it_is_grpo() -> None:
    rollout = card(scores=[0.0] * 4, rewards=[0.3, 0.1, 0.0, 0.2])
    same(DistributionCentric()(rollout), rollout.spread(GroupZScore(eps=1e-6)(rollout)), rtol=0, atol=0)


def test_invalid_rewards_teach_nothing_and_are_not_counted() -> None:
    rewards = [1.0, 0.0, math.nan, 0.0]
    credit = DistributionCentric(gap=0.1)(card(scores=[1.0, 0.0, 1.0, 0.0], rewards=rewards))
    alpha = 0.3 / 1.3  # one of three valid responses is right
    assert (credit[STEPS == 2] == 0).all()
    same(credit[STEPS == 3], [0.0] * 3)  # alone in its group
    w = np.exp(np.array(TEMPERED) - np.array(OLD))[:3]
    same(credit[:3], (1 - alpha) / (math.sqrt(2) * (1 + 1e-6 * math.sqrt(2))) + alpha * w)


def test_masked_steps_hold_anything() -> None:
    mask = torch.ones(10, dtype=torch.bool)
    mask[[1, 4]] = False
    garbage = torch.where(mask, f64(TEMPERED), torch.inf)
    credit = DistributionCentric()(card(tempered=garbage, mask=mask))
    assert credit.isfinite().all()
    same(credit[mask], DistributionCentric()(card())[mask])


@pytest.mark.parametrize("rewards", [[1.0], [0.0]])
def test_a_group_of_one_is_steered_if_right(rewards: list[float]) -> None:
    rollout = Rollout.from_arrays(
        [0, 0],
        [0],
        step={"logp": f64([-1, -2]), "logp@1.2": f64([-1.1, -1.5])},
        trajectories={"reward": f64(rewards), "score": f64(rewards)},
    )
    same(DistributionCentric(gap=0.1)(rollout), rewards[0] * np.exp([-0.1, 0.5]) * 0.1 / 1.1)


# --- expectations by enumeration --------------------------------------------------------------------------------------


def softmax(z: Any) -> Any:
    weights = np.exp(np.asarray(z) - np.max(z))
    return weights / weights.sum()


@pytest.mark.parametrize("temperature", [1.2, 0.8])
@pytest.mark.parametrize("seed", range(3))
def test_the_ratio_moves_the_expectation_to_the_tempered_policy(temperature: float, seed: int) -> None:
    """E_pi[w R grad log pi] = pi_T R - (pi_T . R) pi, of the library's own loss over every action."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=5) * 1.5
    right = (rng.random(5) > 0.4).astype(float)
    pi, hot = softmax(z), softmax(z / temperature)
    space = SequenceSpace(5, 1)
    policy = ExactPolicy(space, 1, f64(z)[None, None])
    rollout = policy.rollout(torch.zeros(5).long(), torch.arange(5), torch.arange(5))
    name = f"logp@{temperature}"
    with torch.no_grad():
        tempered = policy.evaluate(rollout, frozenset({name}))[name]
    ratio = np.exp(tempered.numpy() - rollout.logp.numpy())
    same((pi * ratio).sum(), 1.0)
    scores = np.eye(5) - pi
    same((pi * ratio * right) @ scores, hot * right - (hot @ right) * pi)
    # The same through the part: groups of one, so that the group's advantage is 0.
    rollout = rollout.with_columns(step={name: tempered}, trajectory={"reward": f64(right), "score": f64(right)})
    part = DistributionCentric(temperature=temperature, gap=0.1)
    alpha = part.alpha(float(right.mean()))
    same((pi * part(rollout).numpy()) @ scores, alpha * (hot * right - (hot @ right) * pi))


# --- the controller and the run ---------------------------------------------------------------------------------------


def test_the_controller_sets_temperature_and_gap() -> None:
    control: TargetEntropy = dcpo_entropy.clone().controller
    assert control({}) == {"advantage.temperature": 1.2, "advantage.gap": 0.5}
    assert control({"entropy": 0.5}) == {"advantage.temperature": 1.2, "advantage.gap": 0.0}
    found = control({"entropy": 0.75})
    assert found == {"advantage.temperature": 0.8, "advantage.gap": -0.25}
    changed = override(dcpo_entropy, found)
    assert changed.advantage == DistributionCentric(temperature=0.8, gap=-0.25)
    assert "logp@0.8" in changed.needs and "logp@1.2" not in changed.needs


def test_a_run_steers_towards_the_tempered_policy_it_is_told() -> None:
    made = problem("binary-verifier", space=SequenceSpace(4, 2), batch=4, seed=0, spread=1.0)
    for target, temperature in ((0.01, 0.8), (1.3, 1.2)):
        control = replace(dcpo_entropy.controller, target=target)
        run = start(made, dcpo_entropy | {"controller": control}, seed=0, group=8)
        run.step()
        run.step()
        assert run.trainer.controlled["advantage.temperature"] == temperature
        assert run.trainer.method.advantage.temperature == temperature
        entropy = target - run.trainer.controlled["advantage.gap"]
        assert entropy == pytest.approx(run.metrics["entropy"]) and 0 < entropy < math.log(4)


def test_the_tempered_log_probs_of_a_batch_are_those_of_the_policy_that_sampled_it() -> None:
    made = problem("binary-verifier", space=SequenceSpace(4, 2), batch=4, seed=0, spread=1.0)
    run = start(made, dcpo_entropy, seed=0, group=8)
    batch = run.trainer.collect(run.trainer.method, run.trainer.generator).kept
    assert batch is not None
    by_hand = (run.policy.table().detach() / 1.2).log_softmax(-1)
    payload: Any = batch.payload
    same(batch["logp@1.2"], by_hand[payload.step_problem, payload.nodes, payload.ids])


def test_what_differs_from_grpo() -> None:
    changed = {slot for slot, value in dcpo_entropy.slots().items() if value != grpo.slots().get(slot)}
    assert changed == {"advantage", "objective", "aggregation", "controller", "schedule"}
    assert dcpo_entropy.needs == grpo.needs | {"score", "logp@1.2"}


def test_two_ratios_with_two_roles() -> None:
    """The policy's own ratio is at temperature 1, however the credit was tempered."""
    policy = ExactPolicy(SequenceSpace(4, 2), 2, torch.randn(2, 5, 4, dtype=torch.float64))
    requests = [Request(example_of(number), 4) for number in range(2)]
    rollout = Groups()(policy, requests, limit=2, seed=0)
    with torch.no_grad():
        tempered = policy.evaluate(rollout, frozenset({"logp@1.2"}))["logp@1.2"]
    reward = f64([1, 0, 1, 1, 0, 0, 1, 0])
    rollout = rollout.with_columns(step={"logp@1.2": tempered}, trajectory={"reward": reward, "score": reward.clone()})
    rollout = dcpo_entropy.credit(rollout)
    evaluation = Evaluation({"logp": policy.evaluate(rollout, frozenset({"logp"})).logp})
    loss, metrics = dcpo_entropy.loss(evaluation, rollout)
    same(loss.detach(), -rollout.advantage.mean(), rtol=1e-6)
    assert float(metrics["clip_ratio/region_mean"]) == 0

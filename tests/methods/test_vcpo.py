"""The card of VCPO: sequence weights, effective sample size, the off-policy optimal baseline, the worked example."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from polopt.advantages.group import GroupZScore
from polopt.claims.exact import batch, credited, gradient, start
from polopt.core.rollout import Rollout
from polopt.methods.base.reinforce import PolicyGradient
from polopt.methods.credit.oblr_po import ScoreWeighted
from polopt.methods.trust_region.vcpo import OffPolicyBaseline, vcpo
from polopt.policies.exact import SequenceSpace
from polopt.tasks.problems import problem
from polopt.updates.effective_sample_size import EffectiveSampleSize
from polopt.weights.truncated_sequence import TruncatedSequence, log_weight
from tests.methods.enumeration import Floats, softmax
from tests.support import OLD, close, f64, now, same, value_and_gradient, worked

DELTA = [0.3, -0.1, 0.05, 0.4, -0.5, 1.2, 1.0, -0.3, 0.1, -0.05]
NEW = [old + delta for old, delta in zip(OLD, DELTA, strict=True)]
NORM = [1.0, 2.0, 1.5, 0.5]
EXACT = OffPolicyBaseline("exact")
METHOD = vcpo | {"advantage": EXACT}


def example(**step: Any) -> Rollout:
    rollout = worked(**{"logp__start": NEW, **step})
    return rollout.with_columns(trajectory={"score_norm": f64(NORM) ** 2})


def responses(
    weights: Sequence[float],
    rewards: Sequence[float],
    norms: Sequence[float] | None = None,
    groups: Sequence[int] | None = None,
    **step: Any,
) -> Rollout:
    """One-step responses with these sequence weights."""
    count = len(weights)
    columns = {"logp": f64([-1.0] * count), "logp/start": f64(np.log(weights)) - 1.0, **step}
    trajectories = {"reward": f64(rewards), "score_norm": f64(norms or [1.0] * count) ** 2}
    return Rollout.from_arrays(range(count), list(groups or [0] * count), step=columns, trajectories=trajectories)


@dataclass
class OneBatch:
    """A step on a batch, with a gradient of its own; it notes the scale of each step that is taken."""

    batch: Rollout
    finite: bool = True
    chunk_square_norms: Sequence[float] = ()
    parameters: Sequence[Parameter] = field(default_factory=lambda: [Parameter(torch.zeros(2, dtype=torch.float64))])
    scales: list[float] = field(default_factory=list)
    preview: Any = None

    def gradient(self, chunks: int = 1) -> dict[str, float]:
        self.parameters[0].grad = f64([0.3, 0.4])
        return {"loss": 1.0}

    def apply(self, scale: float = 1.0) -> None:
        self.scales.append(scale)

    def reject(self, reason: str) -> None:
        raise AssertionError(reason)


def ess(rollout: Rollout, **options: Any) -> tuple[float, float]:
    """Effective sample size as a share, and the scale of the step."""
    step = OneBatch(rollout)
    metrics = EffectiveSampleSize(**options)(step)
    assert step.scales == [metrics["update/rate_share"]] and metrics["grad_norm"] == pytest.approx(0.5)
    return metrics["update/ess"], step.scales[0]


# --- the worked example -----------------------------------------------------------------------------------------------


def test_worked_example() -> None:
    rollout = example()
    close(log_weight(rollout).exp(), [1.284025, 0.904837, 9.025013, 0.778801])
    close(TruncatedSequence()(rollout), [1.284025, 0.904837, 8.0, 0.778801])
    advantage = EXACT(rollout)
    close(advantage, [1.330284, -0.669716, 0.001653, -1.998347])
    # A = (R - b) / sigma, sigma = 1/2 and 1/4.
    close(rollout.reward - advantage * f64([0.5, 0.5, 0.25, 0.25]), [0.334858, 0.334858, 0.999587, 0.999587])
    found = ess(rollout)
    # The card's last digits have the 1e-8 that the code adds to denominators.
    close(found, [0.4253905867, 0.6522197380], digits=9)
    value, slope = value_and_gradient(METHOD, now(NEW), METHOD.credit(rollout))
    assert value == pytest.approx(-0.3243126305, abs=1e-9)
    lengths = np.repeat([3, 2, 2, 3], [3, 2, 2, 3])
    weight = np.repeat([1.284025, 0.904837, 8.0, 0.778801], [3, 2, 2, 3])
    credit = np.repeat([1.330284, -0.669716, 0.001653, -1.998347], [3, 2, 2, 3])
    close(slope, -weight * credit / (4 * lengths), digits=5)


def test_weights_and_credit_are_constants_of_the_iteration() -> None:
    """What the policy has become since changes the loss through log pi alone."""
    rollout = METHOD.credit(example())
    _, here = value_and_gradient(METHOD, now(NEW), rollout)
    _, there = value_and_gradient(METHOD, now([value + 0.7 for value in NEW]), rollout)
    assert torch.equal(here, there)


# --- effective sample size --------------------------------------------------------------------------------------------


def test_fresh_data_have_full_size_and_full_steps() -> None:
    same(ess(example(logp__start=OLD)), [1.0, 1.0])
    same(TruncatedSequence()(example(logp__start=OLD)), [1.0] * 4)


def test_one_weight_of_nine() -> None:
    found = ess(responses([1, 1, 1, 9], [0, 0, 0, 1]))
    same(found, [3 / 7, math.sqrt(3 / 7)])
    close(found[1], 0.6546536707, digits=10)
    same(ess(responses([1, 1, 1, 9], [0, 0, 0, 1]), rule="linear"), [3 / 7, 3 / 7])
    same(ess(responses([1, 1, 1, 9], [0, 0, 0, 1]), on_policy=0.55), [3 / 7, math.sqrt(3 / 7 / 0.55)])
    assert ess(responses([1, 1, 1, 9], [0, 0, 0, 1]), on_policy=0.4)[1] == 1.0


def test_a_single_weight_is_one_sample() -> None:
    same(ess(responses([1, 1e-30, 1e-30, 1e-30], [0, 0, 0, 1]))[0], 0.25)


@pytest.mark.parametrize("factor", [1e-8, 3.0, 1e200])
def test_the_size_does_not_depend_on_the_scale_of_the_weights(factor: float) -> None:
    weights = np.array([0.2, 1.0, 3.0, 7.0, 0.01])
    expected = weights.sum() ** 2 / (weights**2).sum() / 5
    # The square of 7e200 is not a number of float64.
    same(ess(responses((factor * weights).tolist(), [0, 0, 0, 1, 1]))[0], expected)


def test_the_size_is_that_of_all_that_can_train_whatever_its_credit() -> None:
    rewards = [1.0, 1.0, 0.0, math.nan]
    mask = torch.tensor([True, True, True, False])
    found, _ = ess(responses([1, 9, 1, 1e6], rewards, groups=[0, 0, 1, 1], mask=mask))
    same(found, 11**2 / 83 / 3)
    nothing = responses([1, 2], [math.nan] * 2, mask=torch.tensor([False, False]))
    assert ess(nothing) == (1.0, 1.0)


def test_what_is_not_finite_changes_nothing() -> None:
    step = OneBatch(example(), finite=False)
    EffectiveSampleSize()(step)
    assert not step.scales


# --- the baseline -----------------------------------------------------------------------------------------------------


def test_equal_weights_and_norms_give_grpo() -> None:
    rollout = responses([2.0] * 5, [1, 0, 0.5, 0.25, 1], [3.0] * 5, [0, 0, 0, 1, 1])
    same(EXACT(rollout), GroupZScore(eps=0.0, unbiased=False)(rollout))


def test_equal_rewards_and_invalid_ones_give_exactly_zero() -> None:
    rollout = responses([1, 5, 0.1, 2, 3], [0.1, 0.1, 0.1, math.nan, 0.7], groups=[0, 0, 0, 1, 1])
    assert (EXACT(rollout) == 0).all()
    assert (EXACT(responses([1, 2], [math.nan, math.nan])) == 0).all()
    assert (EXACT(responses([4.0], [0.3])) == 0).all()


def test_the_baseline_minimises_the_weighted_square() -> None:
    generator = np.random.default_rng(0)
    weights, norms, rewards = generator.lognormal(size=6), generator.exponential(size=6), generator.normal(size=6)
    rollout = responses(weights.tolist(), rewards.tolist(), norms.tolist())
    sigma = rewards.std()
    baseline = f64(rewards) - EXACT(rollout) * sigma
    b = float(baseline[0])
    same(baseline, [b] * 6)
    assert rewards.min() <= b <= rewards.max()
    k = (weights * norms) ** 2
    grid = np.linspace(rewards.min(), rewards.max(), 2001)
    assert abs(grid[np.argmin([(k * (rewards - x) ** 2).sum() for x in grid])] - b) < grid[1] - grid[0]


@pytest.mark.parametrize("twice", [False, True])
def test_against_a_loop(twice: bool) -> None:
    generator = np.random.default_rng(1)
    groups = [1, 0, 1, 2, 0, 1, 0, 1, 3, 3]
    rewards, weights = generator.normal(size=10), generator.lognormal(1.0, 1.5, size=10)
    norms = generator.exponential(size=10)
    rewards[[4, 9]] = np.nan
    weights[9] = 1e9  # of an invalid response
    k = (weights * norms) ** 2 * (np.minimum(weights, 8.0) ** 2 if twice else 1.0)
    expected = np.zeros(10)
    for i in range(10):
        mine = [j for j in range(10) if groups[j] == groups[i] and not np.isnan(rewards[j])]
        sigma = np.std([rewards[j] for j in mine])
        if not np.isnan(rewards[i]) and len(mine) > 1:
            expected[i] = (rewards[i] - sum(k[j] * rewards[j] for j in mine) / sum(k[j] for j in mine)) / sigma
    rollout = responses(weights.tolist(), rewards.tolist(), norms.tolist(), groups)
    same(OffPolicyBaseline("exact", twice=twice)(rollout), expected)
    assert np.count_nonzero(expected) == 6


def test_weights_whose_square_is_no_number() -> None:
    rollout = responses([1e180, 1e190, 1e-200], [1.0, 0.0, 0.5])
    # The second response has all the weight.
    same(rollout.reward - EXACT(rollout) * float(np.std([1.0, 0.0, 0.5])), [1e-20, 1e-20, 1e-20], atol=1e-15)
    same(TruncatedSequence()(rollout), [8.0, 8.0, 1e-200], atol=0)


PI, MU, REWARD = softmax([0.3, -0.2, 1.0]), softmax([1.0, 0.1, -0.5]), np.array([1.0, 0.0, 0.5])
SCORE = np.eye(3) - PI


def weighted(baseline: float) -> tuple[Floats, float]:
    """Mean and second moment of w (R - b) grad log pi under mu, by enumeration."""
    terms = (PI / MU * (REWARD - baseline))[:, None] * SCORE
    return MU @ terms, float(MU @ (terms**2).sum(1))


def test_no_constant_baseline_biases_the_weighted_gradient_and_the_optimal_one_is_the_least_noisy() -> None:
    expected = PI * (REWARD - PI @ REWARD)
    for b in (-1.0, 0.0, 0.4, 2.0):
        same(weighted(b)[0], expected)
    # A group in which each action is as frequent as under mu: mu is rational here.
    mu, counts = np.array([0.5, 0.25, 0.25]), [2, 1, 1]
    actions = np.repeat([0, 1, 2], counts)
    norms = np.sqrt((SCORE**2).sum(1))
    rollout = responses((PI / mu)[actions].tolist(), REWARD[actions].tolist(), norms[actions].tolist())
    best = float((f64(REWARD[actions]) - EXACT(rollout) * REWARD[actions].std())[0])

    def second(b: float) -> float:
        return float(mu @ (((PI / mu * (REWARD - b))[:, None] * SCORE) ** 2).sum(1))

    assert all(second(best) < second(best + step) for step in (-0.3, -0.01, 0.01, 0.3))


def test_norms_of_the_logits_are_those_of_the_policy_of_the_update() -> None:
    """A stale batch of an exact policy, where the estimate from the logits is exact."""
    made = problem("multi-step", space=SequenceSpace(4, 3), batch=3, seed=0)
    policy = made.policy()
    rollout = batch(made, policy, seed=0, sizes=[6])
    with torch.no_grad():
        policy.logits.add_(0.5 * torch.randn(policy.logits.shape, generator=torch.Generator().manual_seed(1)))
    policy.version += 1
    logits, exact, length = (
        credited(vcpo | {"advantage": OffPolicyBaseline(norms)}, policy, rollout).advantage
        for norms in ("logits", "exact", "length")  # type: ignore[arg-type]
    )
    same(logits, exact)
    assert float((length - exact).abs().max()) > 1e-3


def test_truncation_bounds_the_gradient_of_a_response() -> None:
    rollout = responses([0.5, 8.0, 8.1, 1e6], [1.0, 0.0, 0.5, 0.2])
    made = (vcpo | {"advantage": GroupZScore()}).credit(rollout)
    _, slope = value_and_gradient(vcpo | {"advantage": GroupZScore()}, now(rollout["logp/start"]), made)
    same(slope / GroupZScore()(rollout), [-0.125, -2.0, -2.0, -2.0])


# --- the method -------------------------------------------------------------------------------------------------------


def test_what_it_needs() -> None:
    assert OffPolicyBaseline().needs == {"reward", "logp", "logp/start", "collision"}
    assert EXACT.needs == {"reward", "logp", "logp/start", "score_norm"}
    assert vcpo.vanishes_with == "advantage" and vcpo.schedule.epochs == vcpo.schedule.minibatches == 1
    assert isinstance(vcpo.objective, PolicyGradient) and vcpo.regularizer is None


def test_on_fresh_data_it_is_reinforce_with_the_score_weighted_baseline_over_the_spread() -> None:
    made = problem("multi-step", space=SequenceSpace(4, 3), batch=2, seed=0)
    policy = made.policy()
    rollout = batch(made, policy, seed=0, sizes=[5])
    ours = credited(vcpo, policy, rollout)
    base = credited(vcpo | {"advantage": ScoreWeighted(others=False), "weight": None}, policy, rollout)
    sigma = rollout.group_std(rollout.reward, unbiased=False)
    same(ours.advantage, base.advantage / sigma[rollout.step_group])
    assert float(gradient(vcpo, policy, ours).abs().max()) > 0


def test_a_stale_run_takes_smaller_steps() -> None:
    shares = []
    for stale in (0, 12):
        run = start(problem("multi-step", batch=4, seed=0), vcpo, seed=0, group=8, stale=stale)
        for _ in range(20):
            run.step()
        shares.append(run.metrics["update/ess"])
        assert run.metrics["update/rate_share"] == pytest.approx(math.sqrt(run.metrics["update/ess"]))
    assert shares[0] == pytest.approx(1.0) and shares[1] < 0.9

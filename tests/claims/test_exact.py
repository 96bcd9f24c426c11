from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from polopt.claims import bias
from polopt.claims.exact import (
    NoisyGroups,
    batch,
    credited,
    curve,
    disturbed,
    gradient,
    iterations_until,
    largest_fall,
    one_token,
    spread,
    start,
    step_gradient,
    with_updates,
)
from polopt.claims.small import first_reaching, moving_mean
from polopt.core.policy import Request
from polopt.methods.base.dr_grpo import dr_grpo
from polopt.methods.base.grpo import grpo
from polopt.methods.base.reinforce import reinforce
from polopt.policies.exact import SequenceSpace, expected_reward, policy_gradient
from polopt.tasks.problems import problem

SPACE = SequenceSpace(3, 3)


def test_a_batch_is_scored_by_the_problems_table() -> None:
    made = problem("random-rewards", space=SequenceSpace(3, 3, end=True), batch=2, seed=1)
    rollout = batch(made, made.policy(), seed=0, sizes=[3, 4])
    assert rollout.n_groups == 4 and rollout.lengths.shape == (14,)
    assert Counter(rollout.group.tolist()) == {0: 3, 1: 4, 2: 3, 3: 4}
    payload = rollout.payload
    for index, ids in enumerate(payload.completion_ids):  # type: ignore[union-attr]
        number = int(payload.problem[index])  # type: ignore[union-attr]
        assert float(rollout.reward[index]) == float(made.reward[number, made.space.index(ids)])


def test_named_rewards_are_columns_of_a_batch_and_exact_expectations_of_a_run() -> None:
    made = problem("multi-reward", batch=2, rates=(0.3, 0.6), scales=(1.0, 0.25), seed=1)
    rollout = batch(made, made.policy(), seed=0, sizes=[4000])
    assert set(rollout.rewards) == {"reward-1", "reward-2"}
    torch.testing.assert_close(rollout["reward/reward-1"] + rollout["reward/reward-2"], rollout.reward)
    exact = start(made, grpo, seed=0, group=4).rewards
    for name, value in exact.items():
        assert float(rollout.rewards[name].mean()) == pytest.approx(value, rel=0.05)


def test_the_mean_gradient_is_the_exact_one() -> None:
    made = problem("random-rewards", space=SPACE, seed=2)
    policy = made.policy()
    method = reinforce | {"advantage": type(reinforce.advantage)(baseline="leave-one-out")}
    rollout = credited(method, policy, batch(made, policy, seed=0, sizes=[30_000]))
    exact = policy_gradient(policy, made.reward).detach()
    assert float((gradient(method, policy, rollout) - exact).norm() / exact.norm()) < 0.05


def test_step_gradients_of_grpo_are_its_equation() -> None:
    made = problem("binary-verifier", space=SequenceSpace(3, 4, end=True), batch=2, seed=3)
    policy = made.policy()
    rollout = credited(grpo, policy, batch(made, policy, seed=0, sizes=[6]))
    each = -rollout.advantage / (rollout.spread(rollout.lengths) * rollout.n_trajectories)
    torch.testing.assert_close(step_gradient(grpo, policy, rollout), each, rtol=1e-5, atol=1e-9)


def test_noise_is_on_the_record_and_not_on_the_actions() -> None:
    made = problem("binary-verifier", space=SPACE, batch=2)
    policy = made.policy()
    requests = [Request(example, 2000) for example in made.examples()]
    plain = NoisyGroups()(policy, requests, limit=3, seed=5)
    noisy = NoisyGroups(noise=0.2)(policy, requests, limit=3, seed=5)
    assert torch.equal(plain.payload.ids, noisy.payload.ids)  # type: ignore[union-attr]
    gap = noisy.logp - plain.logp
    assert float(gap.std()) == pytest.approx(0.2, rel=0.03) and abs(float(gap.mean())) < 0.01
    again = NoisyGroups(noise=0.2)(policy, requests, limit=3, seed=5)
    assert torch.equal(again.logp, noisy.logp)
    with torch.no_grad():
        assert torch.allclose(policy.evaluate(plain, frozenset({"logp"})).logp, plain.logp)


def test_corruption_hits_so_many_steps_of_every_trajectory() -> None:
    made = problem("binary-verifier", space=SequenceSpace(3, 4, end=True), batch=2)
    rollout = batch(made, made.policy(), seed=0, sizes=[500])
    hit = disturbed(rollout, torch.Generator().manual_seed(0), corrupted=2, shift=1.5)
    gap = (hit.logp - rollout.logp).abs()
    assert torch.equal(hit["corrupted"], gap > 1)
    assert torch.allclose(gap[hit["corrupted"]], torch.tensor(1.5, dtype=gap.dtype))
    assert torch.equal(hit.sum_steps(hit["corrupted"].float()), rollout.lengths.clamp_max(2).float())
    # Every place is as likely: of four steps, each is hit in half of the trajectories.
    full = rollout.lengths == 4
    chosen = hit["corrupted"][rollout.spread(full)].view(-1, 4).float().mean(0)
    assert bool((chosen - 0.5).abs().max() < 0.1)


def test_a_run_is_the_trainer_and_learns() -> None:
    made = problem("binary-verifier", space=SPACE, batch=4, seed=1)
    run = start(made, with_updates(grpo, 2), seed=0, group=8)
    rewards = curve(run, 10)
    assert len(rewards) == 11 and rewards[0] == pytest.approx(0.25)
    assert rewards[-1] > rewards[0] + 0.1
    assert run.policy.version == 20
    with torch.no_grad():
        assert run.reward == pytest.approx(float(expected_reward(run.policy, made.reward).mean()))
    again = start(made, with_updates(grpo, 2), seed=0, group=8)
    assert curve(again, 10) == rewards


def test_iterations_until_a_target_stop_there() -> None:
    made = problem("binary-verifier", space=SPACE, batch=4, seed=1)
    rewards = curve(start(made, grpo, seed=0, group=8), 12)
    target = rewards[7]
    reached = next(i for i, value in enumerate(rewards) if value >= target)
    run = start(made, grpo, seed=0, group=8)
    assert iterations_until(run, target, 12) == reached and run.trainer.iteration == reached
    assert iterations_until(start(made, grpo, seed=0, group=8), 2.0, 3) == 3


def test_falls_means_and_first_times() -> None:
    assert largest_fall([0.1, 0.5, 0.4, 0.6, 0.2, 0.3]) == pytest.approx(0.4)
    assert largest_fall([0.1, 0.2, 0.3]) == 0.0
    assert moving_mean([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]
    assert first_reaching([0.1, 0.5, 0.7, 0.2], 0.6) == 3
    assert first_reaching([0.1, 0.2], 0.6) == 2


def test_the_spread_of_gradients() -> None:
    rows = [torch.tensor([1.0, 0.0]), torch.tensor([3.0, 0.0]), torch.tensor([2.0, 3.0])]
    found = spread(rows, torch.tensor([1.0, 0.0]))
    assert found.total == pytest.approx(1.0 + 3.0)
    assert found.relative == pytest.approx(4.0 / (4.0 + 1.0))
    assert found.cosine == pytest.approx((1 + 1 + 2 / math.sqrt(13)) / 3)


def test_one_token_decides() -> None:
    made = one_token(SequenceSpace(4, 3), prompts=5, chance=0.03, seed=0)
    policy = made.policy()
    assert torch.allclose(expected_reward(policy, made.reward), torch.full((5,), 0.03, dtype=torch.float64))
    root = policy.table()[:, 0].softmax(-1)
    target = made.space.sequences[made.reward.argmax(1), 0]
    assert torch.allclose(root.gather(1, target[:, None])[:, 0], torch.tensor(0.03, dtype=torch.float64))
    assert int(made.reward.sum(1)[0]) == 4**2


def test_the_length_of_incorrect_responses_is_a_conditional_expectation() -> None:
    made = replace(bias.padded(3))
    run = start(made, dr_grpo, seed=0, group=4)
    total = weight = 0.0
    chance = run.policy.probabilities().detach()
    means = []
    for b in range(made.batch):
        total = weight = 0.0
        for s in range(made.space.n_sequences):
            tokens = [t for t in made.space.sequences[s].tolist() if t >= 0]
            if tokens[0] != 0:
                total += float(chance[b, s]) * len(tokens)
                weight += float(chance[b, s])
        means.append(total / weight)
    assert bias.wrong_length(run) == pytest.approx(sum(means) / len(means))

"""The ordinary trainer in the exact world."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from polopt.core.policy import Sampling
from polopt.core.rollout import Rollout
from polopt.methods import get_method
from polopt.policies.exact import ExactPolicy, expected_reward, policy_gradient
from polopt.rewards.scoring import Scorer
from polopt.tasks.problems import Problem, problem
from polopt.training.budget import Budget
from polopt.training.build import check_needs
from polopt.training.collect import Collector
from polopt.training.profile import Profiler
from polopt.training.tracking import make_trackers
from polopt.training.trainer import Optimization, Trainer

RATE = 0.2


def make_trainer(run: Path, made: Problem, slug: str, steps: int = 12, resume: bool = False) -> Trainer:
    policy, method = made.policy(), get_method(slug)
    check_needs(method, policy, made.reward_functions())  # type: ignore[arg-type]
    collector = Collector(
        policy,
        made.examples(),
        Scorer(made.reward_functions()),
        prompts=made.batch,
        group=8,
        limit=made.space.length,
        token_budget=10_000,
        profiler=Profiler(enabled=False),
    )
    run.mkdir(parents=True, exist_ok=True)
    trackers = make_trackers([], run)
    trackers.start({}, resume=resume)
    return Trainer(
        policy=policy,
        method=method,
        collect=collector,
        optimizer=torch.optim.Adam(policy.parameters(), RATE),
        optimization=Optimization(RATE),
        budget=Budget(steps=steps),
        run=run,
        trackers=trackers,
        seed=0,
        strict=True,
    )


@pytest.mark.parametrize("slug", ["reinforce", "rloo", "grpo", "ppo"])
@pytest.mark.parametrize("name", ["binary-verifier", "length-correlated-rewards"])
def test_training_raises_the_expected_reward(slug: str, name: str, tmp_path: Path) -> None:
    made = problem(name, batch=4, seed=1)
    trainer = make_trainer(tmp_path, made, slug)
    policy = trainer.policy
    assert isinstance(policy, ExactPolicy)
    before = expected_reward(policy, made.reward).detach()
    trainer.train()
    assert policy.version >= 12
    after = expected_reward(policy, made.reward).detach()
    assert float((after - before).mean()) > 0.25


def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path: Path) -> None:
    made = problem("multi-reward", batch=2)
    whole = make_trainer(tmp_path / "whole", made, "grpo", steps=6)
    whole.train()
    half = make_trainer(tmp_path / "half", made, "grpo", steps=3)
    half.train()
    rest = make_trainer(tmp_path / "half", made, "grpo", steps=6, resume=True)
    rest.resume(half.save())
    assert rest.policy.version == 3
    rest.train()
    assert torch.equal(rest.policy.parameters()[0], whole.policy.parameters()[0])


def test_the_gradient_of_many_samples_is_the_exact_one() -> None:
    made = problem("random-rewards", batch=2, seed=3)
    policy, method = made.policy(), get_method("reinforce").clone()
    rollout = policy.sample([r.__class__(r.example, 20_000) for r in made.requests()], Sampling(), seed=0)
    rollout, _ = Scorer(made.reward_functions())(rollout)
    rollout = method.credit(method.shape_reward(rollout))
    loss, _ = method.loss(policy.evaluate(rollout, method.evaluates), rollout)
    assert loss.dtype == torch.float64
    (found,) = torch.autograd.grad(loss, policy.logits)
    exact = -policy_gradient(policy, made.reward).detach() / made.batch
    assert float((found - exact).norm() / exact.norm()) < 0.03


def test_the_exact_expectation_of_reinforce_over_one_trajectory() -> None:
    """Every sequence once, weighted by its probability: without a baseline the mean gradient is the exact one."""
    made = problem("binary-verifier", batch=2, seed=3)
    policy = made.policy()
    method = get_method("reinforce")
    method = (method | {"advantage": type(method.advantage)(baseline="none")}).clone()
    size = made.space.n_sequences
    mean = torch.zeros_like(policy.logits)
    chance = policy.probabilities().detach()
    for b in range(2):
        for s in range(size):
            one = torch.tensor([b]), torch.tensor([s])
            rollout: Rollout = policy.rollout(*one, torch.zeros(1, dtype=torch.int64), examples=made.examples())
            rollout = rollout.with_columns(trajectory={"reward": made.reward[b, s][None]})
            rollout = method.credit(method.shape_reward(rollout))
            loss, _ = method.loss(policy.evaluate(rollout, method.evaluates), rollout)
            mean += chance[b, s] * torch.autograd.grad(loss, policy.logits)[0]
    torch.testing.assert_close(mean, -policy_gradient(policy, made.reward).detach(), rtol=0, atol=1e-14)

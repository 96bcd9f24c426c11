"""What claims of the exact world share: problems, the ordinary trainer, gradients of sampled batches.

Off-policy claims take SGD: Adam's momentum goes on moving steps whose gradient a clip has just removed. The others take
Adam, which makes losses of different scale comparable. All arms of a claim share optimizer and rate.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.core.example import Example
from polopt.core.method import Method, Schedule
from polopt.core.policy import Request
from polopt.core.rollout import Rollout
from polopt.policies.exact import ExactPolicy, SequenceSpace, enumeration
from polopt.rewards.scoring import Scorer
from polopt.rollouts.groups import Groups
from polopt.tasks.problems import Problem, problem
from polopt.training.budget import Budget
from polopt.training.build import at_start, check_needs
from polopt.training.collect import Collector, provides
from polopt.training.profile import Profiler
from polopt.training.tracking import Trackers
from polopt.training.trainer import Optimization, Trainer
from polopt.training.update import evaluate_columns

ADAM: Final = 0.1
"""Rate of Adam on logits in claims whose updates are on-policy."""
SGD: Final = 20.0
"""Rate of SGD in off-policy claims: with 8 prompts an update moves the root's logits by about 0.2."""

BUDGET: Final = 1_000_000
"""Tokens that go through an exact policy at once: everything."""


@dataclass(frozen=True)
class NoisyGroups(Groups):
    """Groups whose recorded log-probs are wrong, as where sampler and learner compute differently; for experiments.

    Normal noise of standard deviation ``noise`` on every step; then ``corrupted`` steps of each trajectory, drawn at
    random, are off by ``shift`` nats up or down. The actions are the policy's own.
    """

    noise: float = 0.0
    corrupted: int = 0
    shift: float = 1.0

    def finish(self, rollout: Rollout, seed: int) -> Rollout:
        generator = torch.Generator().manual_seed(seed % 2**62)
        return disturbed(rollout, generator, noise=self.noise, corrupted=self.corrupted, shift=self.shift)


def disturbed(
    rollout: Rollout, generator: torch.Generator, *, noise: float = 0.0, corrupted: int = 0, shift: float = 1.0
) -> Rollout:
    """The rollout with noise on ``logp``, and the step column ``corrupted`` where a step was shifted."""
    logp = rollout.logp
    wrong = logp + noise * torch.randn(logp.shape, generator=generator, dtype=torch.float64).to(logp)
    # A random order within each trajectory: the first `corrupted` steps of it are hit.
    draw = torch.rand(len(logp), generator=generator, dtype=torch.float64)
    order = torch.argsort(rollout.trajectory.double() + draw)
    first = rollout.lengths.cumsum(0) - rollout.lengths
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order)) - first[rollout.trajectory]
    hit = place < corrupted
    sign = torch.randint(0, 2, logp.shape, generator=generator) * 2 - 1
    wrong = torch.where(hit, wrong + shift * sign.to(logp), wrong)
    return rollout.with_columns(step={"logp": wrong, "corrupted": hit})


def with_updates(method: Method, count: int) -> Method:
    """The method with ``count`` updates on each whole rollout."""
    return method | {"schedule": Schedule(epochs=count)}


# --- training ---------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """An exact policy in training: the ordinary trainer, one iteration at a time, nothing written to disk."""

    trainer: Trainer
    problem: Problem
    policy: ExactPolicy
    metrics: dict[str, float]

    def step(self) -> None:
        """One iteration; ``metrics`` are its logged ones."""
        self.trainer.step()

    @property
    def reward(self) -> float:
        """Exact expected reward, mean over the prompts."""
        with torch.no_grad():
            return float(enumeration.expected_reward(self.policy, self.problem.reward).mean())

    @property
    def rewards(self) -> dict[str, float]:
        """Exact expectation of each named reward, mean over the prompts."""
        with torch.no_grad():
            return {
                name: float(enumeration.expected_reward(self.policy, table).mean())
                for name, table in self.problem.rewards.items()
            }

    @property
    def entropy(self) -> float:
        """Exact entropy of the distribution over sequences, mean over the prompts, nats."""
        with torch.no_grad():
            return float(enumeration.entropy(self.policy).mean())

    @property
    def step_entropy(self) -> float:
        """Exact entropy per step, where all sequences are as long as the longest: ``entropy`` over that length."""
        return self.entropy / self.problem.space.length


def start(
    problem: Problem,
    method: Method,
    *,
    seed: int,
    group: int = 1,
    prompts: int | None = None,
    optimizer: str = "adam",
    lr: float | None = None,
    prepare: Callable[[ExactPolicy], None] = lambda policy: None,
    stale: int = 0,
    examples: Sequence[Example] | None = None,
    head: str = "tabular",
    policy: ExactPolicy | None = None,
) -> Run:
    """A run of the method on the problem; ``prompts`` per iteration, all of them when left out.

    ``examples`` are asked instead of the problem's plain ones: answers that are known already, for a method that learns
    from a data set (`polopt.tasks.preferences.labelled`). ``lr`` replaces the rate of the optimizer. Batches train
    ``stale`` updates after they were sampled (`Collector`). ``head`` is the policy's (`polopt.policies.exact.heads`);
    ``policy`` is one to train instead of the problem's own, with its models.
    """
    policy = problem.policy(head) if policy is None else policy
    prepare(policy)
    rewards = problem.reward_functions()
    method = problem.judged(at_start(method))
    check_needs(method, policy, rewards)
    rate = {"adam": ADAM, "sgd": SGD}[optimizer] if lr is None else lr
    pool = problem.examples() if examples is None else tuple(examples)
    makes: dict[str, Any] = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
    quiet = Profiler(enabled=False)
    trainer = Trainer(
        policy=policy,
        method=method,
        collect=Collector(
            policy,
            pool,
            Scorer(rewards),
            prompts=prompts or len(pool),
            group=group,
            limit=problem.space.length,
            token_budget=BUDGET,
            profiler=quiet,
            stale=stale,
        ),
        optimizer=makes[optimizer](policy.parameters(), rate),
        optimization=Optimization(rate, token_budget=BUDGET),
        budget=Budget(steps=1_000_000),
        run=Path(tempfile.gettempdir()),
        trackers=Trackers({}),
        seed=seed,
    )
    run = Run(trainer, problem, policy, {})
    trainer.on_progress = lambda phase, metrics: run.metrics.update(metrics)
    return run


def curve(run: Run, iterations: int, value: Callable[[Run], float] = lambda run: run.reward) -> list[float]:
    """A quantity before training and after each iteration."""
    found = [value(run)]
    for _ in range(iterations):
        run.step()
        found.append(value(run))
    return found


def iterations_until(run: Run, target: float, limit: int) -> float:
    """Iterations after which the expected reward first reaches the target; ``limit`` where it does not within them."""
    for done in range(limit):
        if run.reward >= target:
            return float(done)
        run.step()
    return float(limit)


def largest_fall(values: Sequence[float]) -> float:
    """How far a curve falls below the highest value before, at most."""
    highest, fall = values[0], 0.0
    for value in values:
        highest = max(highest, value)
        fall = max(fall, highest - value)
    return fall


# --- gradients --------------------------------------------------------------------------------------------------


def batch(problem: Problem, policy: ExactPolicy, *, seed: int, sizes: Sequence[int]) -> Rollout:
    """A scored rollout with one group of each size for every problem."""
    requests = [Request(example, size) for example in problem.examples() for size in sizes]
    return scored(problem, Groups()(policy, requests, limit=problem.space.length, seed=seed))


def scored(problem: Problem, rollout: Rollout) -> Rollout:
    """A rollout of an exact policy with ``reward`` and ``score`` by the problem's table."""
    payload: Any = rollout.payload
    last = rollout.lengths.cumsum(0) - 1
    sequence = problem.space.sequence_of(payload.nodes[last], payload.ids[last])
    reward = problem.reward[payload.problem, sequence]
    named = {f"reward/{name}": table[payload.problem, sequence] for name, table in problem.rewards.items()}
    return rollout.with_columns(trajectory={**named, "reward": reward, "score": reward.clone()})


def credited(method: Method, policy: ExactPolicy, rollout: Rollout) -> Rollout:
    """Through the method's reward and credit parts; columns they need are evaluated."""
    missing = frozenset(name for name in method.needs if name not in rollout and provides(policy, name))
    rollout = evaluate_columns(policy, rollout, missing, BUDGET, Profiler(enabled=False))
    return method.credit(method.shape_reward(rollout))


def gradient(method: Method, policy: ExactPolicy, rollout: Rollout) -> Float[Tensor, "problem row token"]:
    """Ascent direction -dL/dlogits of a credited rollout."""
    loss, _ = method.loss(policy.evaluate(rollout, method.evaluates), rollout)
    if not loss.requires_grad:
        return torch.zeros_like(policy.logits)
    (found,) = torch.autograd.grad(loss, policy.logits)
    return -found


def step_gradient(method: Method, policy: ExactPolicy, rollout: Rollout) -> Float[Tensor, " step"]:
    """dL/dlogp of every step of a credited rollout."""
    with torch.no_grad():
        evaluated = policy.evaluate(rollout, method.evaluates)
    columns = {name: value.detach().requires_grad_() for name, value in evaluated.columns.items()}
    loss, _ = method.loss(replace(evaluated, columns=columns), rollout)
    (found,) = torch.autograd.grad(loss, columns["logp"])
    return found


@dataclass(frozen=True, eq=False)
class Spread:
    """Mean [D] and variances [D] of gradients of independent batches, and their mean cosine with a direction."""

    mean: Tensor
    variance: Tensor
    cosine: float

    @property
    def total(self) -> float:
        """Trace of the covariance."""
        return float(self.variance.sum())

    @property
    def relative(self) -> float:
        """Trace of the covariance over the squared norm of the mean: noise per signal, whatever the scale."""
        return self.total / max(float(self.mean.square().sum()), 1e-12)


def spread(gradients: Sequence[Tensor], direction: Tensor) -> Spread:
    """Statistics of sampled gradients; a gradient of zero has cosine 0."""
    rows = torch.stack([g.flatten() for g in gradients])
    along = torch.nn.functional.cosine_similarity(rows, direction.flatten()[None], dim=1)
    return Spread(rows.mean(0), rows.var(0), float(along.mean()))


# --- problems ---------------------------------------------------------------------------------------------------


def one_token(space: SequenceSpace, *, prompts: int, chance: float, seed: int, spread: float = 0.5) -> Problem:
    """r = 1 iff the first token is the prompt's target, which the initial policy chooses with probability ``chance``.

    The other logits are normal with standard deviation ``spread``.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (prompts, space.n_nodes, space.vocabulary)
    initial = spread * torch.randn(shape, generator=generator, dtype=torch.float64)
    target = torch.randint(0, space.branching, (prompts,), generator=generator)
    root = initial[:, 0].scatter(1, target[:, None], -torch.inf).log_softmax(-1) + torch.log1p(torch.tensor(-chance))
    initial[:, 0] = root.scatter(1, target[:, None], float(torch.tensor(chance).log()))
    reward = (space.sequences[None, :, 0] == target[:, None]).double()
    return Problem("one-token", space, {"reward": reward}, initial, initial, {}, (8,) * prompts)


def several_right(seed: int) -> Problem:
    """8 prompts; of 36 answers (2 tokens out of 6) a third is right, of unequal prior probability, 0.25 together."""
    space = SequenceSpace(6, 2)
    return problem("binary-verifier", space=space, batch=8, seed=seed, right=1 / 3, pass_rate=0.25, spread=1.0)

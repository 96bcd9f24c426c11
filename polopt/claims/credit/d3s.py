"""D3S: selection by the variance of advantages, relaxed while training (Wang et al. 2025, arXiv:2509.22115).

Design, fixed before the first run. Exact world: 24 prompts with pass rates from 0.02 to 0.98 in equal steps, 5 tokens,
length 4, reward 1 on a random share of the sequences; 8 responses of every prompt per iteration, 100 iterations of one
update each, Adam at rate 0.1. All arms are GRPO with the token mean and differ only in which rollouts and steps train.
D3S goes from a quarter of the rollouts and a fifth of their steps to three quarters and four fifths over the 100
iterations. "Early" is the mean exact reward over the first 30 iterations, "late" the exact reward after the last.

- Random: as many rollouts and steps as D3S at each point of the schedule, drawn uniformly. Early.
- Full: GRPO on everything. Once at equal updates, early; once at equal trained steps: the exact reward after the first
  iteration at which each arm has trained on the steps of five full iterations.
- Fixed: D3S that keeps its first ratios throughout. Late.
- Query: D3S that selects within each query. Early.
- Gradient: norm of the loss gradient of the initial policy with a quarter of the rollouts and all their steps, selected
  against drawn uniformly; logarithm of the ratio of the means over 20 batches.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from polopt.aggregations import TokenMean
from polopt.claims.claim import Claim
from polopt.claims.exact import Run, batch, credited, gradient, start
from polopt.core.method import Method
from polopt.core.part import Stateful
from polopt.core.rollout import Rollout
from polopt.methods.base.grpo import grpo
from polopt.methods.credit.d3s import DualLevel, d3s
from polopt.policies.exact import SequenceSpace
from polopt.tasks.problems import Problem, problem
from polopt.training.budget import Budget

SPACE = SequenceSpace(5, 4)
POOL = tuple(0.02 + 0.96 * i / 23 for i in range(24))
GROUP, ITERATIONS, EARLY = 8, 100, 30
FULL = 24 * GROUP * 4
"""Steps of an iteration."""


@dataclass(frozen=True)
class AtRandom(Stateful):
    """The counts of `DualLevel`, of rollouts and steps drawn uniformly."""

    rollouts: float = 0.25
    steps: float = 0.2
    seed: int = 0
    calls: int = 0

    needs = frozenset({"advantage", "entropy"})
    unit = "batch"
    state = ("calls",)

    def __call__(self, rollout: Rollout) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.calls)
        self.remember(calls=self.calls + 1)
        drawn = torch.randn(rollout.n_trajectories, generator=generator, dtype=torch.float64)
        keys = torch.rand(rollout.n_steps, generator=generator, dtype=torch.float64)
        # A uniform order of rollouts, then a uniform order of their steps, cut where DualLevel cuts.
        chosen = torch.zeros_like(rollout.lengths, dtype=torch.bool)
        count = int(DualLevel(self.rollouts, self.steps).select(rollout).sum())
        chosen[drawn.argsort()[:count]] = True
        open_steps = rollout.spread(chosen) & rollout.mask
        kept = torch.zeros_like(open_steps)
        order = torch.where(open_steps, keys, -1.0).argsort(descending=True)
        kept[order[: math.ceil(self.steps * int(open_steps.sum()))]] = True
        return {"mask": kept}


def arms(seed: int) -> dict[str, Method]:
    """The methods that are compared."""
    return {
        "d3s": d3s,
        "random": d3s | {"weight": AtRandom(seed=seed)},
        "full": grpo | {"aggregation": TokenMean()},
        "fixed": d3s | {"controller": None},
        "query": d3s | {"weight": DualLevel(scope="query")},
    }


def started(made: Problem, method: Method, seed: int) -> tuple[Run, list[float]]:
    """A run whose budget is that of the claim, and the number of steps that each update trained on so far."""
    run = start(made, method, seed=seed, group=GROUP)
    run.trainer.budget = Budget(steps=ITERATIONS)
    trained: list[float] = []
    plain = run.trainer._learn

    def counted(rollout: Rollout) -> dict[str, float]:
        trained.append(rollout.counts.steps)
        return plain(rollout)

    run.trainer._learn = counted  # type: ignore[method-assign]
    return run, trained


def training(seed: int, quick: bool) -> Mapping[str, float]:
    """Early, late and equal-steps reward of every arm."""
    made = problem("binary-verifier", space=SPACE, batch=len(POOL), pass_rate=POOL, seed=seed)
    found: dict[str, float] = {}
    for name, method in arms(seed).items():
        run, trained = started(made, method, seed)
        rewards = []
        for _ in range(2 if quick else ITERATIONS):
            run.step()
            rewards.append(run.reward)
        spent = torch.tensor(trained).cumsum(0)
        reached = int((spent < (1 if quick else 5) * FULL).sum())
        found |= {
            f"{name}/early": sum(rewards[:EARLY]) / len(rewards[:EARLY]),
            f"{name}/late": rewards[-1],
            f"{name}/equal steps": rewards[min(reached, len(rewards) - 1)],
        }
    return found


def norms(seed: int, quick: bool) -> Mapping[str, float]:
    """Logarithm of the mean gradient norm, by how the rollouts are selected."""
    made = problem("binary-verifier", space=SPACE, batch=len(POOL), pass_rate=POOL, seed=seed)
    policy = made.policy()
    weights = {"d3s": DualLevel(steps=1.0), "random": AtRandom(steps=1.0, seed=seed)}
    total = dict.fromkeys(weights, 0.0)
    for number in range(2 if quick else 20):
        rollout = batch(made, policy, seed=1000 * seed + number, sizes=[GROUP])
        for name, weight in weights.items():
            method = d3s | {"weight": weight}
            total[name] += float(gradient(method, policy, credited(method, policy, rollout)).norm())
    return {name: math.log(value) for name, value in total.items()}


_TRAINING = Claim(
    "d3s",
    "random-early",
    "D3S learns faster early on than training on as many rollouts and steps drawn uniformly.",
    "exact",
    "random selection of the same size",
    "mean exact reward over the first 30 iterations",
    "higher",
    "d3s/early",
    "random/early",
    measure=training,
)

CLAIMS = (
    _TRAINING,
    dataclasses.replace(
        _TRAINING,
        name="full-early",
        statement="D3S learns faster early on than GRPO on everything, at equal updates.",
        baseline="grpo, token mean",
        control="full/early",
    ),
    dataclasses.replace(
        _TRAINING,
        name="full-equal-steps",
        statement="D3S is ahead of GRPO on everything at equal trained steps, early on.",
        baseline="grpo, token mean",
        metric="exact reward after training on the steps of five full iterations",
        treatment="d3s/equal steps",
        control="full/equal steps",
    ),
    dataclasses.replace(
        _TRAINING,
        name="schedule-late",
        statement="Relaxing the selection ends higher than selecting as aggressively throughout.",
        baseline="d3s with its first ratios throughout",
        metric="exact reward after 100 iterations",
        treatment="d3s/late",
        control="fixed/late",
    ),
    dataclasses.replace(
        _TRAINING,
        name="across-queries",
        statement="Selecting across queries learns faster early on than selecting within each query.",
        baseline="d3s, scope query",
        control="query/early",
    ),
    Claim(
        "d3s",
        "gradient-norm",
        "Rollouts of largest advantage variance have a larger gradient than rollouts drawn uniformly.",
        "exact",
        "random selection of the same size",
        "log of the mean norm of the loss gradient at the initial policy",
        "higher",
        "d3s",
        "random",
        measure=norms,
    ),
)

"""SPO: a tracked baseline does the work of a group (Xu and Ding 2025, arXiv:2509.13232).

Design, fixed before the first run. Exact world: 4 tokens, length 3, prompts with pass rates from 0.02 to 0.98 in equal
steps, reward 1 on a random quarter of the sequences; one update per rollout in every arm. No offline rollouts: every
prompt starts at alpha = beta = 1/2, so that arms have drawn equally much. SGD at rate 20: prompts have parameters of
their own here, and Adam would give a prompt a full step per visit, however few rollouts the visit had.

- Variance: 64 prompts, 32 rollouts per batch. After 40 iterations of SPO the policy and the tracker are frozen; 200
  batches of 32 prompts x 1, all prompts equally likely, credited by SPO, by the reward alone and by the reward minus
  the batch mean, and 200 of 4 prompts x 8 credited by GRPO. Logarithm of tr Cov(g) / |E g|^2, each in units of its own
  mean gradient; |E g|^2 is that of the mean of the batches less tr Cov / 200, its bias. "Near GRPO's or lower": no more
  than a tenth more.
- Success and zero advantages: 256 prompts, 64 rollouts per iteration (GRPO 8 x 8), 80 iterations: exact expected reward
  over all prompts at the end; share of the rollouts with an advantage of 0, mean of the iterations.
- Prioritised sampling: the same runs, SPO against SPO with all weights (nearly) equal.
- Adaptive forgetting: 64 prompts, 32 rollouts per iteration, 100 iterations of SPO with equal weights, the rate
  changing between 20 and 0.2 every 25 iterations. Three trackers see the same rollouts: rho adaptive, fixed at 0.875
  (rho_min), fixed at 0.96 (rho_max). Mean over iterations and prompts of |v - V|, V the exact success rate after the
  update.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from polopt.claims.claim import Claim
from polopt.claims.exact import Run, credited, gradient, scored, start, with_updates
from polopt.core.method import Method
from polopt.core.part import Evaluate, with_settings
from polopt.core.policy import Request
from polopt.core.rollout import Rollout
from polopt.methods.base.grpo import grpo
from polopt.methods.base.reinforce import BatchBaseline
from polopt.methods.credit.spo_single_stream import ValueTracker, spo
from polopt.policies.exact import SequenceSpace, enumeration
from polopt.rollouts.groups import Groups
from polopt.tasks.problems import Problem, problem

SPACE = SequenceSpace(4, 3)
GROUP = 8
EQUAL: Final = 1e6
"""A bonus beside which differences of weights vanish."""
FAST, SLOW, PHASE = 20.0, 0.2, 25

one_update = with_updates(spo, 1)
unprioritised = one_update | {"curriculum": ValueTracker(explore=EQUAL)}


def _problem(count: int, seed: int) -> Problem:
    rates = [0.02 + 0.96 * i / (count - 1) for i in range(count)]
    return problem("binary-verifier", space=SPACE, batch=count, pass_rate=rates, seed=seed)


def _noise(gradients: Sequence[Tensor]) -> float:
    """log tr Cov(g) / |E g|^2."""
    rows = torch.stack([found.flatten() for found in gradients])
    total = float(rows.var(0).sum())
    signal = float(rows.mean(0).square().sum()) - total / len(rows)
    return math.log(total / max(signal, 1e-12))


def variance(seed: int, quick: bool) -> Mapping[str, float]:
    """Noise of a batch's gradient per signal, by the baseline."""
    made = _problem(64, seed)
    run = start(made, one_update, seed=seed, group=GROUP, prompts=4, optimizer="sgd")
    for _ in range(3 if quick else 40):
        run.step()
    tracker = with_settings(run.trainer.method.curriculum, {"explore": EQUAL})
    policy, generator = run.policy, torch.Generator().manual_seed(seed)
    singles: dict[str, Method] = {
        "spo": one_update,
        "none": one_update | {"advantage": BatchBaseline(baseline="none")},
        "batch mean": one_update | {"advantage": BatchBaseline(baseline="mean")},
    }
    found: dict[str, list[Tensor]] = {name: [] for name in (*singles, "grpo")}
    for number in range(5 if quick else 200):
        drawn = tracker(made.examples(), prompts=32, group=1, generator=generator)
        alone = scored(made, Groups()(policy, drawn, limit=SPACE.length, seed=2 * number))
        for name, method in singles.items():
            found[name].append(gradient(method, policy, credited(method, policy, alone)))
        some = [Request(request.example, GROUP) for request in drawn[: 32 // GROUP]]
        together = scored(made, Groups()(policy, some, limit=SPACE.length, seed=2 * number + 1))
        found["grpo"].append(gradient(grpo, policy, credited(grpo, policy, together)))
    return {name: _noise(gradients) for name, gradients in found.items()}


def training(seed: int, quick: bool) -> Mapping[str, float]:
    """Exact success after training, and the share of the rollouts that taught nothing."""
    made = _problem(256, seed)
    arms = {"spo": one_update, "grpo": with_updates(grpo, 1), "equal weights": unprioritised}
    found: dict[str, float] = {}
    for name, method in arms.items():
        run = start(made, method, seed=seed, group=GROUP, prompts=8, optimizer="sgd")
        silent = _silent(run)
        for _ in range(2 if quick else 80):
            run.step()
        found |= {f"{name}/success": run.reward, f"{name}/silent": sum(silent) / len(silent)}
    return found


def _silent(run: Run) -> list[float]:
    """Filled as the run goes on: the share of each batch's rollouts with an advantage of 0."""
    collect: Any = run.trainer.collect
    shares: list[float] = []

    def watched(*arguments: Any) -> Any:
        batch = collect(*arguments)
        advantage = run.trainer.method.credit(batch.kept).advantage
        shares.append(float((batch.kept.mean_steps(advantage) == 0).double().mean()))
        return batch

    run.trainer.collect = watched  # type: ignore[assignment]
    return shares


@dataclass(frozen=True)
class _Watched(ValueTracker):
    """A tracker with others beside it that see the same rollouts."""

    others: tuple[ValueTracker, ...] = ()

    def observe(self, rollout: Rollout, evaluate: Evaluate) -> None:
        super().observe(rollout, evaluate)
        for other in self.others:
            other.observe(rollout, evaluate)


def tracking(seed: int, quick: bool) -> Mapping[str, float]:
    """Mean error of three trackers under a rate that changes."""
    made = _problem(64, seed)
    fixed = {"rho 0.875": ValueTracker(rho_max=0.875), "rho 0.96": ValueTracker(rho_min=0.96)}
    watched = _Watched(explore=EQUAL, others=tuple(fixed.values()))
    run = start(made, one_update | {"curriculum": watched}, seed=seed, group=GROUP, prompts=4, optimizer="sgd")
    names, examples = ("adaptive", *fixed), made.examples()
    errors: dict[str, list[float]] = {name: [] for name in names}
    phase = 2 if quick else PHASE
    for iteration in range(4 * phase):
        rate = FAST if iteration // phase % 2 == 0 else SLOW
        run.trainer.optimization = replace(run.trainer.optimization, lr=rate)
        run.step()
        with torch.no_grad():
            truth = enumeration.expected_reward(run.policy, made.reward)
        part = run.trainer.method.curriculum
        for name, tracker in zip(names, (part, *part.others), strict=True):
            alpha, beta = torch.tensor([tracker.belief(example) for example in examples], dtype=torch.float64).T
            errors[name].append(float((alpha / (alpha + beta) - truth).abs().mean()))
    return {name: sum(values) / len(values) for name, values in errors.items()}


CLAIMS = (
    Claim(
        "spo-single-stream",
        "variance-none",
        "The gradient of single rollouts with a tracked baseline is less noisy than that without a baseline.",
        "exact",
        "single rollouts, no baseline",
        "log of the gradient's variance over its squared mean",
        "lower",
        "spo",
        "none",
        measure=variance,
    ),
    Claim(
        "spo-single-stream",
        "variance-batch-mean",
        "The gradient of single rollouts with a tracked baseline is less noisy than that with the batch mean.",
        "exact",
        "single rollouts, batch mean",
        "log of the gradient's variance over its squared mean",
        "lower",
        "spo",
        "batch mean",
        measure=variance,
    ),
    Claim(
        "spo-single-stream",
        "variance-grpo",
        "The gradient of single rollouts with a tracked baseline is no noisier than GRPO's.",
        "exact",
        "grpo, as many rollouts in groups of 8",
        "log of the gradient's variance over its squared mean",
        "lower",
        "spo",
        "grpo",
        margin=0.1,
        measure=variance,
    ),
    Claim(
        "spo-single-stream",
        "zero-advantage",
        "Fewer rollouts teach nothing than in groups, some of which are all right or all wrong.",
        "exact",
        "grpo, groups of 8",
        "share of the rollouts with an advantage of 0",
        "lower",
        "spo/silent",
        "grpo/silent",
        measure=training,
    ),
    Claim(
        "spo-single-stream",
        "success",
        "SPO reaches a higher success rate than GRPO after equally many rollouts.",
        "exact",
        "grpo, groups of 8",
        "exact expected reward after 5,120 rollouts",
        "higher",
        "spo/success",
        "grpo/success",
        measure=training,
    ),
    Claim(
        "spo-single-stream",
        "prioritised",
        "Drawing prompts by their uncertainty reaches a higher success rate than drawing all equally often.",
        "exact",
        "spo with equal weights",
        "exact expected reward after 5,120 rollouts",
        "higher",
        "spo/success",
        "equal weights/success",
        measure=training,
    ),
    Claim(
        "spo-single-stream",
        "adaptive-fast",
        "Forgetting by the drift tracks success rates better than always forgetting at the largest rate.",
        "exact",
        "rho fixed at 0.875",
        "mean |v - V| under a changing learning rate",
        "lower",
        "adaptive",
        "rho 0.875",
        measure=tracking,
    ),
    Claim(
        "spo-single-stream",
        "adaptive-slow",
        "Forgetting by the drift tracks success rates better than always forgetting at the smallest rate.",
        "exact",
        "rho fixed at 0.96",
        "mean |v - V| under a changing learning rate",
        "lower",
        "adaptive",
        "rho 0.96",
        measure=tracking,
    ),
    Claim(
        "spo-single-stream",
        "throughput",
        "Without groups nobody waits for the slowest member of one, which speeds up rollouts of very unequal length.",
        "exact",
        "grpo, groups of 8",
        "rollouts per second",
        "higher",
        untestable="rollouts here are drawn on one machine in one batch: groups wait for nobody, whatever their sizes",
    ),
)

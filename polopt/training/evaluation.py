"""Held-out evaluation: mean accuracy with its interval, pass@k, reward, entropy, lengths."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from polopt.core.example import Example
from polopt.core.loss import Evaluation
from polopt.core.method import Method
from polopt.core.policy import Policy, Request
from polopt.core.rollout import Rollout
from polopt.core.statistics import accuracy_interval, clustered_mean_interval, pass_at_k
from polopt.rewards.scoring import Scorer, transcripts
from polopt.rollouts.groups import Groups
from polopt.training import metrics_names as names
from polopt.training.collect import provides
from polopt.training.profile import Profiler
from polopt.training.report import Sample
from polopt.training.update import evaluate_columns


@dataclass(frozen=True)
class Evaluator:
    """Samples the policy on held-out prompts and scores the answers.

    ``samples`` per prompt are drawn by the rollout part ``draw``, at most ``limit`` steps each; the accuracy is the
    mean of the first reward (``primary``), prompts counting equally. With one right-or-wrong sample per prompt the
    interval is Wilson's, else Student's over prompts.
    """

    examples: Sequence[Example]
    scorer: Scorer
    draw: Groups
    limit: int
    samples: int = 1
    seed: int = 0

    @property
    def primary(self) -> str:
        """Name of the reward that is the accuracy."""
        return self.scorer.rewards[0].name

    def __call__(
        self, policy: Policy, *, prompts: int | None = None, progress: Callable[[int, int], None] | None = None
    ) -> tuple[dict[str, float], Rollout]:
        """Metrics by name (prefix ``eval/``), and the scored rollout. Draws nothing from the run's random numbers."""
        requests = [Request(example, self.samples) for example in self.examples[:prompts]]
        rollout = self.draw(policy, requests, limit=self.limit, seed=self.seed, progress=progress)
        rollout, _ = self.scorer(rollout)
        return {f"{names.EVAL}{name}": value for name, value in self._metrics(rollout).items()}, rollout

    def _metrics(self, rollout: Rollout) -> dict[str, float]:
        hit = rollout.rewards[self.primary]
        interval = clustered_mean_interval(hit, rollout.group)
        metrics = {names.ACCURACY: interval.mean}
        if math.isfinite(interval.low):
            metrics |= {names.ACCURACY_LOW: interval.low, names.ACCURACY_HIGH: interval.high}
        binary = bool(((hit == 0) | (hit == 1) | hit.isnan()).all())
        if binary and self.samples == 1 and interval.count:
            low, high = accuracy_interval(int(hit.nansum()), interval.count)
            metrics |= {names.ACCURACY_LOW: low, names.ACCURACY_HIGH: high}
        if binary and self.samples > 1:
            for k in (2**i for i in range(self.samples.bit_length())):
                if k <= self.samples:
                    metrics[names.pass_at(k)] = self._pass_at(rollout, hit, k)
        metrics["prompts"] = float(interval.count)
        metrics[names.REWARD] = float(rollout.reward.nanmean())
        metrics[names.MEAN_LENGTH] = float(rollout.lengths.float().mean())
        if "entropy" in rollout and bool(rollout.mask.any()):
            metrics[names.ENTROPY] = float(rollout["entropy"][rollout.mask].mean())
        return metrics

    @staticmethod
    def _pass_at(rollout: Rollout, hit: torch.Tensor, k: int) -> float:
        counts = rollout.group_count(hit)
        right = (rollout.group_mean(hit) * counts).round()
        rates = [pass_at_k(int(n), int(c), k) for n, c in zip(counts.tolist(), right.tolist(), strict=True) if n >= k]
        return sum(rates) / len(rates) if rates else math.nan


@dataclass(frozen=True)
class LossEvaluator:
    """Held-out answers of a data set that no reward judges: the method's own loss and metrics on them, no gradient.

    The accuracy, of a method that logs one, is how often the implicit reward prefers what the labels prefer. Of pairs
    its interval is Wilson's; several pairs of one prompt are not independent, and have none.
    """

    examples: Sequence[Example]
    method: Method
    limit: int
    token_budget: int

    def __call__(
        self, policy: Policy, *, prompts: int | None = None, progress: Callable[[int, int], None] | None = None
    ) -> tuple[dict[str, float], Rollout]:
        """Metrics by name (prefix ``eval/``), and the answers. Draws nothing from the run's random numbers."""
        method = self.method.clone()
        requests = [Request(example, 1) for example in self.examples[:prompts]]
        rollout = method.rollout(policy, requests, limit=self.limit, seed=0, progress=progress)

        def evaluated(names: Iterable[str]) -> Rollout:
            return evaluate_columns(policy, rollout, frozenset(names), self.token_budget, Profiler(enabled=False))

        rollout = evaluated(n for n in method.needs if n not in rollout and provides(policy, n))
        rollout = method.credit(method.shape_reward(rollout))
        found = evaluated(method.evaluates)
        with torch.no_grad():
            loss, metrics = method.loss(Evaluation({name: found[name] for name in method.evaluates}), rollout)
        described = {name: float(value) for name, value in {names.LOSS: loss, **metrics}.items()}
        if names.REWARD_ACCURACY in metrics:
            described |= self._accuracy(described[names.REWARD_ACCURACY], rollout)
        described |= {"prompts": float(len(requests)), names.MEAN_LENGTH: float(rollout.lengths.float().mean())}
        return {f"{names.EVAL}{name}": value for name, value in described.items()}, rollout

    @staticmethod
    def _accuracy(accuracy: float, rollout: Rollout) -> dict[str, float]:
        right, pairs = accuracy * rollout.n_groups, bool((torch.bincount(rollout.group) == 2).all())
        # A tie counts one half.
        if not pairs or not rollout.n_groups or not math.isclose(right, round(right), abs_tol=1e-3):
            return {names.ACCURACY: accuracy}
        low, high = accuracy_interval(round(right), rollout.n_groups)
        return {names.ACCURACY: accuracy, names.ACCURACY_LOW: low, names.ACCURACY_HIGH: high}


def samples_of(rollout: Rollout) -> list[Sample]:
    """Completions to read, with their prompt and total reward; none where nothing judged them."""
    if "reward" not in rollout:
        return []

    def plain(text: object) -> str:
        return text if isinstance(text, str) else "\n".join(f"{m['role']}: {m['content']}" for m in text)  # type: ignore[attr-defined]

    rewards = rollout.reward.tolist()
    return [
        Sample(plain(t.prompt), t.completion, reward) for t, reward in zip(transcripts(rollout), rewards, strict=True)
    ]

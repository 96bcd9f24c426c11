"""From prompts to a scored, filtered rollout ready for credit assignment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from polopt.core.example import Example
from polopt.core.method import Method
from polopt.core.part import declared
from polopt.core.policy import Policy
from polopt.core.rollout import Rollout, Source
from polopt.rewards.reward import InvalidReward
from polopt.rewards.scoring import Scorer
from polopt.training.profile import Profiler
from polopt.training.update import SCORE_NORM, evaluate_columns


@dataclass(frozen=True)
class Collected:
    """A batch: ``kept`` trains (None when no group was informative), ``drawn`` is all that was sampled for it."""

    kept: Rollout | None
    drawn: Rollout
    invalid: tuple[InvalidReward, ...]

    @property
    def answers(self) -> Rollout:
        """What was drawn without probes, which were sampled to learn what a state is worth."""
        if "source" not in self.drawn or not bool((self.drawn["source"] == Source.PROBE).any()):
            return self.drawn
        return self.drawn.select(self.drawn["source"] != Source.PROBE)


@dataclass(frozen=True)
class Collector:
    """Draws prompts, samples, scores, shapes and filters until the batch has as many groups as one draw gives.

    A filter with a field ``rounds`` may be refilled that many times; others get one round.
    """

    policy: Policy
    pool: Sequence[Example]
    scorer: Scorer
    prompts: int
    group: int
    limit: int
    token_budget: int
    profiler: Profiler

    def __call__(
        self,
        method: Method,
        generator: torch.Generator,
        progress: Callable[[int, int], None] | None = None,
    ) -> Collected:
        """One batch by the method's parts; every random choice comes from ``generator``."""
        drawn: list[Rollout] = []
        kept: list[Rollout] = []
        invalid: list[InvalidReward] = []
        groups = full = 0
        for _ in range(max(1, getattr(method.filter, "rounds", 1))):
            rollout, failures = self._sample(method, generator, progress)
            invalid += failures
            drawn.append(rollout)
            # One draw of the curriculum fills a batch: it may turn prompts x group into as many groups of one.
            full = drawn[0].n_groups
            rollout = rollout if method.filter is None else method.filter(rollout)
            if rollout.n_trajectories:
                kept.append(rollout)
                groups += rollout.n_groups
            if groups >= full:
                break
        batch = Rollout.concat(kept) if kept else None
        if batch is not None and batch.n_groups > full:
            batch = batch.select(batch.group < full)
        if batch is not None:
            batch = self._evaluated(method, batch, ("advantage", "weight", "objective", "regularizer", "aggregation"))
            if "logp" in method.needs and not self.policy.exact_sampler:
                batch = self._recomputed(batch)
        return Collected(batch, Rollout.concat(drawn), tuple(invalid))

    def _sample(
        self, method: Method, generator: torch.Generator, progress: Callable[[int, int], None] | None
    ) -> tuple[Rollout, tuple[InvalidReward, ...]]:
        requests = method.curriculum(self.pool, prompts=self.prompts, group=self.group, generator=generator)
        seed = int(torch.randint(2**62, (), generator=generator))
        with self.profiler.phase("sample"):
            rollout = method.rollout(self.policy, requests, limit=self.limit, seed=seed, progress=progress)
        with self.profiler.phase("reward"):
            rollout, invalid = self.scorer(rollout)
        rollout = self._evaluated(method, rollout, ("reward", "filter"))
        return method.shape_reward(rollout), invalid

    def _evaluated(self, method: Method, rollout: Rollout, slots: Sequence[str]) -> Rollout:
        """With the policy's columns (critic values, reference log-probs, ...) that the parts in these slots need."""
        needs = frozenset().union(*(declared(getattr(method, slot), "needs") for slot in slots))
        missing = frozenset(name for name in needs if name not in rollout and provides(self.policy, name))
        return evaluate_columns(self.policy, rollout, missing, self.token_budget, self.profiler)

    def _recomputed(self, rollout: Rollout) -> Rollout:
        """With the learner's own log-probs as ``logp``, the sampler's kept as ``logp/sampler``.

        In half precision the two differ by more than the trust regions of some objectives; a ratio must start at 1.
        """
        sampled = rollout["logp"]
        again = evaluate_columns(self.policy, rollout, frozenset({"logp"}), self.token_budget, self.profiler)
        return again.with_columns(step={"logp/sampler": sampled})


def provides(policy: Policy, name: str) -> bool:
    """Whether `evaluate_columns` gives a column of that name for this policy."""
    return name == SCORE_NORM or bool({name, f"{name.partition('/')[0]}/*"} & policy.columns)

"""From prompts to a scored, filtered rollout ready for credit assignment, at once or some updates later."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, Self

import torch

from polopt.core.example import Example
from polopt.core.method import Method
from polopt.core.part import declared
from polopt.core.policy import MASKED, START, Policy, pattern
from polopt.core.rollout import Rollout, Source
from polopt.rewards.reward import InvalidReward
from polopt.rewards.scoring import Scorer
from polopt.training.profile import Profiler
from polopt.training.update import SCORE_NORM, evaluate_columns

CREDIT: Final = ("advantage", "weight", "objective", "regularizer", "aggregation", "update")
"""Slots whose columns are those of the policy that learns."""


@dataclass(frozen=True)
class Collected:
    """A batch: ``kept`` trains (None when no group was informative), ``drawn`` is all that was sampled for it.

    ``tokens`` and ``rollouts`` were sampled when the batch was asked for: its own, and those of other batches where the
    queue of a `Collector` is filled.
    """

    kept: Rollout | None
    drawn: Rollout
    invalid: tuple[InvalidReward, ...]
    tokens: int = 0
    rollouts: int = 0

    @property
    def answers(self) -> Rollout:
        """What was drawn as the policy answers; there may be nothing.

        Left out are probes, which were sampled to learn what a state is worth, what was drawn at another temperature
        beside it, the answers of opponents, what is replayed and what is unfinished.
        """
        aside = torch.zeros_like(self.drawn.lengths, dtype=torch.bool)
        if "source" in self.drawn:
            source = self.drawn["source"]
            others = (Source.PROBE, Source.TEMPERED, Source.OPPONENT, Source.REPLAY)
            aside = torch.isin(source, torch.tensor(others, device=source.device))
        if "unfinished" in self.drawn:
            aside = aside | self.drawn["unfinished"].bool()
        return self.drawn.select(~aside) if bool(aside.any()) else self.drawn

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint can hold, for `from_state`."""
        return {
            "kept": None if self.kept is None else self.kept.state_dict(),
            "drawn": self.drawn.state_dict(),
            "invalid": [asdict(failure) for failure in self.invalid],
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: torch.device) -> Self:
        """The batch that was saved, its columns on a device."""
        kept = None if state["kept"] is None else Rollout.from_state(state["kept"]).to(device)
        invalid = tuple(InvalidReward(**failure) for failure in state["invalid"])
        return cls(kept, Rollout.from_state(state["drawn"]).to(device), invalid)


@dataclass(frozen=True)
class Collector:
    """Draws prompts, samples, scores, shapes and filters until the batch has as many groups as one draw gives.

    A filter with a field ``rounds`` may be refilled that many times; others get one round.

    With ``stale`` = K a batch is handed out ceil(K / U) batches after it was sampled, U the updates that the method's
    schedule makes on each: its first update comes at least K updates after its sampling (fewer only where updates were
    left out), as where sampling runs ahead of learning. The first call samples the batches ``in_flight`` too, so that
    every call hands one out: the first K updates train on what the initial policy sampled, at age 0, U, 2 U, ...
    Log-probs, rewards and filters are those of the time of sampling; the other columns that credit and loss need are
    the policy's when the batch is handed out.
    """

    policy: Policy
    pool: Sequence[Example]
    scorer: Scorer
    prompts: int
    group: int
    limit: int
    token_budget: int
    profiler: Profiler
    stale: int = 0
    in_flight: list[Collected] = field(default_factory=list)

    def __call__(
        self,
        method: Method,
        generator: torch.Generator,
        progress: Callable[[int, int], None] | None = None,
    ) -> Collected:
        """One batch by the method's parts; every random choice comes from ``generator``."""
        ahead = math.ceil(self.stale / (method.schedule.epochs * method.schedule.minibatches))
        tokens = rollouts = 0
        while True:
            sampled = self._sampled(method, generator, progress)
            new = _without(sampled.drawn, Source.REPLAY)
            # What goes on from an earlier iteration was counted there.
            tokens += new.n_steps - (int(new["before"].sum()) if "before" in new else 0)
            rollouts += int((new["before"] == 0).sum()) if "before" in new else new.n_trajectories
            self.in_flight.append(sampled)
            if len(self.in_flight) > ahead:
                break
        batch = self.in_flight.pop(0)
        kept = batch.kept
        if kept is not None:
            kept = self._evaluated(method, kept, CREDIT)
        return replace(batch, kept=kept, tokens=tokens, rollouts=rollouts)

    def _sampled(
        self, method: Method, generator: torch.Generator, progress: Callable[[int, int], None] | None
    ) -> Collected:
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
        # What one draw gives stays whole: a filter may make several groups of one.
        if batch is not None and len(kept) > 1 and batch.n_groups > full:
            batch = batch.select(batch.group < full)
        known = batch is not None and "logp" in batch
        if batch is not None and known and "logp" in method.needs and not self.policy.exact_sampler:
            batch = self._recomputed(method, batch)
        return Collected(batch, Rollout.concat(drawn), tuple(invalid))

    def _sample(
        self, method: Method, generator: torch.Generator, progress: Callable[[int, int], None] | None
    ) -> tuple[Rollout, tuple[InvalidReward, ...]]:
        requests = method.curriculum(self.pool, prompts=self.prompts, group=self.group, generator=generator)
        seed = int(torch.randint(2**62, (), generator=generator))
        with self.profiler.phase("sample"):
            rollout = method.rollout(self.policy, requests, limit=self.limit, seed=seed, progress=progress)
        invalid: tuple[InvalidReward, ...] = ()
        if self.scorer.rewards and judged(method):
            with self.profiler.phase("reward"):
                rollout, invalid = self.scorer(rollout)
        rollout = self._evaluated(method, rollout, ("reward", "filter"))
        return method.shape_reward(rollout), invalid

    def _evaluated(self, method: Method, rollout: Rollout, slots: Sequence[str]) -> Rollout:
        """With the policy's columns (critic values, reference log-probs, ...) that the parts in these slots need."""
        needs = frozenset().union(*(declared(getattr(method, slot), "needs") for slot in slots))
        missing = frozenset(name for name in needs if name not in rollout and provides(self.policy, name))
        return evaluate_columns(self.policy, rollout, missing, self.token_budget, self.profiler)

    def _recomputed(self, method: Method, rollout: Rollout) -> Rollout:
        """With the learner's own log-probs as ``logp``, the sampler's kept as ``logp/sampler``; and `MASKED` likewise.

        In half precision the two differ by more than the trust regions of some objectives; a ratio must start at 1.
        What is replayed was sampled by other weights, and keeps their log-probs.
        """
        names = frozenset({"logp"}) | (MASKED & method.needs)
        again = evaluate_columns(self.policy, rollout, names, self.token_budget, self.profiler)
        replayed = rollout.spread(rollout["source"] == Source.REPLAY)
        kept = {n: torch.where(replayed, rollout[n], again[n]) for n in names if n in rollout}
        return again.with_columns(step={**kept, "logp/sampler": rollout["logp"]})


def _without(rollout: Rollout, *sources: Source) -> Rollout:
    if "source" not in rollout:
        return rollout
    out = torch.isin(rollout["source"], torch.tensor(sources, device=rollout.device))
    return rollout.select(~out) if bool(out.any()) else rollout


def judged(method: Method) -> bool:
    """Whether the method's trajectories are scored by reward functions: all that are sampled, so that the log can tell,
    and answers from a data set where some part needs a reward.
    """
    rewards = ("reward", "score", "reward/")
    return not method.offline or any(name in rewards[:2] or name.startswith(rewards[2]) for name in method.needs)


def provides(policy: Policy, name: str) -> bool:
    """Whether `evaluate_columns` gives a column of that name for this policy."""
    return name in (SCORE_NORM, START) or bool({pattern(name), f"{name.partition('/')[0]}/*"} & policy.columns)

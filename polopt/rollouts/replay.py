"""Fresh groups mixed with groups of recent iterations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from polopt.core.errors import UsageError
from polopt.core.part import Evaluate, Stateful, part
from polopt.core.policy import Policy, Request
from polopt.core.rollout import Rollout, Source
from polopt.rollouts.groups import Groups


@part("rollout", "replay")
@dataclass(frozen=True)
class Replay(Groups, Stateful):
    """A ``share`` p of the batch's groups comes from the last ``window`` iterations; the others are sampled.

    Of G requests round(p G) are not sampled, the last ones, as far as there are groups to replay and never all. As many
    groups are drawn instead, uniformly and without replacement. A replayed group is whole, so that any credit within a
    group is what it was: actions, ``logp`` of the policy that sampled them, ``version`` and the task's rewards stay,
    ``source`` is `Source.REPLAY`. Its rewards are not computed again; what a method shapes, weighs or evaluates is,
    among the groups of the new batch. Budgets, curricula and logs count fresh trajectories alone.

    State: the groups of the last ``window`` iterations, dropped where the share is 0. Raises UsageError for a share
    outside [0, 1] or a window below 1.
    """

    share: float = 0.4
    window: int = 2
    past: Rollout | None = field(default=None, init=False, compare=False)

    state = ("past",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 <= self.share <= 1 and self.window >= 1):
            raise UsageError(
                f"replay needs a share in [0, 1] and a window of at least 1, got {self.share}, {self.window}"
            )

    def __call__(
        self,
        policy: Policy,
        requests: Sequence[Request],
        *,
        limit: int,
        seed: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> Rollout:
        asked = [request for request in requests if request.count]
        kept = 0 if self.past is None else self.past.n_groups
        count = min(math.floor(self.share * len(asked) + 0.5), kept, len(asked) - 1)
        if self.past is None or count < 1:
            return super().__call__(policy, requests, limit=limit, seed=seed, progress=progress)
        fresh = super().__call__(policy, asked[: len(asked) - count], limit=limit, seed=seed, progress=progress)
        drawn = torch.randperm(kept, generator=torch.Generator().manual_seed(seed))[:count]
        past = self.past.select(torch.isin(self.past.group, drawn)).to(fresh.device)
        known = {name: past[name] for name in past.names() if name.startswith("reward/") or name == "score"}
        columns = {name: past[name] for name in fresh.columns["trajectory"]} | known
        columns["source"] = torch.full_like(past.lengths, int(Source.REPLAY))
        steps = {name: past[name] for name in fresh.columns["step"]}
        old = type(past)(past.lengths, past.group, {"step": steps, "trajectory": columns}, past.payload)
        # Not yet known: the scorer leaves alone what is replayed.
        blank = {name: value.new_full((fresh.n_trajectories,), math.nan) for name, value in known.items()}
        return Rollout.concat([fresh.with_columns(trajectory=blank), old])

    def observe(self, rollout: Rollout, evaluate: Evaluate) -> None:
        """Keep the groups of this iteration, forget those that are too old."""
        if not self.share:
            self.remember(past=None)
            return
        new = rollout.to("cpu")
        new = new.with_columns(trajectory={"iterations_ago": torch.ones_like(new.lengths)})
        if self.past is None:
            self.remember(past=new)
            return
        older = self.past.with_columns(trajectory={"iterations_ago": self.past["iterations_ago"] + 1})
        older = older.select(older["iterations_ago"] <= self.window)
        self.remember(past=Rollout.concat([new, older]) if older.n_trajectories else new)

"""Answers of the policy beside known ones, and beside those of earlier iterations."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from polopt.core.errors import UsageError
from polopt.core.example import answers_of
from polopt.core.part import Evaluate, Stateful, part
from polopt.core.policy import Policy, Request, Sampling
from polopt.core.rollout import Rollout, Source
from polopt.rollouts.groups import Groups, requested

STEPS = ("action", "mask")
"""Step columns of what was written and of what was sampled alike."""


@part("rollout", "batched")
@dataclass(frozen=True)
class Batched(Groups, Stateful):
    """Groups of the policy's answers, one gold answer in each, and groups of earlier iterations beside them.

    The gold answer is the best that the example brings (`polopt.core.example.answers_of`), if it brings one; with
    ``gold`` false there is none. Trajectory column ``gold`` [M], true for it; its ``source`` is DEMONSTRATION. Beside G
    new groups floor(``history`` G) of the iteration before come again, half as many of the one before that, and so on,
    drawn uniformly: nothing in them is sampled or judged again, their ``source`` is REPLAY. Step columns are ``action``
    and ``mask``: gold answers have no sampler. ``end`` ends them as the policy ends its own.

    State: the groups of iterations that may come again. Raises UsageError for a ``history`` outside [0, 1].
    """

    gold: bool = True
    history: float = 0.3
    end: bool = True
    past: Rollout | None = field(default=None, init=False, compare=False)

    gives = frozenset({"limit", "gold"})
    offline = True
    form = "demonstrations"
    state = ("past",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.history <= 1:
            raise UsageError(f"history is {self.history}; it must be a share of the new groups, in [0, 1]")

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
        fresh = _plain(super().__call__(policy, asked, limit=limit, seed=seed, progress=progress))
        fresh = fresh.with_columns(trajectory={"gold": torch.zeros_like(fresh["truncated"])})
        best = [max(answers_of(r.example), key=lambda answer: answer[1], default=None) for r in asked]
        known = [(place, answer[0]) for place, answer in enumerate(best) if answer is not None and self.gold]
        if known:
            wanted = [asked[place] for place, _ in known]
            written = _plain(policy.write(wanted, [text for _, text in known], end=self.end))
            owner = torch.arange(len(known), device=written.device)
            columns = {
                "gold": torch.ones_like(written["truncated"]),
                "source": torch.full_like(written["source"], int(Source.DEMONSTRATION)),
                "limit": torch.full_like(written.lengths, limit),
                **requested(wanted, owner, fresh["limit"].float()),
            }
            written = written.with_columns(trajectory=columns)
            place = torch.tensor([place for place, _ in known], device=fresh.device)
            fresh = Rollout.concat([fresh, written], torch.cat([fresh.group, place.to(fresh.group)]))
        return self._with_history(fresh, seed)

    def _with_history(self, fresh: Rollout, seed: int) -> Rollout:
        if self.past is None:
            return fresh
        generator, chosen = torch.Generator().manual_seed(seed), []
        age = self.past["iterations_ago"]
        for back in range(1, int(age.max()) + 1):
            groups = torch.unique(self.past.group[age == back])
            count = min(self._share(fresh.n_groups, back), len(groups))
            chosen.append(groups[torch.randperm(len(groups), generator=generator)[:count]])
        again = self.past.select(torch.isin(self.past.group, torch.cat(chosen)))
        if not again.n_trajectories:
            return fresh
        names = [name for name in again.names() if name.startswith("reward/") or name == "score"]
        columns = {name: again[name] for name in (*fresh.columns["trajectory"], *names)}
        columns["source"] = torch.full_like(again.lengths, int(Source.REPLAY))
        steps = {name: again[name] for name in STEPS}
        old = Rollout(again.lengths, again.group, {"step": steps, "trajectory": columns}, again.payload)
        # Not yet known: the scorer leaves alone what is replayed.
        blank = {name: again[name].new_full((fresh.n_trajectories,), math.nan) for name in names}
        return Rollout.concat([fresh.with_columns(trajectory=blank), old.to(fresh.device)])

    def _share(self, groups: int, back: int) -> int:
        return math.floor(self.history * groups * 0.5 ** (back - 1) + 1e-9)

    def on_policy(self) -> Mapping[str, Any]:
        """Slots that do without gold answers and history: groups of the policy's answers, drawn alike."""
        return {
            "rollout": Groups(**{option.name: getattr(self, option.name) for option in dataclasses.fields(Sampling)})
        }

    def observe(self, rollout: Rollout, evaluate: Evaluate) -> None:
        """Keep the groups of this iteration, forget those that cannot come again."""
        new = rollout.to("cpu")
        new = new.with_columns(trajectory={"iterations_ago": torch.ones_like(new.lengths)})
        kept = [new] if self._share(new.n_groups, 1) else []
        if self.past is not None and kept:
            older = self.past.with_columns(trajectory={"iterations_ago": self.past["iterations_ago"] + 1})
            alive = [back for back in range(2, 64) if self._share(new.n_groups, back)]
            older = older.select(torch.isin(older["iterations_ago"], torch.tensor(alive)))
            kept += [older] if older.n_trajectories else []
        self.remember(past=Rollout.concat(kept) if kept else None)


def _plain(rollout: Rollout) -> Rollout:
    """Without what only a sampler knows."""
    steps = {name: rollout[name] for name in STEPS}
    return dataclasses.replace(rollout, columns={**rollout.columns, "step": steps})

"""Trajectories that are sampled a window at a time and go on in the next iteration where they have not ended."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch

from polopt.core.errors import UsageError
from polopt.core.part import Stateful, part
from polopt.core.policy import Policy, Request
from polopt.core.rollout import Rollout
from polopt.rewards.scoring import transcripts
from polopt.rollouts.groups import Groups

_OF_THE_ITERATION: Final = frozenset({"mask/critic", "before", "unfinished"})
"""Columns that say where a trajectory stands; the next window makes them anew."""


@part("rollout", "windows")
@dataclass(frozen=True)
class Windows(Groups, Stateful):
    """As many slots as the requests ask for trajectories; each takes at most ``window`` steps in an iteration.

    A slot whose trajectory ended gets a new one: the first of each request, then the second of each, as far as there
    are free slots; the rest of the requests is not asked. The others go on where they stopped, under the present
    weights, until they end or reach the completion budget. ``window`` None is a third of that budget.

    Every trajectory has all its steps so far. ``mask`` is on those of this window, so that each trains the policy once;
    ``mask/critic`` on all steps of trajectories that ended in this iteration. Trajectory columns: ``unfinished`` (goes
    on in the next iteration; its rewards are 0 until then), ``before`` (steps of earlier windows), ``limit`` (all the
    steps it may take). ``version`` is that of the weights which sampled the window. A window is a function of the
    weights, the steps before it, ``seed`` and its slot alone.

    State: the trajectories that go on. Raises UsageError for a window below 1.
    """

    window: int | None = None
    pending: Rollout | None = field(default=None, init=False, compare=False)

    gives = Groups.gives | _OF_THE_ITERATION
    state = ("pending",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window is not None and self.window < 1:
            raise UsageError(f"window is {self.window}; a window has at least 1 step")

    def __call__(
        self,
        policy: Policy,
        requests: Sequence[Request],
        *,
        limit: int,
        seed: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> Rollout:
        budget = self.max_new_tokens or limit
        window = self.window or -(-budget // 3)
        names = {name for request in requests for name in request.columns}
        going = [] if self.pending is None else _continuing(self.pending, names)
        fresh = _first(requests, sum(request.count for request in requests) - len(going))
        # What each request may still take, and in this window.
        left = [budget if r.limit is None else min(r.limit, budget) for r in fresh]
        left = [r.limit or budget for r in going] + left
        asked = [dataclasses.replace(r, limit=min(window, n)) for r, n in zip([*going, *fresh], left, strict=True)]
        new = super().__call__(policy, asked, limit=budget, seed=seed, progress=progress)
        left_of = torch.tensor(left, device=new.device)[new.group] - new.lengths
        before = torch.zeros_like(new.lengths)
        if self.pending is not None:
            earlier = self.pending.to(new.device)
            before[: len(going)] = earlier.lengths
            mine = torch.arange(new.n_trajectories, device=new.device) < len(going)
            joined = earlier.join(new.select(mine))
            new = joined if bool(mine.all()) else Rollout.concat([joined, new.select(~mine)])
        room = torch.tensor(policy.room(new), device=new.device)
        unfinished = new["truncated"].bool() & (left_of > 0) & (room > 0)
        whole = new.with_columns(
            trajectory={
                "truncated": new["truncated"].bool() & ~unfinished,
                "unfinished": unfinished,
                "before": before,
                "limit": new.lengths + left_of,
            },
            step={"mask/critic": new.spread(~unfinished)},
        )
        self.remember(pending=_kept(whole.select(unfinished)) if bool(unfinished.any()) else None)
        return whole


def _continuing(pending: Rollout, columns: set[str]) -> list[Request]:
    """Requests that go on with these trajectories; their limit is what is left."""
    left = (pending["limit"] - pending.lengths).tolist()
    values = [{name: float(pending[name][i]) for name in columns} for i in range(pending.n_trajectories)]
    return [
        Request(read.example, 1, read.prompt, tuple(read.completion_ids), rest, carried)
        for read, rest, carried in zip(transcripts(pending), left, values, strict=True)
    ]


def _first(requests: Sequence[Request], slots: int) -> list[Request]:
    """The requests with counts that add up to ``slots``: one trajectory of each in turn, in order."""
    counts = [0] * len(requests)
    while slots > 0:
        for index, request in enumerate(requests):
            if counts[index] < request.count and slots > 0:
                counts[index] += 1
                slots -= 1
    return [dataclasses.replace(r, count=count) for r, count in zip(requests, counts, strict=True) if count]


def _kept(unfinished: Rollout) -> Rollout:
    """What the next window goes on from: the steps that are there will not train the policy again."""
    columns = {
        level: {name: value for name, value in values.items() if name not in _OF_THE_ITERATION}
        for level, values in unfinished.columns.items()
    }
    bare = dataclasses.replace(unfinished, columns=columns)
    return bare.with_columns(step={"mask": torch.zeros_like(bare.mask)})

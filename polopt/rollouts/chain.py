"""Answers cut where the policy was unsure, and fresh continuations that measure the value of every cut."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from polopt.core.errors import UsageError
from polopt.core.part import part
from polopt.core.policy import Policy, Request
from polopt.core.rollout import Rollout, Source
from polopt.core.segments import segment_cumsum
from polopt.rollouts.groups import Groups
from polopt.rollouts.states import UNKNOWN, actions, another_seed


def cuts(rollout: Rollout, *, threshold: float = 0.9, every: int = 5) -> Bool[Tensor, " step"]:
    """True at the steps in front of which an answer is cut: of those with p_t < threshold the 1st, (m+1)-th, ...

    p_t = exp(``logp``) is the probability of the chosen action, m is ``every``. Masked steps are passed over.
    """
    unsure = rollout.mask & (rollout.logp < math.log(threshold))
    before = segment_cumsum(unsure.to(rollout.logp), rollout.trajectory, rollout.n_trajectories, exclusive=True)
    return unsure & (before.round().long() % every == 0)


def segments_between(
    rollout: Rollout, cut: Bool[Tensor, " step"], state: Int[Tensor, " cut"]
) -> tuple[Int[Tensor, " step"], Int[Tensor, " step"]]:
    """States at the start and at the end of the segment of each step; ``state`` are those of the cuts, in order.

    Steps before the first cut start at no known state (-1); the last segment of trajectory i ends at state i.
    """
    if not len(state):
        return torch.full_like(rollout.trajectory, UNKNOWN), rollout.trajectory.clone()
    place = cut.nonzero().flatten()
    last = cut.cumsum(0) - 1  # the last cut at or before each step, and the first one after it
    following = (last + 1).clamp(max=len(place) - 1)
    started = (last >= 0) & (rollout.trajectory[place[last.clamp_min(0)]] == rollout.trajectory)
    ended = (last + 1 < len(place)) & (rollout.trajectory[place[following]] == rollout.trajectory)
    start = torch.where(started, state[last.clamp_min(0)], UNKNOWN)
    return start, torch.where(ended, state[following], rollout.trajectory)


@part("rollout", "chain")
@dataclass(frozen=True)
class Chain(Groups):
    """Groups of answers, each cut in front of every ``every``-th action that had p < ``threshold``, and probes.

    A probe is one of ``continuations`` fresh completions of a distinct prefix that ends at a cut. It is of its prompt's
    group, its steps are masked and its ``source`` is `Source.PROBE`. Every cut and every end of an answer is a state:
    the step columns ``segment/start`` and ``segment/end`` are those between which a step lies (-1 before the first
    cut), the trajectory column ``state`` is the one whose value the trajectory's reward samples (of an answer: its own
    end). Costs about cuts x continuations completions per answer. arXiv:2505.23564, SPO-chain.
    """

    threshold: float = 0.9
    every: int = 5
    continuations: int = 9

    gives = frozenset({"limit", "state", "segment/start", "segment/end"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.threshold > 0:
            raise UsageError(f"threshold is {self.threshold}; it must be above 0 (above 1 every step is unsure)")
        for name in ("every", "continuations"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1")

    def cuts(self, rollout: Rollout) -> Bool[Tensor, " step"]:
        """True at the steps in front of which an answer is cut."""
        return cuts(rollout, threshold=self.threshold, every=self.every)

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
        main = super().__call__(policy, asked, limit=limit, seed=seed, progress=progress)
        cut = self.cuts(main)
        owner, taken = main.group.tolist(), actions(main)
        time = torch.arange(main.n_steps, device=main.device) - (main.lengths.cumsum(0) - main.lengths)[main.trajectory]
        places = zip(main.trajectory[cut].tolist(), time[cut].tolist(), strict=True)
        # Ids of states: those of the answers' ends come first. Equal prefixes of one prompt are one state.
        known: dict[tuple[int, tuple[int, ...]], int] = {}
        keys = [(owner[i], taken[i][:t]) for i, t in places]
        state = torch.tensor(
            [known.setdefault(key, main.n_trajectories + len(known)) for key in keys], device=main.device
        )
        start, end = segments_between(main, cut, state)
        main = main.with_columns(
            step={"segment/start": start, "segment/end": end},
            trajectory={"state": torch.arange(main.n_trajectories, device=main.device)},
        )
        if not known:
            return main
        budget = self.max_new_tokens or limit
        probing = [
            dataclasses.replace(
                asked[number],
                count=self.continuations,
                prefix=asked[number].prefix + prefix,
                limit=min(budget, asked[number].limit or budget) - len(prefix),
            )
            for number, prefix in known
        ]
        probes = super().__call__(policy, probing, limit=limit, seed=another_seed(seed, 1), progress=progress)
        nowhere = torch.full_like(probes.trajectory, UNKNOWN)
        probes = probes.with_columns(
            step={"mask": torch.zeros_like(probes.mask), "segment/start": nowhere, "segment/end": nowhere.clone()},
            trajectory={
                "state": main.n_trajectories + probes.group,
                "source": torch.full_like(probes["source"], int(Source.PROBE)),
            },
        )
        asked_by = torch.tensor([number for number, _ in known], device=main.device)
        group = torch.cat([main.group, asked_by[probes.group]])
        return Rollout.concat([main, probes], group)

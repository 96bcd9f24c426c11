"""One group of independent trajectories per prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from polopt.core.part import Part, part
from polopt.core.policy import Policy, Request, Sampling
from polopt.core.rollout import Rollout


@part("rollout", "groups")
@dataclass(frozen=True)
class Groups(Sampling, Part):
    """``count`` independent samples of the policy for each request; the options are those of `Sampling`.

    Adds the trajectory column ``limit``, the completion budget. Raises UsageError for an option out of range.
    """

    gives = frozenset({"limit"})

    def __call__(
        self,
        policy: Policy,
        requests: Sequence[Request],
        *,
        limit: int,
        seed: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> Rollout:
        sampling = Sampling(
            self.temperature,
            self.top_p,
            self.top_k,
            self.min_p,
            self.max_new_tokens or limit,
            self.stop,
            self.stop_ids,
        )
        rollout = policy.sample(requests, sampling, seed=seed, progress=progress)
        budget = torch.full((rollout.n_trajectories,), sampling.max_new_tokens or limit, device=rollout.device)
        return rollout.with_columns(trajectory={"limit": budget})

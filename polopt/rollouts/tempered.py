"""Groups of the policy's answers, and beside them groups that were drawn at another temperature."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from polopt.core.errors import UsageError
from polopt.core.part import part
from polopt.core.policy import Policy, Request
from polopt.core.rollout import Rollout, Source
from polopt.rollouts.groups import Groups
from polopt.rollouts.states import another_seed


@part("rollout", "tempered-groups")
@dataclass(frozen=True)
class TemperedGroups(Groups):
    """`Groups`, and groups at temperature ``other`` of the first ceil(``share`` * n) of the n requests.

    These groups come last and their ``source`` is `Source.TEMPERED`. Only their draw is another one: ``logp``,
    ``entropy`` and every later evaluation are of the policy as in the other groups, so that a ratio starts at 1;
    ``logp/sampled``, which all trajectories have, says under which log-prob an action was drawn. Statistics and
    curricula see the other groups alone. arXiv:2510.08141.
    """

    other: float = 1.2
    share: float = 0.25

    gives = Groups.gives | {"logp/sampled"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.other < math.inf:
            raise UsageError(f"other is {self.other}; a second temperature must be finite and above 0")
        if not 0 <= self.share <= 1:
            raise UsageError(f"share is {self.share}; it must be a share of the prompts, from 0 to 1")

    def __call__(
        self,
        policy: Policy,
        requests: Sequence[Request],
        *,
        limit: int,
        seed: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> Rollout:
        drawn = [super().__call__(policy, requests, limit=limit, seed=seed, progress=progress)]
        asked = [request for request in requests if request.count]
        # Less a little: 0.2 * 5 is a little more than 1.
        if again := asked[: math.ceil(self.share * len(asked) - 1e-9)]:
            tempered = replace(self, temperature=self.other, policy_temperature=self.trained_temperature)
            own_seed = another_seed(seed, 1)
            beside = Groups.__call__(tempered, policy, again, limit=limit, seed=own_seed, progress=progress)
            source = torch.full_like(beside["source"], int(Source.TEMPERED))
            drawn.append(beside.with_columns(trajectory={"source": source}))
        return Rollout.concat([_with_draws(rollout) for rollout in drawn])


def _with_draws(rollout: Rollout) -> Rollout:
    if "logp/sampled" in rollout:
        return rollout
    return rollout.with_columns(step={"logp/sampled": rollout.logp.clone()})

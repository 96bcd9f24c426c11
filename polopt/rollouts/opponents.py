"""Groups in which some answers are there to be beaten: the opponents of the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from polopt.core.errors import UsageError
from polopt.core.part import part
from polopt.core.policy import Policy, Request
from polopt.core.rollout import Rollout, Source
from polopt.rollouts.groups import Groups
from polopt.rollouts.states import another_seed


@part("rollout", "opponents")
@dataclass(frozen=True)
class Opponents(Groups):
    """Of the n answers of a group round(``share`` n) are opponents, at least 1, and at least 1 is none.

    The others are drawn as the options of `Sampling` say, ``mixture_of`` aside. Opponents are drawn from the whole
    distribution of the policy that trains or, with ``mixture_of``, of its geometric mixture with that model
    (``mixture_weight`` b: 0 is the policy, 1 the model). Trajectory column ``opponent`` [M], true for these. All
    log-probs are of the policy that trains. ``source`` is POLICY for what is drawn from it, TEMPERED for other answers
    (another temperature or truncated), OPPONENT for a mixture. Raises UsageError for groups of fewer than 2.
    """

    share: float = 0.5

    gives = Groups.gives | {"opponent"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share < 1:
            raise UsageError(f"share is {self.share}; it must be a share of a group, strictly between 0 and 1")

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
        if small := [request for request in asked if request.count < 2]:
            raise UsageError(
                f"example {small[0].example.id!r} asks for a group of {small[0].count}: an answer and an opponent "
                f"need a --group of at least 2"
            )
        rivals = [min(max(round(self.share * request.count), 1), request.count - 1) for request in asked]
        own = [replace(request, count=request.count - n) for request, n in zip(asked, rivals, strict=True)]
        others = [replace(request, count=n) for request, n in zip(asked, rivals, strict=True)]
        answer = replace(self, mixture_of=None)
        opponent = replace(self, temperature=self.trained_temperature, top_k=0, top_p=1.0, min_p=0.0)
        drawn = []
        for rival, wanted, sampling in ((False, own, answer), (True, others, opponent)):
            seed = another_seed(seed, 1) if rival else seed
            rollout = Groups.__call__(sampling, policy, wanted, limit=limit, seed=seed, progress=progress)
            columns = {"opponent": torch.full_like(rollout.lengths, rival).bool()}
            if sampling.differs:
                source = Source.OPPONENT if rival else Source.TEMPERED
                columns["source"] = torch.full_like(rollout.lengths, int(source))
            elif self.differs:
                rollout = rollout.with_columns(step={"logp/sampled": rollout.logp.clone()})
            drawn.append(rollout.with_columns(trajectory=columns))
        return Rollout.concat(drawn, torch.cat([part.group for part in drawn]))

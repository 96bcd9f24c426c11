"""One group of independent trajectories per prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from polopt.core.errors import UsageError
from polopt.core.part import Part, part
from polopt.core.policy import Policy, Request, Sampling
from polopt.core.rollout import Rollout


@part("rollout", "groups")
@dataclass(frozen=True)
class Groups(Sampling, Part):
    """``count`` independent samples of the policy for each request; the options are those of `Sampling`.

    Adds the trajectory column ``limit``, the completion budget, and those that the requests carry. A part that only
    adds columns to such groups, or changes some, overrides `finish`. Raises UsageError for an option out of range, and
    for requests that carry different columns.
    """

    gives = frozenset({"limit"})

    @property
    def uses(self) -> frozenset[str]:
        """Models that the policy samples with."""
        return frozenset(name for name in (self.nucleus_of, self.mixture_of) if name is not None)

    def __call__(
        self,
        policy: Policy,
        requests: Sequence[Request],
        *,
        limit: int,
        seed: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> Rollout:
        given = {option.name: getattr(self, option.name) for option in dataclasses.fields(Sampling)}
        sampling = Sampling(**{**given, "max_new_tokens": self.max_new_tokens or limit})
        rollout = policy.sample(requests, sampling, seed=seed, progress=progress)
        budget = torch.full((rollout.n_trajectories,), sampling.max_new_tokens or limit, device=rollout.device)
        columns = requested([request for request in requests if request.count], rollout.group, rollout.logp)
        rollout = rollout.with_columns(trajectory={"limit": budget, **columns})
        return self.finish(rollout, seed)

    def finish(self, rollout: Rollout, seed: int) -> Rollout:
        """What becomes of the sampled groups: nothing here; a function of the rollout and the seed."""
        return rollout


def requested(asked: Sequence[Request], owner: Int[Tensor, " trajectory"], like: Tensor) -> dict[str, Tensor]:
    """The requests' columns [M], in the precision and place of ``like``; ``owner`` [M] is each trajectory's request."""
    names = set(asked[0].columns)
    for request in asked:
        if odd := sorted(names ^ set(request.columns)):
            raise UsageError(
                f"requests of one batch must carry the same columns: of examples {asked[0].example.id!r} and "
                f"{request.example.id!r} only one has {odd[0]!r}"
            )
    table = {name: like.new_tensor([request.columns[name] for request in asked]) for name in sorted(names)}
    return {name: values[owner] for name, values in table.items()}

"""SPIN: self-play fine-tuning (Chen et al. 2024, arXiv:2401.01335).

There are demonstrations only. In iteration t the policy pi_t answers the same prompts, and learns to tell the real y
from its own y': L = mean of l(m),  l(m) = log(1 + exp(-m)),  m = lambda [log pi/pi_t (y) - log pi/pi_t (y')].
That is DPO with chosen = real, rejected = generated, reference = pi_t and beta = lambda; the opponent pi_t, which also
generates, is frozen for the iteration. The optimum over all policies is pi_{t+1} ~ pi_t (p_data / pi_t)^(1 / lambda):
p_data at once for lambda = 1, damped above, far beyond the data below: a small lambda lives on stopping early.

Settled by the official code: lambda 0.1 (5 in its fourth and last iteration: `--objective.beta 5`); from the second
iteration on the answers of the one before train too, now against the present opponent. An iteration is one batch, here
of eight updates in two passes: take a large one (`--prompts 512`), and one answer per prompt as the paper does
(`--group 1`). The code's hinge is `--objective hinge`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from polopt.core.example import Example
from polopt.core.method import Schedule
from polopt.core.part import Evaluate, Stateful, part
from polopt.core.policy import Policy, Request
from polopt.core.registry import method
from polopt.core.rollout import Rollout, Source
from polopt.filters.preferences import BestWorst, with_labels
from polopt.methods.preference.dpo import DPO, dpo
from polopt.models import Snapshot
from polopt.rollouts.dataset import Dataset
from polopt.rollouts.groups import Groups


@part("rollout", "self-play")
@dataclass(frozen=True)
class SelfPlay(Groups, Stateful):
    """Each example's demonstration, label 1, in one group with as many answers of the policy as asked for, label 0.

    With ``mixed`` the groups of the iteration before follow, as `Source.REPLAY`. ``end`` ends a demonstration as an
    answer ends. Step columns are ``action`` and ``mask``: demonstrations have no sampler. State: this iteration's
    groups. Raises UsageError for an example without a demonstration.
    """

    end: bool = True
    mixed: bool = True
    past: Rollout | None = field(default=None, init=False, compare=False)

    gives = Dataset.gives
    offline = True
    form = "demonstrations"
    state = ("past",)

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
        real = Dataset("demonstrations", end=self.end)(policy, asked, limit=limit, seed=seed)
        made = super().__call__(policy, asked, limit=limit, seed=seed, progress=progress)
        both = _after(real, made, torch.cat([real.group, made.group]))
        demonstrated = torch.arange(both.n_trajectories, device=both.device) < real.n_trajectories
        fresh = with_labels(both, demonstrated.float())
        if self.past is None or not self.mixed:
            return fresh
        past = self.past.to(fresh.device)
        replayed = torch.full_like(past.lengths, int(Source.REPLAY))
        return _after(fresh, past.with_columns(trajectory={"source": replayed}))

    def check(self, examples: Sequence[Example]) -> None:
        """Raise UsageError for the first example without a demonstration."""
        Dataset("demonstrations").check(examples)

    def on_policy(self) -> Mapping[str, Any]:
        """Slots in which the policy's best answer stands for the demonstration, and its worst for the generated."""
        return {"rollout": Groups(), "filter": BestWorst()}

    def observe(self, rollout: Rollout, evaluate: Evaluate) -> None:
        """Keep the groups of this iteration for the next one."""
        self.remember(past=rollout.to("cpu") if self.mixed else None)


def _after(first: Rollout, second: Rollout, group: Int[Tensor, " trajectory"] | None = None) -> Rollout:
    """`Rollout.concat` with the columns that both have."""
    names = set(first.names()) & set(second.names())

    def shared(rollout: Rollout) -> Rollout:
        columns = {level: {n: v for n, v in found.items() if n in names} for level, found in rollout.columns.items()}
        return dataclasses.replace(rollout, columns=columns)

    return Rollout.concat([shared(first), shared(second)], group)


spin = method(
    "spin",
    dpo,
    seed="216",
    paper="arXiv:2401.01335",
    rollout=SelfPlay(),
    objective=DPO(beta=0.1),
    models={"ref": Snapshot(every=1)},
    schedule=Schedule(epochs=2, minibatches=4),
)

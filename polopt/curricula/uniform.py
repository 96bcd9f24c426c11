"""Every prompt equally often, in an order shuffled anew in each epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from polopt.core.errors import UsageError
from polopt.core.example import Example
from polopt.core.part import Stateful, part
from polopt.core.policy import Request


@part("curriculum", "uniform")
@dataclass(frozen=True)
class Uniform(Stateful):
    """The next ``prompts`` examples of a random permutation of the pool, ``group`` trajectories each, no replacement.

    State: the present epoch's permutation and the position in it. Raises UsageError for an empty pool, and for one of
    another size than the permutation was drawn for.
    """

    order: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64), init=False, compare=False)
    position: int = field(default=0, init=False, compare=False)

    state = ("order", "position")

    def __call__(
        self, pool: Sequence[Example], *, prompts: int, group: int, generator: torch.Generator
    ) -> list[Request]:
        if not pool:
            raise UsageError("there is no example to draw: the pool is empty")
        if len(self.order) not in (0, len(pool)):
            raise UsageError(
                f"the curriculum holds an order of {len(self.order)} examples, the pool now has {len(pool)}"
            )
        drawn: list[int] = []
        while len(drawn) < prompts:
            if self.position >= len(self.order):
                self.remember(order=torch.randperm(len(pool), generator=generator), position=0)
            take = self.order[self.position : self.position + prompts - len(drawn)].tolist()
            self.remember(position=self.position + len(take))
            drawn += take
        return [Request(pool[index], group) for index in drawn]

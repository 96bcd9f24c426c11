"""What rollouts share that go on from prefixes. A state is a prefix of one prompt; ids of states last for one call."""

from __future__ import annotations

from typing import Final

import torch

from polopt.core.rollout import Rollout

UNKNOWN: Final = -1
"""In place of the id of a state that has no value."""


def actions(rollout: Rollout) -> list[tuple[int, ...]]:
    """The actions of each trajectory."""
    return [tuple(taken.tolist()) for taken in torch.split(rollout["action"].cpu(), rollout.lengths.tolist())]


def another_seed(seed: int, number: int) -> int:
    """The ``number``-th further seed of a rollout: the same seed would draw the same actions again."""
    generator = torch.Generator().manual_seed(seed)
    return int(torch.randint(2**62, (number,), generator=generator)[-1])

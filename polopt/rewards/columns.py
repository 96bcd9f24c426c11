"""Numbers that a data set holds beside its answers, as columns of the rollout."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from polopt.core.errors import UsageError
from polopt.core.part import Part, part
from polopt.core.rollout import Rollout


@part("reward", "example-columns")
@dataclass(frozen=True)
class ExampleColumns(Part):
    """Columns of the examples (``names``) as trajectory columns [M] of the same names: a margin, a weight, a user.

    Raises UsageError for an example whose column is absent or holds no finite number.
    """

    names: tuple[str, ...] = ()

    @property
    def gives(self) -> frozenset[str]:  # type: ignore[override]
        """The columns."""
        return frozenset(self.names)

    def __call__(self, rollout: Rollout) -> Rollout:
        columns = {
            name: [_number(example.columns.get(name), name, example.id) for example in rollout.examples]
            for name in self.names
        }
        dtype = rollout.logp.dtype if "logp" in rollout else torch.float32
        made = {name: torch.tensor(v, dtype=dtype, device=rollout.device) for name, v in columns.items()}
        return rollout.with_columns(trajectory=made)


def _number(value: Any, name: str, identifier: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"column {name!r} of example {identifier!r} must be a finite number, but is {value!r}")
    return number

"""What an objective receives and returns: evaluated log-probs in, losses per step, trajectory or group out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor

from polopt.core.rollout import MissingColumn

LossLevel = Literal["step", "trajectory", "group", "batch"]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Functionals of the current policy at the steps of a rollout, with gradient: ``logp`` [N] and others asked for."""

    columns: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.columns:
            raise MissingColumn(
                f"the policy was not asked for {name!r}: declare it in the part's `evaluates` "
                f"(evaluated: {', '.join(sorted(self.columns))})"
            )
        return self.columns[name]

    def trainable(self, mask: Bool[Tensor, " step"]) -> Evaluation:
        """The same, with zeros at the steps that do not train: no NaN there can reach a gradient through 0 * NaN."""

        def kept(value: Tensor) -> Tensor:
            if value.shape[:1] != mask.shape:
                return value
            return value.masked_fill(~mask.view(-1, *[1] * (value.ndim - 1)), 0)

        return Evaluation({name: kept(value) for name, value in self.columns.items()})

    @property
    def logp(self) -> Float[Tensor, " step"]:
        """Log-prob of each step's action under the current policy."""
        return self["logp"]

    @property
    def entropy(self) -> Float[Tensor, " step"]:
        """Entropy of the current policy's distribution at each step, nats."""
        return self["entropy"]

    @property
    def value(self) -> Float[Tensor, " step"]:
        """Critic's value of the prefix before each step."""
        return self["value"]


@dataclass(frozen=True, eq=False)
class Loss:
    """Loss terms at one level, before aggregation.

    ``step`` [N] terms are aggregated by the method's aggregation, ``trajectory`` [M] and ``group`` [G] terms by their
    mean over the whole batch, a ``batch`` term [] is taken as it is. ``metrics`` are scalars to log: shares of a mean
    over the whole batch (`Rollout.batch_mean`), so that those of micro-batches add up.
    """

    level: LossLevel
    value: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


def per_step(value: Float[Tensor, " step"], **metrics: Tensor) -> Loss:
    """A loss term for each step; ``metrics`` name ``a__b`` is logged as ``a/b``."""
    return Loss("step", value, _named(metrics))


def per_trajectory(value: Float[Tensor, " trajectory"], **metrics: Tensor) -> Loss:
    """A loss term for each trajectory."""
    return Loss("trajectory", value, _named(metrics))


def per_group(value: Float[Tensor, " group"], **metrics: Tensor) -> Loss:
    """A loss term for each group."""
    return Loss("group", value, _named(metrics))


def total(value: Float[Tensor, ""], **metrics: Tensor) -> Loss:
    """The loss of the whole batch, already normalised; only for objectives whose unit is the batch."""
    return Loss("batch", value, _named(metrics))


def _named(metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("__", "/"): value.detach() for name, value in metrics.items()}

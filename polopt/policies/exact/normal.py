"""A policy of two parameters over ordered actions: what it learns of one action it learns of its neighbours."""

from __future__ import annotations

import math
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Parameter

from polopt.core.errors import UsageError
from polopt.policies.exact.policy import ExactPolicy
from polopt.policies.exact.space import SequenceSpace


class NormalPolicy(ExactPolicy):
    """A discretised normal: one action v of V, pi_b(v) proportional to exp(-((v - m_b) / w_b)^2 / 2), for B problems.

    ``mean`` and ``width`` are its start, in actions. The parameters [B, 1, 2] are m_b over the start's width and
    log w_b, so that one step of an optimizer is as large for wide as for narrow policies. A critic has one value per
    problem. Unlike a tabular policy it can put mass on actions that were never drawn.

    Raises UsageError for a space of more than one step, or a width that is not above 0.
    """

    def __init__(
        self, space: SequenceSpace, problems: int = 1, *, mean: float, width: float, dtype: torch.dtype = torch.float64
    ) -> None:
        if space.length != 1:
            raise UsageError(f"a normal policy chooses one action, the space has sequences of {space.length}")
        if not 0 < width < math.inf or not math.isfinite(mean):
            raise UsageError(f"a normal policy needs a finite mean and a width above 0, got {mean} and {width}")
        super().__init__(space, problems, dtype=dtype)
        self.scale = width
        start = torch.tensor([mean / width, math.log(width)], dtype=dtype)
        self.logits = Parameter(start.expand(problems, 1, 2).clone())

    @classmethod
    def logits_of(cls, space: SequenceSpace, mean: float, width: float) -> Float[Tensor, "problem node token"]:
        """The table of one problem, [1, 1, V]: a tabular policy can start at it."""
        return cls(space, mean=mean, width=width).table().detach()

    def table(self) -> Float[Tensor, "problem node token"]:
        """Logits of the actions, [B, 1, V]; differentiable."""
        mean, width = self.scale * self.logits[..., :1], self.logits[..., 1:].exp()
        action = torch.arange(self.space.vocabulary, dtype=self.logits.dtype, device=self.logits.device)
        return -((action - mean) / width).square() / 2

    @property
    def columns(self) -> frozenset[str]:
        """Those of a tabular policy without ``hidden``: there is no output layer."""
        return super().columns - {"hidden"}

    def save(self, folder: object) -> None:
        """Raises UsageError: it is an experiment's, and no file format knows it."""
        raise UsageError("a normal policy is not saved; its state_dict holds its two parameters")

    @classmethod
    def load(cls, folder: object) -> Self:
        """Raises UsageError, as `save` does."""
        raise UsageError("a normal policy is not saved; there is none to load")

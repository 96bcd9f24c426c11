"""The worked example that the cards of the preference family share: four answers, two pairs, eleven steps."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polopt.core.method import Method
from polopt.core.override import override
from polopt.core.rollout import Rollout
from polopt.filters.preferences import with_labels
from tests.support import f64, now, value_and_gradient

LENGTHS = [3, 2, 2, 4]
POLICY = [-0.5, -1.0, -0.2, -0.8, -1.4, -0.3, -0.6, -1.1, -0.4, -0.9, -0.7]
REFERENCE = [-0.7, -0.9, -0.4, -0.6, -1.2, -0.5, -0.5, -1.0, -0.5, -1.0, -0.6]
STARTS = [0, 3, 5, 7, 11]


def card(labels: Sequence[float] = (1, 0, 1, 0), groups: Sequence[int] = (0, 0, 1, 1)) -> Rollout:
    """The worked example's two pairs, or the same answers with other labels and groups."""
    ids = [i for i, length in enumerate(LENGTHS) for _ in range(length)]
    rollout = Rollout.from_arrays(ids, list(groups), step={"logp/ref": f64(REFERENCE)})
    return with_labels(rollout, f64(labels))


def on_card(
    method: Method, logp: Sequence[float] | Tensor = POLICY, rollout: Rollout | None = None, **fields: Any
) -> tuple[float, Tensor]:
    """Loss and gradient of a method, some fields of its objective replaced (``sft__x``: ``objective.sft.x``)."""
    changed = override(method, {f"objective.{name.replace('__', '.')}": value for name, value in fields.items()})
    return value_and_gradient(changed, now(logp), card() if rollout is None else rollout)


def sums(logp: Any, reference: Sequence[float] | None = REFERENCE) -> NDArray[np.float64]:
    """s_i of the four answers, by a loop."""
    mine = np.asarray(logp, dtype=np.float64)
    theirs = np.zeros(11) if reference is None else np.asarray(reference)
    return np.array([(mine - theirs)[a:b].sum() for a, b in itertools.pairwise(STARTS)])


def slopes(loss: Callable[[NDArray[np.float64]], float], logp: Sequence[float] | Tensor) -> NDArray[np.float64]:
    """dL/dlogp of every step by central differences of a loss that an oracle computes."""
    at = np.asarray(logp, dtype=np.float64)
    width = 1e-6
    found = []
    for k in range(len(at)):
        step = width * np.eye(len(at))[k]
        found.append((loss(at + step) - loss(at - step)) / (2 * width))
    return np.array(found)


def random_logp(seed: int) -> Tensor:
    """Log-probs of the eleven steps."""
    generator = torch.Generator().manual_seed(seed)
    return -0.05 - 2 * torch.rand(11, generator=generator, dtype=torch.float64)


def spread(values: Sequence[float]) -> list[float]:
    """A value per answer on its steps."""
    return [value for value, length in zip(values, LENGTHS, strict=True) for _ in range(length)]


def softplus(x: float) -> float:
    """log(1 + exp(x))."""
    return float(np.logaddexp(0, x))

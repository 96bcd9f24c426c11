"""Exact expectations over a softmax bandit: every batch of actions, weighted by its probability."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from polopt.core.loss import Evaluation
from polopt.core.method import Method
from polopt.core.rollout import Rollout

Floats = NDArray[np.float64]


def softmax(logits: Sequence[float]) -> Floats:
    weights = np.exp(np.asarray(logits, dtype=np.float64))
    return np.asarray(weights / weights.sum())


def bandit_gradient(logits: Sequence[float], rewards: Sequence[float]) -> Floats:
    """grad_z J = pi * (r - pi . r)."""
    pi, r = softmax(logits), np.asarray(rewards, dtype=np.float64)
    return pi * (r - pi @ r)


def expected_gradient(
    method: Method,
    logits: Sequence[float],
    rewards: Sequence[float],
    size: int,
    extra: Callable[[tuple[int, ...]], dict[str, list[float]]] | None = None,
) -> Floats:
    """E over every group of ``size`` one-step responses of the gradient of the method's loss in the logits."""
    pi = softmax(logits)
    mean = np.zeros(len(pi))
    for actions in itertools.product(range(len(pi)), repeat=size):
        chance = float(np.prod(pi[list(actions)]))
        z = torch.tensor(list(logits), dtype=torch.float64, requires_grad=True)
        logp = torch.log_softmax(z, dim=0)[list(actions)]
        columns = {"logp": logp.detach()}
        trajectories = {"reward": [rewards[a] for a in actions], **(extra(actions) if extra else {})}
        rollout = Rollout.from_arrays(
            range(size),
            [0] * size,
            step=columns,
            trajectories={n: torch.tensor(v, dtype=torch.float64) for n, v in trajectories.items()},
        )
        fresh = method.clone()
        loss, _ = fresh.loss(Evaluation({"logp": logp}), fresh.credit(fresh.shape_reward(rollout)))
        (gradient,) = torch.autograd.grad(loss, z)
        mean += chance * gradient.numpy()
    return mean

"""Passes over the tree of prefixes: from conditional to joint distributions and back, one depth at a time.

A table holds the logits of every prefix: ``table`` [B, K, V] of B independent problems. All functions are
differentiable and keep the dtype.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.policies.exact.space import SequenceSpace


def log_probabilities(
    space: SequenceSpace, table: Float[Tensor, "problem node token"]
) -> Float[Tensor, "problem sequence"]:
    """log p(y) = sum_t log softmax(table[node_t])[y_t] of every sequence, [B, S]."""
    steps = table.log_softmax(-1)
    leaves = []
    reach = steps.new_zeros(len(steps), 1)  # log-probability of each node of the present depth
    for depth in range(space.length):
        joint = reach[..., None] + steps[:, space.starts[depth] : space.starts[depth + 1]]
        if depth == space.length - 1:
            leaves.append(joint.flatten(1))
            break
        if space.end:
            leaves.append(joint[..., -1])
        reach = joint[..., : space.branching].flatten(1)
    return torch.cat(leaves, dim=1)


def node_log_probabilities(
    space: SequenceSpace, table: Float[Tensor, "problem node token"]
) -> Float[Tensor, "problem node"]:
    """Log-probability of reaching every node, [B, K]; 0 at the root."""
    steps = table.log_softmax(-1)
    reach = [steps.new_zeros(len(steps), 1)]
    for depth in range(space.length - 1):
        joint = reach[-1][..., None] + steps[:, space.starts[depth] : space.starts[depth + 1]]
        reach.append(joint[..., : space.branching].flatten(1))
    return torch.cat(reach, dim=1)


def step_log_probabilities(
    space: SequenceSpace, table: Float[Tensor, "problem node token"]
) -> Float[Tensor, "problem sequence time"]:
    """Log-probability of every token of every sequence, [B, S, H]; 0 after the end."""
    flat = table.log_softmax(-1).flatten(1)
    index = space.nodes * space.vocabulary + space.sequences.clamp_min(0)
    return flat[:, index.to(flat.device)].masked_fill(~space.mask.to(flat.device), 0.0)


def action_values(
    space: SequenceSpace,
    table: Float[Tensor, "problem node token"],
    reward: Float[Tensor, "problem sequence"],
) -> tuple[Float[Tensor, "problem node token"], Float[Tensor, "problem node"]]:
    """Q(k, v) = E[r | token v chosen at node k], [B, K, V], and V(k) = sum_v pi(v | k) Q(k, v), [B, K]."""
    chance = table.softmax(-1)
    late = _children(reward[:, space.early :], space.vocabulary)
    found, values = [late], []
    for depth in reversed(range(space.length)):
        here = slice(space.starts[depth], space.starts[depth + 1])
        values.append((chance[:, here] * found[-1]).sum(-1))
        if depth == 0:
            break
        below = _children(values[-1], space.branching)
        if space.end:
            ended = reward[:, space.starts[depth - 1] : space.starts[depth]]
            below = torch.cat([below, ended[..., None]], dim=-1)
        found.append(below)
    return torch.cat(found[::-1], dim=1), torch.cat(values[::-1], dim=1)


def table_of(
    space: SequenceSpace, log_probabilities: Float[Tensor, "problem sequence"]
) -> Float[Tensor, "problem node token"]:
    """Logits [B, K, V] of the tabular policy with these log-probabilities (up to a constant): log p(v | k).

    Every distribution over sequences with full support has one. Inverse of `log_probabilities`.
    """
    late = _children(log_probabilities[:, space.early :], space.vocabulary)
    found = [late]
    for depth in reversed(range(1, space.length)):
        below = _children(found[-1].logsumexp(-1), space.branching)
        if space.end:
            ended = log_probabilities[:, space.starts[depth - 1] : space.starts[depth]]
            below = torch.cat([below, ended[..., None]], dim=-1)
        found.append(below)
    return torch.cat(found[::-1], dim=1).log_softmax(-1)


def _children(values: Tensor, count: int) -> Tensor:
    """Values of the children of each node, [B, nodes, count]: children of one node lie side by side."""
    return values.reshape(len(values), -1, count)

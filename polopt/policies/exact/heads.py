"""How a policy's parameters make its table: one row of logits per prefix, or rows that prefixes share.

A factorised head cannot represent every distribution over sequences, as a network of limited capacity cannot.
"""

from __future__ import annotations

from typing import Final, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from polopt.core.errors import UsageError
from polopt.policies.exact import tree
from polopt.policies.exact.space import SequenceSpace

Head = Literal["tabular", "order-0", "order-1"]
HEADS: Final[tuple[Head, ...]] = get_args(Head)


def check_head(name: str) -> Head:
    """The head of that name. Raises UsageError listing them when there is none."""
    if name not in HEADS:
        raise UsageError(f"unknown head {name!r} of an exact policy; choose one of {', '.join(HEADS)}")
    return name


def rows(space: SequenceSpace, head: Head) -> Int[Tensor, " node"]:
    """Row of parameters that each node's logits are, [K], numbers 0 .. P-1.

    ``tabular``: its own (P = K). ``order-0``: that of its position, tokens are independent (P = H). ``order-1``: that
    of its position and the token before it, an inhomogeneous Markov chain (P = 1 + (H-1) c).
    """
    match head:
        case "tabular":
            return torch.arange(space.n_nodes)
        case "order-0":
            return space.depths.clone()
        case "order-1":
            return torch.where(space.depths > 0, 1 + (space.depths - 1) * space.branching + space.previous, 0)


def project(
    space: SequenceSpace, table: Float[Tensor, "problem node token"], head: Head
) -> Float[Tensor, "problem row token"]:
    """Logits [B, P, V] of the member q of a head that is nearest to a tabular policy p: argmin_q KL(p || q).

    Shared rows average what they replace by its probability of being reached: q(v | row) is proportional to
    sum_{k in row} p(k) p(v | k). Exact, and the table itself (normalised) for ``tabular``.
    """
    joint = tree.node_log_probabilities(space, table)[..., None] + table.log_softmax(-1)
    if head == "tabular":
        return table.log_softmax(-1)
    owner = rows(space, head).to(table.device)
    mass = joint.exp()
    made = mass.new_zeros(len(mass), int(owner.max()) + 1, space.vocabulary).index_add(1, owner, mass)
    return made.log().log_softmax(-1)

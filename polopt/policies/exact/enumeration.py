"""Expectations under an exact policy and their gradients, as sums over all sequences.

Batched over problems, [B]; differentiable in the policy's logits; in the policy's dtype.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.policies.exact import divergences, tree
from polopt.policies.exact.policy import ExactPolicy


def expected_reward(
    policy: ExactPolicy, reward: Float[Tensor, "problem sequence"], temperature: float = 1.0
) -> Float[Tensor, " problem"]:
    """J = sum_y pi(y) r(y)."""
    return (policy.probabilities(temperature) * reward).sum(-1)


def policy_gradient(
    policy: ExactPolicy, reward: Float[Tensor, "problem sequence"]
) -> Float[Tensor, "problem row token"]:
    """dJ / d logits [B, P, V], in closed form by the policy gradient theorem.

    At node k it is d(k) pi(v | k) (Q(k, v) - V(k)), d(k) the probability of reaching k; rows that nodes share get the
    sum over them.
    """
    table = policy.table()
    q, v = tree.action_values(policy.space, table, reward.to(table.dtype).expand(policy.problems, -1))
    reach = tree.node_log_probabilities(policy.space, table).exp()
    return _onto_rows(policy, reach[..., None] * table.softmax(-1) * (q - v[..., None]))


def gradient(policy: ExactPolicy, value: Float[Tensor, " problem"]) -> Float[Tensor, "problem row token"]:
    """d value_b / d logits_b [B, P, V] of any differentiable quantity per problem, by automatic differentiation."""
    (found,) = torch.autograd.grad(value.sum(), policy.logits, allow_unused=True)
    return torch.zeros_like(policy.logits) if found is None else found


@torch.no_grad()
def scores(policy: ExactPolicy) -> Float[Tensor, "problem sequence row token"]:
    """grad log pi(y) of every sequence in the logits, [B, S, P, V]: sum_t (1[v = y_t] - pi(v | node_t)) at node_t.

    Takes B S P V numbers.
    """
    space, table = policy.space, policy.table()
    chance = table.softmax(-1)
    row = policy.rows[space.nodes]
    found = table.new_zeros(policy.problems, space.n_sequences, policy.logits.shape[1], space.vocabulary)
    each = torch.arange(space.n_sequences)
    for time in range(space.length):
        on = space.mask[:, time]
        token = torch.nn.functional.one_hot(space.sequences[on, time], space.vocabulary).to(table.dtype)
        # Rows that prefixes share are those of different times, so that no index repeats within a step.
        found[:, each[on], row[on, time]] += token - chance[:, space.nodes[on, time]]
    return found


def entropy(policy: ExactPolicy) -> Float[Tensor, " problem"]:
    """H = -sum_y pi(y) log pi(y), nats, of the distribution over sequences."""
    logp = policy.log_probabilities()
    return -(logp.exp() * logp).sum(-1)


def kl_regularised_objective(
    policy: ExactPolicy,
    reward: Float[Tensor, "problem sequence"],
    reference: Float[Tensor, "problem sequence"],
    beta: float,
) -> Float[Tensor, " problem"]:
    """J_beta = E_pi[r] - beta KL(pi || reference), ``reference`` [B, S] being probabilities.

    Equals beta log Z - beta KL(pi || `tilted`), Z = sum_y reference(y) exp(r(y) / beta).
    """
    return expected_reward(policy, reward) - beta * divergences.kl(policy.probabilities(), reference)


def tilted(
    reference: Float[Tensor, "problem sequence"], reward: Float[Tensor, "problem sequence"], beta: float
) -> Float[Tensor, "problem sequence"]:
    """p(y) = reference(y) exp(r(y) / beta) / Z, the maximiser of E[r] - beta KL(p || reference), [B, S].

    Raises UsageError for beta <= 0.
    """
    divergences.check_positive("beta", beta)
    return (reference.log() + reward.to(reference.dtype) / beta).softmax(-1)


def _onto_rows(policy: ExactPolicy, at_nodes: Tensor) -> Tensor:
    if policy.head == "tabular":
        return at_nodes
    return torch.zeros_like(policy.logits).index_add(1, policy.rows, at_nodes)

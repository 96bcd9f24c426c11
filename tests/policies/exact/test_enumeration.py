"""Exact expectations against brute force and finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from polopt.core.errors import UsageError
from polopt.policies.exact import (
    HEADS,
    ExactPolicy,
    SequenceSpace,
    entropy,
    expected_reward,
    kl,
    kl_regularised_objective,
    policy_gradient,
    project,
    scores,
    table_of,
    tilted,
)
from polopt.policies.exact.enumeration import gradient
from polopt.policies.exact.tree import action_values, node_log_probabilities
from tests.policies.exact.oracle import (
    SPACES,
    all_prefixes,
    all_sequences,
    ids,
    probability,
    random_policy,
    random_reward,
    word,
)

every_space = pytest.mark.parametrize("space", SPACES, ids=ids)
every_head = pytest.mark.parametrize("head", HEADS)


def near(found: Tensor, expected: Tensor | float, atol: float = 1e-12) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype).expand_as(found), rtol=0, atol=atol)


@every_space
@every_head
def test_probabilities_are_products_of_conditionals(space: SequenceSpace, head: str) -> None:
    policy = random_policy(space, head=head)
    p = policy.probabilities().detach()
    assert p.dtype == torch.float64
    near(p.sum(-1), 1.0)
    for b in range(2):
        for s in range(space.n_sequences):
            assert float(p[b, s]) == pytest.approx(probability(space, policy.table()[b], word(space, s)), rel=1e-12)


@every_space
def test_step_logp_adds_up_to_the_sequence(space: SequenceSpace) -> None:
    policy = random_policy(space)
    steps = policy.step_logp()
    near(steps.sum(-1), policy.log_probabilities().detach())
    assert not steps[:, ~space.mask].any()


def test_temperature_divides_the_logits() -> None:
    space = SequenceSpace(3, 2)
    policy = random_policy(space)
    cooled = ExactPolicy(space, 2, policy.logits / 0.5)
    near(policy.probabilities(0.5), cooled.probabilities().detach())
    near(policy.step_logp(0.5), cooled.step_logp().detach())


@every_space
@every_head
def test_gradient_of_expected_reward(space: SequenceSpace, head: str) -> None:
    policy, reward = random_policy(space, head=head), random_reward(space)
    closed = policy_gradient(policy, reward).detach()
    near(closed, gradient(policy, expected_reward(policy, reward)))
    h = 1e-5
    for place in range(policy.logits[0].numel()):
        shifts = []
        for sign in (1, -1):
            moved = policy.logits.detach().clone()
            moved.flatten(1)[:, place] += sign * h
            shifts.append(expected_reward(ExactPolicy(space, 2, moved, head=head), reward).detach())
        near(closed.flatten(1)[:, place], (shifts[0] - shifts[1]) / (2 * h), atol=1e-9)


@every_space
@every_head
def test_scores_are_gradients_of_log_probabilities(space: SequenceSpace, head: str) -> None:
    policy = random_policy(space, head=head)
    found = scores(policy)
    logp = policy.log_probabilities()
    for s in range(space.n_sequences):
        near(found[:, s], torch.autograd.grad(logp[:, s].sum(), policy.logits, retain_graph=True)[0])
    # E[score] = 0, and E[r score] is the policy gradient.
    p, reward = policy.probabilities().detach(), random_reward(space)
    near(torch.einsum("bs,bsrv->brv", p, found), 0.0)
    near(torch.einsum("bs,bsrv->brv", p * reward, found), policy_gradient(policy, reward).detach())


@every_space
def test_values_are_conditional_expectations(space: SequenceSpace) -> None:
    policy, reward = random_policy(space, 1), random_reward(space, 1)
    p = policy.probabilities()[0].tolist()
    q, v = action_values(space, policy.table().detach(), reward)
    reach = node_log_probabilities(space, policy.table().detach()).exp()
    words = [word(space, s) for s in range(space.n_sequences)]
    for k, prefix in enumerate(all_prefixes(space)):
        inside = [s for s, w in enumerate(words) if w[: len(prefix)] == prefix and len(w) > len(prefix)]
        mass = sum(p[s] for s in inside)
        assert float(reach[0, k]) == pytest.approx(mass)
        assert float(v[0, k]) == pytest.approx(sum(p[s] * float(reward[0, s]) for s in inside) / mass)
        for token in range(space.vocabulary):
            after = [s for s in inside if words[s][len(prefix)] == token]
            mean = sum(p[s] * float(reward[0, s]) for s in after) / sum(p[s] for s in after)
            assert float(q[0, k, token]) == pytest.approx(mean)


@every_space
def test_every_distribution_has_its_table(space: SequenceSpace) -> None:
    target = (3 * random_reward(space)).log_softmax(-1)
    near(ExactPolicy(space, 2, table_of(space, target)).log_probabilities(), target)


def test_entropy() -> None:
    space = SequenceSpace(3, 3, end=True)
    policy = random_policy(space)
    for b in range(2):
        p = [probability(space, policy.table()[b], w) for w in all_sequences(space)]
        assert entropy(policy)[b].item() == pytest.approx(-sum(x * math.log(x) for x in p))
    near(entropy(ExactPolicy(SequenceSpace(3, 2), 2)), math.log(9))


@pytest.mark.parametrize("beta", [0.05, 0.5, 5.0])
def test_the_tilted_distribution_maximises_the_regularised_objective(beta: float) -> None:
    space = SequenceSpace(3, 2)
    reward, reference = random_reward(space), random_policy(space, seed=3).probabilities().detach()
    policy = random_policy(space)
    target = tilted(reference, reward, beta)
    near(target.sum(-1), 1.0)
    log_z = (reference * (reward / beta).exp()).sum(-1).log()
    found = kl_regularised_objective(policy, reward, reference, beta)
    near(found, (beta * log_z - beta * kl(policy.probabilities(), target)).detach(), atol=1e-10)
    best = ExactPolicy(space, 2, table_of(space, target.log()))
    value = kl_regularised_objective(best, reward, reference, beta)
    near(value, beta * log_z, atol=1e-10)
    near(gradient(best, value), 0.0, atol=1e-10)


def test_gradients_of_problems_do_not_mix() -> None:
    space = SequenceSpace(3, 2)
    policy, reward = random_policy(space), random_reward(space)
    other = reward.clone()
    other[1] += random_reward(space, seed=9)[1]
    assert torch.equal(policy_gradient(policy, reward)[0], policy_gradient(policy, other)[0])
    assert not torch.equal(policy_gradient(policy, reward)[1], policy_gradient(policy, other)[1])


def test_order_0_makes_tokens_independent() -> None:
    policy = random_policy(SequenceSpace(3, 2), 1, head="order-0")
    joint = policy.probabilities()[0].view(3, 3)
    near(joint, joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True))
    markov = random_policy(SequenceSpace(2, 3), 1, head="order-1").probabilities()[0].view(2, 2, 2)
    # p(c | a, b) does not depend on a.
    chance = markov / markov.sum(2, keepdim=True)
    near(chance[0], chance[1].detach())
    first, second = random_policy(SequenceSpace(2, 3), 1).probabilities().detach().view(2, 2, 2)
    assert float((first / first.sum(1, keepdim=True) - second / second.sum(1, keepdim=True)).abs().max()) > 0.1


@every_space
def test_prefixes_that_share_a_row(space: SequenceSpace) -> None:
    prefixes = all_prefixes(space)
    keys = {"tabular": lambda p: p, "order-0": len, "order-1": lambda p: (len(p), p[-1:])}
    for head, key in keys.items():
        row = ExactPolicy(space, head=head).rows.tolist()
        assert sorted(set(row)) == list(range(len({key(p) for p in prefixes})))
        for i, p in enumerate(prefixes):
            assert [row[i] == r for r in row] == [key(p) == key(other) for other in prefixes]


@pytest.mark.parametrize("head", ["order-0", "order-1"])
def test_projection_is_a_minimum_of_the_divergence(head: str) -> None:
    space = SequenceSpace(3, 3, end=True)
    table = random_policy(space).table().detach()
    p = ExactPolicy(space, 2, table).probabilities().detach()
    nearest = ExactPolicy(space, 2, project(space, table, head), head=head)
    near(gradient(nearest, kl(p, nearest.probabilities())), 0.0)
    assert (kl(p, nearest.probabilities()) > 0.01).all()
    # A member of the head is its own projection.
    near(
        ExactPolicy(space, 2, project(space, nearest.table(), head), head=head).probabilities(),
        nearest.probabilities().detach(),
    )


def test_a_temperature_of_the_target_must_be_positive() -> None:
    space = SequenceSpace(2, 1)
    with pytest.raises(UsageError, match=r"beta must be a positive number, got 0\.0"):
        tilted(ExactPolicy(space).probabilities(), random_reward(space, 1), 0.0)

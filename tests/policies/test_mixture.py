"""Sampling from the geometric mixture of a policy and one of its models, in both worlds."""

from __future__ import annotations

import pytest
import torch

from polopt.core.errors import UsageError
from polopt.core.policy import Request, Sampling
from polopt.policies.exact import ExactPolicy, SequenceSpace
from polopt.policies.exact.policy import example_of
from tests.policies.test_nucleus import LIMIT, World, logits_of, sampled, worlds
from tests.support import same


@worlds
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_drawn_from_the_mixture_and_evaluated_as_the_policy(world: World, temperature: float) -> None:
    policy, requests = world()
    options = {"nucleus_of": None, "mixture_of": "mask", "mixture_weight": 0.3, "temperature": temperature}
    rollout = sampled(policy, requests, **options)
    own, model = (logits_of(policy, rollout, m) / temperature for m in (False, True))
    place = torch.arange(rollout.n_steps)
    mixed = (0.7 * own.log_softmax(-1) + 0.3 * model.log_softmax(-1)).log_softmax(-1)
    expected = [rows[place, rollout["action"]] for rows in (mixed, own.log_softmax(-1))]
    same(rollout["logp/sampled"], expected[0].double(), rtol=1e-4, atol=1e-5)
    same(rollout.logp, expected[1].double(), rtol=1e-4, atol=1e-5)
    assert float((rollout["logp/sampled"] - rollout.logp).abs().max()) > 1e-3


@worlds
def test_the_ends_are_the_policy_and_the_model(world: World) -> None:
    policy, requests = world()
    plain = policy.sample(requests, Sampling(max_new_tokens=LIMIT), seed=3)
    none = sampled(policy, requests, nucleus_of=None, mixture_of="mask", mixture_weight=0.0)
    assert torch.equal(plain["action"], none["action"])
    same(none["logp/sampled"], none.logp, rtol=1e-5, atol=1e-6)
    whole = sampled(policy, requests, nucleus_of=None, mixture_of="mask", mixture_weight=1.0)
    model = logits_of(policy, whole, True).log_softmax(-1)[torch.arange(whole.n_steps), whole["action"]]
    same(whole["logp/sampled"], model.double(), rtol=1e-4, atol=1e-5)


@worlds
def test_the_most_likely_of_the_mixture(world: World) -> None:
    policy, requests = world()
    greedy = {"nucleus_of": None, "mixture_of": "mask", "temperature": 0.0}
    rollout = sampled(policy, requests, **greedy, mixture_weight=0.5)
    mixed = 0.5 * logits_of(policy, rollout, False) + 0.5 * logits_of(policy, rollout, True)
    assert torch.equal(mixed.argmax(-1), rollout["action"])


def test_frequencies_are_those_of_the_mixture() -> None:
    policy = ExactPolicy(SequenceSpace(3, 1), logits=torch.tensor([[[0.2, 0.2, 0.6]]]).log())
    policy.add_model("ref", torch.tensor([[[0.5, 0.3, 0.2]]]).log())
    request = Request(example_of(0), 40_000)
    rollout = policy.sample([request], Sampling(mixture_of="ref", mixture_weight=0.03), seed=1)
    found = rollout["action"].bincount() / 40_000
    # pi^0.97 mu^0.03, normalised, by the card of Nash-MD.
    assert float((found.double() - torch.tensor([0.2079511, 0.20478859, 0.5872603])).abs().max()) < 0.01


@worlds
def test_a_model_that_is_not_there(world: World) -> None:
    policy, requests = world()
    with pytest.raises(UsageError, match="tutor"):
        sampled(policy, requests, nucleus_of=None, mixture_of="tutor")


@pytest.mark.parametrize("weight", [-0.1, 1.1])
def test_a_weight_out_of_range(weight: float) -> None:
    with pytest.raises(UsageError, match="mixture_weight"):
        Sampling(mixture_of="ref", mixture_weight=weight)

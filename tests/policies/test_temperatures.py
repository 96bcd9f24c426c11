"""Functionals at another temperature, and drawing at one temperature for a policy of another, in every world."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from polopt.core.errors import UsageError
from polopt.core.example import Example
from polopt.core.policy import TEMPERED, Request, Sampling, at_temperature, pattern, split_temperature
from polopt.core.rollout import Rollout
from polopt.policies.causal_lm.fused import linear_functionals, logit_functionals
from polopt.policies.causal_lm.policy import CausalLM
from polopt.policies.causal_lm.tiled import Layer
from polopt.policies.exact import SequenceSpace
from polopt.policies.exact.policy import example_of
from polopt.policies.sampling import draw
from polopt.training.collect import provides
from tests.policies.causal_lm.models import byte_tokenizer, tiny
from tests.policies.exact.oracle import random_policy
from tests.support import same


def exact() -> tuple[Any, list[Request]]:
    policy = random_policy(SequenceSpace(3, 5, end=True), seed=2)
    return policy, [Request(example_of(0), 6), Request(example_of(1), 5)]


def language_model() -> tuple[Any, list[Request]]:
    return CausalLM(tiny("Qwen3"), byte_tokenizer()), [Request(Example("1", "one"), 6), Request(Example("2", "two"), 5)]


def generated() -> tuple[Any, list[Request]]:
    policy = CausalLM(tiny("GPT2"), byte_tokenizer())  # no native decoder
    return policy, [Request(Example("1", "one"), 6), Request(Example("2", "two"), 5)]


worlds = pytest.mark.parametrize("world", [exact, language_model, generated])


def sampled(policy: Any, requests: list[Request], **options: Any) -> Rollout:
    found: Rollout = policy.sample(requests, Sampling(max_new_tokens=5, **options), seed=3)
    return found


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.2, 0.8, 1.0, 1 / 3, 1e-5, 1 + 2**-52])
def test_a_name_is_read_back_exactly(temperature: float) -> None:
    name = at_temperature("logp", temperature)
    assert split_temperature(name) == ("logp", temperature)
    assert pattern(name) == "logp@*"


def test_names_without_a_temperature_stay() -> None:
    assert split_temperature("logp/ref") == ("logp/ref", None)
    assert pattern("reward/*") == "reward/*"
    assert at_temperature("logp", 1.2) == "logp@1.2"


@pytest.mark.parametrize("given", ["", "hot", "0", "-1", "inf", "nan", "1.2.3"])
def test_a_temperature_that_is_none_is_named(given: str) -> None:
    with pytest.raises(UsageError, match=f"'logp@{given}' asks for the temperature '{given}'"):
        split_temperature(f"logp@{given}")


@worlds
def test_policies_say_what_they_know(world: Any) -> None:
    policy, requests = world()
    assert all(provides(policy, at_temperature(name, 1.3)) for name in TEMPERED)
    assert not any(provides(policy, name) for name in ("value@1.2", "max_entropy@1.2", "logp/ref@1.2"))
    with pytest.raises(ValueError, match=r"cannot evaluate 'kurtosis@1.2'"):
        policy.evaluate(sampled(policy, requests), frozenset({"kurtosis@1.2", "logp"}))


# --- functionals ----------------------------------------------------------------------------------------------------


@worlds
def test_at_its_own_temperature_a_functional_is_the_plain_one(world: Any) -> None:
    policy, requests = world()
    rollout = sampled(policy, requests, temperature=0.7)
    found = policy.evaluate(rollout, frozenset({*TEMPERED, *(at_temperature(n, 0.7) for n in TEMPERED)}))
    for name in TEMPERED:
        torch.testing.assert_close(found[at_temperature(name, 0.7)], found[name], rtol=1e-5, atol=1e-5)


@worlds
def test_another_temperature_is_that_of_the_logits_whatever_a_trajectory_was_drawn_at(world: Any) -> None:
    policy, requests = world()
    warm, cold = sampled(policy, requests, temperature=1.3), sampled(policy, requests, temperature=0.6)
    rollout = Rollout.concat([warm, cold])
    names = frozenset({"logp@1.3", "entropy@1.3", "logp"})
    found = policy.evaluate(rollout, names)
    torch.testing.assert_close(found.logp, rollout.logp, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["logp@1.3"][: warm.n_steps], warm.logp, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["entropy@1.3"][: warm.n_steps], warm["entropy"], rtol=1e-5, atol=1e-5)
    assert (found["logp@1.3"][warm.n_steps :] - cold.logp).abs().max() > 0.01
    # By hand: log pi_T = log pi / T - log sum_v pi(v)^(1/T), whose normaliser is lse@T - lse@1 / T.
    at_one = policy.evaluate(rollout, frozenset({"logp@1.0", "lse@1.0", "lse@1.3"}))
    by_hand = (at_one["logp@1.0"] + at_one["lse@1.0"]) / 1.3 - at_one["lse@1.3"]
    torch.testing.assert_close(found["logp@1.3"], by_hand, rtol=1e-5, atol=1e-5)


def plain(z: Tensor, targets: Tensor, temperature: Any) -> dict[str, Tensor]:
    z = z / torch.as_tensor(temperature, dtype=z.dtype).expand(len(z))[:, None]
    p = z.softmax(-1)
    return {
        "logp": p.log()[torch.arange(len(z)), targets],
        "entropy": -(p * p.log()).sum(-1),
        "lse": z.exp().sum(-1).log(),
        "collision": (p * p).sum(-1),
    }


WANTED = frozenset({"logp", "entropy", "logp@1.2", "lse@1.2", "collision@0.5", "logp@2", "logp@2.0", "entropy@0.5"})


@pytest.mark.parametrize("tile", [None, (1, 1), (3, 4), (7, 11)])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("own", [1.0, torch.linspace(0.5, 2.0, 7, dtype=torch.float64)])
@pytest.mark.parametrize("names", [WANTED, WANTED - {"logp", "entropy"}, frozenset({"logp@1.2"})])
def test_values_and_gradients_of_several_temperatures(names: Any, own: Any, softcap: Any, tile: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (7, 11))
    targets = torch.randint(11, (7,), generator=generator)
    mix = {name: torch.randn(7, generator=generator, dtype=torch.float64) for name in sorted(names)}
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    found = linear_functionals(hidden, weight, targets, names, temperature=own, softcap=softcap, scale=0.7, tile=tile)
    assert found.keys() == names
    z = 0.7 * hidden @ weight.T
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    expected = {}
    for name in names:
        functional, temperature = split_temperature(name)
        expected[name] = plain(z, targets, own if temperature is None else temperature)[functional]
        same(found[name], expected[name])
    gradients = [
        torch.autograd.grad(torch.stack([mix[n] * values[n] for n in sorted(names)]).sum(), leaves, retain_graph=True)
        for values in (found, expected)
    ]
    for one, other in zip(*gradients, strict=True):
        same(one, other, rtol=1e-10, atol=1e-11)


def test_several_temperatures_take_one_matrix_product(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, calls = torch.randn(9, 4), torch.randn(6, 4), []
    product = Layer.logits
    monkeypatch.setattr(Layer, "logits", lambda *arguments: calls.append(1) or product(*arguments))
    names = frozenset({"logp", "logp@1.2", "entropy@0.8"})
    found = linear_functionals(hidden.requires_grad_(), weight, torch.zeros(9, dtype=torch.int64), names, tile=(9, 6))
    assert len(calls) == 1
    found["logp@1.2"].sum().backward()
    assert len(calls) == 2


def test_a_temperature_without_gradient_adds_nothing_to_the_backward_pass() -> None:
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (9, 6))
    targets = torch.zeros(9, dtype=torch.int64)
    gradients = []
    for names in ({"logp"}, {"logp", "logp@1.2"}):
        leaf = hidden.clone().requires_grad_()
        found = linear_functionals(leaf, weight, targets, frozenset(names), tile=(4, 6))
        gradients += torch.autograd.grad(found["logp"].sum(), leaf)
    assert torch.equal(*gradients)


def test_from_logits_the_same() -> None:
    generator = torch.Generator().manual_seed(2)
    z = torch.randn(7, 11, generator=generator, dtype=torch.float64)
    targets = torch.randint(11, (7,), generator=generator)
    found = logit_functionals(z, targets, WANTED, temperature=0.9)
    for name in WANTED:
        functional, temperature = split_temperature(name)
        same(found[name], plain(z, targets, 0.9 if temperature is None else temperature)[functional])


def test_a_functional_that_is_none_is_named() -> None:
    with pytest.raises(ValueError, match=r"unknown functional 'kurtosis@1.2'"):
        linear_functionals(torch.ones(1, 2), torch.ones(3, 2), torch.zeros(1).long(), frozenset({"kurtosis@1.2"}))


# --- drawing at one temperature for a policy of another --------------------------------------------------------------


@worlds
@pytest.mark.parametrize("temperature", [1.6, 0.5])
@pytest.mark.parametrize("top_k", [0, 2])
def test_what_is_drawn_hot_or_cold_is_evaluated_as_the_policys(world: Any, temperature: float, top_k: int) -> None:
    policy, requests = world()
    rollout = sampled(policy, requests, temperature=temperature, policy_temperature=1.0, top_k=top_k)
    # The same actions as when the policy is the tempered one: only what is said about them changes.
    drawn = sampled(policy, requests, temperature=temperature, top_k=top_k)
    assert torch.equal(rollout["action"], drawn["action"])
    torch.testing.assert_close(rollout["logp/sampled"], drawn["logp/sampled"] if top_k else drawn.logp)
    found = policy.evaluate(rollout, frozenset({"logp", "logp@1.0", "entropy", at_temperature("logp", temperature)}))
    torch.testing.assert_close(rollout.logp, found.logp.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rollout["entropy"], found.entropy.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.logp, found["logp@1.0"], rtol=1e-5, atol=1e-5)
    if not top_k:
        there = found[at_temperature("logp", temperature)].detach()
        torch.testing.assert_close(rollout["logp/sampled"], there, rtol=1e-5, atol=1e-5)


@worlds
def test_the_policys_own_temperature_records_nothing_new(world: Any) -> None:
    policy, requests = world()
    one = sampled(policy, requests, temperature=0.7)
    other = sampled(policy, requests, temperature=0.7, policy_temperature=0.7)
    assert set(one.names()) == set(other.names()) and "logp/sampled" not in one
    assert all(torch.equal(one[name], other[name]) for name in one.names())


@worlds
def test_greedy_actions_of_a_policy_with_a_temperature(world: Any) -> None:
    policy, requests = world()
    rollout = sampled(policy, requests, temperature=0.0, policy_temperature=0.5)
    assert torch.equal(rollout["action"], sampled(policy, requests, temperature=0.0)["action"])
    same(rollout["logp/sampled"], torch.zeros(rollout.n_steps))
    found = policy.evaluate(rollout, frozenset({"logp", "logp@0.5"}))
    torch.testing.assert_close(found.logp, found["logp@0.5"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rollout.logp, found.logp.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_one_draw_by_hand(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits, uniform = rng.normal(size=(6, 9)) * 2, rng.random(6)
    sampling = Sampling(1.4, top_k=4, policy_temperature=0.8)
    chosen = draw(torch.from_numpy(logits).float(), torch.from_numpy(uniform), sampling, entropy=True)
    hot, own = (np.exp(logits / t) / np.exp(logits / t).sum(-1, keepdims=True) for t in (1.4, 0.8))
    for row in range(6):
        kept = np.where(hot[row] >= np.sort(hot[row])[-4], hot[row], 0)
        token = int(np.searchsorted(np.cumsum(kept), uniform[row] * kept.sum(), side="right"))
        assert int(chosen.token[row]) == token
        assert float(chosen.logp[row]) == pytest.approx(np.log(own[row, token]), abs=1e-5)
        assert chosen.logp_sampled is not None and chosen.entropy is not None
        assert float(chosen.logp_sampled[row]) == pytest.approx(np.log(kept[token] / kept.sum()), abs=1e-5)
        assert float(chosen.entropy[row]) == pytest.approx(-(own[row] * np.log(own[row])).sum(), abs=1e-5)


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_a_policy_without_a_temperature_is_named(value: float) -> None:
    with pytest.raises(UsageError, match="policy_temperature"):
        Sampling(policy_temperature=value)

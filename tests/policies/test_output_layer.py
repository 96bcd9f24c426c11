"""What the output layer sees and its most likely tokens; critics of several heads, and their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from polopt.core.errors import UsageError
from polopt.core.policy import OUTPUT_LAYER, TOP, Request, Sampling, critic_heads, head_of, of_critic, value_columns
from polopt.core.rollout import Rollout
from polopt.policies.causal_lm.fused import linear_top
from polopt.policies.causal_lm.policy import CausalLM
from polopt.policies.exact import ExactPolicy, SequenceSpace
from polopt.policies.exact.policy import example_of
from polopt.training.checkpoint import load_checkpoint, save_checkpoint
from polopt.training.profile import Profiler
from polopt.training.update import evaluate_columns
from tests.policies.causal_lm.models import byte_tokenizer, tiny, token_rollout

VALUES = frozenset({"value", "value/1", "value/2"})


def language_model(family: str = "Qwen3", **options: Any) -> CausalLM:
    return CausalLM(tiny(family, **options), byte_tokenizer())


def tabular(head: str = "tabular") -> tuple[ExactPolicy, Rollout]:
    policy = ExactPolicy(SequenceSpace(3, 3), 2, head=head)
    with torch.no_grad():
        policy.logits.copy_(torch.randn(policy.logits.shape, generator=torch.Generator().manual_seed(0)))
    requests = [Request(example_of(i), 4) for i in range(2)]
    return policy, policy.sample(requests, Sampling(temperature=0.7), seed=0)


# --- the output layer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["tabular", "order-1"])
def test_a_tabular_policy_is_an_output_layer_on_one_hot_states(head: str) -> None:
    policy, rollout = tabular(head)
    found = policy.evaluate(rollout, OUTPUT_LAYER | {"logp"})
    layer = policy.logits.detach().flatten(0, 1).T
    logp = (found["hidden"] @ layer.T).log_softmax(-1)
    torch.testing.assert_close(logp.gather(1, rollout["action"][:, None])[:, 0], found.logp.detach())
    torch.testing.assert_close(logp.gather(1, found["top_id"]), found["top_logp"])
    assert found["top_id"].shape[1] == 3 and bool((found["top_logp"].diff(dim=1) <= 0).all())
    assert not any(found[name].requires_grad for name in OUTPUT_LAYER)


@pytest.mark.parametrize("family", ["Qwen3", "Cohere", "GPT2", "Gemma2"])
def test_hidden_states_and_top_tokens_are_those_of_the_model(family: str) -> None:
    policy, rollout = language_model(family), token_rollout()
    found = policy.evaluate(rollout, OUTPUT_LAYER | {"logp"})
    head = policy.model.get_output_embeddings()
    payload: Any = rollout.payload
    step = 0
    for i, completion in enumerate(payload.completion_ids):
        prompt, temperature = payload.prompts[int(payload.prompt_of[i])], float(payload.temperature[i])
        for t in range(len(completion)):
            out = policy.model(input_ids=torch.tensor([prompt + completion[:t]]))
            logp = (out.logits[0, -1] / temperature).log_softmax(-1)
            best = logp.topk(TOP)
            torch.testing.assert_close(found["top_logp"][step], best.values, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(logp[found["top_id"][step]], best.values, rtol=1e-4, atol=1e-4)
            if family != "Gemma2":  # caps its logits, which is left out
                again = (found["hidden"][step] @ head.weight.T).log_softmax(-1)
                torch.testing.assert_close(again, logp, rtol=1e-3, atol=1e-3)
            step += 1
    assert found["top_id"].dtype == torch.int64 and found["hidden"].dtype == torch.float32
    assert not any(found[name].requires_grad for name in OUTPUT_LAYER)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_the_top_does_not_depend_on_chunks(chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    h, w = (torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (7, 11))
    bias, temperature = torch.randn(11, generator=generator).double(), torch.linspace(0.5, 2, 7).double()
    found = linear_top(h, w, 5, bias=bias, temperature=temperature, softcap=3.0, scale=0.5, chunk=chunk)
    z = 3.0 * torch.tanh((h @ w.T + bias) * 0.5 / 3.0) / temperature[:, None]
    expected = z.log_softmax(-1).topk(5)
    assert torch.equal(found["top_id"], expected.indices)
    torch.testing.assert_close(found["top_logp"], expected.values)


def test_columns_with_several_numbers_per_step_survive_micro_batches() -> None:
    policy, rollout = language_model(), token_rollout()
    whole = policy.evaluate(rollout, OUTPUT_LAYER)
    found = evaluate_columns(policy, rollout, OUTPUT_LAYER, 1, Profiler(enabled=False))
    torch.testing.assert_close(found["hidden"], whole["hidden"], rtol=1e-4, atol=1e-5)
    assert torch.equal(found["top_id"], whole["top_id"])
    padded = found.pad(found["hidden"])
    assert padded.shape == (rollout.n_trajectories, int(rollout.lengths.max()), 32)
    again = Rollout.from_padded(found.pad(torch.ones(found.n_steps)), found.group, step={"hidden": padded})
    assert torch.equal(again["hidden"], found["hidden"])


# --- several value heads ----------------------------------------------------------------------------------------------


def test_names_of_value_heads() -> None:
    assert critic_heads(["logp", "logp/ref"]) == 0 and critic_heads(["value"]) == 1
    assert critic_heads(["value/1", "value/2", "logp/ref"]) == 2
    assert head_of("value") == 1 and head_of("value/2") == 2 and head_of("logp/2") is None
    assert value_columns(2) == VALUES and value_columns(0) == frozenset()
    assert of_critic(["value/2", "logp"]) == {"value/2"}


def test_heads_of_a_tabular_critic(tmp_path: Path) -> None:
    policy, rollout = tabular("order-1")
    policy.add_critic(2)
    policy.add_critic(2)
    assert policy.columns >= VALUES and "value/3" not in policy.columns
    found = policy.evaluate(rollout, VALUES)
    assert torch.equal(found["value"], found["value/1"])
    assert not torch.allclose(found["value/1"], found["value/2"])
    assert policy.values is not None
    (gradient,) = torch.autograd.grad(found["value/2"].sum(), policy.values)
    assert bool((gradient[..., 0] == 0).all()) and float(gradient[..., 1].sum()) == rollout.n_steps
    with pytest.raises(UsageError, match="value heads: 2, asked for: 1"):
        policy.add_critic()
    fresh, _ = tabular("order-1")
    fresh.load_state_dict(policy.state_dict())
    policy.save(tmp_path)
    for other in (fresh, ExactPolicy.load(tmp_path)):
        assert torch.equal(other.evaluate(rollout, VALUES)["value/2"], found["value/2"])
    one, _ = tabular("order-1")
    one.add_critic()
    with pytest.raises(UsageError, match="value heads: 1, asked for: 2"):
        one.load_state_dict(policy.state_dict())


def test_heads_of_a_language_models_critic(tmp_path: Path) -> None:
    policy, rollout = language_model(), token_rollout()
    policy.add_critic(heads=2)
    policy.add_critic(heads=2)
    found = policy.evaluate(rollout, VALUES | {"logp"})
    assert torch.equal(found["value"], found["value/1"])
    gap = (found["value/1"] - found["value/2"]).detach()
    assert float(gap.abs().max()) > 0
    same_start = language_model(seed=1)
    same_start.add_critic(heads=2)
    assert policy.critic is not None and same_start.critic is not None
    assert torch.equal(policy.critic.linear.weight, same_start.critic.linear.weight)
    (gradient,) = torch.autograd.grad(found["value/2"].sum(), policy.critic.linear.bias)
    assert gradient.tolist() == [0.0, rollout.n_steps]
    other = language_model()
    other.load_state_dict(load_checkpoint(save_checkpoint(tmp_path / "run", 1, policy.state_dict())))
    assert torch.equal(other.evaluate(rollout, VALUES)["value/2"], found["value/2"])
    policy.save(tmp_path / "model")
    loaded = CausalLM.load(tmp_path / "model", device="cpu")
    loaded.load_critic(tmp_path / "model")
    torch.testing.assert_close(loaded.evaluate(rollout, VALUES)["value/2"], found["value/2"])
    with pytest.raises(UsageError, match="value heads: 2, asked for: 1"):
        policy.add_critic()

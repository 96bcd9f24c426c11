"""The exact policy as a policy: sampling, evaluation, models, state, files."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from polopt.core.errors import UsageError
from polopt.core.example import Example
from polopt.core.policy import Corruption, Request, Sampling
from polopt.core.rollout import Rollout, Source
from polopt.policies.exact import HEADS, ExactPolicy, SequencePayload, SequenceSpace
from polopt.policies.exact.policy import example_of
from polopt.rewards.scoring import transcripts
from tests.policies.exact.oracle import SPACES, ids, random_policy, word

SPACE = SequenceSpace(3, 3, end=True)
every_head = pytest.mark.parametrize("head", HEADS)


def requests(counts: list[int]) -> list[Request]:
    return [Request(example_of(i % 2), count) for i, count in enumerate(counts)]


def numbers(policy: ExactPolicy, rollout: Rollout) -> list[int]:
    """The sequence of each trajectory."""
    payload = rollout.payload
    assert isinstance(payload, SequencePayload)
    return [policy.space.index(ids) for ids in payload.completion_ids]


# --- sampling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("space", "head"),
    [*((space, "tabular") for space in SPACES), (SPACE, "order-0"), (SPACE, "order-1")],
    ids=lambda value: value if isinstance(value, str) else ids(value),
)
def test_a_million_samples_agree_with_the_probabilities(space: SequenceSpace, head: str) -> None:
    policy = random_policy(space, head=head, seed=4)
    p = policy.probabilities().detach()
    count = 500_000  # for each of two problems
    drawn = policy.sample_sequences(count, seed=11)
    for b in range(2):
        seen = torch.bincount(drawn[b], minlength=space.n_sequences) / count
        error = (p[b] * (1 - p[b]) / count).sqrt()
        assert float(((seen - p[b]).abs() / error).max()) < 4.5


def test_sampled_trajectories_agree_with_the_probabilities_at_a_temperature() -> None:
    policy = random_policy(SPACE, seed=4)
    rollout = policy.sample(requests([40_000, 40_000]), Sampling(temperature=0.6), seed=0)
    payload = rollout.payload
    assert isinstance(payload, SequencePayload)
    p = policy.probabilities(0.6).detach()
    for b in range(2):
        mine = torch.tensor(numbers(policy, rollout))[rollout.group == b]
        seen = torch.bincount(mine, minlength=SPACE.n_sequences) / 40_000
        assert float(((seen - p[b]).abs() / (p[b] * (1 - p[b]) / 40_000).sqrt()).max()) < 4.5
    # The log-probs of a trajectory's steps add up to that of its sequence.
    total = rollout.sum_steps(rollout.logp)
    torch.testing.assert_close(total, p[rollout.group, torch.tensor(numbers(policy, rollout))].log())


def test_a_trajectory_depends_on_nothing_but_its_place() -> None:
    policy = random_policy(SPACE)

    def drawn(policy: ExactPolicy, counts: list[int], seed: int = 3) -> list[list[int]]:
        rollout = policy.sample(requests(counts), Sampling(), seed=seed)
        found = numbers(policy, rollout)
        return [[n for n, g in zip(found, rollout.group.tolist(), strict=True) if g == i] for i in range(len(counts))]

    base = drawn(policy, [50, 50])
    assert drawn(policy, [50, 50]) == base
    assert drawn(policy, [50, 20, 7])[0] == base[0]
    assert drawn(policy, [3, 50])[1] == base[1]
    assert drawn(policy, [3, 20])[1] == base[1][:20]
    assert drawn(policy, [50, 50], seed=4) != base
    # Another problem's logits do not matter.
    with torch.no_grad():
        policy.logits[1] += torch.randn_like(policy.logits[1])
    changed = drawn(policy, [50, 50])
    assert changed[0] == base[0] and changed[1] != base[1]
    assert drawn(policy, [50, 50, 50])[2] != changed[0]


def test_columns_of_a_sample() -> None:
    policy = random_policy(SPACE)
    policy.version = 5
    rollout = policy.sample(requests([30, 0, 30]), Sampling(), seed=0)
    assert rollout.n_groups == 2 and rollout.n_trajectories == 60
    assert set(rollout.names()) == {"action", "logp", "entropy", "mask", "truncated", "version", "source"}
    assert rollout.logp.dtype == torch.float64
    assert rollout.mask.all()
    assert (rollout["version"] == 5).all() and (rollout["source"] == int(Source.POLICY)).all()
    for transcript in transcripts(rollout):
        end = transcript.completion_ids[-1] == SPACE.end_token
        assert transcript.truncated == (not end)
        assert transcript.completion == " ".join(str(token) for token in transcript.completion_ids)
        assert transcript.prompt == "problem 0"


def test_greedy_takes_the_likeliest_token() -> None:
    policy = random_policy(SequenceSpace(3, 3))
    rollout = policy.sample(requests([2, 2]), Sampling(temperature=0), seed=0)
    found = numbers(policy, rollout)
    for b in range(2):
        node, tokens = 0, []
        for _ in range(3):
            tokens.append(int(policy.table()[b, node].argmax()))
            node = 3 * node + 1 + tokens[-1]
        assert [word(policy.space, n) for n in found[2 * b : 2 * b + 2]] == [tuple(tokens)] * 2
    at_one = policy.evaluate(rollout, frozenset({"logp"})).logp
    torch.testing.assert_close(rollout.logp, at_one.detach())


def test_limits_and_stops() -> None:
    policy = random_policy(SequenceSpace(3, 3))
    short = policy.sample(requests([40, 40]), Sampling(max_new_tokens=2), seed=0)
    assert (short.lengths == 2).all() and short["truncated"].all()
    assert numbers(policy, short) == [-1] * 80
    whole = policy.sample(requests([40, 40]), Sampling(max_new_tokens=9), seed=0)
    assert (whole.lengths == 3).all() and not whole["truncated"].any()
    assert torch.equal(short["logp"], whole["logp"].view(-1, 3)[:, :2].flatten())
    stopped = policy.sample(requests([40, 40]), Sampling(stop_ids=(1,)), seed=0)
    payload = stopped.payload
    assert isinstance(payload, SequencePayload)
    assert all(1 not in ids[:-1] and (len(ids) == 3 or ids[-1] == 1) for ids in payload.completion_ids)
    assert not stopped["truncated"].any()


@pytest.mark.parametrize("sampling", [Sampling(top_k=2), Sampling(top_p=0.6), Sampling(min_p=0.5)], ids=str)
def test_truncated_sampling(sampling: Sampling) -> None:
    logits = torch.tensor([[[1.0, 0.2, -0.5, -1.0]]], dtype=torch.float64)
    policy = ExactPolicy(SequenceSpace(4, 1), 1, logits)
    rollout = policy.sample([Request(example_of(0), 20_000)], sampling, seed=0)
    p = logits[0, 0].softmax(-1)
    # Two tokens stay under each of the three rules: p = 0.53, 0.24, ... and 0.24 / 0.53 < 0.5.
    kept = [0] if sampling.min_p else [0, 1]
    found = torch.tensor(numbers(policy, rollout))
    assert sorted(set(found.tolist())) == kept
    torch.testing.assert_close(rollout.logp, p.log()[found])
    torch.testing.assert_close(rollout["logp/sampled"], (p / p[kept].sum()).log()[found])


def test_what_cannot_be_sampled() -> None:
    policy = random_policy(SPACE)
    one = Request(example_of(0), 1)
    with pytest.raises(UsageError, match="nothing to sample"):
        policy.sample([], Sampling(), seed=0)
    with pytest.raises(UsageError, match="such as '1'; give stop_ids"):
        policy.sample([one], Sampling(stop=("1",)), seed=0)
    with pytest.raises(UsageError, match="'0' under another prompt"):
        policy.sample([dataclasses.replace(one, prompt="a hint")], Sampling(), seed=0)
    for example in (Example("7", "?"), Example("a", "?"), Example("a", "?", columns={"problem": 2})):
        with pytest.raises(UsageError, match="must be a number from 0 to 1"):
            policy.sample([Request(example, 1)], Sampling(), seed=0)
    assert policy.sample([Request(Example("1", "?"), 1)], Sampling(), seed=0).payload.problem.tolist() == [1]  # type: ignore[union-attr]


# --- evaluation -----------------------------------------------------------------------------------------------------


@every_head
def test_evaluation_agrees_with_the_enumeration(head: str) -> None:
    policy = random_policy(SPACE, head=head)
    problem = torch.arange(2).repeat_interleave(SPACE.n_sequences)
    sequence = torch.arange(SPACE.n_sequences).repeat(2)
    rollout = policy.rollout(problem, sequence, problem)
    found = policy.evaluate(rollout, frozenset({"logp", "entropy", "lse"}))
    expected = policy.step_logp().flatten(0, 1)[SPACE.mask[sequence]]
    torch.testing.assert_close(found.logp, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(rollout.logp, expected.detach(), rtol=0, atol=0)
    table = policy.table()[problem.repeat_interleave(rollout.lengths), SPACE.nodes[sequence][SPACE.mask[sequence]]]
    torch.testing.assert_close(found["lse"], table.logsumexp(-1))
    categorical = torch.distributions.Categorical(logits=table)
    torch.testing.assert_close(found.entropy, categorical.entropy())
    weights = torch.randn(rollout.n_steps, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grads = [
        torch.autograd.grad((v * weights).sum(), policy.logits, retain_graph=True)[0] for v in (found.logp, expected)
    ]
    torch.testing.assert_close(*grads)
    assert torch.equal(rollout["truncated"], SPACE.truncated[sequence])
    assert numbers(policy, rollout) == sequence.tolist()


def test_evaluation_at_the_temperature_of_each_trajectory() -> None:
    policy = random_policy(SPACE)
    policy.add_model("ref")
    hot = policy.sample(requests([20, 20]), Sampling(temperature=2.0), seed=0)
    cold = policy.sample(requests([20, 20]), Sampling(temperature=0.5), seed=1)
    both = Rollout.concat([hot, cold]).select(torch.randperm(80, generator=torch.Generator().manual_seed(0)))
    found = policy.evaluate(both, frozenset({"logp", "entropy", "logp/ref"}))
    torch.testing.assert_close(found.logp, both.logp)
    torch.testing.assert_close(found.entropy, both["entropy"])
    torch.testing.assert_close(found["logp/ref"], both.logp)
    assert policy.cost(both) == both.lengths.tolist()


def test_payloads_are_selected_and_joined_as_rollouts_are() -> None:
    policy = random_policy(SPACE)
    a = policy.sample(requests([5, 6]), Sampling(), seed=0)
    b = policy.sample([Request(example_of(1), 4)], Sampling(), seed=1)
    both = Rollout.concat([a, b])
    texts = [t.completion for r in (a, b) for t in transcripts(r)]
    assert [t.example.columns["problem"] for t in transcripts(both)] == [0] * 5 + [1] * 10
    assert [t.completion for t in transcripts(both)] == texts
    order = [14, 3, 3, 0, 8]
    chosen = both.select(torch.tensor(order))
    assert [t.completion for t in transcripts(chosen)] == [texts[i] for i in order]
    problems = [t.example.columns["problem"] for t in transcripts(chosen)]
    assert problems == [1, 0, 0, 0, 1]
    torch.testing.assert_close(policy.evaluate(chosen, frozenset({"logp"})).logp.detach(), chosen.logp)


def test_models_are_frozen_and_may_be_any_table() -> None:
    policy, other = random_policy(SPACE), random_policy(SPACE, seed=9)
    rollout = policy.sample(requests([20, 20]), Sampling(), seed=0)
    policy.add_model("old")
    policy.add_model("other", other.table())
    with torch.no_grad():
        policy.logits += 1.0 * torch.arange(3)
    found = policy.evaluate(rollout, frozenset({"logp", "logp/old", "logp/other"}))
    torch.testing.assert_close(found["logp/old"], rollout.logp)
    torch.testing.assert_close(found["logp/other"], other.evaluate(rollout, frozenset({"logp"})).logp.detach())
    assert found.logp.requires_grad and not found["logp/old"].requires_grad
    assert not torch.allclose(found.logp, rollout.logp)
    with pytest.raises(UsageError, match=r"shape \(2, 7, 3\), got \(2, 1, 3\)"):
        policy.add_model("bad", torch.zeros(2, 1, 3))
    with pytest.raises(UsageError, match="no model 'gone'; it has old, other"):
        policy.model("gone")
    with pytest.raises(ValueError, match="cannot evaluate 'logp/gone'"):
        policy.evaluate(rollout, frozenset({"logp/gone"}))


def test_the_critic_has_a_value_per_prefix() -> None:
    policy = random_policy(SPACE)
    rollout = policy.sample(requests([20, 20]), Sampling(), seed=0)
    with pytest.raises(ValueError, match="cannot evaluate 'value'"):
        policy.evaluate(rollout, frozenset({"value"}))
    policy.add_critic()
    assert "value" in policy.columns and len(policy.parameters()) == 2
    assert policy.values is not None
    with torch.no_grad():
        policy.values.copy_(torch.arange(14.0).view(2, 7))
    policy.add_critic()  # changes nothing
    value = policy.evaluate(rollout, frozenset({"value"})).value
    assert isinstance(rollout.payload, SequencePayload)
    torch.testing.assert_close(value.detach(), (7 * rollout.payload.step_problem + rollout.payload.nodes).double())
    value.sum().backward()
    assert policy.values.grad is not None and float(policy.values.grad.sum()) == rollout.n_steps


# --- state and files ------------------------------------------------------------------------------------------------


def everything(policy: ExactPolicy, rollout: Rollout) -> dict[str, Tensor]:
    return {
        name: policy.evaluate(rollout, frozenset({name}))[name].detach()
        for name in sorted(policy.columns)
        if "*" not in name
    }


@every_head
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_state_round_trip(head: str, dtype: torch.dtype, tmp_path: Path) -> None:
    policy = ExactPolicy(SPACE, 2, random_policy(SPACE, head=head).logits, head=head, dtype=dtype)
    policy.add_model("ref", random_policy(SPACE, seed=5).table())
    policy.add_critic()
    assert policy.values is not None
    with torch.no_grad():
        policy.values += torch.rand_like(policy.values)
    policy.version = 3
    rollout = policy.sample(requests([9, 9]), Sampling(), seed=0)
    assert rollout.logp.dtype == dtype
    within = policy.sample(requests([9, 9]), Sampling(nucleus_of="ref", nucleus_p=0.6), seed=0)
    fresh = ExactPolicy(SPACE, 2, head=head, dtype=dtype)
    fresh.load_state_dict(policy.state_dict())
    for name, value in everything(policy, within).items():
        assert value.dtype == (torch.int64 if name == "top_id" else dtype)
        assert torch.equal(everything(fresh, within)[name], value), name
    assert fresh.version == 3
    assert numbers(fresh, fresh.sample(requests([9, 9]), Sampling(), seed=0)) == numbers(policy, rollout)

    policy.save(tmp_path / "policy")
    loaded = ExactPolicy.load(tmp_path / "policy")
    assert (loaded.space, loaded.head, loaded.version, loaded.problems) == (SPACE, head, 3, 2)
    assert torch.equal(loaded.logits, policy.logits) and loaded.logits.dtype == dtype
    assert loaded.values is not None and torch.equal(loaded.values, policy.values)


def test_states_and_files_that_do_not_fit(tmp_path: Path) -> None:
    policy = random_policy(SPACE)
    state = policy.state_dict()
    with pytest.raises(UsageError, match="'logits' is missing"):
        policy.load_state_dict({k: v for k, v in state.items() if k != "logits"})
    with pytest.raises(UsageError, match=r"\(2, 7, 3\), this policy \(3, 7, 3\)"):
        ExactPolicy(SPACE, 3).load_state_dict(state)
    policy.add_critic()
    with pytest.raises(UsageError, match="no critic"):
        policy.load_state_dict(state)
    with pytest.raises(UsageError, match="holds no exact policy"):
        ExactPolicy.load(tmp_path)
    policy.save(tmp_path)
    (tmp_path / "policy.safetensors").write_bytes(b"broken")
    with pytest.raises(UsageError, match="holds no exact policy"):
        ExactPolicy.load(tmp_path)


def test_policies_that_cannot_be() -> None:
    with pytest.raises(UsageError, match="at least one problem, got 0"):
        ExactPolicy(SPACE, 0)
    with pytest.raises(UsageError, match=r"shape \(1, 7, 3\), got \(1, 3\)"):
        ExactPolicy(SPACE, 1, torch.zeros(1, 3))
    with pytest.raises(UsageError, match="must be finite"):
        ExactPolicy(SPACE, 1, torch.full((1, 7, 3), -torch.inf))
    with pytest.raises(UsageError, match="unknown head 'order-2'"):
        ExactPolicy(SPACE, 1, head="order-2")
    with pytest.raises(UsageError, match="bfloat16"):
        ExactPolicy(SPACE, 1, dtype=torch.bfloat16)


def test_logits_are_copied() -> None:
    logits = torch.zeros(1, 7, 3, dtype=torch.float64)
    policy = ExactPolicy(SPACE, 1, logits)
    with torch.no_grad():
        policy.logits += 1
    assert not logits.any()


# --- functionals of two distributions, and views ----------------------------------------------------------------------


def test_collision_against_its_definition_and_finite_differences() -> None:
    policy = random_policy(SPACE)
    rollout = policy.sample(requests([6, 6]), Sampling(temperature=0.7), seed=0)
    payload = rollout.payload
    assert isinstance(payload, SequencePayload)
    found = policy.evaluate(rollout, frozenset({"collision"}))["collision"]
    for step in range(rollout.n_steps):
        row = policy.logits[payload.step_problem[step], payload.nodes[step]].detach().div(0.7).softmax(-1)
        torch.testing.assert_close(found[step].detach(), sum(chance**2 for chance in row))
    (slope,) = torch.autograd.grad(found.sum(), policy.logits)
    for index in ((0, 0, 0), (1, 0, 2)):
        values = []
        for sign in (1, -1):
            moved = random_policy(SPACE)
            with torch.no_grad():
                moved.logits[index] += sign * 1e-6
            values.append(float(moved.evaluate(rollout, frozenset({"collision"}))["collision"].detach().sum()))
        assert float(slope[index]) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_distances_to_a_model(temperature: float) -> None:
    policy, other = random_policy(SPACE), random_policy(SPACE, seed=9)
    policy.add_model("other", other.table())
    policy.add_model("same")
    rollout = policy.sample(requests([6, 6]), Sampling(temperature=temperature), seed=0)
    payload = rollout.payload
    assert isinstance(payload, SequencePayload)
    names = frozenset({"hellinger/other", "kl/other", "hellinger/same", "kl/same", "max_entropy"})
    found = policy.evaluate(rollout, names)
    assert not any(found[name].requires_grad for name in names)
    for step in range(rollout.n_steps):
        b, k = payload.step_problem[step], payload.nodes[step]
        p, q = ((one.logits[b, k].detach() / temperature).softmax(-1).tolist() for one in (policy, other))
        hellinger = 1 - sum(math.sqrt(x * y) for x, y in zip(p, q, strict=True))
        kl = sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
        assert float(found["hellinger/other"][step]) == pytest.approx(hellinger, abs=1e-12)
        assert float(found["kl/other"][step]) == pytest.approx(kl, abs=1e-12)
    assert not found["hellinger/same"].any() and not found["kl/same"].any()
    torch.testing.assert_close(found["max_entropy"], torch.full_like(rollout.logp, math.log(3)))


def test_a_view_is_the_present_policy_without_its_prompt() -> None:
    policy = random_policy(SPACE)
    policy.add_view("blind", Corruption())
    rollout = policy.sample(requests([6, 6]), Sampling(temperature=0.5), seed=0)
    payload = rollout.payload
    assert isinstance(payload, SequencePayload)
    with torch.no_grad():
        policy.logits += torch.arange(3)  # a view follows the weights
    found = policy.evaluate(rollout, frozenset({"logp/blind", "kl/blind"}))
    for step in range(rollout.n_steps):
        k, token = int(payload.nodes[step]), int(payload.ids[step])
        rows = (policy.logits[:, k].detach() / 0.5).softmax(-1)
        mean = rows.mean(0)
        assert float(found["logp/blind"][step]) == pytest.approx(math.log(float(mean[token])), abs=1e-12)
        p = rows[payload.step_problem[step]]
        assert float(found["kl/blind"][step]) == pytest.approx(float((p * (p / mean).log()).sum()), abs=1e-12)
    assert not found["logp/blind"].requires_grad
    assert policy.models == frozenset() and policy.state_dict()["models"] == {}

    other = random_policy(SPACE, seed=3)
    other.load_state_dict(policy.state_dict())
    again = other.evaluate(rollout, frozenset({"logp/blind"}))
    assert torch.equal(again["logp/blind"], found["logp/blind"])
    # A state without views leaves those that are there.
    other.load_state_dict({n: v for n, v in policy.state_dict().items() if n != "views"})
    assert "logp/blind" in other.columns

    alone = ExactPolicy(SPACE, 1, policy.logits[:1].detach())
    alone.add_view("blind", Corruption())
    one = alone.sample([Request(example_of(0), 5)], Sampling(), seed=0)
    torch.testing.assert_close(alone.evaluate(one, frozenset({"logp/blind"}))["logp/blind"], one.logp)
    alone.add_model("ref")
    with pytest.raises(UsageError, match="has a model 'ref' already"):
        alone.add_view("ref", Corruption())

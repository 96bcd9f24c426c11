"""Chains: where answers are cut, which continuations are drawn there, and how a rollout says so."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from polopt.core.errors import UsageError
from polopt.core.example import Example
from polopt.core.policy import Request
from polopt.core.rollout import Rollout, Source
from polopt.policies.causal_lm.policy import CausalLM
from polopt.policies.exact import ExactPolicy, SequenceSpace
from polopt.rollouts.chain import Chain, cuts
from polopt.rollouts.groups import Groups
from tests.policies.causal_lm.models import byte_tokenizer, tiny

LIMIT = 6


def exact() -> tuple[Any, list[Request]]:
    space = SequenceSpace(3, LIMIT, end=True)
    logits = torch.randn(2, space.n_nodes, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return ExactPolicy(space, 2, 1.5 * logits), [Request(Example(str(b), str(b)), 4) for b in range(2)]


def language_model() -> tuple[Any, list[Request]]:
    one = CausalLM(tiny("Qwen3"), byte_tokenizer())
    return one, [Request(Example("1", "one"), 3), Request(Example("2", "a longer prompt"), 2)]


worlds = pytest.mark.parametrize("world", [exact, language_model])
chain = Chain(every=2, continuations=3)


def actions(rollout: Rollout) -> list[tuple[int, ...]]:
    return [tuple(piece.tolist()) for piece in torch.split(rollout["action"], rollout.lengths.tolist())]


def parts(rollout: Rollout) -> tuple[Rollout, Rollout]:
    """Answers and probes."""
    probe = rollout["source"] == Source.PROBE
    return rollout.select(~probe), rollout.select(probe)


def expected_states(main: Rollout, every: int) -> list[list[tuple[int, tuple[int, ...]]]]:
    """Prompt and prefix of the cuts of each answer, token by token."""
    found = []
    for group, taken, p in zip(
        main.group.tolist(), actions(main), torch.split(main.logp.exp(), main.lengths.tolist()), strict=True
    ):
        unsure = [t for t, value in enumerate(p.tolist()) if value < 0.9]
        found.append([(group, taken[:t]) for t in unsure[::every]])
    return found


@worlds
def test_answers_are_those_of_plain_groups(world: Callable[[], Any]) -> None:
    policy, requests = world()
    main, _ = parts(chain(policy, requests, limit=LIMIT, seed=3))
    plain = Groups()(policy, requests, limit=LIMIT, seed=3)
    assert actions(main) == actions(plain) and main.group.tolist() == plain.group.tolist()
    assert main.mask.all() and torch.equal(main["truncated"], plain["truncated"])


@worlds
def test_every_distinct_prefix_at_a_cut_is_continued(world: Callable[[], Any]) -> None:
    policy, requests = world()
    rollout = chain(policy, requests, limit=LIMIT, seed=3)
    main, probes = parts(rollout)
    at = expected_states(main, 2)
    distinct = list(dict.fromkeys(state for answer in at for state in answer))
    assert len(distinct) < sum(map(len, at)), "the answers of a prompt share at least the prompt"
    assert probes.n_trajectories == 3 * len(distinct)
    assert not probes.mask.any()
    # Ids name the same prefixes wherever they stand.
    name = {state: main.n_trajectories + j for j, state in enumerate(distinct)}
    assert probes["state"].tolist() == [name[state] for state in distinct for _ in range(3)]
    ends = dict(zip(main["state"].tolist(), range(main.n_trajectories), strict=True))
    place = 0
    for i, (answer, length) in enumerate(zip(at, main.lengths.tolist(), strict=True)):
        boundaries = [len(prefix) for _, prefix in answer]
        for t in range(length):
            begun = sum(b <= t for b in boundaries)
            start = int(main["segment/start"][place + t])
            end = int(main["segment/end"][place + t])
            assert start == (name[answer[begun - 1]] if begun else -1)
            assert end == name[answer[begun]] if begun < len(answer) else ends[end] == i
        place += length


@worlds
def test_a_probe_goes_on_from_its_prefix(world: Callable[[], Any]) -> None:
    policy, requests = world()
    rollout = chain(policy, requests, limit=LIMIT, seed=3)
    main, probes = parts(rollout)
    distinct = list(dict.fromkeys(state for answer in expected_states(main, 2) for state in answer))
    read: Any = probes.payload
    for i, (group, prefix) in enumerate([state for state in distinct for _ in range(3)]):
        assert 1 <= int(probes.lengths[i]) <= LIMIT - len(prefix)
        assert read.examples[i].id == requests[group].example.id
        assert int(probes.group[i]) == group
    assert rollout.n_groups == len(requests)
    with torch.no_grad():
        again = policy.evaluate(rollout, frozenset({"logp"})).logp
    torch.testing.assert_close(again.to(rollout.logp), rollout.logp, rtol=1e-4, atol=1e-5)


def test_rewards_see_a_probe_whole() -> None:
    policy, requests = exact()
    main, probes = parts(chain(policy, requests, limit=LIMIT, seed=3))
    distinct = list(dict.fromkeys(state for answer in expected_states(main, 2) for state in answer))
    read: Any = probes.payload
    for i, (_, prefix) in enumerate([state for state in distinct for _ in range(3)]):
        assert read.completion_ids[i] == prefix + actions(probes)[i]
        assert policy.space.index(read.completion_ids[i]) >= 0


def test_probes_are_drawn_afresh() -> None:
    """With the seed of the answers, continuations of the prompt would be the answers."""
    policy, requests = exact()
    main, probes = parts(Chain(every=100, continuations=4)(policy, requests, limit=LIMIT, seed=3))
    assert [probes["state"].tolist().count(state) for state in set(probes["state"].tolist())] == [4, 4]
    assert actions(probes) != actions(main)


def test_probes_estimate_the_value_of_their_prefix() -> None:
    """Frequencies of first tokens after a prefix are the policy's."""
    policy, requests = exact()
    rollout = Chain(every=100, continuations=4000)(policy, requests[:1], limit=LIMIT, seed=1)
    _, probes = parts(rollout)
    first = probes["action"][probes.lengths.cumsum(0) - probes.lengths]
    seen = torch.bincount(first, minlength=3) / len(first)
    torch.testing.assert_close(seen.double(), policy.table()[0, 0].softmax(-1).detach(), rtol=0, atol=0.03)


def test_cuts_are_in_front_of_every_mth_unsure_step() -> None:
    p = torch.tensor([0.5, 0.95, 0.6, 0.7, 0.2, 0.89, 0.9, 0.91, 0.1], dtype=torch.float64)
    rollout = Rollout.from_arrays([0] * 6 + [1] * 3, [0, 0], step={"logp": p.log()})
    assert cuts(rollout, every=2).nonzero().flatten().tolist() == [0, 3, 5, 8]
    assert cuts(rollout, every=100).nonzero().flatten().tolist() == [0, 8]
    assert cuts(rollout, threshold=2.0, every=3).nonzero().flatten().tolist() == [0, 3, 6]


def test_a_policy_that_is_sure_is_not_probed() -> None:
    space = SequenceSpace(2, 4)
    sure = torch.tensor([20.0, -20.0]).expand(1, space.n_nodes, 2)
    rollout = Chain()(ExactPolicy(space, 1, sure), [Request(Example("0", "0"), 3)], limit=4, seed=0)
    assert rollout.n_trajectories == 3 and (rollout["source"] == Source.POLICY).all()
    assert (rollout["segment/start"] == -1).all()
    assert rollout["segment/end"].tolist() == rollout.trajectory.tolist()


@worlds
def test_limits_of_requests_hold_for_probes(world: Callable[[], Any]) -> None:
    policy, requests = world()
    short = [dataclasses.replace(request, limit=3) for request in requests]
    rollout = Chain(every=1, continuations=2)(policy, short, limit=LIMIT, seed=3)
    main, probes = parts(rollout)
    distinct = list(dict.fromkeys(state for answer in expected_states(main, 1) for state in answer))
    longest = [3 - len(prefix) for _, prefix in distinct for _ in range(2)]
    assert int(main.lengths.max()) <= 3
    assert all(n <= most for n, most in zip(probes.lengths.tolist(), longest, strict=True))


def test_requests_that_ask_for_nothing_are_passed_over() -> None:
    policy, requests = exact()
    asked = [dataclasses.replace(requests[0], count=0), requests[1]]
    main, probes = parts(chain(policy, asked, limit=LIMIT, seed=3))
    read: Any = probes.payload
    assert main.n_trajectories == 4 and {example.id for example in read.examples} == {"1"}


@worlds
def test_a_rollout_is_a_function_of_its_seed(world: Callable[[], Any]) -> None:
    policy, requests = world()
    one, two, other = (chain(policy, requests, limit=LIMIT, seed=seed) for seed in (5, 5, 6))
    assert actions(one) == actions(two) and actions(one) != actions(other)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"threshold": 0.0}, "threshold is 0.0"),
        ({"every": 0}, "every is 0"),
        ({"continuations": 0}, "continuations is"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Chain(**options)

"""Going on after a prefix, writing given actions, and joining: both policies against what they sample in one go."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from polopt.core.errors import UsageError
from polopt.core.example import Example
from polopt.core.policy import Request, Sampling
from polopt.core.rollout import Rollout, Source
from polopt.policies.causal_lm.payload import TokenPayload
from polopt.policies.causal_lm.policy import CausalLM
from polopt.policies.exact import SequencePayload, SequenceSpace
from polopt.policies.exact.policy import example_of
from tests.policies.causal_lm.models import byte_tokenizer, tiny
from tests.policies.exact.oracle import random_policy

LIMIT = 6
SPACE = SequenceSpace(3, 5, end=True)


def exact() -> tuple[Any, list[Request]]:
    return random_policy(SPACE, seed=2), [Request(example_of(0), 3), Request(example_of(1), 2)]


def language_model() -> tuple[Any, list[Request]]:
    one = CausalLM(tiny("Qwen3"), byte_tokenizer())
    return one, [Request(Example("1", "one"), 3), Request(Example("2", "a longer prompt"), 2)]


def generated() -> tuple[Any, list[Request]]:
    one = CausalLM(tiny("GPT2"), byte_tokenizer())  # no native decoder
    return one, [Request(Example("1", "one"), 3), Request(Example("2", "a longer prompt"), 2)]


worlds = pytest.mark.parametrize("world", [exact, language_model, generated])


def actions(rollout: Rollout) -> list[tuple[int, ...]]:
    return [tuple(piece.tolist()) for piece in torch.split(rollout["action"], rollout.lengths.tolist())]


def halves(policy: Any, requests: list[Request]) -> tuple[Rollout, Rollout]:
    """Two steps of each trajectory at most, and what follows where it goes on."""
    first = policy.sample(requests, Sampling(max_new_tokens=2), seed=0)
    going = first["truncated"].bool()
    first = first.select(going)
    each = [request for request in requests for _ in range(request.count)]
    asked = [
        dataclasses.replace(request, count=1, prefix=ids)
        for request, ids in zip(
            [r for r, on in zip(each, going.tolist(), strict=True) if on], actions(first), strict=True
        )
    ]
    return first, policy.sample(asked, Sampling(max_new_tokens=LIMIT), seed=1)


@worlds
def test_a_joined_trajectory_is_evaluated_as_if_sampled_in_one_go(world: Callable[[], Any]) -> None:
    policy, requests = world()
    first, second = halves(policy, [dataclasses.replace(request, count=8) for request in requests])
    joined = first.join(second)
    assert joined.n_trajectories == first.n_trajectories >= 4
    assert joined.lengths.tolist() == (first.lengths + second.lengths).tolist()
    assert joined.group.tolist() == first.group.tolist()
    assert actions(joined) == [a + b for a, b in zip(actions(first), actions(second), strict=True)]
    assert torch.equal(joined["truncated"], second["truncated"])
    payload: Any = joined.payload
    assert [tuple(ids) for ids in payload.completion_ids] == actions(joined)
    assert payload.completions == tuple(
        policy.decode(actions(joined))
        if hasattr(policy, "decode")
        else (" ".join(map(str, a)) for a in actions(joined))
    )
    with torch.no_grad():
        found = policy.evaluate(joined, frozenset({"logp", "entropy"}))
    torch.testing.assert_close(found.logp.to(joined.logp), joined.logp, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.entropy.to(joined.logp), joined["entropy"], rtol=1e-4, atol=1e-5)


@worlds
def test_the_text_of_a_continuation_is_whole(world: Callable[[], Any]) -> None:
    policy, requests = world()
    first, second = halves(policy, requests)
    payload: Any = first.join(second).payload
    before: Any = first.payload
    for whole, start in zip(payload.completions, before.completions, strict=True):
        assert whole.startswith(start.rstrip("\ufffd"))


@worlds
def test_limits_of_requests_hold_one_by_one(world: Callable[[], Any]) -> None:
    policy, requests = world()
    limited = [dataclasses.replace(requests[0], limit=1), dataclasses.replace(requests[1], limit=100)]
    rollout = policy.sample(limited, Sampling(max_new_tokens=4), seed=0)
    free = policy.sample(requests, Sampling(max_new_tokens=4), seed=0)
    assert rollout.lengths[:3].tolist() == [1, 1, 1]
    assert actions(rollout)[:3] == [ids[:1] for ids in actions(free)[:3]]
    assert actions(rollout)[3:] == actions(free)[3:]
    ended = [ids[0] in policy.end_ids for ids in actions(rollout)[:3]]
    assert rollout["truncated"][:3].tolist() == [not end for end in ended]


@worlds
def test_what_is_written_is_what_was_given(world: Callable[[], Any]) -> None:
    policy, requests = world()
    texts = ["1 0", "0 1 1"] if world is exact else ["<ok>", "seven"]
    rollout = policy.write(requests, texts)
    payload: Any = rollout.payload
    assert payload.completions == tuple(texts)
    assert rollout.group.tolist() == [0, 1] and rollout.mask.all()
    assert (rollout["source"] == int(Source.DATASET)).all() and not rollout["truncated"].any()
    prefixed = [
        dataclasses.replace(request, prefix=ids) for request, ids in zip(requests, actions(rollout), strict=True)
    ]
    again = policy.write(prefixed, ["1", "2"])
    joined: Any = rollout.join(again).payload
    assert joined.completions == (("1 0 1", "0 1 1 2") if world is exact else ("<ok>1", "seven2"))
    with torch.no_grad():
        whole = policy.evaluate(rollout.join(again), frozenset({"logp"})).logp
        first = policy.evaluate(rollout, frozenset({"logp"})).logp
        second = policy.evaluate(again, frozenset({"logp"})).logp
    split = torch.split(whole, rollout.join(again).lengths.tolist())
    starts = torch.split(first, rollout.lengths.tolist())
    for piece, start, end in zip(split, starts, second, strict=True):
        torch.testing.assert_close(piece, torch.cat([start, end[None]]), rtol=1e-4, atol=1e-5)


@worlds
def test_room_is_what_a_trajectory_may_still_take(world: Callable[[], Any]) -> None:
    policy, requests = world()
    rollout = policy.sample(requests, Sampling(max_new_tokens=2), seed=0)
    if world is exact:
        assert policy.room(rollout) == [5 - n for n in rollout.lengths.tolist()]
        return
    prompts = [3] * 3 + [15] * 2
    context = policy.context_length
    assert policy.room(rollout) == [context - p - n for p, n in zip(prompts, rollout.lengths.tolist(), strict=True)]


def test_texts_and_prefixes_that_cannot_be() -> None:
    policy, requests = exact()
    for text, words in {
        "": "is empty",
        "3": "outside the space",
        "x": "outside the space",
        "2 1": "goes on after 0 .. 1",
    }.items():
        with pytest.raises(UsageError, match=words):
            policy.write(requests[:1], [text])
    with pytest.raises(UsageError, match="fills the 5 tokens"):
        policy.sample([dataclasses.replace(requests[0], prefix=(0, 1, 0, 1, 0))], Sampling(), seed=0)
    with pytest.raises(UsageError, match="has the token 2"):
        policy.sample([dataclasses.replace(requests[0], prefix=(0, 2))], Sampling(), seed=0)
    model, asked = language_model()
    with pytest.raises(UsageError, match="example '1' is empty"):
        model.write(asked[:1], [""])
    with pytest.raises(UsageError, match="does not fit"):
        model.write(asked[:1], ["x" * 10_000])


def test_joins_that_cannot_be() -> None:
    policy, requests = exact()
    rollout = policy.sample(requests, Sampling(max_new_tokens=1), seed=0)
    with pytest.raises(ValueError, match="cannot join 5 trajectories with 2"):
        rollout.join(rollout.select(torch.tensor([0, 1])))
    with pytest.raises(ValueError, match="step column 'weight'"):
        rollout.join(rollout.with_columns(step={"weight": rollout.logp}))


@worlds
def test_replacing_trajectories_leaves_the_others_and_all_groups_alone(world: Callable[[], Any]) -> None:
    policy, requests = world()
    rollout = policy.sample(requests, Sampling(max_new_tokens=3), seed=0)
    others = policy.sample([requests[1], dataclasses.replace(requests[0], count=0)], Sampling(max_new_tokens=3), seed=5)
    mixed = rollout.replaced(torch.tensor([3, 4]), others)
    assert mixed.group.tolist() == rollout.group.tolist()
    assert actions(mixed) == actions(rollout)[:3] + actions(others)
    payload: Any = mixed.payload
    assert isinstance(payload, TokenPayload | SequencePayload)
    assert [tuple(ids) for ids in payload.completion_ids] == actions(mixed)

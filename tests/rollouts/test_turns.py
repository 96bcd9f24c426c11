"""Turns: what the policy wrote and what the environment wrote, step by step."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from polopt.core.errors import UsageError
from polopt.core.example import Example
from polopt.core.policy import Request
from polopt.core.rollout import Rollout
from polopt.policies.causal_lm.payload import TokenPayload
from polopt.policies.causal_lm.policy import CausalLM
from polopt.policies.exact import ExactPolicy, SequenceSpace
from polopt.policies.exact.policy import example_of
from polopt.rollouts.environments import get_environment
from polopt.rollouts.groups import Groups
from polopt.rollouts.turns import Turns
from tests.policies.causal_lm.models import byte_tokenizer, tiny

LIMIT = 24
ASKING = tuple("cdfghjklmnCDFGHJKLMN")
"""None of them is in the name of a special token, which stop strings are looked for in too."""


def ids_of(text: str) -> list[int]:
    return byte_tokenizer()(text)["input_ids"]  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Echo:
    """Answers any of some letters with a text."""

    said: str | None = "<ok>"
    stop: tuple[str, ...] = ASKING

    def reply(self, example: Example, completion: str) -> str | None:
        return self.said


def policy() -> CausalLM:
    return CausalLM(tiny("Qwen3"), byte_tokenizer())


def requests(count: int = 12) -> list[Request]:
    return [Request(Example("1", "one"), count), Request(Example("2", "another prompt"), count)]


def sampled(part: Groups, seed: int = 0, asked: list[Request] | None = None, limit: int = LIMIT) -> Rollout:
    return part(policy(), asked or requests(), limit=limit, seed=seed)


def pieces(rollout: Rollout) -> list[tuple[list[int], list[int], list[bool]]]:
    """Tokens, turns and mask of each trajectory."""
    columns = [rollout["action"], rollout["turn"], rollout.mask]
    split = [torch.split(column, rollout.lengths.tolist()) for column in columns]
    return [tuple(part.tolist() for part in row) for row in zip(*split, strict=True)]  # type: ignore[misc]


def test_answers_stand_where_they_were_asked_for() -> None:
    rollout = sampled(Turns(environment=Echo()))
    payload = rollout.payload
    assert isinstance(payload, TokenPayload)
    tokens = ids_of("<ok>")
    letters = set(ids_of("".join(ASKING)))
    answered = 0
    for (ids, turn, mask), text in zip(pieces(rollout), payload.completions, strict=True):
        assert text == policy().decode([ids])[0]
        here = 0
        for t, own in enumerate(mask):
            if not own and (t == 0 or turn[t] != turn[t - 1]):
                # An answer begins: right behind a letter of the policy's, and it is whole.
                assert mask[t - 1] and ids[t - 1] in letters
                assert ids[t : t + 4] == tokens and mask[t : t + 4] == [False] * 4
                here += 1
            assert turn[t] == here
        answered += here
        asked = [t for t, own in enumerate(mask) if own and ids[t] in letters]
        assert len(asked) - here in (0, 1)  # the last question may have come where nothing fits any more
    assert answered > 10


def test_log_probs_are_those_of_the_policy_in_that_context() -> None:
    one = policy()
    rollout = Turns(environment=Echo())(one, requests(), limit=LIMIT, seed=1)
    with torch.no_grad():
        found = one.evaluate(rollout, frozenset({"logp", "entropy"}))
    mask = rollout.mask
    assert not mask.all()
    torch.testing.assert_close(found.logp[mask], rollout.logp[mask], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.entropy[mask], rollout["entropy"][mask], rtol=1e-4, atol=1e-4)
    assert not rollout.logp[~mask].any() and not rollout["entropy"][~mask].any()


def test_groups_lengths_and_budget() -> None:
    rollout = sampled(Turns(environment=Echo()))
    assert rollout.group.tolist() == [0] * 12 + [1] * 12
    assert int(rollout.lengths.max()) <= LIMIT
    assert (rollout["limit"] == LIMIT).all()
    payload = rollout.payload
    assert isinstance(payload, TokenPayload)
    assert payload.lengths.tolist() == rollout.lengths.tolist()
    assert payload.ids.tolist() == rollout["action"].tolist()
    assert [e.id for e in payload.examples] == ["1"] * 12 + ["2"] * 12
    ended = torch.isin(rollout["action"][rollout.lengths.cumsum(0) - 1], torch.tensor(policy().end_ids))
    assert torch.equal(rollout["truncated"].bool(), ~ended)
    rollout.select(torch.tensor([20, 3]))  # columns and payload fit together


def test_an_environment_that_says_nothing_changes_nothing_but_the_randomness_behind_a_question() -> None:
    plain, silent = sampled(Groups()), sampled(Turns(environment=Echo("")))
    assert silent.mask.all() and not silent["turn"].any()
    letters = set(ids_of("".join(ASKING)))
    first = [list(piece) for piece in torch.split(plain["action"], plain.lengths.tolist())]
    for (ids, _, _), other in zip(pieces(silent), first, strict=True):
        until = next((t + 1 for t, token in enumerate(ids) if token in letters), len(ids))
        assert ids[:until] == [int(token) for token in other[:until]]


def test_an_environment_that_ends_the_trajectory() -> None:
    rollout = sampled(Turns(environment=Echo(None)))
    letters = set(ids_of("".join(ASKING)))
    for ids, turn, _ in pieces(rollout):
        assert not any(token in letters for token in ids[:-1]) and not any(turn)


def test_it_is_asked_at_most_so_often() -> None:
    rollout = sampled(Turns(environment=Echo(), most=1), limit=40)
    assert int(rollout["turn"].max()) == 1
    letters = set(ids_of("".join(ASKING)))
    assert any(
        token in letters and turn == 1 and own
        for ids, turns, mask in pieces(rollout)
        for token, turn, own in zip(ids, turns, mask, strict=True)
    )


def test_a_trajectory_does_not_depend_on_its_neighbours() -> None:
    whole = sampled(Turns(environment=Echo()), asked=requests())
    fewer = sampled(Turns(environment=Echo()), asked=[requests()[0], Request(Example("2", "another prompt"), 3)])
    assert pieces(fewer) == pieces(whole)[:15]


def test_strings_of_the_users_own_end_a_trajectory() -> None:
    rollout = sampled(Turns(environment=Echo(), stop=("d",)))
    for ids, _, mask in pieces(rollout):
        assert not any(token in ids_of("d") and own for token, own in zip(ids[:-1], mask[:-1], strict=True))


def test_environments_by_name() -> None:
    assert get_environment("calculator").stop == ("=",)
    with pytest.raises(UsageError, match="no environment 'abacus'; built in are calculator"):
        get_environment("abacus")
    with pytest.raises(UsageError, match="lacks `reply` or `stop`"):
        get_environment("builtins:dict")
    with pytest.raises(UsageError, match="most is 0"):
        Turns(most=0)


def test_a_policy_without_text_is_never_answered() -> None:
    space = SequenceSpace(3, 4)
    exact, asked = ExactPolicy(space, 2), [Request(example_of(b), 8) for b in range(2)]
    rollout = Turns()(exact, asked, limit=4, seed=0)
    plain = Groups()(exact, asked, limit=4, seed=0)
    assert rollout["action"].tolist() == plain["action"].tolist()
    assert rollout.mask.all() and not rollout["turn"].any() and not rollout["truncated"].any()

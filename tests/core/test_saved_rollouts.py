"""Rollouts in checkpoints: what comes back is the same to the bit, whatever the policy, and works as before."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from torch import Tensor

from polopt.core.errors import UsageError
from polopt.core.example import Example
from polopt.core.part import Stateful, clone
from polopt.core.policy import Request, Sampling
from polopt.core.rollout import Counts, Rollout, payload_kind
from polopt.policies.causal_lm.payload import TokenPayload
from polopt.policies.causal_lm.policy import CausalLM
from polopt.policies.exact import ExactPolicy, SequenceSpace
from polopt.training.checkpoint import load_checkpoint, save_checkpoint
from tests.policies.causal_lm.models import byte_tokenizer, tiny
from tests.training.test_checkpoint import same

CHAT = ({"role": "system", "content": "be brief"}, {"role": "user", "content": "Grüße \U0001f600"})
ASKED = [
    Example("0", "1+1=", "2", steps=("one", "two"), columns={"level": 3, "names": ["a", ("b", None)], "share": 0.1}),
    Example("1", CHAT, chosen=CHAT, label=True),
]


def tokens() -> tuple[CausalLM, Rollout]:
    policy = CausalLM(tiny(), byte_tokenizer(), default_max_new_tokens=6)
    requests = [Request(ASKED[0], 2), Request(ASKED[1], 3), Request(ASKED[0], 1, prompt="a hint, then 1+1=")]
    return policy, policy.sample(requests, Sampling(temperature=0.7, top_p=0.9, max_new_tokens=6), seed=3)


def sequences() -> tuple[ExactPolicy, Rollout]:
    generator = torch.Generator().manual_seed(0)
    space = SequenceSpace(4, 3, end=True)
    logits = torch.randn(2, space.n_nodes, 4, generator=generator, dtype=torch.float64)
    policy = ExactPolicy(space, 2, logits)
    requests = [Request(ASKED[1], 3), Request(ASKED[0], 2)]
    return policy, policy.sample(requests, Sampling(temperature=1.3), seed=5)


WORLDS = [tokens, sequences]
each_world = pytest.mark.parametrize("world", WORLDS, ids=["tokens", "sequences"])


def through_disk(state: Mapping[str, Any], run: Path) -> dict[str, Any]:
    return load_checkpoint(save_checkpoint(run, 0, state))


def equal(a: Rollout, b: Rollout) -> None:
    assert same(a.state_dict(), b.state_dict())
    assert type(a.payload) is type(b.payload)
    assert a.payload is not None and b.payload is not None
    for name in (f.name for f in dataclasses.fields(a.payload)):  # type: ignore[arg-type]
        assert same(getattr(a.payload, name), getattr(b.payload, name)), name


@each_world
def test_a_rollout_comes_back_bit_for_bit(world: Any, tmp_path: Path) -> None:
    policy, rollout = world()
    rollout = rollout.with_columns(
        trajectory={"reward": rollout.lengths.double() / 7 * torch.nan}, group={"level": torch.arange(rollout.n_groups)}
    )
    back = Rollout.from_state(through_disk({"kept": rollout.state_dict()}, tmp_path)["kept"])
    equal(back, rollout)
    assert back.examples == rollout.examples and [e.columns for e in back.examples] == [
        e.columns for e in rollout.examples
    ]
    with torch.no_grad():
        names = frozenset({"logp", "entropy"})
        found, expected = policy.evaluate(back, names), policy.evaluate(rollout, names)
    assert all(torch.equal(found[name], expected[name]) for name in names)


@each_world
def test_it_can_be_selected_and_concatenated_as_before(world: Any, tmp_path: Path) -> None:
    _, rollout = world()
    back = Rollout.from_state(through_disk({"kept": rollout.state_dict()}, tmp_path)["kept"])
    order = torch.tensor([3, 0, 4])
    equal(back.select(order), rollout.select(order))
    both, twice = Rollout.concat([back, rollout]), Rollout.concat([rollout, rollout])
    assert both.examples == twice.examples and torch.equal(both.logp, twice.logp)
    equal(back.select(torch.zeros(0, dtype=torch.int64)), rollout.select(torch.zeros(0, dtype=torch.int64)))


@each_world
def test_a_piece_keeps_its_normalisers(world: Any, tmp_path: Path) -> None:
    piece = world()[1].piece(torch.tensor([1, 2]))
    back = Rollout.from_state(through_disk({"kept": piece.state_dict()}, tmp_path)["kept"])
    assert back.counts == piece.counts != back.select(torch.tensor([0, 1])).counts


def test_examples_and_prompts_are_stored_once() -> None:
    state = tokens()[1].state_dict()["payload"]
    assert state["kind"] == "tokens"
    assert [row["id"] for row in state["pool"]] == ["0", "1"] and state["example_of"] == [0, 0, 1, 1, 1, 0]
    assert state["prompt_texts"] == [None] * 5 + ["a hint, then 1+1="]
    assert len(state["prompt_lengths"]) == 3


def test_a_rollout_without_payload(tmp_path: Path) -> None:
    rollout = Rollout.from_arrays([0, 0, 1], [0, 1], step={"logp": [-1.0, -2.0, -3.0]})
    back = Rollout.from_state(through_disk(rollout.state_dict(), tmp_path))
    assert back.payload is None and torch.equal(back.logp, rollout.logp) and back.counts == Counts(3.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="no payload"):
        _ = back.examples


@dataclasses.dataclass(frozen=True)
class Unknown:
    """A payload that nobody registered."""

    def select(self, trajectories: Tensor) -> Self:
        return self


def test_payloads_without_a_kind_and_kinds_without_a_payload_are_named() -> None:
    rollout = Rollout.from_arrays([0], [0], payload=Unknown())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Unknown is no registered kind"):
        rollout.state_dict()
    state = sequences()[1].state_dict()
    state["payload"]["kind"] = "pictures"
    with pytest.raises(UsageError, match=r"kind 'pictures'; the kinds known here are .*sequences, tokens"):
        Rollout.from_state(state)
    with pytest.raises(ValueError, match="called 'tokens'"):
        payload_kind("tokens")(TokenPayload)


@dataclasses.dataclass(frozen=True)
class Memory(Stateful):
    """A part that keeps the last rollout."""

    last: Rollout | None = dataclasses.field(default=None, init=False, compare=False)

    state = ("last",)

    def observe(self, rollout: Rollout) -> None:
        self.remember(last=rollout)


@each_world
def test_a_part_may_keep_a_rollout(world: Any, tmp_path: Path) -> None:
    part, rollout = Memory(), world()[1]
    empty = Memory()
    empty.load_state_dict(through_disk(part.state_dict(), tmp_path / "empty"))
    assert empty.last is None
    part.observe(rollout)
    fresh = Memory()
    fresh.load_state_dict(through_disk(part.state_dict(), tmp_path))
    equal(fresh.last, rollout)  # type: ignore[arg-type]
    copied = clone(part)
    equal(copied.last, rollout)
    assert copied.last.logp is not rollout.logp


def test_a_message_is_a_mapping_and_stays_one(tmp_path: Path) -> None:
    back = Rollout.from_state(through_disk(tokens()[1].state_dict(), tmp_path))
    prompts: Sequence[Any] = [example.prompt for example in back.examples]
    assert prompts[0] == "1+1=" and prompts[2] == CHAT and isinstance(prompts[2], tuple)


@each_world
def test_a_rollout_that_is_kept_extended_and_saved_again_and_again_does_not_grow(world: Any) -> None:
    _, fresh = world()
    kept, sizes = fresh, []
    for _ in range(6):
        both = Rollout.concat([fresh, kept])
        kept = Rollout.from_state(both.select(torch.arange(both.n_trajectories) % 2 == 0).state_dict())
        kept = kept.select(torch.arange(min(kept.n_trajectories, fresh.n_trajectories)))
        sizes.append(len(kept.state_dict()["payload"]["pool"]))
    assert max(sizes) <= fresh.n_trajectories

"""Trees: what is sampled once is there once, leaves are whole answers, nodes are named consistently."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from polopt.core.errors import UsageError
from polopt.core.example import Example
from polopt.core.policy import Request
from polopt.core.rollout import Rollout
from polopt.methods.credit.spo_segment import SegmentDifference
from polopt.policies.causal_lm.policy import CausalLM
from polopt.policies.exact import ExactPolicy, SequenceSpace
from polopt.policies.exact import tree as passes
from polopt.rewards.segment_values import SegmentValues
from polopt.rollouts.tree import Tree
from tests.policies.causal_lm.models import byte_tokenizer, tiny
from tests.support import same

LIMIT = 7


def exact() -> tuple[Any, list[Request]]:
    space = SequenceSpace(3, LIMIT, end=True)
    logits = torch.randn(2, space.n_nodes, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits[..., 2] -= 1.0
    return ExactPolicy(space, 2, logits), [Request(Example(str(b), str(b)), 4) for b in range(2)]


def language_model() -> tuple[Any, list[Request]]:
    one = CausalLM(tiny("Qwen3"), byte_tokenizer())
    return one, [Request(Example("1", "one"), 3), Request(Example("2", "a longer prompt"), 2)]


worlds = pytest.mark.parametrize("world", [exact, language_model])
tree = Tree(branching=(3, 2, 2), segment=2)


def actions(rollout: Rollout) -> list[tuple[int, ...]]:
    return [tuple(piece.tolist()) for piece in torch.split(rollout["action"], rollout.lengths.tolist())]


def edges(rollout: Rollout) -> dict[int, tuple[int, int, tuple[int, ...]]]:
    """By the node to which it leads: group and node from which an edge comes, and its actions."""
    found: dict[int, tuple[int, int, list[int]]] = {}
    for start, end, group, action in zip(
        rollout["segment/start"].tolist(),
        rollout["segment/end"].tolist(),
        rollout.step_group.tolist(),
        rollout["action"].tolist(),
        strict=True,
    ):
        known = found.setdefault(end, (group, start, []))
        assert known[:2] == (group, start)
        known[2].append(action)
    return {end: (group, start, tuple(taken)) for end, (group, start, taken) in found.items()}


def path(below: dict[int, tuple[int, int, tuple[int, ...]]], node: int) -> tuple[int, ...]:
    """The actions from the root to a node."""
    if node not in below:
        return ()
    _, start, taken = below[node]
    return path(below, start) + taken


def depth(below: dict[int, tuple[int, int, tuple[int, ...]]], node: int) -> int:
    return 0 if node not in below else 1 + depth(below, below[node][1])


@worlds
def test_a_tree_branches_as_it_is_told(world: Callable[[], Any]) -> None:
    policy, requests = world()
    rollout = tree(policy, requests, limit=LIMIT, seed=1)
    below = edges(rollout)
    children: dict[int, list[int]] = {}
    for end, (_, start, _) in below.items():
        children.setdefault(start, []).append(end)
    leaves = set(rollout["state"].tolist())
    assert len(leaves) == rollout.n_trajectories
    assert leaves == set(below) - set(children)
    for node, below_it in children.items():
        assert len(below_it) == (3, 2, 2)[depth(below, node)]
    for end, (_, _, taken) in below.items():
        level = depth(below, end)
        assert len(taken) <= (2 if level < 3 else LIMIT)
        # A segment goes on below unless it ended, filled the budget, or is of the last level.
        ended = taken[-1] in policy.end_ids
        assert (end in leaves) == (ended or level == 3 or len(path(below, end)) == LIMIT)
        assert level == 3 or ended or end in leaves or len(taken) == 2
    assert rollout.n_groups == len(requests)
    assert torch.equal(rollout["edge"], rollout["segment/end"])


@worlds
def test_a_leaf_is_the_answer_from_the_prompt_on(world: Callable[[], Any]) -> None:
    policy, requests = world()
    rollout = tree(policy, requests, limit=LIMIT, seed=1)
    below = edges(rollout)
    whole = [path(below, leaf) for leaf in rollout["state"].tolist()]
    for mine, answer, cut in zip(actions(rollout), whole, rollout["truncated"].tolist(), strict=True):
        assert answer[-len(mine) :] == mine
        assert len(answer) <= LIMIT
        assert cut == (answer[-1] not in policy.end_ids)
    read: Any = rollout.payload
    if isinstance(policy, ExactPolicy):
        assert list(read.completion_ids) == whole
    else:
        assert list(read.completions) == policy.decode([list(answer) for answer in whole])
    for example, group in zip(read.examples, rollout.group.tolist(), strict=True):
        assert example.id == requests[group].example.id


@worlds
def test_every_sampled_step_is_there_once_and_in_its_context(world: Callable[[], Any]) -> None:
    policy, requests = world()
    drawn: list[int] = []
    plain = policy.sample

    def counted(*arguments: Any, **options: Any) -> Rollout:
        made: Rollout = plain(*arguments, **options)
        drawn.append(made.n_steps)
        return made

    policy.sample = counted
    rollout = tree(policy, requests, limit=LIMIT, seed=1)
    assert rollout.n_steps == sum(drawn) and len(drawn) == 3
    assert rollout.mask.all()
    with torch.no_grad():
        again = policy.evaluate(rollout, frozenset({"logp"})).logp
    torch.testing.assert_close(again.to(rollout.logp), rollout.logp, rtol=1e-4, atol=1e-5)


def test_sampled_siblings_have_advantages_that_sum_to_zero() -> None:
    policy, requests = exact()
    rollout = tree(policy, requests, limit=LIMIT, seed=1)
    reward = torch.rand(rollout.n_trajectories, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    valued = SegmentValues()(rollout.with_columns(trajectory={"reward": reward}))
    advantage = SegmentDifference(whiten=False)(valued)
    total: dict[int, dict[int, float]] = {}
    for start, end, value in zip(
        valued["segment/start"].tolist(), valued["segment/end"].tolist(), advantage.tolist(), strict=True
    ):
        total.setdefault(start, {})[end] = value
    assert len(total) > 4
    for siblings in total.values():
        same(sum(siblings.values()), 0.0, atol=1e-14)


def test_a_tree_of_all_continuations_has_the_exact_values() -> None:
    """Under a uniform policy a tree with every token once below each node is the tree of the space."""
    space = SequenceSpace(2, 3)
    policy = ExactPolicy(space)
    reward = torch.rand(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start, end, state, owner = [], [], [], []
    for s, (row, nodes) in enumerate(zip(space.sequences.tolist(), space.nodes.tolist(), strict=True)):
        start += nodes
        end += [*nodes[1:], 100 + s]
        state.append(100 + s)
        owner += [s] * len(row)
    rollout = Rollout.from_arrays(
        owner,
        [0] * 8,
        step={"segment/start": torch.tensor(start), "segment/end": torch.tensor(end)},
        trajectories={"state": torch.tensor(state), "reward": reward},
    )
    q, v = passes.action_values(space, policy.table(), reward[None])
    found = SegmentDifference(whiten=False)(SegmentValues()(rollout))
    same(found, (q[0] - v[0][:, None])[space.nodes, space.sequences].flatten())
    # E[A | parent] = 0: the two children of a node are equally likely.
    for node in range(space.n_nodes):
        mine = {e: float(a) for b, e, a in zip(start, end, found.tolist(), strict=True) if b == node}
        same(sum(mine.values()), 0.0, atol=1e-14)


@worlds
def test_a_tree_of_one_level_goes_on_to_the_end(world: Callable[[], Any]) -> None:
    policy, requests = world()
    rollout = Tree(branching=(4,), segment=1)(policy, requests, limit=LIMIT, seed=0)
    assert rollout.n_trajectories == 4 * len(requests)
    assert int(rollout.lengths.max()) > 1
    assert rollout["segment/start"].tolist() == rollout.step_group.tolist()


def test_requests_that_ask_for_nothing_grow_no_tree() -> None:
    policy, requests = exact()
    asked = [dataclasses.replace(requests[0], count=0), requests[1]]
    read: Any = tree(policy, asked, limit=LIMIT, seed=3).payload
    assert {example.id for example in read.examples} == {"1"}


@worlds
def test_the_limit_of_a_request_holds(world: Callable[[], Any]) -> None:
    policy, requests = world()
    rollout = tree(policy, [dataclasses.replace(r, limit=3) for r in requests], limit=LIMIT, seed=1)
    below = edges(rollout)
    lengths = [len(path(below, leaf)) for leaf in rollout["state"].tolist()]
    assert max(lengths) == 3


@worlds
def test_a_rollout_is_a_function_of_its_seed(world: Callable[[], Any]) -> None:
    policy, requests = world()
    one, two, other = (tree(policy, requests, limit=LIMIT, seed=seed) for seed in (5, 5, 6))
    assert actions(one) == actions(two) and actions(one) != actions(other)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"branching": ()}, "branching is"), ({"branching": (2, 0)}, "branching is"), ({"segment": 0}, "segment is 0")],
)
def test_options_that_cannot_be(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Tree(**options)

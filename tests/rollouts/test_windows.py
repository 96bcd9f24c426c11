"""Windows: trajectories that go on in the next iteration, each step once, the same after a resume."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from polopt.core.errors import UsageError
from polopt.core.example import Example
from polopt.core.part import clone
from polopt.core.policy import Request
from polopt.core.rollout import Rollout
from polopt.policies.causal_lm.policy import CausalLM
from polopt.policies.exact import ExactPolicy, SequenceSpace
from polopt.rewards.reward import NamedReward
from polopt.rewards.scoring import Scorer
from polopt.rollouts.groups import Groups
from polopt.rollouts.states import actions
from polopt.rollouts.windows import Windows
from polopt.training.checkpoint import load_checkpoint, save_checkpoint
from polopt.training.checks import check_rewards
from polopt.training.collect import Collected
from tests.policies.causal_lm.models import byte_tokenizer, tiny

LIMIT = 8


def exact() -> ExactPolicy:
    """Three problems; the end token, 2, is rare at first and likelier later."""
    space = SequenceSpace(3, LIMIT, end=True)
    logits = torch.randn(3, space.n_nodes, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits[:, :, 2] -= 1.0
    return ExactPolicy(space, 3, logits)


def language_model() -> CausalLM:
    return CausalLM(tiny("Qwen3"), byte_tokenizer())


worlds = pytest.mark.parametrize("world", [exact, language_model])


def requests(count: int = 4) -> list[Request]:
    return [Request(Example(str(i), f"problem {i}"), count) for i in range(3)]


def run(policy: Any, part: Windows, iterations: int, *, start: int = 0, **columns: float) -> list[Rollout]:
    asked = [dataclasses.replace(request, columns=columns) for request in requests()]
    return [part(policy, asked, limit=LIMIT, seed=100 + i) for i in range(start, start + iterations)]


@worlds
def test_every_step_is_new_once_and_what_was_written_stays(world: Callable[[], Any]) -> None:
    policy, part = world(), clone(Windows(window=3))
    waiting: list[tuple[str, tuple[int, ...], list[float]]] = []
    ended = carried = 0
    for rollout in run(policy, part, 12):
        taken, old = actions(rollout), torch.split(rollout.logp, rollout.lengths.tolist())
        mask = [m.tolist() for m in torch.split(rollout.mask, rollout.lengths.tolist())]
        critic = [m.tolist() for m in torch.split(rollout["mask/critic"], rollout.lengths.tolist())]
        goes_on, before = rollout["unfinished"].tolist(), rollout["before"].tolist()
        assert rollout.n_trajectories == 12
        # Those that went on come first, as they were: their example, their steps, their log-probs.
        for i, (name, ids, logp) in enumerate(waiting):
            assert rollout.examples[i].id == name
            assert taken[i][: len(ids)] == ids and old[i][: len(ids)].tolist() == logp
            assert before[i] == len(ids)
        assert before[len(waiting) :] == [0] * (12 - len(waiting))
        for i, ids in enumerate(taken):
            assert mask[i] == [t >= before[i] for t in range(len(ids))]
            assert 1 <= len(ids) - before[i] <= 3 and len(ids) <= LIMIT
            assert critic[i] == [not goes_on[i]] * len(ids)
            # It goes on iff it neither wrote an end nor used up its budget; only the budget truncates.
            over = ids[-1] in policy.end_ids
            assert goes_on[i] == (not over and len(ids) < LIMIT)
            assert rollout["truncated"][i] == (not over and len(ids) == LIMIT)
        carried += len(waiting)
        ended += goes_on.count(False)
        waiting = [(rollout.examples[i].id, ids, old[i].tolist()) for i, ids in enumerate(taken) if goes_on[i]]
    assert ended > 12 and carried > 12


@worlds
def test_a_window_of_the_whole_budget_is_plain_groups(world: Callable[[], Any]) -> None:
    policy, part = world(), clone(Windows(window=LIMIT))
    for seed in range(2):
        plain = Groups()(policy, requests(), limit=LIMIT, seed=seed)
        windows = part(policy, requests(), limit=LIMIT, seed=seed)
        assert actions(windows) == actions(plain)
        assert part.pending is None and windows["mask/critic"].all() and windows.mask.all()
        for name in plain.names():
            assert torch.equal(windows[name], plain[name]), name


@worlds
def test_the_policy_agrees_with_the_steps_of_every_window(world: Callable[[], Any]) -> None:
    policy, part = world(), clone(Windows(window=2))
    for rollout in run(policy, part, 4):
        with torch.no_grad():
            found = policy.evaluate(rollout, frozenset({"logp", "entropy"}))
        torch.testing.assert_close(found.logp.to(rollout.logp), rollout.logp, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.entropy.to(rollout.logp), rollout["entropy"], rtol=1e-4, atol=1e-4)


def test_free_slots_are_filled_with_one_of_each_request_in_turn() -> None:
    policy, part = exact(), clone(Windows(window=2))
    with torch.no_grad():
        policy.logits[:, :, 2] = -30.0
        policy.logits[1, :, 2] = 30.0  # problem 1 ends at once
    asked = requests(2)
    first = part(policy, asked, limit=LIMIT, seed=0)
    assert [e.id for e in first.examples] == ["0", "0", "1", "1", "2", "2"]
    second = part(policy, asked, limit=LIMIT, seed=1)
    # Two slots are free: one trajectory of each of the first two requests.
    assert [e.id for e in second.examples] == ["0", "0", "2", "2", "0", "1"]
    assert second["before"].tolist() == [2, 2, 2, 2, 0, 0]
    # Slots stay apart: what goes on is nobody's sibling any more than before.
    assert second.group.tolist() == [0, 0, 1, 1, 2, 3]


def test_a_request_may_have_a_limit_and_columns_of_its_own() -> None:
    policy, part = exact(), clone(Windows(window=2))
    with torch.no_grad():
        policy.logits[:, :, 2] = -30.0
    asked = [Request(Example("0", "problem 0"), 1, limit=3, columns={"bonus": 0.1})]
    first, second = (part(policy, asked, limit=LIMIT, seed=seed) for seed in range(2))
    assert first.lengths.tolist() == [2] and first["unfinished"].tolist() == [True]
    assert second.lengths.tolist() == [3] and second["truncated"].tolist() == [True]
    assert part.pending is None and second["limit"].tolist() == [3]
    assert second["bonus"].tolist() == first["bonus"].tolist() == [0.1]


def test_a_prefix_counts_against_the_space_but_not_the_budget() -> None:
    policy, part = exact(), clone(Windows(window=2))
    with torch.no_grad():
        policy.logits[:, :, 2] = -30.0
    asked = [Request(Example("0", "problem 0"), 1, prefix=(0, 1, 0, 1, 0))]
    first, second = (part(policy, asked, limit=LIMIT, seed=seed) for seed in range(2))
    assert first["unfinished"].tolist() == [True]
    # Three steps are left in the space of eight.
    assert second.lengths.tolist() == [3] and second["unfinished"].tolist() == [False]
    assert second.payload.completion_ids[0][:5] == (0, 1, 0, 1, 0)  # type: ignore[union-attr]


@worlds
def test_it_resumes_bit_for_bit(world: Callable[[], Any], tmp_path: Path) -> None:
    policy, part = world(), clone(Windows(window=2))
    run(policy, part, 3, bonus=0.25)
    assert part.pending is not None
    saved = save_checkpoint(tmp_path, 3, {"part": part.state_dict()})
    expected = run(policy, part, 3, start=3, bonus=0.25)
    resumed = clone(Windows(window=2))
    resumed.load_state_dict(load_checkpoint(saved)["part"])
    actual = run(policy, resumed, 3, start=3, bonus=0.25)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one.lengths, other.lengths) and torch.equal(one.group, other.group)
        assert set(one.names()) == set(other.names())
        for name in one.names():
            assert torch.equal(one[name], other[name]), name
        assert [e.id for e in one.examples] == [e.id for e in other.examples]


def test_what_is_unfinished_is_neither_judged_nor_invalid() -> None:
    policy, part = exact(), clone(Windows(window=2))
    judged: list[int] = []

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        judged.append(len(completion_ids))
        return [None if ids[0] == 0 else 2.0 for ids in completion_ids]

    rollout = run(policy, part, 1)[0]
    goes_on = rollout["unfinished"]
    assert 0 < int(goes_on.sum()) < 12
    scored, invalid = Scorer((NamedReward("r", reward),))(rollout)
    assert judged == [int((~goes_on).sum())] and not invalid
    first = torch.tensor([ids[0] for ids in actions(rollout)])
    for name in ("reward", "score", "reward/r"):
        assert (scored[name][goes_on] == 0).all()
        assert torch.equal(scored[name].isnan(), ~goes_on & (first == 0))
        assert (scored[name][~goes_on & (first != 0)] == 2).all()
    # A reward that does not apply masks the trajectory for the critic too.
    without = scored.spread(scored.reward.isnan())
    assert torch.equal(scored["mask"], rollout.mask & ~without)
    assert torch.equal(scored["mask/critic"], rollout["mask/critic"] & ~without)
    answers = Collected(scored, scored, ()).answers
    assert answers.n_trajectories == int((~goes_on).sum()) and not answers["unfinished"].any()
    share = float((~goes_on & (first == 0)).sum() / (~goes_on).sum())
    assert check_rewards(answers, strict=False)["frac_reward_invalid"] == pytest.approx(share)


def test_a_failed_reward_is_named_by_its_place_among_all() -> None:
    policy, part = exact(), clone(Windows(window=2))
    rollout = run(policy, part, 1)[0]
    scorer = Scorer((NamedReward("r", lambda completion_ids, **_: [float("inf")] * len(completion_ids)),), "skip")
    scored, invalid = scorer(rollout)
    assert [failure.index for failure in invalid] == (~rollout["unfinished"]).nonzero().flatten().tolist()
    assert torch.equal(scored.reward.isnan(), ~rollout["unfinished"])


def test_nothing_ended_is_nothing_to_judge() -> None:
    policy, part = exact(), clone(Windows(window=1))
    with torch.no_grad():
        policy.logits[:, :, 2] = -30.0
    rollout = run(policy, part, 1)[0]
    assert rollout["unfinished"].all()
    scored, _ = Scorer((NamedReward("r", lambda completion_ids, **_: [1.0] * len(completion_ids)),))(rollout)
    assert (scored.reward == 0).all() and scored.mask.all() and not scored["mask/critic"].any()
    assert Collected(scored, scored, ()).answers.n_trajectories == 0


def test_a_window_has_a_step() -> None:
    with pytest.raises(UsageError, match="window is 0"):
        Windows(window=0)
    assert json.dumps(clone(Windows()).state_dict()) == '{"pending": null}'

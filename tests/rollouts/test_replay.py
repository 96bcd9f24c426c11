"""Replay: whole groups of recent iterations beside fresh ones, with what they were sampled and judged with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from polopt.claims.exact import start
from polopt.core.errors import UsageError
from polopt.core.policy import Request
from polopt.core.rollout import Rollout, Source
from polopt.methods import get_method
from polopt.policies.exact import ExactPolicy, SequenceSpace
from polopt.policies.exact.policy import example_of
from polopt.rewards.reward import NamedReward
from polopt.rewards.scoring import Scorer
from polopt.rollouts.replay import Replay
from polopt.tasks.problems import problem
from polopt.training.budget import Budget
from tests.support import same
from tests.training.conftest import make_tiny, make_trainer, short


def evaluate(rollout: Rollout, names: frozenset[str]) -> Rollout:
    raise AssertionError("nothing is evaluated")


def ended(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    return [float(ids[-1]) for ids in completion_ids]


SCORER = Scorer((NamedReward("last", ended),))


def collect(part: Replay, policy: ExactPolicy, groups: int, size: int, seed: int) -> Rollout:
    """One iteration: sample, score, observe what is fresh, as the trainer does."""
    numbers = [float(1000 * seed + i) for i in range(groups)]
    requests = [Request(example_of(i % policy.problems), size, columns={"number": n}) for i, n in enumerate(numbers)]
    rollout, _ = SCORER(part(policy, requests, limit=3, seed=seed))
    part.observe(rollout.select(rollout["source"] != Source.REPLAY), evaluate)
    policy.version += 1
    with torch.no_grad():
        policy.logits.add_(0.3 * torch.randn(policy.logits.shape, generator=torch.Generator().manual_seed(seed)))
    return rollout


def policy() -> ExactPolicy:
    return ExactPolicy(SequenceSpace(3, 3), 2)


@pytest.mark.parametrize(
    ("groups", "size", "share", "replayed"),
    [(128, 1, 0.4, 51), (16, 8, 0.4, 6), (5, 2, 0.5, 3), (4, 2, 0.0, 0), (4, 2, 1.0, 3), (1, 4, 0.9, 0)],
)
def test_a_share_of_the_groups_is_replayed(groups: int, size: int, share: float, replayed: int) -> None:
    """A batch of 128 single responses at p = 0.4 has 51 historical and 77 fresh ones."""
    part, made = Replay(share=share), policy()
    first = collect(part, made, groups, size, 0)
    assert bool((first["source"] == Source.POLICY).all())
    second = collect(part, made, groups, size, 1)
    old = second["source"] == Source.REPLAY
    assert second.n_groups == groups and second.n_trajectories == groups * size
    assert int(old.sum()) == replayed * size and second["version"].tolist() == [1] * int((~old).sum()) + [0] * int(
        old.sum()
    )


def test_what_is_replayed_is_what_was_sampled() -> None:
    part, made = Replay(share=0.5, window=1), policy()
    first = collect(part, made, 6, 4, 0)
    second = collect(part, made, 6, 4, 1)
    old = second.select(second["source"] == Source.REPLAY)
    actions = old.pad(old["action"]).tolist()
    before = first.pad(first["action"]).tolist()
    for group in range(old.n_groups):
        mine = (old.group == group).nonzero().flatten()
        match = [
            g
            for g in range(first.n_groups)
            if [before[i] for i in (first.group == g).nonzero().flatten()] == [actions[i] for i in mine]
            and first.select(first.group == g).examples[0].id == old.examples[int(mine[0])].id
        ]
        assert match
        one, other = first.select(first.group == match[0]), old.select(mine)
        for name in ("logp", "entropy", "reward", "score", "reward/last", "limit", "truncated", "mask"):
            assert torch.equal(one[name], other[name]), name
        # So that credit within the group is what it was.
        advantage = get_method("grpo").advantage
        same(advantage(one), advantage(other))
    with torch.no_grad():
        now = made.evaluate(old, frozenset({"logp"})).logp
    assert float((now - old.logp).abs().max()) > 0.1


def test_only_the_window_is_replayed_and_uniformly() -> None:
    part, made = Replay(share=0.5, window=2), policy()
    counts: Counter[int] = Counter()
    for iteration in range(300):
        found = collect(part, made, 8, 1, iteration)
        old = found["source"] == Source.REPLAY
        ages = (iteration - found["version"][old]).tolist()
        assert set(ages) <= {1, 2} and part.past is not None
        if iteration >= 2:
            counts.update(map(int, ages))
            # 4 fresh groups of each of the last two iterations: 8 to draw 4 from.
            assert part.past.n_groups == 8 and len(ages) == 4
    assert counts[1] + counts[2] == 298 * 4
    assert abs(counts[1] / (298 * 4) - 0.5) < 0.06


def test_no_group_is_drawn_twice_and_replays_are_not_replayed_again() -> None:
    part, made = Replay(share=0.75, window=3), policy()
    earlier: set[float] = set()
    for iteration in range(5):
        found = collect(part, made, 8, 2, iteration)
        assert part.past is not None and bool((part.past["source"] == Source.POLICY).all())
        old = found.select(found["source"] == Source.REPLAY)
        # 8 fresh groups, then 2 in each iteration; 6 of what is kept are replayed.
        drawn = old["number"].tolist()
        assert len(drawn) == 2 * len(set(drawn)) == (12 if iteration else 0)
        new = set(found["number"][found["source"] == Source.POLICY].tolist())
        assert set(drawn) <= earlier and not new & earlier
        earlier |= new


def test_a_share_of_zero_drops_what_was_kept() -> None:
    part, made = Replay(share=0.5), policy()
    collect(part, made, 4, 2, 0)
    assert part.past is not None
    off = replace(part, share=0.0)
    off.load_state_dict(part.state_dict())
    found = collect(off, made, 4, 2, 1)
    assert bool((found["source"] == Source.POLICY).all()) and off.past is None


def test_a_batch_is_a_function_of_the_seed_and_the_state() -> None:
    first, made = Replay(share=0.5), policy()
    collect(first, made, 6, 2, 0)
    second = Replay(share=0.5)
    second.load_state_dict(first.state_dict())
    requests = [Request(example_of(0), 2)] * 6
    one, two, three = (
        SCORER(part(made, requests, limit=3, seed=seed))[0] for part, seed in ((first, 5), (second, 5), (first, 6))
    )
    assert torch.equal(one["action"], two["action"]) and torch.equal(one.logp, two.logp)
    assert not torch.equal(one["action"], three["action"])


@pytest.mark.parametrize("options", [{"share": -0.1}, {"share": 1.1}, {"window": 0}])
def test_settings_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"replay needs a share in \[0, 1\]"):
        Replay(**options)


# --- rewards ----------------------------------------------------------------------------------------------------------


def test_a_known_reward_is_not_computed_again() -> None:
    judged: list[int] = []

    def counting(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float | None]:
        judged.append(len(completion_ids))
        return [None if len(judged) > 1 and i == 1 else 10.0 * len(judged) + i for i in range(len(completion_ids))]

    scorer = Scorer((NamedReward("count", counting, 2.0),), "skip")
    part, made = Replay(share=0.5), policy()
    requests = [Request(example_of(0), 2)] * 4
    first, _ = scorer(part(made, requests, limit=3, seed=0))
    part.observe(first, evaluate)
    second, _ = scorer(part(made, requests, limit=3, seed=1))
    assert judged == [8, 4]
    assert second["reward/count"][:4].nan_to_num(-1.0).tolist() == [20, -1, 22, 23]
    kept = second["reward/count"][4:].reshape(2, 2)
    assert all(row.tolist() in first["reward/count"].reshape(4, 2).tolist() for row in kept)
    same(second.reward.nan_to_num(-1.0), (2 * second["reward/count"]).nan_to_num(-1.0))
    same(second["score"].nan_to_num(-1.0), second.reward.nan_to_num(-1.0))
    assert second.spread(second.reward.isnan()).eq(~second.mask).all()


def test_a_failure_is_reported_at_its_place_in_the_batch() -> None:
    calls: list[int] = []

    def failing(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        calls.append(1)
        return [float("inf") if len(calls) > 1 and i == 2 else 1.0 for i in range(len(completion_ids))]

    scorer = Scorer((NamedReward("r", failing),), "skip")
    part, made = Replay(share=0.5), policy()
    requests = [Request(example_of(0), 2)] * 4
    part.observe(scorer(part(made, requests, limit=3, seed=0))[0], evaluate)
    mixed = part(made, requests, limit=3, seed=1)
    # Replayed ones first: the place in what is judged is not the place in the batch.
    turned, invalid = scorer(mixed.select(torch.arange(7, -1, -1)))
    assert [failure.index for failure in invalid] == turned.reward.isnan().nonzero().flatten().tolist() == [6]


# --- in a run ---------------------------------------------------------------------------------------------------------


def test_a_run_counts_and_logs_what_is_fresh() -> None:
    run = start(problem("multi-step", batch=5, seed=0), get_method("grpo") | {"rollout": Replay()}, seed=0, group=4)
    rollouts = []
    for _ in range(3):
        run.step()
        rollouts.append(run.trainer.meter.spent.rollouts)
    assert rollouts == [20, 32, 44]
    assert run.metrics["policy/age_max"] in (1.0, 2.0) and 0 < run.metrics["policy/age_mean"] < 2
    # The fresh part of the batch starts at ratio 1.
    assert run.metrics["policy/first_update_gap"] < 1e-9 < run.metrics["policy/logp_difference_mean"]


def test_in_half_precision_replays_keep_their_log_probs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = make_tiny()
    monkeypatch.setattr(type(tiny), "exact_sampler", property(lambda self: False))
    method = short("grpo")
    replay = Replay(stop_ids=method.rollout.stop_ids, share=0.5)
    trainer = make_trainer(tmp_path, method | {"rollout": replay}, tiny, budget=Budget(steps=2))
    batches: list[Any] = []
    collect_one = trainer.collect
    trainer.collect = lambda *a: batches.append(collect_one(*a)) or batches[-1]  # type: ignore[assignment, func-returns-value]
    trainer.train()
    kept = batches[1].kept
    old = kept.spread(kept["source"] == Source.REPLAY)
    assert torch.equal(kept.logp[old], kept["logp/sampler"][old]) and bool(old.any())
    assert not torch.equal(kept.logp[~old], kept["logp/sampler"][~old])

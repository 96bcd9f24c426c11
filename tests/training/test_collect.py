"""From prompts to a batch: refilled where filtered, no training without a reward, nothing computed idly."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from polopt.core.errors import UsageError
from polopt.core.loss import Evaluation, Loss, per_step
from polopt.core.part import Part
from polopt.core.policy import Request
from polopt.core.rollout import Rollout
from polopt.methods import methods
from polopt.policies.causal_lm.payload import TokenPayload
from polopt.regularizers.kl import KL
from polopt.rewards import NamedReward
from polopt.training.build import check_needs
from polopt.training.collect import Collected, judged
from polopt.training.run import train
from tests.training.conftest import (
    EVEN,
    CountingPolicy,
    even_share,
    gradients,
    make_collector,
    make_step,
    nudge,
    same_gradients,
    short,
)


@dataclass(frozen=True)
class KeepFirst(Part):
    """The first groups of whatever was drawn."""

    groups: int
    rounds: int = 8

    def __call__(self, rollout: Rollout) -> Rollout:
        return rollout.select(rollout.group < self.groups)


def collect(policy: CountingPolicy, slug: str = "grpo", seed: int = 0, reward: Any = EVEN, **slots: Any) -> Collected:
    method = short(slug, **slots)
    check_needs(method, policy, (reward,))
    return make_collector(policy, reward)(method, torch.Generator().manual_seed(seed))


# --- filters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "rounds", "kept"),
    [
        (None, 1, 4),
        (KeepFirst(4), 1, 4),
        (KeepFirst(3), 2, 4),  # 3 + 3, cut to what was asked for
        (KeepFirst(1), 4, 4),
        (KeepFirst(1, rounds=3), 3, 3),  # as full as it gets
        (KeepFirst(0, rounds=2), 2, 0),
    ],
    ids=repr,
)
def test_a_batch_is_refilled_until_full_or_out_of_rounds(
    part: Any, rounds: int, kept: int, policy: CountingPolicy
) -> None:
    found = collect(policy, filter=part)
    assert policy.sampled == rounds
    assert found.drawn.n_groups == 4 * rounds and found.drawn.n_trajectories == 16 * rounds
    if not kept:
        assert found.kept is None
        return
    assert found.kept is not None
    assert found.kept.n_groups == kept and found.kept.group.unique().tolist() == list(range(kept))
    drawn, trained = found.drawn.payload, found.kept.payload
    assert isinstance(drawn, TokenPayload) and isinstance(trained, TokenPayload)
    # What is kept is what was drawn: the first groups of each round, in order.
    each = 4 if part is None else part.groups
    expected = [i for i in range(found.drawn.n_trajectories) if int(found.drawn.group[i]) % 4 < each][: 4 * kept]
    assert trained.completions == tuple(drawn.completions[i] for i in expected)
    torch.testing.assert_close(found.kept.logp, found.drawn.select(torch.tensor(expected)).logp)
    assert found.kept.counts.trajectories == 4 * kept


@dataclass(frozen=True)
class OneByOne(Part):
    """prompts x group requests of one trajectory each, with the place of each in the draw."""

    gives = frozenset({"place"})

    def __call__(self, pool: Any, *, prompts: int, group: int, generator: torch.Generator) -> list[Request]:
        return [Request(pool[i % len(pool)], 1, columns={"place": float(i)}) for i in range(prompts * group)]


@pytest.mark.parametrize(("part", "rounds", "kept"), [(None, 1, 16), (KeepFirst(10), 2, 16), (KeepFirst(7, 2), 2, 14)])
def test_a_batch_has_as_many_groups_as_a_draw(part: Any, rounds: int, kept: int, policy: CountingPolicy) -> None:
    found = collect(policy, curriculum=OneByOne(), filter=part)
    assert policy.sampled == rounds
    assert found.drawn.n_groups == found.drawn.n_trajectories == 16 * rounds
    assert found.kept is not None and found.kept.n_groups == found.kept.n_trajectories == kept
    each = 16 if part is None else part.groups
    assert found.kept["place"].tolist() == ([*range(each)] * rounds)[:kept]


def test_each_round_draws_other_prompts(policy: CountingPolicy) -> None:
    payload = collect(policy, filter=KeepFirst(2)).drawn.payload
    assert isinstance(payload, TokenPayload)
    assert len({example.id for example in payload.examples}) == 8


def test_dynamic_sampling_keeps_only_groups_whose_score_varies(policy: CountingPolicy) -> None:
    def single(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        return [float(len(ids) == 1) for ids in completion_ids]

    found = collect(policy, "dapo", reward=NamedReward("single", single))
    assert found.kept is not None and policy.sampled > 1
    for g in range(found.kept.n_groups):
        assert found.kept["score"][found.kept.group == g].unique().tolist() == [0.0, 1.0]


def test_a_batch_is_a_function_of_the_generator(policy: CountingPolicy) -> None:
    texts = [collect(policy, seed=seed).drawn.payload.completions for seed in (3, 3, 4)]  # type: ignore[union-attr]
    assert texts[0] == texts[1] != texts[2]


# --- invalid rewards --------------------------------------------------------------------------------------------------


def fails_on_short(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    """The share of even tokens, but an exception for completions of fewer than five tokens."""
    if any(len(ids) < 5 for ids in completion_ids):
        raise ValueError("too short to judge")
    return even_share(completion_ids)


FAILING = NamedReward("even", fails_on_short)


def rewritten(batch: Rollout, trajectories: torch.Tensor) -> Rollout:
    """The batch with other tokens, and other log-probs of them, in these trajectories."""
    steps = trajectories[batch.trajectory]
    payload = batch.payload
    assert isinstance(payload, TokenPayload)
    ids = torch.where(steps, (payload.ids + 100) % 250, payload.ids)
    changed = dataclasses.replace(batch, payload=dataclasses.replace(payload, ids=ids))
    moved = {
        n: torch.where(steps.view(-1, *[1] * (v.ndim - 1)), v - 1.0, v)
        for n, v in batch.columns["step"].items()
        if v.is_floating_point()
    }
    return changed.with_columns(step=moved)


@pytest.mark.parametrize("slug", sorted(slug for slug, method in methods().items() if judged(method)))
def test_a_trajectory_without_a_reward_never_trains(slug: str, policy: CountingPolicy) -> None:
    found = next(found for seed in range(5) if (found := collect(policy, slug, seed, reward=FAILING)).kept is not None)
    batch, drawn = found.kept, found.drawn.reward.isnan()
    assert batch is not None
    assert 0 < int(drawn.sum()) == len(found.invalid) < len(drawn)
    invalid = batch.reward.isnan()
    if not bool(invalid.any()):
        # A filter leaves them out altogether.
        assert short(slug).filter is not None and not bool((batch.lengths < 5).any())
        return
    assert int(invalid.sum()) < batch.n_trajectories
    judged = ~batch["unfinished"] if "unfinished" in batch else torch.ones_like(invalid)
    assert torch.equal(invalid, judged & (batch.lengths < 5))
    assert not bool(batch.mask[invalid[batch.trajectory]].any()) and bool(batch.mask.any())
    assert {failure.reason for failure in found.invalid} == {"raised ValueError: too short to judge"}
    nudge(policy)
    results = []
    for which in (batch, rewritten(batch, invalid)):
        credited = short(slug).credit(which)
        assert "advantage" not in credited or not bool(credited.advantage[~which.mask].any())
        policy.calls.clear()
        # One trajectory at a time, so that every pass shows which ones were worth it.
        make_step(policy, short(slug), credited, 1).gradient()
        results.append(gradients(policy))
        valid = batch.n_trajectories - int(invalid.sum())
        assert sum(call.rows for call in policy.calls if call.gradient) <= valid
        # A loss that reaches across a group or the batch is first taken as a whole, without gradient, invalid members
        # included: how many there are may be part of it.
        whole = batch.n_trajectories if short(slug).unit in ("group", "batch") else 0
        assert sum(call.rows for call in policy.calls if not call.gradient) <= whole
    same_gradients(results[1], results[0], rel=1e-6)


def test_a_failing_reward_ends_the_run_where_asked(policy: CountingPolicy) -> None:
    method = short("grpo")
    collector = make_collector(policy, FAILING)
    strict = dataclasses.replace(collector, scorer=dataclasses.replace(collector.scorer, on_error="raise"))
    with pytest.raises(UsageError, match="too short to judge"):
        strict(method, torch.Generator().manual_seed(0))


# --- columns ----------------------------------------------------------------------------------------------------------


def test_a_method_without_a_reference_evaluates_nothing(policy: CountingPolicy) -> None:
    for slug in ("grpo", "reinforce", "dr-grpo"):
        collect(policy, slug)
    assert policy.calls == []


def test_the_columns_of_a_method_are_evaluated_once_and_without_gradient(policy: CountingPolicy) -> None:
    found = collect(policy, "ppo")
    assert [(call.names, call.rows, call.gradient) for call in policy.calls] == [
        (frozenset({"logp/ref"}), 16, False),  # the penalty is part of the reward
        (frozenset({"value"}), 16, False),
    ]
    assert found.kept is not None and {"value", "logp/ref", "step_reward"} <= set(found.kept.names())
    torch.testing.assert_close(found.kept["logp/ref"], found.kept.logp, rtol=1e-4, atol=1e-5)


def test_only_what_passed_the_filter_is_evaluated_for_the_loss(policy: CountingPolicy) -> None:
    found = collect(policy, filter=KeepFirst(1, rounds=2), regularizer=KL(beta=0.1))
    assert [(call.names, call.rows) for call in policy.calls] == [(frozenset({"logp/ref"}), 8)]
    assert found.kept is not None and "logp/ref" in found.kept and "logp/ref" not in found.drawn


def test_a_reference_without_weight_is_not_evaluated(policy: CountingPolicy) -> None:
    collect(policy, regularizer=KL(beta=0.0))
    assert policy.calls == []


# --- what nobody provides ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Needy(Part):
    """Reads a column that no language model has."""

    needs = frozenset({"curvature"})

    def __call__(self, evaluation: Evaluation, rollout: Rollout) -> Loss:
        return per_step(evaluation.logp)


@dataclass(frozen=True)
class Curious(Part):
    """Reads a functional that no language model has."""

    evaluates = frozenset({"curvature"})

    def __call__(self, evaluation: Evaluation, rollout: Rollout) -> Loss:
        return per_step(evaluation["curvature"])


@pytest.mark.parametrize(
    ("objective", "name"), [(Needy(), "Needy"), (Curious(), "'grpo' evaluates")], ids=["needs", "evaluates"]
)
def test_a_missing_column_is_named_before_the_first_rollout(objective: Part, name: str, policy: CountingPolicy) -> None:
    with pytest.raises(UsageError, match=f"{name}.*'curvature'"):
        check_needs(short("grpo", objective=objective), policy, (EVEN,))
    assert policy.sampled == 0


def test_a_run_with_a_missing_column_writes_nothing(small_run: Any, tmp_path: Any) -> None:
    slots = {"regularizer": "kl", "regularizer.model": "teacher"}
    with pytest.raises(UsageError, match=r"regularizer kl\(.*'logp/teacher'"):
        train(small_run(tmp_path / "run", slots), quiet=True)
    assert not (tmp_path / "run").exists()


# --- sampler and learner ----------------------------------------------------------------------------------------------


def test_half_precision_is_trained_on_the_learner_s_own_log_probs(policy: CountingPolicy) -> None:
    assert policy.exact_sampler
    assert "logp/sampler" not in collect(policy).kept
    policy.dtype = torch.bfloat16
    assert not policy.exact_sampler
    batch = collect(policy).kept
    assert batch is not None
    gap = (batch.logp - batch["logp/sampler"]).abs()
    assert 0 < float(gap.max()) < 0.5
    step = make_step(policy, short("grpo"), short("grpo").credit(batch), 10_000)
    step.gradient()
    assert step.first is not None
    # The same forward pass twice: rounding of bfloat16 cancels.
    assert step.first.gap / step.first.steps < 1e-5

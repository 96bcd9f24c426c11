"""The card of SPO: a success rate per prompt that forgets as the policy drifts, and batches of single rollouts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polopt.core.errors import UsageError
from polopt.core.example import Example
from polopt.core.rollout import Rollout
from polopt.methods.base.dapo import DynamicSampling
from polopt.methods.credit.spo_single_stream import TrackedBaseline, ValueTracker, spo
from polopt.policies.causal_lm.payload import TokenPayload
from polopt.policies.exact import ExactPolicy, SequenceSpace, enumeration
from polopt.training.budget import Budget
from polopt.training.checkpoint import latest_checkpoint
from tests.support import close, f64, now, same
from tests.training.conftest import make_trainer, short

OFFLINE = (0, 2, 4, 8)
POOL = [Example(str(i), "?", columns={"successes": s, "attempts": 8}) for i, s in enumerate(OFFLINE)]
NEW = [Example(str(i), "?") for i in range(4)]
NAN = math.nan


def visit(examples: Sequence[Example], rewards: Sequence[float], **step: Any) -> Rollout:
    """Three steps for each example, of log-prob -1."""
    count = len(examples)
    lengths = torch.full((count,), 3)
    payload = TokenPayload.build(
        [(1,)] * count, [(2, 3, 4)] * count, torch.ones(count), examples, [e.prompt for e in examples], ["234"] * count
    )
    columns = {"logp": -torch.ones(3 * count, dtype=torch.float64), **step}
    return Rollout(lengths, torch.arange(count), {"step": columns, "trajectory": {"reward": f64(rewards)}}, payload)


def answered(examples: Sequence[Example]) -> Rollout:
    """Responses as they are remembered."""
    rollout = visit(examples, [0.0] * len(examples))
    return dataclasses.replace(rollout, columns={"step": {"logp": rollout.logp, "mask": rollout.mask}})


def moved(by: Mapping[str, float]) -> Any:
    """A policy under which log-probs of an example's responses lie ``by`` below or above -1, turn by turn."""

    def evaluate(rollout: Rollout, names: frozenset[str]) -> Rollout:
        assert names == {"logp"}
        shift = rollout.spread(f64([by.get(example.id, 0.0) for example in rollout.examples]))
        sign = f64([(-1.0) ** i for i in range(rollout.n_steps)])
        return rollout.with_columns(step={"logp": -1.0 + sign * shift})

    return evaluate


still = moved({})


def draw(part: ValueTracker, pool: Sequence[Example], count: int, seed: int = 0) -> list[Any]:
    return part(pool, prompts=count, group=1, generator=torch.Generator().manual_seed(seed))


def values(part: ValueTracker, pool: Sequence[Example]) -> list[float]:
    return [a / (a + b) for a, b in map(part.belief, pool)]


# --- the worked example -----------------------------------------------------------------------------------------------


def test_worked_example() -> None:
    part = ValueTracker().remember(responses=answered(POOL[1:]))
    before = [part.belief(example) for example in POOL]
    close([a for a, _ in before], [0.444444, 2.222222, 4, 7.555556])
    close([a + b for a, b in before], [8, 8, 8, 8])
    close(values(part, POOL), [0.055556, 0.277778, 0.5, 0.944444])
    rewards = [0.0, 1.0, 0.0, 1.0]
    rollout = visit(POOL, rewards).with_columns(trajectory={"baseline": f64(values(part, POOL))})
    close(TrackedBaseline()(rollout), [-0.219971, 1.319824, -1.099853, 0])
    part.observe(rollout, moved({"1": 0.01, "2": 0.03, "3": 0.5}))
    after = [part.belief(example) for example in POOL]
    close([a for a, _ in after], [0.426667, 2.979775, 3.5, 7.611111])
    close([b for _, b in after], [8.253333, 5.147415, 4.5, 0.388889])
    close(values(part, POOL), [0.049155, 0.366643, 0.4375, 0.951389])


def test_prompts_are_drawn_by_the_weights_of_the_worked_example() -> None:
    count = 60_000
    drawn = draw(ValueTracker(), POOL, count)
    frequency = np.bincount([int(request.example.id) for request in drawn]) / count
    weight = np.array([0.279061, 0.497903, 0.55, 0.279061])
    np.testing.assert_allclose(frequency, weight / weight.sum(), atol=5 * math.sqrt(0.25 / count))
    expected = dict(zip("0123", [0.055556, 0.277778, 0.5, 0.944444], strict=True))
    assert all(r.count == 1 and r.prompt is None for r in drawn)
    for request in drawn[:50]:
        close(request.columns["baseline"], expected[request.example.id])


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_the_weight_is_largest_at_one_half_and_the_bonus_alone_at_the_ends(gamma: float) -> None:
    evidence = {"0": [0.0, 3.0], "1": [2.0, 2.0], "2": [5.0, 0.0], "3": [3.0, 1.0], "4": [8.0, 8.0]}
    part, count = ValueTracker(gamma=gamma).remember(evidence=evidence), 40_000
    pool = [Example(name, "?") for name in evidence]
    frequency = np.bincount([int(request.example.id) for request in draw(part, pool, count)]) / count
    weight = np.array(
        [math.sqrt(a * b) / (a + b) / (a + b) ** gamma + 0.05 for a, b in evidence.values()],
    )
    assert weight[0] == weight[2] == 0.05 and weight[1] == max(weight)
    np.testing.assert_allclose(frequency, weight / weight.sum(), atol=5 * math.sqrt(0.25 / count))


# --- the tracker ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drift", [0.0, 0.0115, 0.0117, 0.03, 0.06, 3.0, 1e6])
def test_forgetting_by_drift(drift: float) -> None:
    part = ValueTracker().remember(evidence={"0": [3.0, 5.0]}, responses=answered(NEW[:1]))
    part.observe(visit(NEW[:1], [0.25]), moved({"0": drift}))
    rho = min(max(0.5 ** (drift / 0.06), 0.875), 0.96)
    assert (rho > 0.875) == (drift < 0.0116)
    assert rho == {0.0: 0.96, 0.06: 0.875}.get(drift, rho)
    same(part.evidence["0"], [3 * rho + 0.25, 5 * rho + 0.75])
    # The same as a moving average.
    value, weight = 3 / 8, 8.0
    step = 1 / (rho * weight + 1)
    same(values(part, NEW[:1]), [value + step * (0.25 - value)])
    same(sum(part.evidence["0"]), rho * weight + 1)


def test_without_forgetting_it_is_the_running_mean() -> None:
    part, rewards = ValueTracker(rho_min=1.0, rho_max=1.0).remember(evidence={"0": [0.0, 0.0]}), [1, 0, 0.5, 1, 1]
    for done, reward in enumerate(rewards, 1):
        part.observe(visit(NEW[:1], [reward]), moved({"0": 7.0}))
        same(values(part, NEW[:1]), [sum(rewards[:done]) / done])
    same(ValueTracker(rho_min=1.0, rho_max=1.0).belief(POOL[1]), [2.5, 6.5])


def test_the_weight_of_the_past_tends_to_its_fixed_point() -> None:
    part = ValueTracker(rho_min=0.875, rho_max=0.875)
    for _ in range(300):
        part.observe(visit([*NEW[:1], POOL[1]], [1.0, 1.0]), still)
    same([sum(part.evidence[name]) for name in "01"], [8.0, 8.0])
    fresh = ValueTracker()
    assert sum(fresh.belief(POOL[1])) == 8.0
    fresh.observe(visit(NEW[1:2], [1.0]), still)  # unseen before: 0.96 * 1 + 1
    same(sum(fresh.evidence["1"]), 1.96)


@pytest.mark.parametrize("seed", range(3))
def test_a_long_run_against_a_loop(seed: int) -> None:
    """Random visits, some several in one batch, some invalid, with masked steps and a drift in every iteration."""
    rng = np.random.default_rng(seed)
    part = ValueTracker()
    belief = {str(i): [0.5, 0.5] for i in range(4)}
    stored: dict[str, tuple[float, list[bool]]] = {}
    for _ in range(12):
        names = [str(i) for i in rng.integers(0, 4, size=5)]
        rewards = [float(rng.choice([0.0, 1.0, 0.3, NAN])) for _ in names]
        level = float(-rng.uniform(0.5, 0.7))  # log-prob of every step under the updated policy

        def evaluate(rollout: Rollout, names: frozenset[str], level: float = level) -> Rollout:
            logp = torch.full((rollout.n_steps,), level, dtype=torch.float64)
            return rollout.with_columns(step={"logp": torch.where(rollout.mask, logp, torch.nan)})

        mask = torch.from_numpy(rng.random(15) < 0.7)
        mask[::3] = True
        part.observe(visit([NEW[int(n)] for n in names], rewards, mask=mask), evaluate)
        here: dict[str, tuple[float, list[bool]]] = {}
        for place, (name, reward) in enumerate(zip(names, rewards, strict=True)):
            if math.isnan(reward):
                continue
            first = name not in here
            gap = abs(stored[name][0] - level) if first and name in stored else 0.0
            rho = float(np.clip(2 ** (-gap / 0.06), 0.875, 0.96))
            belief[name] = [rho * belief[name][0] + reward, rho * belief[name][1] + 1 - reward]
            here[name] = (level, mask[3 * place : 3 * place + 3].tolist())
        stored |= here
        for name, expected in belief.items():
            same(part.belief(NEW[int(name)]), expected)
        if not stored:
            continue
        assert part.responses is not None
        kept = {e.id: part.responses.select(torch.tensor([i])) for i, e in enumerate(part.responses.examples)}
        assert kept.keys() == stored.keys() and len(part.responses.examples) == len(kept)
        for name, (logp, trained) in stored.items():
            assert kept[name].mask.tolist() == trained
            same(kept[name].logp[kept[name].mask], [logp] * sum(trained))


def test_what_is_remembered_is_one_response_per_prompt_and_nothing_else_of_it() -> None:
    part = ValueTracker()
    rollout = visit(NEW, [1.0, 0.0, NAN, 1.0]).with_columns(step={"advantage": torch.zeros(12)})
    part.observe(rollout, moved({"0": 0.3}))
    assert part.responses is not None
    assert [example.id for example in part.responses.examples] == ["0", "1", "3"]
    assert set(part.responses.names()) == {"logp", "mask"}
    same(part.responses.logp[:3], [-0.7, -1.3, -0.7])
    before = dict(part.evidence)
    part.observe(visit(NEW[2:3], [NAN]), still)
    assert part.evidence == before and part.responses.n_trajectories == 3


# --- the draw ---------------------------------------------------------------------------------------------------------


def test_drawn_without_replacement_while_the_pool_lasts() -> None:
    pool = [Example(str(i), "?") for i in range(20)]
    for seed in range(5):
        names = [request.example.id for request in draw(ValueTracker(), pool, 20, seed)]
        assert sorted(names) == sorted(example.id for example in pool)
    requests = ValueTracker()(pool, prompts=3, group=5, generator=torch.Generator().manual_seed(0))
    assert len({r.example.id for r in requests}) == len(requests) == 15
    assert len(draw(ValueTracker(), pool, 33)) == 33


def test_candidates_are_a_multiple_of_the_batch() -> None:
    # All weight is on one example: a batch without it has not seen it among its candidates.
    pool = [Example(str(i), "?") for i in range(40)]
    evidence = {str(i): [0.0, 1.0] for i in range(1, 40)}
    part = ValueTracker(explore=1e-12, candidates=2.5).remember(evidence=evidence)
    share = np.mean([any(r.example.id == "0" for r in draw(part, pool, 4, seed)) for seed in range(400)])
    assert abs(share - 10 / 40) < 5 * math.sqrt(0.25 * 0.75 / 400)
    whole = ValueTracker(explore=1e-12).remember(evidence=evidence)
    assert all(any(r.example.id == "0" for r in draw(whole, pool, 4, seed)) for seed in range(20))


def test_misuse() -> None:
    with pytest.raises(UsageError, match="no example to draw"):
        draw(ValueTracker(), [], 1)
    with pytest.raises(UsageError, match=r"example '1' got 1\.5"):
        ValueTracker().observe(visit(NEW[:2], [0.0, 1.5]), still)
    with pytest.raises(UsageError, match="rewards from 0 to 1; example '0' got -1"):
        ValueTracker().observe(visit(NEW[:1], [-1.0]), still)
    with pytest.raises(UsageError, match="'a' has 9 successes in 8 attempts"):
        ValueTracker().belief(Example("a", "?", columns={"successes": 9, "attempts": 8}))
    for wrong in ({"rho_min": 0.97}, {"rho_min": 0.0}, {"rho_max": 1.1}, {"half": 0.0}, {"explore": 0.0}):
        with pytest.raises(UsageError, match="needs 0 < rho_min"):
            ValueTracker(**wrong)


# --- the advantage ----------------------------------------------------------------------------------------------------


def credit(rewards: Sequence[float], baseline: Sequence[float]) -> torch.Tensor:
    count = len(rewards)
    columns = {"reward": f64(rewards), "baseline": f64(baseline)}
    return TrackedBaseline()(Rollout.from_arrays(range(count), range(count), trajectories=columns))


def test_standardised_over_the_valid_rollouts() -> None:
    rewards, baseline = [1.0, 0.0, NAN, 1.0, 0.3], [0.2, 0.9, 0.5, 0.7, 0.3]
    found = credit(rewards, baseline)
    raw = np.array(rewards) - np.array(baseline)
    kept = raw[~np.isnan(raw)]
    same(found, np.nan_to_num((raw - kept.mean()) / (kept.std(ddof=1) + 1e-8)))
    valid = found[[0, 1, 3, 4]]
    same(valid.mean(), 0.0)
    same(valid.std(), 1.0, rtol=1e-7)


@pytest.mark.parametrize(
    ("rewards", "baseline"),
    [
        ([1.0, 0.0, 0.3], [1.0, 0.0, 0.3]),  # predicted without error
        ([0.7, 0.7, 0.7], [0.1, 0.1, 0.1]),
        ([1.0], [0.4]),
        ([NAN, 1.0], [0.5, 0.4]),
        ([NAN, NAN], [0.5, 0.4]),
    ],
)
def test_nothing_to_compare_is_exactly_zero(rewards: list[float], baseline: list[float]) -> None:
    assert credit(rewards, baseline).tolist() == [0.0] * len(rewards)


def test_no_baseline_turns_the_expected_gradient() -> None:
    """Every sequence of a uniform policy once is the expectation: whatever is tracked, it is the policy gradient."""
    space, count = SequenceSpace(2, 2), 4
    policy = ExactPolicy(space, 2)
    reward = torch.rand(2, count, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    every = torch.arange(2 * count)
    rollout = policy.rollout(every // count, every % count, every)
    true = enumeration.policy_gradient(policy, reward).flatten()
    for baseline in ([0.0, 0.0], [0.9, 0.1], [0.3, 1.0]):
        columns = {"reward": reward.flatten(), "baseline": f64(baseline)[rollout.payload.problem]}  # type: ignore[union-attr]
        credited = spo.credit(rollout.with_columns(trajectory=columns))
        loss, _ = spo.loss(policy.evaluate(credited, frozenset({"logp"})), credited)
        (found,) = torch.autograd.grad(-loss, policy.logits)
        same(torch.nn.functional.cosine_similarity(found.flatten(), true, dim=0), 1.0)
        raw = columns["reward"] - columns["baseline"]
        same(found.flatten(), true * count / 16 / raw.std(), rtol=1e-6)


def test_the_dual_clip_bounds_a_step_far_above_the_old_policy() -> None:
    rollout = visit(NEW[:2], [1.0, 0.0]).with_columns(trajectory={"baseline": f64([0.5, 0.5])})
    credited = spo.credit(rollout)
    evaluation = now(-1.0 + f64([0.1, 0.4, -0.5, 0.1, 3.0, -0.5]))
    loss, _ = spo.loss(evaluation, credited)
    (gradient,) = torch.autograd.grad(loss, evaluation["logp"])
    ratio, size = np.exp([0.1, 0.4, -0.5, 0.1, 3.0, -0.5]), 1 / math.sqrt(2)
    expected = [-ratio[0], 0.0, -ratio[2], ratio[3], 0.0, 0.0]  # 1.28 above, 10 for A < 0, 0.8 below
    same(gradient, np.array(expected) * size / 6, rtol=1e-7)


# --- in a run ---------------------------------------------------------------------------------------------------------


def test_a_resumed_run_is_the_run_that_was_not_stopped(tmp_path: Path) -> None:
    def trainer(run: Path, steps: int) -> Any:
        return make_trainer(run, short("spo-single-stream"), budget=Budget(steps=steps), prompts=2)

    whole, first = trainer(tmp_path / "whole", 4), trainer(tmp_path / "first", 2)
    whole.train()
    first.train()
    second = trainer(tmp_path / "second", 4)
    for name in ("log", "timing", "text"):
        (tmp_path / "second" / f"{name}.jsonl").write_bytes((tmp_path / "first" / f"{name}.jsonl").read_bytes())
    second.resume(latest_checkpoint(tmp_path / "first"))
    second.train()
    assert (tmp_path / "second" / "log.jsonl").read_bytes() == (tmp_path / "whole" / "log.jsonl").read_bytes()
    ours, theirs = second.method.curriculum, whole.method.curriculum
    assert ours.evidence == theirs.evidence and list(ours.evidence) == list(theirs.evidence)
    assert torch.equal(ours.responses.logp, theirs.responses.logp)
    assert [e.id for e in ours.responses.examples] == [e.id for e in theirs.responses.examples]
    assert all(torch.equal(a, b) for a, b in zip(second.policy.parameters(), whole.policy.parameters(), strict=True))
    # Some prompt came again after the policy had moved, so that the drift has been at work: a third visit of a prompt
    # without any would weigh 0.96 (0.96 (0.96 + 1) + 1) + 1.
    weights = {round(sum(pair), 9) for pair in theirs.evidence.values()}
    without, undisturbed = 1.0, set()
    for _ in range(8):
        without = 0.96 * without + 1
        undisturbed.add(round(without, 9))
    assert weights - undisturbed


def test_a_filter_of_equal_groups_leaves_nothing_and_the_run_goes_on(tmp_path: Path) -> None:
    method = short("spo-single-stream", filter=DynamicSampling(column="reward", rounds=2))
    trainer = make_trainer(tmp_path, method, budget=Budget(steps=1), prompts=2)
    trainer.train()
    assert trainer.policy.version == 0 and trainer.method.curriculum.evidence


def test_what_it_declares() -> None:
    assert "baseline" not in spo.needs and "baseline" in spo.curriculum.gives
    assert (spo.schedule.minibatches, spo.vanishes_with, spo.unit) == (8, "advantage", "step")

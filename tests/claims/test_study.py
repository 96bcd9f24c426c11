"""Studies: one set of measurements for statements and pictures, and the designs of those that there are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch

from polopt.claims import claims, claims_of, studies, study_of
from polopt.claims.claim import Claim, measured, note
from polopt.claims.preference import online_offline_gap as gap
from polopt.claims.preference import suboptimal_on_policy as grid
from polopt.claims.preference import unpacking_dpo_ppo as factors
from polopt.claims.study import BLOCK, Curves, Effects, Study, at_once, carry_out
from polopt.compare.panels import Differences, Lines
from polopt.compare.statistics import paired_difference
from polopt.core.errors import UsageError
from polopt.core.part import clone
from polopt.core.rollout import Rollout
from polopt.filters.preferences import RandomPair
from tests.support import close, same

# --- what a study does ---------------------------------------------------------------------------------------------


class Counted:
    """A measure that knows how often it was called."""

    __name__ = "counted"

    def __init__(self) -> None:
        self.calls: list[tuple[int, bool]] = []

    def __call__(self, seed: int, quick: bool) -> Mapping[str, float]:
        self.calls.append((seed, quick))
        return {"new": 1.0 + 0.1 * seed, "old": 0.5 + 0.05 * seed**2, "low": float(seed)}


def made(measure: Counted) -> tuple[Study, tuple[Claim, ...]]:
    claim = Claim("x", "helps", "It helps.", "exact", "old", "use", "higher", "new", "old", measure=measure)
    open_question = Claim("x", "far", "It helps far.", "exact", "old", "use", "higher", untestable="it is far")
    panels = (
        Curves("A curve", "x", "use", measure, {"ours": [(1, "old"), (2, "new")]}),
        Effects("Effects", "use", measure, {"new - old": ("new", "old"), "low": ("low", None)}),
    )
    return Study("A study", "Does it help?", panels), (claim, open_question)


def test_statements_and_pictures_share_their_runs() -> None:
    measure = Counted()
    study, claims = made(measure)
    found = carry_out("x", study, claims, seeds=12)
    assert measure.calls == [(seed, False) for seed in range(12)]
    ours, theirs = [1.0 + 0.1 * s for s in range(12)], [0.5 + 0.05 * s**2 for s in range(12)]
    judged, far = found.outcomes
    lines, effects = found.panels
    assert isinstance(lines, Lines) and isinstance(effects, Differences)
    same(judged.effect, np.mean(ours) - np.mean(theirs))
    assert effects.rows["new - old"] == paired_difference(ours, theirs)
    assert (judged.low, judged.high) == (effects.rows["new - old"].low, effects.rows["new - old"].high)
    same(effects.rows["low"].mean, 5.5)
    curve = lines.curves["ours"]
    assert curve.x == (1, 2) and far.verdict == "not testable here"
    same(curve.mean, [np.mean(theirs), np.mean(ours)])
    assert all(low < mean < high for low, mean, high in zip(curve.low, curve.mean, curve.high, strict=True))
    assert found.rows["counted"][3]["low"] == 3.0


def test_quick_takes_two_seeds() -> None:
    measure = Counted()
    carry_out("x", *made(measure), quick=True)
    assert measure.calls == [(0, True), (1, True)]


def test_too_few_seeds_are_refused_before_anything_runs() -> None:
    measure = Counted()
    with pytest.raises(UsageError, match="needs at least 10 seeds, got --seeds 4"):
        carry_out("x", *made(measure), seeds=4)
    assert not measure.calls


def test_seeds_that_are_trained_together_are_trained_once() -> None:
    blocks: list[list[int]] = []

    @at_once
    def runs(seeds: Sequence[int], quick: bool) -> Sequence[Mapping[str, float]]:
        blocks.append(list(seeds))
        return [{"seed": float(seed), "quick": float(quick)} for seed in seeds]

    rows = [runs(seed, False) for seed in range(BLOCK + 2)]
    assert [row["seed"] for row in rows] == list(range(BLOCK + 2))
    assert blocks == [list(range(BLOCK)), list(range(BLOCK, 2 * BLOCK))]
    assert runs(1, True) == {"seed": 1.0, "quick": 1.0} and blocks[-1] == [0, 1]
    assert runs.__name__ == "runs"


def test_a_long_measure_says_where_it_is() -> None:
    heard: list[str] = []

    def slow(seed: int, quick: bool) -> Mapping[str, float]:
        note("half")
        return {"x": 0.0}

    measured(slow, 2, quick=False, tell=heard.append, what="it")
    assert heard[:2] == ["it, seed 1 of 2", "it, seed 1 of 2, half"]
    note("nobody listens")
    assert len(heard) == 4


# --- those that there are -----------------------------------------------------------------------------------------


def test_a_study_has_claims_and_says_what_it_asks() -> None:
    assert {"online-offline-gap", "suboptimal-on-policy", "unpacking-dpo-ppo"} <= set(studies())
    for slug, study in studies().items():
        assert slug in claims() and study.question.endswith("?") and study.panels
    with pytest.raises(UsageError, match="no study 'grpo'; there are"):
        study_of("grpo")


@pytest.mark.parametrize("slug", list(studies()))
def test_every_study_can_be_carried_out(slug: str) -> None:
    found = carry_out(slug, study_of(slug), claims_of(slug), quick=True)
    for panel in found.panels:
        means = (
            [m for curve in panel.curves.values() for m in curve.mean]
            if isinstance(panel, Lines)
            else [interval.mean for interval in panel.rows.values()]
        )
        assert means and all(map(math.isfinite, means)), panel.title
    tested = [claim for claim in claims_of(slug) if claim.measure is not None]
    assert [o.claim for o in found.outcomes if o.seeds] == tested


# --- their worlds --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", list(grid.LOSSES))
@pytest.mark.parametrize("sampler", list(grid.SAMPLERS))
def test_seeds_of_one_policy_do_not_meet(loss: str, sampler: str) -> None:
    """Another reward for the second seed changes nothing for the first."""
    ends = []
    for worth in (1.0, -3.0):
        run = grid.TABULAR.start(grid.LOSSES[loss] | {"rollout": grid.SAMPLERS[sampler]}, (0, 1))
        run.problem.rewards["reward"][2:] *= worth
        for _ in range(12):
            run.step()
        ends.append(run.policy.probabilities().detach())
    assert torch.equal(ends[0][:2], ends[1][:2])
    assert not torch.equal(ends[0][2:], ends[1][2:])


def test_off_policy_answers_are_those_of_the_reference() -> None:
    method = grid.LOSSES["dpo"] | {"rollout": grid.SAMPLERS["off"]}
    run = grid.NORMAL.start(method, range(3))
    with torch.no_grad():
        run.policy.logits[..., 0] += 5
    requests = run.problem.requests()
    drawn = method.rollout(run.policy, [*requests] * 200, limit=1, seed=0)
    mean = float(drawn["action"].double().mean())
    assert mean == pytest.approx(8.3, abs=0.5), "pi_ref lies around 8, the policy now around 28"


def test_the_reference_is_the_normal_of_the_design() -> None:
    run = grid.TABULAR.start(grid.LOSSES["dpo"], (0, 1))
    chance = run.policy.probabilities().detach()
    weights = np.exp(-((np.arange(20) - 4) ** 2) / 8)
    same(chance, np.tile(weights / weights.sum(), (4, 1)))
    peaks = run.problem.reward.argmax(1).tolist()
    assert peaks == [12, 4, 12, 4]
    same(run.problem.reward[0, 9], math.exp(-1))


def test_the_log_in_its_own_order_is_the_run() -> None:
    seeds, steps = range(2), 5
    world = gap.world(seeds)
    method = gap.LOSSES["ipo-0.1"]
    online, log = gap.online_run(world, method, seeds, steps)
    again = gap.trace(world, gap.recorded(method, log), seeds, steps)
    same(again.kl, online.kl)
    same(again.win, online.win)
    mixed = gap.trace(world, gap.recorded(method, gap.shuffled(log, 0)), seeds, steps)
    assert float((mixed.kl[-1] - online.kl[-1]).abs().min()) > 1e-6


def test_a_shuffled_log_has_the_same_pairs() -> None:
    log = torch.stack([torch.arange(24) % 3, torch.arange(24), torch.arange(24) + 100], 1).view(4, 6, 3)
    mixed = gap.shuffled(log, 1)
    assert mixed.shape == log.shape and not torch.equal(mixed, log)
    for rows in mixed:
        assert rows[:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert sorted(mixed.flatten(0, 1).tolist()) == sorted(log.flatten(0, 1).tolist())


def test_pairs_are_written_down_as_they_are_labelled() -> None:
    world = gap.world(range(3))
    policy = world.problem.policy("order-0")
    rollout = policy.sample([*world.problem.requests()] * 4, gap.online_offline_gap.rollout, seed=1)
    scored = rollout.with_columns(trajectory={"score": torch.zeros(rollout.n_trajectories)})
    logged = gap.Logged(RandomPair(seed=3))
    pairs = clone(logged)(scored)
    assert isinstance(pairs, Rollout)
    (rows,) = logged.log
    answers = gap.sequences(pairs, gap.SPACE)[1].view(-1, 2)
    labels = pairs["label"].view(-1, 2)
    for row, answer, label in zip(rows.tolist(), answers.tolist(), labels.tolist(), strict=True):
        assert row[1:] == (answer if label == [1, 0] else answer[::-1])
    assert rows[:, 0].tolist() == [0, 1, 2] * 4


def test_the_data_set_and_its_proxy() -> None:
    world = gap.world((5, 6))
    winner, loser = gap.drawn(world, world.law, 1, 6)
    assert len(winner) == gap.DATA and bool((winner != loser).all())
    agrees = (world.gold[1, winner] > world.gold[1, loser]).double().mean()
    assert 0.6 < float(agrees) < 0.95, "labels are drawn from the gold preference"
    table = world.problem.rewards["proxy"]
    centred, gold = (t - t.mean(1, keepdim=True) for t in (table, world.gold))
    cosine = (centred * gold).sum(1) / (centred.norm(dim=1) * gold.norm(dim=1))
    assert bool((cosine > 0.6).all())
    # Linear in tokens: what the tokens say together is beyond it.
    tokens = table.view(2, 8, 8)
    mixed = tokens - tokens.mean(1, keepdim=True) - tokens.mean(2, keepdim=True) + tokens.mean((1, 2), keepdim=True)
    same(mixed, torch.zeros_like(mixed), atol=1e-9)


def test_the_best_win_rate_within_a_distance() -> None:
    kl = torch.tensor([[0.0, 0.0], [0.2, 0.5], [0.6, 2.0]])
    win = torch.tensor([[0.5, 0.5], [0.7, 0.6], [0.65, 0.9]])
    found = gap.Trace(kl, win, torch.zeros(2))
    for level, best in ((0.1, [0.5, 0.5]), (0.5, [0.7, 0.6]), (2.0, [0.7, 0.9])):
        close(found.best(level), best)


def test_a_larger_reward_model_can_say_what_is_hard() -> None:
    made = factors.world(3)
    reference = made.policy().probabilities().detach()
    for large, fits in ((True, range(8)), (False, range(4))):
        phi = factors.features(large)
        for prompt in range(8):
            gold = made.rewards["gold"][prompt, :, None]
            left = gold - phi @ torch.linalg.lstsq(phi, gold, driver="gelsd").solution
            assert (float(left.norm()) < 1e-9) == (prompt in fits)
    pool = factors.labelled(made, 8 * 40, scale=factors.SCALE, seed=3)
    table = factors.reward_model(made, pool, True)
    same((reference * table).sum(1), torch.zeros(8), atol=1e-12)
    same((reference * table.square()).sum(1), torch.ones(8))
    gap_of = [
        float(table[e.columns["problem"], a] - table[e.columns["problem"], b])
        for e in pool
        for a, b in [[factors.SPACE.index([int(t) for t in str(x).split()]) for x in (e.chosen, e.rejected)]]
    ]
    assert np.mean(np.array(gap_of) > 0) > 0.75, "it was fitted to these pairs"


def test_reward_at_a_distance() -> None:
    path = factors.Path([0.0, 0.4, 1.2, 0.9], {"all": [0.0, 1.0, 2.0, 5.0]})
    close([path.at(level, "all") for level in (0.2, 0.4, 1.0, 1.2, 3.0)], [0.5, 1.0, 1.75, 2.0, 5.0])

"""The card of UPO: information gain, reliability, smoothing, the loss, and what the filter and the estimators do."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from polopt.core.errors import UsageError
from polopt.core.example import Example
from polopt.core.part import clone
from polopt.core.policy import Request, Sampling
from polopt.core.rollout import Rollout
from polopt.filters.draws import as_groups, halves, weighted_draw
from polopt.methods.preference.dpo import dpo
from polopt.methods.preference.upo import CertainPairs, label_smoothing, reliability, upo
from polopt.policies.causal_lm.policy import CausalLM
from polopt.rewards.estimators import HeadEstimator, ModelEstimator, fit_head
from polopt.rewards.models import RewardModel
from polopt.rewards.scoring import transcripts
from polopt.rewards.uncertainty import information_gain
from tests.methods.pairs import LENGTHS, POLICY, card, on_card, slopes, softplus, sums
from tests.policies.causal_lm.models import byte_tokenizer, tiny
from tests.support import close, f64, same

# First of two classes, [pass, pair].
FIRST = f64([[0.9, 0.6, 0.2], [0.8, 0.1, 0.3], [0.95, 0.7, 0.6]])
PASSES = torch.stack([FIRST, 1 - FIRST], -1)
RELATIVE = [0.0, 0.12875424]


def smoothed(values: Any, rollout: Rollout | None = None) -> Rollout:
    """The worked pairs with a smoothing of each."""
    rollout = card() if rollout is None else rollout
    return rollout.with_columns(trajectory={"smoothing": f64(values).repeat_interleave(2)})


def by_hand(logp: Any, alpha: list[float], beta: float, nll: float) -> float:
    s, mean = sums(logp), sums(logp, None) / LENGTHS
    terms = []
    for pair, (w, l) in enumerate([(0, 1), (2, 3)]):  # noqa: E741
        h = beta * (s[w] - s[l])
        terms.append((1 - alpha[pair]) * softplus(-h) + alpha[pair] * softplus(h) - nll * mean[w])
    return float(np.mean(terms))


# --- the mathematics --------------------------------------------------------------------------------------------------


def test_worked_example_of_the_pairs() -> None:
    gain = information_gain(PASSES)
    close(gain, [0.01889697, 0.15460366, 0.06239830], digits=8)
    chance = reliability(gain, 2.0)
    close(chance, [0.37653734, 0.27957578, 0.34388687], digits=8)
    close(label_smoothing(chance, "paper"), [0.72646049, 0.78150901, 0.74411025], digits=8)
    close(label_smoothing(chance, "relative"), [0.0, 0.12875424, 0.04335622], digits=8)
    assert label_smoothing(chance, "none").tolist() == [0, 0, 0]


def test_worked_example_of_the_loss() -> None:
    alpha = label_smoothing(reliability(information_gain(PASSES), 2.0), "relative")[:2]
    loss, gradient = on_card(upo, rollout=smoothed(alpha), nll=0.5)
    close(loss, 0.9282700559, digits=10)
    for at, value in zip((0, 3, 5, 7), (-0.10745869, 0.02412536, -0.14343729, 0.01843729), strict=True):
        close(gradient[at], value, digits=8)
    printed = label_smoothing(reliability(information_gain(PASSES), 2.0), "paper")[:2]
    close(on_card(upo, rollout=smoothed(printed), nll=0.0)[0], 0.7027932804, digits=10)


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("nll", [0.0, 0.5, 2.0])
def test_loss_and_gradient(beta: float, nll: float) -> None:
    alpha = [0.05, 0.4]
    loss, gradient = on_card(upo, rollout=smoothed(alpha), nll=nll, beta=beta)
    same(loss, by_hand(POLICY, alpha, beta, nll))
    same(gradient, slopes(lambda logp: by_hand(logp, alpha, beta, nll), POLICY), rtol=1e-5, atol=1e-8)


def test_what_it_reduces_to() -> None:
    for found, expected in zip(
        on_card(upo, rollout=smoothed([0, 0]), nll=0.0), on_card(dpo, label_smoothing=0.0), strict=True
    ):
        same(found, expected)
    half = smoothed([0.5, 0.5])
    other = smoothed([0.5, 0.5], card(labels=(0, 1, 0, 1)))
    for found, expected in zip(on_card(upo, rollout=half, nll=0.0), on_card(upo, rollout=other, nll=0.0), strict=True):
        same(found, expected)


def test_identical_and_opposite_passes() -> None:
    same(information_gain(PASSES[:1].expand(5, 3, 2)), torch.zeros(3), atol=1e-15)
    certain = f64([[[1, 0]], [[0, 1]]])
    same(information_gain(certain), [math.log(2)])


def test_order_of_classes_and_passes() -> None:
    same(information_gain(PASSES.flip(-1)), information_gain(PASSES))
    same(information_gain(PASSES.flip(0)), information_gain(PASSES))


@pytest.mark.parametrize("mu", [0.5, 1.0, 3.0])
def test_reliability_is_a_distribution_that_falls_with_the_gain(mu: float) -> None:
    gain = f64([0.0, 0.01, 0.2, 0.5, math.log(2)])
    chance = reliability(gain, mu)
    weight = (1 - gain.numpy()) ** mu
    same(chance, weight / weight.sum())
    same(chance.sum(), 1.0)
    assert all(later < earlier for earlier, later in itertools.pairwise(chance.tolist()))
    same(reliability(gain, 0.0), [0.2] * 5)


def test_printed_smoothing_prefers_the_loser() -> None:
    for count in (1, 2, 7, 100):
        chance = reliability(torch.rand(count, generator=torch.Generator().manual_seed(count), dtype=torch.float64), 1)
        printed = label_smoothing(chance, "paper")
        assert ((printed >= 0.5) & (printed < 1)).all()
        relative = label_smoothing(chance, "relative")
        assert float(relative.min()) == 0 and ((relative >= 0) & (relative < 0.5)).all()
    assert len(label_smoothing(f64([]), "relative")) == 0


# --- draws and pairs --------------------------------------------------------------------------------------------------


def test_a_weighted_draw_without_replacement() -> None:
    weight, generator = f64([0.5, 0.3, 0.2, 0.0]), torch.Generator().manual_seed(0)
    expected = np.zeros((3, 3))
    for a, b in itertools.permutations(range(3), 2):
        expected[min(a, b), max(a, b)] += float(weight[a] * weight[b] / (1 - weight[a]))
    found: NDArray[np.float64] = np.zeros((3, 3))
    for _ in range(4000):
        a, b = weighted_draw(weight, 2, generator).tolist()
        found[a, b] += 1 / 4000
    assert np.abs(found - expected).max() < 0.03
    assert weighted_draw(weight, 9, generator).tolist() == [0, 1, 2]
    assert weighted_draw(weight[3:], 1, generator).tolist() == []


def answers(scores: list[float], groups: list[int], estimates: Any = None, masked: tuple[int, ...] = ()) -> Rollout:
    """Answers of two steps with scores."""
    count = len(scores)
    mask = torch.ones(2 * count, dtype=torch.bool)
    mask[[2 * i + k for i in masked for k in (0, 1)]] = False
    estimates = torch.zeros(count, 2) if estimates is None else f64(estimates)
    columns = {"score": f64(scores), "estimates": estimates, "place": torch.arange(count)}
    ids = torch.arange(count).repeat_interleave(2)
    logp = -torch.ones(2 * count)
    return Rollout.from_arrays(ids, groups, step={"logp": logp, "mask": mask}, trajectories=columns)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([3, 1, 2, 0, 5, 4], {(w, l) for w in (4, 5, 0) for l in (2, 1, 3)}),  # noqa: E741
        ([2, 1, 3], {(2, 1), (0, 1)}),
        ([1, 1, 1, 0], {(0, 3), (1, 3)}),
        ([1, 1], set()),
        ([math.nan, 2, 1, math.nan], {(1, 2)}),
        ([1], set()),
    ],
)
def test_candidates_are_pairs_of_the_halves(scores: list[float], expected: set[tuple[int, int]]) -> None:
    winner, loser = halves(answers(scores, [0] * len(scores)), f64(scores))
    assert set(zip(winner.tolist(), loser.tolist(), strict=True)) == expected


def test_masked_answers_and_other_groups_are_in_no_pair() -> None:
    scores = [3.0, 2.0, 1.0, 5.0, 0.0]
    winner, loser = halves(answers(scores, [0, 0, 0, 1, 1], masked=(0,)), f64(scores))
    assert set(zip(winner.tolist(), loser.tolist(), strict=True)) == {(1, 2), (3, 4)}


def test_an_answer_may_be_in_several_pairs() -> None:
    rollout = answers([9, 3, 2, 1], [0, 1, 1, 1]).with_columns(group={"number": torch.tensor([7, 8])})
    made = as_groups(rollout, torch.tensor([1, 1]), torch.tensor([2, 3]))
    assert made["place"].tolist() == [1, 2, 1, 3] and made.group.tolist() == [0, 0, 1, 1]
    assert made["number"].tolist() == [8, 8]
    assert made["label"].tolist() == [1, 0, 1, 0]
    assert made["mask/chosen"].tolist() == [True, True, False, False] * 2


# --- the filter -------------------------------------------------------------------------------------------------------


def worked(order: str = "score") -> Rollout:
    """Each worked pair a group, whose passes are those of the card."""
    gap = torch.log(FIRST / (1 - FIRST))
    estimates = torch.stack([gap.T, torch.zeros(3, 3, dtype=torch.float64)], 1).flatten(0, 1)
    return answers([1, 0, 1, 0, 1, 0], [0, 0, 1, 1, 2, 2], estimates)


def test_contradicted_pairs_go_and_others_are_smoothed() -> None:
    kept = CertainPairs(mu=2.0, candidates=1.0, kept=1.0)(worked())
    assert kept["place"].tolist() == [0, 1, 2, 3] and kept["label"].tolist() == [1, 0, 1, 0]
    close(kept["smoothing"], np.repeat(RELATIVE, 2), digits=8)


def test_shares_are_rounded_up() -> None:
    many = answers([1.0, 0.0] * 30, [i // 2 for i in range(60)])
    # ceil(30 / 4) = 8 are estimated, all agree (no pass says anything), ceil(8 / 2) = 4 are drawn.
    part = CertainPairs()
    first, second = (part(many) for _ in range(2))
    assert first.n_groups == second.n_groups == 4
    assert first["place"].tolist() != second["place"].tolist(), "every batch has its own draw"
    assert first["smoothing"].tolist() == [0] * 8


def test_sure_pairs_are_drawn_more_often() -> None:
    sure = f64([[4.0, 4.0], [0.0, 0.0]])
    torn = f64([[6.0, -0.5], [0.0, 0.0]])
    rollout = answers([1, 0, 1, 0], [0, 0, 1, 1], torch.cat([sure, torn]))
    part = CertainPairs(mu=4.0, candidates=1.0, kept=0.5)
    drawn = [part(rollout)["place"].tolist() for _ in range(600)]
    share = sum(places == [0, 1] for places in drawn) / 600
    passes = torch.sigmoid(torch.stack([f64([4.0, 4.0]), f64([6.0, -0.5])], 1))
    expected = float(reliability(information_gain(torch.stack([passes, 1 - passes], -1)), 4.0)[0])
    assert expected > 0.6 and share == pytest.approx(expected, abs=0.06)


def test_nothing_to_prefer_leaves_nothing() -> None:
    for scores in ([1.0, 1.0], [math.nan, math.nan], [math.nan, 1.0]):
        kept = CertainPairs()(answers(scores, [0, 0]))
        assert kept.n_trajectories == 0 and {"label", "smoothing", "mask/chosen"} <= set(kept.names())
    contradicted = answers([1, 0], [0, 0], [[-1.0, -1.0], [0.0, 0.0]])
    assert CertainPairs()(contradicted).n_trajectories == 0


def test_draws_resume() -> None:
    rollout = answers([float(i % 7) for i in range(40)], [i // 8 for i in range(40)])
    part = CertainPairs()
    part(rollout)
    other = CertainPairs()
    other.load_state_dict(part.state_dict())
    assert part(rollout)["place"].tolist() == other(rollout)["place"].tolist()


@pytest.mark.parametrize("option", [{"candidates": 0.0}, {"kept": 1.5}, {"mu": -1.0}])
def test_options_out_of_range(option: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="shares in"):
        CertainPairs(**option)  # type: ignore[arg-type]


# --- the estimators ---------------------------------------------------------------------------------------------------


def states(count: int, seed: int = 0, size: int = 12) -> tuple[Rollout, Tensor]:
    """Answers whose state decides their score, and what decides."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2 * count, size, generator=generator)
    direction = torch.randn(size, generator=torch.Generator().manual_seed(99))
    last = hidden[1::2]
    score = torch.nn.functional.normalize(last, dim=1) @ direction
    base = answers(score.tolist(), [i // 4 for i in range(count)])
    without = {name: value for name, value in base.columns["trajectory"].items() if name != "estimates"}
    bare = replace(base, columns={"step": base.columns["step"], "trajectory": without})
    return bare.with_columns(step={"hidden": hidden}), score


def agreement(rollout: Rollout) -> float:
    """How often the mean estimate orders two answers of a group as the score does."""
    mean, score = rollout["estimates"].double().mean(1), rollout["score"]
    winner, loser = halves(rollout, score)
    return float((mean[winner] > mean[loser]).double().mean())


def test_the_head_learns_what_is_better() -> None:
    part = HeadEstimator()
    start = part(states(40)[0])
    assert start["estimates"].shape == (40, 10) and not start["estimates"].any() and "hidden" not in start
    for seed in range(5):
        rollout = part(states(200, seed)[0])
        part.observe(rollout, lambda asked, names: asked)
    fresh = part(states(200, 77)[0])
    assert agreement(fresh) > 0.9
    passes = fresh["estimates"]
    assert float(passes.std(1).mean()) > 0, "passes differ"
    # The state is of the answer's last step, scaled; passes are the head's own, with features dropped.
    x = fresh["features"]
    same(x.square().sum(1), torch.full((200,), 12.0), rtol=1e-5)
    assert part.weight is not None
    kept = torch.linalg.lstsq(x * part.weight, passes[:, :1]).solution[:, 0]
    near = torch.minimum(kept.abs(), (kept - 1 / 0.9).abs())
    assert float(near.max()) < 1e-3


def test_the_head_resumes_and_leaves_masked_answers_alone() -> None:
    part = HeadEstimator()
    part.observe(part(states(40)[0]), lambda asked, names: asked)
    other = HeadEstimator()
    other.load_state_dict(clone(part).state_dict())
    rollout = states(40, 3)[0]
    assert torch.equal(part(rollout)["estimates"], other(rollout)["estimates"])
    rollout = rollout.with_columns(step={"mask": torch.arange(80) >= 2})
    assert not part(rollout)["estimates"][0].any()


def test_nothing_is_learned_of_equal_or_invalid_scores() -> None:
    for score in (1.0, math.nan):
        part = HeadEstimator()
        rollout, _ = states(8)
        part.observe(part(rollout.with_columns(trajectory={"score": torch.full((8,), score)})), lambda a, n: a)
        assert part.weight is None


def test_the_fitted_head_is_a_logistic_regression_without_dropout() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 3, generator=generator, dtype=torch.float64)
    winner, loser = torch.arange(0, 60, 2), torch.arange(1, 60, 2)
    found = fit_head(
        x, winner, loser, start=torch.zeros(3, dtype=torch.float64), generator=generator, dropout=0.0, steps=3000,
        ridge=0.1, rate=0.01,
    )  # fmt: skip
    d = (x[winner] - x[loser]).numpy()
    best = optimize.minimize(lambda w: np.logaddexp(0, -d @ w).mean() + 0.05 * (w @ w), np.zeros(3)).x
    same(found, best, rtol=1e-3, atol=1e-4)


def test_estimators_are_refused() -> None:
    with pytest.raises(UsageError, match="dropout must be"):
        HeadEstimator(dropout=0.0)
    with pytest.raises(UsageError, match="name its folder"):
        ModelEstimator()(answers([1], [0]))


def test_a_trained_reward_model_estimates_under_dropout(tmp_path: Path) -> None:
    policy = CausalLM(tiny(seed=0), byte_tokenizer())
    policy.add_critic()
    assert policy.critic is not None
    torch.nn.init.normal_(policy.critic.linear.weight, generator=torch.Generator().manual_seed(0))
    policy.save(tmp_path)
    requests = [Request(Example(str(i), f"{i}="), 2) for i in range(3)]
    rollout = policy.sample(requests, Sampling(max_new_tokens=4), seed=0)
    part = ModelEstimator(model=str(tmp_path), passes=200, dropout=0.2)
    first, second = (part(rollout)["estimates"] for _ in range(2))
    assert first.shape == (6, 200) and not torch.equal(first, second)
    # Dropout is unbiased: the mean pass is the reward itself.
    said = transcripts(rollout)
    plain = RewardModel.load(tmp_path).scores([t.prompt for t in said], [t.completion for t in said])[0]
    same(torch.cat([first, second], 1).mean(1), plain, rtol=0, atol=4 * float(first.std(1).max()) / 20)

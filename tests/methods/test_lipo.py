"""The card of LiPO: worked examples of every ranking loss, what they reduce to, what they do not see."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from polopt.core.errors import UsageError
from polopt.core.override import override
from polopt.core.rollout import Rollout
from polopt.methods.preference.dpo import DPO
from polopt.methods.preference.lipo import ListLambda, lipo
from polopt.objectives.preference import Pairs
from polopt.objectives.ranking import ListLoss, ListMLE, ListPairwise, ListPointwise, ListSoftmax
from tests.support import close, f64, now, same, value_and_gradient

SCORES = [0.3, -0.2, 0.6, 0.1]
LABELS = [0.9, 0.5, 0.4, 0.1]
LOSSES = [ListLambda(1.0), ListPairwise(1.0), ListPairwise(1.0, "hinge"), ListMLE(1.0), ListSoftmax(1.0)]
EVERY = [*LOSSES, ListPointwise(1.0)]
IDS = [f"{loss.name}-{getattr(loss, 'loss', '')}" for loss in EVERY]


def lists(labels: Sequence[float], groups: Sequence[int] | None = None) -> Rollout:
    """Answers of one step with log pi_ref = 0, so that log pi is the log-ratio."""
    count = len(labels)
    return Rollout.from_arrays(
        range(count),
        [0] * count if groups is None else list(groups),
        step={"logp/ref": f64([0.0] * count)},
        trajectories={"label": f64(labels)},
    )


def of(
    loss: ListLoss, scores: Sequence[float] | Tensor = SCORES, rollout: Rollout | None = None
) -> tuple[float, Tensor]:
    return value_and_gradient(lipo | {"objective": loss}, now(scores), lists(LABELS) if rollout is None else rollout)


def by_hand(loss: ListLoss, s: Sequence[float], psi: Sequence[float]) -> float:
    """One list, pair by pair, by plain Python."""
    count = range(len(s))
    order = sorted(count, key=lambda i: -s[i])
    rank = {i: order.index(i) + 1 for i in count}
    total = 0.0
    match loss.name:
        case "list-pointwise":
            return sum((p - v) ** 2 for p, v in zip(psi, s, strict=True))
        case "list-softmax":
            bottom = sum(math.exp(v) for v in s)
            return -sum(p / sum(psi) * math.log(math.exp(v) / bottom) for p, v in zip(psi, s, strict=True) if p)
        case "list-mle":
            for i in count:
                bottom = math.exp(s[i]) + sum(math.exp(s[j]) for j in count if psi[j] < psi[i])
                total -= math.log(math.exp(s[i]) / bottom)
            return total
    for i in count:
        for j in count:
            if psi[i] > psi[j]:
                gap = s[i] - s[j]
                term = max(0.0, 1 - gap) if getattr(loss, "loss", "") == "hinge" else math.log1p(math.exp(-gap))
                if isinstance(loss, ListLambda):
                    term *= 2 ** psi[i] - 2 ** psi[j]
                    term *= abs(1 / math.log(1 + rank[i]) - 1 / math.log(1 + rank[j]))
                total += term
    return total


def test_worked_example_of_every_loss() -> None:
    loss, gradient = of(ListLambda(1.0))
    close(loss, 0.6053376710, digits=10)
    close(gradient, [-0.28399886, -0.02406009, 0.15337697, 0.15468198], digits=8)
    expected = [4.4261039926, 6.2, 3.3232032817, 1.4073795971, 0.89]
    for part, value in zip(EVERY[1:], expected, strict=True):
        close(of(part)[0], value, digits=10)


def test_worked_weights() -> None:
    """Delta of the card by the gradient: pair (i, j) alone has -Delta_ij sigma(-(s_i - s_j))."""
    pairs = Pairs.of(lists(LABELS))
    delta = ListLambda(1.0).weight(f64(SCORES), pairs)
    found = dict(zip(zip(pairs.winner.tolist(), pairs.loser.tolist(), strict=True), delta.tolist(), strict=True))
    expected = [0.1305421, 0.29101802, 0.15003527, 0.07778744, 0.03424832, 0.17870263]
    upper = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    assert set(found) == set(upper)
    for pair, value in zip(upper, expected, strict=True):
        close(found[pair], value, digits=7 if pair == (0, 1) else 8)


def test_worked_example_of_packed_lists() -> None:
    rollout = Rollout.from_arrays(
        [0, 0, 1, 2, 2, 3, 4],
        [0, 0, 0, 1, 1],
        step={"logp/ref": f64([-0.6, -0.9, -0.3, -0.6, -0.8, -0.7, -1.0])},
        trajectories={"label": f64([0.2, 0.9, 0.5, 1, 0])},
    )
    loss, gradient = of(ListLambda(1.0), [-0.5, -1.0, -0.2, -0.7, -0.4, -0.9, -1.1], rollout)
    close(loss, 0.3909387568, digits=10)
    close(
        gradient,
        [0.07293704, 0.07293704, -0.09832648, 0.02538944, 0.02538944, -0.13976411, 0.13976411],
        digits=8,
    )


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_two_answers_are_dpo_and_slic(beta: float) -> None:
    rollout, scores = lists([1.0, 0.0]), [0.4, -0.3]
    reference = value_and_gradient(lipo | {"objective": DPO(beta)}, now(scores), rollout)
    for part in (ListPairwise(beta), ListMLE(beta)):
        value, gradient = of(part, scores, rollout)
        same(value, reference[0])
        same(gradient, reference[1])
    same(of(ListPairwise(beta, "hinge"), scores, rollout)[0], max(0.0, 1 - beta * 0.7))
    ratio = of(ListLambda(beta), scores, rollout)[0] / reference[0]
    same(ratio, 1 / math.log(2) - 1 / math.log(3))


@pytest.mark.parametrize("part", EVERY, ids=IDS)
@pytest.mark.parametrize("seed", range(3))
def test_every_loss_is_what_a_loop_says(part: ListLoss, seed: int) -> None:
    """Lists of different lengths, with ties among the labels; the gradient by differences (ranks do not change)."""
    generator = np.random.default_rng(seed)
    groups = [0] * 5 + [1] * 2 + [2] * 3
    s = generator.normal(size=10).tolist()
    psi = [float(v) for v in generator.integers(0, 4, size=10) / 3]
    members = [[i for i, g in enumerate(groups) if g == group] for group in range(3)]

    def expected(values: Sequence[float]) -> float:
        return float(np.mean([by_hand(part, [values[i] for i in m], [psi[i] for i in m]) for m in members if m]))

    psi[5], psi[7] = 1.0, 1.0
    loss, gradient = of(part, s, lists(psi, groups))
    same(loss, expected(s))
    width = 1e-6
    for i in range(10):
        up, down = ([v + sign * width * (k == i) for k, v in enumerate(s)] for sign in (1, -1))
        same(gradient[i], (expected(up) - expected(down)) / (2 * width), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("part", LOSSES, ids=IDS[:-1])
def test_a_constant_added_to_all_scores_changes_nothing(part: ListLoss) -> None:
    (loss, gradient), (moved, slope) = of(part), of(part, [v + 2.5 for v in SCORES])
    same(moved, loss)
    same(slope, gradient)
    same(gradient.sum(), 0.0, atol=1e-15)


def test_the_pointwise_loss_sees_a_constant() -> None:
    assert abs(of(ListPointwise(1.0), [v + 1.0 for v in SCORES])[0] - 0.89) > 0.1
    assert abs(float(of(ListPointwise(1.0))[1].sum())) > 0.1


@pytest.mark.parametrize("part", EVERY, ids=IDS)
def test_the_order_of_a_list_does_not_matter(part: ListLoss) -> None:
    order = [2, 0, 3, 1]
    loss, gradient = of(part)
    moved, slope = of(part, [SCORES[i] for i in order], lists([LABELS[i] for i in order]))
    same(moved, loss)
    same(slope, gradient[order])


@pytest.mark.parametrize("part", LOSSES[:4], ids=IDS[:4])
def test_equal_labels_are_no_pair(part: ListLoss) -> None:
    loss, gradient = of(part, rollout=lists([0.5] * 4))
    assert loss == 0 and not gradient.any()


@pytest.mark.parametrize("part", LOSSES[:4], ids=IDS[:4])
def test_raising_the_best_never_raises_the_loss(part: ListLoss) -> None:
    assert float(of(part)[1][0]) < 0


def test_of_equal_scores_the_first_ranks_first() -> None:
    s, psi = [0.2, 0.2, 0.2], [1.0, 0.0, 0.0]
    expected = sum(abs(1 / math.log(2) - 1 / math.log(1 + k)) * math.log(2) for k in (2, 3))
    same(of(ListLambda(1.0), s, lists(psi))[0], expected)


@pytest.mark.parametrize("part", EVERY, ids=IDS)
def test_answers_that_cannot_be_compared_are_left_out(part: ListLoss) -> None:
    """A NaN label and an answer without trainable step; a list of one. Lists without a pair count in the mean."""
    s, psi = [0.3, -0.2, 0.6, 0.1, 0.4], [0.9, torch.nan, 0.4, 0.1, 0.7]
    rollout = lists(psi, [0, 0, 0, 0, 1])
    mask = torch.tensor([True, True, True, False, True])
    loss, gradient = of(part, s, rollout.with_columns(step={"mask": mask}))
    alone = by_hand(part, [0.4], [0.7])
    same(loss, (by_hand(part, [0.3, 0.6], [0.9, 0.4]) + alone) / 2)
    assert gradient[1] == 0 and gradient[3] == 0 and bool(torch.isfinite(gradient).all())


def test_a_list_without_any_merit_teaches_the_softmax_nothing() -> None:
    loss, gradient = of(ListSoftmax(1.0), [0.3, 0.1], lists([0.0, 0.0]))
    assert loss == 0 and not gradient.any()


def test_errors() -> None:
    with pytest.raises(UsageError, match="labels must be at least 0, got -1"):
        of(ListSoftmax(1.0), [0.3, 0.1], lists([1.0, -1.0]))
    with pytest.raises(UsageError, match="beta"):
        override(lipo, {"objective.beta": 0.0})


def test_what_it_declares() -> None:
    assert lipo.unit == "group" and lipo.offline
    assert lipo.rollout.form == "lists" and lipo.objective.beta == 0.05
    _, metrics = lipo.loss(now(SCORES), lists(LABELS))
    # Of six pairs the policy orders (0, 1), (0, 3), (2, 3) as the labels do.
    close(metrics["rewards/accuracies"], 0.5)

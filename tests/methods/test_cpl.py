"""The card of CPL: worked examples, the DPO and bandit cases, the bias, soft and ranked labels, cloning."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from polopt.core.errors import UsageError
from polopt.core.method import Method
from polopt.core.override import override
from polopt.core.rollout import Rollout
from polopt.methods.preference.cpl import CPL, BehaviourCloning, CloningFirst, cpl
from polopt.methods.preference.dpo import DPO, dpo
from polopt.training.build import at_start
from tests.support import close, f64, now, same, value_and_gradient

IDS = [0, 0, 1, 1, 1, 2, 3, 3]
LOGP = [-0.5, -1, -0.2, -0.7, -0.4, -0.9, -1.1, -0.3]
REF = [-0.4, -1.2, -0.3, -0.6, -0.5, -0.8, -1.0, -0.5]
STARTS = [0, 2, 5, 6]


def card(labels: Sequence[float] = (1, 0, 0, 1), groups: Sequence[int] = (0, 0, 1, 1), **step: Any) -> Rollout:
    """The worked example's segments: 0 is preferred to 1, and 3 to 2."""
    columns = {"logp/ref": f64(REF), **step}
    return Rollout.from_arrays(IDS, list(groups), step=columns, trajectories={"label": f64(labels)})


def variant(cloning: float = 0.0, **fields: Any) -> Method:
    made = cpl | {"objective": CPL(**fields)}
    return made | {"regularizer": BehaviourCloning(cloning)} if cloning else made


def ours(rollout: Rollout | None = None, logp: Any = LOGP, **fields: Any) -> tuple[float, Tensor]:
    return value_and_gradient(variant(**fields), now(logp), card() if rollout is None else rollout)


def advantages(logp: Sequence[float], alpha: float, discount: float, ref: Sequence[float] | None = None) -> list[float]:
    """A of each segment, step by step."""
    found, time = [0.0] * 4, [0] * 4
    for place, i in enumerate(IDS):
        found[i] += alpha * discount ** time[i] * (logp[place] - (0.0 if ref is None else ref[place]))
        time[i] += 1
    return found


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def by_hand(
    logp: Sequence[float], pairs: Sequence[tuple[int, int]], alpha: float, bias: float, discount: float
) -> float:
    a = advantages(logp, alpha, discount)
    return sum(softplus(bias * a[loser] - a[winner]) for winner, loser in pairs) / len(pairs)


@pytest.mark.parametrize(
    ("fields", "expected", "gradient"),
    [
        ({"alpha": 1.0, "bias": 1.0}, 0.8861079267808494, [-0.274917, 0.274917, 0.31122967, -0.31122967]),
        (
            {"alpha": 1.0, "bias": 0.5, "discount": 0.9},
            1.221220170773162,
            [-0.34743639, 0.1737182, 0.17876053, -0.35752105],
        ),
        ({"cloning": 1.0}, 1.3766624577027893, [-0.15106186, -0.11196907, -0.1119067, -0.15118661]),
    ],
)
def test_worked_examples(fields: dict[str, Any], expected: float, gradient: Sequence[float]) -> None:
    loss, found = ours(**fields)
    close(loss, expected, digits=12)
    close(found[STARTS], gradient, digits=8)


def test_worked_ranking() -> None:
    """Single steps with A = log pi: all pairs of the list, better over worse."""
    rollout = Rollout.from_arrays([0, 1, 2], [0, 0, 0], trajectories={"label": f64([0.3, 0.1, 0.9])})
    loss, _ = value_and_gradient(variant(alpha=1.0, bias=0.5), now([-1, -2, -0.5]), rollout)
    close(loss, 0.6201237817666657, digits=12)


@pytest.mark.parametrize("discount", [1.0, 0.8])
@pytest.mark.parametrize("bias", [0.3, 1.0])
def test_the_gradient_of_every_step(discount: float, bias: float) -> None:
    """-alpha gamma^t sigma(lambda A_l - A_w) / P on the winner, lambda times the opposite on the loser."""
    alpha = 0.7
    loss, gradient = ours(alpha=alpha, bias=bias, discount=discount)
    same(loss, by_hand(LOGP, [(0, 1), (3, 2)], alpha, bias, discount))
    a = advantages(LOGP, alpha, discount)
    rate = {}
    for winner, loser in ((0, 1), (3, 2)):
        push = alpha / (1 + math.exp(-(bias * a[loser] - a[winner]))) / 2
        rate |= {winner: -push, loser: bias * push}
    time = [place - STARTS[i] for place, i in enumerate(IDS)]
    same(gradient, [rate[i] * discount**t for i, t in zip(IDS, time, strict=True)])


@pytest.mark.parametrize("alpha", [0.1, 0.9])
def test_against_a_reference_without_bias_it_is_dpo(alpha: float) -> None:
    loss, gradient = ours(alpha=alpha, bias=1.0, model="ref")
    expected, slope = value_and_gradient(dpo | {"objective": DPO(beta=alpha)}, now(LOGP), card())
    same(loss, expected)
    same(gradient, slope)
    _, metrics = variant(alpha=alpha, bias=1.0, model="ref").loss(now(LOGP), card())
    _, others = (dpo | {"objective": DPO(beta=alpha)}).loss(now(LOGP), card())
    assert set(metrics) >= {"rewards/chosen", "rewards/margins", "logps/chosen"}
    for name, value in metrics.items():
        same(value, others[name])


def test_the_discount_acts_on_log_ratios_too() -> None:
    a = advantages(LOGP, 0.5, 0.9, REF)
    expected = (softplus(0.75 * a[1] - a[0]) + softplus(0.75 * a[2] - a[3])) / 2
    same(ours(alpha=0.5, bias=0.75, discount=0.9, model="ref")[0], expected)


def test_the_bias_pays_for_likelihood() -> None:
    """Adding one number to both sums leaves the loss alone without bias, and lowers it with one."""
    moved = f64(LOGP).clone()
    moved[[0, 2, 5, 6]] += 0.4
    same(ours(logp=moved, bias=1.0)[0], ours(bias=1.0)[0])
    assert ours(logp=moved, bias=0.5)[0] < ours(bias=0.5)[0] - 1e-3


def test_soft_labels() -> None:
    """y softplus(lambda A_1 - A_2) + (1 - y) softplus(lambda A_2 - A_1), y that the second is preferred."""
    a, bias = advantages(LOGP, 1.0, 1.0), 0.5
    for y, z in itertools.product((0.0, 0.2, 0.5, 1.0), (0.3, 0.9)):
        found = ours(card((1 - y, y, 1 - z, z)), alpha=1.0, bias=bias, soft=True)[0]
        terms = [
            p * softplus(bias * a[i] - a[j]) + (1 - p) * softplus(bias * a[j] - a[i])
            for p, i, j in ((y, 0, 1), (z, 2, 3))
        ]
        same(found, sum(terms) / 2)
    swapped = card((0.2, 0.8, 0.7, 0.3)).select(torch.tensor([1, 0, 3, 2]))
    order = [2, 3, 4, 0, 1, 6, 7, 5]
    same(ours(swapped, f64(LOGP)[order], soft=True)[0], ours(card((0.2, 0.8, 0.7, 0.3)), soft=True)[0])
    same(ours(soft=True)[0], ours()[0])
    # Two labels of 0 are as good as two halves.
    same(ours(card((0, 0, 0, 0)), soft=True)[0], ours(card((0.5,) * 4), soft=True)[0])


def test_without_a_scale_nothing_is_preferred() -> None:
    close(ours(alpha=1e-9, bias=1.0)[0], math.log(2), digits=8)


def test_single_steps_are_a_contextual_bandit() -> None:
    """-log pi_w^alpha / (pi_w^alpha + pi_l^alpha), whatever the discount."""
    rollout = Rollout.from_arrays([0, 1], [0, 0], trajectories={"label": f64([0, 1])})
    w, lost = 0.6**0.3, 0.1**0.3
    for discount in (1.0, 0.5):
        method = variant(alpha=0.3, bias=1.0, discount=discount)
        loss, _ = value_and_gradient(method, now(f64([0.1, 0.6]).log()), rollout)
        same(loss, -math.log(w / (w + lost)))


def test_masked_steps_do_not_count_in_time() -> None:
    mask = torch.tensor([True, True, True, False, True, True, True, True])
    loss, gradient = ours(card(mask=mask), alpha=1.0, bias=1.0, discount=0.5)
    a0, a1 = -0.5 - 0.5 * 1, -0.2 - 0.5 * 0.4
    a2, a3 = -0.9, -1.1 - 0.5 * 0.3
    same(loss, (softplus(a1 - a0) + softplus(a2 - a3)) / 2)
    assert gradient[3] == 0 and gradient[4] == gradient[2] / 2


@pytest.mark.parametrize(
    ("labels", "groups"),
    [((1, 1, 0, 1), (0, 0, 1, 1)), ((1, math.nan, 0, 1), (0, 0, 1, 1)), ((1, 0, 0, 1), (0, 1, 2, 2))],
)
def test_ties_unlabelled_answers_and_groups_of_one_are_no_pairs(labels: Any, groups: Any) -> None:
    loss, gradient = ours(card(labels, groups), alpha=1.0)
    a = advantages(LOGP, 1.0, 1.0)
    same(loss, softplus(0.5 * a[2] - a[3]) / (max(groups) + 1))
    assert (gradient[:5] == 0).all() and (gradient[5:] != 0).all()


def test_cloning_is_the_mean_over_all_steps() -> None:
    loss, gradient = value_and_gradient(variant(2.0, weight=0.0), now(LOGP), card((1, 0, 1, 1)))
    same(loss, -2 * sum(LOGP) / 8)
    same(gradient, [-0.25] * 8)


def test_cloning_comes_first_where_asked_for() -> None:
    staged = cpl | {"regularizer": BehaviourCloning(), "controller": CloningFirst(3, 0.25)}
    method = at_start(staged)
    for done in range(5):
        cloning = done < 3
        assert method.objective.weight == float(not cloning)
        assert method.regularizer.coefficient == (1.0 if cloning else 0.25)
        loss, _ = value_and_gradient(method, now(LOGP), card())
        clone, contrast = -sum(LOGP) / 8, ours()[0]
        same(loss, clone if cloning else contrast + 0.25 * clone)
        method = override(method, staged.controller({"iteration": done + 1.0}))


@pytest.mark.parametrize("fields", [{"alpha": 0.0}, {"bias": 0.0}, {"bias": 1.5}, {"discount": 0.0}, {"discount": 1.1}])
def test_values_out_of_range(fields: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="cpl: alpha must be above 0"):
        CPL(**fields)


def test_what_it_declares() -> None:
    assert cpl.unit == "group" and cpl.offline and cpl.regularizer is None
    assert (cpl.objective.alpha, cpl.objective.bias, cpl.objective.discount) == (0.1, 0.5, 1.0)
    assert not cpl.models_in_use, "no reference is held without CPL-KL"
    assert set(override(cpl, {"objective.model": "ref"}).models_in_use) == {"ref"}

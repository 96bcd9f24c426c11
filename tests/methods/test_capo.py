"""The card of CAPO: m_H and m_F by loops and by differences, the moments of the rows, the mask, worked examples."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from polopt.core.errors import UsageError
from polopt.core.policy import Request, Sampling
from polopt.core.rollout import Rollout
from polopt.methods.base.grpo import grpo
from polopt.methods.trust_region.capo import Curvature, capo, predicted
from polopt.policies.exact import ExactPolicy, SequenceSpace
from polopt.policies.exact.policy import example_of
from polopt.updates.row_moments import RowAdam
from tests.support import LAYOUTS, batch, close, f64, now, same, value_and_gradient

Floats = NDArray[np.float64]

H = [[1.0, 0.5], [0.2, -1.0], [2.0, 2.0]]
PI = [[0.7, 0.2, 0.1], [0.5, 0.3, 0.2], [0.05, 0.15, 0.8]]
ROWS = [[0, 1, 2], [1, 2, 3], [0, 2, 3]]
SAMPLED = [0, 3, 0]  # positions 0, 2, 0
A = [1.0, -1.0, 2.0]
RATE = 0.05


def rollout(ids: list[int] | None = None, **columns: Any) -> Rollout:
    """The worked example's tokens: one response each, or those of ``ids``."""
    step = {"hidden": H, "top_logp": np.log(PI), "advantage": A, "logp": [-0.4, -1.6, -3.0], **columns}
    made = {name: f64(value) for name, value in step.items()}
    owner = ids or [0, 1, 2]
    made |= {"top_id": torch.tensor(ROWS), "action": torch.tensor(SAMPLED)}
    return Rollout.from_arrays(owner, [0] * (owner[-1] + 1), step=made)


def both(part: Curvature, given: Rollout) -> tuple[Tensor, Tensor]:
    """m_H and m_F of all steps."""
    ids, h, a = given["top_id"], given["hidden"], given.advantage
    pi = given["top_logp"].softmax(-1)
    v = (given["action"][:, None] == ids).to(pi) - pi
    if part.optimizer == "sgd":
        q = (a * h.square().sum(-1))[:, None] * v
    else:
        q = RowAdam(part.beta1, part.beta2, part.eps).moved(part.moments, ids, a[:, None] * v, h)
    assert part.rate is not None
    return predicted(a, v, pi, q, part.rate)


def by_loop(
    h: Floats, pi: Floats, chosen: int | None, a: float, rate: float, moments: tuple[Floats, Floats, int] | None = None
) -> tuple[float, float]:
    """m_H and m_F from whole matrices."""
    v = -pi
    if chosen is not None:
        v = v + np.eye(len(pi))[chosen]
    g = a * np.outer(v, h)
    u = g
    if moments is not None:
        m, s, t = moments
        m, s = 0.9 * m + 0.1 * g, 0.999 * s + 0.001 * g * g
        u = (m / (1 - 0.9 ** (t + 1))) / (np.sqrt(s / (1 - 0.999 ** (t + 1))) + 1e-8)
    q = u @ h
    fisher = np.diag(pi) - np.outer(pi, pi)
    change = rate * (g * u).sum() + 0.5 * rate**2 * a * ((v @ q) ** 2 - q @ fisher @ q)
    return float(change), float(0.5 * rate**2 * (v @ q) ** 2)


def full(value: float, count: int) -> dict[str, Any]:
    rows = torch.arange(4)
    return {"count": count, "rows": rows, "first": f64([[value] * 2] * 4), "second": f64([[0.04] * 2] * 4)}


# --- predictions ------------------------------------------------------------------------------------------------------


def test_worked_example_under_sgd() -> None:
    part = Curvature(0.5, 0.05, rate=RATE, optimizer="sgd")
    change, divergence = both(part, rollout())
    close(change, [0.00869766, 0.04999629, 3.954848], digits=6)
    close(divergence, [3.828e-5, 1.29846e-3, 0.783752], digits=6)
    assert part(rollout()).tolist() == [1.0, 1.0, 0.0]


def test_worked_example_under_adam() -> None:
    part = Curvature(0.5, 0.05, rate=RATE).remember(moments=full(0.1, 3))
    change, divergence = both(part, rollout())
    close(change, [0.00080231, 0.00463122, 0.20862351], digits=8)
    close(divergence, [3.2e-7, 1.076e-5, 4.97198e-3], digits=8)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_against_whole_matrices(optimizer: Any, seed: int) -> None:
    generator = np.random.default_rng(seed)
    n, k, d, vocabulary = 7, 4, 3, 9
    ids = np.stack([generator.permutation(vocabulary)[:k] for _ in range(n)])
    chosen = generator.integers(-1, k, n)  # -1: the sampled token is outside the top K
    logits, h, a = generator.normal(size=(n, k)), generator.normal(size=(n, d)), generator.normal(size=n)
    action = np.where(chosen >= 0, ids[np.arange(n), chosen], vocabulary)
    known = np.sort(generator.permutation(vocabulary)[:5])
    first, second = generator.normal(size=(5, d)), generator.exponential(size=(5, d))
    step = {"hidden": h, "top_logp": logits, "advantage": a, "top_id": ids, "action": action}
    given = Rollout.from_arrays(range(n), [0] * n, step={name: torch.as_tensor(v) for name, v in step.items()})
    moments = {"count": 6, "rows": torch.as_tensor(known), "first": f64(first), "second": f64(second)}
    part = Curvature(rate=0.3, optimizer=optimizer).remember(moments=moments)
    found = both(part, given)
    for i in range(n):
        m, s = np.zeros((k, d)), np.zeros((k, d))
        for j, row in enumerate(ids[i]):
            if row in known:
                m[j], s[j] = first[list(known).index(row)], second[list(known).index(row)]
        pi = np.exp(logits[i]) / np.exp(logits[i]).sum()
        expected = by_loop(
            h[i], pi, int(chosen[i]) if chosen[i] >= 0 else None, a[i], 0.3, (m, s, 6) if optimizer == "adam" else None
        )
        same([found[0][i], found[1][i]], expected)
    assert torch.equal(part.moments["first"], f64(first))  # looking ahead changes nothing


def test_only_the_top_of_the_distribution_counts() -> None:
    """K = 2: the rest is renormalised away."""
    part = Curvature(math.inf, math.inf, rate=RATE, top=2)
    seen: list[tuple[Tensor, Tensor]] = []

    class Spy(Curvature):
        def __call__(self, rollout: Rollout) -> Tensor:
            short = rollout.with_columns(step={n: rollout[n][:, :2] for n in ("top_id", "top_logp")})
            seen.append(both(self, short))
            return super().__call__(rollout)

    Spy(math.inf, math.inf, rate=RATE, top=2)(rollout())
    cut = np.array(PI[0][:2]) / sum(PI[0][:2])
    expected = by_loop(np.array(H[0]), cut, 0, 1.0, RATE, (np.zeros((2, 2)), np.zeros((2, 2)), 0))
    same([seen[0][0][0], seen[0][1][0]], expected)
    part(rollout())
    assert part.moments["rows"].tolist() == [0, 1, 2]


def test_orders_in_rate_advantage_and_state() -> None:
    base = both(Curvature(rate=0.1, optimizer="sgd"), rollout())
    same(both(Curvature(rate=0.3, optimizer="sgd"), rollout())[1], 9 * base[1])
    doubled = rollout(advantage=[2 * a for a in A])
    same(both(Curvature(rate=0.1, optimizer="sgd"), doubled)[1], 4 * base[1])
    longer = rollout(hidden=[[3 * x for x in h] for h in H])
    same(both(Curvature(rate=0.1, optimizer="sgd"), longer)[1], 81 * base[1])
    assert bool((base[1] >= 0).all())


def test_the_first_adam_step_is_the_sign() -> None:
    gradient = f64([[0.3, -2.0, 1e-3], [-5.0, 0.2, 7.0]])
    adam = RowAdam()
    same(adam.direction({}, torch.tensor([4, 1]), gradient), gradient.sign(), rtol=2e-5)
    first = both(Curvature(rate=RATE), rollout())[1]
    same(both(Curvature(rate=RATE), rollout(advantage=[7 * a for a in A]))[1], first, rtol=1e-4)


def test_no_advantage_no_prediction_and_the_token_is_kept() -> None:
    for optimizer in ("sgd", "adam"):
        part = Curvature(1e-12, 1e-12, rate=RATE, optimizer=optimizer)  # type: ignore[arg-type]
        still = rollout(advantage=[0.0, 1.0, 0.0])
        change, divergence = both(part, still)
        assert change[[0, 2]].tolist() == [0, 0] and divergence[[0, 2]].tolist() == [0, 0]
        assert part(still).tolist() == [1.0, 0.0, 1.0]


def test_the_expected_divergence_is_the_second_order_kl() -> None:
    pi, q, a = f64([[0.5, 0.3, 0.2]]), f64([[0.4, -1.0, 0.3]]), f64([1.0])
    rate = 1e-3
    mean = sum(pi[0, i] * predicted(a, f64(np.eye(3))[[i]] - pi, pi, q, rate)[1][0] for i in range(3))
    moved = (pi.log() + rate * q).log_softmax(-1)
    same(mean, (pi * (pi.log() - moved)).sum(), rtol=2e-3)
    fisher = pi[0].diag() - pi[0][:, None] * pi[0][None]
    same(mean, 0.5 * rate**2 * (q[0] @ fisher @ q[0]))


def test_the_expected_curvature_is_that_of_the_objective() -> None:
    """d^2/dx^2 sum_a pi_a(z + x q) A_a, by differences."""
    logits, q, a = f64([0.2, -0.7, 1.1]), f64([0.4, -1.0, 0.3]), f64([1.0, -0.5, 2.0])

    def objective(x: float) -> Tensor:
        return ((logits + x * q).softmax(-1) * a).sum()

    pi = logits.softmax(-1)[None]
    total = f64(0.0)
    for i in range(3):
        v = f64(np.eye(3))[[i]] - pi
        slope = float((v * q).sum())
        change = predicted(a[[i]], v, pi, q[None], 1.0)[0][0]
        total = total + pi[0, i] * 2 * (change - a[i] * slope)
    width = 1e-3
    numeric = (objective(width) - 2 * objective(0.0) + objective(-width)) / width**2
    same(total, numeric, rtol=1e-5)


# --- moments ----------------------------------------------------------------------------------------------------------


def test_rows_advance_by_the_mean_over_kept_tokens() -> None:
    part = Curvature(0.5, 0.05, rate=RATE).remember(moments=full(0.1, 3))
    expected_first, expected_second = np.full((4, 2), 0.1), np.full((4, 2), 0.04)
    keep = part(rollout()) > 0
    assert keep.tolist() == [True, True, True]
    sums, times = np.zeros((4, 2)), np.zeros(4)
    for t in range(3):
        for j, row in enumerate(ROWS[t]):
            v = float(SAMPLED[t] == row) - PI[t][j]
            sums[row] += A[t] * v * np.array(H[t])
            times[row] += 1
    mean = sums / times[:, None]
    same(part.moments["first"], 0.9 * expected_first + 0.1 * mean)
    same(part.moments["second"], 0.999 * expected_second + 0.001 * mean**2)
    assert part.moments["count"] == 4


def test_rejected_tokens_and_unseen_rows_leave_moments_alone() -> None:
    part = Curvature(0.5, 1e-4, rate=RATE).remember(moments=full(0.1, 3))
    assert (part(rollout()) > 0).tolist() == [True, True, False]
    kept = Curvature(math.inf, math.inf, rate=RATE).remember(moments=full(0.1, 3))
    kept(rollout().select(torch.tensor([0, 1])))
    same(part.moments["first"], kept.moments["first"])
    alone = Curvature(math.inf, math.inf, rate=RATE).remember(moments=full(0.1, 3))
    alone(rollout().select(torch.tensor([0])))
    assert alone.moments["first"][3].tolist() == [0.1, 0.1]
    nothing = Curvature(0.0, 0.0, rate=RATE).remember(moments=full(0.1, 3))
    assert nothing(rollout()).tolist() == [0, 0, 0]
    assert torch.equal(nothing.moments["first"], f64([[0.1] * 2] * 4)) and nothing.moments["count"] == 4


def test_only_rows_that_were_seen_are_stored() -> None:
    part = Curvature(math.inf, math.inf)
    part(rollout().select(torch.tensor([0])))
    assert part.moments["rows"].tolist() == [0, 1, 2] and part.moments["first"].shape == (3, 2)
    part(rollout().select(torch.tensor([1])))
    assert part.moments["rows"].tolist() == [0, 1, 2, 3]
    same(part.moments["first"][0], 0.1 * 0.3 * f64(H[0]))


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    part = Curvature(rate=RATE).remember(moments=full(0.1, 3))
    whole = both(part, rollout())
    monkeypatch.setattr("polopt.updates.row_moments.CHUNK", 1)
    same(torch.stack(both(part, rollout())), torch.stack(whole))


# --- the mask ---------------------------------------------------------------------------------------------------------


def test_lower_bounds_never_add_tokens() -> None:
    given = batch(capo, LAYOUTS["mixed"])
    given = given.with_columns(step={"advantage": given.spread(given.reward)})
    before = torch.ones(given.n_steps, dtype=torch.bool)
    for bound in (math.inf, 1.0, 0.3, 0.1, 0.01):
        kept = Curvature(bound, bound, rate=0.3, optimizer="sgd")(given) > 0
        assert not bool((kept & ~before).any())
        before = kept
    assert 0 < int(before.sum()) < int(given.mask.sum())


def test_the_one_sided_test_rejects_what_would_lower_the_objective() -> None:
    change, _ = both(Curvature(rate=3.0, optimizer="sgd"), rollout())
    assert bool((change < 0).any())
    part = Curvature(math.inf, math.inf, lowest=0.0, rate=3.0, optimizer="sgd")
    assert torch.equal(part(rollout()) > 0, change > 0)
    assert part(rollout(advantage=[0.0] * 3)).tolist() == [1.0] * 3  # nothing to gain, nothing to lose


def test_the_loss_is_a_mean_over_kept_steps() -> None:
    """The card's second example: responses [0, 0, 1], the third token rejected."""
    given = rollout([0, 0, 1], advantage=[1.0, 1.0, 2.0])
    part = Curvature(0.5, 0.05, rate=RATE, optimizer="sgd")
    weight = part(rollout([0, 0, 1]))
    assert weight.tolist() == [1.0, 1.0, 0.0]
    loss, gradient = value_and_gradient(capo, now([-0.3, -1.7, -2.7]), given.with_columns(step={"weight": weight}))
    close(loss, -0.5025020841, digits=9)
    close(gradient, [-0.276293, -0.226209, 0.0])


def test_kept_steps_of_a_response_share_its_weight() -> None:
    given = rollout([0, 0, 0])
    assert Curvature(0.5, 0.05, rate=RATE, optimizer="sgd")(given).tolist() == [1.5, 1.5, 0.0]
    assert Curvature(0.5, 0.05, rate=RATE, optimizer="sgd", renormalise=False)(given).tolist() == [1.0, 1.0, 0.0]


def test_without_bounds_or_rate_it_is_grpo() -> None:
    given = batch(capo, LAYOUTS["mixed"])
    credited = grpo.credit(given)
    for weight in (Curvature(math.inf, math.inf, rate=1.0), Curvature(1e-9, 1e-9)):
        same((capo | {"weight": weight}).credit(given).weight, given.mask.double())
        same((capo | {"weight": weight}).credit(given).advantage, credited.advantage)


def test_masked_steps_count_for_nothing() -> None:
    masked = rollout([0, 0, 0]).with_columns(step={"mask": torch.tensor([True, True, False])})
    part = Curvature(math.inf, math.inf, rate=RATE)
    assert part(masked).tolist() == [1.0, 1.0, 0.0]
    other = Curvature(math.inf, math.inf, rate=RATE)
    other(rollout().select(torch.tensor([0, 1])))
    same(part.moments["first"], other.moments["first"])


def test_the_top_has_a_limit() -> None:
    with pytest.raises(UsageError, match="from 1 to 64"):
        Curvature(top=65)


def test_the_rate_is_that_of_the_last_iteration() -> None:
    assert capo.controller({}) == {}
    assert capo.controller({"learning_rate": 2e-4}) == {"weight.rate": 2e-4}


# --- the tabular policy -----------------------------------------------------------------------------------------------


def test_the_predicted_move_is_that_of_the_policys_own_step() -> None:
    """One step of SGD on A log pi(a) of one token moves the logits by rate q, and the log-prob by <v, q> of them."""
    space, rate, a = SequenceSpace(3, 2), 1e-4, 1.7
    policy = ExactPolicy(
        space, 2, torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    )
    made = policy.sample([Request(example_of(1), 1)], Sampling(temperature=0.7), seed=0)
    made = made.with_columns(step={"advantage": torch.full((2,), a, dtype=torch.float64)})
    found = policy.evaluate(made, frozenset({"hidden", "top_id", "top_logp"}))
    given = made.with_columns(step=dict(found.columns))
    change, divergence = both(Curvature(rate=rate, optimizer="sgd"), given)
    before = policy.evaluate(made, frozenset({"logp"})).logp
    (gradient,) = torch.autograd.grad(a * before[0], policy.logits)
    with torch.no_grad():
        policy.logits += rate * gradient
        after = policy.evaluate(made, frozenset({"logp"})).logp
    moved = float((after - before)[0].detach())
    same(change[0], a * moved, rtol=1e-3)
    same(divergence[0], moved**2 / 2, rtol=1e-3)

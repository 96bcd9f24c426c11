"""The card of BAPO: the search for the bounds, both orders and measures, worked example."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from polopt.core.errors import UsageError
from polopt.core.rollout import Rollout
from polopt.methods.base.dapo import dapo
from polopt.methods.trust_region.bapo import AdaptiveClip, bapo
from polopt.objectives.clipped_surrogate import ClippedSurrogate
from tests.support import close, f64, now, same, value_and_gradient, with_advantage, worked

OLD = [-2.5, -1.0, -0.2, -0.7, -1.5, -0.3, -2.0, -0.4, -0.9, -1.2]
DELTA = [0.6, -0.1, 0.05, 0.4, -0.45, 0.0, 0.9, -0.3, 0.1, -0.05]
ADVANTAGE = [1.0, 0.8, 0.4, -1.0, -1.5, -0.8, 0.5, -0.9, -0.6, -0.9]
MOVED = f64(OLD) + f64(DELTA)
CARD = with_advantage(worked().with_columns(step={"logp": f64(OLD)}), ADVANTAGE)
CODE = AdaptiveClip(0.5, (0.6, 0.8, 0.05), (1.2, 2.0, 0.05), search="code", dual=3.0)


def found(part: AdaptiveClip, rollout: Rollout = CARD, logp: torch.Tensor = MOVED) -> tuple[float, float, float]:
    _, metrics = (bapo | {"objective": part}).loss(now(logp), rollout)
    return (
        float(metrics["clip_bound/low"]),
        float(metrics["clip_bound/high"]),
        float(metrics["positive_share"]),
    )


def contributions(low: float, high: float) -> tuple[float, float]:
    """P and Q, step by step."""
    p = q = 0.0
    for d, a in zip(DELTA, ADVANTAGE, strict=True):
        if a >= 0:
            p += min(np.exp(d), high) * a
        else:
            q += max(np.exp(d), low) * -a
    return p, q


def papers_search(ratio: np.ndarray, a: np.ndarray, target: float) -> tuple[float, float]:
    """The loop of Algorithm 1 in hundredths, so that nothing rounds."""
    low, high = 60, 120

    def share() -> float:
        p = np.minimum(ratio, high / 100)[a >= 0] @ a[a >= 0]
        q = np.maximum(ratio, low / 100)[a < 0] @ -a[a < 0]
        return float(p / (p + q)) if q > 0 else 1.0

    while share() < target and low + 2 <= 90:
        if high + 5 <= 300:
            high += 5
        else:
            low += 2
    return low / 100, high / 100


def codes_search(ratio: np.ndarray, a: np.ndarray, target: float) -> tuple[float, float]:
    """The authors' loops: P / Q against target / (1 - target), c_lo first."""
    low, high = 60, 120

    def short() -> bool:
        p = np.minimum(ratio, high / 100)[a >= 0] @ a[a >= 0]
        q = np.maximum(ratio, low / 100)[a < 0] @ -a[a < 0]
        return bool(q > 0 and p / (q + 1e-8) < target / (1 - target))

    while short() and low < 80:
        low = min(low + 5, 80)
    while short() and high < 200:
        high = min(high + 5, 200)
    return low / 100, high / 100


def test_worked_example() -> None:
    close(contributions(0.6, 1.2), [2.944378, 5.434212])
    close(found(AdaptiveClip(target=0.0)), [0.6, 1.2, 0.351417])
    close(found(AdaptiveClip()), [0.6, 1.7, 0.4047041304], digits=10)
    loss, gradient = value_and_gradient(bapo, now(MOVED), CARD)
    close(loss, 0.1739833984, digits=10)
    close(gradient, [0, -0.072387, -0.042051, 0.149182, 0.095644, 0.08, 0, 0.066674, 0.06631, 0.085611])


def test_worked_example_of_the_code() -> None:
    low, high, share = found(CODE)
    close([low, high], [0.8, 2.0])
    # The code divides by Q + 1e-8.
    p, q = contributions(low, high)
    close(p / (q + 1e-8), 0.6921085014, digits=10)
    same(share, p / (p + q))


def test_worked_example_of_the_gradient_measure() -> None:
    close(found(AdaptiveClip(0.5, measure="gradient")), [0.76, 3.0, 0.5240570128], digits=10)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("target", [0.2, 0.4, 0.5, 0.6])
def test_the_searches_are_those_of_paper_and_code(seed: int, target: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    delta = 0.5 * torch.randn(10, generator=generator, dtype=torch.float64)
    advantage = torch.randn(10, generator=generator, dtype=torch.float64)
    rollout = with_advantage(CARD, advantage)
    ratio, a = delta.exp().numpy(), advantage.numpy()
    same(found(AdaptiveClip(target), rollout, f64(OLD) + delta)[:2], papers_search(ratio, a, target))
    code = AdaptiveClip(target, (0.6, 0.8, 0.05), (1.2, 2.0, 0.05), search="code")
    same(found(code, rollout, f64(OLD) + delta)[:2], codes_search(ratio, a, target))


def test_the_start_is_kept_where_nothing_is_asked_or_nothing_is_negative() -> None:
    for part in (AdaptiveClip(0.0), CODE):
        rollout = CARD if part.target == 0 else with_advantage(CARD, [abs(a) for a in ADVANTAGE])
        assert found(part, rollout)[:2] == (0.6, 1.2)
    assert found(AdaptiveClip(), with_advantage(CARD, [0.0] * 10)) == (0.6, 1.2, 1.0)


def test_a_range_of_one_point_is_a_fixed_clip() -> None:
    fixed = AdaptiveClip(low=(0.8, 0.8, 0.02), high=(1.28, 1.28, 0.05))
    loss, gradient = value_and_gradient(bapo | {"objective": fixed}, now(MOVED), CARD)
    expected_loss, expected = value_and_gradient(dapo, now(MOVED), CARD)
    same(loss, expected_loss)
    same(gradient, expected)


def test_the_papers_search_rests_where_the_lower_bound_cannot_move() -> None:
    low, high, share = found(AdaptiveClip(0.9, low=(0.6, 0.6, 0.02)))
    assert (low, high) == (0.6, 1.2) and share < 0.9
    code = AdaptiveClip(0.9, (0.6, 0.6, 0.02), (1.2, 2.0, 0.05), search="code")
    close(found(code)[:2], [0.6, 2.0])


def test_the_order_and_the_ends_of_the_path() -> None:
    paper = AdaptiveClip().path()
    assert len(paper) == 37 + 15 and paper[0] == (0.6, 1.2)
    close(paper[-1], [0.9, 3.0])
    assert all(low == 0.6 for low, _ in paper[:37]) and all(high == paper[36][1] for _, high in paper[36:])
    uneven = ((0.6, 0.7, 0.04), (1.2, 1.3, 0.07))
    close(AdaptiveClip(0.5, *uneven).path(), [(0.6, 1.2), (0.6, 1.27), (0.64, 1.27), (0.68, 1.27)])
    cut = AdaptiveClip(0.5, *uneven, search="code").path()
    close(cut, [(0.6, 1.2), (0.64, 1.2), (0.68, 1.2), (0.7, 1.2), (0.7, 1.27), (0.7, 1.3)])


def test_contributions_grow_with_their_bounds() -> None:
    p = [contributions(0.6, high)[0] for high in (1.0, 1.2, 1.5, 2.0, 3.0)]
    q = [contributions(low, 1.2)[1] for low in (0.4, 0.6, 0.7, 0.8, 0.9)]
    assert p == sorted(p) and q == sorted(q) and p[0] < p[-1] and q[0] < q[-1]
    part, ratio, a = AdaptiveClip(), f64(DELTA).exp(), f64(ADVANTAGE)
    for low, high in ((0.4, 1.0), (0.6, 1.5), (0.9, 3.0)):
        expected = contributions(low, high)
        same(part.share(ratio, a, low, high), expected[0] / sum(expected))


@pytest.mark.parametrize("seed", range(4))
def test_by_the_gradient_measure_no_move_goes_away_from_the_target(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ratio = (0.5 * torch.randn(40, generator=generator, dtype=torch.float64)).exp()
    advantage = torch.randn(40, generator=generator, dtype=torch.float64)
    shares = {
        measure: [AdaptiveClip(measure=measure).share(ratio, advantage, *pair) for pair in AdaptiveClip().path()]  # type: ignore[arg-type]
        for measure in ("gradient", "surrogate")
    }
    assert shares["gradient"] == sorted(shares["gradient"])
    assert shares["surrogate"][:37] == sorted(shares["surrogate"][:37])
    assert shares["surrogate"][36] > shares["surrogate"][-1]


def test_on_policy_the_search_runs_to_its_end_and_changes_nothing() -> None:
    low, high, share = found(AdaptiveClip(), logp=f64(OLD))
    close([low, high], [0.9, 3.0])
    assert share == found(AdaptiveClip(0.0), logp=f64(OLD))[2] < 0.4
    _, gradient = value_and_gradient(bapo, now(OLD), CARD)
    same(gradient, -f64(ADVANTAGE) / 10)


def test_the_search_sees_the_whole_batch_and_trainable_steps_alone() -> None:
    mask = torch.tensor([True] * 8 + [False] * 2)
    masked = CARD.with_columns(step={"mask": mask})
    p, q = (
        sum(np.exp(d) * abs(a) for d, a in zip(DELTA[:8], ADVANTAGE[:8], strict=True) if (a >= 0) == s)
        for s in (True, False)
    )
    same(found(AdaptiveClip(0.0, low=(0.1, 0.1, 1), high=(9, 9, 1)), masked)[2], p / (p + q))
    assert bapo.unit == "batch"
    assert len(CARD.split(bapo.unit, [1] * 4, 1)) == 1


def test_the_dual_clip_bounds_a_negative_step() -> None:
    far = MOVED.clone()
    far[3] += 3.0
    method = bapo | {"objective": CODE}
    _, gradient = value_and_gradient(method, now(far), CARD)
    assert gradient[3] == 0
    plain = bapo | {"objective": ClippedSurrogate(0.2, 1.0, dual=3.0)}
    same(value_and_gradient(method, now(far), CARD)[0], value_and_gradient(plain, now(far), CARD)[0])


@pytest.mark.parametrize("bad", [(0.9, 0.6, 0.02), (0.6, 0.9, 0.0)])
def test_a_range_that_does_not_rise_is_refused(bad: tuple[float, float, float]) -> None:
    with pytest.raises(UsageError, match="a bound rises from its start to its end"):
        AdaptiveClip(low=bad)


def test_the_recipe() -> None:
    assert bapo.objective == AdaptiveClip(0.4, (0.6, 0.9, 0.02), (1.2, 3.0, 0.05), "paper", "surrogate", None)
    assert (bapo.schedule.epochs, bapo.schedule.minibatches) == (2, 4)
    assert bapo.vanishes_with == "advantage"

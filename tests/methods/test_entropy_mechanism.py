"""The card of KL-Cov and Clip-Cov: covariance per step, what is selected, losses, worked examples."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from polopt.core.registry import find_part
from polopt.core.rollout import Rollout
from polopt.methods.base.dapo import DynamicSampling
from polopt.methods.trust_region.entropy_mechanism import ClipCov, KLCov, covariance, entropy_mechanism
from polopt.objectives import selection
from polopt.objectives.clipped_surrogate import ClippedSurrogate
from tests.support import close, f64, now, same, value_and_gradient, with_advantage, worked

DELTA = [0.3, -0.1, 0.05, 0.4, -0.5, 0.0, 0.6, -0.3, 0.1, -0.05]
OLD = [-0.5, -1.0, -0.2, -0.7, -1.5, -0.3, -2.0, -0.4, -0.9, -1.2]
ADVANTAGE = [1.0, 1, 1, -1, -1, 0.5, 0.5, -0.5, -0.5, -0.5]
MOVED = f64(OLD) + f64(DELTA)
CARD = with_advantage(worked(), ADVANTAGE)
PLAIN = [-0.134986, -0.090484, -0.105127, 0.149182, 0.060653, -0.05, -0.091106, 0.037041, 0.055259, 0.047561]
clip_cov = entropy_mechanism | {"objective": ClipCov()}


def slopes(part: Any, logp: Tensor = MOVED, rollout: Rollout = CARD) -> tuple[float, Tensor]:
    return value_and_gradient(entropy_mechanism | {"objective": part}, now(logp), rollout)


def selected(part: Any, logp: Tensor = MOVED, rollout: Rollout = CARD) -> list[int]:
    """Steps whose gradient is not that of the surrogate with the same bounds (ratios near 1 stay inside 0 and 2)."""
    _, gradient = slopes(part, logp, rollout)
    _, plain = slopes(ClippedSurrogate(1.0, 1.0), logp, rollout)
    return [int(t) for t in (gradient != plain).nonzero().flatten()]


def random_batch(steps: int, seed: int) -> tuple[Rollout, Tensor]:
    """One-step responses and the present log-probs."""
    generator = torch.Generator().manual_seed(seed)
    old = -0.1 - 2 * torch.rand(steps, generator=generator, dtype=torch.float64)
    rollout = Rollout.from_arrays(
        range(steps),
        [0] * steps,
        step={"logp": old, "advantage": torch.randn(steps, generator=generator, dtype=torch.float64)},
    )
    return rollout, old + 0.1 * torch.randn(steps, generator=generator, dtype=torch.float64)


def test_worked_example_of_the_covariance() -> None:
    cov = covariance(now(MOVED), CARD)
    close(cov, [0.589, -0.266, 0.6365, -0.546, 1.239, 0.234, -0.261, -0.066, -0.011, 0.2365])
    expected = 10 * float(np.cov(np.array(ADVANTAGE), MOVED.numpy(), bias=True)[0, 1])
    same(cov.sum(), expected)


def test_worked_example_of_kl_cov() -> None:
    loss, gradient = slopes(KLCov(share=0.2))
    close(loss, -0.0670062083, digits=10)
    close(gradient, [*PLAIN[:2], -0.005127, PLAIN[3], -0.039347, *PLAIN[5:]])


def test_worked_example_of_clip_cov(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = {0: 0, 2: 0, 4: 0}
    for winner in draws:
        monkeypatch.setattr(selection, "lottery", lambda _, winner=winner: -(torch.arange(10) == winner).long())
        loss, gradient = slopes(ClipCov(share=0.1, lower=0.3))
        expected = list(PLAIN)
        expected[winner] = 0.0
        close(gradient, expected)
        if winner == 2:
            close(loss, -0.0168790987, digits=10)
    # Steps outside the bounds are never drawn, even where they would win.
    monkeypatch.setattr(selection, "lottery", lambda rollout: -(torch.arange(10) == 5).long())
    assert selected(ClipCov(share=0.1, lower=0.3))[0] in draws


def entropy(logits: Tensor) -> float:
    logp = logits.log_softmax(0)
    return float(-(logp.exp() * logp).sum())


@pytest.mark.parametrize(("vanilla", "expected"), [(False, -0.3973255997), (True, -0.1325557918)])
def test_minus_the_covariance_is_the_change_of_entropy(vanilla: bool, expected: float) -> None:
    """Tokens in proportion to pi = (.5, .3, .2): the mean over steps is the expectation."""
    pi, a = f64([0.5, 0.3, 0.2]), f64([1.0, -0.5, -1.75])
    direction = pi * a if vanilla else a
    token = [0] * 5 + [1] * 3 + [2] * 2
    batch = Rollout.from_arrays(range(10), [0] * 10, step={"advantage": direction[token]})
    change = -covariance(now(pi.log()[token]), batch).mean()
    close(change, expected, digits=10)
    width = 1e-5
    ends = [entropy(pi.log() + sign * width * direction) for sign in (1, -1)]
    assert (ends[0] - ends[1]) / (2 * width) == pytest.approx(float(change), rel=1e-8)
    constant = batch.with_columns(step={"advantage": torch.full((10,), 0.7, dtype=torch.float64)})
    close(covariance(now(pi.log()[token]), constant), [0.0] * 10, digits=12)


def test_constants_do_not_matter_to_the_covariance() -> None:
    base = covariance(now(MOVED), CARD)
    same(covariance(now(MOVED), with_advantage(CARD, [a + 3 for a in ADVANTAGE])), base)
    same(covariance(now(MOVED - 2.5), CARD), base)


def test_masked_steps_are_in_no_mean_and_never_chosen() -> None:
    mask = torch.arange(10) != 4
    rollout = CARD.with_columns(step={"mask": mask})
    a, logp = f64(ADVANTAGE)[mask], MOVED[mask]
    cov = covariance(now(MOVED), rollout)
    same(cov[mask], (a - a.mean()) * (logp - logp.mean()))
    assert cov[4] == 0
    assert selected(KLCov(share=0.2), rollout=rollout) == [int(cov.argmax())], "floor(0.2 * 9) is one"


@pytest.mark.parametrize(("steps", "share", "count"), [(10, 2e-4, 1), (10, 0.05, 1), (10, 0.3, 3), (37, 0.1, 3)])
def test_how_many_are_chosen(steps: int, share: float, count: int) -> None:
    rollout, logp = random_batch(steps, steps)
    cov = covariance(now(logp), rollout)
    expected = sorted(cov.argsort(descending=True)[:count].tolist())
    assert selected(KLCov(share), logp, rollout) == expected
    assert len(selected(ClipCov(share=share, lower=-math.inf, upper=math.inf), logp, rollout)) == count


def test_the_selection_counts_the_steps_of_the_whole_batch() -> None:
    """A piece of a batch of 40 steps knows that it is one."""
    rollout, logp = random_batch(40, 3)
    piece = rollout.piece(torch.arange(10))
    assert len(selected(KLCov(0.1), logp[:10], piece)) == 4


def test_no_candidate_is_the_surrogate_with_the_same_bounds() -> None:
    loss, gradient = slopes(ClipCov(low=0.2, high=0.2, lower=2.0))
    expected_loss, expected = slopes(ClippedSurrogate(0.2, 0.2))
    same(loss, expected_loss)
    same(gradient, expected)
    assert len(selected(ClipCov(share=0.9, lower=0.3))) == 3, "all candidates, where they are fewer"


def test_what_the_clip_drops_is_no_candidate() -> None:
    """Step 0 (ratio 1.35) lies above 1.2, step 4 (0.61) below 0.8: both have lost their gradient already."""
    _, gradient = slopes(ClipCov(low=0.2, high=0.2, share=0.9, lower=0.3))
    assert [t for t in (0, 2, 4) if gradient[t] != 0] == []
    _, kept = slopes(ClipCov(low=0.2, high=0.2, share=0.1, lower=0.3))
    assert kept[2] == 0, "the only candidate left"
    # An advantage on the side that the clip does not touch stays a candidate.
    raised = MOVED.clone()
    raised[4] = OLD[4] + 0.3
    assert raised[4] > OLD[4] and covariance(now(raised), CARD)[4] > 0.3
    _, gradient = slopes(ClipCov(low=0.2, high=0.2, share=0.9, lower=0.3), raised)
    assert gradient[4] == 0


def test_without_penalty_it_is_the_unclipped_surrogate() -> None:
    logp = f64(OLD) + 5 * f64(DELTA)
    loss, gradient = slopes(KLCov(share=0.5, beta=0.0), logp)
    expected_loss, expected = slopes(ClippedSurrogate(math.inf, math.inf), logp)
    same(loss, expected_loss)
    same(gradient, expected)


def test_at_the_sampling_policy_the_penalty_has_no_gradient() -> None:
    _, gradient = slopes(KLCov(share=0.5, beta=7.0), f64(OLD))
    same(gradient, -f64(ADVANTAGE) / 10)


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_the_gradient_of_the_penalty_is_its_sign(beta: float) -> None:
    _, gradient = slopes(KLCov(share=1.0, beta=beta))
    gap = f64(DELTA)
    same(gradient, (-f64(ADVANTAGE) * gap.exp() + beta * gap.sign()) / 10)


def test_a_step_left_out_changes_no_other() -> None:
    _, gradient = slopes(ClipCov(share=0.1, lower=0.3))
    _, plain = slopes(ClippedSurrogate(1.0, 1.0))
    (silent,) = selected(ClipCov(share=0.1, lower=0.3))
    others = torch.arange(10) != silent
    assert torch.equal(gradient[others], plain[others]) and gradient[silent] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_precision(dtype: torch.dtype) -> None:
    rollout, logp = random_batch(20, 5)
    cast = rollout.with_columns(step={n: rollout[n].to(dtype) for n in ("logp", "advantage")})
    for part in (KLCov(0.1), ClipCov(share=0.1, lower=0.0)):
        loss, _ = (entropy_mechanism | {"objective": part}).loss(now(logp), cast)
        assert torch.isfinite(loss)


def test_the_recipe() -> None:
    assert entropy_mechanism.objective == KLCov(share=2e-3, beta=1.0)
    assert find_part("objective", "clip-cov") == ClipCov(1.0, 1.0, None, None, 2e-4, 1.0, 5.0)
    assert isinstance(entropy_mechanism.filter, DynamicSampling) and entropy_mechanism.schedule.minibatches == 8
    assert entropy_mechanism.unit == clip_cov.unit == "batch"
    assert entropy_mechanism.vanishes_with is None and clip_cov.vanishes_with == "advantage"

"""The card of rDPO: worked example, unbiasedness over flips, where it settles."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from polopt.core.errors import UsageError
from polopt.core.override import override
from polopt.core.rollout import Rollout
from polopt.methods.preference.dpo import DPO, dpo
from polopt.methods.preference.rdpo import RobustDPO, rdpo
from tests.methods.test_dpo import POLICY, card
from tests.support import close, f64, now, same, value_and_gradient


def ours(rollout: Rollout | None = None, logp: Any = POLICY, **fields: Any) -> tuple[float, Tensor]:
    method = rdpo | {"objective": RobustDPO(**fields)}
    return value_and_gradient(method, now(logp), card() if rollout is None else rollout)


def theirs(rollout: Rollout | None = None, **fields: Any) -> tuple[float, Tensor]:
    """DPO, conservative with a label_smoothing."""
    return value_and_gradient(dpo | {"objective": DPO(**fields)}, now(POLICY), card() if rollout is None else rollout)


def zeta(gradient: Tensor, beta: float) -> Tensor:
    """zeta = -dl/dh / beta of both pairs, from the gradient of a winner's step, which is -beta zeta / 2."""
    return -2 * gradient[[0, 5]] / beta


def by_hand(h: list[float], beta: float, eps: float) -> float:
    terms = [((1 - eps) * np.log1p(np.exp(-beta * x)) - eps * np.log1p(np.exp(beta * x))) / (1 - 2 * eps) for x in h]
    return float(np.mean(terms))


def test_worked_example() -> None:
    loss, gradient = ours(beta=1.0, flip=0.2)
    close(loss, 0.3904580211, digits=10)
    close(zeta(gradient, 1.0), [0.66514556, 0.80835415], digits=8)
    close(gradient[:5], [-0.33257278] * 3 + [0.33257278] * 2, digits=8)
    close(gradient[5:], [-0.40417707] * 2 + [0.40417707] * 4, digits=8)
    loss, gradient = theirs(beta=1.0, label_smoothing=0.2)
    close(loss, 0.6037913545, digits=10)
    close(zeta(gradient, 1.0), [0.13181223, 0.27502081], digits=8)


@pytest.mark.parametrize("beta", [0.1, 0.7, 3.0])
@pytest.mark.parametrize("eps", [0.05, 0.2, 0.45])
def test_loss_and_slope(beta: float, eps: float) -> None:
    loss, gradient = ours(beta=beta, flip=eps)
    same(loss, by_hand([0.7, 0.1], beta, eps))
    sigma = 1 / (1 + np.exp(beta * np.array([0.7, 0.1])))
    same(zeta(gradient, beta), sigma + eps / (1 - 2 * eps))
    # Against DPO and conservative DPO the slope differs by constants.
    plain, smooth = zeta(theirs(beta=beta)[1], beta), zeta(theirs(beta=beta, label_smoothing=eps)[1], beta)
    same(zeta(gradient, beta) - plain, [eps / (1 - 2 * eps)] * 2)
    same(smooth - plain, [-eps] * 2)


def test_without_noise_it_is_dpo() -> None:
    for beta in (0.1, 2.0):
        assert ours(beta=beta, flip=0.0)[0] == theirs(beta=beta)[0]
        assert torch.equal(ours(beta=beta, flip=0.0)[1], theirs(beta=beta)[1])


@pytest.mark.parametrize("eps", [0.1, 0.3])
def test_the_mean_over_all_flips_is_the_loss_of_the_true_labels(eps: float) -> None:
    """Two pairs have four patterns of reversed labels."""
    mean: dict[str, list[Tensor]] = {"robust": [], "smooth": []}
    for flips in itertools.product((False, True), repeat=2):
        chance = math.prod(eps if flip else 1 - eps for flip in flips)
        labels = [label for flip in flips for label in ((0.0, 1.0) if flip else (1.0, 0.0))]
        for name, (loss, gradient) in {
            "robust": ours(card(labels), beta=1.0, flip=eps),
            "smooth": theirs(card(labels), beta=1.0, label_smoothing=eps),
        }.items():
            mean[name].append(chance * torch.cat([f64([loss]), gradient]))
    loss, gradient = theirs(beta=1.0)
    clean = torch.cat([f64([loss]), gradient])
    same(torch.stack(mean["robust"]).sum(0), clean)
    assert float((torch.stack(mean["smooth"]).sum(0) - clean).abs().min()) > 1e-2


@pytest.mark.parametrize("p", [0.6, 0.85])
@pytest.mark.parametrize("eps", [0.1, 0.3])
def test_where_the_losses_settle(p: float, eps: float) -> None:
    """The population's gradient vanishes at the card's margins: the noisy label agrees with probability q."""
    q, beta = (1 - 2 * eps) * p + eps, 0.5
    smoothed = (1 - 2 * eps) * q + eps
    for objective, settled in (
        (RobustDPO(beta=beta, flip=eps), p),
        (DPO(beta=beta), q),
        (DPO(beta=beta, label_smoothing=eps), smoothed),
    ):
        margin = math.log(settled / (1 - settled)) / beta

        def slope(gap: float, objective: RobustDPO | DPO = objective) -> float:
            total = 0.0
            for label, chance in (([1.0, 0.0], q), ([0.0, 1.0], 1 - q)):
                rollout = Rollout.from_arrays(
                    [0, 1], [0, 0], step={"logp/ref": f64([-1.0, -1.0])}, trajectories={"label": f64(label)}
                )
                _, gradient = value_and_gradient(rdpo | {"objective": objective}, now([gap - 2.0, -2.0]), rollout)
                total += chance * float(gradient[0])
            return total

        assert slope(margin) == pytest.approx(0, abs=1e-12)
        assert slope(margin - 0.1) < -1e-4 and slope(margin + 0.1) > 1e-4


def test_the_loss_has_no_lower_bound_but_a_constant_slope() -> None:
    far = f64(POLICY)
    far[:3] += 1e4
    loss, gradient = ours(logp=far, beta=1.0, flip=0.3)
    assert loss == pytest.approx((by_hand([0.1], 1.0, 0.3) - 0.3 / 0.4 * (3e4 + 0.7)) / 2, rel=1e-6)
    same(gradient[:3], [-0.3 / 0.4 / 2] * 3)


@pytest.mark.parametrize("flip", [0.5, 0.7, -0.1, math.nan])
def test_a_rate_that_tells_nothing_is_refused(flip: float) -> None:
    with pytest.raises(UsageError, match="flip"):
        override(rdpo, {"objective.flip": flip})


def test_it_diverges_towards_one_half() -> None:
    slopes = [float(zeta(ours(flip=flip)[1], 0.1)[0]) for flip in (0.4, 0.49, 0.499)]
    assert slopes[0] > 2 and slopes[1] > 24 and slopes[2] > 249


def test_what_cannot_be_compared_adds_nothing() -> None:
    """A masked answer, one without a label, a group of one and a tie; groups without a pair count in the mean."""
    rollout = card((1, 0, 0.5, torch.nan), (0, 0, 0, 0))
    mask = torch.ones(11, dtype=torch.bool)
    mask[3:5] = False
    loss, gradient = ours(rollout.with_columns(step={"mask": mask}), beta=1.0, flip=0.2)
    same(loss, by_hand([0.3 - 0.1], 1.0, 0.2))
    assert bool((gradient[3:5] == 0).all()) and bool((gradient[7:] == 0).all())
    loss, gradient = ours(card((1, 0, 1, 1), (0, 0, 1, 1)), beta=1.0, flip=0.2)
    same(loss, by_hand([0.7], 1.0, 0.2) / 2)
    assert bool((gradient[5:] == 0).all())
    assert ours(card((1, 0, 1, 0), (0, 1, 2, 3)))[0] == 0.0


def test_divergences_shape_the_gap_as_in_dpo() -> None:
    for divergence in ("forward-kl", "js", "alpha"):
        robust, plain = (f(divergence=divergence, beta=0.7, **eps) for f, eps in ((ours, {"flip": 0.0}), (theirs, {})))
        assert robust[0] == plain[0] != ours(beta=0.7, flip=0.0)[0]

"""The card of Nash-MD: equilibrium, bounds of mirror descent, the exact gradient, packed worked examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from polopt.core.errors import UsageError
from polopt.core.override import override
from polopt.core.policy import Request
from polopt.core.rollout import Rollout, Source
from polopt.methods.preference.nash_md import NashMDPG, nash_md
from polopt.policies.exact.game import PreferenceGame
from polopt.tasks.problems import problem
from tests.support import close, f64, now, same, value_and_gradient

Floats = NDArray[np.float64]
TABLE = np.array([[0.5, 0.9, 0.2], [0.1, 0.5, 0.7], [0.8, 0.3, 0.5]])
MU = np.array([0.5, 0.3, 0.2])
TAU, ETA = 0.1, 0.3
# The arrays of DPO's card, as policy and reference.
IDS = [0, 0, 0, 1, 1, 2, 2, 3, 3, 3, 3]
POLICY = [-0.5, -1.0, -0.2, -0.8, -1.4, -0.3, -0.6, -1.1, -0.4, -0.9, -0.7]
REFERENCE = [-0.7, -0.9, -0.4, -0.6, -1.2, -0.5, -0.5, -1.0, -0.5, -1.0, -0.6]


def normalised(weights: Floats) -> Floats:
    return np.asarray(weights / weights.sum())


def mixture(p: Floats, b: float) -> Floats:
    return normalised(p ** (1 - b) * MU**b)


def nash_step(p: Floats, eta: float, tau: float = TAU) -> Floats:
    m = mixture(p, eta * tau)
    return normalised(m * np.exp(eta * TABLE @ m))


def kl(p: Floats, q: Floats) -> float:
    return float((p * np.log(p / q)).sum())


def nash() -> Floats:
    return np.asarray(PreferenceGame(f64(TABLE)[None]).regularised_nash(f64(MU)[None], TAU)[0])


def regularised(p: Floats, q: Floats) -> float:
    return float(p @ TABLE @ q) - TAU * kl(p, MU) + TAU * kl(q, MU)


def ascent(logits: Sequence[float], rival: Floats, tau: float = TAU) -> Floats:
    """Minus the expected gradient of the method's loss in the logits: each answer once, weighted by its chance."""
    z = f64(list(logits)).requires_grad_()
    chance = z.detach().softmax(-1)
    direction = np.zeros(len(logits))
    for answer in range(len(logits)):
        rollout = Rollout.from_arrays(
            [0],
            [0],
            step={"logp/ref": f64([math.log(MU[answer])])},
            trajectories={"win": f64([(TABLE @ rival)[answer]])},
        )
        evaluation = now([0.0])
        evaluation.columns["logp"] = z.log_softmax(-1)[[answer]]  # type: ignore[index]
        loss, _ = (nash_md | {"objective": NashMDPG(tau=tau)}).loss(evaluation, rollout)
        (gradient,) = torch.autograd.grad(loss, z)
        direction -= float(chance[answer]) * gradient.numpy()
    return direction


def packed(kl: str, win: Sequence[float] = (0.9, 0.3, 0.5, 0.6), mask: Any = None) -> tuple[float, Any]:
    step = {"logp/ref": f64(REFERENCE)} | ({} if mask is None else {"mask": mask})
    rollout = Rollout.from_arrays(IDS, [0, 0, 1, 1], step=step, trajectories={"win": f64(list(win))})
    method = override(nash_md, {"objective.kl": kl, "objective.tau": 0.2})
    return value_and_gradient(method, now(POLICY), rollout)


def test_packed_example_with_the_kl_of_the_sequence() -> None:
    value, gradient = packed("sequence")
    close(value, 0.1515, digits=10)
    close(gradient, [-0.085] * 3 + [0.03] * 2 + [0.005] * 2 + [-0.025] * 4, digits=10)


def test_packed_example_with_the_kl_of_each_step() -> None:
    value, gradient = packed("token")
    close(value, 0.16, digits=10)
    close(gradient[:3], [-0.09, -0.105, -0.09], digits=10)


def test_worked_step() -> None:
    p = np.array([0.2, 0.2, 0.6])
    close(mixture(p, ETA * TAU), [0.2079511, 0.20478859, 0.5872603], digits=7)
    close(nash_step(p, ETA), [0.20213156, 0.20688318, 0.59098525], digits=8)


def test_worked_gradient() -> None:
    logits = [0.3, -0.4, 0.2]
    rival = mixture(np.asarray(f64(logits).softmax(-1)), 0.125)
    close(ascent(logits, rival), [0.00219863, -0.01232289, 0.01012426], digits=8)


def test_the_equilibrium() -> None:
    star = nash()
    close(star, [0.35192521, 0.20624474, 0.44183005], digits=8)
    left = np.log(star / MU) - TABLE @ star / TAU
    same(left, [left[0]] * 3, rtol=1e-8)
    same(regularised(star, star), 0.5)
    rng = np.random.default_rng(0)
    for q in rng.dirichlet(np.ones(3), size=200):
        assert regularised(star, q) >= 0.5 - 1e-9
        same(regularised(q, q), 0.5)


@pytest.mark.parametrize("eta", [0.01, 0.3, 2.0, 10.0])
def test_each_step_of_mirror_descent_keeps_its_bound(eta: float) -> None:
    star = nash()
    for q in np.random.default_rng(1).dirichlet(np.ones(3), size=50):
        assert kl(star, nash_step(q, eta)) <= (1 - eta * TAU) * kl(star, q) + 2 * eta**2


def test_the_last_iterate_keeps_its_bound() -> None:
    star, p = nash(), MU
    for t in range(2000):
        assert kl(star, p) <= 8 / (TAU**2 * (t + 1))
        p = nash_step(p, 2 / (TAU * (t + 2)))
    assert kl(star, p) < 1e-3 < kl(star, MU)


@pytest.mark.parametrize("b", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_direction_is_the_gradient_against_a_frozen_opponent(b: float, seed: int) -> None:
    logits = np.random.default_rng(seed).normal(size=3)
    rival = mixture(np.asarray(f64(logits).softmax(-1)), b)
    z = f64(logits).requires_grad_()
    p = z.softmax(-1)
    value = p @ f64(TABLE) @ f64(rival) - TAU * (p * (p / f64(MU)).log()).sum()
    (expected,) = torch.autograd.grad(value, z)
    same(ascent(list(logits), rival), expected, atol=1e-14)


def test_self_play_rests_at_the_equilibrium_and_the_mixture_does_not() -> None:
    star = nash()
    logits = list(np.log(star))
    same(ascent(logits, mixture(star, 0.0)), [0, 0, 0], atol=1e-9)
    assert float(np.abs(ascent(logits, mixture(star, 0.25))).max()) > 1e-4


def test_one_step_answers_have_one_kl() -> None:
    results = []
    for kind in ("sequence", "token"):
        rollout = Rollout.from_arrays(
            range(4), [0] * 4, step={"logp/ref": f64(REFERENCE[:4])}, trajectories={"win": f64([0.9, 0.3, 0.5, 0.6])}
        )
        results.append(value_and_gradient(override(nash_md, {"objective.kl": kind}), now(POLICY[:4]), rollout))
    same(results[0][0], results[1][0])
    same(results[0][1], results[1][1])


@pytest.mark.parametrize("kind", ["sequence", "token"])
def test_masked_steps_and_invalid_answers_add_nothing(kind: str) -> None:
    mask = torch.ones(11, dtype=torch.bool)
    mask[[0, 3, 4]] = False
    value, gradient = packed(kind, (0.9, 0.3, math.nan, 0.6), mask)
    expected, slopes = 0.0, np.zeros(11)
    for i, win in ((0, 0.9), (3, 0.6)):
        steps = [t for t in range(11) if IDS[t] == i and mask[t]]
        total = sum(POLICY[t] - REFERENCE[t] for t in steps)
        for t in steps:
            k = total if kind == "sequence" else POLICY[t] - REFERENCE[t]
            slopes[t] = -(win - 0.5 - 0.2 * k) / 4
            expected += slopes[t] * POLICY[t]
    same(value, expected)
    same(gradient, slopes)


def test_opponents_come_from_the_mixture() -> None:
    made = problem("intransitive-preferences", batch=2, seed=1)
    policy = made.policy()
    with torch.no_grad():
        policy.logits.add_(torch.randn(policy.logits.shape, generator=torch.Generator().manual_seed(0)))
    rollout = nash_md.rollout(policy, [Request(e, 8) for e in made.examples()], limit=2, seed=0)
    rival = rollout.spread(rollout["opponent"])
    assert int(rollout["opponent"].sum()) == 8
    same(rollout["logp/sampled"][~rival], rollout.logp[~rival])
    payload: Any = rollout.payload
    at = (payload.step_problem, payload.nodes)
    mixed = (0.75 * policy.table().detach() + 0.25 * policy.model("ref"))[at].log_softmax(-1)
    drawn = mixed[torch.arange(rollout.n_steps), rollout["action"]]
    same(rollout["logp/sampled"][rival], drawn[rival])
    assert (rollout["source"][rollout["opponent"]] == Source.OPPONENT).all()
    assert (rollout["source"][~rollout["opponent"]] == Source.POLICY).all()
    assert "ref" in nash_md.models_in_use


def test_values_out_of_range() -> None:
    with pytest.raises(UsageError, match="tau"):
        NashMDPG(tau=-0.1)

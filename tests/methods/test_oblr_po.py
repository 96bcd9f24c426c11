"""The card of OBLR-PO: the baseline of least variance, the rate of the signal-to-noise ratio, worked examples."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from polopt.advantages.group import GroupCenter, LeaveOneOut
from polopt.core.rollout import Rollout
from polopt.methods.base.reinforce import reinforce
from polopt.methods.credit.oblr_po import ScoreWeighted, SignalToNoise, oblr_po
from polopt.policies.exact import ExactPolicy, SequenceSpace, enumeration
from tests.methods.enumeration import Floats, bandit_gradient, expected_gradient, softmax
from tests.support import close, f64, same

PI, REWARD = np.array([0.7, 0.2, 0.1]), np.array([1.0, 0.0, 0.5])
LOGITS = np.log(PI).tolist()
SQUARE = ((np.eye(3) - PI) ** 2).sum(1)
BEST = 0.358696


def bandit(actions: Sequence[int], groups: Sequence[int] | None = None, pi: Floats = PI, **trajectory: Any) -> Rollout:
    """One-step responses of a softmax bandit with both kinds of score norms."""
    chosen = list(actions)
    step = {"logp": f64(np.log(pi[chosen])), "collision": f64([float((pi**2).sum())] * len(chosen))}
    columns = {"reward": f64(REWARD[chosen]), "score_norm": f64(((np.eye(len(pi)) - pi) ** 2).sum(1)[chosen])}
    return Rollout.from_arrays(
        range(len(chosen)), list(groups or [0] * len(chosen)), step=step, trajectories=columns | trajectory
    )


def baseline(rollout: Rollout, **options: Any) -> torch.Tensor:
    return rollout.reward - ScoreWeighted(**options)(rollout)


def variance(b: float) -> float:
    """V(b) = E|phi|^2 (r - b)^2 - |E r phi|^2."""
    mean = (PI * REWARD) @ (np.eye(3) - PI)
    return float(PI @ (SQUARE * (REWARD - b) ** 2) - mean @ mean)


# --- the baseline -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norms", ["logits", "exact"])
def test_worked_example_of_the_baseline(norms: str) -> None:
    rollout = bandit((0, 0, 1, 2))
    close(ScoreWeighted("logits").weights(rollout), [0.14, 0.14, 1.14, 1.34])
    close(baseline(rollout, norms=norms, others=False), [0.344203] * 4)
    close(baseline(rollout, norms=norms), [0.309160, 0.309160, 0.586420, 0.197183])
    advantage = ScoreWeighted(norms)(rollout).numpy()  # type: ignore[arg-type]
    close(advantage @ (np.eye(3) - PI)[[0, 0, 1, 2]] / 4, [0.153256, -0.201509, 0.048252])


def test_actions_in_their_proportions_give_the_baseline_of_least_variance() -> None:
    found = baseline(bandit([0] * 7 + [1] * 2 + [2]), others=False)
    close(found, [BEST] * 10)
    b = float(found[0])
    close([variance(b), variance(0.75), variance(0.0)], [0.018565, 0.089000, 0.077750])
    for other in np.linspace(-1, 2, 13):
        same(variance(other) - variance(b), float(PI @ SQUARE) * (other - b) ** 2)


def expectation(advantage: ScoreWeighted, logits: Sequence[float], size: int) -> Floats:
    """Expected ascent direction over every group of that size."""
    norm = ((np.eye(3) - softmax(logits)) ** 2).sum(1)
    method = reinforce | {"advantage": advantage, "reward": None}
    return -expected_gradient(method, logits, REWARD.tolist(), size, lambda a: {"score_norm": norm[list(a)].tolist()})


@pytest.mark.parametrize("size", [2, 3, 4])
def test_leaving_one_out_is_unbiased_and_the_group_form_is_not(size: int) -> None:
    exact = bandit_gradient(LOGITS, REWARD.tolist())
    same(expectation(ScoreWeighted("exact"), LOGITS, size), exact)
    assert np.abs(expectation(ScoreWeighted("exact", others=False), LOGITS, size) - exact).max() > 1e-3


def test_equal_norms_give_the_mean_of_the_others() -> None:
    uniform = np.full(3, 1 / 3)
    rollout = bandit((0, 1, 1, 2, 0), pi=uniform)
    for norms in ("logits", "exact", "length"):
        same(ScoreWeighted(norms)(rollout), LeaveOneOut()(rollout))  # type: ignore[arg-type]
        same(ScoreWeighted(norms, others=False)(rollout), GroupCenter()(rollout))  # type: ignore[arg-type]


@pytest.mark.parametrize("others", [True, False])
def test_adding_a_constant_to_rewards_changes_no_advantage(others: bool) -> None:
    rollout = bandit((0, 0, 1, 2, 1, 0), (0, 0, 0, 0, 1, 1))
    moved = rollout.with_columns(trajectory={"reward": rollout.reward + 3.7})
    part = ScoreWeighted(others=others)
    same(part(moved), part(rollout))
    same(baseline(moved, others=others), baseline(rollout, others=others) + 3.7)


@pytest.mark.parametrize("others", [True, False])
def test_against_a_loop(others: bool) -> None:
    generator = np.random.default_rng(0)
    groups = [1, 0, 1, 2, 0, 1, 0, 1, 3, 3]
    reward, norm = generator.normal(size=10), generator.exponential(size=10)
    reward[[4, 9]] = np.nan
    norm[[0, 2]] = 1e-9  # a weight that a difference of sums would lose
    norm[5] = 1e9
    expected = np.zeros(10)
    for i in range(10):
        mine = [j for j in range(10) if groups[j] == groups[i] and not np.isnan(reward[j]) and (j != i or not others)]
        if mine and not np.isnan(reward[i]):
            expected[i] = reward[i] - sum(norm[j] * reward[j] for j in mine) / sum(norm[j] for j in mine)
    rollout = bandit([0] * 10, groups, score_norm=f64(norm), reward=f64(reward))
    same(ScoreWeighted("exact", others=others)(rollout), expected)
    assert np.count_nonzero(expected) == 6


def test_weights_that_vanish_give_the_plain_mean() -> None:
    rollout = bandit((0, 1, 2), score_norm=f64([0.0, 0.0, 0.0]))
    same(ScoreWeighted("exact")(rollout), LeaveOneOut()(rollout))
    lone = bandit((0, 1, 2), score_norm=f64([0.0, 0.0, 2.0]))
    same(baseline(lone, norms="exact"), [0.5, 0.5, (1.0 + 0.0) / 2])


@pytest.mark.parametrize("others", [True, False])
def test_nothing_to_compare_gives_exactly_zero(others: bool) -> None:
    equal = bandit((0, 0, 0, 1), (0, 0, 0, 1), reward=f64([0.1, 0.1, 0.1, 0.9]))
    assert (ScoreWeighted(others=others)(equal) == 0).all()
    lonely = bandit((0, 1, 2), reward=f64([1.0, np.nan, np.nan]))
    assert (ScoreWeighted(others=others)(lonely) == 0).all()


def test_the_length_weighs_steps_that_train() -> None:
    mask = torch.tensor([True, True, False, True, True, True, True])
    rollout = Rollout.from_arrays(
        [0, 0, 0, 1, 2, 2, 2], [0, 0, 0], step={"mask": mask}, trajectories={"reward": f64([1.0, 0.0, 0.5])}
    )
    same(baseline(rollout, norms="length"), [1.5 / 4, 3.5 / 5, 2 / 3])


def test_the_logits_give_the_norm_where_every_prefix_has_its_own() -> None:
    space = SequenceSpace(3, 3, end=True)
    start = torch.randn(1, space.n_nodes, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    policy = ExactPolicy(space, 1, start)
    every = torch.arange(space.n_sequences)
    rollout = policy.rollout(torch.zeros_like(every), every, torch.zeros_like(every))
    with torch.no_grad():
        collision = policy.evaluate(rollout, frozenset({"collision"}))["collision"]
    found = ScoreWeighted("logits").weights(rollout.with_columns(step={"collision": collision}))
    same(found, enumeration.scores(policy)[0].square().sum((-1, -2)))


def test_what_it_needs() -> None:
    assert ScoreWeighted("logits").needs == {"reward", "logp", "collision"}
    assert ScoreWeighted("exact").needs == {"reward", "score_norm"}
    assert ScoreWeighted("length").needs == {"reward"}


# --- the rate ---------------------------------------------------------------------------------------------------------


@dataclass
class Chunks:
    """A step whose chunks have given gradients; it notes the scale of each step that is taken."""

    gradients: Sequence[Sequence[float]]
    finite: bool = True
    parameters: Sequence[Parameter] = field(default_factory=lambda: [Parameter(torch.zeros(2, dtype=torch.float64))])
    chunk_square_norms: Sequence[float] = ()
    scales: list[float] = field(default_factory=list)
    rejected: list[str] = field(default_factory=list)
    # Not asked for here.
    batch: Any = None
    preview: Any = None

    def gradient(self, chunks: int = 1) -> dict[str, float]:
        rows = np.array(self.gradients, dtype=np.float64)
        self.parameters[0].grad = f64(rows.mean(0))
        self.chunk_square_norms = (rows**2).sum(1).tolist() if len(rows) > 1 else []
        return {"loss": 1.0}

    def apply(self, scale: float = 1.0) -> None:
        self.scales.append(scale)

    def reject(self, reason: str) -> None:
        self.rejected.append(reason)


def share(gradients: Sequence[Sequence[float]], **options: Any) -> float:
    step = Chunks(gradients)
    metrics = SignalToNoise(**options)(step)
    assert [metrics["update/rate_share"]] == step.scales
    return step.scales[0]


WORKED = [(1.0, 0.0), (0.5, 0.5), (1.5, -0.5)]


def test_worked_example_of_the_rate() -> None:
    found = share(WORKED)
    close(found, 0.833333)
    close(found / (1 - found), 5.0)


def test_the_rate_at_no_noise_at_equal_noise_and_under_scaling() -> None:
    assert share([(0.3, -0.2)] * 4) == pytest.approx(1.0, abs=1e-12)
    # |g|^2 = 1, V = 1/2: the signal that is left equals the noise.
    assert share([(2.0, 0.0), (0.0, 0.0)]) == pytest.approx(0.01 / 1.01)
    assert share([(1 + 0.5**0.5, 0.0), (1 - 0.5**0.5, 0.0)]) == pytest.approx(0.5)
    for c in (1e-3, 40.0):
        assert share((c * np.array(WORKED)).tolist()) == pytest.approx(share(WORKED), rel=1e-9)


@pytest.mark.parametrize("signal", [0.1, 1.0, 7.0])
def test_the_rate_maximises_the_bound(signal: float) -> None:
    noise, smoothness = 0.5, 4.0
    rates = np.linspace(0, 1 / smoothness, 100_001)
    bound = rates * signal - smoothness * rates**2 / 2 * (signal + noise)
    # Two chunks with |g|^2 = signal + noise and V = noise have that signal and noise.
    g, d = (signal + noise) ** 0.5, noise**0.5
    assert share([(g + d, 0.0), (g - d, 0.0)]) == pytest.approx(smoothness * rates[bound.argmax()], abs=2e-5)


def test_noise_alone_leaves_the_floor() -> None:
    opposed = [(1.0, 0.1), (-1.0, 0.1)]
    assert share(opposed) == pytest.approx(0.01 * 0.01 / (0.01 * 0.01 + 1.0))
    assert share(opposed, floor=0.0) == 0.0


def test_signal_and_noise_are_averaged_over_updates() -> None:
    part = SignalToNoise(decay=0.5)
    batches = [WORKED, [(2.0, 0.0), (0.0, 2.0), (1.0, 1.0)], [(0.1, 0.0), (0.3, 0.0)]]
    square = noise = 0.0
    for rows in batches:
        step = Chunks(rows)
        part(step)
        mean = np.mean(rows, axis=0)
        m = len(rows)
        square = 0.5 * square + 0.5 * float(mean @ mean)
        noise = 0.5 * noise + 0.5 * float(((np.array(rows) - mean) ** 2).sum() / (m * (m - 1)))
        assert step.scales == [pytest.approx((square - noise) / square)]


def test_the_average_is_state() -> None:
    part = SignalToNoise()
    part(Chunks(WORKED))
    other = SignalToNoise()
    other.load_state_dict(copy.deepcopy(part.state_dict()))
    first, second = Chunks([(2.0, 0.0), (0.0, 2.0)]), Chunks([(2.0, 0.0), (0.0, 2.0)])
    part(first)
    other(second)
    fresh = share([(2.0, 0.0), (0.0, 2.0)])
    assert first.scales == second.scales != [fresh]


def test_without_an_estimate_the_last_one_holds() -> None:
    part = SignalToNoise()
    single = Chunks([(1.0, 2.0)])
    part(single)
    assert single.scales == [1.0]
    part(Chunks(WORKED))
    before = part.state_dict()
    part(single)
    assert single.scales[1] == pytest.approx(5 / 6) and part.state_dict() == before


def test_what_is_not_finite_changes_nothing() -> None:
    part = SignalToNoise()
    part(Chunks(WORKED))
    before = part.state_dict()
    broken, given_up = Chunks([(1.0, np.inf), (0.0, 1.0)]), Chunks(WORKED, finite=False)
    part(broken)
    part(given_up)
    assert part.state_dict() == before
    assert not broken.scales and len(broken.rejected) == 1 and not given_up.scales


def test_the_estimate_comes_before_the_clip() -> None:
    step = Chunks((100 * np.array(WORKED)).tolist())
    metrics = SignalToNoise(max_norm=1.0)(step)
    assert step.scales == [pytest.approx(5 / 6)]
    assert metrics["grad_norm"] == pytest.approx(100.0)
    assert float(step.parameters[0].grad.norm()) == pytest.approx(1.0, rel=1e-4)  # type: ignore[union-attr]


def test_what_the_method_is() -> None:
    assert oblr_po.advantage.others and oblr_po.advantage.norms == "logits"
    assert oblr_po.update.chunks == 8
    assert oblr_po.reward is None and oblr_po.vanishes_with == "advantage"

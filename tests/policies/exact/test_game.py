"""Equilibria against their definitions, and against another algorithm."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from polopt.core.errors import UsageError
from polopt.policies.exact import PreferenceGame, kl


def random_game(size: int, seed: int, problems: int = 2) -> PreferenceGame:
    generator = torch.Generator().manual_seed(seed)
    return PreferenceGame.antisymmetric(torch.rand(problems, size, size, generator=generator, dtype=torch.float64) / 2)


def random_strategy(size: int, seed: int, problems: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(problems, size, generator=generator, dtype=torch.float64).softmax(-1)


def mirror_descent(game: PreferenceGame, reference: Tensor, tau: float, steps: int) -> Tensor:
    """Magnetic mirror descent: log p <- (log p + eta tau log reference + eta P p) / (1 + eta tau), then normalised."""
    logp, eta = reference.log(), tau
    for _ in range(steps):
        payoff = torch.einsum("bij,bj->bi", game.preference, logp.exp())
        logp = ((logp + eta * tau * reference.log() + eta * payoff) / (1 + eta * tau)).log_softmax(-1)
    return logp.exp()


def test_win_rates_by_hand() -> None:
    game = PreferenceGame.cyclic(3)
    assert game.preference[0].tolist() == [[0.5, 0.0, 1.0], [1.0, 0.5, 0.0], [0.0, 1.0, 0.5]]
    p = torch.tensor([[0.2, 0.3, 0.5]], dtype=torch.float64)
    q = torch.tensor([[0.6, 0.4, 0.0]], dtype=torch.float64)
    expected = sum(float(p[0, i] * q[0, j]) * game.preference[0, i, j].item() for i in range(3) for j in range(3))
    assert float(game.win_rate(p, q)) == pytest.approx(expected)
    assert float(game.win_rate(p, q) + game.win_rate(q, p)) == pytest.approx(1.0)
    assert game.best_response(q).tolist() == [[0.0, 1.0, 0.0]]
    # Paper wins at most 0.8 against q, scissors at most 0.35 + ... against p: max(P q) + max(P p) - 1.
    assert float(game.duality_gap(p, q)) == pytest.approx(
        max((game.preference[0] @ q[0]).tolist()) + max((game.preference[0] @ p[0]).tolist()) - 1
    )


def test_circles_by_hand() -> None:
    def wins(game: PreferenceGame) -> list[list[int]]:
        return [[j for j, p in enumerate(row) if p > 0.5] for row in game.preference[0].tolist()]

    assert wins(PreferenceGame.cyclic(5)) == [[3, 4], [0, 4], [0, 1], [1, 2], [2, 3]]
    even = PreferenceGame.cyclic(4, strength=0.5)
    assert wins(even) == [[3], [0], [1], [2]]
    assert even.preference[0, 0].tolist() == [0.5, 0.25, 0.5, 0.75]


@pytest.mark.parametrize("size", [3, 5, 7])
def test_the_equilibrium_of_an_odd_circle_is_uniform(size: int) -> None:
    game = PreferenceGame.cyclic(size, problems=2, strength=0.8)
    torch.testing.assert_close(game.nash(), torch.full((2, size), 1 / size, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [4, 9, 27])
def test_nobody_beats_an_equilibrium(size: int) -> None:
    game = random_game(size, seed=size)
    p = game.nash()
    assert float(game.duality_gap(p).abs().max()) < 1e-10
    for seed in range(20):
        assert (game.win_rate(p, random_strategy(size, seed)) >= 0.5 - 1e-10).all()
    assert float(game.duality_gap(random_strategy(size, 1)).min()) > 1e-3


def test_a_transitive_preference_is_won_by_the_best() -> None:
    reward = torch.tensor([[0.0, 2.0, 1.0], [3.0, -1.0, 0.0]], dtype=torch.float64)
    game = PreferenceGame.bradley_terry(reward, scale=2.0)
    assert game.preference[0, 1, 2].item() == pytest.approx(1 / (1 + 2.718281828459045**-2))
    assert game.nash().argmax(-1).tolist() == [1, 0]
    torch.testing.assert_close(game.nash().amax(-1), torch.ones(2, dtype=torch.float64))
    noisy = game.noisy(0.1).preference
    torch.testing.assert_close(noisy, 0.9 * game.preference + 0.1 * (1 - game.preference))


@pytest.mark.parametrize("tau", [10.0, 1.0, 0.1, 0.01, 0.001])
@pytest.mark.parametrize("size", [3, 9])
def test_the_regularised_equilibrium_is_the_fixed_point(size: int, tau: float) -> None:
    game, reference = random_game(size, seed=5), random_strategy(size, seed=6)
    p = game.regularised_nash(reference, tau)
    best = (reference.log() + torch.einsum("bij,bj->bi", game.preference, p) / tau).softmax(-1)
    torch.testing.assert_close(p, best, rtol=0, atol=1e-10)
    assert float(game.regularised_gap(p, reference, tau).abs().max()) < 1e-12
    # No strategy wins more against it, its divergence charged.
    own = 0.5 - tau * kl(p, reference)
    for seed in range(20):
        rival = random_strategy(size, seed)
        assert (game.win_rate(rival, p) - tau * kl(rival, reference) <= own + 1e-12).all()
        assert (game.regularised_gap(rival, reference, tau) > 1e-6).all()


@pytest.mark.parametrize("tau", [1.0, 0.1])
def test_mirror_descent_finds_the_same_equilibrium(tau: float) -> None:
    game, reference = random_game(6, seed=8), random_strategy(6, seed=9)
    found = mirror_descent(game, reference, tau, steps=int(40 / tau**2) + 100)
    torch.testing.assert_close(game.regularised_nash(reference, tau), found, rtol=0, atol=1e-10)


def test_regularisation_goes_from_the_reference_to_the_equilibrium() -> None:
    game, reference = PreferenceGame.cyclic(3), torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64)
    torch.testing.assert_close(game.regularised_nash(reference, 1e6), reference, rtol=0, atol=1e-5)
    third = torch.full((1, 3), 1 / 3, dtype=torch.float64)
    torch.testing.assert_close(game.regularised_nash(reference, 1e-5), third, rtol=0, atol=1e-3)
    assert float(game.duality_gap(game.regularised_nash(reference, 0.1))) > 0.01


def test_misuse() -> None:
    with pytest.raises(UsageError, match=r"got \(2, 3\)"):
        PreferenceGame(torch.zeros(2, 3))
    with pytest.raises(UsageError, match="outside"):
        PreferenceGame(torch.tensor([[[0.5, 1.2], [-0.2, 0.5]]]))
    with pytest.raises(UsageError, match=r"P\[0, 0, 1\] \+ P\[0, 1, 0\] = 1\.3"):
        PreferenceGame(torch.tensor([[[0.5, 0.9], [0.4, 0.5]]], dtype=torch.float64))
    with pytest.raises(UsageError, match="at least 3"):
        PreferenceGame.cyclic(2)
    with pytest.raises(UsageError, match="reversal"):
        PreferenceGame.cyclic(3).noisy(1.5)
    uniform = torch.full((1, 3), 1 / 3, dtype=torch.float64)
    with pytest.raises(UsageError, match="tau must be a positive number"):
        PreferenceGame.cyclic(3).regularised_nash(uniform, -1.0)
    with pytest.raises(UsageError, match="full support"):
        PreferenceGame.cyclic(3).regularised_nash(torch.tensor([[0.5, 0.5, 0.0]]), 1.0)
    with pytest.raises(UsageError, match=r"shape \(2, 3\)"):
        PreferenceGame.cyclic(3).regularised_nash(uniform.expand(2, 3), 1.0)

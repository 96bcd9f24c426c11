"""Mixtures of reward models: which users share a taste, and the rewards of each taste, by expectation-maximisation.

Users h have compared pairs, D_h = {(x, winner, loser)}; model k gives margins m_k = r_k(x, winner) - r_k(x, loser), and
ll(h, k) = sum over D_h of log sigma(m_k). The E step says which models speak for a user, the M step fits each model to
the comparisons of its users (Chakraborty et al. 2024, arXiv:2402.08925, algorithm 2; EM: Dempster et al. 1977).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from polopt.core.errors import UsageError
from polopt.core.segments import segment_sum

Margins = Callable[[], Float[Tensor, "pair model"]]
"""The margins of all pairs under the present models."""
Fit = Callable[[int, Float[Tensor, " pair"]], None]
"""Fit one model to the pairs with these weights: minimise the weighted mean of -log sigma(margin)."""


@dataclass(frozen=True, eq=False)
class Mixture:
    """What EM found. ``log_likelihood`` has one entry per round, after its E step."""

    responsibility: Float[Tensor, "user model"]
    shares: Float[Tensor, " model"]
    log_likelihood: tuple[float, ...] = field(default=())

    @property
    def assignment(self) -> Int[Tensor, " user"]:
        """The model of each user: the likeliest one."""
        return self.responsibility.argmax(1)


def user_log_likelihood(
    margins: Float[Tensor, "pair model"], user: Int[Tensor, " pair"], users: int
) -> Float[Tensor, "user model"]:
    """ll(h, k); 0 for a user without comparisons. A constant added to a model changes nothing, a factor does."""
    return torch.stack([segment_sum(F.logsigmoid(m), user, users) for m in margins.unbind(1)], 1)


def expectation(
    log_likelihood: Float[Tensor, "user model"], shares: Float[Tensor, " model"], *, hard: bool
) -> tuple[Float[Tensor, "user model"], float]:
    """The E step and the log-likelihood that it belongs to.

    ``hard``: each user goes to argmax_k ll(h, k), the first of equals; sum_h max_k ll(h, k). Else q(h, k) is
    proportional to shares_k exp(ll(h, k)); sum_h log sum_k shares_k exp(ll(h, k)).
    """
    if hard:
        best = log_likelihood.argmax(1)
        return F.one_hot(best, log_likelihood.shape[1]).to(log_likelihood), float(log_likelihood.amax(1).sum())
    joint = log_likelihood + shares.log()
    return joint.softmax(1), float(joint.logsumexp(1).sum())


def expectation_maximisation(
    margins: Margins,
    fit: Fit,
    user: Int[Tensor, " pair"],
    models: int,
    *,
    rounds: int = 10,
    hard: bool = True,
    restart: bool = True,
) -> Mixture:
    """``rounds`` times an M step and an E step; users start round robin, number mod K.

    ``user`` [P] numbers the user of each pair from 0. The M step calls ``fit`` once per model; soft EM also sets the
    shares of the models to the mean responsibilities. With an exact M step the log-likelihood never falls. A model that
    has lost all its users is, with ``restart``, given the K-th part of them whose comparisons their own models explain
    worst; that round may fall. Raises UsageError for fewer than one model or round, and for fewer users than models.
    """
    users = int(user.max()) + 1 if user.numel() else 0
    if models < 1 or rounds < 1:
        raise UsageError(f"a mixture needs at least one model and one round, got {models} and {rounds}")
    if users < models:
        raise UsageError(f"a mixture of {models} reward models needs as many users, got {users}")
    responsibility = F.one_hot(torch.arange(users, device=user.device) % models, models).float()
    shares = torch.full((models,), 1 / models, device=user.device)
    trace: list[float] = []
    for _ in range(rounds):
        for model in range(models):
            fit(model, responsibility[user, model])
        if not hard:
            shares = responsibility.mean(0)
        likelihood = user_log_likelihood(margins(), user, users)
        responsibility, total = expectation(likelihood, shares.to(likelihood), hard=hard)
        trace.append(total)
        if hard and restart:
            responsibility = _revived(responsibility, likelihood, user)
    return Mixture(responsibility, responsibility.mean(0), tuple(trace))


def _revived(responsibility: Tensor, likelihood: Tensor, user: Tensor) -> Tensor:
    """Every model with users, where that can be."""
    users, models = responsibility.shape
    for model in (responsibility.sum(0) == 0).nonzero().flatten().tolist():
        each = torch.bincount(user, minlength=users).clamp_min(1)
        worst = (likelihood.amax(1) / each).argsort(stable=True)[: max(1, users // models)]
        responsibility = responsibility.clone()
        responsibility[worst] = F.one_hot(torch.tensor(model), models).to(responsibility)
    return responsibility


def numbered(names: Sequence[Hashable]) -> tuple[Int[Tensor, " pair"], list[Hashable]]:
    """Users as numbers 0, 1, ... in order of appearance, and who each number is."""
    order = {name: place for place, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([order[name] for name in names], dtype=torch.int64), list(order)


# --- an exact M step ------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class LinearRewards:
    """K rewards that are linear in features, r_k(y) = theta_k . phi(y): a table where phi(y) is one-hot.

    ``difference`` [P, D] is phi(winner) - phi(loser) of every pair. `fit` minimises
    sum_p w_p -log sigma(theta . d_p) + ridge / 2 ||theta||^2 by Newton's method, which a ``ridge`` above 0 makes
    strictly convex: what pairs never compare stays at 0.
    """

    difference: Float[Tensor, "pair feature"]
    models: int
    ridge: float = 1e-3
    theta: Float[Tensor, "model feature"] = field(init=False)

    def __post_init__(self) -> None:
        if not self.ridge > 0:
            raise UsageError(f"linear rewards need a ridge above 0, got {self.ridge}")
        self.difference = self.difference.double()
        self.theta = self.difference.new_zeros(self.models, self.difference.shape[1])

    def margins(self) -> Float[Tensor, "pair model"]:
        """theta_k . d_p."""
        return self.difference @ self.theta.T

    def fit(self, model: int, weight: Float[Tensor, " pair"]) -> None:
        """The exact M step of one model, to a gradient of 1e-9."""
        d, w, theta = self.difference, weight.double(), self.theta[model].clone()
        eye = torch.eye(d.shape[1], dtype=d.dtype, device=d.device)
        for _ in range(100):
            margin = d @ theta
            slope = self.ridge * theta - (w * torch.sigmoid(-margin)) @ d
            if float(slope.abs().max()) < 1e-9:
                break
            curve = (w * torch.sigmoid(margin) * torch.sigmoid(-margin))[:, None] * d
            step = torch.linalg.solve(d.T @ curve + self.ridge * eye, slope)
            size, before = 1.0, self._loss(theta, w)
            while self._loss(theta - size * step, w) > before - 1e-4 * size * float(slope @ step) and size > 1e-8:
                size /= 2
            theta = theta - size * step
        self.theta[model] = theta

    def _loss(self, theta: Tensor, w: Tensor) -> float:
        return float(-(w * F.logsigmoid(self.difference @ theta)).sum() + self.ridge / 2 * theta.square().sum())

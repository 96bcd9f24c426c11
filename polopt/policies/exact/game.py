"""Two players each write a sequence, a preference says who wins: exact win rates and equilibria.

A strategy is a distribution over the S sequences, probabilities [B, S]. Preferences may be intransitive.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from polopt.core.errors import UsageError
from polopt.policies.exact.divergences import check_positive, kl

_STEPS = 200
_HALVINGS = 60


@dataclass(frozen=True, eq=False)
class PreferenceGame:
    """The symmetric game in which i beats j with probability ``preference[b, i, j]``, P_ij + P_ji = 1; [B, S, S].

    Raises UsageError for a preference that is not square, leaves [0, 1], or does not add up to 1 with its transpose.
    """

    preference: Float[Tensor, "problem sequence rival"]

    def __post_init__(self) -> None:
        p = self.preference
        if p.ndim != 3 or p.shape[1] != p.shape[2]:
            raise UsageError(f"a preference has shape [problems, S, S], got {tuple(p.shape)}")
        if not bool(((p >= 0) & (p <= 1)).all()):
            raise UsageError("preferences are probabilities, but some lie outside [0, 1]")
        if float((p + p.mT - 1).abs().max()) > 1e-9 + 4 * torch.finfo(p.dtype).eps:
            b, i, j = _worst(p)
            raise UsageError(
                f"preferences of both orders must add up to 1, but P[{b}, {i}, {j}] + P[{b}, {j}, {i}] = "
                f"{float(p[b, i, j] + p[b, j, i]):.6g}"
            )

    # --- constructors -------------------------------------------------------------------------------------------

    @classmethod
    def antisymmetric(cls, margin: Float[Tensor, "problem sequence rival"]) -> Self:
        """P = 1/2 + (A - A^T) / 2 for margins A whose antisymmetric part lies in [-1/2, 1/2]."""
        return cls(0.5 + (margin - margin.mT) / 2)

    @classmethod
    def bradley_terry(cls, reward: Float[Tensor, "problem sequence"], scale: float = 1.0) -> Self:
        """P_ij = sigmoid(scale (r_i - r_j)): transitive (Bradley and Terry 1952)."""
        gap = (reward[:, :, None] - reward[:, None, :]) * scale
        # sigmoid(x) + sigmoid(-x) is 1 up to a rounding, the antisymmetric form exactly.
        return cls.antisymmetric(torch.tanh(gap / 2) / 2)

    @classmethod
    def cyclic(cls, size: int, problems: int = 1, strength: float = 1.0) -> Self:
        """Every strategy beats the ``(size - 1) // 2`` before it in a circle with probability (1 + strength) / 2.

        ``size`` 3 is rock-paper-scissors (1 beats 0, 2 beats 1, 0 beats 2); opposite ones of an even circle tie. The
        uniform distribution is an equilibrium. Raises UsageError for fewer than 3 or a strength outside [0, 1].
        """
        if size < 3:
            raise UsageError(f"a cycle of preferences needs at least 3 sequences, got {size}")
        if not 0 <= strength <= 1:
            raise UsageError(f"the strength of a preference lies in [0, 1], got {strength}")
        ahead = (torch.arange(size)[:, None] - torch.arange(size)[None]) % size
        beats = (ahead >= 1) & (ahead <= (size - 1) // 2)
        margin = beats.double() * strength
        return cls.antisymmetric(margin.expand(problems, size, size))

    def noisy(self, flip: float) -> Self:
        """The game whose outcome is reversed with probability ``flip``: P' = (1 - flip) P + flip (1 - P).

        Raises UsageError for a probability outside [0, 1].
        """
        if not 0 <= flip <= 1:
            raise UsageError(f"a probability of reversal lies in [0, 1], got {flip}")
        return type(self)(0.5 + (1 - 2 * flip) * (self.preference - 0.5))

    # --- values -------------------------------------------------------------------------------------------------

    def payoff(self, rival: Float[Tensor, "problem sequence"]) -> Float[Tensor, "problem sequence"]:
        """Probability that each sequence beats one drawn from ``rival``, (P q)_y, [B, S]."""
        return (self.preference.to(rival.dtype) @ rival[..., None])[..., 0]

    def win_rate(
        self, p: Float[Tensor, "problem sequence"], q: Float[Tensor, "problem sequence"]
    ) -> Float[Tensor, " problem"]:
        """P(p beats q) = p . P q; 1/2 for p = q."""
        return (p * self.payoff(q)).sum(-1)

    def best_response(self, rival: Float[Tensor, "problem sequence"]) -> Float[Tensor, "problem sequence"]:
        """All mass on a sequence that beats ``rival`` most often (the first of equals), [B, S]."""
        payoff = self.payoff(rival)
        return torch.nn.functional.one_hot(payoff.argmax(-1), payoff.shape[-1]).to(payoff)

    def duality_gap(
        self, p: Float[Tensor, "problem sequence"], q: Float[Tensor, "problem sequence"] | None = None
    ) -> Float[Tensor, " problem"]:
        """max_x P(x beats q) - min_x P(p beats x) >= 0, and 0 exactly at equilibria; q = p when left out."""
        rival = p if q is None else q
        return self.payoff(rival).amax(-1) + self.payoff(p).amax(-1) - 1

    def regularised_gap(
        self, p: Float[Tensor, "problem sequence"], reference: Float[Tensor, "problem sequence"], tau: float
    ) -> Float[Tensor, " problem"]:
        """What a best response gains on p in the KL-regularised game, >= 0 and 0 exactly at its equilibrium.

        tau log sum_y reference(y) exp((P p)_y / tau) - (1/2 - tau KL(p || reference)).
        """
        check_positive("tau", tau)
        best = tau * (reference.log() + self.payoff(p) / tau).logsumexp(-1)
        return best - (self.win_rate(p, p) - tau * kl(p, reference))

    # --- equilibria ---------------------------------------------------------------------------------------------

    def nash(self) -> Float[Tensor, "problem sequence"]:
        """An equilibrium of each problem, [B, S] float64: max v subject to p . P >= v, by linear programming.

        One of possibly many (a vertex). ``duality_gap`` of it is rounding error. Raises RuntimeError where the
        solver fails.
        """
        optimize: Any = importlib.import_module("scipy.optimize")  # half a second to import
        size = self.preference.shape[-1]
        found = []
        for matrix in self.preference.double().cpu().numpy():
            # Variables p_1 .. p_S and v; the value of a symmetric game is 1/2.
            rows = np.concatenate([-matrix.T, np.ones((size, 1))], axis=1)
            solved = optimize.linprog(
                np.concatenate([np.zeros(size), [-1.0]]),
                A_ub=rows,
                b_ub=np.zeros(size),
                A_eq=np.concatenate([np.ones(size), [0.0]])[None],
                b_eq=[1.0],
                bounds=[(0, None)] * size + [(None, None)],
                method="highs",
            )
            if solved.status != 0:
                raise RuntimeError(f"the linear program of the equilibrium failed: {solved.message}")
            weights = np.clip(solved.x[:size], 0, None)
            found.append(weights / weights.sum())
        return torch.from_numpy(np.stack(found))

    def regularised_nash(
        self, reference: Float[Tensor, "problem sequence"], tau: float
    ) -> Float[Tensor, "problem sequence"]:
        """The one equilibrium of P(p beats q) - tau KL(p || reference) + tau KL(q || reference), [B, S] float64.

        It is the only p with p(y) proportional to reference(y) exp((P p)_y / tau) (Munos et al. 2023,
        arXiv:2312.00886, section 4), met to rounding error.

        Solved by damped Newton on F(z) = z - log reference - P softmax(z) / tau. With p = softmax(z) and
        S = diag(p) - p p^T the Jacobian I - P S / tau has eigenvalues 1 + i x (P - 1/2 is antisymmetric), so it is
        never singular and Newton's direction always lowers |F|.

        Raises UsageError for tau <= 0 or a reference without full support, RuntimeError where F stays above 1e-9 / tau
        (seen for tau <= 1e-5).
        """
        check_positive("tau", tau)
        if not bool((reference > 0).all()):
            raise UsageError("the reference of a KL-regularised game needs full support")
        margin = self.preference.double() - 0.5
        base = reference.double().log()
        if base.shape != margin.shape[:2]:
            raise UsageError(f"the reference has shape {tuple(base.shape)}, the game needs {tuple(margin.shape[:2])}")

        def residual(z: Tensor) -> Tensor:
            return z - base - (margin @ z.softmax(-1)[..., None])[..., 0] / tau

        eye = torch.eye(margin.shape[-1], dtype=margin.dtype)
        z = base.clone()
        left = residual(z)
        # What rounding of log reference and of P p / tau leaves of F.
        floor = 8 * torch.finfo(z.dtype).eps * (base.abs().amax(-1, keepdim=True) + 1 / tau)
        for _ in range(_STEPS):
            now = left.abs().amax(-1, keepdim=True)
            if bool((now <= floor).all()):
                break
            p = z.softmax(-1)
            # margin @ (diag p - p p^T)
            slope = margin * p[:, None, :] - (margin @ p[..., None]) * p[:, None, :]
            step = torch.linalg.solve(eye - slope / tau, left[..., None])[..., 0]
            length = left.norm(dim=-1, keepdim=True)
            size = torch.ones_like(length)
            for _ in range(_HALVINGS):
                fresh = residual(z - size * step)
                better = fresh.norm(dim=-1, keepdim=True) <= (1 - 1e-4 * size) * length
                if bool((better | (now <= floor)).all()):
                    break
                size = torch.where(better, size, size / 2)
            if not bool(better.any()):
                break
            z = torch.where(better, z - size * step, z)
            left = residual(z)
        if not float(left.abs().max()) <= 1e-9 * max(1 / tau, 1.0):
            raise RuntimeError(
                f"the equilibrium for tau = {tau} was met only to {float(left.abs().max()):.2g}; take a larger tau, or "
                f"`nash` for the game without regularisation"
            )
        return z.softmax(-1)


def _worst(p: Tensor) -> tuple[int, int, int]:
    gap = (p + p.mT - 1).abs()
    at = int(gap.argmax())
    size = p.shape[1]
    return at // size**2, at // size % size, at % size

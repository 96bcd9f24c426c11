"""The policy that serves the worst-off of several rewards best: max_pi min_k E[r_k] - beta KL(pi || reference)."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.core.errors import UsageError
from polopt.policies.exact.divergences import check_positive


def egalitarian(
    rewards: Float[Tensor, "reward problem sequence"], reference: Float[Tensor, "problem sequence"], beta: float
) -> tuple[Float[Tensor, "problem sequence"], Float[Tensor, " reward"]]:
    """The optimum and the weights w of the rewards in it, float64; E[.] and KL are means over the problems.

    The objective is concave in pi and linear in the mixture of rewards, so that max and min change places:
    pi_b is proportional to reference_b exp(sum_k w_k r_k / beta), w on the simplex minimising the mean over b of
    beta log Z_b(w). Rewards with w_k > 0 have equal utility. arXiv:2402.08925, section 5. Raises UsageError for a beta
    that is not above 0 or shapes that do not fit, RuntimeError where the solver fails.
    """
    check_positive("beta", beta)
    if rewards.ndim != 3 or rewards.shape[1:] != reference.shape:
        raise UsageError(f"rewards {tuple(rewards.shape)} and a reference {tuple(reference.shape)} do not fit")
    tables, base = rewards.double(), reference.double().log()
    count = len(tables)

    def tilted(w: Tensor) -> Tensor:
        return base + torch.einsum("k,kbs->bs", w, tables) / beta

    def value(w: Any) -> tuple[float, Any]:
        logits = tilted(torch.as_tensor(w, dtype=torch.float64))
        slope = (logits.softmax(-1) * tables).sum(-1).mean(1)
        return float(beta * logits.logsumexp(-1).mean()), slope.numpy()

    optimize: Any = importlib.import_module("scipy.optimize")  # half a second to import
    found = optimize.minimize(
        value,
        [1 / count] * count,
        jac=True,
        bounds=[(0, 1)] * count,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: [1.0] * count},
        method="SLSQP",
        options={"ftol": 1e-16, "maxiter": 1000},
    )
    w = torch.as_tensor(found.x).clamp_min(0)
    w = w / w.sum()
    if not bool(torch.isfinite(w).all()):
        raise RuntimeError(f"the weights of the egalitarian policy were not found: {found.message}")
    return tilted(w).softmax(-1), w

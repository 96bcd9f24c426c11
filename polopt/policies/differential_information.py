"""Differential information: the normalised ratio q_{pi/rho} ~ pi / rho of two laws over answers (Won et al. 2025).

pi ~ rho q: q is the law of what turns rho into pi by Bayes' rule. arXiv:2505.23761.
"""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor

LogLaw = Float[Tensor, "*prompt answer"]
"""Log-probabilities, up to a constant, of the answers to each prompt."""


def differential_information(law: LogLaw, before: LogLaw) -> LogLaw:
    """log q_{pi/rho}, normalised."""
    return (law - before).log_softmax(-1)


def rejected_law(reference: LogLaw, target: LogLaw, beta: float) -> LogLaw:
    """log pi_l of pi_l ~ pi_ref (pi_ref / pi*)^beta, normalised: the best law of rejected answers."""
    return (reference + beta * (reference - target)).log_softmax(-1)


def power_law_fit(
    rejected: LogLaw, reference: LogLaw, target: LogLaw
) -> tuple[Float[Tensor, "*prompt"], Float[Tensor, "*prompt"]]:
    """Slope and R^2 of log q_{ref/l} over log q_{*/ref}, both centred: the right beta, and how right it is."""
    y, x = (v - v.mean(-1, keepdim=True) for v in (reference - rejected, target - reference))
    cross = (x * y).sum(-1)
    return cross / x.square().sum(-1), cross.square() / (x.square().sum(-1) * y.square().sum(-1))


def did_entropy(
    law: LogLaw, before: LogLaw, proposal: LogLaw | None = None
) -> tuple[Float[Tensor, "*prompt"], Float[Tensor, "*prompt"]]:
    """Entropy of q_{pi/rho} in nats from K answers, and their effective number 1 / sum omega^2.

    u = log pi - log rho, w = u - log b, b the law that the answers were drawn from (``proposal``, normalised),
    omega = softmax(w), H = -sum omega (u - log mean exp w). Consistent, with the heavy tails of sequence-level ratios:
    mind the effective number. Without ``proposal`` the answers are all there are and H is exact. A constant in pi or in
    rho cancels.
    """
    u, count = law - before, law.shape[-1]
    w = u + math.log(count) if proposal is None else u - proposal
    share = w.softmax(-1)
    total = w.logsumexp(-1, keepdim=True) - math.log(count)
    return -(share * (u - total)).sum(-1), 1 / share.square().sum(-1)

"""GRPO: group relative policy optimisation (Shao et al. 2024, DeepSeekMath, arXiv:2402.03300).

A_i = (r_i - mean_g) / (std_g + eps), the same on every step of response i;
L = (1/M) sum_i (1/|y_i|) sum_t [ -min(rho_t A_i, clip(rho_t, 1 - low, 1 + high) A_i) + beta k3_t ],
k3_t = exp(u) - u - 1, u = log pi_ref,t - log pi_t.
beta is 0 here as in TRL (paper: 0.04; `--regularizer kl --regularizer.beta 0.04`), which saves the reference pass.
"""

from __future__ import annotations

from polopt.advantages.group import GroupZScore
from polopt.aggregations import SequenceMean
from polopt.core.registry import method
from polopt.methods.base.reinforce import reinforce
from polopt.objectives.clipped_surrogate import ClippedSurrogate

grpo = method(
    "grpo",
    reinforce,
    seed="base",
    paper="arXiv:2402.03300",
    reward=None,
    advantage=GroupZScore(),
    objective=ClippedSurrogate(),
    aggregation=SequenceMean(),
)

"""Dr. GRPO: GRPO without its length and difficulty biases (Liu et al. 2025, arXiv:2503.20783).

A_i = r_i - mean_g (no division by the standard deviation);
L = -(1/(M L_max)) sum_i sum_t min(rho_t A_i, clip(rho_t, 1 - low, 1 + high) A_i), L_max the completion budget.
The exact expectation of its gradient is (G - 1)/G * grad J / L_max.
"""

from __future__ import annotations

from polopt.advantages.group import GroupCenter
from polopt.aggregations import FixedLength
from polopt.core.registry import method
from polopt.methods.base.grpo import grpo

dr_grpo = method(
    "dr-grpo",
    grpo,
    seed="base",
    paper="arXiv:2503.20783",
    advantage=GroupCenter(),
    aggregation=FixedLength(),
)

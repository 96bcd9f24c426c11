"""The exact world: policies over short sequences whose every expectation is a finite sum.

`SequenceSpace` enumerates, `ExactPolicy` is a `polopt.core.policy.Policy` on it, `enumeration` takes expectations and
gradients, `divergences` and `game` measure distributions and preferences. Problems are in `polopt.tasks.problems`.
Everything is batched over independent problems and float64 unless asked otherwise.
"""

from __future__ import annotations

from polopt.policies.exact.divergences import GENERATORS, alpha, f_divergence, kl
from polopt.policies.exact.enumeration import (
    entropy,
    expected_reward,
    kl_regularised_objective,
    policy_gradient,
    scores,
    tilted,
)
from polopt.policies.exact.game import PreferenceGame
from polopt.policies.exact.heads import HEADS, Head, project
from polopt.policies.exact.payload import SequencePayload
from polopt.policies.exact.policy import ExactPolicy
from polopt.policies.exact.space import SequenceSpace
from polopt.policies.exact.tree import table_of

__all__ = [
    "GENERATORS",
    "HEADS",
    "ExactPolicy",
    "Head",
    "PreferenceGame",
    "SequencePayload",
    "SequenceSpace",
    "alpha",
    "entropy",
    "expected_reward",
    "f_divergence",
    "kl",
    "kl_regularised_objective",
    "policy_gradient",
    "project",
    "scores",
    "table_of",
    "tilted",
]

"""DAPO: decoupled clip and dynamic sampling policy optimisation (Yu et al. 2025, arXiv:2503.14476).

GRPO with four changes: clip-higher (low 0.2, high 0.28); dynamic sampling (a group whose responses are all right or all
wrong is dropped and the batch refilled); token mean, L = -(1/N) sum_i sum_t min(...) over the kept responses; a soft
penalty for overlong responses. The paper averages within a prompt's group first; like verl and TRL this divides by the
steps of the whole batch. Loss of a cut response is kept (`--filter overlong` masks it, the alternative).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from polopt.aggregations import TokenMean
from polopt.core.part import Part, part
from polopt.core.registry import method
from polopt.core.rollout import Rollout
from polopt.methods.base.grpo import grpo
from polopt.objectives.clipped_surrogate import ClippedSurrogate


@part("reward", "soft-overlong")
@dataclass(frozen=True)
class SoftOverlong(Part):
    """Adds ``reward/overlong``: 0 up to L_max - L_c steps, then ((L_max - L_c) - y) / L_c, and -1 from L_max on.

    L_max is ``max_length``, or the run's completion budget when None; L_c is ``cache``, or a fifth of L_max when None
    (the paper's 4,096 of 20,480). arXiv:2503.14476, Eq. 13.
    """

    max_length: int | None = None
    cache: float | None = None

    gives = frozenset({"reward/overlong"})

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"reward", "limit"}) if self.max_length is None else frozenset({"reward"})

    def __call__(self, rollout: Rollout) -> Rollout:
        limit = rollout["limit"].float() if self.max_length is None else torch.tensor(float(self.max_length))
        cache = limit / 5 if self.cache is None else torch.tensor(float(self.cache))
        penalty = ((limit - cache - rollout.lengths) / cache).clamp(-1.0, 0.0)
        reward = rollout.reward + penalty.to(rollout.reward)
        return rollout.with_columns(trajectory={"reward": reward, "reward/overlong": penalty})


@part("filter", "dynamic-sampling")
@dataclass(frozen=True)
class DynamicSampling(Part):
    """Keep a group iff the score varies within it: 0 < number of right responses < G for a right-or-wrong score.

    Judged on ``column``, by default the task's score, not on the shaped reward. The trainer draws further prompts until
    the batch is full again, at most ``rounds`` times. Invalid scores do not count. arXiv:2503.14476, Eq. 11.
    """

    column: str = "score"
    rounds: int = 8

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.column})

    def __call__(self, rollout: Rollout) -> Rollout:
        return rollout.select((rollout.group_std(rollout[self.column]) > 0)[rollout.group])


@part("filter", "overlong")
@dataclass(frozen=True)
class OverlongFilter(Part):
    """Mask every step of a response that the length limit cut."""

    needs = frozenset({"truncated"})

    def __call__(self, rollout: Rollout) -> Rollout:
        return rollout.with_columns(step={"mask": rollout.mask & ~rollout.spread(rollout["truncated"].bool())})


dapo = method(
    "dapo",
    grpo,
    seed="base",
    paper="arXiv:2503.14476",
    reward=SoftOverlong(),
    filter=DynamicSampling(),
    objective=ClippedSurrogate(low=0.2, high=0.28),
    aggregation=TokenMean(),
)

"""How much a method makes of a prompt, by how often the policy is right on it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import torch

from polopt.core.method import Method
from polopt.diagnosis.draws import count_groups
from polopt.diagnosis.estimator import Kind, estimate
from polopt.diagnosis.world import World
from polopt.policies.exact import SequenceSpace, policy_gradient
from polopt.tasks.problems import Problem, problem

RATES: Final = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
_SPACES: Final = (SequenceSpace(3, 2), SequenceSpace(2, 2), SequenceSpace(2, 1))
_ENOUGH: Final = 1500


@dataclass(frozen=True)
class Curve:
    """``weight`` c(p) = <E[direction], grad J> / |grad J|^2 on a prompt of pass rate p: 1 is the true gradient's.

    ``error`` is its standard error, 0 where exact; ``relative`` is c(p) / c(1/2).
    """

    kind: Kind
    rates: tuple[float, ...]
    weight: tuple[float, ...]
    error: tuple[float, ...]

    @property
    def relative(self) -> tuple[float, ...]:
        """c(p) / c(1/2); NaN where the middle has no weight."""
        middle = self.weight[min(range(len(self.rates)), key=lambda i: abs(self.rates[i] - 0.5))]
        return tuple(value / middle if middle else math.nan for value in self.weight)


def pass_rate_problem(rates: Sequence[float], group: int, *, space: SequenceSpace, seed: int = 0) -> Problem:
    """One problem per rate: the same right sequences, the same policy among the right and among the wrong ones."""
    made = [problem("binary-verifier", space=space, seed=seed, pass_rate=rate) for rate in rates]
    initial = torch.cat([one.initial for one in made])
    rewards = {name: torch.cat([one.rewards[name] for one in made]) for name in made[0].rewards}
    return dataclasses.replace(
        made[0],
        rewards=MappingProxyType(rewards),
        initial=initial,
        reference=initial,
        group_sizes=(group,) * len(rates),
    )


def weight_by_pass_rate(
    method: Method,
    group: int,
    *,
    rates: Sequence[float] = RATES,
    prompts: int = 8,
    seed: int = 0,
    space: SequenceSpace | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Curve:
    """The curve on binary problems whose sequences all have one length.

    Without ``space`` the largest of a few small ones whose groups are quick to enumerate. A method whose groups
    depend on their batch sees batches of prompts of all rates.
    """
    quick = (s for s in _SPACES if count_groups(s.n_sequences, (group,)) <= _ENOUGH)
    chosen = space or next(quick, _SPACES[-1])
    world = World(method, pass_rate_problem(rates, group, space=chosen, seed=seed))
    policy = world.policy()
    found = estimate(world, policy, world.behaviour(), prompts=prompts, seed=seed, tell=tell)
    truth = policy_gradient(policy, world.problem.reward).detach().flatten(1)

    def weights(direction: torch.Tensor) -> torch.Tensor:
        own = direction.view(len(rates), -1) * len(rates)
        return (own * truth).sum(1) / truth.square().sum(1)

    error = torch.zeros(len(rates))
    if found.blocks is not None:
        each = torch.stack([weights(block) for block in found.blocks])
        error = each.std(0) / math.sqrt(len(each))
    return Curve(found.kind, tuple(rates), tuple(weights(found.mean).tolist()), tuple(error.tolist()))

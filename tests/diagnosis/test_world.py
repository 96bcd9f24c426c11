"""What a method's parts see in the exact world."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from polopt.core.example import Example
from polopt.core.part import Stateful
from polopt.core.policy import Request
from polopt.diagnosis.draws import Draws
from polopt.diagnosis.world import World
from polopt.methods import get_method
from polopt.policies.exact import SequenceSpace
from polopt.tasks.problems import problem


@dataclass(frozen=True)
class Numbered(Stateful):
    """Attaches to each example ten times its number, plus the number of draws so far."""

    draws: int = 0

    gives = frozenset({"tens"})
    state = ("draws",)

    def __call__(
        self, pool: Sequence[Example], *, prompts: int, group: int, generator: torch.Generator
    ) -> list[Request]:
        self.remember(draws=self.draws + 1)
        return [Request(e, group, columns={"tens": 10.0 * e.columns["problem"] + self.draws}) for e in pool[:prompts]]


def test_what_a_fresh_curriculum_attaches_to_each_problem_is_a_column() -> None:
    made = problem("binary-verifier", space=SequenceSpace(3, 2), batch=3, seed=0)
    method = get_method("grpo") | {"curriculum": Numbered()}
    world = World(method, made)
    owner = torch.tensor([2, 0, 0, 1])
    draws = Draws(owner, torch.tensor([0, 3, 5, 1]), torch.arange(4), torch.full((4,), 0.25).double(), False)
    rollout = world.rollout(world.policy(), world.behaviour(), draws)
    assert rollout.level("tens") == "trajectory"
    assert rollout["tens"].tolist() == [21.0, 1.0, 1.0, 11.0]
    assert method.curriculum.draws == 0


def test_nothing_is_attached_where_the_curriculum_gives_nothing() -> None:
    made = problem("binary-verifier", space=SequenceSpace(3, 2), batch=1, seed=0)
    world = World(get_method("grpo"), made)
    one = torch.zeros(1, dtype=torch.int64)
    draws = Draws(one, one, one, torch.ones(1, dtype=torch.float64), False)
    assert "baseline" not in world.rollout(world.policy(), world.behaviour(), draws)
    assert "baseline" in World(get_method("spo-single-stream"), made).rollout(world.policy(), world.behaviour(), draws)

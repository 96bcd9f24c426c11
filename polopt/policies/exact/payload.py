"""What an exact policy understands of a rollout: the problem of each trajectory, the node and token of each step."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from polopt.core.example import Example, Text, from_plain, plain
from polopt.core.rollout import payload_kind


@payload_kind("sequences")
@dataclass(frozen=True, eq=False)
class SequencePayload:
    """M trajectories with N tokens in all.

    ``problem`` [M], ``lengths`` [M] and ``temperature`` [M] per trajectory, ``nodes`` and ``ids`` [N] per step.
    ``pool`` holds the distinct examples, ``example_of`` [M] which of them each trajectory answers, ``branching`` the
    tokens after which a sequence goes on. Texts are made when somebody reads them: a completion is its tokens with
    blanks between, ``"2 0 1"``, those before its first step included.
    """

    problem: Int[Tensor, " trajectory"]
    lengths: Int[Tensor, " trajectory"]
    temperature: Float[Tensor, " trajectory"]
    nodes: Int[Tensor, " step"]
    ids: Int[Tensor, " step"]
    pool: tuple[Example, ...]
    example_of: Int[Tensor, " trajectory"]
    branching: int

    @cached_property
    def step_problem(self) -> Int[Tensor, " step"]:
        """Problem of each step."""
        return self.problem.repeat_interleave(self.lengths)

    @cached_property
    def step_temperature(self) -> Float[Tensor, " step"]:
        """Temperature of each step."""
        return self.temperature.repeat_interleave(self.lengths)

    @cached_property
    def examples(self) -> tuple[Example, ...]:
        """What was asked, per trajectory."""
        return tuple(self.pool[i] for i in self.example_of.tolist())

    @cached_property
    def prompt_texts(self) -> tuple[Text, ...]:
        """What the policy saw, per trajectory."""
        return tuple(example.prompt for example in self.examples)

    @cached_property
    def completion_ids(self) -> tuple[tuple[int, ...], ...]:
        """Tokens of each trajectory from the first of its sequence on, so that what it continues is judged with it."""
        ids, nodes = self.ids.tolist(), self.nodes.tolist()
        ends = [0, *self.lengths.cumsum(0).tolist()]
        return tuple((*self._path(nodes[a]), *ids[a:b]) for a, b in itertools.pairwise(ends))

    def _path(self, node: int) -> list[int]:
        """The tokens that lead to a node."""
        path = []
        while node:
            node, token = divmod(node - 1, self.branching)
            path.append(token)
        return path[::-1]

    @cached_property
    def completions(self) -> tuple[str, ...]:
        """Text of each trajectory."""
        return tuple(" ".join(map(str, ids)) for ids in self.completion_ids)

    @property
    def prompt_of(self) -> Int[Tensor, " trajectory"]:
        """What each trajectory was conditioned on: its problem."""
        return self.problem

    def select(self, trajectories: Int[Tensor, " kept"]) -> Self:
        """The entries of these trajectories, in this order; indices may repeat."""
        chosen = trajectories.to(self.lengths.device)
        lengths = self.lengths[chosen]
        shift = (self.lengths.cumsum(0) - self.lengths)[chosen] - (lengths.cumsum(0) - lengths)
        steps = torch.arange(int(lengths.sum()), device=chosen.device) + shift.repeat_interleave(lengths)
        return dataclasses.replace(
            self,
            problem=self.problem[chosen],
            lengths=lengths,
            temperature=self.temperature[chosen],
            nodes=self.nodes[steps],
            ids=self.ids[steps],
            example_of=self.example_of[chosen],
        )

    def join(self, later: Self) -> Self:
        """Trajectory by trajectory, these steps and then the later ones."""
        # A stable sort by trajectory puts the later steps of each behind its earlier ones.
        owner = torch.cat([torch.arange(len(part.lengths)).repeat_interleave(part.lengths) for part in (self, later)])
        order = owner.argsort(stable=True)
        return dataclasses.replace(
            self,
            lengths=self.lengths + later.lengths,
            nodes=torch.cat([self.nodes, later.nodes])[order],
            ids=torch.cat([self.ids, later.ids])[order],
        )

    def pruned(self) -> Self:
        """The same without examples that no trajectory answers: a pool that is kept for long must not grow."""
        used, owner = torch.unique(self.example_of, return_inverse=True)
        return dataclasses.replace(self, pool=tuple(self.pool[i] for i in used.tolist()), example_of=owner)

    def concat(self, others: Sequence[Self]) -> Self:
        """This payload followed by the others."""
        parts = [part.pruned() for part in (self, *others)]
        pool: dict[int, int] = {}
        examples: list[Example] = []
        owners = []
        for part in parts:
            for example in part.pool:
                # By identity: equal examples may carry columns that cannot be compared.
                if pool.setdefault(id(example), len(examples)) == len(examples):
                    examples.append(example)
            place = torch.tensor([pool[id(example)] for example in part.pool], dtype=torch.int64)
            owners.append(place.to(part.example_of.device)[part.example_of])
        return dataclasses.replace(
            self,
            problem=torch.cat([part.problem for part in parts]),
            lengths=torch.cat([part.lengths for part in parts]),
            temperature=torch.cat([part.temperature for part in parts]),
            nodes=torch.cat([part.nodes for part in parts]),
            ids=torch.cat([part.ids for part in parts]),
            pool=tuple(examples),
            example_of=torch.cat(owners),
        )

    def state_dict(self) -> dict[str, Any]:
        """The fields; examples as plain values."""
        kept = self.pruned()
        return {f.name: getattr(kept, f.name) for f in dataclasses.fields(kept)} | {"pool": plain(kept.pool)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The payload that was saved."""
        known = {f.name: state[f.name] for f in dataclasses.fields(cls)}
        return cls(**{**known, "pool": from_plain(state["pool"])})

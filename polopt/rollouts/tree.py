"""A tree of answers for every prompt, grown segment by segment."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polopt.core.errors import UsageError
from polopt.core.part import part
from polopt.core.policy import Policy, Request
from polopt.core.rollout import Rollout
from polopt.rollouts.groups import Groups
from polopt.rollouts.states import actions, another_seed


@part("rollout", "tree")
@dataclass(frozen=True)
class Tree(Groups):
    """One tree per request: segments of at most ``segment`` steps, ``branching[d]`` of them from each node at depth d.

    A segment that ends by itself is a leaf; those of the last level go on to the end. A leaf is a trajectory: the
    answer from the prompt to it. Its steps are those that no leaf before it has (the rest is the prefix of its
    request), so that every sampled step is there once: a segment that several leaves share is credited and trained in
    the first of them.

    Step columns ``segment/start`` and ``segment/end`` are the nodes between which a step lies, ``edge`` the segment;
    the trajectory column ``state`` is its leaf. The ``count`` of a request is not used: the branching decides.
    arXiv:2505.23564, SPO-tree.
    """

    branching: tuple[int, ...] = (6, 6, 6)
    segment: int = 30

    gives = frozenset({"limit", "state", "segment/start", "segment/end", "edge"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.branching or min(self.branching) < 1:
            raise UsageError(f"branching is {self.branching}; every level of a tree needs at least one branch")
        if self.segment < 1:
            raise UsageError(f"segment is {self.segment}; a segment has at least 1 step")

    def __call__(
        self,
        policy: Policy,
        requests: Sequence[Request],
        *,
        limit: int,
        seed: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> Rollout:
        budget = self.max_new_tokens or limit
        growing = [dataclasses.replace(r, limit=min(budget, r.limit or budget)) for r in requests if r.count]
        # Of each request in `growing`: its tree, its node, and (below the root) the steps that lead there.
        tree, node = torch.arange(len(growing)), torch.arange(len(growing))
        stem: Rollout | None = None
        nodes = len(growing)
        leaves: list[Rollout] = []
        owners: list[Tensor] = []
        for depth, branches in enumerate(self.branching):
            last = depth + 1 == len(self.branching)
            longest = budget if last else self.segment
            asked = [dataclasses.replace(r, count=branches, limit=min(longest, r.limit or budget)) for r in growing]
            new = super().__call__(policy, asked, limit=limit, seed=another_seed(seed, depth + 1), progress=progress)
            parent, taken = new.group, actions(new)
            tree, node = tree.to(new.device), node.to(new.device)
            left = torch.tensor([r.limit or budget for r in growing], device=new.device)[parent] - new.lengths
            reached = nodes + torch.arange(new.n_trajectories, device=new.device)
            nodes += new.n_trajectories
            start, end = node[parent][new.trajectory], reached[new.trajectory]
            new = new.with_columns(
                step={"segment/start": start, "segment/end": end, "edge": end.clone()}, trajectory={"state": reached}
            )
            if stem is not None:
                eldest = torch.arange(len(growing), device=new.device) * branches
                new = new.replaced(eldest, stem.join(new.select(eldest)))
            goes_on = torch.zeros_like(left, dtype=torch.bool) if last else new["truncated"].bool() & (left > 0)
            if not bool(goes_on.all()):
                leaves.append(new.select(~goes_on))
                owners.append(tree[parent][~goes_on])
            if not bool(goes_on.any()):
                break
            growing = [
                dataclasses.replace(growing[p], prefix=growing[p].prefix + taken[i], limit=int(left[i]))
                for i, (p, on) in enumerate(zip(parent.tolist(), goes_on.tolist(), strict=True))
                if on
            ]
            stem, tree, node = new.select(goes_on), tree[parent][goes_on], reached[goes_on]
        return Rollout.concat(leaves, torch.cat(owners))

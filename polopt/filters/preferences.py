"""Sampled groups as preferences: which members of a group train, and with which label.

Trajectory column ``label`` [M]: how much an answer is preferred, comparable within its group alone. Step column
``mask/chosen`` [N]: see `with_labels`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from polopt.core.part import Part, Stateful, part
from polopt.core.rollout import Rollout
from polopt.core.segments import segment_count, segment_cumsum, segment_is_first, segment_max, segment_min


@part("filter", "best-worst")
@dataclass(frozen=True)
class BestWorst(Part):
    """Of each group the member with the highest value of a column [M], label 1, and the one with the lowest, label 0.

    Of equal ones the first. Invalid (NaN) values take no part; groups whose valid values are all equal go.
    """

    column: str = "score"

    gives = frozenset({"label", "mask/chosen"})

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.column})

    def __call__(self, rollout: Rollout) -> Rollout:
        best, worst = _extremes(rollout, rollout[self.column])
        kept = best | worst
        return with_labels(rollout.select(kept), best[kept].float())


@part("filter", "ranked")
@dataclass(frozen=True)
class Ranked(Part):
    """Every member of a group with a valid value of a column [M], which is its label; groups of equal values go."""

    column: str = "score"

    gives = frozenset({"label", "mask/chosen"})

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.column})

    def __call__(self, rollout: Rollout) -> Rollout:
        values = rollout[self.column]
        best, _ = _extremes(rollout, values)
        varied = segment_count(rollout.group, rollout.n_groups, mask=best)[rollout.group] > 0
        kept = varied & ~values.isnan()
        return with_labels(rollout.select(kept), values[kept])


@part("filter", "best")
@dataclass(frozen=True)
class Best(Part):
    """Of each group the member with the highest valid value of a column [M], the first of equal ones, label 1.

    Only members with a value above ``above``: with the default a group without any right answer goes.
    """

    column: str = "score"
    above: float = 0.0

    gives = frozenset({"label", "mask/chosen"})

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.column})

    def __call__(self, rollout: Rollout) -> Rollout:
        values = rollout[self.column]
        fit = values > self.above
        top = segment_max(values, rollout.group, rollout.n_groups, mask=fit)[rollout.group]
        best = segment_is_first(rollout.group, rollout.n_groups, mask=fit & (values == top))
        return with_labels(rollout.select(best), torch.ones_like(values[best]))


@part("filter", "random-pair")
@dataclass(frozen=True)
class RandomPair(Stateful):
    """The first two valid members a, b of each group, which are drawn alike, and a label from P(a beats b).

    P is an entry of a judge's column [M, K] (``beats``: i against the k-th member of its group), or for a column of
    values [M] sigmoid(scale (v_a - v_b)). The label of a is 1 with probability P, else that of b is; ``certain``: the
    likelier one's, groups with P = 1/2 going. Members with an invalid (NaN) value, and groups with fewer than two
    others, go. State: how many batches were labelled, which with ``seed`` decides the draws.
    """

    column: str = "score"
    scale: float = 1.0
    certain: bool = False
    seed: int = 0
    batches: int = field(default=0, init=False, compare=False)

    gives = frozenset({"label", "mask/chosen"})
    state = ("batches",)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.column})

    def __call__(self, rollout: Rollout) -> Rollout:
        values, group, count = rollout[self.column], rollout.group, rollout.n_groups
        ones = torch.ones_like(group, dtype=torch.float32)
        place = rollout["member"] if "member" in rollout else segment_cumsum(ones, group, count, exclusive=True)
        place = place.long()
        # A judged member knows at least its chance against itself.
        valid = ~values.isnan() if values.ndim == 1 else ~values.gather(1, place[:, None])[:, 0].isnan()
        rank = segment_cumsum(ones, group, count, mask=valid)
        paired = (segment_count(group, count, mask=valid) >= 2)[group] & valid
        first, second = ((paired & (rank == r)).nonzero().flatten() for r in (1, 2))
        # Both in the order of their groups.
        first, second = (which[group[which].argsort()] for which in (first, second))
        if values.ndim == 1:
            chance = torch.sigmoid(self.scale * (values[first] - values[second]))
        else:
            chance = values[first, place[second]]
        generator = torch.Generator().manual_seed(hash((self.seed, self.batches)) % 2**62)
        draw = torch.rand(len(first), generator=generator, dtype=torch.float64).to(chance.device)
        self.remember(batches=self.batches + 1)
        wins = (chance > 0.5) if self.certain else (draw < chance)
        label = torch.zeros_like(ones).index_copy(0, first, wins.float()).index_copy(0, second, 1 - wins.float())
        keep = ~chance.isnan() & ((chance != 0.5) if self.certain else torch.ones_like(wins))
        chosen = torch.cat([first[keep], second[keep]]).sort().values
        return with_labels(rollout.select(chosen), label[chosen])


def with_labels(rollout: Rollout, label: Float[Tensor, " trajectory"]) -> Rollout:
    """The rollout with ``label`` [M] and ``mask/chosen`` [N]: the trainable steps of what can be imitated.

    That is the best answer of a group, all of them where several are, and where all are equal those with a positive
    label; a NaN is no label.
    """
    valid, group, count = ~label.isnan(), rollout.group, rollout.n_groups
    high = segment_max(label, group, count, mask=valid)[group]
    low = segment_min(label, group, count, mask=valid)[group]
    chosen = valid & (label == high) & ((high > low) | (label > 0))
    mask = rollout.mask & rollout.spread(chosen)
    return rollout.with_columns(trajectory={"label": label}, step={"mask/chosen": mask})


def _extremes(
    rollout: Rollout, values: Float[Tensor, " trajectory"]
) -> tuple[Bool[Tensor, " trajectory"], Bool[Tensor, " trajectory"]]:
    """The first best and the first worst valid member of each group; none where all are equal."""
    valid, group, count = ~values.isnan(), rollout.group, rollout.n_groups
    high = segment_max(values, group, count, mask=valid)[group]
    low = segment_min(values, group, count, mask=valid)[group]
    varied = valid & (high > low)
    best = segment_is_first(group, count, mask=varied & (values == high))
    return best, segment_is_first(group, count, mask=varied & (values == low))

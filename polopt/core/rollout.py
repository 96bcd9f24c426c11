"""The data that every method sees: packed decision steps, without padding.

A rollout has N steps, M trajectories and G groups. A step is one decision (a token, an action, a denoising step). Steps
of a trajectory are contiguous and in time order; every trajectory has at least one step; groups say which trajectories
are compared with each other and may have any size and order. Columns are named tensors declared at one level.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import Any, Literal, Protocol, Self, TypeVar, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from polopt.core import segments
from polopt.core.errors import UsageError
from polopt.core.example import Example

Level = Literal["step", "trajectory", "group"]
LEVELS: tuple[Level, ...] = ("step", "trajectory", "group")


class Source(IntEnum):
    """Where a trajectory came from (trajectory column ``source``)."""

    POLICY = 0
    DATASET = 1
    DEMONSTRATION = 2
    RESET = 3
    REPLAY = 4
    PROBE = 5
    """A continuation that measures the value of a prefix; it does not train."""
    TEMPERED = 6
    """Drawn from the policy at another temperature, beside what the policy answers."""
    OPPONENT = 7
    """Drawn from another policy, for the policy's answers to be compared with."""


class Payload(Protocol):
    """What only the policy understands (token ids, images, latents); one entry per trajectory, never read by parts."""

    def select(self, trajectories: Int[Tensor, " trajectory"]) -> Self:
        """The entries of these trajectories, in this order."""
        ...

    def concat(self, others: Sequence[Self]) -> Self:
        """This payload followed by the others."""
        ...

    def join(self, later: Self) -> Self:
        """Each trajectory continued by the one of ``later`` in the same place."""
        ...

    @property
    def examples(self) -> Sequence[Example]:
        """What each trajectory answers."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings, and dicts, lists and tuples of them: what `from_state` makes an equal one of."""
        ...

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The payload that was saved."""
        ...


_KINDS: dict[str, type[Any]] = {}
PayloadClass = TypeVar("PayloadClass", bound=type[Any])


def payload_kind(kind: str) -> Callable[[PayloadClass], PayloadClass]:
    """Class decorator: the short name under which rollouts with payloads of this class are saved.

    Whoever defines a payload registers it, so that reading a saved rollout imports nothing. Raises ValueError for a
    name that is taken.
    """

    def register(cls: PayloadClass) -> PayloadClass:
        if kind in _KINDS:
            raise ValueError(f"two kinds of payload are called {kind!r}")
        _KINDS[kind] = cls
        return cls

    return register


class MissingColumn(KeyError):
    """A part read a column that the rollout does not have."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class Counts:
    """What normalises a loss: trainable steps, trajectories and groups of the whole batch of one update.

    ``trajectories`` and ``groups`` include those without a trainable step, as in TRL. A micro-batch made by
    `Rollout.split` carries the counts of the batch it was cut from, so that a sum over micro-batches equals the loss
    of the batch.
    """

    steps: float
    trajectories: float
    groups: float
    masks: Mapping[str, float] = field(default_factory=dict)
    """Steps in each column ``mask/<model>``."""


@dataclass(frozen=True, eq=False)
class Rollout:
    """Packed trajectories with named columns; immutable, columns are added with `with_columns`.

    Fixed names. Step level: ``logp`` (log-prob of the chosen action under the full distribution of the policy that
    sampled it), ``logp/sampled`` (under the distribution it was drawn from, where that differs), ``mask``
    (the policy chose this step and it may train; ``mask/<model>``: that model may train on it), ``value``,
    ``entropy``, ``advantage``, ``weight``, ``step_reward``, ``logp/<model>``, ``action`` (id of the choice), ``kept``
    (bits of the actions that could be drawn), ``turn`` (answers of an environment before it). Trajectory level:
    ``reward`` (NaN: could not be computed), ``reward/<name>``, ``score`` (the task's reward before a method shapes it),
    ``source``, ``version`` (of the weights that sampled it), ``truncated`` (cut by a length limit), ``limit`` (the
    budget of steps it had), ``unfinished`` (goes on in the next iteration; rewards are 0 until it ends), ``before``
    (steps that earlier iterations sampled), ``win`` (how often it beats the others of its group), ``beats`` [M, K]
    (how often it beats member k) and ``member`` (which k it is).
    """

    lengths: Int[Tensor, " trajectory"]
    group: Int[Tensor, " trajectory"]
    columns: Mapping[Level, Mapping[str, Tensor]] = field(default_factory=dict)
    payload: Payload | None = None
    batch_counts: Counts | None = None

    def __post_init__(self) -> None:
        if self.lengths.ndim != 1 or self.lengths.shape != self.group.shape:
            raise ValueError(
                f"lengths and group must be vectors of one entry per trajectory, got shapes "
                f"{tuple(self.lengths.shape)} and {tuple(self.group.shape)}"
            )
        if self.lengths.numel() and int(self.lengths.min()) < 1:
            raise ValueError("every trajectory needs at least one step; mask a step that must not train")
        if self.group.numel() and int(self.group.min()) < 0:
            raise ValueError(f"group ids start at 0, got {int(self.group.min())}")
        sizes = self._sizes
        for level, columns in self.columns.items():
            for name, value in columns.items():
                if value.ndim == 0 or value.shape[0] != sizes[level]:
                    raise ValueError(
                        f"column {name!r} at level {level} has shape {tuple(value.shape)}, expected {sizes[level]} rows"
                    )

    # --- construction -------------------------------------------------------------------------------------------

    @classmethod
    def from_arrays(
        cls,
        trajectory: Any,
        group: Any,
        *,
        step: Mapping[str, Any] | None = None,
        trajectories: Mapping[str, Any] | None = None,
        groups: Mapping[str, Any] | None = None,
        payload: Payload | None = None,
    ) -> Self:
        """A rollout from array-likes: ``trajectory`` [N] ids 0, 0, 1, ... in order, ``group`` [M], columns per level.

        Groups may carry any integer labels; they are numbered in the order of their labels, and ``groups`` columns are
        in that order. Raises ValueError when ids are not contiguous from 0 or a column's length does not fit its level.
        """
        ids = torch.as_tensor(trajectory, dtype=torch.int64)
        owner = _numbered(torch.as_tensor(group, dtype=torch.int64, device=ids.device))
        jumps = ids.diff()
        contiguous = ids.numel() == 0 or (int(ids[0]) == 0 and bool(((jumps == 0) | (jumps == 1)).all()))
        count = int(ids[-1]) + 1 if ids.numel() else 0
        if not contiguous or count != owner.numel():
            raise ValueError(
                f"trajectory ids must run 0, 0, 1, ... without gaps up to the {owner.numel()} entries of group; "
                f"got {count} contiguous trajectories"
            )
        lengths = torch.bincount(ids, minlength=owner.numel())
        given: dict[Level, Mapping[str, Any]] = {
            "step": step or {},
            "trajectory": trajectories or {},
            "group": groups or {},
        }
        columns = {
            level: {name: torch.as_tensor(value, device=ids.device) for name, value in values.items()}
            for level, values in given.items()
        }
        return cls(lengths, owner, columns, payload)

    @classmethod
    def from_padded(
        cls,
        mask: Bool[Tensor, "trajectory time"] | Int[Tensor, "trajectory time"] | Float[Tensor, "trajectory time"],
        group: Any,
        *,
        step: Mapping[str, Tensor] | None = None,
        trajectories: Mapping[str, Any] | None = None,
        groups: Mapping[str, Any] | None = None,
    ) -> Self:
        """A rollout from right-padded matrices, as most trainers hold them; differentiable in the step columns.

        ``mask`` [M, T] is non-zero where a step trains; zeros inside a row stay as masked steps, trailing zeros are
        padding and go (a row of zeros keeps one masked step). ``step`` columns are [M, T]. ``group`` may carry any
        integer labels. `pad` is the way back.
        """
        chosen = mask.bool()
        position = torch.arange(1, chosen.shape[1] + 1, device=chosen.device)
        lengths = (chosen * position).amax(1).clamp_min(1)
        keep = position[None] <= lengths[:, None]
        packed: dict[str, Tensor] = {"mask": chosen[keep]}
        for name, value in (step or {}).items():
            if value.shape[:2] != chosen.shape:
                raise ValueError(
                    f"step column {name!r} has shape {tuple(value.shape)}, the mask has {tuple(chosen.shape)}"
                )
            packed[name] = value[keep]
        on = chosen.device
        columns: dict[Level, Mapping[str, Tensor]] = {
            "step": packed,
            "trajectory": {name: torch.as_tensor(value, device=on) for name, value in (trajectories or {}).items()},
            "group": {name: torch.as_tensor(value, device=on) for name, value in (groups or {}).items()},
        }
        return cls(lengths, _numbered(torch.as_tensor(group, dtype=torch.int64, device=on)), columns)

    def pad(self, values: Tensor, *, fill: float = 0.0) -> Tensor:
        """Step values [N, ...] right-padded, [M, longest trajectory, ...]; the inverse of `from_padded`."""
        width = int(self.lengths.max()) if self.lengths.numel() else 0
        out = values.new_full((self.n_trajectories, width, *values.shape[1:]), fill)
        keep = torch.arange(width, device=values.device)[None] < self.lengths[:, None]
        return out.masked_scatter(keep.view(*keep.shape, *[1] * (values.ndim - 1)), values)

    # --- sizes and index columns --------------------------------------------------------------------------------

    @cached_property
    def _sizes(self) -> dict[Level, int]:
        return {
            "step": int(self.lengths.sum()),
            "trajectory": self.lengths.numel(),
            "group": int(self.group.max()) + 1 if self.group.numel() else 0,
        }

    @property
    def n_steps(self) -> int:
        """N."""
        return self._sizes["step"]

    @property
    def n_trajectories(self) -> int:
        """M."""
        return self._sizes["trajectory"]

    @property
    def n_groups(self) -> int:
        """G."""
        return self._sizes["group"]

    @cached_property
    def trajectory(self) -> Int[Tensor, " step"]:
        """Trajectory of each step."""
        return torch.repeat_interleave(self.lengths, output_size=self.n_steps)

    @cached_property
    def step_group(self) -> Int[Tensor, " step"]:
        """Group of each step."""
        return self.group[self.trajectory]

    @cached_property
    def counts(self) -> Counts:
        """Normalisers of the whole batch that this rollout is, or was split from."""
        if self.batch_counts is not None:
            return self.batch_counts
        masks = {n: float(v.sum()) for n, v in self.columns.get("step", {}).items() if n.startswith("mask/")}
        return Counts(float(self.mask.sum()), float(self.n_trajectories), float(self.n_groups), masks)

    @property
    def device(self) -> torch.device:
        """Where the columns live."""
        return self.lengths.device

    @property
    def examples(self) -> Sequence[Example]:
        """What each trajectory answers: the key, by its ``id``, of what a part remembers per prompt."""
        if self.payload is None:
            raise ValueError("the rollout has no payload, so that nobody knows which examples it answers")
        return self.payload.examples

    # --- columns ------------------------------------------------------------------------------------------------

    def __contains__(self, name: str) -> bool:
        return any(name in self.columns.get(level, {}) for level in LEVELS)

    def __getitem__(self, name: str) -> Tensor:
        for level in LEVELS:
            if (value := self.columns.get(level, {}).get(name)) is not None:
                return value
        raise MissingColumn(f"the rollout has no column {name!r}; it has {', '.join(sorted(self.names()))}")

    def names(self) -> Iterator[str]:
        """Names of all columns."""
        for level in LEVELS:
            yield from self.columns.get(level, {})

    def level(self, name: str) -> Level:
        """The level at which a column is declared."""
        for level in LEVELS:
            if name in self.columns.get(level, {}):
                return level
        raise MissingColumn(f"the rollout has no column {name!r}; it has {', '.join(sorted(self.names()))}")

    def with_columns(
        self,
        *,
        step: Mapping[str, Tensor] | None = None,
        trajectory: Mapping[str, Tensor] | None = None,
        group: Mapping[str, Tensor] | None = None,
    ) -> Self:
        """The same rollout with these columns added or replaced."""
        given: dict[Level, Mapping[str, Tensor]] = {
            "step": step or {},
            "trajectory": trajectory or {},
            "group": group or {},
        }
        new = {name for values in given.values() for name in values}
        kept: dict[Level, dict[str, Tensor]] = {
            level: {name: value for name, value in self.columns.get(level, {}).items() if name not in new}
            for level in LEVELS
        }
        # The normalisers are those of the batch, whatever a part does to the mask of a piece of it.
        made = dataclasses.replace(self, columns={level: {**kept[level], **given[level]} for level in LEVELS})
        # What follows from the layout, and from the mask where that stays, need not be computed again.
        masked = any(name.partition("/")[0] == "mask" for name in new)
        for name in (*_OF_LAYOUT, *(() if masked else _OF_MASK)):
            if name in self.__dict__:
                made.__dict__[name] = self.__dict__[name]
        return made

    @cached_property
    def mask(self) -> Bool[Tensor, " step"]:
        """Steps that the policy chose and that may train; all of them where no column says otherwise."""
        if "mask" in self:
            return self["mask"].bool()
        return torch.ones(self.n_steps, dtype=torch.bool, device=self.device)

    def under(self, mask: str) -> Self:
        """The rollout as a part sees it that trains on the steps of another column, ``mask/<model>``.

        That column is its ``mask``, and the steps that normalise its loss are those of the column in the whole batch.
        """
        if mask == "mask":
            return self
        counts = dataclasses.replace(self.counts, steps=self.counts.masks[mask]) if mask in self else self.counts
        return dataclasses.replace(self.with_columns(step={"mask": self[mask].bool()}), batch_counts=counts)

    @cached_property
    def trains_whole(self) -> bool:
        """Whether every step may train: nothing needs to be masked."""
        return bool(self.mask.all())

    @property
    def logp(self) -> Float[Tensor, " step"]:
        """Log-prob of each step under the policy that sampled it."""
        return self["logp"]

    @property
    def reward(self) -> Float[Tensor, " trajectory"]:
        """Total reward of each trajectory; NaN where it could not be computed."""
        return self["reward"]

    @property
    def rewards(self) -> dict[str, Float[Tensor, " trajectory"]]:
        """The named rewards, without their prefix."""
        return {
            name.removeprefix("reward/"): value
            for name, value in self.columns.get("trajectory", {}).items()
            if name.startswith("reward/")
        }

    @property
    def reward_weights(self) -> dict[str, Float[Tensor, " trajectory"]]:
        """Weight in the total of each named reward; 1 where the run states none."""
        ones = torch.ones_like(self.reward)
        return {name: self[own] if (own := f"reward_weight/{name}") in self else ones for name in self.rewards}

    @property
    def advantage(self) -> Float[Tensor, " step"]:
        """Credit of each step."""
        return self["advantage"]

    @cached_property
    def weight(self) -> Float[Tensor, " step"]:
        """Weight of each step in the objective; 1 where no part sets it."""
        return self["weight"] if "weight" in self else torch.ones(self.n_steps, device=self.device)

    @cached_property
    def trajectory_return(self) -> Float[Tensor, " trajectory"]:
        """R_i = reward_i + sum_t step_reward_t, NaN where the reward is invalid."""
        if "step_reward" not in self:
            return self.reward
        return self.reward + self.sum_steps(self["step_reward"])

    # --- reductions: masked steps and NaN trajectories count for nothing -----------------------------------------

    def spread(self, values: Tensor, level: Level | None = None) -> Tensor:
        """Values per trajectory (or, with ``level="group"``, per group) repeated onto steps; step values unchanged."""
        if level == "group":
            values = values[self.group]
        elif level is None and values.shape[0] == self.n_steps:
            return values
        elif values.shape[0] != self.n_trajectories:
            raise ValueError(
                f"expected {self.n_trajectories} trajectory or {self.n_steps} step values, got {values.shape[0]}"
            )
        return values.index_select(0, self.trajectory)

    def sum_steps(self, values: Float[Tensor, " step"]) -> Float[Tensor, " trajectory"]:
        """Sum over the trainable steps of each trajectory."""
        return segments.run_sum(self.kept(values), self.lengths)

    @cached_property
    def last_step(self) -> Int[Tensor, " trajectory"]:
        """Place of the last trainable step of each trajectory; -1 where there is none."""
        last = segments.segment_is_last(self.trajectory, self.n_trajectories, mask=self.mask).nonzero().flatten()
        return torch.full_like(self.lengths, -1).index_copy(0, self.trajectory[last], last)

    def mean_steps(self, values: Float[Tensor, " step"]) -> Float[Tensor, " trajectory"]:
        """Mean over the trainable steps of each trajectory; 0 where there are none."""
        return segments.segment_mean(values, self.trajectory, self.n_trajectories, mask=self.mask)

    def at_last_step(self, values: Float[Tensor, " step"]) -> Float[Tensor, " trajectory"]:
        """The value at the last trainable step of each trajectory, 0 where no step is."""
        last = segments.segment_is_last(self.trajectory, self.n_trajectories, mask=self.mask)
        return self.sum_steps(torch.where(last, values, 0.0))

    def kept(self, values: Float[Tensor, " step"]) -> Float[Tensor, " step"]:
        """Values with 0 at the steps that do not train, whatever stood there."""
        return values if self.trains_whole else torch.where(self.mask, values, torch.zeros_like(values))

    @cached_property
    def active_lengths(self) -> Float[Tensor, " trajectory"]:
        """Number of trainable steps of each trajectory, |y_i|."""
        if self.trains_whole:
            return self.lengths.float()
        return segments.segment_count(self.trajectory, self.n_trajectories, mask=self.mask)

    def group_mean(self, values: Float[Tensor, " trajectory"]) -> Float[Tensor, " group"]:
        """Mean over the valid (not NaN) trajectories of each group; 0 where there are none."""
        return segments.segment_mean(values, self.group, self.n_groups, mask=~values.isnan())

    def group_std(self, values: Float[Tensor, " trajectory"], *, unbiased: bool = True) -> Float[Tensor, " group"]:
        """Standard deviation over the valid trajectories of each group; 0 for a single one."""
        return segments.segment_std(values, self.group, self.n_groups, unbiased=unbiased, mask=~values.isnan())

    def group_count(self, values: Float[Tensor, " trajectory"]) -> Float[Tensor, " group"]:
        """Number of valid trajectories of each group."""
        return segments.segment_count(self.group, self.n_groups, mask=~values.isnan())

    def group_center(self, values: Float[Tensor, " trajectory"]) -> Float[Tensor, " trajectory"]:
        """v_i - mean of its group; exactly 0 for equal values, for a group of one and for invalid values."""
        # Shifted by a member first, so that equal values cancel exactly whatever the mean rounds to.
        smallest = segments.segment_min(values, self.group, self.n_groups, mask=~values.isnan())[self.group]
        shifted = torch.where(values.isnan(), torch.zeros_like(values), values - smallest)
        centred = shifted - self.group_mean(torch.where(values.isnan(), values, shifted))[self.group]
        return torch.where(values.isnan(), torch.zeros_like(centred), centred)

    def group_zscore(
        self, values: Float[Tensor, " trajectory"], *, eps: float = 1e-4, unbiased: bool = True
    ) -> Float[Tensor, " trajectory"]:
        """(v_i - mean_g) / (std_g + eps); exactly 0 for equal values, for a group of one and for invalid values."""
        spread = self.group_std(values, unbiased=unbiased)[self.group] + eps
        # eps = 0 is allowed (scale invariance); a group without spread has a zero numerator.
        return self.group_center(values) / torch.where(spread > 0, spread, torch.ones_like(spread))

    @property
    def as_one_group(self) -> Self:
        """The trajectories as one group, without columns: its statistics are those of the batch."""
        return dataclasses.replace(self, group=torch.zeros_like(self.group), columns={}, payload=None)

    def whiten(
        self, values: Float[Tensor, " item"], *, eps: float = 1e-8, unbiased: bool = True
    ) -> Float[Tensor, " item"]:
        """(v - mean) / sqrt(var + eps) over the whole batch, of steps (masked ones left out) or of trajectories."""
        valid = ~values.isnan()
        if values.shape[0] == self.n_steps:
            valid = valid & self.mask
        kept = values[valid]
        if kept.numel() < 2:
            return torch.zeros_like(values)
        scaled = (values - kept.mean()) / torch.sqrt(kept.var(unbiased=unbiased) + eps)
        return torch.where(valid, scaled, torch.zeros_like(scaled))

    def batch_mean(self, values: Float[Tensor, " step"]) -> Float[Tensor, ""]:
        """This piece's share of the mean over the trainable steps of the whole batch; shares of pieces add up."""
        return self.kept(values).sum() / max(self.counts.steps, 1.0)

    def batch_share(self, condition: Bool[Tensor, " step"]) -> Float[Tensor, ""]:
        """`batch_mean` of a condition: this piece's part of the share of trainable steps for which it holds."""
        held = condition if self.trains_whole else condition & self.mask
        return held.count_nonzero() / max(self.counts.steps, 1.0)

    # --- select, concat, split ----------------------------------------------------------------------------------

    def select(self, trajectories: Int[Tensor, " kept"] | Bool[Tensor, " trajectory"]) -> Self:
        """The given trajectories (indices in any order, or a boolean mask); empty groups go, ids are renumbered."""
        chosen = trajectories.nonzero().flatten() if trajectories.dtype == torch.bool else trajectories
        chosen = chosen.to(self.device)
        groups, owner = torch.unique(self.group[chosen], return_inverse=True)
        lengths = self.lengths[chosen]
        starts = (self.lengths.cumsum(0) - self.lengths)[chosen]
        within = torch.arange(int(lengths.sum()), device=self.device) - (lengths.cumsum(0) - lengths).repeat_interleave(
            lengths
        )
        steps = starts.repeat_interleave(lengths) + within
        index: dict[Level, Tensor] = {"step": steps, "trajectory": chosen, "group": groups}
        return dataclasses.replace(
            self,
            lengths=lengths,
            group=owner,
            columns={level: {n: v[index[level]] for n, v in values.items()} for level, values in self.columns.items()},
            payload=self.payload.select(chosen) if self.payload is not None else None,
            batch_counts=None,
        )

    @classmethod
    def concat(cls, rollouts: Sequence[Self], group: Int[Tensor, " trajectory"] | None = None) -> Self:
        """One rollout after the other, with the same columns. Their groups stay apart, unless ``group`` says which
        group each of all the trajectories is in.

        Rows of one column may differ in width, as those of ``beats`` do where groups differ in size: the shorter ones
        are filled up with NaN.
        """
        first = rollouts[0]
        names = set(first.names())
        for other in rollouts[1:]:
            if odd := names.symmetric_difference(other.names()):
                raise ValueError(f"cannot concatenate rollouts: only one of them has column {sorted(odd)[0]!r}")
        if group is None:
            offsets = torch.tensor([0, *(r.n_groups for r in rollouts[:-1])]).cumsum(0).tolist()
            group = torch.cat([r.group + offset for r, offset in zip(rollouts, offsets, strict=True)])
        payload = None
        if first.payload is not None:
            payload = first.payload.concat([cast(Payload, r.payload) for r in rollouts[1:]])
        return cls(
            torch.cat([r.lengths for r in rollouts]),
            group,
            {
                level: {n: _stacked([r.columns[level][n] for r in rollouts]) for n in first.columns.get(level, {})}
                for level in LEVELS
            },
            payload,
        )

    def join(self, later: Self) -> Self:
        """Each trajectory continued by the trajectory of ``later`` in the same place; groups stay as they are.

        Both must have the same step columns. Of trajectory columns that both have, the later value holds: it says how
        the whole trajectory ended.
        """
        if self.n_trajectories != later.n_trajectories:
            raise ValueError(f"cannot join {self.n_trajectories} trajectories with {later.n_trajectories}")
        mine, other = self.columns.get("step", {}), later.columns.get("step", {})
        if odd := set(mine) ^ set(other):
            raise ValueError(f"cannot join rollouts: only one of them has the step column {min(odd)!r}")
        # A stable sort by trajectory puts the later steps of each behind its earlier ones.
        order = torch.cat([self.trajectory, later.trajectory]).argsort(stable=True)
        columns: dict[Level, Mapping[str, Tensor]] = {
            **self.columns,
            "step": {name: torch.cat([mine[name], other[name]])[order] for name in mine},
            "trajectory": {**self.columns.get("trajectory", {}), **later.columns.get("trajectory", {})},
        }
        payload = None
        if self.payload is not None and later.payload is not None:
            payload = self.payload.join(later.payload)
        return dataclasses.replace(
            self, lengths=self.lengths + later.lengths, columns=columns, payload=payload, batch_counts=None
        )

    def replaced(self, trajectories: Int[Tensor, " replaced"], others: Self) -> Self:
        """The rollout with ``others[j]`` in the place of trajectory ``trajectories[j]``, in its group.

        Both must have the same columns.
        """
        place = torch.arange(self.n_trajectories, device=self.device)
        place[trajectories] = self.n_trajectories + torch.arange(len(trajectories), device=self.device)
        both = type(self).concat([self, others])
        # Groups are those of the places, not those that concat keeps apart.
        regrouped = dataclasses.replace(
            both,
            group=torch.cat([self.group, self.group[trajectories]]),
            columns={**both.columns, "group": self.columns.get("group", {})},
        )
        return regrouped.select(place)

    def piece(self, trajectories: Int[Tensor, " kept"] | Bool[Tensor, " trajectory"]) -> Self:
        """`select` for a micro-batch: the normalisers stay those of the whole batch."""
        return dataclasses.replace(self.select(trajectories), batch_counts=self.counts)

    def split(self, unit: Unit, cost: Sequence[int], budget: int) -> list[Self]:
        """Pieces of whole units whose padded cost fits the budget; each carries this batch's `counts`.

        ``cost`` [M] is what one trajectory costs on its own (its tokens); a piece of n trajectories costs n times its
        dearest. Units of similar cost go together. A unit dearer than the budget is a piece of its own.
        """
        return [self.piece(torch.tensor(chosen)) for chosen in self.bins(unit, cost, budget)]

    def bins(self, unit: Unit, cost: Sequence[int], budget: int) -> list[list[int]]:
        """Trajectories of each piece that `split` makes."""
        if unit == "batch":
            return [list(range(self.n_trajectories))]
        members: dict[int, list[int]] = {}
        owners = self.group.tolist() if unit == "group" else range(self.n_trajectories)
        for index, owner in enumerate(owners):
            members.setdefault(owner, []).append(index)
        bins: list[list[int]] = []
        dearest = 0
        for unit_members in sorted(members.values(), key=lambda m: (max(cost[i] for i in m), m[0])):
            top = max(cost[i] for i in unit_members)
            size = len(bins[-1]) + len(unit_members) if bins else 0
            if not bins or size * max(top, dearest) > budget:
                bins.append([])
                dearest = 0
            bins[-1].extend(unit_members)
            dearest = max(dearest, top)
        return bins

    def to(self, device: torch.device | str) -> Self:
        """The columns on another device."""
        return dataclasses.replace(
            self,
            lengths=self.lengths.to(device),
            group=self.group.to(device),
            columns={level: {n: v.to(device) for n, v in values.items()} for level, values in self.columns.items()},
        )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint can hold, for `from_state`: tensors, and the payload as plain values under its kind.

        Raises TypeError for a payload whose class has no `payload_kind`.
        """
        payload = None
        if self.payload is not None:
            kinds = [kind for kind, cls in _KINDS.items() if cls is type(self.payload)]
            if not kinds:
                raise TypeError(f"{type(self.payload).__name__} is no registered kind of payload; see `payload_kind`")
            payload = {"kind": kinds[0], **self.payload.state_dict()}
        return {
            "lengths": self.lengths,
            "group": self.group,
            "columns": {level: dict(values) for level, values in self.columns.items()},
            "payload": payload,
            "counts": None if self.batch_counts is None else dataclasses.asdict(self.batch_counts),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The rollout that was saved, bit for bit, on the device of the saved tensors (the CPU, from a checkpoint).

        Raises UsageError for a kind of payload that no imported policy has.
        """
        payload = None
        if state["payload"] is not None:
            kind = state["payload"]["kind"]
            if kind not in _KINDS:
                raise UsageError(
                    f"the saved rollout has a payload of kind {kind!r}; the kinds known here are "
                    f"{', '.join(sorted(_KINDS))}"
                )
            payload = _KINDS[kind].from_state(state["payload"])
        counts = None if state["counts"] is None else Counts(**state["counts"])
        return cls(state["lengths"], state["group"], state["columns"], payload, counts)


_OF_LAYOUT = ("_sizes", "trajectory", "step_group")
_OF_MASK = ("mask", "trains_whole", "active_lengths", "counts")
"""Cached properties by what they follow from."""


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """Values one after the other, [.., K] with the largest K of floats that have different ones."""
    widths = {part.shape[1:] for part in parts}
    if len(widths) == 1 or not all(part.ndim == 2 and part.is_floating_point() for part in parts):
        return torch.cat(list(parts))
    wide = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, wide - part.shape[1]), value=torch.nan) for part in parts])


def _numbered(labels: Int[Tensor, " trajectory"]) -> Int[Tensor, " trajectory"]:
    """Labels as 0, 1, ... without gaps: a gap would be an empty group, and count in a mean over groups."""
    _, numbered = torch.unique(labels, return_inverse=True)
    return cast(Tensor, numbered)


Unit = Literal["step", "trajectory", "group", "batch"]
"""How far the loss of one step reaches: it depends on the log-probs of its step, trajectory, group or whole batch."""

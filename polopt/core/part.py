"""Parts: the interchangeable pieces of a method, one slot each."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, ClassVar, Final, Literal, Self, TypeVar, cast, get_args

import torch

from polopt.core.errors import UsageError
from polopt.core.rollout import Rollout, Unit

Slot = Literal[
    "curriculum",
    "rollout",
    "reward",
    "filter",
    "advantage",
    "weight",
    "objective",
    "regularizer",
    "aggregation",
    "controller",
    "models",
    "update",
    "schedule",
]
SLOTS: tuple[Slot, ...] = get_args(Slot)

Evaluate = Callable[[Rollout, frozenset[str]], Rollout]
"""What `observe` is given: the rollout with these columns of the present policy."""

_NAMED: dict[Slot, dict[str, Callable[[], Any]]] = {slot: {} for slot in SLOTS}


class Part:
    """Base of parts: what a part declares, and how parts compose. Subclasses are frozen dataclasses with `__call__`.

    - ``needs``: rollout columns that must exist before the part runs; ``reward/*`` means at least one named reward.
    - ``gives``: rollout columns that the part adds.
    - ``evaluates``: functionals of the current policy (with gradient) that an objective or regularizer reads.
    - ``unit``: how far the loss of one step reaches (see `polopt.core.rollout.Unit`); an advantage or weight whose
      values depend on other groups says "batch".
    - ``vanishes_with``: a step column; where it is zero on a whole trajectory (on a whole group, for a unit of groups)
      the part's gradient is zero there, and the update may leave it out.
    - ``reads_logp``: whether an objective or regularizer reads the log-probs; they are not computed where none does.
    - ``mask``: the step column that says where an objective or regularizer trains; what it evaluates is 0 elsewhere,
      and its terms are averaged over those steps. ``mask/critic`` is one for a loss of the critic.
    - ``uses``: models with which a rollout part samples.
    - ``offline``: a rollout part that learns from answers which examples bring; its trajectories have no log-probs of a
      sampler, and are judged by reward functions only where some part needs a reward.
    - ``reads_answers``: a part that needs examples whose answers are known, although it samples too.
    - ``state``: names of attributes that change while training; saved in checkpoints, checked by name on load.

    A model with a ``recipe``, a method, is trained by it for ``steps`` iterations before the run's first, from the
    policy's start, to which the policy then goes back; None trains nothing.

    A part with a method ``observe(rollout, evaluate)`` learns from every iteration. It is called after the updates with
    all answers that were drawn (probes are none), filtered or not, as the reward parts left them. ``evaluate(rollout,
    names)`` gives a rollout with these step functionals (``logp``, ``entropy``, ...) of the present policy, without
    gradient and within the token budget, in the place of columns of that name; any rollout will do, one from the part's
    state too.
    """

    slot: ClassVar[Slot]
    name: ClassVar[str] = ""
    gives: ClassVar[frozenset[str]] = frozenset()
    evaluates: ClassVar[frozenset[str]] = frozenset()
    unit: ClassVar[Unit] = "step"
    vanishes_with: ClassVar[str | None] = None
    reads_logp: ClassVar[bool] = True
    mask: ClassVar[str] = "mask"
    offline: ClassVar[bool] = False
    reads_answers: ClassVar[bool] = False
    state: ClassVar[tuple[str, ...]] = ()

    @property
    def needs(self) -> frozenset[str]:
        """Rollout columns that must exist; a class attribute in most parts, computed where an option decides it."""
        return frozenset()

    def __add__(self, other: Part) -> Sum:
        return Sum((*flatten(self), *flatten(other)))

    def __or__(self, other: Part) -> Then:
        return Then((*flatten(self), *flatten(other)))

    def state_dict(self) -> dict[str, Any]:
        """The declared state: rollouts, tensors, numbers, strings, and nested dicts or lists of all but rollouts."""
        return {name: _saved(getattr(self, name)) for name in self.state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the declared state.

        Raises UsageError when the names differ from the declared ones.
        """
        if set(state) != set(self.state):
            raise UsageError(
                f"the saved state of part {describe(self)} has {sorted(state)}, this version declares "
                f"{sorted(self.state)}"
            )
        for name in self.state:
            object.__setattr__(self, name, _restored(copy.deepcopy(state[name])))


_ROLLOUT: Final = "a saved rollout"


def _saved(value: Any) -> Any:
    return {_ROLLOUT: value.state_dict()} if isinstance(value, Rollout) else value


def _restored(value: Any) -> Any:
    return Rollout.from_state(value[_ROLLOUT]) if isinstance(value, Mapping) and set(value) == {_ROLLOUT} else value


@dataclasses.dataclass(frozen=True)
class _Composite(Part):
    parts: tuple[Part, ...] = ()

    def state_dict(self) -> dict[str, Any]:
        return {str(index): part.state_dict() for index, part in enumerate(self.parts) if part.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        expected = {str(index) for index, part in enumerate(self.parts) if part.state_dict()}
        if set(state) != expected:
            raise UsageError(f"the saved state has parts {sorted(state)}, this method's have {sorted(expected)}")
        for index in expected:
            self.parts[int(index)].load_state_dict(state[index])


@dataclasses.dataclass(frozen=True)
class Sum(_Composite):
    """Losses that are added (`a + b`): each member is aggregated by itself."""


@dataclasses.dataclass(frozen=True)
class Then(_Composite):
    """Parts that run one after the other (`a | b`), each on the rollout that the one before it returned."""

    def __call__(self, rollout: Any, *args: Any) -> Any:
        for member in self.parts:
            rollout = cast(Callable[..., Any], member)(rollout, *args)
        return rollout


def flatten(part: Any) -> tuple[Any, ...]:
    """The members of a composite, or the part itself; nothing for None."""
    if part is None:
        return ()
    return part.parts if isinstance(part, _Composite) else (part,)


def declared(value: Any, field: Literal["needs", "gives", "evaluates"]) -> frozenset[str]:
    """What a part, a composite's members together, or a plain function with such an attribute declares."""
    return frozenset().union(*(getattr(member, field, frozenset()) for member in flatten(value)))


def widest_unit(*values: Any) -> Unit:
    """The unit of the part that reaches furthest."""
    order: tuple[Unit, ...] = get_args(Unit)
    units: list[Unit] = [getattr(member, "unit", "step") for value in values for member in flatten(value)]
    return max(units, key=order.index, default="step")


P = TypeVar("P", bound=type[Part])


def part(slot: Slot, name: str) -> Callable[[P], P]:
    """Class decorator: declare the slot of a part and the name by which the command line finds it (`--advantage NAME`).

    Raises ValueError when another part of the slot has that name.
    """

    def register(cls: P) -> P:
        if name in _NAMED[slot]:
            raise ValueError(f"two parts of slot {slot!r} are called {name!r}")
        cls.slot, cls.name = slot, name
        _NAMED[slot][name] = cls
        return cls

    return register


def named_parts(slot: Slot) -> Mapping[str, Callable[[], Any]]:
    """Parts of a slot by name."""
    return _NAMED[slot]


def describe(value: Any) -> str:
    """A part as a short call: its name and its settings."""
    if value is None:
        return "none"
    if isinstance(value, Sum):
        return " + ".join(describe(member) for member in value.parts)
    if isinstance(value, Then):
        return " | ".join(describe(member) for member in value.parts)
    title = getattr(value, "name", "") or getattr(value, "__name__", type(value).__name__)
    if not dataclasses.is_dataclass(value):
        return str(title)
    options = ", ".join(f"{name}={shown}" for name, shown in settings(value).items())
    return f"{title}({options})"


def settings(value: Any) -> dict[str, Any]:
    """Fields of a part that a user can set, by name."""
    if not dataclasses.is_dataclass(value):
        return {}
    hidden = set(getattr(value, "state", ()))
    return {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init and f.name not in hidden}


def clone(value: Any) -> Any:
    """An independent copy with its own state; tensors included."""
    with torch.no_grad():
        return copy.deepcopy(value)


def with_settings(value: Any, changes: Mapping[str, Any]) -> Any:
    """The part with some fields replaced, its state kept."""
    fresh = dataclasses.replace(value, **changes)
    if getattr(value, "state", ()):
        fresh.load_state_dict(value.state_dict())
    return fresh


class Stateful(Part):
    """A part whose declared ``state`` attributes may be written."""

    def remember(self, **values: Any) -> Self:
        """Write declared state."""
        for name, value in values.items():
            if name not in self.state:
                raise ValueError(f"part {describe(self)} writes {name!r}, which it does not declare in `state`")
            object.__setattr__(self, name, value)
        return self


def check_slot(name: str) -> Slot:
    """The slot of that name.

    Raises UsageError with all slots when there is none.
    """
    if name not in SLOTS:
        raise UsageError(f"unknown slot {name!r}; the slots are {', '.join(SLOTS)}")
    return name


def suggest(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """A hint at what a misspelt name may have meant."""
    close = get_close_matches(name, list(known), n=3, cutoff=0.4) or sorted(known)[:8]
    return f"did you mean {' or '.join(repr(c) for c in close)}?"

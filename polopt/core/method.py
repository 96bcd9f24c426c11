"""A method: one composition of parts, and the flow of one batch through them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from polopt.core.errors import UsageError
from polopt.core.loss import Evaluation, Loss
from polopt.core.part import SLOTS, Slot, check_slot, clone, declared, describe, flatten, widest_unit
from polopt.core.policy import pattern
from polopt.core.rollout import Rollout, Unit


@dataclass(frozen=True)
class Schedule:
    """How often a rollout is trained on: ``epochs`` passes of ``minibatches`` updates each."""

    epochs: int = 1
    minibatches: int = 1

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.minibatches < 1:
            raise UsageError(
                f"schedule needs epochs >= 1 and minibatches >= 1, got {self.epochs} and {self.minibatches}"
            )


@dataclass(frozen=True)
class Method:
    """The parts of one paper, a slot each. ``method | {"advantage": part}`` replaces slots.

    ``doc`` is the docstring of the method's file: its first line is the citation, the rest its equations. ``task`` is
    the generated task of the small world that shows what the method is for: the one that a run takes where it is given
    neither a task nor data. None stands for the default task, which any method can learn.
    """

    slug: str
    family: str
    seed: str
    paper: str
    doc: str
    task: str | None = None
    curriculum: Any = None
    rollout: Any = None
    reward: Any = None
    filter: Any = None
    advantage: Any = None
    weight: Any = None
    objective: Any = None
    regularizer: Any = None
    aggregation: Any = None
    controller: Any = None
    models: Mapping[str, Any] = field(default_factory=dict)
    update: Any = None
    schedule: Schedule = Schedule()

    def __or__(self, slots: Mapping[str, Any]) -> Method:
        for name in slots:
            check_slot(name)
        return dataclasses.replace(self, **slots)

    @property
    def title(self) -> str:
        """Name and citation: the first line of the method's file."""
        return self.doc.strip().splitlines()[0] if self.doc.strip() else self.slug

    def slots(self) -> dict[Slot, Any]:
        """The filled slots in the order of the flow."""
        parts = {slot: getattr(self, slot) for slot in SLOTS}
        return {slot: value for slot, value in parts.items() if value is not None and value != {}}

    def clone(self) -> Method:
        """The same method with its own state, for one run."""
        return dataclasses.replace(self, **{str(slot): clone(value) for slot, value in self.slots().items()})

    @property
    def offline(self) -> bool:
        """Whether it learns from answers that examples bring, beside which it may sample its own."""
        return bool(getattr(self.rollout, "offline", False))

    @property
    def reads_answers(self) -> bool:
        """Whether its examples must bring answers that are known: it is offline, compares its own with them, or has a
        model that is trained on them.
        """
        recipes = (getattr(model, "recipe", None) for model in self.models_in_use.values())
        own = self.offline or bool(getattr(self.rollout, "reads_answers", False))
        return own or any(recipe.reads_answers for recipe in recipes if recipe is not None)

    # --- what it needs ------------------------------------------------------------------------------------------

    @property
    def needs(self) -> frozenset[str]:
        """Rollout columns that some part needs and none of its parts gives."""
        missing: set[str] = set()
        given: set[str] = set()
        for value in self.slots().values():
            for member in flatten(value):
                missing |= declared(member, "needs") - given
                given |= declared(member, "gives")
            if value is self.advantage:
                given.add("advantage")
        return frozenset(missing)

    @property
    def evaluates(self) -> frozenset[str]:
        """Functionals of the current policy that the loss reads."""
        members = (*flatten(self.objective), *flatten(self.regularizer))
        logp = frozenset({"logp"} if any(getattr(member, "reads_logp", True) for member in members) else ())
        return logp | declared(self.objective, "evaluates") | declared(self.regularizer, "evaluates")

    @property
    def trains_policy(self) -> bool:
        """Whether the loss reads the policy's log-probs; else it trains a critic on its trunk alone, a reward model."""
        return any(name == "logp" or name.startswith("logp/") for name in self.evaluates)

    @property
    def models_in_use(self) -> dict[str, Any]:
        """The models of which some part reads a functional, a column ``<functional>/<model>``, or with which the
        rollout part samples (its ``uses``).
        """
        named = {column.partition("/")[2] for column in self.needs | self.evaluates}
        named |= getattr(self.rollout, "uses", frozenset())
        return {name: model for name, model in self.models.items() if name in named}

    @property
    def unit(self) -> Unit:
        """How far the loss of one step reaches."""
        return widest_unit(self.objective, self.regularizer, self.aggregation)

    @property
    def vanishes_with(self) -> str | None:
        """The step column whose zeros make the whole loss's gradient zero, if all loss parts agree on one."""
        columns = {
            getattr(member, "vanishes_with", None) for member in (*flatten(self.objective), *flatten(self.regularizer))
        }
        return columns.pop() if len(columns) == 1 else None

    @property
    def masks(self) -> frozenset[str]:
        """The step columns that say where the members of the loss train."""
        members = (*flatten(self.objective), *flatten(self.regularizer))
        return frozenset(getattr(member, "mask", "mask") for member in members)

    def trains(self, rollout: Rollout) -> Bool[Tensor, " step"]:
        """Steps at which some member of the loss trains."""
        return torch.stack([rollout.under(name).mask for name in sorted(self.masks)]).any(0)

    def check(self, available: frozenset[str]) -> None:
        """Fail before the first rollout if a part needs a column that nobody provides.

        ``available`` are the columns that the policy, its models and the rewards give; ``a/*`` stands for any name,
        ``a@*`` for any temperature. Raises UsageError naming the part and the column.
        """
        known = set(available)
        for slot, value in self.slots().items():
            for member in flatten(value):
                for column in sorted(declared(member, "needs")):
                    if not _covered(column, known):
                        raise UsageError(
                            f"method {self.slug!r}: its {slot} {describe(member)} needs column {column!r}, which "
                            f"neither the policy, the models, the rewards nor an earlier part provides"
                        )
                known |= declared(member, "gives")
            if slot == "advantage":
                known.add("advantage")

    # --- the flow of one batch ----------------------------------------------------------------------------------

    def shape_reward(self, rollout: Rollout) -> Rollout:
        """Rollout with the reward columns as the method's reward parts leave them."""
        return rollout if self.reward is None else cast(Rollout, self.reward(rollout))

    def credit(self, rollout: Rollout) -> Rollout:
        """The rollout with ``advantage`` (and what else its part gives) and ``weight`` at step level, detached."""
        for slot in ("advantage", "weight"):
            part = getattr(self, slot)
            if part is None:
                continue
            made = part(rollout)
            columns = made if isinstance(made, Mapping) else {slot: made}
            rollout = rollout.with_columns(step={name: _constant(rollout, value) for name, value in columns.items()})
        return rollout

    def loss(self, evaluation: Evaluation, rollout: Rollout) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """This piece's share of the loss of its whole batch, and its share of each metric.

        loss = sum over the members of objective and regularizer of aggregate(terms); the terms of the objective are
        multiplied by the weight of their step where a weight part is present. Parts see 0 for everything evaluated at
        masked steps, and the gradient there is exactly 0; a part with a ``mask`` of its own has other masked steps.
        """
        value = torch.zeros((), device=rollout.device)
        metrics: dict[str, Tensor] = {}
        # What each member sees: members that train on the same steps share it.
        views = {name: rollout.under(name) for name in self.masks}
        evaluated = {
            name: evaluation if view.trains_whole else evaluation.trainable(view.mask) for name, view in views.items()
        }
        for slot in ("objective", "regularizer"):
            for member in flatten(getattr(self, slot)):
                mask = getattr(member, "mask", "mask")
                loss: Loss = member(evaluated[mask], views[mask])
                if slot == "objective" and self.weight is not None:
                    loss = self._weighted(loss, views[mask], member)
                value = value + self._aggregate(loss, views[mask])
                metrics.update(loss.metrics)
        return value, metrics

    def _weighted(self, loss: Loss, rollout: Rollout, part: Any) -> Loss:
        if loss.level != "step":
            raise UsageError(
                f"method {self.slug!r}: a weight per step cannot act on the objective {describe(part)}, whose "
                f"terms are per {loss.level}"
            )
        return dataclasses.replace(loss, value=loss.value * rollout.weight)

    def _aggregate(self, loss: Loss, rollout: Rollout) -> Float[Tensor, ""]:
        match loss.level:
            case "step":
                return cast(Tensor, self.aggregation(rollout.kept(loss.value), rollout))
            case "trajectory":
                return loss.value.sum() / max(rollout.counts.trajectories, 1.0)
            case "group":
                return loss.value.sum() / max(rollout.counts.groups, 1.0)
            case _:
                return loss.value

    # --- state --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """State of every part that has some, by slot."""
        return {slot: state for slot, part in self._stateful().items() if (state := part.state_dict())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the parts' state.

        Raises UsageError when the slots with state differ.
        """
        parts = {slot: part for slot, part in self._stateful().items() if part.state_dict()}
        if set(parts) != set(state):
            raise UsageError(
                f"the saved state of method {self.slug!r} has slots {sorted(state)}, this one has {sorted(parts)}"
            )
        for slot, part in parts.items():
            part.load_state_dict(state[slot])

    def _stateful(self) -> dict[str, Any]:
        single = {str(slot): value for slot, value in self.slots().items() if hasattr(value, "state_dict")}
        models = {f"models/{k}": v for k, v in self.models.items() if hasattr(v, "state_dict")}
        return {**single, **models}


def _constant(rollout: Rollout, values: Tensor) -> Tensor:
    """Values per trajectory or step as a step column of its own, without gradient."""
    spread = rollout.spread(values).detach()
    return spread.clone() if spread.data_ptr() == values.data_ptr() else spread


def _covered(column: str, known: set[str]) -> bool:
    if {column, pattern(column)} & known:
        return True
    if column.endswith("/*"):
        return any(name.startswith(column[:-1]) for name in known)
    return f"{column.rpartition('/')[0]}/*" in known

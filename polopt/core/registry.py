"""The registry: every method by its slug, every part by its slot and name, filled by importing their files."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from polopt.core.errors import UsageError
from polopt.core.method import Method
from polopt.core.part import SLOTS, Slot, check_slot, named_parts, suggest

_METHODS: dict[str, Method] = {}

USER = "user"
"""Family of a method whose file is not part of polopt."""

REQUIRED: frozenset[Slot] = frozenset(
    {"curriculum", "rollout", "advantage", "objective", "aggregation", "update", "schedule"}
)
"""Slots that a training run cannot do without; the others may be empty."""


def method(
    slug: str,
    base: Method | None = None,
    *,
    seed: str = "",
    paper: str = "",
    task: str | None = None,
    **slots: Any,
) -> Method:
    """Register the method of the calling file: the parts of ``base`` with some slots replaced.

    The file's docstring becomes the method's ``doc``, its folder the family; ``task`` is that of ``base`` where it is
    left out. Raises ValueError when the file is not named after the slug, UsageError for an unknown slot.
    """
    caller = sys._getframe(1).f_globals
    module = str(caller["__name__"])
    stem = slug.replace("-", "_")
    in_package = module.startswith("polopt.methods.")
    if in_package and module.rpartition(".")[2] != stem:
        raise ValueError(f"method {slug!r} must live in {stem}.py, not in {module}")
    for name in slots:
        check_slot(name)
    inherited: dict[str, Any] = {} if base is None else {slot: getattr(base, slot) for slot in SLOTS}
    made = Method(
        slug=slug,
        family=module.split(".")[2].replace("_", "-") if in_package else USER,
        seed=seed,
        paper=paper,
        doc=str(caller.get("__doc__") or ""),
        task=base.task if task is None and base is not None else task,
        **{**inherited, **slots},
    )
    if slug in _METHODS and _METHODS[slug].doc != made.doc:
        raise ValueError(f"two methods are called {slug!r}")
    _METHODS[slug] = made
    return made


def registered() -> Mapping[str, Method]:
    """The methods whose files have been imported, by slug."""
    return dict(sorted(_METHODS.items()))


def find_part(slot: Slot, name: str) -> Any:
    """A part by its registered name, or the part that the method of that slug has in the slot; ``none`` empties it.

    Raises UsageError when neither exists.
    """
    if name == "none":
        if slot in REQUIRED:
            raise UsageError(f"slot {slot!r} cannot be empty; name one of its parts or a method's slug")
        return {} if slot == "models" else None
    known = registered()
    parts: Mapping[str, Callable[[], Any]] = named_parts(slot)
    if name in parts:
        return parts[name]()
    if name in known:
        return getattr(known[name], slot)
    raise UsageError(
        f"unknown {slot} {name!r}; {suggest(name, [*parts, *known])} "
        f"Its parts: {', '.join(sorted(parts)) or 'none'}; or the slug of a method"
    )

"""Options of a command: which there are, how the command line is split and read, and what was given."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from typing import Annotated, Any, get_origin, get_type_hints

import tyro

from polopt.core.errors import UsageError
from polopt.training.config import RunConfig, slot_key


@dataclass(frozen=True)
class Option:
    """``--name``: its type, default and help. A tuple is given by repeating the option."""

    name: str
    kind: Any
    default: Any
    help: str
    metavar: str | None = None

    @property
    def flag(self) -> str:
        """As it is written on the command line."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def repeatable(self) -> bool:
        """Whether several values may be given."""
        return get_origin(self.kind) is tuple


Groups = Mapping[str, Sequence[Option]]


@dataclass(frozen=True)
class Given:
    """What a command line says: the positional argument, the options that are on it, slots and fields of parts."""

    positional: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    slots: Mapping[str, str] = field(default_factory=dict)


@cache
def run_options() -> Mapping[str, Option]:
    """An option for every setting of a run but ``slots``, whose entries are options of their own."""
    kinds, docs = get_type_hints(RunConfig), field_docs(RunConfig)
    return {
        f.name: Option(f.name, kinds[f.name], f.default, docs.get(f.name, ""), _metavar(str(f.type)))
        for f in dataclasses.fields(RunConfig)
        if f.name != "slots"
    }


def field_docs(record: type) -> dict[str, str]:
    """The string below each field of a class."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(record))).body
    assert isinstance(tree, ast.ClassDef)
    return {
        above.target.id: " ".join(below.value.value.split())
        for above, below in zip(tree.body, tree.body[1:], strict=False)
        if isinstance(above, ast.AnnAssign)
        and isinstance(above.target, ast.Name)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
        and isinstance(below.value.value, str)
    }


def parse(
    command: str, description: str, groups: Groups, arguments: Sequence[str], positional: Option | None = None
) -> Given:
    """Read a command line; a command with the option ``method`` takes slots and fields of parts too (see `split`).

    Raises UsageError for an unknown option, SystemExit(0) after printing help and SystemExit(2) after saying which
    value cannot be read.
    """
    known = {option.name: option for options in groups.values() for option in options}
    own, names, slots = split(arguments, known, with_slots="method" in known)
    record = _record(command, groups, positional)
    found: Any = tyro.cli(
        record, args=own, prog=f"polopt {command}", description=description, config=(tyro.conf.UseAppendAction,)
    )
    values = {
        option.name: getattr(getattr(found, _attribute(g)), option.name) for g, o in groups.items() for option in o
    }
    first = None if positional is None else getattr(found, positional.name)
    return Given(first, {name: values[name] for name in values if name in names}, slots)


def split(
    arguments: Sequence[str], known: Mapping[str, Option], *, with_slots: bool
) -> tuple[list[str], set[str], dict[str, str]]:
    """Arguments for the option parser, names of the options among them, and slots and fields of parts by dotted name.

    ``--advantage rloo``, ``--objective.high=0.28`` and ``--slots.reward clip`` (where a setting has the slot's name)
    are for parts; hyphens and underscores are the same in names of options and fields. Raises UsageError for an option
    that is neither, suggesting the nearest one, and for a slot or field without a value.
    """
    own: list[str] = []
    names: set[str] = set()
    slots: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        token = rest.pop(0)
        if not token.startswith("--") or token == "--help":
            own.append(token)
            continue
        flag, equals, value = token.partition("=")
        name = flag[2:].replace("-", "_")
        positive = name.removeprefix("no_")
        if positive in known and positive != name and known[positive].kind is bool:
            own.append(token)
            names.add(positive)
        elif name in known:
            names.add(name)
            own += _own_values(known[name], token, rest, bool(equals))
        elif with_slots and _is_slot(flag[2:]):
            if not equals:
                if not rest or rest[0].startswith("--"):
                    raise UsageError(f"{flag} needs a value")
                value = rest.pop(0)
            slots[slot_key(flag[2:].removeprefix("slots."))] = value
        else:
            raise UsageError(_unknown(flag, known, with_slots))
    return own, names, slots


def _own_values(option: Option, token: str, rest: list[str], equals: bool) -> list[str]:
    """The option and its values in the form that the parser reads, taken off ``rest``."""
    if option.kind is bool or equals or not rest or rest[0].startswith("--"):
        return [token]
    taken = [token, rest.pop(0)]
    # `--level 1 2 3` is what one writes; what else repeats could be the positional argument.
    while option.repeatable and option.kind.__args__[0] is int and rest and rest[0].isdigit():
        taken += [token, rest.pop(0)]
    return taken


def _is_slot(name: str) -> bool:
    from polopt.core.part import SLOTS

    return name.removeprefix("slots.").partition(".")[0] in SLOTS


def _unknown(flag: str, known: Mapping[str, Option], with_slots: bool) -> str:
    flags = [option.flag for option in known.values()]
    head, dot, tail = flag.partition(".")
    if with_slots:
        from polopt.core.part import SLOTS

        slots = [f"--{slot}" for slot in SLOTS]
        if dot:
            close = get_close_matches(head, slots, n=1, cutoff=0.0)[0]
            return f"unknown slot {head[2:]!r} in {flag}; did you mean {close}.{tail}?"
        flags += slots
    close_flags = get_close_matches(head.replace("_", "-"), flags, n=2, cutoff=0.6)
    hint = f"did you mean {' or '.join(close_flags)}?" if close_flags else "see --help"
    return f"unknown option {flag}; {hint}"


def _record(command: str, groups: Groups, positional: Option | None) -> type:
    """A dataclass of dataclasses, one per group, from which the parser makes its help."""
    fields: list[Any] = []
    if positional is not None:
        kind = Annotated[
            tyro.conf.Positional[positional.kind],  # type: ignore[name-defined]
            tyro.conf.arg(metavar=positional.metavar, help=positional.help, help_behavior_hint=""),
        ]
        fields.append((positional.name, kind, positional.default))
    for title, options in groups.items():
        inner: list[Any] = [
            (o.name, Annotated[o.kind, _argument(o)], () if o.repeatable else o.default) for o in options
        ]
        group = dataclasses.make_dataclass(_attribute(title), inner, frozen=True)
        group.__doc__ = ""
        fields.append((_attribute(title), group, dataclasses.field(default_factory=group)))
    record = dataclasses.make_dataclass(command, fields, frozen=True)
    record.__doc__ = ""
    return record


def _argument(option: Option) -> Any:
    shown = option.default
    if option.repeatable:
        # Empty for the parser, which would add what is given to the default instead of replacing it.
        hint = f"(default: {' '.join(map(str, shown))}; may be repeated)" if shown else "(may be repeated)"
    elif shown is None or option.kind is bool:
        hint = ""
    else:
        hint = f"(default: {shown})"
    return tyro.conf.arg(metavar=option.metavar, help=option.help, help_behavior_hint=hint, prefix_name=False)


def _attribute(title: str) -> str:
    return title.replace(" ", "_")


def _metavar(kind: str) -> str | None:
    if kind.startswith(("Literal", "bool")):
        return None
    names = {"int": "N", "float": "X", "str": "TEXT"}
    found = re.search(r"int|float|str", kind)
    return names[found.group()] if found else None

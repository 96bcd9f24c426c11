"""``polopt methods``, ``polopt show`` and ``polopt parts``: what there is, from the registry alone."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from polopt.cli.options import Option, parse
from polopt.cli.output import make_console
from polopt.core.errors import UsageError
from polopt.core.method import Method
from polopt.core.part import SLOTS, check_slot, declared, describe, flatten, named_parts, settings, suggest
from polopt.methods import get_method, methods

FAMILY = Option("family", str | None, None, "Only the methods of this family.", "NAME")
JSON = Option("json", bool, False, "Print JSON instead of a table.")


def methods_command(arguments: Sequence[str]) -> int:
    """List the methods.

    Raises UsageError for a family that has none.
    """
    given = parse("methods", "List the methods.", {"list": (FAMILY, JSON)}, arguments)
    found = list(methods().values())
    family = given.options.get("family")
    if family is not None:
        families = sorted({method.family for method in found})
        if family not in families:
            raise UsageError(f"unknown family {family!r}; the families are {', '.join(families)}")
        found = [method for method in found if method.family == family]
    if given.options.get("json"):
        sys.stdout.write(json.dumps([summary(method) for method in found], indent=2, ensure_ascii=False) + "\n")
        return 0
    table = Table(
        "method", "family", "seed", "paper", "parts", "needs", title=f"{len(found)} methods", row_styles=["", "dim"]
    )
    for method in found:
        parts = ", ".join(short(value) for slot, value in method.slots().items() if slot not in ("models", "schedule"))
        needs = ", ".join(sorted(method.needs))
        table.add_row(*map(escape, (method.slug, method.family, method.seed, method.paper, parts, needs)))
    make_console().print(table)
    return 0


def summary(method: Method) -> dict[str, Any]:
    """A method as plain data."""
    return {
        "slug": method.slug,
        "name": name_of(method),
        "title": method.title,
        "family": method.family,
        "seed": method.seed,
        "paper": method.paper,
        "task": method.task,
        "slots": {slot: described(value) for slot, value in method.slots().items()},
        "needs": sorted(method.needs),
        "evaluates": sorted(method.evaluates),
    }


def name_of(method: Method) -> str:
    """The method's name: its title up to the colon or the citation."""
    return re.split(r":\s|\s\(", method.title, maxsplit=1)[0].rstrip(".: ")


def described(value: Any) -> str:
    """A part with its fields; several models with their names."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {describe(part)}" for name, part in value.items())
    return describe(value)


def short(value: Any) -> str:
    """Names of parts without their fields."""
    if isinstance(value, Mapping):
        return " + ".join(value)
    return " + ".join(_name(member) for member in flatten(value))


def show_command(arguments: Sequence[str]) -> int:
    """Explain one method.

    Raises UsageError when there is none of that name.
    """
    slug = Option("slug", str | None, None, "Slug of the method.", "METHOD")
    given = parse("show", "Explain a method: citation, equations, parts and their options.", {}, arguments, slug)
    if given.positional is None:
        raise UsageError("name a method: polopt show METHOD; `polopt methods` lists them")
    method = get_method(given.positional)
    console = make_console()
    console.print(
        f"[bold]{escape(method.slug)}[/bold]  {escape(method.family)}  {escape(method.paper)}", highlight=False
    )
    console.print()
    console.print(method.doc.strip() or "no description", highlight=False, markup=False, soft_wrap=True)
    console.print()
    table = Table("slot", "part", "option", "value", "what it does")
    for slot, value in method.slots().items():
        for index, (name, part, options) in enumerate(part_rows(slot, value)):
            table.add_row(slot if index == 0 else "", escape(name), "", "", escape(first_line(part)))
            for option, setting in options.items():
                table.add_row("", "", option, escape(str(setting)), "")
        table.add_section()
    console.print(table)
    empty = [slot for slot in SLOTS if slot not in method.slots()]
    facts = {
        "empty slots": ", ".join(empty),
        "needs": ", ".join(sorted(method.needs)),
        "evaluates": ", ".join(sorted(method.evaluates)),
        "unit": method.unit,
        "task": method.task or "any",
    }
    for label, text in facts.items():
        console.print(f"[bold]{label:<12}[/bold]{escape(text or 'nothing')}", highlight=False, soft_wrap=True)
    return 0


def part_rows(slot: str, value: Any) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Name, part, and options with their values of each part in a slot."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield name, part, {_flag(slot, name, field): v for field, v in settings(part).items()}
        return
    members = flatten(value)
    shared = Counter(field for member in members for field in settings(member))
    names = Counter(_name(member) for member in members)
    for index, member in enumerate(members):
        place = _name(member) if names[_name(member)] == 1 else str(index)
        yield (
            _name(member),
            member,
            {
                _flag(slot, field) if shared[field] == 1 else _flag(slot, place, field): v
                for field, v in settings(member).items()
            },
        )


def _flag(slot: str, *path: str) -> str:
    *middle, field = path
    return "--" + ".".join([slot, *middle, field.replace("_", "-")])


def parts_command(arguments: Sequence[str]) -> int:
    """List the parts that have a name, of one slot or of all.

    Raises UsageError for an unknown slot.
    """
    option = Option("slot", str | None, None, "Only the parts of this slot.", "SLOT")
    given = parse("parts", "List the parts that --SLOT NAME puts into a slot.", {}, arguments, option)
    if given.positional is not None and given.positional not in SLOTS:
        raise UsageError(f"unknown slot {given.positional!r}; {suggest(given.positional, SLOTS)}")
    methods()  # registers the parts
    table = Table("slot", "part", "what it does", "needs")
    for slot in [check_slot(given.positional)] if given.positional is not None else SLOTS:
        for name, make in sorted(named_parts(slot).items()):
            needs = ", ".join(sorted(declared(made_by(make), "needs")))
            table.add_row(slot, escape(name), escape(first_line(make)), escape(needs))
        table.add_section()
    make_console().print(table)
    return 0


def made_by(make: Any) -> Any:
    """The part with its defaults; None when it has fields without one."""
    required = dataclasses.is_dataclass(make) and any(
        f.init and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        for f in dataclasses.fields(make)
    )
    return None if required else make()


def first_line(part: Any) -> str:
    """First line of the docstring of a part, its class or its function; nothing where Python made it up."""
    about = part if isinstance(part, type) or not dataclasses.is_dataclass(part) else type(part)
    lines = (about.__doc__ or "").strip().splitlines()
    return "" if not lines or lines[0].startswith(f"{getattr(about, '__name__', '')}(") else lines[0]


def _name(part: Any) -> str:
    return str(getattr(part, "name", "") or getattr(part, "__name__", type(part).__name__))

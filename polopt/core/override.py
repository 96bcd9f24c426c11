"""Replace slots and fields of parts by dotted name, as the command line and configuration files do."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from polopt.core.errors import UsageError
from polopt.core.method import Method
from polopt.core.part import check_slot, describe, flatten, with_settings
from polopt.core.registry import find_part


def override(base: Method, settings: Mapping[str, Any]) -> Method:
    """The method with slots (``advantage``) and fields of parts (``objective.high``) replaced by dotted name.

    A field of a member of a sum or chain is ``slot.PART.field`` or ``slot.INDEX.field``; ``slot.field`` is enough where
    only one member has the field. Whole slots are replaced first. Raises UsageError for unknown slots, parts, fields.
    """
    made = base
    for key in sorted(settings, key=lambda k: k.count(".")):
        slot_name, _, path = key.partition(".")
        slot = check_slot(slot_name)
        if not path:
            value = settings[key]
            made = made | {slot: find_part(slot, value) if isinstance(value, str) else value}
        else:
            made = made | {slot: _set(getattr(made, slot), path, settings[key], key)}
    return made


def _set(part: Any, path: str, value: Any, key: str) -> Any:
    head, _, rest = path.partition(".")
    if isinstance(part, Mapping):
        if head not in part:
            raise UsageError(f"--{key}: there is no {head!r}; there are {', '.join(part) or 'none'}")
        if not rest:
            raise UsageError(f"--{key}: name a field of it, one of {', '.join(_fields(part[head])) or 'none'}")
        return {**part, head: _set(part[head], rest, value, key)}
    members = flatten(part)
    if len(members) > 1 or (rest and members):
        matches = [
            i
            for i, member in enumerate(members)
            if (rest and head in (str(i), getattr(member, "name", ""))) or (not rest and head in _fields(member))
        ]
        if len(matches) != 1:
            where = ", ".join(f"{i}.{f}" for i, member in enumerate(members) for f in _fields(member))
            raise UsageError(f"--{key}: {len(matches)} members have it; name one of {where}")
        index = matches[0]
        changed = _set(members[index], rest or head, value, key)
        if len(members) == 1:
            return changed
        return dataclasses.replace(part, parts=tuple(changed if i == index else m for i, m in enumerate(members)))
    if not members:
        raise UsageError(f"--{key}: the slot is empty; fill it first with --{key.partition('.')[0]} PART")
    if head not in _fields(part):
        known = ", ".join(_fields(part)) or "no fields"
        raise UsageError(f"--{key}: {describe(part)} has no field {head!r}; it has {known}")
    return with_settings(part, {head: coerce(value, _fields(part)[head], key)})


def _fields(part: Any) -> dict[str, Any]:
    """The settable fields of a part and their types."""
    if not dataclasses.is_dataclass(part):
        return {}
    hidden = set(getattr(part, "state", ()))
    hints = get_type_hints(type(part))
    return {f.name: hints[f.name] for f in dataclasses.fields(part) if f.init and f.name not in hidden}


def coerce(value: Any, wanted: Any, key: str) -> Any:
    """A command-line string as the type of the field; other values pass unchanged, an int as a float where one is due.

    Tuples are separated by commas, mappings are ``name=number`` pairs separated by commas. Raises UsageError naming the
    option and the value when it cannot be read or is none of the values that the type lists.
    """
    choices = get_args(wanted) if get_origin(wanted) in (Union, UnionType) else (wanted,)
    if isinstance(value, str) and NoneType in choices and value.lower() in ("none", "null"):
        return None
    for choice in choices:
        try:
            return _read(value, choice)
        except (KeyError, ValueError):
            continue
    shown = " or ".join(_shown(choice) for choice in choices)
    raise UsageError(f"--{key} expects {shown}, got {value!r}") from None


def _read(value: Any, wanted: Any) -> Any:
    origin, arguments = get_origin(wanted) or wanted, get_args(wanted)
    if origin is Literal:
        return arguments[[str(a) for a in arguments].index(str(value))]
    if origin is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, str):
        return value
    if origin is bool:
        return {"true": True, "false": False, "1": True, "0": False}[value.lower()]
    if origin in (int, float):
        return origin(value)
    if origin is NoneType:
        raise ValueError(value)
    if origin is tuple:
        return tuple(_read(item, arguments[0]) for item in value.split(",") if item)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {name: float(number) for name, number in (item.split("=") for item in value.split(","))}
    return value


def _shown(wanted: Any) -> str:
    if get_origin(wanted) is Literal:
        return "one of " + ", ".join(str(a) for a in get_args(wanted))
    return {bool: "true or false", NoneType: "none"}.get(wanted, getattr(wanted, "__name__", str(wanted)))

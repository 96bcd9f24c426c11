"""Replace slots and fields of parts by dotted name, as the command line and configuration files do."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

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
    if not dataclasses.is_dataclass(part):
        return {}
    hidden = set(getattr(part, "state", ()))
    return {f.name: f.type for f in dataclasses.fields(part) if f.init and f.name not in hidden}


def coerce(value: Any, annotation: Any, key: str) -> Any:
    """A command-line string as the type of the field; other values pass unchanged.

    Raises UsageError naming the option and the value when it cannot be read.
    """
    if not isinstance(value, str):
        if isinstance(value, int) and not isinstance(value, bool) and "float" in str(annotation):
            return float(value)
        return value
    wanted = str(annotation)
    if "None" in wanted and value.lower() in ("none", "null"):
        return None
    try:
        if "bool" in wanted:
            return {"true": True, "false": False, "1": True, "0": False}[value.lower()]
        if "Mapping" in wanted or "dict" in wanted:
            return {k: float(v) for k, v in (item.split("=") for item in value.split(","))}
        if "float" in wanted:
            return float(value)
        if "int" in wanted:
            return int(value)
    except (KeyError, ValueError):
        raise UsageError(f"--{key} expects {wanted}, got {value!r}") from None
    return value

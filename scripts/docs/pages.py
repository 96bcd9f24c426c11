"""Pages written from the registry: one per method, an index of methods by family, one per slot with its parts."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from polopt.cli.catalog import first_line, made_by, name_of, part_rows
from polopt.cli.main import COMMANDS
from polopt.core.method import Method, Schedule
from polopt.core.part import SLOTS, Slot, declared, flatten, named_parts
from polopt.methods import methods
from scripts.docs.prose import anchor, code, docstring, table, text

ROOT = Path(__file__).parents[2]
LEDGER = ROOT / "claims" / "ledger.jsonl"
FLOW: Mapping[str, str] = {
    "curriculum": "which prompts, and how many rollouts each",
    "rollout": "trajectories from the policy, an environment or a dataset",
    "reward": "what a method changes about the task's reward",
    "filter": "which trajectories train",
    "advantage": "credit of each trajectory or step",
    "weight": "weight of each step in the objective",
    "objective": "loss of each step, trajectory or group",
    "regularizer": "a loss that is added to the objective's",
    "aggregation": "from a loss per step to one number",
    "controller": "fields of parts that change while training",
    "models": "frozen models and when they are refreshed",
    "update": "from the gradient to the weights",
    "schedule": "epochs and minibatches per rollout",
}

EVIDENCE = (
    *(
        "claim",
        "reason",
        "world",
        "baseline",
        "metric",
        "direction",
        "margin",
        "treatment",
        "control",
        "effect",
        "interval",
    ),
    *("seeds", "seconds", "date", "commit"),
)
"""Fields of an entry of the ledger, in the order in which they are shown."""


def read_ledger(path: Path = LEDGER) -> dict[str, list[dict[str, Any]]]:
    """Entries of the ledger of claims by slug, in their order; nothing where there is no ledger."""
    found: dict[str, list[dict[str, Any]]] = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.strip():
                entry = json.loads(line)
                found.setdefault(str(entry["slug"]), []).append(entry)
    return found


def families() -> dict[str, list[Method]]:
    """Methods by family; the base methods first."""
    grouped: dict[str, list[Method]] = {}
    for method in sorted(methods().values(), key=lambda m: (m.family != "base", m.family, m.slug)):
        if method.family != "user":
            grouped.setdefault(method.family, []).append(method)
    return grouped


# --- methods --------------------------------------------------------------------------------------------------------


def methods_index() -> str:
    """Every method by family, with the parts that make it."""
    grouped = families()
    count = sum(map(len, grouped.values()))
    lines = [
        "# Methods",
        f"{count} methods. Any slot of any of them takes the part of another: `polopt train METHOD --SLOT PART`. "
        "The [parts](../parts/index.md) have pages of their own, and so has [writing a method](../methods.md).",
    ]
    for family, members in grouped.items():
        rows = [
            [
                f"[{text(name_of(m))}]({m.slug}.md)<br>{code(m.slug)}",
                text(m.paper),
                *(_links(slot, getattr(m, slot)) for slot in ("advantage", "objective", "aggregation")),
            ]
            for m in members
        ]
        about = first_line(_module(f"polopt.methods.{family.replace('-', '_')}"))
        lines += [f"## {family.replace('-', ' ').capitalize()}", text(about)] if about else [f"## {family}"]
        lines.append(table(["method", "paper", "advantage", "objective", "aggregation"], rows))
    return "\n\n".join(lines) + "\n"


def _module(name: str) -> Any:
    return __import__(name, fromlist=["_"])


def _links(slot: str, value: Any) -> str:
    names = list(value) if isinstance(value, Mapping) else [_name(member) for member in flatten(value)]
    return " + ".join(_part_link(slot, name) for name in names) or "-"


def _name(part: Any) -> str:
    return str(getattr(part, "name", "") or getattr(part, "__name__", type(part).__name__))


def _part_link(slot: str, name: str) -> str:
    known = named_parts(slot)  # type: ignore[arg-type]
    return f"[{code(name)}](../parts/{slot}.md#{anchor(name)})" if name in known else code(name)


def method_page(method: Method, claims: Sequence[Mapping[str, Any]], figure: str, source: str) -> str:
    """Citation, equations, slots, what the method asks for, diagnosis, evidence, source.

    ``figure`` is the Markdown of its section; ``source`` the path of the method's file below the repository.
    """
    title, _, rest = method.doc.strip().partition("\n")
    name = name_of(method)
    empty = [slot for slot in SLOTS if slot not in method.slots()]
    facts = [
        ["slug", code(method.slug)],
        ["family", code(method.family)],
        ["paper", text(method.paper)],
        ["needs", _codes(method.needs)],
        ["evaluates", _codes(method.evaluates)],
        ["unit", code(method.unit)],
        ["task", code(method.task or "any")],
        ["empty slots", _codes(empty)],
    ]
    body = docstring(rest)
    lines = [
        f"# {text(name)}",
        text(_sentence(title.removeprefix(name).removeprefix(":").strip())),
        f"```bash\npolopt train {method.slug}\npolopt show {method.slug}\n```",
        "## Equations",
        body or "The equations are those of its parts.",
        "## Slots",
        "In the order of the flow; every option is one of `polopt train` and may be set in a configuration file.",
        table(["slot", "part", "option", "default"], _slot_rows(method)),
        "## What it asks for",
        "*Needs* are columns of the rollout, computed because a part names them; *evaluates* are functionals of the "
        "current policy with gradient; the *unit* is how far the loss of one step reaches "
        "([concepts](../concepts.md#units-and-the-exact-update)).",
        table(["", ""], facts),
        "## Diagnosis",
        figure,
        "## Claim and evidence",
        _evidence(method, claims),
        "## Source",
        f"[`{source}`](../source/{Path(source).name}), whole:",
        f"```python\n{(ROOT / source).read_text(encoding='utf-8').rstrip()}\n```",
    ]
    return "\n\n".join(lines) + "\n"


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:]


def _slot_rows(method: Method) -> list[list[str]]:
    rows = []
    for slot, value in method.slots().items():
        for index, (name, part, options) in enumerate(part_rows(slot, value)):
            shown = f"[{code(slot)}](../parts/{slot}.md)" if index == 0 else ""
            put = _part_link(slot, name)
            if isinstance(value, Mapping):
                put = f"{code(name)}: {_part_link(slot, _name(part))}"
            names, defaults = ("<br>".join(map(code, map(str, column))) for column in (options, options.values()))
            rows.append([shown, put, names, defaults])
    return rows


def _codes(names: Any) -> str:
    return ", ".join(code(name) for name in (sorted(names) if isinstance(names, frozenset) else names)) or "nothing"


def figure_section(method: Method, picture: str | None, why: str, command: str) -> str:
    """The figure with the command that drew it, or the reason for its absence."""
    if picture is None:
        return f"No figure: {text(why)}"
    return (
        f"`{command}` measures the method's first update where every expectation is a finite sum; "
        f"[diagnosing](../diagnose.md) explains every panel.\n\n![diagnosis of {method.slug}]({picture})"
    )


def _evidence(method: Method, claims: Sequence[Mapping[str, Any]]) -> str:
    if not claims:
        writes = f"; `polopt claim {method.slug}` writes one" if "claim" in COMMANDS else ""
        return f"The ledger has no entry of this method yet{writes}."
    made = []
    for entry in claims:
        head = f"**{text(str(entry.get('verdict', 'no verdict')))}**: {text(str(entry.get('statement', '')))}"
        rows = [[key, _value(entry[key])] for key in EVIDENCE if entry.get(key) not in (None, "", [None, None])]
        again = entry.get("command") or f"polopt claim {method.slug}"
        made.append(f"{head}\n\n{table(['', ''], rows)}\n\n```bash\n{again}\n```")
    return "\n\n".join([*made, "[Claims](../claims.md) says how a verdict is reached."])


def _value(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(_value(item) for item in value)
    if isinstance(value, dict):
        return "; ".join(f"{text(str(key))} {_value(item)}" for key, item in value.items())
    return text(str(value))


def source_of(method: Method) -> str:
    """The method's file below the repository."""
    return f"polopt/methods/{method.family.replace('-', '_')}/{method.slug.replace('-', '_')}.py"


# --- parts ----------------------------------------------------------------------------------------------------------


def parts_index() -> str:
    """The slots in the order of the flow, with their parts."""
    methods()
    rows = [
        [
            f"[{code(slot)}]({slot}.md)",
            FLOW[slot],
            ", ".join(f"[{code(n)}]({slot}.md#{anchor(n)})" for n in names) or "-",
        ]
        for slot in SLOTS
        for names in [sorted(named_parts(slot))]
    ]
    return (
        "# Parts\n\n`polopt train METHOD --SLOT PART` puts a part into a slot, `--SLOT none` empties it, and "
        "`--SLOT METHOD` takes what another method has there.\n\n" + table(["slot", "what it decides", "parts"], rows)
    ) + "\n"


def slot_page(slot: Slot) -> str:
    """The parts of a slot: docstring, options, declarations, and the methods that have them."""
    users = _users(slot)
    lines = [f"# {slot.capitalize()}", f"{FLOW[slot].capitalize()}."]
    if slot == "schedule":
        lines += [docstring(inspect.getdoc(Schedule) or ""), _options(slot, Schedule)]
    elif not named_parts(slot):
        lines.append("No part of this slot has a name yet.")
    for name, make in sorted(named_parts(slot).items()):
        lines += [f"## {name}", docstring(inspect.getdoc(make) or ""), *_declarations(slot, name, make)]
        if used := users.get(name):
            lines.append("Used by " + ", ".join(f"[{text(name_of(m))}](../methods/{m.slug}.md)" for m in used) + ".")
    return "\n\n".join(line for line in lines if line) + "\n"


def _users(slot: Slot) -> dict[str, list[Method]]:
    found: dict[str, list[Method]] = {}
    for method in (m for members in families().values() for m in members):
        value = getattr(method, slot)
        for member in value.values() if isinstance(value, Mapping) else flatten(value):
            found.setdefault(_name(member), []).append(method)
    return found


def _declarations(slot: Slot, name: str, make: Any) -> list[str]:
    made = made_by(make)
    lines = [_options(slot, make)] if dataclasses.is_dataclass(make) else []
    labels: tuple[Literal["needs", "gives", "evaluates"], ...] = ("needs", "gives", "evaluates")
    facts = [f"{label} {_codes(declared(made, label))}" for label in labels if declared(made, label)]
    if slot in ("objective", "regularizer", "aggregation"):
        facts.append(f"unit {code(getattr(make, 'unit', 'step'))}")
    if vanishes := getattr(make, "vanishes_with", None):
        facts.append(f"vanishes with {code(vanishes)}")
    if state := getattr(make, "state", ()):
        facts.append(f"state {_codes(state)}")
    where = _where(make)
    return [*lines, "; ".join([f"`--{slot} {name}`", *facts, *([f"defined in {code(where)}"] if where else [])]) + "."]


def _options(slot: Slot, make: Any) -> str:
    rows = [
        [code(f"--{slot}.{field.name.replace('_', '-')}"), code(_kind(field)), _default(field)]
        for field in dataclasses.fields(make)
        if field.init and field.name not in getattr(make, "state", ())
    ]
    return table(["option", "type", "default"], rows) if rows else ""


def _where(make: Any) -> str:
    file = inspect.getsourcefile(make)
    return str(Path(file).relative_to(ROOT)) if file and Path(file).is_relative_to(ROOT) else ""


def _kind(field: dataclasses.Field[Any]) -> str:
    kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
    return kind.replace('"', "'")


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return code(str(field.default))
    return code(str(field.default_factory())) if field.default_factory is not dataclasses.MISSING else "required"

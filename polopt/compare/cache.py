"""Results of runs on disk, under a key made of everything that determines them.

The key has two halves. The first is what the user chose: the world, the resolved settings, the method's parts with
every field, the budget, the seed, and the content of the files that are read (initial policy, data, rewards). The
second is the code: the source (without comments) of every module of polopt that the run imports, the modules of the
method's own parts among them, and the versions of the libraries that compute. Adding a method changes neither for the
others; changing a part that a method uses, or the trainer, changes the second, so that a stale result is never taken
for a fresh one.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import polopt
from polopt.assets import base_policy_path
from polopt.compare.plan import Job, plain
from polopt.core.method import Method
from polopt.core.part import flatten, settings
from polopt.tasks.registry import get_task

ROOT: Final = Path(str(polopt.__path__[0]))
ENTRY: Final = "polopt.compare.runs"
LISTS: Final = frozenset({"polopt.tasks.registry", "polopt.methods", "polopt.compare.plan"})
"""Modules that list what there is; what a run uses of it is hashed by itself."""
SILENT: Final = frozenset(
    {
        "polopt.training.report",
        "polopt.training.progress",
        "polopt.training.profile",
        "polopt.training.tracking",
        "polopt.training.checkpoint",
    }
)
"""Modules that a run imports but whose code cannot change its result."""
LIBRARIES: Final = ("torch", "transformers", "tokenizers", "peft", "numpy")


@dataclasses.dataclass(frozen=True)
class Key:
    """``choice`` hashes what the user chose, ``code`` what computes it."""

    choice: str
    code: str

    @property
    def name(self) -> str:
        """Of the result's file."""
        return f"{self.choice}-{self.code}.json"


def key_of(job: Job) -> Key:
    """The key of a run's result."""
    config = job.config
    # The method is its parts, whatever it is called.
    chosen = {name: value for name, value in job.settings.items() if name not in ("method", "slots")}
    content = {
        "world": {**plain(job.world), "label": None},
        "settings": chosen,
        "parts": {str(slot): described(value) for slot, value in job.method.slots().items()},
        "points": job.points,
        "tuning": job.tuning,
        "files": {path: _hash_path(Path(path)) for path in _files(job)},
    }
    if config.seconds is not None:
        # What fits into a second depends on the machine and on what else it does.
        content["machine"] = [platform.machine(), platform.processor(), platform.node(), os.cpu_count()]
    return Key(_digest(content)[:32], code_version(job)[:16])


def code_version(job: Job) -> str:
    """Hash of the sources and libraries that a run of the job computes with."""
    modules = {ENTRY, *_part_modules(job.method)}
    if job.world.task is not None:
        modules.add(type(get_task(job.world.task)).__module__)
    sources = {name: _hash_code(path) for name, path in sorted(_closure(frozenset(modules)).items())}
    libraries = {"python": platform.python_version(), **{name: _version(name) for name in LIBRARIES}}
    return _digest({"sources": sources, "libraries": libraries})


def described(value: Any) -> Any:
    """A part, composite or function as plain data: where its class lives, and every field."""
    if isinstance(value, Mapping):
        return {str(name): described(inner) for name, inner in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        members = flatten(value)
        fields = (
            {"parts": [described(member) for member in members]}
            if members != (value,)
            else {name: described(inner) for name, inner in settings(value).items()}
        )
        return {"class": f"{type(value).__module__}.{type(value).__qualname__}", **fields}
    if isinstance(value, list | tuple):
        return [described(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return repr(value)


class Cache:
    """A folder of results. With ``any_version`` a result of other code is taken where there is none of this code."""

    def __init__(self, folder: Path, *, any_version: bool = False) -> None:
        self.folder, self.any_version = folder, any_version

    def get(self, key: Key) -> dict[str, Any] | None:
        """The result under a key, or None. A file that cannot be read counts as none."""
        paths = [self.folder / key.name]
        if self.any_version:
            others = self.folder.glob(f"{key.choice}-*.json")
            paths += sorted(others, key=lambda path: path.stat().st_mtime, reverse=True)
        for path in paths:
            try:
                found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
                result: dict[str, Any] = found["result"]
            except (OSError, ValueError, KeyError, TypeError):
                continue
            return result
        return None

    def put(self, key: Key, job: Job, result: Mapping[str, Any]) -> None:
        """Keep a result, whole or not at all, however the process ends."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"job": plain(job), "code": key.code, "result": result})
        handle, temporary = tempfile.mkstemp(dir=self.folder, prefix=".", suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            Path(temporary).replace(self.folder / key.name)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def default_folder() -> Path:
    """``$XDG_CACHE_HOME/polopt/compare``, by default in ``~/.cache``."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "polopt" / "compare"


# --- content ------------------------------------------------------------------------------------------------------


def _files(job: Job) -> Iterable[str]:
    """Files and folders that the run reads; names on the hub are left to their name."""
    config = job.config
    named = [config.data, config.eval_data]
    if not job.world.exact:
        named.append(config.model or str(base_policy_path()))
    named += [spec.rpartition(":")[0] for spec in config.reward if ":" in spec]
    return [name for name in named if name and Path(name).exists()]


@cache
def _hash_path(path: Path) -> str:
    if path.is_file():
        return _hash_file(path)
    inside = sorted(inner for inner in path.rglob("*") if inner.is_file())
    return _digest([[str(inner.relative_to(path)), _hash_file(inner)] for inner in inside])


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


# --- code ---------------------------------------------------------------------------------------------------------


def _part_modules(method: Method) -> set[str]:
    """Modules of the classes of every part, with their bases, and of parts that are functions."""
    found: set[str] = set()
    for value in method.slots().values():
        for member in value.values() if isinstance(value, Mapping) else flatten(value):
            owner = member if hasattr(member, "__qualname__") else type(member)
            found |= {base.__module__ for base in getattr(owner, "__mro__", (owner,))}
    return {name for name in found if _source(name) is not None}


@cache
def _closure(modules: frozenset[str]) -> Mapping[str, Path]:
    """The modules of polopt that these import, directly or not, with their files."""
    found: dict[str, Path] = {}
    waiting = sorted(modules)
    while waiting:
        name = waiting.pop()
        path = _source(name)
        if name in found or path is None or name in LISTS or name in SILENT:
            continue
        found[name] = path
        waiting += _imports(path)
    return found


@cache
def _hash_code(path: Path) -> str:
    """Hash of what a file does: comments, docstrings and layout left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            # A string by itself, wherever it stands, is documentation.
            node.body = [  # type: ignore[attr-defined]
                line
                for line in body
                if not (isinstance(line, ast.Expr) and isinstance(getattr(line.value, "value", None), str))
            ]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


@cache
def _imports(path: Path) -> tuple[str, ...]:
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return tuple(name for name in found if name.startswith("polopt."))


@cache
def _source(name: str) -> Path | None:
    """The file of a module of polopt, or of a method that the user wrote."""
    if name.startswith("polopt."):
        place = ROOT.joinpath(*name.split(".")[1:])
        for path in (place.with_suffix(".py"), place / "__init__.py"):
            if path.is_file():
                return path
        return None
    file = str(getattr(sys.modules.get(name), "__file__", None) or "")
    # Only a user's own file: libraries go by version.
    library = "site-packages" in file or name.partition(".")[0] in sys.stdlib_module_names
    return Path(file) if file and not library else None

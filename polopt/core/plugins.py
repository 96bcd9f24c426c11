"""A user's own code: a file, or a function from ``path/to/file.py:function`` or ``package.module:function``."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from polopt.core.errors import UsageError


def load_object(spec: str, what: str, *, unknown: str = "") -> Callable[..., Any]:
    """The function that ``spec`` names; its file or module is executed, so it must be the user's own.

    ``what`` says in errors what it is wanted for, ``unknown`` replaces the error for a module that does not exist (a
    misspelt built-in name, most often). Raises UsageError where nothing callable can be loaded.
    """
    place, colon, name = spec.rpartition(":")
    unknown = unknown or f"there is no module {place!r} to load the {what} {spec!r} from"
    if not colon or not place or not name.isidentifier():
        raise UsageError(unknown)
    is_file = place.endswith(".py") or "/" in place or "\\" in place
    module = load_file(place, what) if is_file else _import(place, what, unknown)
    found = getattr(module, name, None)
    if not callable(found):
        kind = "nothing" if found is None else f"a value of type {type(found).__name__}"
        raise UsageError(f"{place!r} has {kind} under the name {name!r}, not a function ({what} {spec!r})")
    return cast(Callable[..., Any], found)


def load_file(place: str, what: str) -> ModuleType:
    """The file as a module; it is executed once, so it must be the user's own.

    ``what`` says in errors what it is wanted for. Raises UsageError where there is no such file or it fails.
    """
    path = Path(place).expanduser().resolve()
    if not path.is_file():
        raise UsageError(f"there is no file {place!r} to load a {what} from")
    # A name of its own, the same in every process: a user's `random.py` must not stand in for the module everything
    # else imports.
    name = f"polopt_user_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    specification = importlib.util.spec_from_file_location(name, path)
    if specification is None or specification.loader is None:
        raise UsageError(f"{place!r} is not a Python file; a {what}'s file ends in .py")
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module
    # The user's folder is left as it was.
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        specification.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UsageError(f"{what} file {place!r} fails to load: {type(error).__name__}: {error}") from error
    finally:
        sys.dont_write_bytecode = before
    return module


def _import(place: str, what: str, unknown: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name and place.startswith(error.name)
        if missing or not all(part.isidentifier() for part in place.split(".")):
            raise UsageError(unknown) from error
        raise UsageError(f"{what} module {place!r} fails to load: {type(error).__name__}: {error}") from error

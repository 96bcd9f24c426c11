"""One file per paper, by family. Importing every file, and every shared part, fills the registry."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache

from polopt.core.errors import UsageError
from polopt.core.method import Method
from polopt.core.part import suggest
from polopt.core.plugins import load_file
from polopt.core.registry import USER, registered

PARTS = (
    "advantages",
    "aggregations",
    "controllers",
    "curricula",
    "filters",
    "models",
    "objectives",
    "regularizers",
    "rewards",
    "rollouts",
    "updates",
    "weights",
)
"""The rooms of parts that three or more methods share."""


@cache
def _import_all() -> None:
    for room in ("methods", *PARTS):
        package = importlib.import_module(f"polopt.{room}")
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(info.name)


def methods() -> Mapping[str, Method]:
    """Every method by its slug."""
    _import_all()
    return registered()


def get_method(slug: str) -> Method:
    """The method called ``slug``, or the last one that a file of the user's own defines (``path/to/file.py``).

    Raises UsageError with the nearest names when there is none, and for a file without a method.
    """
    known = methods()
    if slug.endswith(".py"):
        return _method_of(slug)
    if slug not in known:
        raise UsageError(
            f"unknown method {slug!r}; {suggest(slug, known)} `polopt methods` lists all {len(known)}; your own is "
            f"path/to/file.py"
        )
    return known[slug]


def _method_of(place: str) -> Method:
    made = [value for value in vars(load_file(place, "method")).values() if isinstance(value, Method)]
    # What it imports comes first, and belongs to a family of polopt.
    own = [value for value in made if value.family == USER]
    if not own:
        raise UsageError(f"{place!r} defines no method: end it with NAME = method(SLUG, BASE, SLOT=part, ...)")
    return own[-1]

"""One file per paper, by family. Importing every file, and every shared part, fills the registry."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache

from polopt.core.errors import UsageError
from polopt.core.method import Method
from polopt.core.part import suggest
from polopt.core.registry import registered

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
    """The method called ``slug``.

    Raises UsageError with the nearest names when there is none.
    """
    known = methods()
    if slug not in known:
        raise UsageError(f"unknown method {slug!r}; {suggest(slug, known)} `polopt methods` lists all {len(known)}")
    return known[slug]

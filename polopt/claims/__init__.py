"""The executable claim of every paper, mirrored on `polopt.methods`, and the ledger of their verdicts."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from functools import cache
from types import ModuleType

from polopt.claims.claim import Claim
from polopt.claims.study import Study
from polopt.core.errors import UsageError
from polopt.core.part import suggest


@cache
def claims() -> Mapping[str, tuple[Claim, ...]]:
    """The claims of every paper by the slug of its method, from the tuple ``CLAIMS`` of each file.

    Raises ValueError when a file is not named after the slug of its claims, or two of its claims share a name.
    """
    found: dict[str, tuple[Claim, ...]] = {}
    for slug, module in _modules():
        declared: tuple[Claim, ...] = module.CLAIMS
        for claim in declared:
            if claim.slug != slug:
                raise ValueError(f"{module.__name__} holds claim {claim.name!r} of {claim.slug!r}, not of {slug!r}")
        if len({claim.name for claim in declared}) < len(declared):
            raise ValueError(f"two claims of {module.__name__} have the same name")
        found[slug] = declared
    return dict(sorted(found.items()))


@cache
def studies() -> Mapping[str, Study]:
    """The comparisons that papers are about, by the slug of their recipe: ``STUDY`` of the file of their claims."""
    return dict(sorted((slug, module.STUDY) for slug, module in _modules() if hasattr(module, "STUDY")))


def _modules() -> Iterator[tuple[str, ModuleType]]:
    """The file of every paper with the slug after which it is named."""
    for family in pkgutil.iter_modules(__path__, f"{__name__}."):
        if not family.ispkg:
            continue
        package = importlib.import_module(family.name)
        for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            yield info.name.rpartition(".")[2].replace("_", "-"), importlib.import_module(info.name)


def claims_of(slug: str) -> tuple[Claim, ...]:
    """The claims of one paper.

    Raises UsageError with the nearest names when there is none.
    """
    known = claims()
    if slug not in known:
        raise UsageError(f"there is no claim of {slug!r}; {suggest(slug, known)}")
    return known[slug]


def study_of(slug: str) -> Study:
    """The study of one paper.

    Raises UsageError with those that there are when there is none.
    """
    known = studies()
    if slug not in known:
        raise UsageError(f"there is no study {slug!r}; there are {', '.join(known)}")
    return known[slug]


def module_of(slug: str) -> str:
    """The name of the module whose docstring is the design of a paper's claims."""
    return next(module.__name__ for found, module in _modules() if found == slug)

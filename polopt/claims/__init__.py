"""The executable claim of every paper, mirrored on `polopt.methods`, and the ledger of their verdicts."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache

from polopt.claims.claim import Claim
from polopt.core.errors import UsageError
from polopt.core.part import suggest


@cache
def claims() -> Mapping[str, tuple[Claim, ...]]:
    """The claims of every paper by the slug of its method, from the tuple ``CLAIMS`` of each file.

    Raises ValueError when a file is not named after the slug of its claims, or two of its claims share a name.
    """
    found: dict[str, tuple[Claim, ...]] = {}
    for family in pkgutil.iter_modules(__path__, f"{__name__}."):
        if not family.ispkg:
            continue
        package = importlib.import_module(family.name)
        for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            declared: tuple[Claim, ...] = importlib.import_module(info.name).CLAIMS
            slug = info.name.rpartition(".")[2].replace("_", "-")
            for claim in declared:
                if claim.slug != slug:
                    raise ValueError(f"{info.name} holds claim {claim.name!r} of {claim.slug!r}, not of {slug!r}")
            if len({claim.name for claim in declared}) < len(declared):
                raise ValueError(f"two claims of {info.name} have the same name")
            found[slug] = declared
    return dict(sorted(found.items()))


def claims_of(slug: str) -> tuple[Claim, ...]:
    """The claims of one paper.

    Raises UsageError with the nearest names when there is none.
    """
    known = claims()
    if slug not in known:
        raise UsageError(f"there is no claim of {slug!r}; {suggest(slug, known)}")
    return known[slug]

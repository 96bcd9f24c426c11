"""The run-time type checker behind the import hook of `conftest`."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

# Self needs the class, and the protocols are checked by what calls them: tests hand in stand-ins.
UNCHECKED = re.compile(r"\b(Self|Payload|Policy|Step)\b")


def typechecked(function: Callable[..., Any]) -> Callable[..., Any]:
    """beartype for a function's annotations, but for those that it cannot check on a method by itself."""
    hints = getattr(function, "__annotations__", {})
    function.__annotations__ = {name: hint for name, hint in hints.items() if not UNCHECKED.search(str(hint))}
    # An int where a float is expected is fine, as it is for mypy.
    return beartype(conf=BeartypeConf(is_pep484_tower=True))(function)

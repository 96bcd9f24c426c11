"""Environments by name: one line each, and a user's own from a file or module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from polopt.core.environment import Environment
from polopt.core.errors import UsageError
from polopt.core.plugins import load_object
from polopt.rollouts.calculator import Calculator

ENVIRONMENTS: Mapping[str, Callable[[], Environment]] = MappingProxyType({"calculator": Calculator})


def get_environment(given: str | Environment) -> Environment:
    """The environment of a name, or what the function ``path/to/file.py:function`` (``module:function``) returns.

    Raises UsageError for an unknown name, or something that is no environment.
    """
    if not isinstance(given, str):
        return given
    make = ENVIRONMENTS.get(given)
    if make is None:
        if ":" not in given:
            raise UsageError(
                f"there is no environment {given!r}; built in are {', '.join(sorted(ENVIRONMENTS))}, and your own is "
                f"path/to/file.py:function or package.module:function"
            )
        make = load_object(given, "environment")
    made = make()
    if not (callable(getattr(made, "reply", None)) and getattr(made, "stop", None)):
        raise UsageError(f"{given!r} returns a {type(made).__name__}, which lacks `reply` or `stop`")
    return made

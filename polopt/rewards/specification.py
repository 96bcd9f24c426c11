"""From ``--reward`` on the command line to a reward: ``NAME[:ARGUMENT][@WEIGHT]`` or ``FILE_OR_MODULE:FUNCTION``."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from polopt.core.errors import UsageError
from polopt.rewards.reward import NamedReward, RewardFunction
from polopt.rewards.shape import formatted, length
from polopt.rewards.verifiers import exact_match, matches, math_verify

RewardFactory = Callable[[str | None], RewardFunction]
"""Makes a reward function from the argument after the colon, None if there is none."""

REWARDS: dict[str, RewardFactory] = {
    "exact-match": exact_match,
    "math-verify": math_verify,
    "regex": matches,
    "format": formatted,
    "length": length,
}


def parse_reward(spec: str) -> NamedReward:
    """A reward from its specification.

    ``math-verify``, ``length:200@0.1`` and ``regex:^Yes`` are built in (``REWARDS``); their name is the specification
    without the weight. ``my/rewards.py:concise@0.5`` and ``package.module:concise`` are a function of the user's own
    with TRL's signature, named after the function; the file or module is executed. The weight is a number after the
    last ``@``, 1 by default; a pattern that itself ends in ``@5`` needs a weight after it.

    Raises:
        UsageError: an unknown name, a bad argument or weight, or a function that cannot be loaded.
    """
    body, weight = _split_weight(spec)
    name, colon, argument = body.partition(":")
    if name in REWARDS:
        if colon and not argument:
            raise UsageError(f"reward {spec!r} has a colon but no argument")
        return NamedReward(body, REWARDS[name](argument if colon else None), weight)
    place, colon, function_name = body.rpartition(":")
    if not colon or not place or not function_name.isidentifier():
        raise UsageError(_unknown(body))
    is_file = place.endswith(".py") or "/" in place or "\\" in place
    module = _load_file(place) if is_file else _import(place, body)
    function = getattr(module, function_name, None)
    if not callable(function):
        what = "nothing" if function is None else f"a value of type {type(function).__name__}"
        raise UsageError(f"{place!r} has {what} under the name {function_name!r}, not a function (reward {spec!r})")
    return NamedReward(function_name, function, weight)


def _split_weight(spec: str) -> tuple[str, float]:
    body, at, text = spec.rpartition("@")
    if not at:
        return spec, 1.0
    try:
        weight = float(text)
    except ValueError:
        name, colon, _ = spec.partition(":")
        if colon and name in REWARDS:  # an "@" of the argument
            return spec, 1.0
        raise UsageError(f"the weight {text!r} of reward {spec!r} is not a number") from None
    if not math.isfinite(weight):
        raise UsageError(f"the weight of reward {spec!r} must be a finite number")
    return body, weight


def _unknown(name: str) -> str:
    return (
        f"there is no reward {name!r}; built in are {', '.join(sorted(REWARDS))}, "
        "and your own is path/to/file.py:function or package.module:function"
    )


def _load_file(place: str) -> ModuleType:
    path = Path(place).expanduser().resolve()
    if not path.is_file():
        raise UsageError(f"there is no file {place!r} to load a reward from")
    # A name of its own: a user's `random.py` must not stand in for the module everything else imports.
    name = f"polopt_user_rewards_{path.stem}_{abs(hash(str(path))):x}"
    if name in sys.modules:
        return sys.modules[name]
    specification = importlib.util.spec_from_file_location(name, path)
    if specification is None or specification.loader is None:
        raise UsageError(f"{place!r} is not a Python file; a reward's file ends in .py")
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module
    try:
        specification.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UsageError(f"reward file {place!r} fails to load: {type(error).__name__}: {error}") from error
    return module


def _import(place: str, body: str) -> Any:
    try:
        return importlib.import_module(place)
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name and place.startswith(error.name)
        if missing or not all(part.isidentifier() for part in place.split(".")):
            raise UsageError(_unknown(body)) from error
        raise UsageError(f"reward module {place!r} fails to load: {type(error).__name__}: {error}") from error

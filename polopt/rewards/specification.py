"""From ``--reward`` on the command line to a reward: ``NAME[:ARGUMENT][@WEIGHT]`` or ``FILE_OR_MODULE:FUNCTION``."""

from __future__ import annotations

import math
from collections.abc import Callable

from polopt.core.errors import UsageError
from polopt.core.plugins import load_object
from polopt.rewards.models import ModelReward, model_reward
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
    "model": model_reward,
}


def parse_reward(spec: str, *, device: str = "auto") -> NamedReward:
    """A reward from its specification; models are put on the device.

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
        made = REWARDS[name](argument if colon else None)
        if isinstance(made, ModelReward):
            made.to(device)
        return NamedReward(body, made, weight)
    if not colon:
        raise UsageError(_unknown(body))
    function = load_object(body, "reward", unknown=_unknown(body))
    return NamedReward(body.rpartition(":")[2], function, weight)


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

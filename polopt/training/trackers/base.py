"""What every tracker agrees on."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

from polopt.core.errors import UsageError
from polopt.training.metrics_names import SECONDS, STEP_TIME, TOKENS_PER_SECOND

# Metrics that differ between two runs of one seed. They go to a file of their own, so that the rest is reproducible.
CLOCK_KEYS: Final[tuple[str, ...]] = (STEP_TIME, SECONDS, TOKENS_PER_SECOND)
CLOCK_PREFIXES: Final[tuple[str, ...]] = ("time/", "memory/")

Rows = Sequence[Mapping[str, Any]]


class Tracker(Protocol):
    """Receives the metrics of one run.

    `start` comes first. To go on with an earlier run: `start(config, resume=True)`, then `load_state_dict` with the
    state in the checkpoint; without a state the run begins again at its first step.
    """

    def start(self, config: Mapping[str, Any], resume: bool) -> None:
        """Begin. `config` is the run's settings; values that look secret are never recorded."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record scalars of `step`; steps do not decrease."""

    def text(self, step: int, name: str, rows: Rows) -> None:
        """Record a small table, such as sampled completions."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """End, with final figures."""

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on exactly here; everything logged so far is on disk afterwards."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; what was logged after it is dropped where the service allows."""


def is_clock(name: str) -> bool:
    """Whether a metric measures the machine (time, speed, memory) rather than the run."""
    return name.removeprefix("eval/") in CLOCK_KEYS or name.startswith(CLOCK_PREFIXES)


def require(module: str, package: str, extra: str) -> Any:
    """Import an optional module, or say how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"tracker {extra!r} needs the package {package}: install polopt[{extra}], or run without this tracker"
        ) from error


_SECRET_KEY = re.compile(
    r"(^|[_\-.])(api[_-]?key|access[_-]?key|private[_-]?key|secret([_-]?key)?|password|passwd|credentials?|"
    r"authorization|(?<!eos_)(?<!bos_)(?<!pad_)(?<!unk_)(?<!sep_)(?<!cls_)(?<!mask_)token)$",
    re.IGNORECASE,
)
_SECRET_VALUE = re.compile(
    r"\b(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_\-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[A-Z0-9]{16})\b|(?<=://)[^/\s:@]*:[^/\s@]+(?=@)"
)
REDACTED: Final = "[redacted]"


def redact(value: Any, key: str = "") -> Any:
    """A copy of a configuration as plain dicts, lists and scalars, without what looks like a secret.

    Redacted are string values under keys such as `api_key`, `password` or `hf_token`, and anything inside a string
    that has the form of a known access token or of `user:password@` in a URL.
    """
    if isinstance(value, Mapping):
        return {str(name): redact(item, str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [redact(item, key) for item in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    if _SECRET_KEY.search(key):
        return REDACTED
    return _SECRET_VALUE.sub(REDACTED, str(value))


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level with dotted names."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat

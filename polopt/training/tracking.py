"""Tracking of a run: always lines of JSON in its folder, and any number of other trackers.

    trackers = make_trackers(["tensorboard"], run)
    trackers.start(config, resume=False)
    trackers.log(step, {"reward": 0.4, "entropy": 1.2, "step_time": 0.9})
    state = trackers.state_dict()               # belongs into the checkpoint
    trackers.finish({"accuracy": 0.8})

Metric names are in `polopt.training.metrics_names`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from polopt.core.errors import UsageError
from polopt.training.trackers.base import CLOCK_KEYS, CLOCK_PREFIXES, REDACTED, Rows, Tracker, is_clock, redact
from polopt.training.trackers.hosted import MlflowTracker, TrackioTracker, WandbTracker
from polopt.training.trackers.jsonl import JsonlTracker, read_jsonl
from polopt.training.trackers.tensorboard import TensorBoardTracker

__all__ = [
    "CLOCK_KEYS",
    "CLOCK_PREFIXES",
    "DEFAULT_TRACKERS",
    "REDACTED",
    "TRACKERS",
    "JsonlTracker",
    "Rows",
    "Tracker",
    "Trackers",
    "is_clock",
    "make_trackers",
    "read_jsonl",
    "redact",
]

_JSONL: Final = "jsonl"
TRACKERS: Final[Mapping[str, Callable[[Path], Tracker]]] = {
    _JSONL: JsonlTracker,
    "tensorboard": TensorBoardTracker,
    "wandb": WandbTracker,
    "mlflow": MlflowTracker,
    "trackio": TrackioTracker,
}
DEFAULT_TRACKERS: Final[tuple[str, ...]] = ("tensorboard",)


class Trackers:
    """Several trackers as one.

    `log.jsonl` must work. Any other tracker that fails after the start (a service that cannot be reached) is dropped
    with a warning and the run goes on.
    """

    def __init__(self, trackers: Mapping[str, Tracker]) -> None:
        self._trackers = dict(trackers)

    @property
    def names(self) -> tuple[str, ...]:
        """Trackers still in use."""
        return tuple(self._trackers)

    def start(self, config: Mapping[str, Any], resume: bool) -> None:
        for tracker in self._trackers.values():
            tracker.start(config, resume)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._each(f"at step {step}", lambda tracker: tracker.log(step, metrics))

    def text(self, step: int, name: str, rows: Rows) -> None:
        self._each(f"at step {step}", lambda tracker: tracker.text(step, name, rows))

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._each("at the end", lambda tracker: tracker.finish(summary))

    def state_dict(self) -> dict[str, Any]:
        return {name: tracker.state_dict() for name, tracker in self._trackers.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Trackers added since the checkpoint start empty; those no longer chosen are left out."""
        for name, tracker in self._trackers.items():
            if name in state:
                tracker.load_state_dict(state[name])

    def _each(self, when: str, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                call(tracker)
            except Exception as error:
                if name == _JSONL:
                    raise
                del self._trackers[name]
                reason = f"{type(error).__name__}: {error}"
                warnings.warn(
                    f"tracker {name!r} stopped {when} ({reason}); the run goes on and its log.jsonl is complete",
                    stacklevel=3,
                )


def make_trackers(names: Sequence[str], run: Path) -> Trackers:
    """The trackers called `names` for the run in folder `run`; JSON lines are always among them.

    Raises:
        UsageError: an unknown name, or a tracker whose package is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise UsageError(f"unknown tracker {name!r}; choose from {', '.join(TRACKERS)}")
    return Trackers({name: TRACKERS[name](run) for name in dict.fromkeys((_JSONL, *names))})

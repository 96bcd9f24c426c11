"""Every generated task by its name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from polopt.core.errors import UsageError
from polopt.tasks.arithmetic import Arithmetic
from polopt.tasks.countdown import Countdown
from polopt.tasks.grid import Grid
from polopt.tasks.programs import Programs
from polopt.tasks.task import Task
from polopt.tasks.worksheet import Worksheet


def tasks() -> Mapping[str, Task]:
    """Every task by name; the first one is the default task."""
    found: tuple[Task, ...] = (Arithmetic(), Countdown(), Programs(), Grid(), Worksheet())
    return MappingProxyType({task.name: task for task in found})


def get_task(name: str) -> Task:
    """The task called ``name``. Raises UsageError listing the known names if there is none."""
    known = tasks()
    if name not in known:
        raise UsageError(f"unknown task {name!r}: choose one of {', '.join(known)}")
    return known[name]

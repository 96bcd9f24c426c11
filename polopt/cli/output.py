"""Where commands write: consoles, JSON files, and silence of the libraries below."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from polopt.core.errors import UsageError
from polopt.training.files import write_whole

WIDTH = 120
"""Columns of tables where the output is no terminal."""


def make_console(*, quiet: bool = False, stderr: bool = False) -> Console:
    """A console as wide as the terminal, or of a fixed width where the output goes to a file."""
    console = Console(quiet=quiet, stderr=stderr)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = WIDTH
    return console


def silence_libraries() -> None:
    """Progress bars and notices of the model and data libraries off, where the environment does not say otherwise."""
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "DATASETS_VERBOSITY": "error",
        "HF_HUB_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }.items():
        os.environ.setdefault(name, value)
    # No variable of the environment turns these off.
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def check_json_path(path: str | None) -> None:
    """Raise UsageError now when a result could not be written to ``path`` later."""
    if path is None:
        return
    if Path(path).is_dir():
        raise UsageError(f"--json {path} is a folder; name a file")
    if not Path(path).absolute().parent.is_dir():
        raise UsageError(f"--json {path}: there is no folder {Path(path).parent}")


def write_json(value: Mapping[str, Any], path: str) -> None:
    """Write an object; numbers that JSON lacks (NaN, infinities) become null.

    A file is written whole or not at all; a link or device is written through.
    """
    text = json.dumps(_plain(value), indent=2, allow_nan=False) + "\n"
    target = Path(path)
    # What is not plainly a file is written to and stays: a device, a pipe, or a link, such as /dev/stdout is one.
    if target.is_symlink() or (target.exists() and not target.is_file()):
        target.write_text(text, encoding="utf-8")
        return
    write_whole(target, text)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

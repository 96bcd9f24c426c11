"""The log every run keeps: lines of JSON in the run folder."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Final

from polopt.core.errors import UsageError
from polopt.training.trackers.base import Rows, is_clock, redact

_FILES: Final[Mapping[str, str]] = {"log": "log.jsonl", "timing": "timing.jsonl", "text": "text.jsonl"}


class JsonlTracker:
    """`log.jsonl`, `timing.jsonl`, `text.jsonl` and at the end `summary.json` in the run folder.

    Each line is an object that starts with "step". Metrics of the clock (`is_clock`) go to `timing.jsonl`, so
    `log.jsonl` is a function of the seed: two runs of one seed, or one run killed and resumed any number of times,
    give the same bytes. NaN is null, infinities are the strings "Infinity" and "-Infinity".

    Raises:
        UsageError: starting anew in a folder that already has a log, or a log shorter than the checkpoint says.
    """

    def __init__(self, run: Path) -> None:
        self._run = run
        self._files: dict[str, IO[bytes]] = {}
        self._offsets = dict.fromkeys(_FILES, 0)

    def start(self, config: Mapping[str, Any], resume: bool) -> None:
        self._run.mkdir(parents=True, exist_ok=True)
        log = self._run / _FILES["log"]
        if not resume and log.exists() and log.stat().st_size:
            raise UsageError(f"{log} already holds a run; resume it or choose another folder")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        clock = {name: value for name, value in metrics.items() if is_clock(name)}
        self._write("log", {"step": step} | {k: _number(k, v) for k, v in metrics.items() if k not in clock})
        if clock:
            self._write("timing", {"step": step} | {k: _number(k, v) for k, v in clock.items()})

    def text(self, step: int, name: str, rows: Rows) -> None:
        plain = [{k: _number(k, v) if isinstance(v, float) else v for k, v in row.items()} for row in rows]
        self._write("text", {"step": step, "name": name, "rows": plain})

    def finish(self, summary: Mapping[str, Any]) -> None:
        for name in _FILES:
            self._open(name).close()
        self._files.clear()
        temporary = self._run / ".tmp-summary.json"
        document = {k: _number(k, v) if isinstance(v, float) else v for k, v in redact(summary).items()}
        temporary.write_text(json.dumps(document, indent=2) + "\n", encoding="ascii")
        temporary.replace(self._run / "summary.json")

    def state_dict(self) -> dict[str, Any]:
        offsets = {}
        for name in _FILES:
            file = self._open(name)
            # The checkpoint will promise these bytes; they must survive the same power cut.
            os.fsync(file.fileno())
            offsets[name] = file.tell()
        return {"bytes": offsets}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, offset in state["bytes"].items():
            path = self._run / _FILES[name]
            size = path.stat().st_size if path.exists() else 0
            if size < offset:
                raise UsageError(
                    f"{path} has {size} bytes, but the checkpoint was saved after {offset}; "
                    "restore the file or start in a new folder"
                )
            self._offsets[name] = offset
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _open(self, name: str) -> IO[bytes]:
        """The file, cut to where the checkpoint left it; opened at its first use, as the state comes after start."""
        if name not in self._files:
            file = (self._run / _FILES[name]).open("ab")
            file.truncate(self._offsets[name])
            file.seek(0, os.SEEK_END)
            self._files[name] = file
        return self._files[name]

    def _write(self, name: str, record: Mapping[str, Any]) -> None:
        file = self._open(name)
        file.write(json.dumps(record, allow_nan=False).encode("ascii") + b"\n")
        file.flush()
        self._offsets[name] = file.tell()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Lines of a log as dicts, null as NaN; a last line that was cut off by a kill is left out.

    Raises:
        UsageError: a broken line elsewhere, with its number.
    """
    if not path.exists():
        return []
    *lines, rest = path.read_bytes().split(b"\n")
    if rest:
        lines.append(rest)
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            if number == len(lines) and rest:
                break
            raise UsageError(f"{path} line {number} is not JSON ({error}); delete the line to read the rest") from error
        records.append({key: _restore(value) for key, value in record.items()})
    return records


def _number(name: str, value: Any) -> float | int | str | None:
    if isinstance(value, bool | int):
        return int(value)
    try:
        # Covers NumPy scalars and tensors of one element.
        number = float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"metric {name!r} is {value!r}, not a number") from error
    if math.isnan(number):
        return None
    if math.isinf(number):
        return "Infinity" if number > 0 else "-Infinity"
    return number


def _restore(value: Any) -> Any:
    if value is None:
        return math.nan
    return float(value) if value in ("Infinity", "-Infinity") else value

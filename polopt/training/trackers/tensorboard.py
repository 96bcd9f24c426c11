"""TensorBoard event files in `run/tensorboard`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polopt.training.trackers.base import Rows, redact, require


class TensorBoardTracker:
    """Scalars, tables as Markdown, and the configuration as text. After a resume TensorBoard drops what was logged
    beyond the checkpoint (`purge_step`)."""

    def __init__(self, run: Path) -> None:
        require("tensorboard", "tensorboard", "tensorboard")
        self._folder = run / "tensorboard"
        self._writer: Any = None
        self._config: Mapping[str, Any] = {}
        self._purge: int | None = None
        self._last = -1

    def start(self, config: Mapping[str, Any], resume: bool) -> None:
        self._config = redact(config)
        # A resumed run without a checkpoint begins again, which makes all earlier events obsolete.
        self._purge = 0 if resume else None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        writer = self._open()
        for name, value in metrics.items():
            writer.add_scalar(name, float(value), step)
        self._last = max(self._last, step)

    def text(self, step: int, name: str, rows: Rows) -> None:
        self._open().add_text(name, _markdown(rows), step)
        self._last = max(self._last, step)

    def finish(self, summary: Mapping[str, Any]) -> None:
        if self._writer is not None:
            self._writer.add_text("summary", _fenced(redact(summary)), max(self._last, 0))
            self._writer.close()

    def state_dict(self) -> dict[str, Any]:
        if self._writer is not None:
            self._writer.flush()
        return {"last_step": self._last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._last = int(state["last_step"])
        self._purge = self._last + 1

    def _open(self) -> Any:
        if self._writer is None:
            # The import takes seconds; a run that fails before its first step should not wait for it.
            module = require("torch.utils.tensorboard", "tensorboard", "tensorboard")
            self._writer = module.SummaryWriter(log_dir=str(self._folder), purge_step=self._purge)
            if not self._purge:
                self._writer.add_text("config", _fenced(self._config), 0)
        return self._writer


def _fenced(document: Mapping[str, Any]) -> str:
    text = json.dumps(document, indent=2, default=str)
    return "\n".join(f"    {line}" for line in text.splitlines())


def _markdown(rows: Rows) -> str:
    if not rows:
        return "(no rows)"
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(column, "")) for column in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", "<br>")

"""Trackers of other services: Weights & Biases, MLflow, Trackio.

Each is imported when chosen and configured through its own environment variables (WANDB_*, MLFLOW_*, TRACKIO_*).
A resumed run logs the steps after its checkpoint again; as they repeat the same values, services that keep the first
or the last value of a step agree with `log.jsonl`.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from polopt.training.trackers.base import Rows, flatten, redact, require

_PROJECT: Final = "polopt"
# Limits of MLflow's tracking API.
_MLFLOW_BATCH, _MLFLOW_VALUE = 100, 500


class WandbTracker:
    """Weights & Biases; the project is WANDB_PROJECT or "polopt", the run is named after its folder."""

    def __init__(self, run: Path) -> None:
        self._wandb = require("wandb", "wandb", "wandb")
        self._path = run
        self._id = uuid.uuid4().hex[:8]
        self._config: Mapping[str, Any] = {}
        self._run: Any = None

    def start(self, config: Mapping[str, Any], resume: bool) -> None:
        self._config = redact(config)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._open().log(dict(metrics), step=step)

    def text(self, step: int, name: str, rows: Rows) -> None:
        columns = list(rows[0]) if rows else []
        data = [[str(row.get(column, "")) for column in columns] for row in rows]
        self._open().log({name: self._wandb.Table(columns=columns, data=data)}, step=step)

    def finish(self, summary: Mapping[str, Any]) -> None:
        run = self._open()
        run.summary.update(redact(summary))
        run.finish()

    def state_dict(self) -> dict[str, Any]:
        return {"id": self._id}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._id = str(state["id"])

    def _open(self) -> Any:
        if self._run is None:
            self._run = self._wandb.init(
                project=os.environ.get("WANDB_PROJECT", _PROJECT),
                name=self._path.resolve().name,
                dir=str(self._path),
                config=dict(self._config),
                id=self._id,
                resume="allow",
            )
        return self._run


class MlflowTracker:
    """MLflow; the experiment is MLFLOW_EXPERIMENT_NAME or "polopt", the server MLFLOW_TRACKING_URI."""

    def __init__(self, run: Path) -> None:
        self._mlflow = require("mlflow", "mlflow", "mlflow")
        self._path = run
        self._id: str | None = None
        self._config: Mapping[str, Any] = {}
        self._open_run = False

    def start(self, config: Mapping[str, Any], resume: bool) -> None:
        self._config = redact(config)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        # MLflow refuses "@" in names: pass@8 becomes pass_at_8.
        self._open().log_metrics({k.replace("@", "_at_"): float(v) for k, v in metrics.items()}, step=step)

    def text(self, step: int, name: str, rows: Rows) -> None:
        columns = list(rows[0]) if rows else []
        table = {column: [str(row.get(column, "")) for row in rows] for column in columns}
        self._open().log_table(table, artifact_file=f"{name}-{step:08d}.json")

    def finish(self, summary: Mapping[str, Any]) -> None:
        mlflow = self._open()
        mlflow.log_dict(redact(summary), "summary.json")
        mlflow.end_run()

    def state_dict(self) -> dict[str, Any]:
        return {"id": self._id}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._id = state["id"]

    def _open(self) -> Any:
        mlflow = self._mlflow
        if not self._open_run:
            mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT))
            resumed = self._id is not None
            run = mlflow.start_run(run_id=self._id, run_name=None if resumed else self._path.resolve().name)
            self._id, self._open_run = str(run.info.run_id), True
            if not resumed:
                items = [(key, str(value)[:_MLFLOW_VALUE]) for key, value in flatten(self._config).items()]
                for first in range(0, len(items), _MLFLOW_BATCH):
                    mlflow.log_params(dict(items[first : first + _MLFLOW_BATCH]))
        return mlflow


class TrackioTracker:
    """Trackio; the project is TRACKIO_PROJECT or "polopt". Trackio finds a run to resume by its name."""

    def __init__(self, run: Path) -> None:
        self._trackio = require("trackio", "trackio", "trackio")
        self._name = f"{run.resolve().name}-{uuid.uuid4().hex[:6]}"
        self._config: Mapping[str, Any] = {}
        self._started = False

    def start(self, config: Mapping[str, Any], resume: bool) -> None:
        self._config = redact(config)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._open().log(dict(metrics), step=step)

    def text(self, step: int, name: str, rows: Rows) -> None:
        """Not sent: the tables are in `text.jsonl`."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Ends the run; the summary is in `summary.json`."""
        self._open().finish()

    def state_dict(self) -> dict[str, Any]:
        return {"name": self._name}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._name = str(state["name"])

    def _open(self) -> Any:
        if not self._started:
            project = os.environ.get("TRACKIO_PROJECT", _PROJECT)
            self._trackio.init(project=project, name=self._name, config=dict(self._config), resume="allow")
            self._started = True
        return self._trackio

"""A process that forks one training run per request, so that a run can be killed without paying for the imports again.

Requests are lines of JSON on standard input: ``config`` (settings of a run), ``resume`` and ``dies`` (a key of `DEATHS`
or null). The answers are two lines each: the process id of the run, then its exit status (negative: the signal that
ended it) and its seconds.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import scipy.stats  # noqa: F401
import torch
import transformers.models.qwen3.modeling_qwen3  # noqa: F401

from polopt.methods import methods
from polopt.policies.causal_lm.policy import CausalLM
from polopt.training import checkpoint, report, run, trainer
from polopt.training.config import make_config
from polopt.training.trackers.jsonl import JsonlTracker


def die() -> None:
    """At once, without cleaning up."""
    os.kill(os.getpid(), signal.SIGKILL)


def replace(owner: Any, name: str, made: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    setattr(owner, name, made(getattr(owner, name)))


def settling() -> None:
    """With the settings half written."""

    def made(replace_: Callable[..., Any]) -> Callable[..., Any]:
        def dying(self: Path, target: Any) -> Any:
            if self.name == ".tmp-config.yaml":
                os.truncate(self, 20)
                die()
            return replace_(self, target)

        return dying

    replace(Path, "replace", made)


def in_half_a_file(when: Callable[[Path], bool]) -> None:
    """While the tensors of a checkpoint are written."""

    def made(save: Callable[..., Any]) -> Callable[..., Any]:
        def dying(tensors: Any, path: Path) -> None:
            save(tensors, path)
            if when(path):
                os.truncate(path, path.stat().st_size // 2)
                die()

        return dying

    replace(checkpoint, "save_file", made)


def first_checkpoint() -> None:
    in_half_a_file(lambda path: True)


def first_step() -> None:
    """After the first checkpoint and before the second."""
    replace(trainer, "save_checkpoint", lambda save: lambda *a, **k: die() if a[1] == 1 else save(*a, **k))


def last_checkpoint() -> None:
    in_half_a_file(lambda path: path.parent.name.endswith("step-00000006"))


def last_checkpoint_unnamed() -> None:
    """When the last checkpoint is whole and has not its name yet."""

    def made(rename: Callable[..., Any]) -> Callable[..., Any]:
        def dying(self: Path, target: Any) -> Any:
            if self.name.startswith(".tmp-step") and Path(target).name == "step-00000006":
                die()
            return rename(self, target)

        return dying

    replace(Path, "rename", made)


def tidying_up() -> None:
    """While an old checkpoint is removed."""

    def made(remove: Callable[..., Any]) -> Callable[..., Any]:
        def dying(path: Any, *args: Any, **options: Any) -> None:
            if "trash-step-00000002" in str(path):
                next(Path(path).iterdir()).unlink()
                die()
            remove(path, *args, **options)

        return dying

    replace(shutil, "rmtree", made)


def middle_of_the_log() -> None:
    """With half a line of step 4 written."""

    def made(log: Callable[..., Any]) -> Callable[..., Any]:
        def dying(self: JsonlTracker, step: int, metrics: Any) -> None:
            if step == 4:
                self._open("log").write(b'{"step": 4, "rew')
                self._open("log").flush()
                die()
            log(self, step, metrics)

        return dying

    replace(JsonlTracker, "log", made)


def writing_the_model() -> None:
    def made(save: Callable[..., Any]) -> Callable[..., Any]:
        def dying(self: CausalLM, folder: Path) -> None:
            save(self, folder)
            os.truncate(folder / "model.safetensors", 100)
            die()

        return dying

    replace(CausalLM, "save", made)


def reporting() -> None:
    replace(run, "write_report", lambda write: lambda *a, **k: die())


DEATHS = {
    f.__name__: f
    for f in (
        settling, first_checkpoint, first_step, last_checkpoint, last_checkpoint_unnamed, tidying_up, middle_of_the_log,
        writing_the_model, reporting,
    )
}  # fmt: skip


def serve() -> None:
    torch.set_num_threads(1)
    methods()
    # Drawing the curves takes longer than such a run.
    replace(report, "plot_curves", lambda plot: lambda *a, **k: None)
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        started = time.monotonic()
        child = os.fork()
        if not child:
            status = 1
            try:
                if request["dies"]:
                    DEATHS[request["dies"]]()
                run.train(make_config(request["config"]), resume=request["resume"], quiet=True)
                status = 0
            except BaseException:
                traceback.print_exc()
            os._exit(status)
        print(json.dumps(child), flush=True)
        _, code = os.waitpid(child, 0)
        print(json.dumps([os.waitstatus_to_exitcode(code), time.monotonic() - started]), flush=True)


if __name__ == "__main__":
    serve()

"""Steps of whole trainers, one at a time: polopt's, and any of TRL's in its own training loop."""

from __future__ import annotations

import gc
import json
import logging
import multiprocessing
import os
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import torch

from benchmarks.models import Shape, least_seconds
from benchmarks.row import Row
from benchmarks.timing import Contender, alternate

BUDGETS = (4096, 32768)
"""Tokens that polopt puts through the model at once."""
ROWS = (32, 128)
"""Rows that TRL does."""
LONG = 10.0
"""Seconds of a step beside which what is done once matters little."""


def quiet() -> None:
    """Peers' notices do not belong into the table."""
    silent = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_OFFLINE")
    os.environ.update({"TRANSFORMERS_VERBOSITY": "error", **dict.fromkeys(silent, "1")})
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    from transformers.utils import logging as notices

    notices.disable_progress_bar()


class Polopt:
    """Steps of polopt's trainer on a model; ``examples`` are rows of its data set, ``folder`` is for its files."""

    def __init__(
        self, model: Path, folder: Path, examples: Sequence[Mapping[str, Any]], precision: str, **settings: Any
    ) -> None:
        from rich.console import Console

        from polopt.training.budget import Budget
        from polopt.training.build import resolve
        from polopt.training.config import RunConfig
        from polopt.training.progress import RunProgress
        from polopt.training.run import make_trainer
        from polopt.training.tracking import Trackers

        data = folder / "data.jsonl"
        data.write_text("".join(json.dumps(example) + "\n" for example in examples))
        config = RunConfig(
            model=str(model),
            data=str(data),
            steps=1_000_000,
            lr=1e-6,
            precision=precision,
            eval_prompts=1,
            track=("none",),
            out=str(folder / "run"),
            **settings,
        )
        settled = resolve(config)
        bar = RunProgress(Budget(settled.steps), quiet=True, console=Console(quiet=True))
        self.trainer = make_trainer(settled, folder, bar)
        self.trainer.trackers = Trackers({})
        self.steps = 0

    def __call__(self) -> None:
        self.trainer.step()
        self.steps += 1

    @property
    def tokens_per_step(self) -> float:
        """Mean completion tokens."""
        return self.trainer.meter.spent.tokens / max(self.steps, 1)


@contextmanager
def trl_steps(make: Callable[[Any], Any]) -> Iterator[Contender]:
    """Steps of the trainer that ``make(callback)`` gives: it trains in a thread, and waits before each step to be asked
    for it.
    """
    from transformers import PrinterCallback, TrainerCallback

    go, done = threading.Semaphore(0), threading.Semaphore(0)
    over = threading.Event()

    class Gate(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            go.acquire()
            control.should_training_stop = over.is_set()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = over.is_set()
            done.release()

    trainer = make(Gate())
    trainer.remove_callback(PrinterCallback)
    thread = threading.Thread(target=trainer.train, daemon=True)
    thread.start()

    def step() -> None:
        go.release()
        done.acquire()

    try:
        yield step
    finally:
        over.set()
        go.release()
        thread.join()


def trl_settings(folder: Path, bf16: bool, rows: int, batch: int) -> dict[str, Any]:
    """What all of TRL's trainers are told: ``rows`` at once of a batch of ``batch``, and nothing but training."""
    return {
        "output_dir": str(folder / "trl"),
        "use_cpu": not torch.cuda.is_available(),
        "bf16": bf16,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": batch // rows,
        "learning_rate": 1e-6,
        "max_steps": 1_000_000,
        "logging_steps": 1_000_000,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


Make = Callable[..., AbstractContextManager[Contender]]
"""A function at the top of a module, with arguments that can be sent to another process."""


class Apart:
    """A contender in a process of its own; a call is one repetition there.

    Two trainers in one process are slower than each alone: OpenMP parks the threads of one master when another's exist.
    """

    def __init__(self, make: Make, *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
        self.process.start()
        theirs.close()
        self.tokens_per_step = 0.0
        """Mean completion tokens so far, of a contender that counts them."""

    def __call__(self) -> None:
        self.tokens_per_step = self._ask("step")

    def prepare(self) -> None:
        """Collect garbage."""
        self._ask("prepare")

    def _ask(self, what: str) -> float:
        self.pipe.send(what)
        try:
            return float(self.pipe.recv())
        except EOFError:
            raise RuntimeError("the process of a contender ended; what it printed says why") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.pipe.close()
        self.process.join(60)
        self.process.kill()


def _serve(pipe: Connection, make: Make, arguments: Sequence[Any]) -> None:
    quiet()
    with make(*arguments) as step:
        while True:
            try:
                asked = pipe.recv()
            except EOFError:
                return
            if asked == "prepare":
                gc.collect()
                gc.disable()
            else:
                step()
                gc.enable()
            pipe.send(getattr(step, "tokens_per_step", 0.0))


@contextmanager
def polopt_steps(
    folder: Path, examples: Sequence[Mapping[str, Any]], precision: str, settings: Mapping[str, Any]
) -> Iterator[Contender]:
    """Steps of polopt's trainer, for `Apart`."""
    with tempfile.TemporaryDirectory(dir=folder) as own:
        yield Polopt(folder / "model", Path(own), examples, precision, **settings)


def polopt_options(
    folder: Path, examples: Sequence[Mapping[str, Any]], **settings: Any
) -> dict[str, Callable[[], Apart]]:
    """Polopt's steps at every setting."""
    return {
        f"{precision}, {budget} tokens": partial(
            Apart, polopt_steps, folder, examples, precision, {**settings, "token_budget": budget}
        )
        for precision in ("float32", "bfloat16")
        for budget in BUDGETS
    }


def trl_options(make: Make, *arguments: Any, rows: Sequence[int] = ROWS) -> dict[str, Callable[[], Apart]]:
    """Steps of a trainer of TRL's, ``make(*arguments, bf16, rows)``, at every setting."""
    return {
        f"{'bf16' if bf16 else 'fp32'}, {many} rows": partial(Apart, make, *arguments, bf16, many)
        for bf16 in (False, True)
        for many in rows
    }


def against_trl(
    mine: Mapping[str, Callable[[], Apart]], theirs: Mapping[str, Callable[[], Apart]], rounds: int
) -> tuple[tuple[float, float, float], dict[str, Any]]:
    """TRL's seconds over polopt's (median and deciles), each side at the fastest of its settings, and what was seen."""
    chosen, setting = (_fastest(options) for options in (mine, theirs))
    with mine[chosen]() as ours, theirs[setting]() as trl:
        times = alternate({"polopt": ours, "trl": trl}, rounds)
        tokens = ours.tokens_per_step
    return times.ratio("trl", "polopt"), {
        "seconds": times.median("polopt"),
        "trl_seconds": times.median("trl"),
        "setting": chosen,
        "trl_setting": setting,
        "completion_tokens_per_step": tokens,
        "tokens_per_second": tokens / times.median("polopt"),
    }


def _fastest(options: Mapping[str, Callable[[], Apart]]) -> str:
    """The fastest setting, each tried on its own: the median of three repetitions after the first, or the first alone
    where that took longer than `LONG`.
    """
    tried = {}
    for label, option in options.items():
        with option() as step:
            first = alternate({label: step}, rounds=1, warmup=0).median(label)
            tried[label] = first if first > LONG else alternate({label: step}, rounds=3, warmup=0).median(label)
    return min(tried, key=lambda label: tried[label])


def as_row(
    name: str, peer: str, goal: float, ratio: tuple[float, float, float], seen: dict[str, Any], needed: float
) -> Row:
    """The row of a case that needs ``needed`` seconds at the machine's peak."""
    seconds = seen.pop("seconds")
    return Row(name, peer, *ratio, needed / seconds, goal, seconds, seen)


def update_seconds(shape: Shape, tokens: float, passes: int) -> float:
    """Time that ``passes`` forward passes over ``tokens`` take at the machine's peak (backward counts two)."""
    return least_seconds(shape, passes * tokens, 4096)

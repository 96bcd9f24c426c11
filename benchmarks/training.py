"""Steps of whole trainers, one at a time: polopt's, and any of TRL's in its own training loop."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import Shape, least_seconds
from benchmarks.row import Row
from benchmarks.timing import Contender, alternate, best_setting

BUDGETS = (4096, 32768)
"""Tokens that polopt puts through the model at once."""
ROWS = (32, 128)
"""Rows that TRL does."""


class Polopt:
    """Steps of polopt's trainer on the model of a folder; ``examples`` are rows of its data set."""

    def __init__(self, folder: Path, examples: Sequence[Mapping[str, Any]], precision: str, **settings: Any) -> None:
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
            model=str(folder / "model"),
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


Option = tuple[bool, int]
"""Half precision, rows at once."""


def against_trl(
    mine: Mapping[str, Polopt],
    theirs: Callable[[bool, int], AbstractContextManager[Contender]],
    options: Mapping[str, Option],
    rounds: int,
) -> tuple[tuple[float, float, float], dict[str, Any]]:
    """TRL's seconds over polopt's (median and deciles), each side at the fastest of its settings, and what was seen."""
    chosen = best_setting(mine)
    # Each on its own: a trainer holds a model and an optimizer.
    tried = {}
    for label, option in options.items():
        with theirs(*option) as step:
            tried[label] = alternate({label: step}, rounds=1).median(label)
    setting = min(tried, key=lambda label: tried[label])
    with theirs(*options[setting]) as step:
        times = alternate({"polopt": mine[chosen], "trl": step}, rounds)
    tokens = mine[chosen].tokens_per_step
    return times.ratio("trl", "polopt"), {
        "seconds": times.median("polopt"),
        "trl_seconds": times.median("trl"),
        "setting": chosen,
        "trl_setting": setting,
        "completion_tokens_per_step": tokens,
        "tokens_per_second": tokens / times.median("polopt"),
    }


def as_row(
    name: str, peer: str, goal: float, ratio: tuple[float, float, float], seen: dict[str, Any], needed: float
) -> Row:
    """The row of a case that needs ``needed`` seconds at the machine's peak."""
    seconds = seen.pop("seconds")
    return Row(name, peer, *ratio, needed / seconds, goal, seconds, seen)


def update_seconds(shape: Shape, tokens: float, passes: int) -> float:
    """Time that ``passes`` forward passes over ``tokens`` take at the machine's peak (backward counts two)."""
    return least_seconds(shape, passes * tokens, 4096)

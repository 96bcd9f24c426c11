"""(a) One optimizer step of GRPO from prompts to new weights, against TRL's `GRPOTrainer`.

Both sides load the same folder: 16 prompts x 8 completions, temperature 1, no KL, one update per batch, the same reward
function of the completion's tokens, AdamW, no activation checkpointing. Each side takes the fastest of its own
settings: precision, and how much goes through the model at once.
"""

from __future__ import annotations

import json
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import MEDIUM, SMALL, Shape, least_seconds, make_prompts, save
from benchmarks.row import Row
from benchmarks.timing import Contender, alternate, best_setting

PROMPTS, GROUP = 16, 8
CASES: Mapping[str, tuple[Shape, int]] = {
    "grpo-step-small-64": (SMALL, 64),
    "grpo-step-small-256": (SMALL, 256),
    "grpo-step-30M-64": (MEDIUM, 64),
    "grpo-step-30M-256": (MEDIUM, 256),
}
GOAL = 2.0


def reward(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    """The share of even tokens: cheap, and different for every completion."""
    return [sum(token % 2 == 0 for token in ids) / max(len(ids), 1) for ids in completion_ids]


def run(name: str, rounds: int) -> Row:
    """Measure one case."""
    shape, limit = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        save(shape, limit / 2, place / "model")
        prompts = make_prompts(shape, 8 * PROMPTS)
        ours = {
            f"{precision}, {budget} tokens": (precision, budget)
            for precision in ("float32", "bfloat16")
            for budget in (4096, 32768)
        }
        theirs = {
            f"{'bf16' if bf16 else 'fp32'}, {rows} rows": (bf16, rows) for bf16 in (False, True) for rows in (32, 128)
        }
        mine = {label: Polopt(place, prompts, limit, *option) for label, option in ours.items()}
        chosen = best_setting(mine)
        # Each on its own: a trainer holds a model and an optimizer.
        tried = {}
        for label, option in theirs.items():
            with _trl(place, prompts, limit, *option) as step:
                tried[label] = alternate({label: step}, rounds=2).median(label)
        setting = min(tried, key=lambda label: tried[label])
        with _trl(place, prompts, limit, *theirs[setting]) as step:
            times = alternate({"polopt": mine[chosen], "trl": step}, rounds)
        tokens = mine[chosen].tokens_per_step
    ratio, low, high = times.ratio("trl", "polopt")
    seconds = times.median("polopt")
    # Completions once when they are drawn, 128 tokens at a time, and three times in the update (forward and both halves
    # of backward); prompts once per group when they are prefilled, and three times per completion in the update.
    prompt = sum(len(text.split()) for text in prompts) / len(prompts) * PROMPTS
    needed = least_seconds(shape, tokens, PROMPTS * GROUP)
    needed += least_seconds(shape, prompt + 3 * (tokens + prompt * GROUP), 4096)
    more = {
        "trl_seconds": times.median("trl"),
        "setting": chosen,
        "trl_setting": setting,
        "completion_tokens_per_step": tokens,
        "tokens_per_second": tokens / seconds,
    }
    return Row(name, "TRL GRPOTrainer", ratio, low, high, needed / seconds, GOAL, seconds, more)


class Polopt:
    """Steps of polopt's trainer."""

    def __init__(self, folder: Path, prompts: Sequence[str], limit: int, precision: str, budget: int) -> None:
        from rich.console import Console

        from polopt.training.budget import Budget
        from polopt.training.build import resolve
        from polopt.training.config import RunConfig
        from polopt.training.progress import RunProgress
        from polopt.training.run import make_trainer
        from polopt.training.tracking import Trackers

        data = folder / "prompts.jsonl"
        data.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
        config = RunConfig(
            method="grpo",
            model=str(folder / "model"),
            data=str(data),
            reward=(f"{__name__}:reward",),
            steps=1_000_000,
            prompts=PROMPTS,
            group=GROUP,
            lr=1e-6,
            precision=precision,
            token_budget=budget,
            eval_prompts=1,
            track=("none",),
            slots={"rollout.max_new_tokens": limit},
            out=str(folder / "run"),
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
def _trl(folder: Path, prompts: Sequence[str], limit: int, bf16: bool, rows: int) -> Iterator[Contender]:
    """Steps of TRL's own training loop: it runs in a thread and waits before each step until it is asked for one."""
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    go, done = threading.Semaphore(0), threading.Semaphore(0)
    over = threading.Event()

    class Gate(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            go.acquire()
            control.should_training_stop = over.is_set()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = over.is_set()
            done.release()

    settings = GRPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=not torch.cuda.is_available(),
        bf16=bf16,
        gradient_checkpointing=False,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=PROMPTS * GROUP // rows,
        num_generations=GROUP,
        max_completion_length=limit,
        temperature=1.0,
        beta=0.0,
        loss_type="grpo",
        learning_rate=1e-6,
        max_steps=1_000_000,
        logging_steps=1_000_000,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = GRPOTrainer(
            model=str(folder / "model"),
            reward_funcs=reward,
            args=settings,
            train_dataset=Dataset.from_list([{"prompt": text} for text in prompts]),
            callbacks=[Gate()],
        )
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

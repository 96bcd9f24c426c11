"""(e) One optimizer step of DPO on 64 pairs, against TRL's `DPOTrainer`.

Both sides load the same folder and the same pairs: prompts of 16 to 48 tokens, answers of random length up to a limit,
beta 0.1, the reference evaluated in every step, AdamW, no activation checkpointing. Each side takes the fastest of its
own settings.
"""

from __future__ import annotations

import random
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from benchmarks.models import MEDIUM, SMALL, Shape, make_prompts, save
from benchmarks.row import Row
from benchmarks.timing import Contender
from benchmarks.training import (
    ROWS,
    against_trl,
    as_row,
    polopt_options,
    trl_options,
    trl_settings,
    trl_steps,
    update_seconds,
)

PAIRS = 64
CASES: Mapping[str, tuple[Shape, int]] = {
    "dpo-step-small-64": (SMALL, 64),
    "dpo-step-small-256": (SMALL, 256),
    "dpo-step-30M-64": (MEDIUM, 64),
}
GOAL = 1.5


def make_pairs(shape: Shape, limit: int, count: int, seed: int = 0) -> list[dict[str, str]]:
    """Random prompts with two random answers of 1 to ``limit`` - 1 words each."""
    draw = random.Random(seed)

    def answer() -> str:
        # The word that begins it is never that of the other answer: no pair is of equal answers.
        return " ".join(f"w{draw.randrange(2, shape.vocabulary)}" for _ in range(draw.randrange(1, limit)))

    prompts = make_prompts(shape, count)
    return [{"prompt": text, "chosen": f"w2 {answer()}", "rejected": f"w3 {answer()}"} for text in prompts]


def run(name: str, rounds: int) -> Row:
    """Measure one case."""
    shape, limit = CASES[name]
    pairs = make_pairs(shape, limit - 1, 4 * PAIRS)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        save(shape, limit / 2, place / "model")
        mine = polopt_options(place, pairs, method="dpo", prompts=PAIRS)
        # A row is a pair there.
        theirs = trl_options(_trl, place, pairs, rows=[rows // 2 for rows in ROWS])
        ratio, seen = against_trl(mine, theirs, rounds)
    words = [len(pair[side].split()) + 1 for pair in pairs for side in ("chosen", "rejected")]
    answers = sum(words) / len(words) * 2 * PAIRS
    prompts = sum(len(pair["prompt"].split()) for pair in pairs) / len(pairs) * PAIRS
    # The reference forward, the policy forward and both halves of backward; a prompt once for both answers.
    return as_row(name, "TRL DPOTrainer", GOAL, ratio, seen, update_seconds(shape, answers + prompts, 4))


def _trl(folder: Path, pairs: Sequence[Mapping[str, str]], bf16: bool, rows: int) -> AbstractContextManager[Contender]:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    settings = DPOConfig(**trl_settings(folder, bf16, rows, PAIRS), beta=0.1, max_length=None)

    def make(callback: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return DPOTrainer(
                model=str(folder / "model"),
                args=settings,
                train_dataset=Dataset.from_list([dict(pair) for pair in pairs]),
                callbacks=[callback],
            )

    return trl_steps(make)

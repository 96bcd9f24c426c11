"""(a) One optimizer step of GRPO from prompts to new weights, against TRL's `GRPOTrainer`.

Both sides load the same folder: 16 prompts x 8 completions, temperature 1, no KL, one update per batch, the same reward
function of the completion's tokens, AdamW, no activation checkpointing. Each side takes the fastest of its own
settings: precision, and how much goes through the model at once.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from benchmarks.models import MEDIUM, SMALL, Shape, least_seconds, make_prompts, save
from benchmarks.row import Row
from benchmarks.timing import Contender
from benchmarks.training import (
    against_trl,
    as_row,
    polopt_options,
    trl_options,
    trl_settings,
    trl_steps,
    update_seconds,
)

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
        settings: dict[str, Any] = {
            "method": "grpo",
            "reward": (f"{__name__}:reward",),
            "prompts": PROMPTS,
            "group": GROUP,
            "slots": {"rollout.max_new_tokens": limit},
        }
        mine = polopt_options(place, [{"prompt": text} for text in prompts], **settings)
        ratio, seen = against_trl(mine, trl_options(_trl, place, prompts, limit), rounds)
    tokens = seen["completion_tokens_per_step"]
    # Completions once when they are drawn, 128 tokens at a time, and three times in the update (forward and both halves
    # of backward); prompts once per group when they are prefilled, and three times per group in the update.
    prompt = sum(len(text.split()) for text in prompts) / len(prompts) * PROMPTS
    needed = least_seconds(shape, tokens, PROMPTS * GROUP) + update_seconds(shape, prompt, 4)
    needed += update_seconds(shape, tokens, 3)
    return as_row(name, "TRL GRPOTrainer", GOAL, ratio, seen, needed)


def _trl(folder: Path, prompts: Sequence[str], limit: int, bf16: bool, rows: int) -> AbstractContextManager[Contender]:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    settings = GRPOConfig(
        **trl_settings(folder, bf16, rows, PROMPTS * GROUP),
        num_generations=GROUP,
        max_completion_length=limit,
        temperature=1.0,
        beta=0.0,
        loss_type="grpo",
    )

    def make(callback: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return GRPOTrainer(
                model=str(folder / "model"),
                reward_funcs=reward,
                args=settings,
                train_dataset=Dataset.from_list([{"prompt": text} for text in prompts]),
                callbacks=[callback],
            )

    return trl_steps(make)

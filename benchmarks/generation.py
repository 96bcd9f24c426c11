"""(b) Generation alone: polopt's decoder against `generate` of the same model, prompts and lengths.

Both draw one completion for each of 128 rows (16 prompts x 8), at temperature 1 from the whole vocabulary, until the
end token or a limit; polopt also returns log-probs and entropies, `generate` tokens only. Each side at its faster
precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.models import (
    MEDIUM,
    SMALL,
    Shape,
    clipped_mean,
    least_seconds,
    make_model,
    make_prompts,
    make_tokenizer,
)
from benchmarks.row import Row
from benchmarks.timing import Contender, alternate, best_setting

PROMPTS, GROUP = 16, 8
CASES: Mapping[str, tuple[Shape, int]] = {
    "generation-small-64": (SMALL, 64),
    "generation-small-256": (SMALL, 256),
    "generation-30M-64": (MEDIUM, 64),
    "generation-30M-256": (MEDIUM, 256),
}
GOAL = 1.5


def run(name: str, rounds: int) -> Row:
    """Measure one case."""
    from polopt.core.policy import Sampling
    from polopt.policies.causal_lm import decoder
    from polopt.policies.causal_lm.policy import trajectory_seeds

    shape, limit = CASES[name]
    model: Any = make_model(shape, limit / 2)
    tokenizer = make_tokenizer(shape)
    prompts = [tokenizer(text)["input_ids"] for text in make_prompts(shape, PROMPTS)]
    width = max(map(len, prompts))
    padded = torch.tensor([[0] * (width - len(p)) + p for p in prompts]).repeat_interleave(GROUP, 0)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]).repeat_interleave(GROUP, 0)
    state = {"seed": 0, "tokens": 0, "calls": 0}

    def ours(dtype: torch.dtype | None) -> Contender:
        def draw() -> None:
            state["seed"] += 1
            made = decoder.generate(
                model,
                prompts,
                [GROUP] * PROMPTS,
                trajectory_seeds(state["seed"], [GROUP] * PROMPTS),
                Sampling(max_new_tokens=limit),
                eos_ids=[1],
                entropy=True,
                dtype=dtype,
            )
            state["tokens"] += int(made.lengths.sum())
            state["calls"] += 1

        return draw

    def theirs(dtype: torch.dtype | None) -> Contender:
        def draw() -> None:
            with torch.no_grad(), torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                model.generate(input_ids=padded, attention_mask=mask, max_new_tokens=limit)

        return draw

    choices = {"float32": None, "bfloat16": torch.bfloat16}
    chosen = best_setting({label: ours(dtype) for label, dtype in choices.items()})
    setting = best_setting({label: theirs(dtype) for label, dtype in choices.items()})
    times = alternate({"polopt": ours(choices[chosen]), "generate": theirs(choices[setting])}, rounds)
    ratio, low, high = times.ratio("generate", "polopt")
    seconds = times.median("polopt")
    tokens = state["tokens"] / state["calls"]
    more = {
        "generate_seconds": times.median("generate"),
        "setting": chosen,
        "generate_setting": setting,
        "completion_tokens": tokens,
        "expected_tokens": PROMPTS * GROUP * clipped_mean(limit / 2, limit),
        "tokens_per_second": tokens / seconds,
    }
    # Every completion token once, 128 at a time, and every prompt token once.
    least = least_seconds(shape, tokens, PROMPTS * GROUP) + least_seconds(shape, sum(map(len, prompts)), 512)
    return Row(name, "transformers generate", ratio, low, high, least / seconds, GOAL, seconds, more)

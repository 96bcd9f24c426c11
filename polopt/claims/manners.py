"""A game in the small world: which manner of answering beats which, without a best one.

Arithmetic of levels 2 to 4, whose answers are worked, shortcut or direct. Worked beats shortcut, shortcut beats direct
and direct beats worked with probability 0.9, each of them beats an answer in no manner with 0.9, and equal manners tie.
No reward explains that; the only equilibrium mixes the three alike. With q the shares of the manners of a policy, its
gap is max_s (P q)_s - 1/2: by how much the best manner beats it, 0 at the equilibrium.

Measured: one answer to each of 512 held-out prompts after a default run of 60 iterations (16 prompts x 8), with the
method's defaults and this judge. Against it, what a reward makes of the same preference: GRPO on the probability to
beat the manners of the shipped policy's training data. 5 paired seeds. A first run of nash-md and egpo was discarded:
its held-out answers were drawn from nash-md's mixture with the reference and at egpo's temperature of 2.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from polopt.claims.claim import Claim
from polopt.claims.small import answers, trained
from polopt.rewards.judges import PairwiseJudge
from polopt.rewards.scoring import transcripts
from polopt.tasks.arithmetic import Arithmetic
from polopt.training.trainer import Trainer

TASK: Final = Arithmetic()
LEVELS: Final = (2, 3, 4)
MANNERS: Final = (*TASK.strategies, "other")
BEATS: Final = torch.tensor(
    [[0.5, 0.9, 0.1, 0.9], [0.1, 0.5, 0.9, 0.9], [0.9, 0.1, 0.5, 0.9], [0.1, 0.1, 0.1, 0.5]], dtype=torch.float64
)
"""P(row beats column) of `MANNERS`."""
STEPS, HELD_OUT = 60, 512


def manner(completion: str) -> int:
    """Its place in `MANNERS`."""
    return MANNERS.index(TASK.strategy_of(completion))


def prefers(first: Sequence[str], second: Sequence[str], **_: Any) -> list[float]:
    """P(first beats second): what a judge answers."""
    return [float(BEATS[manner(a), manner(b)]) for a, b in zip(first, second, strict=True)]


def against_shipped(completions: Sequence[str], **_: Any) -> list[float]:
    """P(beats an answer of the shipped policy's training data): what a reward can make of it."""
    win = BEATS[:, : len(TASK.shares)] @ torch.tensor(TASK.shares, dtype=torch.float64)
    return [float(win[manner(completion)]) for completion in completions]


def gap(trainer: Trainer, seed: int, quick: bool) -> float:
    """max_s (P q)_s - 1/2 of the policy's answers to held-out prompts."""
    examples = TASK.examples(8 if quick else HELD_OUT, seed=seed, split="test", levels=LEVELS)
    said = [transcript.completion for transcript in transcripts(answers(trainer, examples))]
    counts: Tensor = torch.bincount(torch.tensor([manner(text) for text in said]), minlength=len(MANNERS)).double()
    return float((BEATS @ (counts / counts.sum())).max()) - 0.5


def play(method: str, seed: int, quick: bool) -> Mapping[str, float]:
    """Gaps at the start, of the method and of the reward."""
    found: dict[str, float] = {}

    def start(trainer: Trainer) -> None:
        found["start"] = gap(trainer, seed, quick)

    run = functools.partial(trained, seed=seed, quick=quick, steps=STEPS, level=LEVELS)
    found["method"] = gap(run(method, slots={"reward": PairwiseJudge(judge=prefers)}, at_start=start), seed, quick)
    rewarded = f"{__name__}:{against_shipped.__name__}"
    return found | {"reward": gap(run("grpo", rewards=(rewarded,)), seed, quick)}


def claims(slug: str) -> tuple[Claim, Claim]:
    """Both of a method: its gap is lower than the reward's, and than at the start."""

    def measure(seed: int, quick: bool) -> Mapping[str, float]:
        return play(slug, seed, quick)

    def made(name: str, statement: str, baseline: str, control: str) -> Claim:
        metric = "gap of the manners of 512 held-out answers"
        return Claim(slug, name, statement, "small", baseline, metric, "lower", "method", control, measure=measure)

    return (
        made(
            "small-reward",
            "Trained on a preference without a best answer, the language model is harder to beat than by a reward.",
            "GRPO on the win rate against the shipped policy",
            "reward",
        ),
        made("small-falls", "The language model's answers become harder to beat.", "the shipped policy", "start"),
    )

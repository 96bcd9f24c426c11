"""MA-RLHF: macro actions shorten the way of a terminal score to early tokens (Chai et al. 2024, arXiv:2410.02743).

Design, fixed before the first run. Exact world: 2 tokens, length 12 (16, the card's least, takes ten times as long to
enumerate), 4 prompts. The score comes at the end and depends on the whole answer, with local structure: the share of
its 3 blocks of 4 tokens that equal the prompt's random target (about 1/16 at first). The policy shares a row of logits,
and the critic a value, among prefixes of the same length and last token (an order-1 head), as a network shares what it
knows; logits are normal with standard deviation 0.5 at first, values 0.

How n was scaled: the paper's n = 5 and 10 are for summaries of about 50 tokens; a quarter of that, rounded up, is 2 and
3. Arms: n = 1 (PPO), 2, 3, the whole answer, and perplexity boundaries, under the initial policy. The last token is a
macro action by itself everywhere, as in the code. 8 answers per prompt, one update per rollout, Adam at rate 0.1, gamma
1, lambda 0.95, no KL, so that pooled and summed rewards are the same.

Measured: iterations until the exact expected score is 0.5, at most 100 (a run that does not get there counts with all
of them); the expected score after 100 iterations; its mean over the first 10, "at first". "At least as high": not lower
by more than 0.02. "Not the best finally": the whole answer against n = 3. The budget was chosen on PPO alone, with a
seed of its own. Variance of the advantages and error of the critic, for which the paper's claim has no direction, are
not measured.

Small world, added after the first run of the exact claims, whose answers are so short that lambda alone brings the
score to the first token (0.95^11 is 0.57): the shipped policy on its default task, at most 56 tokens, the default run
of 16 prompts x 8 with 40 iterations and rate 2e-4, 5 seeds; n = 5, not scaled, against n = 1, no KL. Mean success over
the 40 iterations, which is higher where a success is reached earlier.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from polopt.claims.claim import Claim
from polopt.claims.exact import curve, start
from polopt.claims.small import statistics
from polopt.core.override import override
from polopt.methods.credit.ma_rlhf import ma_rlhf
from polopt.policies.exact import ExactPolicy, SequenceSpace, heads
from polopt.tasks.problems import Problem

SPACE = SequenceSpace(2, 12)
BLOCK = 4
PROMPTS, GROUP, ITERATIONS, EARLY, TARGET = 4, 8, 100, 10, 0.5

PLAIN = override(ma_rlhf, {"reward.beta": 0.0})
ARMS = {
    "n 1": override(PLAIN, {"advantage.n": 1}),
    "n 2": override(PLAIN, {"advantage.n": 2}),
    "n 3": override(PLAIN, {"advantage.n": 3}),
    "whole": override(PLAIN, {"advantage.n": None}),
    "perplexity": override(PLAIN, {"advantage.boundary": "perplexity"}),
}


class SharedRows(Problem):
    """A problem whose policies have an order-1 head."""

    def policy(self, head: str = "order-1") -> ExactPolicy:
        return super().policy(head)


def blocks(seed: int) -> Problem:
    """r = the share of the blocks of four tokens that equal those of a random target."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, 2, (PROMPTS, SPACE.length), generator=generator)
    matched = (SPACE.sequences[None] == target[:, None]).view(PROMPTS, SPACE.n_sequences, -1, BLOCK).all(-1)
    row = heads.rows(SPACE, "order-1")
    logits = 0.5 * torch.randn(PROMPTS, int(row.max()) + 1, 2, generator=generator, dtype=torch.float64)
    initial = logits[:, row]
    return SharedRows("blocks", SPACE, {"reward": matched.double().mean(-1)}, initial, initial, {}, (GROUP,) * PROMPTS)


def training(seed: int, quick: bool) -> Mapping[str, float]:
    """Iterations to the target, mean score early on, score at the end."""
    made = blocks(seed)
    found: dict[str, float] = {}
    for name, method in ARMS.items():
        run = start(made, method, seed=seed, group=GROUP)
        scores = curve(run, 2 if quick else ITERATIONS)
        early = scores[1 : EARLY + 1]
        reached = next((i for i, score in enumerate(scores) if score >= TARGET), len(scores) - 1)
        found |= {f"{name}/until": float(reached), f"{name}/early": sum(early) / len(early), f"{name}/end": scores[-1]}
    return found


def small(seed: int, quick: bool) -> Mapping[str, float]:
    """Mean success over a run in the small world."""
    found = {}
    for n in (1, 5):
        rows = statistics("ma-rlhf", seed=seed, quick=quick, steps=40, slots={"advantage.n": n, "reward.beta": 0.0})
        found[f"n {n}"] = sum(row["reward"] for row in rows) / len(rows)
    return found


def _claim(
    name: str, statement: str, metric: str, direction: str, treatment: str, control: str, margin: float
) -> Claim:
    baseline = {"n 1": "ppo, n = 1", "n 3": "n = 3"}[control.partition("/")[0]]
    return Claim(
        "ma-rlhf",
        name,
        statement,
        "exact",
        baseline,
        metric,
        direction,  # type: ignore[arg-type]
        treatment,
        control,
        margin=margin,
        measure=training,
    )


UNTIL = "iterations to an expected score of 0.5"
END = "expected score after 100 iterations"

CLAIMS = (
    _claim(
        "faster-n2",
        "Macro actions of n = 2, for the paper's 5, reach the target in fewer updates than PPO.",
        UNTIL,
        "lower",
        "n 2/until",
        "n 1/until",
        0.0,
    ),
    _claim(
        "faster-n3",
        "Macro actions of n = 3, for the paper's 10, reach the target in fewer updates than PPO.",
        UNTIL,
        "lower",
        "n 3/until",
        "n 1/until",
        0.0,
    ),
    _claim(
        "ends-as-high",
        "Macro actions of n = 3 end at least as high as PPO.",
        END,
        "higher",
        "n 3/end",
        "n 1/end",
        0.02,
    ),
    _claim(
        "faster-perplexity",
        "Perplexity boundaries reach the target in fewer updates than PPO.",
        UNTIL,
        "lower",
        "perplexity/until",
        "n 1/until",
        0.0,
    ),
    _claim(
        "whole-answer-early",
        "One macro action for the whole answer learns faster than PPO at first.",
        "mean expected score of the first 10 iterations",
        "higher",
        "whole/early",
        "n 1/early",
        0.0,
    ),
    _claim(
        "whole-answer-end",
        "One macro action for the whole answer is not the best at the end.",
        END,
        "lower",
        "whole/end",
        "n 3/end",
        0.0,
    ),
    Claim(
        "ma-rlhf",
        "faster-small",
        "Macro actions of n = 5 learn faster than PPO on answers of tens of tokens.",
        "small",
        "ppo, n = 1",
        "mean success over 40 iterations",
        "higher",
        "n 5",
        "n 1",
        measure=small,
    ),
)

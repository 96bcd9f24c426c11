"""GTPO: format tokens are protected and nothing collapses (Simoni et al. 2025, arXiv:2508.03772).

Design, fixed before the first run. Exact world: 4 tokens with an end token, at most 6 of them, 8 prompts, tabular. A
response is well formed iff it opens with token 0 and closes with token 1 before the end token; its answer is its second
token. Reward 1 iff it is well formed and the answer is the prompt's target, else 0: right and wrong responses share
opening and ending. The initial policy opens with probability 0.95, chooses the target with 0.1 and the two other
answers alike, then closes with 0.8 at every step but after a token 1, where it ends with 0.95; normal noise of standard
deviation 0.3 on all logits. The mean entropy of its responses is about 0.6, below ln 2, so that the filter works.

8 responses per prompt, one update per rollout, 60 iterations, Adam. Rate 0.1, and for collapse 1.0. Arms: GTPO; GTPO
without lambda; GTPO without the filter; GRPO; GRPO with a KL term of 0.04 to the initial policy.

- Format: the largest fall of the exact probability of a well-formed response below an earlier value, mean over the
  prompts. "Never" means at most 0.01.
- Accuracy: exact expected reward after the last iteration; "at least" means not worse by more than 0.02.
- Collapse: share of the prompts whose exact expected reward at the end, at rate 1.0, is below the initial policy's.

GRPO with KL has the reference that GTPO does without; it is compared in collapse, with a margin of 0.05.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from polopt.claims.claim import Claim
from polopt.claims.exact import Run, start
from polopt.core.method import Method
from polopt.core.override import override
from polopt.methods.base.grpo import grpo
from polopt.methods.credit.gtpo import gtpo
from polopt.policies.exact import SequenceSpace
from polopt.regularizers.kl import KL
from polopt.tasks.problems import Problem, problem

SPACE = SequenceSpace(4, 6, end=True)
PROMPTS, GROUP, ITERATIONS, HIGH_RATE = 8, 8, 60, 1.0
OPEN, CLOSE, END = 0, 1, 3

ARMS: Mapping[str, Method] = {
    "gtpo": gtpo,
    "no lambda": gtpo | {"weight": None},
    "no filter": override(gtpo, {"advantage.filter": "never"}),
    "grpo": grpo,
    "grpo with kl": grpo | {"regularizer": KL(beta=0.04)},
}


def well_formed() -> Bool[Tensor, " sequence"]:
    """Sequences that open, have an answer, close and end."""
    tokens, lengths = SPACE.sequences, SPACE.lengths
    last = tokens.gather(1, (lengths - 1)[:, None])[:, 0]
    before = tokens.gather(1, (lengths - 2).clamp_min(0)[:, None])[:, 0]
    return (lengths >= 4) & (tokens[:, 0] == OPEN) & (last == END) & (before == CLOSE)


def formatted(seed: int) -> Problem:
    """An answer between an opening and an ending that all good responses have."""
    base = problem("random-rewards", space=SPACE, batch=PROMPTS, seed=seed, spread=0.3)
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(3, (PROMPTS,), generator=generator)

    def chances(token: int | Tensor, chance: float) -> Tensor:
        """Log-probabilities of which one token has this chance and the others share the rest."""
        likely = torch.as_tensor(token).expand(PROMPTS)[:, None]
        rest = torch.full((PROMPTS, 4), (1 - chance) / 3, dtype=torch.float64)
        return rest.scatter(1, likely, chance).log()

    answer = torch.full((PROMPTS, 4), 0.44, dtype=torch.float64).scatter(1, target[:, None], 0.1)
    answer[:, END] = 0.02
    depths, previous = SPACE.depths, SPACE.previous
    shape = torch.zeros_like(base.initial)
    shape[:, depths == 0] = chances(OPEN, 0.95)[:, None]
    shape[:, depths == 1] = answer.log()[:, None]
    shape[:, depths >= 2] = chances(CLOSE, 0.8)[:, None]
    shape[:, (depths >= 3) & (previous == CLOSE)] = chances(END, 0.95)[:, None]
    right = (well_formed()[None] & (SPACE.sequences[None, :, 1] == target[:, None])).double()
    initial = base.initial + shape
    return replace(base, name="formatted", rewards={"correct": right}, initial=initial, reference=initial)


def of_format(run: Run) -> Float[Tensor, " problem"]:
    """Exact probability of a well-formed response."""
    with torch.no_grad():
        return run.policy.probabilities() @ well_formed().double()


def training(seed: int, quick: bool) -> Mapping[str, float]:
    """Largest fall of the probability of a well-formed response, and final reward, of every arm."""
    made = formatted(seed)
    found: dict[str, float] = {"never": 0.0}
    for name, method in ARMS.items():
        run = start(made, method, seed=seed, group=GROUP)
        highest = of_format(run)
        fall = torch.zeros_like(highest)
        for _ in range(2 if quick else ITERATIONS):
            run.step()
            now = of_format(run)
            highest, fall = torch.maximum(highest, now), torch.maximum(fall, highest - now)
        found |= {f"{name}/fall": float(fall.mean()), f"{name}/reward": run.reward}
    return found


def collapse(seed: int, quick: bool) -> Mapping[str, float]:
    """Share of the prompts that end below the initial policy at a high rate."""
    made = formatted(seed)

    def per_prompt(run: Run) -> Tensor:
        with torch.no_grad():
            return (run.policy.probabilities() * made.reward).sum(-1)

    found: dict[str, float] = {}
    for name, method in ARMS.items():
        run = start(made, method, seed=seed, group=GROUP)
        run.trainer.optimization = replace(run.trainer.optimization, lr=HIGH_RATE)
        before = per_prompt(run)
        for _ in range(2 if quick else ITERATIONS):
            run.step()
        found[name] = float((per_prompt(run) < before).double().mean())
    return found


FALL = "largest fall of the exact probability of a well-formed response, mean over prompts"
COLLAPSED = "share of prompts that end below the initial policy at rate 1.0"
CLAIMS = (
    Claim(
        "gtpo",
        "format-falls-less",
        "The probability of the format falls less under GTPO than under GRPO.",
        "exact",
        "grpo",
        FALL,
        "lower",
        "gtpo/fall",
        "grpo/fall",
        measure=training,
    ),
    Claim(
        "gtpo",
        "format-never-falls",
        "Under GTPO the probability of the format never falls.",
        "exact",
        "no fall",
        FALL,
        "lower",
        "gtpo/fall",
        "never",
        margin=0.01,
        measure=training,
    ),
    Claim(
        "gtpo",
        "lambda-protects",
        "The weights of conflict tokens are what protects the format.",
        "exact",
        "gtpo without lambda",
        FALL,
        "lower",
        "gtpo/fall",
        "no lambda/fall",
        measure=training,
    ),
    Claim(
        "gtpo",
        "accuracy",
        "GTPO is at least as accurate as GRPO without KL.",
        "exact",
        "grpo",
        "exact expected reward after 60 iterations",
        "higher",
        "gtpo/reward",
        "grpo/reward",
        margin=0.02,
        measure=training,
    ),
    Claim(
        "gtpo",
        "collapse",
        "At a high learning rate fewer prompts collapse than under GRPO.",
        "exact",
        "grpo",
        COLLAPSED,
        "lower",
        "gtpo",
        "grpo",
        measure=collapse,
    ),
    Claim(
        "gtpo",
        "collapse-kl",
        "At a high learning rate no more prompts collapse than under GRPO with a KL term.",
        "exact",
        "grpo, KL 0.04",
        COLLAPSED,
        "lower",
        "gtpo",
        "grpo with kl",
        margin=0.05,
        measure=collapse,
    ),
    Claim(
        "gtpo",
        "filter",
        "The entropy filter is part of what prevents collapse.",
        "exact",
        "gtpo without the filter",
        COLLAPSED,
        "lower",
        "gtpo",
        "no filter",
        measure=collapse,
    ),
)

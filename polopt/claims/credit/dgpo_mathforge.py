"""DGPO of MathForge: equal weight at every pass rate, more on hard questions (Dai et al. 2026, arXiv:2601.20614).

Design, fixed before the first run.

Exact world, 5 tokens, length 4, reward 1 on a random quarter of the sequences, groups of 8.

- Weight by pass rate: five prompts with pass rates 0.05, 0.2, 0.5, 0.8 and 0.95, 400 groups each from the initial
  policy; mean over a prompt's groups with spread of the sum of |A|. Mean of the outer two (0.05, 0.95) over the middle
  one, minus 1: within 0.01 of 0 for DGAE, below it for GRPO.
- Learning: nine prompts with pass rates from 0.05 to 0.95 in equal steps, all of them in each of 40 iterations, SGD at
  rate 20: with one table per prompt Adam would undo any weight of a prompt. Exact expected reward of the three hardest
  prompts, and of all. Arms: GRPO, Dr. GRPO, GRPO with DQW, DGAE alone, DGPO. GRPO's advantages are smaller than DGAE's
  and so are its steps; a control scales them such that their mean size over the questions with spread is 1, as DGAE's
  is. "At least equal" overall means not lower by more than 0.01.

Small world: the shipped policy learns sums of one or two operations, 30 iterations of 16 x 8, rate 2e-4, 5 seeds, DGPO
in both arms; in one every question has three reformulations in which a number is a sum of two. Accuracy of one answer
to each of 256 held-out questions of three or four operations.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.claims.claim import Claim
from polopt.claims.exact import batch, start
from polopt.claims.small import answers, trained
from polopt.core.example import Example
from polopt.core.part import Part
from polopt.core.rollout import Rollout
from polopt.curricula.reformulations import sub_sum
from polopt.methods.base.dr_grpo import dr_grpo
from polopt.methods.base.grpo import grpo
from polopt.methods.credit.dgpo_mathforge import dgpo_mathforge
from polopt.policies.exact import SequenceSpace, enumeration
from polopt.tasks.arithmetic import Arithmetic
from polopt.tasks.problems import problem

SPACE = SequenceSpace(5, 4)
GROUP, ITERATIONS = 8, 40
CURVE = (0.05, 0.2, 0.5, 0.8, 0.95)
RATES = tuple(0.05 + 0.9 * i / 8 for i in range(9))
EASY, HARD = (1, 2), (3, 4)


@dataclass(frozen=True)
class UnitMeanGroupZScore(Part):
    """GRPO's advantage over its mean size in groups with spread: GRPO with DGAE's total; for experiments."""

    needs = frozenset({"reward"})
    unit = "batch"

    def __call__(self, rollout: Rollout) -> Float[Tensor, " trajectory"]:
        credit: Tensor = grpo.advantage(rollout)
        valid = (rollout.group_std(rollout.reward) > 0)[rollout.group]
        return credit / credit[valid].abs().mean() if bool(valid.any()) else credit


ARMS = {
    "grpo": grpo,
    "grpo, dgae's total": dgpo_mathforge | {"advantage": UnitMeanGroupZScore(), "weight": None},
    "dr-grpo": dr_grpo,
    "dqw": grpo | {"weight": dgpo_mathforge.weight},
    "dgae": dgpo_mathforge | {"weight": None},
    "dgpo": dgpo_mathforge,
}


def weight_by_pass_rate(seed: int, quick: bool) -> Mapping[str, float]:
    """Sum of |A| of a group with spread: outer pass rates over the middle one, minus 1."""
    made = problem("binary-verifier", space=SPACE, batch=len(CURVE), pass_rate=CURVE, seed=seed)
    policy = made.policy()
    rollout = batch(made, policy, seed=seed, sizes=[GROUP] * (50 if quick else 400))
    varied = rollout.group_std(rollout.reward) > 0
    # Groups come prompt by prompt.
    owner = torch.arange(rollout.n_groups) // (rollout.n_groups // len(CURVE))
    found: dict[str, float] = {}
    for name in ("grpo", "dgae"):
        advantage = ARMS[name].advantage(rollout)
        total = torch.zeros(rollout.n_groups, dtype=advantage.dtype).index_add(0, rollout.group, advantage.abs())
        means = [float(total[varied & (owner == b)].mean()) for b in range(len(CURVE))]
        found[name] = (means[0] + means[-1]) / (2 * means[2]) - 1
    return found


def learning(seed: int, quick: bool) -> Mapping[str, float]:
    """Exact expected reward of the hardest third of the prompts and of all, of every arm at the end."""
    made = problem("binary-verifier", space=SPACE, batch=len(RATES), pass_rate=RATES, seed=seed)
    found: dict[str, float] = {}
    for name, method in ARMS.items():
        run = start(made, method, seed=seed, group=GROUP, optimizer="sgd")
        for _ in range(2 if quick else ITERATIONS):
            run.step()
        with torch.no_grad():
            reward = enumeration.expected_reward(run.policy, made.reward)
        found |= {f"{name}/hard": float(reward[: len(RATES) // 3].mean()), f"{name}/all": float(reward.mean())}
    return found


def reformulated(seed: int, quick: bool) -> Mapping[str, float]:
    """Accuracy on questions harder than those of the training set, with and without reformulations."""
    rng = random.Random(seed)

    def add(example: Example) -> Example:
        made = [sub_sum(str(example.prompt), rng) for _ in range(3)]
        return replace(example, columns={**example.columns, "reformulations": [text for text in made if text]})

    held_out = Arithmetic().examples(8 if quick else 256, seed=0, split="test", levels=HARD)
    found: dict[str, float] = {}
    for name, prepare in {"original": lambda example: example, "reformulated": add}.items():
        trainer = trained("dgpo-mathforge", seed=seed, quick=quick, steps=30, level=EASY, prepare=prepare)
        found[name] = float(answers(trainer, held_out)["score"].mean())
    return found


CLAIMS = (
    Claim(
        "dgpo-mathforge",
        "flat",
        "With the mean absolute deviation a question with spread weighs the same at every pass rate.",
        "exact",
        "no difference",
        "sum of |A| of a group with spread, pass rates 0.05 and 0.95 over 0.5, minus 1",
        "equal",
        "dgae",
        None,
        margin=0.01,
        measure=weight_by_pass_rate,
    ),
    Claim(
        "dgpo-mathforge",
        "grpo-favours-the-middle",
        "With GRPO's z-score very hard and very easy questions weigh less than those in the middle.",
        "exact",
        "DGAE",
        "sum of |A| of a group with spread, pass rates 0.05 and 0.95 over 0.5, minus 1",
        "lower",
        "grpo",
        "dgae",
        measure=weight_by_pass_rate,
    ),
    Claim(
        "dgpo-mathforge",
        "hard-dgpo-dgae",
        "The difficulty weight raises the reward of hard prompts beyond DGAE alone.",
        "exact",
        "DGAE without DQW",
        "exact expected reward of the hardest third after 40 updates",
        "higher",
        "dgpo/hard",
        "dgae/hard",
        measure=learning,
    ),
    Claim(
        "dgpo-mathforge",
        "hard-dgae-grpo",
        "DGAE alone raises the reward of hard prompts beyond GRPO.",
        "exact",
        "grpo",
        "exact expected reward of the hardest third after 40 updates",
        "higher",
        "dgae/hard",
        "grpo/hard",
        measure=learning,
    ),
    Claim(
        "dgpo-mathforge",
        "hard-dgpo-grpo",
        "DGPO raises the reward of hard prompts beyond GRPO.",
        "exact",
        "grpo",
        "exact expected reward of the hardest third after 40 updates",
        "higher",
        "dgpo/hard",
        "grpo/hard",
        measure=learning,
    ),
    Claim(
        "dgpo-mathforge",
        "hard-equal-total",
        "DGPO raises the reward of hard prompts beyond GRPO at the same total of absolute advantages.",
        "exact",
        "grpo scaled to DGAE's total",
        "exact expected reward of the hardest third after 40 updates",
        "higher",
        "dgpo/hard",
        "grpo, dgae's total/hard",
        measure=learning,
    ),
    Claim(
        "dgpo-mathforge",
        "hard-dqw",
        "The difficulty weight alone raises the reward of hard prompts beyond GRPO.",
        "exact",
        "grpo",
        "exact expected reward of the hardest third after 40 updates",
        "higher",
        "dqw/hard",
        "grpo/hard",
        measure=learning,
    ),
    Claim(
        "dgpo-mathforge",
        "hard-dr-grpo",
        "DGPO raises the reward of hard prompts beyond Dr. GRPO.",
        "exact",
        "dr-grpo",
        "exact expected reward of the hardest third after 40 updates",
        "higher",
        "dgpo/hard",
        "dr-grpo/hard",
        measure=learning,
    ),
    Claim(
        "dgpo-mathforge",
        "overall",
        "Over all prompts DGPO is at least equal to GRPO.",
        "exact",
        "grpo",
        "exact expected reward of all prompts after 40 updates",
        "higher",
        "dgpo/all",
        "grpo/all",
        margin=0.01,
        measure=learning,
    ),
    Claim(
        "dgpo-mathforge",
        "reformulations",
        "Training on reformulated questions too raises the accuracy on harder ones at equal updates.",
        "small",
        "DGPO on the original questions",
        "accuracy on held-out sums of three and four operations",
        "higher",
        "reformulated",
        "original",
        measure=reformulated,
    ),
)

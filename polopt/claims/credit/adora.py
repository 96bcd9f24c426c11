"""ADORA: longer right answers and more of them where length pays (Ren et al. 2026, arXiv:2602.10019).

Design, fixed before the first run.

Exact world: tokens 0, 1 (answers), 2 (scratchpad) and an end token, at most 6. Each prompt has an answer; a response is
right if it ends with that answer and the end token, and has enough scratchpad tokens before: none for the four easy
prompts, three for the four hard ones, whose right responses are therefore 5 or 6 tokens long. A random initial policy
(logits normal with standard deviation 0.5) is tilted to be right with probability 0.4 on easy and 0.1 on hard prompts.
All prompts in groups of 8, 60 iterations, SGD at rate 20: with one table per prompt Adam would undo any weight of a
prompt. Arms: GRPO; rule 1 (attenuate); rule 3 (amplify); as controls, the weights of rules 1 and 3 each given to the
next group of the (shuffled) batch, which are as many and as large but have nothing to do with the group. Exact mean
length of right responses at the end, mean over the prompts; exact expected reward of the hard and of the easy prompts,
mean over the iterations, since the claim is how fast it grows. Prompts share nothing here, so that attenuating one
cannot help another: rule 1 is compared on the hard prompts with its control only. (Rewards became means over the
iterations, instead of final ones, after a trial on two seeds and before the first full run.)

Small world: the shipped policy, whose guesses are short and whose worked solutions are long, on its default task, 30
iterations of 16 x 8, rate 2e-4, 5 seeds: GRPO, rule 1 and its control. One answer to each of 256 held-out questions of
three and four operations (hard), 128 of one (easy) after training: accuracy, and mean length of the right answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.claims.claim import Claim
from polopt.claims.exact import Run, start
from polopt.claims.small import answers, trained
from polopt.core.rollout import Rollout
from polopt.methods.base.grpo import grpo
from polopt.methods.credit.adora import LengthAdvantage, adora
from polopt.policies.exact import SequenceSpace, enumeration, tree
from polopt.tasks.arithmetic import Arithmetic
from polopt.tasks.problems import Problem

SPACE = SequenceSpace(4, 6, end=True)
SCRATCH = 2
NEEDED = (0, 0, 0, 0, 3, 3, 3, 3)
RATES = (0.4, 0.4, 0.4, 0.4, 0.1, 0.1, 0.1, 0.1)
EASY, HARD = slice(0, 4), slice(4, 8)
GROUP, ITERATIONS = 8, 60


@dataclass(frozen=True)
class NextGroupsWeight(LengthAdvantage):
    """The weight that belongs to the next group of the batch: the same ones at random prompts; for experiments."""

    unit = "batch"

    def __call__(self, rollout: Rollout) -> Float[Tensor, " trajectory"]:
        weight = super().__call__(rollout)
        per_group = weight.new_ones(rollout.n_groups).scatter(0, rollout.group, weight)
        return per_group.roll(-1)[rollout.group]


ARMS = {
    "grpo": grpo | {"advantage": adora.advantage},
    "attenuate": adora,
    "amplify": adora | {"weight": LengthAdvantage("amplify")},
    "attenuate, control": adora | {"weight": NextGroupsWeight("attenuate")},
    "amplify, control": adora | {"weight": NextGroupsWeight("amplify")},
}


def scratchpads(seed: int) -> Problem:
    """The prompts of the design."""
    generator = torch.Generator().manual_seed(seed)
    count, (tokens, lengths) = len(NEEDED), (SPACE.sequences, SPACE.lengths)
    target = torch.randint(0, SCRATCH, (count,), generator=generator)
    before_end = tokens.gather(1, (lengths - 2).clamp_min(0)[:, None])[:, 0]
    finished = ~SPACE.truncated & (lengths > 1)
    enough = (tokens == SCRATCH).sum(1)[None] >= torch.tensor(NEEDED)[:, None]
    right = finished[None] & (before_end[None] == target[:, None]) & enough
    logits = 0.5 * torch.randn(count, SPACE.n_nodes, SPACE.vocabulary, generator=generator, dtype=torch.float64)
    before = tree.log_probabilities(SPACE, logits)
    rate = torch.tensor(RATES, dtype=torch.float64)[:, None]
    good = before.masked_fill(~right, -torch.inf).log_softmax(-1) + rate.log()
    bad = before.masked_fill(right, -torch.inf).log_softmax(-1) + (-rate).log1p()
    initial = tree.table_of(SPACE, torch.where(right, good, bad))
    return Problem("scratchpads", SPACE, {"correct": right.double()}, initial, initial, {}, (GROUP,) * count)


def _right_length(run: Run) -> float:
    """E[|y| | y is right], mean over the prompts."""
    with torch.no_grad():
        chance = run.policy.probabilities() * run.problem.reward
    return float(((chance * SPACE.lengths).sum(-1) / chance.sum(-1)).mean())


def exact(seed: int, quick: bool) -> Mapping[str, float]:
    """Length of right responses at the end, and mean reward of easy and of hard prompts, of every arm."""
    made = scratchpads(seed)
    found: dict[str, float] = {}
    for name, method in ARMS.items():
        run = start(made, method, seed=seed, group=GROUP, optimizer="sgd")
        rewards = []
        for _ in range(2 if quick else ITERATIONS):
            run.step()
            with torch.no_grad():
                rewards.append(enumeration.expected_reward(run.policy, made.reward))
        reward = torch.stack(rewards).mean(0)
        found |= {
            f"{name}/length": _right_length(run),
            f"{name}/easy": float(reward[EASY].mean()),
            f"{name}/hard": float(reward[HARD].mean()),
        }
    return found


def small(seed: int, quick: bool) -> Mapping[str, float]:
    """Accuracy on hard and easy questions and length of right answers to hard ones, in the small world."""
    questions = {
        "hard": Arithmetic().examples(8 if quick else 256, seed=0, split="test", levels=(3, 4)),
        "easy": Arithmetic().examples(8 if quick else 128, seed=0, split="test", levels=(1,)),
    }
    found: dict[str, float] = {}
    for name in ("grpo", "attenuate", "attenuate, control"):
        slots = {"advantage": ARMS[name].advantage, "weight": ARMS[name].weight}
        trainer = trained("grpo", seed=seed, quick=quick, steps=30, slots=slots)
        lengths = []
        for split, examples in questions.items():
            rollout = answers(trainer, examples)
            right = rollout["score"] > 0.5
            found[f"{name}/{split}"] = float(right.double().mean())
            lengths.append(rollout.lengths[right])
        every = torch.cat(lengths).double()
        found[f"{name}/length"] = float(every.mean()) if len(every) else 0.0
    return found


CLAIMS = (
    Claim(
        "adora",
        "length",
        "Right answers grow longer than with uniform weights.",
        "exact",
        "grpo",
        "exact mean length of right responses, tokens",
        "higher",
        "attenuate/length",
        "grpo/length",
        measure=exact,
    ),
    Claim(
        "adora",
        "length-control",
        "They grow longer than with the same weights at random prompts.",
        "exact",
        "the weights of the next group",
        "exact mean length of right responses, tokens",
        "higher",
        "attenuate/length",
        "attenuate, control/length",
        measure=exact,
    ),
    Claim(
        "adora",
        "length-amplify",
        "With amplification right answers grow longer than with uniform weights.",
        "exact",
        "grpo",
        "exact mean length of right responses, tokens",
        "higher",
        "amplify/length",
        "grpo/length",
        measure=exact,
    ),
    Claim(
        "adora",
        "hard-control",
        "The reward where length is needed grows faster than with the same weights at random prompts.",
        "exact",
        "the weights of the next group",
        "exact expected reward of the hard prompts, mean over the iterations",
        "higher",
        "attenuate/hard",
        "attenuate, control/hard",
        measure=exact,
    ),
    Claim(
        "adora",
        "hard-amplify",
        "With amplification the reward where length is needed grows faster than with uniform weights.",
        "exact",
        "grpo",
        "exact expected reward of the hard prompts, mean over the iterations",
        "higher",
        "amplify/hard",
        "grpo/hard",
        measure=exact,
    ),
    Claim(
        "adora",
        "hard-amplify-control",
        "With amplification it grows faster than with the same weights at random prompts.",
        "exact",
        "the weights of the next group",
        "exact expected reward of the hard prompts, mean over the iterations",
        "higher",
        "amplify/hard",
        "amplify, control/hard",
        measure=exact,
    ),
    Claim(
        "adora",
        "easy",
        "Its price is a lower training reward on easy prompts.",
        "exact",
        "grpo",
        "exact expected reward of the easy prompts, mean over the iterations",
        "lower",
        "attenuate/easy",
        "grpo/easy",
        measure=exact,
    ),
    Claim(
        "adora",
        "length-small",
        "Right answers grow longer than with uniform weights.",
        "small",
        "grpo",
        "mean length of right answers to held-out questions, tokens",
        "higher",
        "attenuate/length",
        "grpo/length",
        measure=small,
    ),
    Claim(
        "adora",
        "hard-small",
        "The accuracy on questions that need length grows faster than with uniform weights.",
        "small",
        "grpo",
        "accuracy on held-out sums of three and four operations",
        "higher",
        "attenuate/hard",
        "grpo/hard",
        measure=small,
    ),
    Claim(
        "adora",
        "hard-control-small",
        "It grows faster than with the same weights at random prompts.",
        "small",
        "the weights of the next group",
        "accuracy on held-out sums of three and four operations",
        "higher",
        "attenuate/hard",
        "attenuate, control/hard",
        measure=small,
    ),
)

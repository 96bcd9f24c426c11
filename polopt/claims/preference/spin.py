"""SPIN: demonstrations teach more in play against oneself (Chen et al. 2024, arXiv:2401.01335).

Design, fixed before the first run.

Exact world: 4 tokens, length 3, 4 prompts, a random quarter of the 64 sequences is right. Limited capacity: a policy in
which a token depends on its place and the token before it alone, so that it cannot represent the right sequences
exactly. 24 demonstrations per prompt, drawn uniformly from the right ones. The start of all arms is the initial policy
(normal logits, standard deviation 0.5) after 15 iterations of supervised fine-tuning; an iteration is 8 updates in two
passes over all demonstrations (the recipe's schedule), Adam at rate 0.05 in all arms, fine-tuning included. SPIN takes
the recipe's lambda 0.1 and one generated answer per demonstration, as in the paper. Accuracy is the exact probability
of a right sequence, mean over prompts.

- First iteration, and four of them: accuracy above that of fine-tuning continued for as many updates.
- Later gains shrink: what the fourth iteration adds to the accuracy is less than what the first adds.
- A fresh opponent: four iterations end at a higher accuracy than one of four times as many updates, against the first
  opponent and its answers.
- The gap closes: with lambda 1 and a tabular policy, which can become the data, the discriminator's gap
  sum_y (p_data - pi_t)(y) log pi_{t+1}/pi_t (y), p_data the uniform law that the demonstrations come from, is smaller
  in the fourth iteration than in the first (exact, mean over prompts).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from polopt.claims.claim import Claim
from polopt.claims.exact import Run, curve, start
from polopt.core.example import Example
from polopt.core.method import Method, Schedule
from polopt.core.override import override
from polopt.methods.preference.spin import spin
from polopt.objectives.pair_losses import ChosenNLL
from polopt.policies.exact import SequenceSpace
from polopt.rollouts.dataset import Dataset
from polopt.tasks.preferences import labelled
from polopt.tasks.problems import Problem, problem

SPACE = SequenceSpace(4, 3)
PROMPTS, SHOWN, BEFORE, ITERATIONS, RATE = 4, 24, 15, 4, 0.05
HEAD = "order-1"
TUNING = spin | {"rollout": Dataset("demonstrations"), "objective": ChosenNLL(), "models": {}}
LONG = spin | {"schedule": Schedule(ITERATIONS * spin.schedule.epochs, spin.schedule.minibatches)}
UNDAMPED = override(spin, {"objective.beta": 1.0})


def begun(made: Problem, method: Method, examples: Sequence[Example], seed: int, head: str = HEAD) -> Run:
    """A run from the problem's initial policy."""
    return start(made, method, seed=seed, examples=examples, lr=RATE, head=head)


def played(seed: int, quick: bool) -> Mapping[str, float]:
    """Accuracies of all arms from one fine-tuned start."""
    made, examples = _world(seed)
    before, iterations = (1, 2) if quick else (BEFORE, ITERATIONS)
    made = _tuned(made, examples, seed, before, HEAD)
    found = {
        name: curve(begun(made, method, examples, seed), count)
        for name, method, count in (("spin", spin, iterations), ("tuning", TUNING, iterations), ("long", LONG, 1))
    }
    own = found["spin"]
    return {
        **{f"{name}/first": values[1] for name, values in found.items()},
        **{f"{name}/last": values[-1] for name, values in found.items()},
        "gain/first": own[1] - own[0],
        "gain/last": own[-1] - own[-2],
    }


@torch.no_grad()
def gap(seed: int, quick: bool) -> Mapping[str, float]:
    """The discriminator's gap in the first and in the last iteration."""
    made, examples = _world(seed)
    before, iterations = (1, 2) if quick else (BEFORE, ITERATIONS)
    with torch.enable_grad():
        made = _tuned(made, examples, seed, before, "tabular")
    data = made.reward / made.reward.sum(-1, keepdim=True)
    run = begun(made, UNDAMPED, examples, seed, "tabular")

    def logs() -> Tensor:
        return run.policy.log_probabilities()

    gaps = []
    for _ in range(iterations):
        opponent = logs()
        with torch.enable_grad():
            run.step()
        gaps.append(float(((data - opponent.exp()) * (logs() - opponent)).sum(-1).mean()))
    return {"first": gaps[0], "last": gaps[-1]}


def _world(seed: int) -> tuple[Problem, Sequence[Example]]:
    made = problem("binary-verifier", space=SPACE, batch=PROMPTS, seed=seed)
    plain = problem("random-rewards", space=SPACE, batch=PROMPTS, seed=seed)
    made = replace(made, initial=plain.initial, reference=plain.initial)
    return made, labelled(made, SHOWN * PROMPTS, kind="demonstrations", law=made.reward, seed=seed)


def _tuned(made: Problem, examples: Sequence[Example], seed: int, iterations: int, head: str) -> Problem:
    run = begun(made, TUNING, examples, seed, head)
    curve(run, iterations)
    return replace(made, initial=run.policy.table().detach())


ACCURACY = "exact probability of a right answer"

CLAIMS = (
    Claim(
        "spin",
        "first-iteration",
        "One iteration of self-play adds more accuracy than as much fine-tuning on the same demonstrations.",
        "exact",
        "supervised fine-tuning, continued",
        ACCURACY,
        "higher",
        "spin/first",
        "tuning/first",
        measure=played,
    ),
    Claim(
        "spin",
        "iterations",
        "Four iterations of self-play add more accuracy than as much fine-tuning.",
        "exact",
        "supervised fine-tuning, continued",
        ACCURACY,
        "higher",
        "spin/last",
        "tuning/last",
        measure=played,
    ),
    Claim(
        "spin",
        "gains-shrink",
        "Later iterations add less than the first.",
        "exact",
        "its first iteration",
        "gain of the fourth iteration in accuracy",
        "lower",
        "gain/last",
        "gain/first",
        measure=played,
    ),
    Claim(
        "spin",
        "fresh-opponent",
        "A new opponent every iteration is better than a longer game against the first.",
        "exact",
        "as many updates against the first opponent and its answers",
        ACCURACY,
        "higher",
        "spin/last",
        "long/last",
        measure=played,
    ),
    Claim(
        "spin",
        "gap",
        "As the policy comes closer to the data, the gap between real and generated answers closes.",
        "exact",
        "its first iteration",
        "exact margin of the discriminator, nats, in the fourth iteration",
        "lower",
        "last",
        "first",
        measure=gap,
    ),
)

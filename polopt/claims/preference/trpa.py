"""TRPA: as stable as a preference, as right as GRPO (Su et al. 2025, arXiv:2504.04524).

Design, fixed before the first run.

Exact world: 4 tokens, length 4, 8 prompts. A random quarter of the sequences is correct, with initial probability 0.2;
a random half, drawn apart, has the right format. Levels by format, then correctness, as in the paper's puzzles. Groups
of 8, Adam at rate 0.1, 40 iterations of one update each. Arms: TRPA; online DPO, which is TRPA with one pair of the
best and the worst level of a group, the loss of DPO (beta 0.1) and no trust region; GRPO on the sum of the two rewards.
Every arm trains each seed's problem 4 times from other draws; numbers are means over these runs where nothing else is
said. The solve rate is the exact probability of being correct in the right format, mean over prompts.

- Collapse: largest fall of the solve rate below its highest value before, lower than for online DPO.
- Spread: standard deviation over the 4 runs of the last solve rate, lower than for online DPO.
- Step: exact KL(pi_old || pi) of an update, mean over prompts and updates, lower than for online DPO.
- Accuracy: last solve rate not below GRPO's by more than 0.05.
- Chosen up, rejected down: change by an update of the log-probability of winners (losers), mean over the pairs of its
  batch and over updates that had any; above (below) 0.
- Apart: share of updates in which winners and losers both rose or both fell, lower than for online DPO.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from polopt.claims.claim import Claim
from polopt.claims.exact import largest_fall, start
from polopt.core.method import Method
from polopt.core.rollout import Rollout
from polopt.filters.preferences import BestWorst
from polopt.methods.base.grpo import grpo
from polopt.methods.preference.dpo import DPO
from polopt.methods.preference.trpa import trpa
from polopt.objectives.preference import Pairs
from polopt.policies.exact import SequenceSpace, divergences
from polopt.tasks.problems import Problem, problem

SPACE = SequenceSpace(4, 4)
PROMPTS, GROUP, ITERATIONS, RUNS = 8, 8, 40, 4
ARMS: Mapping[str, Method] = {
    "trpa": trpa,
    "dpo": trpa | {"filter": BestWorst("label"), "objective": DPO(), "regularizer": None},
    "grpo": grpo,
}


def puzzles(seed: int) -> Problem:
    """Which sequences are correct, and which have the right format."""
    made = problem("binary-verifier", space=SPACE, batch=PROMPTS, pass_rate=0.2, seed=seed)
    draw = torch.rand(made.reward.shape, generator=torch.Generator().manual_seed(seed)).argsort(1)
    return replace(made, rewards={**made.rewards, "format": (draw < SPACE.n_sequences // 2).double()})


@dataclass
class Course:
    """What one run went through."""

    solved: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    chosen: list[float] = field(default_factory=list)
    rejected: list[float] = field(default_factory=list)


@torch.no_grad()
def course(made: Problem, method: Method, seed: int, iterations: int) -> Course:
    """A run with everything that is measured of it."""
    run = start(made, method, seed=seed, group=GROUP)
    both = made.rewards["correct"] * made.rewards["format"]
    batches: list[Rollout] = []
    collect: Any = run.trainer.collect

    def watched(*arguments: Any) -> Any:
        batch = collect(*arguments)
        if batch.kept is not None:
            batches.append(batch.kept)
        return batch

    run.trainer.collect = watched  # type: ignore[assignment]
    now = run.policy.probabilities()
    found = Course([float((now * both).sum(-1).mean())])
    for _ in range(iterations):
        batches.clear()
        with torch.enable_grad():
            run.step()
        before, now = now, run.policy.probabilities()
        found.solved.append(float((now * both).sum(-1).mean()))
        found.steps.append(float(divergences.kl(before, now).mean()))
        for kept in batches:
            if "label" in kept and len((pairs := Pairs.of(kept)).winner):
                moved = kept.sum_steps(run.policy.evaluate(kept, frozenset({"logp"})).logp - kept.logp)
                found.chosen.append(float(moved[pairs.winner].mean()))
                found.rejected.append(float(moved[pairs.loser].mean()))
    return found


def runs(seed: int, quick: bool) -> Mapping[str, float]:
    """All arms on the seed's problem."""
    made, count, iterations = puzzles(seed), 2 if quick else RUNS, 2 if quick else ITERATIONS
    found: dict[str, float] = {}
    for name, method in ARMS.items():
        courses = [course(made, method, 100 * seed + number, iterations) for number in range(count)]
        last = [one.solved[-1] for one in courses]
        found |= {
            f"{name}/solved": statistics.fmean(last),
            f"{name}/spread": statistics.stdev(last),
            f"{name}/fall": statistics.fmean(largest_fall(one.solved) for one in courses),
            f"{name}/step": statistics.fmean(statistics.fmean(one.steps) for one in courses),
        }
        moves = [move for one in courses for move in zip(one.chosen, one.rejected, strict=True)]
        if moves:
            found |= {
                f"{name}/chosen": statistics.fmean(up for up, _ in moves),
                f"{name}/rejected": statistics.fmean(down for _, down in moves),
                f"{name}/together": statistics.fmean(float(up * down > 0) for up, down in moves),
            }
    return found


ONLINE_DPO = "DPO on the best and the worst of each group"


def _against_dpo(name: str, statement: str, metric: str, measured: str) -> Claim:
    treatment, control = f"trpa/{measured}", f"dpo/{measured}"
    return Claim("trpa", name, statement, "exact", ONLINE_DPO, metric, "lower", treatment, control, measure=runs)


CLAIMS = (
    _against_dpo("collapse", "TRPA falls back less than online DPO.", "largest fall of the exact solve rate", "fall"),
    _against_dpo(
        "spread",
        "Runs of TRPA end closer to each other than runs of online DPO.",
        "standard deviation of the last exact solve rate over 4 runs",
        "spread",
    ),
    _against_dpo(
        "step",
        "An update of TRPA moves the policy less than one of online DPO.",
        "exact KL from the old to the new policy, nats, mean over updates",
        "step",
    ),
    Claim(
        "trpa",
        "accuracy",
        "TRPA solves as much as GRPO.",
        "exact",
        "grpo on the sum of the rewards",
        "last exact solve rate",
        "higher",
        "trpa/solved",
        "grpo/solved",
        margin=0.05,
        measure=runs,
    ),
    Claim(
        "trpa",
        "chosen",
        "An update raises the log-probability of what was preferred.",
        "exact",
        "the policy before",
        "change of the winners' log-probability, mean over updates",
        "higher",
        "trpa/chosen",
        None,
        measure=runs,
    ),
    Claim(
        "trpa",
        "rejected",
        "An update lowers the log-probability of what was not preferred.",
        "exact",
        "the policy before",
        "change of the losers' log-probability, mean over updates",
        "lower",
        "trpa/rejected",
        None,
        measure=runs,
    ),
    _against_dpo(
        "apart",
        "Winners and losers move the same way less often than under online DPO.",
        "share of updates in which both rise or both fall",
        "together",
    ),
)

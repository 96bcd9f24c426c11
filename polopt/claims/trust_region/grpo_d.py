"""GRPO-D: a KL coefficient that falls, then rises (Liu et al. 2025, arXiv:2503.16081).

Design, fixed before the first run. Exact world: 4 tokens, length 5, 8 prompts, one row of logits per position. Position
0 is the form (format 1 iff its token is 0, reference probability 0.5). Positions 1 and 2 are task B (correct 1 iff both
are the prompt's targets, reference probability 0.3 each). Positions 3 and 4 are task A, which the reference has learnt
(its target has 0.9 at each) and which earns nothing any more: it is kept by the anchor alone. 8 responses per prompt,
Adam at rate 0.1, one update per rollout, 40 iterations (few samples), reward correct + format.

Arms: beta constant at 0, 0.01, 0.04 and 0.1; GRPO-D from 0.07 down to 0.04 at 30% of the run and up to 0.1; the same
schedule backwards in time (0.1 down to 0.04 at 70%, up to 0.07).

- B: exact expected accuracy on task B after the last iteration. "At least matches the best constant": against the
  constant that is best for the seed, not worse by more than 0.02. Against the reverse schedule: higher.
- A: exact probability that task A is right after the last iteration, against beta = 0.
- Drift: exact KL(pi || reference) of responses, mean over the iterations of the first half, against the reverse
  schedule: weak anchoring comes early.

The vision-language models and the transfer between counting and geometry are not testable here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from polopt.claims.claim import Claim
from polopt.claims.exact import Run, start
from polopt.core.part import Part
from polopt.methods.trust_region.grpo_d import DynamicKL, grpo_d
from polopt.policies.exact import ExactPolicy, SequenceSpace
from polopt.regularizers.kl import KL
from polopt.tasks.problems import Problem
from polopt.training.budget import Budget

SPACE = SequenceSpace(4, 5)
PROMPTS, GROUP, ITERATIONS = 8, 8, 40
FORM, B, A = 0, (1, 2), (3, 4)
CONSTANTS = (0.0, 0.01, 0.04, 0.1)


@dataclass(frozen=True)
class Backwards(Part):
    """The schedule of `DynamicKL` run from its end to its start."""

    forwards: DynamicKL

    def __call__(self, statistics: Mapping[str, float]) -> dict[str, float]:
        return self.forwards({"progress": 1 - statistics.get("progress", 0.0)})


@dataclass(frozen=True, eq=False)
class TwoTasks(Problem):
    """A problem whose policy has one row of logits per position; ``old`` [B, S] says where the old task is right."""

    old: Tensor = field(default_factory=lambda: torch.zeros(0))

    def policy(self, head: str = "order-0") -> ExactPolicy:
        return super().policy(head)


def two_tasks(seed: int) -> TwoTasks:
    """A form, a task to learn and a task to keep."""
    target = torch.randint(0, 4, (PROMPTS, SPACE.length), generator=torch.Generator().manual_seed(seed))
    target[:, FORM] = 0
    chance = torch.tensor([0.5, 0.3, 0.3, 0.9, 0.9], dtype=torch.float64).expand(PROMPTS, -1)
    rows = ((1 - chance) / 3)[..., None].repeat(1, 1, 4).scatter(-1, target[..., None], chance[..., None])
    initial = rows.log()[:, SPACE.depths]
    match = SPACE.sequences[None] == target[:, None]
    rewards = {"correct": match[..., B].all(-1).double(), "format": match[..., FORM].double()}
    old = match[..., A].all(-1).double()
    return TwoTasks("two-tasks", SPACE, rewards, initial, initial, {}, (GROUP,) * PROMPTS, old=old)


def kl(run: Run) -> float:
    """Exact KL(pi || reference) of responses, mean over the prompts."""
    with torch.no_grad():
        logp = run.policy.log_probabilities()
        reference = replace(run.problem, initial=run.problem.reference).policy().log_probabilities()
        return float((logp.exp() * (logp - reference)).sum(-1).mean())


def kept(run: Run) -> float:
    """Exact probability that task A is right, mean over the prompts."""
    assert isinstance(run.problem, TwoTasks)
    with torch.no_grad():
        return float((run.policy.probabilities() * run.problem.old).sum(-1).mean())


def schedules(seed: int, quick: bool) -> Mapping[str, float]:
    """Accuracy on B, accuracy kept on A and early drift of every schedule."""
    made = two_tasks(seed)
    iterations = 2 if quick else ITERATIONS
    arms: dict[str, dict[str, Any]] = {"dynamic": {}, "reverse": {"controller": Backwards(DynamicKL())}}
    arms["reverse"]["regularizer"] = KL(beta=DynamicKL().high)
    arms |= {f"constant {beta:g}": {"controller": None, "regularizer": KL(beta=beta)} for beta in CONSTANTS}
    found: dict[str, float] = {}
    for name, slots in arms.items():
        run = start(made, grpo_d | slots, seed=seed, group=GROUP)
        run.trainer.budget = Budget(steps=iterations)
        drift = []
        for _ in range(iterations):
            run.step()
            drift.append(kl(run))
        early = drift[: len(drift) // 2]
        found |= {f"{name}/b": run.rewards["correct"], f"{name}/a": kept(run), f"{name}/drift": sum(early) / len(early)}
    return found | {"best/b": max(found[f"constant {beta:g}/b"] for beta in CONSTANTS)}


def _claim(
    name: str,
    statement: str,
    baseline: str,
    metric: str,
    treatment: str,
    against: str,
    margin: float = 0.0,
) -> Claim:
    return Claim("grpo-d", name, statement, "exact", baseline, metric, "higher", treatment, against, margin, schedules)


ACCURACY = "exact accuracy on the new task after 40 iterations"
CLAIMS = (
    _claim(
        "matches-best-constant",
        "GRPO-D is at least as accurate on the new task as the best constant coefficient.",
        "the best of four constants",
        ACCURACY,
        "dynamic/b",
        "best/b",
        margin=0.02,
    ),
    _claim(
        "beats-reverse",
        "GRPO-D is more accurate on the new task than the same schedule backwards.",
        "the reverse schedule",
        ACCURACY,
        "dynamic/b",
        "reverse/b",
    ),
    _claim(
        "keeps-old-task",
        "GRPO-D keeps more of the old task than training without an anchor.",
        "beta = 0",
        "exact accuracy on the old task after 40 iterations",
        "dynamic/a",
        "constant 0/a",
    ),
    _claim(
        "explores-early",
        "GRPO-D is further from the reference in the first half of the run than the same schedule backwards.",
        "the reverse schedule",
        "mean KL to the reference over the first 20 iterations, nats per response",
        "dynamic/drift",
        "reverse/drift",
    ),
    Claim(
        "grpo-d",
        "vision",
        "GRPO-D improves vision-language models on counting and geometry, and their transfer between the two.",
        "small",
        "grpo and supervised fine-tuning",
        "accuracy",
        "higher",
        untestable="vision-language models do not run at this scale",
    ),
)

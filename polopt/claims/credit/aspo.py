"""ASPO: earlier tool calls at the same accuracy, no right answer punished (Lin and Xu 2025, arXiv:2508.19201).

Design, fixed before the first run. Exact world: 2 plain tokens and TOOL, length 5, 8 prompts. An answer is right iff
its last token is the prompt's target. TOOL may be written at any of the first four positions and changes nothing: what
it would reveal is not modelled, so that answers are right equally often with and without it. At first TOOL has
probability 0.2 and the target 0.5, up to normal noise of 0.5 on every logit. Steps after the first TOOL are of turn 1;
a TOOL at the last position ends the answer and is no call.

Groups of 8, Adam at rate 0.1, one update per rollout, 60 iterations, in four arms: GRPO; GRPO with an auxiliary reward
for early calls, which adds (5 - p) / 10 to right answers that call at position p (0.4 to 0.1); ASPO with its two
published settings, (-2, 0.7) and (-2.5, 0.9). Measured exactly at the end: mean position p of the first call (1 to 4)
given that there is one, over all prompts together, and expected accuracy. "Statistically equal": within 0.03.

Signs: 64 groups of 8 for every prompt from the initial policy, and again with the target at probability 0.97, so that
most groups are all right. Share of right answers with a negative advantage: ASPO (both settings, all groups), and the
auxiliary reward in groups in which all are right, "about one half" being 0.4 to 0.6.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.claims.claim import Claim
from polopt.claims.exact import Run, batch, credited, curve, start
from polopt.core.override import override
from polopt.core.part import Part
from polopt.core.rollout import Rollout
from polopt.core.segments import segment_cumsum
from polopt.methods.base.grpo import grpo
from polopt.methods.credit.aspo import aspo
from polopt.policies.exact import SequenceSpace
from polopt.rollouts.groups import Groups
from polopt.tasks.problems import Problem

SPACE = SequenceSpace(3, 5)
TOOL = 2
PROMPTS, GROUP, ITERATIONS, GROUPS = 8, 8, 60, 64
CALL, RIGHT, ALMOST_ALWAYS = 0.2, 0.5, 0.97
MARGIN = 0.03


def turns(rollout: Rollout) -> Rollout:
    """With the step column ``turn``: 1 after the first TOOL, else 0."""
    called = (rollout["action"] == TOOL).to(rollout.logp)
    before = segment_cumsum(called, rollout.trajectory, rollout.n_trajectories, exclusive=True)
    return rollout.with_columns(step={"turn": (before > 0).long()})


@dataclass(frozen=True)
class ToolGroups(Groups):
    """Groups of answers that may call a tool by writing TOOL; for experiments."""

    gives = Groups.gives | {"turn"}

    def finish(self, rollout: Rollout, seed: int) -> Rollout:
        return turns(rollout)


@dataclass(frozen=True)
class EarlyBonus(Part):
    """reward += scale (H - p) / H for right answers that call the tool at position p; for experiments."""

    scale: float = 0.5

    needs = frozenset({"reward", "score", "turn"})

    def __call__(self, rollout: Rollout) -> Rollout:
        after = rollout.sum_steps(rollout["turn"].to(rollout.reward))
        bonus = self.scale * after / SPACE.length * (rollout["score"] > 0)
        return rollout.with_columns(trajectory={"reward": rollout.reward + bonus})


ARMS = {
    "grpo": grpo | {"rollout": ToolGroups()},
    "auxiliary": grpo | {"rollout": ToolGroups(), "reward": EarlyBonus()},
    "conservative": aspo | {"rollout": ToolGroups()},
    "aggressive": override(aspo | {"rollout": ToolGroups()}, {"advantage.delta": -2.5, "advantage.k": 0.9}),
}


def made(seed: int, right: float = RIGHT) -> Problem:
    """The problem of the docstring; ``right`` is the probability of the target at the last position."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, TOOL, (PROMPTS,), generator=generator)
    noise = torch.randn(PROMPTS, SPACE.n_nodes, SPACE.vocabulary, generator=generator, dtype=torch.float64)
    early = torch.full((SPACE.vocabulary,), (1 - CALL) / 2, dtype=torch.float64)
    early[TOOL] = CALL
    last = torch.full((PROMPTS, SPACE.vocabulary), (1 - right) / 2, dtype=torch.float64)
    last.scatter_(1, target[:, None], right)
    final = (SPACE.depths == SPACE.length - 1)[None, :, None]
    initial = torch.where(final, last[:, None], early).log() + 0.5 * noise
    reward = (SPACE.sequences[None, :, -1] == target[:, None]).double()
    return Problem("tool", SPACE, {"correct": reward}, initial, initial, {}, (GROUP,) * PROMPTS)


def first_call(run: Run) -> float:
    """Mean position of the first call given that there is one, 1 at the first token; exact."""
    tool: Float[Tensor, "sequence time"] = (SPACE.sequences[:, :-1] == TOOL).double()
    position = 1 + (tool.cumsum(1) == 0).sum(1)
    with torch.no_grad():
        called = run.policy.probabilities() * (tool.sum(1) > 0)
    return float((called * position).sum() / called.sum())


def training(seed: int, quick: bool) -> Mapping[str, float]:
    """Position of the first call and accuracy at the end."""
    found: dict[str, float] = {}
    for name, method in ARMS.items():
        run = start(made(seed), method, seed=seed, group=GROUP)
        curve(run, 2 if quick else ITERATIONS, lambda run: 0.0)
        found |= {f"{name}/call": first_call(run), f"{name}/accuracy": run.reward}
    return found


def signs(seed: int, quick: bool) -> Mapping[str, float]:
    """Share of right answers that are punished."""
    negative = dict.fromkeys(ARMS, 0)
    counted = dict.fromkeys(ARMS, 0)
    for chance in (RIGHT, ALMOST_ALWAYS):
        problem = made(seed, chance)
        policy = problem.policy()
        rollout = turns(batch(problem, policy, seed=seed, sizes=[GROUP] * (4 if quick else GROUPS)))
        right = rollout["score"] > 0
        everyone = rollout.group_mean(right.double())[rollout.group] == 1
        for name, method in ARMS.items():
            advantage = credited(method, policy, rollout).advantage[rollout.lengths.cumsum(0) - 1]
            judged = everyone if name == "auxiliary" else right
            negative[name] += int((advantage[judged] < 0).sum())
            counted[name] += int(judged.sum())
    share = {name: negative[name] / max(counted[name], 1) for name in ARMS}
    both = max(share["conservative"], share["aggressive"])
    return {"aspo": both, "auxiliary": share["auxiliary"], "half": 0.5}


CLAIMS = (
    Claim(
        "aspo",
        "earlier-call",
        "ASPO in its conservative setting makes the policy call its tool earlier.",
        "exact",
        "grpo",
        "exact mean position of the first call after 60 iterations, tokens",
        "lower",
        "conservative/call",
        "grpo/call",
        measure=training,
    ),
    Claim(
        "aspo",
        "earlier-call-aggressive",
        "ASPO in its aggressive setting makes the policy call its tool earlier.",
        "exact",
        "grpo",
        "exact mean position of the first call after 60 iterations, tokens",
        "lower",
        "aggressive/call",
        "grpo/call",
        measure=training,
    ),
    Claim(
        "aspo",
        "accuracy",
        "ASPO in its conservative setting is as accurate as the baseline.",
        "exact",
        "grpo",
        "expected accuracy after 60 iterations",
        "equal",
        "conservative/accuracy",
        "grpo/accuracy",
        margin=MARGIN,
        measure=training,
    ),
    Claim(
        "aspo",
        "accuracy-aggressive",
        "ASPO in its aggressive setting is as accurate as the baseline.",
        "exact",
        "grpo",
        "expected accuracy after 60 iterations",
        "equal",
        "aggressive/accuracy",
        "grpo/accuracy",
        margin=MARGIN,
        measure=training,
    ),
    Claim(
        "aspo",
        "auxiliary-accuracy",
        "An auxiliary reward for early calls lowers the accuracy.",
        "exact",
        "grpo",
        "expected accuracy after 60 iterations",
        "lower",
        "auxiliary/accuracy",
        "grpo/accuracy",
        measure=training,
    ),
    Claim(
        "aspo",
        "no-right-answer-punished",
        "ASPO gives no right answer a negative advantage.",
        "exact",
        "none",
        "share of right answers with a negative advantage",
        "equal",
        "aspo",
        None,
        margin=1e-9,
        measure=signs,
    ),
    Claim(
        "aspo",
        "auxiliary-punishes-half",
        "Where all answers are right, an auxiliary reward gives about half of them a negative advantage.",
        "exact",
        "one half",
        "share of right answers with a negative advantage in groups in which all are right",
        "equal",
        "auxiliary",
        "half",
        margin=0.1,
        measure=signs,
    ),
)

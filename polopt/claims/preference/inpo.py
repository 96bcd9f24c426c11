"""INPO: a loss on pairs reaches the Nash policy, iterative DPO does not (Zhang et al. 2024, arXiv:2407.00617).

Design, fixed before the first run. Exact world, one-step answers, random games of 5 answers (P = 1/2 + (U - U^T) / 2, U
uniform), reference logits normal with standard deviation 0.5, which is the start; tau = 0.1. Metric: log10 of the exact
regularised gap, which is the exploitability max_q J(q, pi_t) - 1/2; mean over the prompts. Baselines: DPO with beta = 1
on fresh pairs in every iteration, anchored at the reference, or at the policy of the iteration's start.

Exact (1 prompt, 20 iterations): each iteration minimises the method's own loss, weighted over all pairs of answers of
pi_t and both labels, by L-BFGS from pi_t. INPO with eta = 0.5: the last gap is below 1e-3, below both baselines' and
below that of INPO with eta = 0.11, whose steps are too large (eta must exceed tau).

Sampled (2 prompts, through the trainer, 25 iterations): 64 pairs of two independent answers to each prompt, labels
drawn by the game, 10 updates with Adam 0.05 on each batch. Mean over the last 5 iterations: INPO (eta = 0.5) below the
start, below both baselines.

Small world: the game of manners (`polopt.claims.manners`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from polopt.claims import manners
from polopt.claims.claim import Claim
from polopt.claims.exact import start, with_updates
from polopt.claims.games import game_of, log_gap_of, probabilities, random_game, table_judge
from polopt.core.loss import Evaluation
from polopt.core.method import Method
from polopt.core.rollout import Rollout
from polopt.filters.preferences import RandomPair
from polopt.methods.preference.dpo import DPO, dpo
from polopt.methods.preference.inpo import INPO, inpo
from polopt.models import Snapshot
from polopt.rollouts.groups import Groups
from polopt.tasks.problems import Problem

TAU: Final = 0.1
ANSWERS, ITERATIONS = 5, 20
PAIRS, BATCHES, UPDATES, LAST, RATE = 64, 25, 10, 5, 0.05
STEP, LARGE = 0.5, 0.11

OBJECTIVES: Mapping[str, tuple[Any, str]] = {
    "inpo": (INPO(beta=STEP, ratio=TAU / STEP), "anchor"),
    "large": (INPO(beta=LARGE, ratio=TAU / LARGE), "anchor"),
    "dpo ref": (DPO(beta=1.0), "ref"),
    "dpo last": (DPO(beta=1.0), "anchor"),
}
"""Objective of each arm, and the model that its ``logp/ref`` is of where it has one anchor."""


def minimum(objective: Any, anchor: str, table: Tensor, p: Tensor, reference: Tensor) -> Tensor:
    """The policy [A] of least expected loss over pairs of answers of p with drawn labels."""
    size = len(p)
    winner, loser = (index.flatten() for index in torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij"))
    members = torch.stack([winner, loser], 1).flatten()
    ref = p if isinstance(objective, DPO) and anchor == "anchor" else reference
    rollout = Rollout.from_arrays(
        torch.arange(len(members)),
        torch.arange(size * size).repeat_interleave(2),
        step={"logp/ref": ref.log()[members], "logp/anchor": p.log()[members]},
        trajectories={"label": torch.tensor([1.0, 0.0]).repeat(size * size)},
    )
    weight = p[winner] * p[loser] * table.flatten()
    logits = p.log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=20, line_search_fn="strong_wolfe", tolerance_grad=1e-10)

    def closure() -> Tensor:
        optimizer.zero_grad()
        terms = objective(Evaluation({"logp": logits.log_softmax(-1)[members]}), rollout).value
        loss: Tensor = (weight * terms).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return logits.detach().softmax(-1)


def exact(seed: int, quick: bool) -> Mapping[str, float]:
    """Each iteration minimised exactly."""
    made = random_game(ANSWERS, prompts=1, seed=seed, spread=0.5)
    table, reference = game_of(made).preference[0], probabilities(made.policy())[0]
    found = {"small": -3.0}
    for arm, (objective, anchor) in OBJECTIVES.items():
        p = reference
        for _ in range(2 if quick else ITERATIONS):
            p = minimum(objective, anchor, table, p, reference)
        found[arm] = log_gap_of(made, p[None], TAU)
    return found


def method_of(arm: str, made: Problem) -> Method:
    """The arm as a method of the trainer."""
    objective, anchor = OBJECTIVES[arm]
    judged = {"rollout": Groups(), "reward": table_judge(made), "filter": RandomPair(column="beats")}
    if isinstance(objective, INPO):
        return with_updates(inpo | judged | {"objective": objective}, UPDATES)
    model = Snapshot() if anchor == "ref" else Snapshot(every=1)
    return with_updates(dpo | judged | {"objective": objective, "models": {"ref": model}}, UPDATES)


def sampled(seed: int, quick: bool) -> Mapping[str, float]:
    """Through the trainer, on sampled pairs."""
    made = random_game(ANSWERS, prompts=2, seed=seed, spread=0.5)
    reference = probabilities(made.policy())
    pool = [replace(example, id=f"{example.id}/{n}") for n in range(PAIRS) for example in made.examples()]
    batches, last = (2, 1) if quick else (BATCHES, LAST)
    found = {"start": log_gap_of(made, reference, TAU)}
    for arm in ("inpo", "dpo ref", "dpo last"):
        run = start(made, method_of(arm, made), seed=seed, group=2, lr=RATE, examples=pool)
        gaps = []
        for _ in range(batches):
            run.step()
            # The model ``ref`` may follow the policy: the game's reference is the start.
            gaps.append(log_gap_of(made, probabilities(run.policy), TAU))
        found[arm] = sum(gaps[-last:]) / last
    return found


GAP = "log10 of the exact exploitability of the last policy"
SAMPLED = "log10 of the exact exploitability, mean over the last 5 iterations"


def _claim(name: str, statement: str, baseline: str, control: str, measure: Any) -> Claim:
    return Claim(
        "inpo",
        name,
        statement,
        "exact",
        baseline,
        GAP if measure is exact else SAMPLED,
        "lower",
        "inpo",
        control,
        measure=measure,
    )


AT_REF, AT_LAST = "iterative DPO anchored at the reference", "iterative DPO anchored at the current policy"

CLAIMS = (
    _claim("last-iterate", "INPO's exploitability goes to 0: below 0.001.", "0.001", "small", exact),
    _claim("dpo-reference", f"INPO ends below {AT_REF}.", AT_REF, "dpo ref", exact),
    _claim("dpo-current", f"INPO ends below {AT_LAST}.", AT_LAST, "dpo last", exact),
    _claim("large-steps", "Steps that are too large (eta near tau) end higher.", "INPO, eta = 0.11", "large", exact),
    _claim("sampled-falls", "On sampled pairs INPO's exploitability falls.", "the start", "start", sampled),
    _claim("sampled-reference", f"On sampled pairs INPO ends below {AT_REF}.", AT_REF, "dpo ref", sampled),
    _claim("sampled-current", f"On sampled pairs INPO ends below {AT_LAST}.", AT_LAST, "dpo last", sampled),
    *manners.claims("inpo"),
)

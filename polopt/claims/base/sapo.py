"""SAPO: a gate that fades instead of a clip that cuts (Gao et al. 2025, arXiv:2511.20347).

Design, fixed before the first run. Exact world: 5 tokens, length 6, 8 prompts of pass rate 0.25, reward 1 on a random
quarter of the sequences, 8 responses per prompt, 8 updates per rollout in every arm, SGD at rate 20. "Corrupted": one
step of each response, drawn at random, has a recorded log-prob that is off by 1 nat up or down, in every arm.
Baselines: GRPO with clip 0.2, GSPO with the paper's clip.

- Steps with gradient: one rollout of the initial policy, 8 updates by GRPO (the same weights for both arms); then the
  share of the steps with an advantage whose gradient is more than a thousandth of the one at ratio 1.
- Corruption: first update on a corrupted rollout; gradient of the steps that are not corrupted, in absolute value, over
  the one they would have at ratio 1, mean over the steps with an advantage.
- Reward after 40 iterations on corrupted rollouts: "at least equal" means not lower by more than 0.02. "Stable for
  longer": the largest fall of the expected reward below its earlier maximum is lower than GRPO's.
- Ablation with the paper's values, tau_pos 1: tau_neg 0.95 against 1.05, largest fall on corrupted rollouts.

At this rate the reward of no arm falls by more than two thousandths on average, so stability and the ablation have
little to compare. Rates up to 500, tried afterwards, did not show the claimed order either.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from polopt.claims.claim import Claim
from polopt.claims.exact import (
    SGD,
    NoisyGroups,
    batch,
    credited,
    curve,
    disturbed,
    gradient,
    largest_fall,
    start,
    step_gradient,
    with_updates,
)
from polopt.core.method import Method
from polopt.core.override import override
from polopt.core.rollout import Rollout
from polopt.methods.base.grpo import grpo
from polopt.methods.base.gspo import gspo
from polopt.methods.base.sapo import sapo
from polopt.policies.exact import ExactPolicy, SequenceSpace
from polopt.tasks.problems import Problem, problem

SPACE = SequenceSpace(5, 6)
GROUP, UPDATES, SHIFT = 8, 8, 1.0
ARMS = {
    "sapo": sapo,
    "grpo": grpo,
    "gspo": gspo,
    "sapo-reversed": override(sapo, {"objective.tau_neg": 0.95}),
}


def _problem(seed: int) -> Problem:
    return problem("binary-verifier", space=SPACE, batch=8, pass_rate=0.25, seed=seed)


def _kept(method: Method, policy: ExactPolicy, rollout: Rollout) -> torch.Tensor:
    """|gradient| of each step over the one at ratio 1."""
    with torch.no_grad():
        now = policy.evaluate(rollout, frozenset({"logp"})).logp
    ideal = step_gradient(method, policy, rollout.with_columns(step={"logp": now}))
    return torch.where(ideal == 0, 0.0, (step_gradient(method, policy, rollout) / ideal).abs())


def alive(seed: int, quick: bool) -> Mapping[str, float]:
    """Share of the steps that keep a gradient after 8 updates."""
    made = _problem(seed)
    policy = made.policy()
    rollout = credited(grpo, policy, batch(made, policy, seed=seed, sizes=[GROUP]))
    for _ in range(1 if quick else UPDATES):
        step = gradient(grpo, policy, rollout)
        with torch.no_grad():
            policy.logits.add_(step, alpha=SGD)
    credit = rollout.advantage != 0
    return {
        name: float((_kept(ARMS[name], policy, rollout)[credit] > 1e-3).double().mean()) for name in ("sapo", "grpo")
    }


def corruption(seed: int, quick: bool) -> Mapping[str, float]:
    """What the intact steps of corrupted responses keep of their gradient."""
    made = _problem(seed)
    policy = made.policy()
    rollout = credited(grpo, policy, batch(made, policy, seed=seed, sizes=[GROUP] * (1 if quick else 8)))
    rollout = disturbed(rollout, torch.Generator().manual_seed(seed), corrupted=1, shift=SHIFT)
    intact = (rollout.advantage != 0) & ~rollout["corrupted"]
    return {name: float(_kept(ARMS[name], policy, rollout)[intact].mean()) for name in ("sapo", "gspo")}


def _rewards(name: str, seed: int, iterations: int) -> list[float]:
    corrupt = with_updates(ARMS[name], UPDATES) | {"rollout": NoisyGroups(corrupted=1, shift=SHIFT)}
    return curve(start(_problem(seed), corrupt, seed=seed, group=GROUP, optimizer="sgd"), iterations)


def learning(seed: int, quick: bool) -> Mapping[str, float]:
    """Final reward on corrupted rollouts."""
    return {name: _rewards(name, seed, 2 if quick else 40)[-1] for name in ("sapo", "grpo", "gspo")}


def stress(seed: int, quick: bool) -> Mapping[str, float]:
    """Largest fall of the reward on corrupted rollouts at a high rate."""
    arms = ("sapo", "grpo", "sapo-reversed")
    return {name: largest_fall(_rewards(name, seed, 2 if quick else 40)) for name in arms}


END = "expected reward after 40 iterations on corrupted rollouts"
FALL = "largest fall of the expected reward below its earlier maximum"

CLAIMS = (
    Claim(
        "sapo",
        "gradient-share",
        "After eight updates more steps keep a gradient than under GRPO.",
        "exact",
        "grpo",
        "share of the steps that keep a thousandth of their gradient",
        "higher",
        "sapo",
        "grpo",
        measure=alive,
    ),
    Claim(
        "sapo",
        "corrupted-token",
        "The other tokens of a response with a corrupted one keep learning, where GSPO loses them.",
        "exact",
        "gspo",
        "gradient of intact steps over the one at ratio 1",
        "higher",
        "sapo",
        "gspo",
        measure=corruption,
    ),
    Claim(
        "sapo",
        "reward-grpo",
        "With corrupted tokens the final reward is at least GRPO's.",
        "exact",
        "grpo",
        END,
        "higher",
        "sapo",
        "grpo",
        margin=0.02,
        measure=learning,
    ),
    Claim(
        "sapo",
        "reward-gspo",
        "With corrupted tokens the final reward is at least GSPO's.",
        "exact",
        "gspo",
        END,
        "higher",
        "sapo",
        "gspo",
        margin=0.02,
        measure=learning,
    ),
    Claim(
        "sapo",
        "stability",
        "With corrupted tokens training is more stable than GRPO's.",
        "exact",
        "grpo",
        FALL,
        "lower",
        "sapo",
        "grpo",
        measure=stress,
    ),
    Claim(
        "sapo",
        "temperatures",
        "tau_neg < tau_pos is less stable than tau_neg > tau_pos.",
        "exact",
        "sapo, tau_neg 1.05",
        FALL,
        "higher",
        "sapo-reversed",
        "sapo",
        measure=stress,
    ),
)

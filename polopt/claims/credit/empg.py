"""EMPG: sure decisions learn more, uncertain ones less (Wang et al. 2025, arXiv:2509.09265).

Design, fixed before the first run. Exact world, every step a decision step of its own.

- Premise: softmax policies over 2 to 12 actions with normal logits, 50 per seed; E||grad_z log pi||^2 by enumeration
  against 1 - sum pi^2, largest absolute difference. Equal means to 1e-12. Spearman's rank correlation of the expected
  squared norm with the Renyi-2 entropy over all 50 must be above 0.999.
- Learning: 6 decisions over 6 actions, 8 prompts. Decisions 1, 3 and 5 decide: two actions are plausible, the right one
  with probability 0.4, the wrong one with 0.6 but for 0.004 that the other four share. Decisions 2, 4 and 6 are
  irrelevant: all six actions are alike. Reward 1 iff all three decisions are right; the initial policy gets 0.06. The
  policy has one row of logits per position ("order-0"), as an agent that does not need its own earlier noise. 8
  responses per prompt, one update per rollout, 60 iterations. SGD at rate 20 and not Adam, whose normalisation of every
  logit would undo a scale per step. Arms: GRPO; with g only (zeta = 0); with the bonus only (k = 0); EMPG.
  Exact expected reward after the last iteration; "at least" means not worse by more than 0.02.
- Spikes: in the same runs the largest exact KL(pi_t || pi_{t-1}), mean over the prompts, of the last 20 iterations.

WebShop, ALFWorld and Deep Search with models of 1.5B parameters and more are not testable here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from polopt.claims.claim import Claim
from polopt.claims.exact import Run, start
from polopt.methods.base.grpo import grpo
from polopt.methods.credit.empg import EntropyModulated
from polopt.policies.exact import ExactPolicy, SequenceSpace, enumeration
from polopt.tasks.problems import Problem, problem

SPACE = SequenceSpace(6, 6)
PROMPTS, GROUP, ITERATIONS, LATE = 8, 8, 60, 20
DECISIVE = (0, 2, 4)

ARMS = {
    "grpo": grpo,
    "gain": grpo | {"advantage": EntropyModulated(zeta=0.0, segment=None)},
    "bonus": grpo | {"advantage": EntropyModulated(k=0.0, segment=None)},
    "empg": grpo | {"advantage": EntropyModulated(segment=None)},
}


@dataclass(frozen=True, eq=False)
class ByPosition(Problem):
    """A problem whose policy has one row of logits per position."""

    def policy(self, head: str = "order-0") -> ExactPolicy:
        return super().policy(head)


def episodes(seed: int) -> Problem:
    """Decisive steps of two plausible actions between irrelevant ones of six."""
    base = problem("random-rewards", space=SPACE, batch=PROMPTS, seed=seed)
    order = torch.rand(PROMPTS, SPACE.length, 6, generator=torch.Generator().manual_seed(seed)).argsort(-1)
    right, wrong = order[..., 0], order[..., 1]
    chance = torch.full((PROMPTS, SPACE.length, 6), 0.001, dtype=torch.float64)
    chance = chance.scatter(-1, right[..., None], 0.4).scatter(-1, wrong[..., None], 0.596)
    chance[:, [time for time in range(SPACE.length) if time not in DECISIVE]] = 1 / 6
    initial = chance.log()[:, SPACE.depths]
    decided = SPACE.sequences[:, DECISIVE]
    reward = (decided[None] == right[:, None, list(DECISIVE)]).all(-1).double()
    fields = {name: getattr(base, name) for name in ("space", "weights", "group_sizes")}
    return ByPosition("episodes", rewards={"correct": reward}, initial=initial, reference=initial, **fields)


def learning(seed: int, quick: bool) -> Mapping[str, float]:
    """Final expected reward and largest late KL of every arm."""
    made = episodes(seed)
    found: dict[str, float] = {}
    for name, method in ARMS.items():
        run = start(made, method, seed=seed, group=GROUP, optimizer="sgd")
        spikes = []
        for _ in range(2 if quick else ITERATIONS):
            before = _logp(run)
            run.step()
            after = _logp(run)
            # Positions are independent: the divergence of sequences is the sum over positions.
            spikes.append(float((after.exp() * (after - before)).sum((-1, -2)).mean()))
        found |= {f"{name}/reward": run.reward, f"{name}/spike": max(spikes[-LATE:])}
    return found


def _logp(run: Run) -> torch.Tensor:
    return run.policy.logits.detach().log_softmax(-1)


def premise(seed: int, quick: bool) -> Mapping[str, float]:
    """Largest error of the identity, and how far the order by norm is that by entropy."""
    generator = torch.Generator().manual_seed(seed)
    error, norms, entropies = 0.0, [], []
    for index in range(5 if quick else 50):
        actions = 2 + index % 11
        logits = 2 * torch.randn(1, 1, actions, generator=generator, dtype=torch.float64)
        policy = ExactPolicy(SequenceSpace(actions, 1), 1, logits)
        squared = enumeration.scores(policy).flatten(2).square().sum(-1)
        norm = float((policy.probabilities() * squared).sum().detach())
        collision = float(logits.softmax(-1).square().sum())
        error = max(error, abs(norm - (1 - collision)))
        norms.append(norm)
        entropies.append(-math.log(collision))
    ranks = torch.stack([torch.tensor(values).argsort().argsort().double() for values in (norms, entropies)])
    return {"error": error, "correlation": float(torch.corrcoef(ranks)[0, 1]), "monotone": 0.999}


REWARD = "exact expected reward after 60 iterations"


def _success(name: str, statement: str, treatment: str, control: str, margin: float = 0.02) -> Claim:
    return Claim(
        "empg",
        name,
        statement,
        "exact",
        control,
        REWARD,
        "higher",
        f"{treatment}/reward",
        f"{control}/reward",
        margin=margin,
        measure=learning,
    )


CLAIMS = (
    Claim(
        "empg",
        "premise",
        "The expected squared score norm of a softmax policy is one minus its collision probability.",
        "exact",
        "the identity",
        "largest absolute difference over 50 policies",
        "equal",
        "error",
        None,
        margin=1e-12,
        measure=premise,
    ),
    Claim(
        "empg",
        "premise-monotone",
        "The expected squared score norm grows with the Renyi-2 entropy.",
        "exact",
        "a rank correlation of 0.999",
        "rank correlation of norm and entropy over 50 policies",
        "higher",
        "correlation",
        "monotone",
        measure=premise,
    ),
    _success("success", "EMPG succeeds more often than GRPO.", "empg", "grpo", margin=0.0),
    _success("gain-against-grpo", "The gain alone succeeds at least as often as GRPO.", "gain", "grpo"),
    _success("bonus-against-grpo", "The bonus alone succeeds at least as often as GRPO.", "bonus", "grpo"),
    _success("both-against-gain", "Both halves succeed at least as often as the gain alone.", "empg", "gain"),
    _success("both-against-bonus", "Both halves succeed at least as often as the bonus alone.", "empg", "bonus"),
    Claim(
        "empg",
        "late-spikes",
        "With the gain the policy jumps less far late in training.",
        "exact",
        "grpo",
        "largest KL between successive policies in the last 20 of 60 iterations, nats",
        "lower",
        "gain/spike",
        "grpo/spike",
        measure=learning,
    ),
    Claim(
        "empg",
        "agents",
        "EMPG improves agents on WebShop, ALFWorld and Deep Search.",
        "small",
        "grpo and dapo",
        "success rate",
        "higher",
        untestable="the environments and models of 1.5B parameters and more do not run at this scale",
    ),
)

"""DGPO: credit by gated deviation against uniform credit and a KL penalty (Jin et al. 2026, arXiv:2605.03327).

Design, fixed before the first run.

Exact world: 4 tokens, length 5, 8 prompts, 16 responses each, Adam at rate 0.1, one update per rollout. Two pivotal
positions (the second and the fourth token) decide: reward 1 iff both are the prompt's targets, drawn at random; their
initial logits are normal with standard deviation 0.5. The other positions are syntax: the initial policy writes token 0
there with probability 0.97, and the reward does not look. The reference is the initial policy. All arms of a seed start
alike; expected reward is exact.

- Against the penalty: the shipped recipe against GRPO with the KL of its paper (k3, beta 0.04): expected reward after
  20 updates.
- The redistribution alone: temperature 0.1 (a toy's deviations are small: at the shipped 0.5 weights stay near 1)
  against GRPO without KL, the same measure.
- Weight on pivotal positions: temperature 0.1; mean share of the weight at the two positions in a fresh batch after 5,
  10, 15 and 20 updates, against their share of the positions, 2/5.
- Gate: planted distractors, a reference that writes token 1 instead of 0 at the syntax positions with probability
  0.97, so that the policy deviates there and is sure of it. kappa 1 against kappa 0, temperature 0.1: expected reward
  after 20 updates, and share of the weight on the pivotal positions as before.

The variance of the gradient's norm, which the card measures too, comes without a direction and is left out.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from polopt.claims.claim import Claim
from polopt.claims.exact import Run, batch, credited, start
from polopt.core.method import Method
from polopt.methods.base.grpo import grpo
from polopt.methods.credit.dgpo_hellinger import GatedDeviation, dgpo_hellinger
from polopt.policies.exact import SequenceSpace
from polopt.regularizers.kl import KL
from polopt.tasks.problems import Problem

SPACE = SequenceSpace(4, 5)
PIVOTAL = (1, 3)
PROMPTS, GROUP, UPDATES, EVERY = 8, 16, 20, 5
SURE, SHARP = 0.97, 0.1


def pivotal(seed: int, *, distractors: bool = False) -> Problem:
    """Two positions decide the reward; ``distractors`` makes the reference write another token at the others."""
    generator = torch.Generator().manual_seed(seed)
    initial = 0.5 * torch.randn(PROMPTS, SPACE.n_nodes, 4, generator=generator, dtype=torch.float64)
    target = torch.randint(0, 4, (PROMPTS, 2), generator=generator)
    syntax = ~torch.isin(SPACE.depths, torch.tensor(PIVOTAL))

    def written(token: int) -> Tensor:
        row = torch.full((4,), (1 - SURE) / 3, dtype=torch.float64)
        row[token] = SURE
        return torch.where(syntax[None, :, None], row.log(), initial)

    reward = (SPACE.sequences[None][..., PIVOTAL] == target[:, None]).all(-1).double()
    reference = written(1 if distractors else 0)
    return Problem("pivotal", SPACE, {"correct": reward}, written(0), reference, {}, (GROUP,) * PROMPTS)


def pivotal_share(run: Run, method: Method, seed: int) -> float:
    """Share of the weight at the pivotal positions in a fresh batch."""
    made = credited(method, run.policy, batch(run.problem, run.policy, seed=seed, sizes=[GROUP]))
    place = torch.arange(made.n_steps) % SPACE.length
    return float(made.weight[torch.isin(place, torch.tensor(PIVOTAL))].sum() / made.weight.sum())


def train(made: Problem, method: Method, seed: int, quick: bool) -> tuple[float, float]:
    """Expected reward at the end, and the mean share of the weight on pivotal positions on the way."""
    run = start(made, method, seed=seed, group=GROUP)
    run.policy.add_model("ref", made.reference)
    shares = []
    for done in range(1, (2 if quick else UPDATES) + 1):
        run.step()
        if method.weight is not None and (quick or done % EVERY == 0):
            shares.append(pivotal_share(run, method, seed=1000 * (seed + 1) + done))
    return run.reward, sum(shares) / max(len(shares), 1)


def sharp(kappa: float) -> Method:
    """DGPO at the temperature of a toy."""
    return dgpo_hellinger | {"weight": GatedDeviation(tau=SHARP, kappa=kappa)}


def redistribution(seed: int, quick: bool) -> Mapping[str, float]:
    """Reward after the updates of DGPO, GRPO with and without KL; DGPO's share of weight on pivotal positions."""
    made = pivotal(seed)
    found = {"uniform": len(PIVOTAL) / SPACE.length}
    arms = {"dgpo": dgpo_hellinger, "kl": grpo | {"regularizer": KL(beta=0.04)}, "grpo": grpo, "sharp": sharp(1.0)}
    for name, method in arms.items():
        found[f"{name}/reward"], found[f"{name}/share"] = train(made, method, seed, quick)
    return found


def gate(seed: int, quick: bool) -> Mapping[str, float]:
    """Reward and share of weight on pivotal positions with distractors, with and without the gate."""
    made = pivotal(seed, distractors=True)
    found: dict[str, float] = {}
    for name, kappa in {"gated": 1.0, "open": 0.0}.items():
        found[f"{name}/reward"], found[f"{name}/share"] = train(made, sharp(kappa), seed, quick)
    return found


CLAIMS = (
    Claim(
        "dgpo-hellinger",
        "faster-than-kl",
        "DGPO has a higher reward than GRPO with a KL penalty at the same number of updates.",
        "exact",
        "grpo with KL, beta 0.04",
        "expected reward after 20 updates",
        "higher",
        "dgpo/reward",
        "kl/reward",
        measure=redistribution,
    ),
    Claim(
        "dgpo-hellinger",
        "faster-than-uniform",
        "Credit by gated deviation learns faster than uniform credit.",
        "exact",
        "grpo without KL",
        "expected reward after 20 updates, temperature 0.1",
        "higher",
        "sharp/reward",
        "grpo/reward",
        measure=redistribution,
    ),
    Claim(
        "dgpo-hellinger",
        "pivotal-weight",
        "After the first updates pivotal positions hold more of the weight than their share of the positions.",
        "exact",
        "uniform weights, 2/5",
        "share of the weight at the positions that decide the reward, temperature 0.1",
        "higher",
        "sharp/share",
        "uniform",
        measure=redistribution,
    ),
    Claim(
        "dgpo-hellinger",
        "gate-reward",
        "With confident deviations planted, the entropy gate gives a higher reward.",
        "exact",
        "kappa 0",
        "expected reward after 20 updates with distractors, temperature 0.1",
        "higher",
        "gated/reward",
        "open/reward",
        measure=gate,
    ),
    Claim(
        "dgpo-hellinger",
        "gate-weight",
        "With confident deviations planted, the entropy gate leaves more of the weight to pivotal positions.",
        "exact",
        "kappa 0",
        "share of the weight at the positions that decide the reward with distractors, temperature 0.1",
        "higher",
        "gated/share",
        "open/share",
        measure=gate,
    ),
)

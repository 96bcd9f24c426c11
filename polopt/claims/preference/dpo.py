"""DPO: one supervised stage reaches the KL-regularised optimum (Rafailov et al. 2023, arXiv:2305.18290).

Design, fixed before the first run. Exact world: 4 prompts of 20 answers each (one token), initial logits normal with
standard deviation 0.5, rewards standard normal. Bradley-Terry labels of 200, 1000 and 5000 pairs in all, of different
answers that the initial policy draws; beta = 0.5. Regret of a policy: what E[r] - beta KL(pi || pi_ref) lacks to its
maximum, exact, mean over the prompts.

Arms: DPO, 300 updates of Adam at rate 0.1 with all pairs in each, no rollout at all; the two-stage optimum, a table of
rewards fitted to the same pairs by maximum likelihood (ridge 0.1, exact) and pi_ref exp(r / beta) normalised; PPO on
that table with a penalty of beta on the KL, 8 epochs, 16 answers per prompt, Adam at rate 0.1, 100 iterations.

- DPO's regret is lower with 1000 pairs than with 200, and with 5000 than with 1000.
- At each number DPO's regret is within 0.05 of that of the two stages.
- At 1000 pairs DPO's regret is lower than PPO's.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from polopt.claims.claim import Claim
from polopt.claims.exact import curve, start, with_updates
from polopt.core.method import Schedule
from polopt.core.override import override
from polopt.methods.base.ppo import ppo
from polopt.methods.preference.dpo import dpo
from polopt.policies.exact import SequenceSpace, divergences
from polopt.rewards.mixtures import LinearRewards
from polopt.tasks.preferences import labelled, sequence_of
from polopt.tasks.problems import problem

SPACE, PROMPTS, BETA = SequenceSpace(20, 1), 4, 0.5
PAIRS: Final = (200, 1000, 5000)
UPDATES, RIDGE, GROUP, ITERATIONS, AGAINST_PPO = 300, 0.1, 16, 100, 1000

DPO: Final = override(dpo, {"objective.beta": BETA})
PPO: Final = override(ppo, {"reward.beta": BETA}) | {"schedule": Schedule(epochs=8)}


def regret(
    policy: Float[Tensor, "problem answer"],
    reference: Float[Tensor, "problem answer"],
    reward: Float[Tensor, "problem answer"],
) -> float:
    """Largest E[r] - beta KL, which is beta log E_ref e^(r / beta), less that of the policy; mean over the problems."""
    best = BETA * (reference.log() + reward / BETA).logsumexp(-1)
    own = (policy * reward).sum(-1) - BETA * divergences.kl(policy, reference)
    return float((best - own).mean())


def regrets(seed: int, quick: bool) -> Mapping[str, float]:
    """Regret of every arm, by its number of pairs."""
    made = problem("random-rewards", space=SPACE, batch=PROMPTS, seed=seed)
    reference = made.policy().probabilities().detach()
    found: dict[str, float] = {}
    for count in PAIRS:
        pool = labelled(made, count, seed=seed)
        run = start(made, with_updates(DPO, 2 if quick else UPDATES), seed=seed, examples=pool)
        run.step()
        found[f"dpo/{count}"] = regret(run.policy.probabilities().detach(), reference, made.reward)
        winner, loser = (
            torch.tensor(
                [
                    int(example.columns["problem"]) * SPACE.n_sequences + sequence_of(SPACE, text)
                    for example, text in zip(pool, texts, strict=True)
                ]
            )
            for texts in ([example.chosen for example in pool], [example.rejected for example in pool])
        )
        size = PROMPTS * SPACE.n_sequences
        fitted = LinearRewards((F.one_hot(winner, size) - F.one_hot(loser, size)).double(), 1, RIDGE)
        fitted.fit(0, torch.ones(count))
        table = fitted.theta[0].view(PROMPTS, -1)
        optimum = (reference.log() + table / BETA).softmax(-1)
        found[f"two stages/{count}"] = regret(optimum, reference, made.reward)
        if count == AGAINST_PPO:
            ppo_run = start(replace(made, rewards={"reward": table}), PPO, seed=seed, group=GROUP)
            curve(ppo_run, 2 if quick else ITERATIONS)
            found[f"ppo/{count}"] = regret(ppo_run.policy.probabilities().detach(), reference, made.reward)
    return found


METRIC = "exact regret of E[r] - beta KL"


def _falls(fewer: int, more: int) -> Claim:
    return Claim(
        "dpo",
        f"falls-{more}",
        f"DPO's regret is lower with {more} pairs than with {fewer}.",
        "exact",
        f"DPO with {fewer} pairs",
        METRIC,
        "lower",
        f"dpo/{more}",
        f"dpo/{fewer}",
        measure=regrets,
    )


def _equal(count: int) -> Claim:
    return Claim(
        "dpo",
        f"two-stages-{count}",
        f"With {count} pairs one supervised stage is as good as a reward model and the exact optimum for it.",
        "exact",
        "fitted rewards and their exact optimum",
        METRIC,
        "equal",
        f"dpo/{count}",
        f"two stages/{count}",
        margin=0.05,
        measure=regrets,
    )


CLAIMS = (
    *(_falls(fewer, more) for fewer, more in itertools.pairwise(PAIRS)),
    *(_equal(count) for count in PAIRS),
    Claim(
        "dpo",
        "ppo",
        f"With {AGAINST_PPO} pairs DPO, which samples nothing, has less regret than PPO on the fitted rewards.",
        "exact",
        "PPO on the fitted rewards",
        METRIC,
        "lower",
        f"dpo/{AGAINST_PPO}",
        f"ppo/{AGAINST_PPO}",
        measure=regrets,
    ),
)

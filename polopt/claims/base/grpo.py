"""GRPO: a group's statistics replace the critic, with three side effects (Shao et al. 2024, arXiv:2402.03300).

Design, fixed before the first run.

Exact world: 5 tokens, length 4, 8 prompts with pass rates from 0.05 to 0.95 in equal steps, reward 1 on a random
quarter of the sequences, 8 responses per prompt, Adam at rate 0.1, one update per rollout in every arm (PPO too: its
advantages are compared, not its reuse of rollouts), no KL.

- Samples: trajectories drawn until the expected reward is 0.9, at most 150 iterations; a run that does not get there
  counts with all of them. "At parity with PPO" (tabular critic from 0): no more than a tenth more, on the logarithm of
  the trajectories.
- Entropy: exact entropy of the distribution over sequences in four quarters of 40 iterations; the largest change over a
  quarter must be negative.
- Length of incorrect responses and weight of very easy and very hard prompts: the experiments of `polopt.claims.bias`,
  whose designs stand in the docstring of Dr. GRPO's claims. Length against the initial policy, weight against the
  centred advantage without the division (Dr. GRPO).

Small world, as the card says: the shipped policy, the default run of 16 prompts x 8 on the default task with 40
iterations and rate 2e-4, 5 seeds. Trajectories until the mean success of the last five iterations is 0.6 (the policy
starts near 0.4), at most all 5,120. From the same runs of GRPO: mean token entropy and mean length of incorrect
responses of the last five iterations against the first five.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

from polopt.claims.bias import difficulty, length
from polopt.claims.claim import Claim
from polopt.claims.exact import curve, iterations_until, start, with_updates
from polopt.claims.small import first_reaching, moving_mean, statistics
from polopt.core.override import override
from polopt.methods.base.grpo import grpo
from polopt.methods.base.ppo import ppo
from polopt.methods.base.reinforce import reinforce
from polopt.policies.exact import ExactPolicy, SequenceSpace
from polopt.tasks.problems import Problem, problem

SPACE = SequenceSpace(5, 4)
RATES = tuple(0.05 + 0.9 * i / 7 for i in range(8))
GROUP, LIMIT, QUARTER = 8, 150, 10
PPO = with_updates(override(ppo, {"reward.beta": 0.0}), 1)
STEPS, WINDOW, TARGET = 40, 5, 0.6


def _problem(seed: int) -> Problem:
    return problem("binary-verifier", space=SPACE, batch=len(RATES), pass_rate=RATES, seed=seed)


def samples(seed: int, quick: bool) -> Mapping[str, float]:
    """Logarithm of the trajectories until the expected reward is 0.9."""

    def critic(policy: ExactPolicy) -> None:
        policy.add_critic()

    found = {}
    for method in (grpo, reinforce, PPO):
        prepare = critic if method is PPO else lambda policy: None
        run = start(_problem(seed), method, seed=seed, group=GROUP, prepare=prepare)
        found[method.slug] = math.log(max(iterations_until(run, 0.9, 2 if quick else LIMIT), 1) * len(RATES) * GROUP)
    return found


def entropy(seed: int, quick: bool) -> Mapping[str, float]:
    """Largest change of the exact entropy over a quarter of training."""
    run = start(_problem(seed), grpo, seed=seed, group=GROUP)
    every = 1 if quick else QUARTER
    quarters = curve(run, 4 * every, lambda run: run.entropy)[::every]
    return {"change": max(after - before for before, after in itertools.pairwise(quarters))}


def small(seed: int, quick: bool) -> Mapping[str, float]:
    """Trajectories to an accuracy, and entropy and length of incorrect responses early and late, in the small world."""
    found = {}
    for method in (grpo, reinforce):
        rows = statistics(method.slug, seed=seed, quick=quick, steps=STEPS)
        success = moving_mean([row["reward"] for row in rows], WINDOW)
        found[method.slug] = first_reaching(success, TARGET) * rows[0]["trajectories"]
        if method is grpo:
            for name in ("entropy", "wrong length"):
                values = moving_mean([row[name] for row in rows], min(WINDOW, len(rows)))
                found |= {f"{name}/early": values[min(WINDOW, len(rows)) - 1], f"{name}/late": values[-1]}
    return found


CLAIMS = (
    Claim(
        "grpo",
        "samples-reinforce",
        "GRPO reaches an expected reward of 0.9 in fewer samples than REINFORCE with the batch mean.",
        "exact",
        "reinforce, batch mean",
        "log trajectories to an expected reward of 0.9",
        "lower",
        "grpo",
        "reinforce",
        measure=samples,
    ),
    Claim(
        "grpo",
        "samples-ppo",
        "GRPO needs no more samples than PPO with a critic, which it does without.",
        "exact",
        "ppo, one update per rollout",
        "log trajectories to an expected reward of 0.9",
        "lower",
        "grpo",
        "ppo",
        margin=0.1,
        measure=samples,
    ),
    Claim(
        "grpo",
        "entropy",
        "Side effect: the entropy falls throughout training.",
        "exact",
        "a quarter of the training before",
        "largest change of the exact entropy over a quarter, nats",
        "lower",
        "change",
        None,
        measure=entropy,
    ),
    Claim(
        "grpo",
        "length",
        "Side effect: incorrect responses grow longer.",
        "exact",
        "the initial policy",
        "change of the exact mean length of incorrect responses, tokens",
        "higher",
        "grpo/wrong",
        None,
        measure=length,
    ),
    Claim(
        "grpo",
        "difficulty",
        "Side effect: very easy and very hard prompts weigh more than with the centred reward.",
        "exact",
        "dr-grpo",
        "share of the norm of the expected gradient, pass rates 0.05 and 0.95 against 0.5",
        "higher",
        "grpo/outer",
        "dr-grpo/outer",
        measure=difficulty,
    ),
    Claim(
        "grpo",
        "samples-reinforce-small",
        "GRPO reaches an accuracy of 0.6 in fewer samples than REINFORCE with the batch mean.",
        "small",
        "reinforce, batch mean",
        "trajectories until the mean success of five iterations is 0.6",
        "lower",
        "grpo",
        "reinforce",
        measure=small,
    ),
    Claim(
        "grpo",
        "entropy-small",
        "Side effect: the entropy falls.",
        "small",
        "the first five iterations",
        "mean token entropy, nats",
        "lower",
        "entropy/late",
        "entropy/early",
        measure=small,
    ),
    Claim(
        "grpo",
        "length-small",
        "Side effect: incorrect responses grow longer.",
        "small",
        "the first five iterations",
        "mean length of incorrect responses, tokens",
        "higher",
        "wrong length/late",
        "wrong length/early",
        measure=small,
    ),
)

"""PPO: the clip allows several epochs, the critic earns its keep (Schulman et al. 2017, arXiv:1707.06347).

Design, fixed before the first run. The card asks for a task of several steps whose reward depends on one early token:
exact world, 5 tokens, length 4, 8 prompts, reward 1 iff the first token is the prompt's target, chosen with probability
0.1 at first. 8 trajectories per prompt and iteration, four epochs, no KL (beta 0), tabular critic.

- Clip: 40 iterations, SGD at rate 20 (see `polopt.claims.exact`); PPO against the same with the clip of the ratio off.
  "Diverges or ends lower": expected reward at the end, and the largest fall of the expected reward below its earlier
  maximum.
- "PPO keeps improving": reward after 40 iterations against after 20.
- Critic: exact values of the initial policy ("pretrained") against zeros; expected reward after 5 iterations ("early"),
  averaged over them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from polopt.claims.claim import Claim
from polopt.claims.exact import curve, largest_fall, one_token, start
from polopt.core.override import override
from polopt.methods.base.ppo import ppo
from polopt.policies.exact import ExactPolicy, SequenceSpace, tree

SPACE = SequenceSpace(5, 4)
PROMPTS, GROUP, CHANCE = 8, 8, 0.1
ITERATIONS, EARLY = 40, 5
OFF = 1e9

PPO = override(ppo, {"reward.beta": 0.0})
UNCLIPPED = override(PPO, {"objective.clipped-surrogate.low": OFF, "objective.clipped-surrogate.high": OFF})


def _untrained(policy: ExactPolicy) -> None:
    policy.add_critic()


def clip(seed: int, quick: bool) -> Mapping[str, float]:
    """Reward at half time and at the end, and the largest fall, with and without the clip."""
    made = one_token(SPACE, prompts=PROMPTS, chance=CHANCE, seed=seed)
    found: dict[str, float] = {}
    for name, method in {"clipped": PPO, "unclipped": UNCLIPPED}.items():
        run = start(made, method, seed=seed, group=GROUP, optimizer="sgd", prepare=_untrained)
        rewards = curve(run, 2 if quick else ITERATIONS)
        found |= {f"{name}/half": rewards[len(rewards) // 2], f"{name}/end": rewards[-1]}
        found[f"{name}/fall"] = largest_fall(rewards)
    return found


def critic(seed: int, quick: bool) -> Mapping[str, float]:
    """Mean reward over the first iterations by the critic's start."""
    made = one_token(SPACE, prompts=PROMPTS, chance=CHANCE, seed=seed)

    def pretrained(policy: ExactPolicy) -> None:
        policy.add_critic()
        assert policy.values is not None
        with torch.no_grad():
            policy.values.copy_(tree.action_values(policy.space, policy.table(), made.reward)[1])

    found = {}
    for name, prepare in {"pretrained": pretrained, "untrained": _untrained}.items():
        run = start(made, PPO, seed=seed, group=GROUP, optimizer="sgd", prepare=prepare)
        rewards = curve(run, 2 if quick else EARLY)[1:]
        found[name] = sum(rewards) / len(rewards)
    return found


CLAIMS = (
    Claim(
        "ppo",
        "clip-reward",
        "With four epochs per rollout the unclipped surrogate ends at a lower reward than PPO.",
        "exact",
        "ppo without the clip",
        "expected reward after 40 iterations",
        "higher",
        "clipped/end",
        "unclipped/end",
        measure=clip,
    ),
    Claim(
        "ppo",
        "clip-stability",
        "With four epochs per rollout PPO's reward falls back less than the unclipped surrogate's.",
        "exact",
        "ppo without the clip",
        "largest fall of the expected reward below its earlier maximum",
        "lower",
        "clipped/fall",
        "unclipped/fall",
        measure=clip,
    ),
    Claim(
        "ppo",
        "keeps-improving",
        "With four epochs per rollout PPO keeps improving in the second half of training.",
        "exact",
        "ppo at half time",
        "expected reward",
        "higher",
        "clipped/end",
        "clipped/half",
        measure=clip,
    ),
    Claim(
        "ppo",
        "pretrained-critic",
        "Early in training a pretrained critic earns more reward than an untrained one.",
        "exact",
        "ppo, critic at 0",
        "mean expected reward of the first 5 iterations",
        "higher",
        "pretrained",
        "untrained",
        measure=critic,
    ),
)

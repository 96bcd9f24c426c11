"""SPO (segment): values at cuts credit better than the end or a critic (Guo et al. 2025, arXiv:2505.23564).

Design, fixed before the first run.

Exact world: 2 tokens, length 14, 4 prompts. At 7 positions of a prompt, drawn at random, the policy decides (normal
logits of standard deviation 0.5); at the others it is sure (one token has probability 0.97, drawn for every prefix).
Reward 1 iff at least 5 of the 7 decisions match the prompt's target: about a quarter of the answers. 8 answers per
prompt, Adam at rate 0.1, one update per rollout and no KL in every arm (credit is compared, not the reuse of rollouts).
An answer has 7 unsure steps, so a cut in front of every 2nd of them makes 4 segments, about as many as the paper's
answers have with m = 5; K = 9. Trees are 6-6-6 with segments of 5 tokens.

- Error: PPO with a tabular critic from 0 is trained for 20 iterations of 8 answers per prompt; at its policy, whose
  exact values are known, 10 rollouts are drawn for each arm. Logarithm of the mean over steps of (A - A*)^2, A* = Q - V
  exact. No arm whitens or divides by a standard deviation, which would only add to its error: GRPO's is the reward less
  its group's mean; PPO's is GAE at lambda 0.95 with the trained critic. Masked steps count with the A = 0 that they
  are credited. Fixed cuts are in front of every 4th token, as many as the chain has.
- Reward: exact expected reward once all arms have sampled as many tokens as 15 iterations of the chain do, probes
  included. GRPO twice: with groups so large that it makes as many updates as the chain ("wide"), and with groups of 8
  and as many updates as the tokens allow ("often"). "Tree >= GRPO" against the wide one: not worse by more than 0.01.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from polopt.advantages.group import GroupCenter
from polopt.claims.claim import Claim
from polopt.claims.exact import Run, start, with_updates
from polopt.core.method import Method
from polopt.core.override import override
from polopt.core.rollout import Rollout
from polopt.methods.base.grpo import grpo
from polopt.methods.base.ppo import ppo
from polopt.methods.credit.spo_segment import SegmentDifference, UnsureSteps, spo_segment
from polopt.policies.exact import SequenceSpace, tree
from polopt.rollouts.chain import Chain
from polopt.rollouts.tree import Tree
from polopt.tasks.problems import Problem

SPACE = SequenceSpace(2, 14)
PROMPTS, GROUP, DECISIONS, NEEDED, SURE = 4, 8, 7, 5, 0.97
TRAINED, DRAWS, ITERATIONS = 20, 10, 15


@dataclass(frozen=True)
class FixedChain(Chain):
    """A chain whose cuts are ``apart`` steps apart, whatever the policy thinks of them."""

    apart: int = 4

    def cuts(self, rollout: Rollout) -> Bool[Tensor, " step"]:
        time = torch.arange(rollout.n_steps) - (rollout.lengths.cumsum(0) - rollout.lengths)[rollout.trajectory]
        return rollout.mask & (time % self.apart == 0)


CHAIN = with_updates(spo_segment, 1) | {"rollout": Chain(every=2)}
UNMASKED = CHAIN | {"filter": UnsureSteps(threshold=2.0)}
TREE = CHAIN | {"rollout": Tree(segment=5)}
PPO = with_updates(override(ppo, {"reward.beta": 0.0}), 1)
RAW = {"advantage": SegmentDifference(whiten=False)}
ARMS: Mapping[str, Method] = {
    "chain": CHAIN | RAW,
    "unmasked": UNMASKED | RAW,
    "fixed": CHAIN | RAW | {"rollout": FixedChain()},
    "tree": TREE | RAW,
    "grpo": grpo | {"advantage": GroupCenter()},
    "ppo": override(PPO, {"advantage.whiten": False}),
}


def few_decisions(seed: int) -> Problem:
    """The problem of the design."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(PROMPTS)[:, None]
    decisive = torch.rand(PROMPTS, SPACE.length, generator=generator).argsort(1)[:, :DECISIONS]
    target = torch.randint(0, 2, (PROMPTS, DECISIONS), generator=generator)
    matches = (SPACE.sequences.T[decisive] == target[..., None]).sum(1)
    decides = torch.zeros(PROMPTS, SPACE.length, dtype=torch.bool).index_put((rows, decisive), torch.tensor(True))
    shape = (PROMPTS, SPACE.n_nodes, 2)
    open_ = 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)
    likely = torch.randint(0, 2, shape[:2], generator=generator)
    sure = math.log(SURE / (1 - SURE)) * torch.nn.functional.one_hot(likely, 2).double()
    initial = torch.where(decides[:, SPACE.depths, None], open_, sure)
    reward = (matches >= NEEDED).double()
    return Problem("few-decisions", SPACE, {"correct": reward}, initial, initial, {}, (GROUP,) * PROMPTS)


def squared_error(run: Run, method: Method, seed: int, draws: int) -> float:
    """Mean over the steps of ``draws`` rollouts of (A - A*)^2."""
    policy = run.policy
    q, v = tree.action_values(SPACE, policy.table().detach(), run.problem.reward)
    exact = q - v[..., None]
    collector: Any = run.trainer.collect
    method = method.clone()  # the registered one keeps no state
    found: list[Tensor] = []
    for draw in range(draws):
        kept = collector(method, torch.Generator().manual_seed(1000 * seed + draw)).kept
        made = torch.where(kept.mask, method.credit(kept).advantage, 0.0)
        at: Any = kept.payload
        found.append((made - exact[at.step_problem, at.nodes, at.ids]).square())
    return float(torch.cat(found).mean())


def error(seed: int, quick: bool) -> Mapping[str, float]:
    """Logarithm of the mean squared error of each arm's advantages at one policy."""
    run = start(few_decisions(seed), PPO, seed=seed, group=GROUP, prepare=lambda policy: policy.add_critic())
    for _ in range(1 if quick else TRAINED):
        run.step()
    return {name: math.log(squared_error(run, arm, seed, 1 if quick else DRAWS)) for name, arm in ARMS.items()}


def reward(seed: int, quick: bool) -> Mapping[str, float]:
    """Exact expected reward of each arm after equally many sampled tokens."""
    made = few_decisions(seed)
    iterations = 1 if quick else ITERATIONS
    chain = start(made, CHAIN, seed=seed, group=GROUP)
    for _ in range(iterations):
        chain.step()
    budget = chain.trainer.meter.spent.tokens
    found = {"chain": chain.reward}
    wide = round(budget / (iterations * PROMPTS * SPACE.length))
    arms = {"unmasked": (UNMASKED, GROUP), "tree": (TREE, GROUP), "wide": (grpo, wide), "often": (grpo, GROUP)}
    for name, (method, group) in arms.items():
        run = start(made, method, seed=seed, group=group)
        while run.trainer.meter.spent.tokens < budget:
            run.step()
        found[name] = run.reward
    return found


def _error(name: str, statement: str, baseline: str, treatment: str, control: str) -> Claim:
    metric = "log mean squared error of the advantages"
    return Claim("spo-segment", name, statement, "exact", baseline, metric, "lower", treatment, control, measure=error)


def _reward(name: str, statement: str, baseline: str, treatment: str, control: str, margin: float = 0.0) -> Claim:
    metric = "expected reward after equally many sampled tokens"
    return Claim(
        "spo-segment", name, statement, "exact", baseline, metric, "higher", treatment, control, margin, measure=reward
    )


CLAIMS = (
    _error(
        "error-grpo",
        "The chain's advantages are nearer to the exact ones than those of GRPO before it divides.",
        "grpo, reward less the mean of its group",
        "chain",
        "grpo",
    ),
    _error(
        "error-critic",
        "The chain's advantages are nearer to the exact ones than those of PPO with the critic that it has trained.",
        "ppo after 20 iterations",
        "chain",
        "ppo",
    ),
    _error(
        "error-fixed",
        "Cuts at unsure steps give advantages nearer to the exact ones than as many cuts at fixed distances.",
        "chain with a cut every 4 tokens, same mask",
        "chain",
        "fixed",
    ),
    _error(
        "error-mask",
        "Credit for unsure steps alone is nearer to the exact advantages than credit for all steps of a segment.",
        "chain without the mask",
        "chain",
        "unmasked",
    ),
    _error(
        "error-tree",
        "The tree's advantages are nearer to the exact ones than those of GRPO before it divides.",
        "grpo, reward less the mean of its group",
        "tree",
        "grpo",
    ),
    _reward(
        "reward-grpo",
        "At equally many tokens and updates the chain earns more than GRPO with larger groups.",
        "grpo, groups as large as the tokens allow",
        "chain",
        "wide",
    ),
    _reward(
        "reward-grpo-updates",
        "At equally many tokens the chain earns more than GRPO with groups of 8 and more updates.",
        "grpo, as many updates as the tokens allow",
        "chain",
        "often",
    ),
    _reward(
        "reward-mask",
        "The probability mask raises the reward.",
        "chain without the mask",
        "chain",
        "unmasked",
    ),
    _reward(
        "reward-tree",
        "At equally many tokens the tree earns no less than GRPO with larger groups.",
        "grpo, groups as large as the tokens allow",
        "tree",
        "wide",
        margin=0.01,
    ),
)

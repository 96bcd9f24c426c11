"""CAPO: a curvature test keeps a learning rate ten times too high from collapsing (Melo et al. 2025, arXiv:2510.00819).

Design, fixed before the first run. Exact world: 8 prompts, 5 tokens, length 4, reward the share of positions that match
a random target, initial logits normal with standard deviation 0.5; 8 responses of every prompt per iteration, one
update each, 100 iterations. An output layer is all that a tabular policy has, so that the model of the step is whole; h
is one-hot. Adam at rate 1, ten times the rate at which GRPO ends at 0.8 to 0.93 here (four seeds apart from the
claim's); at rate 1 it ends at 0.53 to 0.69 there. "Collapsed" is a run that ends with an exact expected reward below
0.75, between the two.

The paper's bounds are tied to its model and rate. Here they are the 0.96 quantiles of |m_H| and of m_F over the tokens
of the first 20 iterations of GRPO at rate 1 with a seed apart (1000), m_H and m_F by the arm's own model of the
optimizer: at most 8% of those tokens are rejected. Arms, all with GRPO's advantage, at rate 1: GRPO; CAPO with the Adam
model; CAPO with the SGD model under the same Adam; random masking of the share of tokens that CAPO rejected at the same
seed; GRPO with a KL to the initial policy of coefficient 0.1 and of 1. The share of rejected tokens is over the run.

With one update per rollout, as in the paper's runs, no ratio leaves 1: a tighter clip is GRPO. Runs do not get worse
after they got better here, they stop too early; so "m_F rises before the accuracy falls" has nothing to look at.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.claims.claim import Claim
from polopt.claims.exact import BUDGET, start
from polopt.core.method import Method
from polopt.core.part import Stateful, part
from polopt.core.rollout import Rollout
from polopt.methods.base.grpo import grpo
from polopt.methods.trust_region.capo import Curvature, capo
from polopt.policies.exact import SequenceSpace
from polopt.regularizers.kl import KL
from polopt.tasks.problems import problem
from polopt.training.trainer import Optimization

SPACE = SequenceSpace(5, 4)
PROMPTS, GROUP, ITERATIONS, RATE, LOW = 8, 8, 100, 1.0, 0.75
BOUNDS = {"adam": (0.968, 0.942), "sgd": (0.665, 0.406)}
"""Quantiles of |m_H| and m_F, by the model of the optimizer."""


@dataclass(frozen=True)
class Counting(Curvature):
    """CAPO's weight that notes the share of rejected tokens of every iteration."""

    shares: list[float] = field(default_factory=list, compare=False)

    def __call__(self, rollout: Rollout) -> Float[Tensor, " step"]:
        weight = super().__call__(rollout)
        self.shares.append(float((weight[rollout.mask] == 0).double().mean()))
        return weight


@part("weight", "random-mask")
@dataclass(frozen=True)
class RandomMask(Stateful):
    """Drops each step with probability ``share``; otherwise as CAPO's weight. For experiments."""

    share: float = 0.08
    seed: int = 0
    count: int = field(default=0, init=False, compare=False)

    state = ("count",)
    unit = "trajectory"

    def __call__(self, rollout: Rollout) -> Float[Tensor, " step"]:
        self.remember(count=self.count + 1)
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.count)
        drawn = torch.rand(rollout.n_steps, generator=generator, dtype=torch.float64)
        keep = (rollout.mask & (drawn >= self.share)).to(rollout.advantage)
        return keep * rollout.spread(rollout.active_lengths / rollout.sum_steps(keep).clamp_min(1))


def testing(optimizer: str) -> Method:
    """CAPO with the bounds of this world."""
    change, divergence = BOUNDS[optimizer]
    weight = Counting(change, divergence, rate=RATE, optimizer=optimizer)  # type: ignore[arg-type]
    return capo | {"weight": weight}


def trained(method: Method, seed: int, quick: bool) -> tuple[float, float]:
    """Exact reward at the end, and the share of tokens that were rejected."""
    made = problem("multi-step", space=SPACE, batch=PROMPTS, seed=seed, spread=0.5)
    run = start(made, method, seed=seed, group=GROUP)
    run.trainer.optimization = Optimization(RATE, token_budget=BUDGET)
    for _ in range(2 if quick else ITERATIONS):
        run.step()
    shares = getattr(run.trainer.method.weight, "shares", [0.0])
    return run.reward, sum(shares) / len(shares)


def training(seed: int, quick: bool) -> Mapping[str, float]:
    """Reward at the end, whether the run collapsed, share of rejected tokens, of every arm."""
    found: dict[str, float] = {}
    share = 0.0
    tested = "capo"
    arms = {
        "grpo": grpo,
        tested: testing("adam"),
        "sgd model": testing("sgd"),
        "random": grpo,
        "kl 0.1": grpo | {"regularizer": KL(beta=0.1)},
        "kl 1": grpo | {"regularizer": KL(beta=1.0)},
    }
    for name, method in arms.items():
        if name == "random":
            method = method | {"weight": RandomMask(share, seed)}
        reward, rejected = trained(method, seed, quick)
        share = rejected if name == tested else share
        found |= {name: reward, f"{name}/collapsed": float(reward < LOW), f"{name}/rejected": rejected}
    found["limit"] = 0.1
    return found


_COLLAPSE = Claim(
    "capo",
    "collapse",
    "At ten times the stable learning rate CAPO collapses in fewer runs than GRPO.",
    "exact",
    "grpo, same rate",
    "share of runs that end below an expected reward of 0.75",
    "lower",
    "capo/collapsed",
    "grpo/collapsed",
    measure=training,
)


def _reward(name: str, statement: str, baseline: str, control: str) -> Claim:
    return dataclasses.replace(
        _COLLAPSE,
        name=name,
        statement=statement,
        baseline=baseline,
        metric="exact expected reward after 100 iterations",
        direction="higher",
        treatment="capo",
        control=control,
    )


CLAIMS = (
    _COLLAPSE,
    _reward("reward", "At ten times the stable rate CAPO ends higher than GRPO.", "grpo, same rate", "grpo"),
    _reward("random", "CAPO ends higher than random masking of the same share of tokens.", "random masking", "random"),
    _reward("kl-small", "CAPO ends higher than GRPO with a KL of 0.1 in the loss.", "grpo with KL 0.1", "kl 0.1"),
    _reward("kl-large", "CAPO ends higher than GRPO with a KL of 1 in the loss.", "grpo with KL 1", "kl 1"),
    _reward("model", "Under Adam, the test with the Adam model ends higher than with SGD's.", "SGD model", "sgd model"),
    dataclasses.replace(
        _COLLAPSE,
        name="rejection",
        statement="CAPO rejects less than 10% of the tokens.",
        baseline="10%",
        metric="share of rejected tokens over the run",
        treatment="capo/rejected",
        control="limit",
    ),
    dataclasses.replace(
        _COLLAPSE,
        name="clip",
        statement="CAPO collapses in fewer runs than GRPO with a clip of 0.05.",
        baseline="grpo, clip 0.05",
        measure=None,
        untestable="With one update per rollout every ratio is 1 and no clip is active: the baseline is GRPO itself.",
    ),
    dataclasses.replace(
        _COLLAPSE,
        name="spike",
        statement="The batch's m_F rises before the accuracy of a collapsing run falls.",
        baseline="runs that do not collapse",
        measure=None,
        untestable="In a tabular policy a rate that is too high stops a run early; its accuracy does not fall.",
    ),
)

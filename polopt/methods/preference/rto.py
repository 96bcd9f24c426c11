"""RTO: PPO on the token rewards of a DPO-trained policy (Zhong et al. 2024, arXiv:2404.18922).

A policy pi_dpo that DPO has trained from pi_ref holds a token-wise reward of the preferences. PPO, from pi_ref, takes
r_t = clip(b1 (log pi_dpo,t - log pi_ref,t), -c, c) - b2 (log pi_old,t - log pi_ref,t) + 1[t last] clip(R, -10, 10),
b1 = c = 0.05, b2 = 0.01 (the official code's; scale first, then clip). Without clipping the token rewards of an answer
sum to b1 log pi_dpo/pi_ref; with b1 = b2 and no R the reference cancels and the optimum is pi_dpo. Advantages are
whitened by the population variance; the policy loss is the mean over answers of the mean over their steps.

Settled: `--models.dpo.folder RUN/model` takes a model that DPO has trained (`polopt train dpo`). Without one the run
begins by training it from its own start: ``steps`` iterations of DPO with the run's optimizer and rate, on pairs of the
policy's own answers judged by R, since those are always at hand (the paper: a data set, ``pairs`` "data"); then the
policy goes back to the start. R is taken as it comes: a reward model's mean and deviation are its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from polopt.aggregations import SequenceMean
from polopt.core.errors import UsageError
from polopt.core.method import Method, Schedule
from polopt.core.part import Part, part
from polopt.core.registry import method
from polopt.core.rollout import Rollout
from polopt.methods.base.ppo import GAE, ppo
from polopt.methods.preference.dpo import dpo
from polopt.models import Snapshot
from polopt.rewards.shaping import ClipReward, KLPenalty


@part("reward", "token-reward")
@dataclass(frozen=True)
class TokenReward(Part):
    """step_reward_t += clip(beta (log pi_model,t - log pi_ref,t), -bound, bound) on trainable steps; bound 0: no clip.

    Constants of the time of sampling. arXiv:2404.18922, section 4.
    """

    beta: float = 0.05
    bound: float = 0.05
    model: str = "dpo"

    gives = frozenset({"step_reward"})

    def __post_init__(self) -> None:
        if self.bound < 0:
            raise UsageError(f"token-reward: bound must be at least 0 (0 does not clip), got {self.bound}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({f"logp/{self.model}", "logp/ref"}) if self.beta else frozenset()

    def __call__(self, rollout: Rollout) -> Rollout:
        if not self.beta:
            return rollout
        token = self.beta * rollout.kept(rollout[f"logp/{self.model}"] - rollout["logp/ref"])
        if self.bound:
            token = token.clamp(-self.bound, self.bound)
        before = rollout["step_reward"].to(token) if "step_reward" in rollout else torch.zeros_like(token)
        return rollout.with_columns(step={"step_reward": before + token})


@part("models", "dpo-trained")
@dataclass(frozen=True)
class DPOTrained(Snapshot):
    """The policy of ``folder``, or the run's start after ``steps`` iterations of DPO with this ``beta``.

    ``pairs``: "on-policy" are the best and the worst answer of each sampled group, "data" those of the examples.
    """

    steps: int = 20
    beta: float = 0.1
    pairs: Literal["on-policy", "data"] = "on-policy"

    @property
    def recipe(self) -> Method | None:
        """The method that trains the model before the run."""
        if self.folder is not None:
            return None
        answers = dpo.rollout.on_policy() if self.pairs == "on-policy" else {}
        return dpo | {"objective": type(dpo.objective)(beta=self.beta), **answers}


rto = method(
    "rto",
    ppo,
    seed="194",
    paper="arXiv:2404.18922",
    reward=ClipReward() | TokenReward() | KLPenalty(beta=0.01),
    advantage=GAE(unbiased=False),
    aggregation=SequenceMean(),
    models={"ref": Snapshot(), "dpo": DPOTrained()},
    schedule=Schedule(minibatches=8),
)

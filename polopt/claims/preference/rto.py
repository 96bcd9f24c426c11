"""RTO: dense rewards from a DPO-trained policy (Zhong et al. 2024, arXiv:2404.18922).

Design, fixed before the first run. Exact world: 3 tokens, length 4, so 81 answers to each of 8 prompts; the reward is
the share of positions at which a hidden answer is matched, a sum of hidden contributions of the steps; initial logits
are normal with standard deviation 0.5. Data: 2,000 pairs of answers of the initial policy, labelled by Bradley-Terry at
4 times the difference of rewards. Adam at rate 0.05, 32 prompts a batch, 4 answers each.

The DPO model is trained on the data for 100 iterations, beta 0.1; then 30 iterations of the method's own recipe. "ppo"
is the same without token rewards, "shuffled" permutes the token rewards within each answer after clipping (their sum
stays), "dpo" is the DPO model itself. All arms see the same number of rollouts, but for those of the DPO model, which
are data.

- Efficiency: exact expected reward, mean over the iterations, and log of the iterations to the level at which ppo ends
  (at most 30): RTO above, and below, ppo.
- End: exact expected reward after the last iteration, RTO not below ppo by more than 0.01, and above dpo.
- Placement: mean over the iterations, RTO above shuffled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from polopt.claims.claim import Claim, Direction
from polopt.claims.exact import curve, start
from polopt.core.method import Method
from polopt.core.override import override
from polopt.core.part import Stateful
from polopt.core.rollout import Rollout
from polopt.methods.preference.rto import DPOTrained, TokenReward, rto
from polopt.models import Snapshot
from polopt.policies.exact import SequenceSpace, tree
from polopt.rewards.shaping import ClipReward, KLPenalty
from polopt.tasks.preferences import labelled
from polopt.tasks.problems import problem

SPACE = SequenceSpace(3, 4)
PROMPTS, PAIRS, SCALE, RATE = 8, 2000, 4.0, 0.05
BATCH, GROUP, TRAINED, ITERATIONS = 32, 4, 100, 30


@dataclass(frozen=True)
class Shuffled(Stateful):
    """The token rewards of `TokenReward`, permuted within each answer."""

    batches: int = field(default=0, init=False, compare=False)

    needs = TokenReward().needs
    gives = frozenset({"step_reward"})
    state = ("batches",)

    def __call__(self, rollout: Rollout) -> Rollout:
        token = TokenReward()(rollout)["step_reward"]
        generator = torch.Generator().manual_seed(self.batches)
        self.remember(batches=self.batches + 1)
        # Sorting by answer, then by a random number, is a permutation within answers.
        draw = torch.rand(len(token), generator=generator, dtype=torch.float64)
        return rollout.with_columns(step={"step_reward": token[torch.argsort(rollout.trajectory.double() + draw)]})


def _arms(steps: int) -> Mapping[str, Method]:
    trained = rto | {"models": {"ref": Snapshot(), "dpo": DPOTrained(steps=steps, pairs="data")}}
    return {
        "rto": trained,
        "shuffled": trained | {"reward": ClipReward() | Shuffled() | KLPenalty(beta=0.01)},
        "ppo": override(trained, {"reward.token-reward.beta": 0.0}),
    }


def measure(seed: int, quick: bool) -> Mapping[str, float]:
    """Rewards of the three arms while they learn, and of the DPO model."""
    made = problem("multi-step", space=SPACE, batch=PROMPTS, seed=seed)
    pool = labelled(made, PAIRS, scale=SCALE, seed=seed)
    found: dict[str, float] = {}
    curves, runs = {}, {}
    for arm, method in _arms(2 if quick else TRAINED).items():
        run = runs[arm] = start(made, method, seed=seed, group=GROUP, prompts=BATCH, lr=RATE, examples=pool)
        rewards = curves[arm] = curve(run, 2 if quick else ITERATIONS)
        found |= {f"{arm}/mean": sum(rewards[1:]) / len(rewards[1:]), f"{arm}/end": rewards[-1]}
    chance = tree.log_probabilities(SPACE, runs["rto"].policy.model("dpo")).exp()
    found["dpo/end"] = float((chance * made.reward).sum(-1).mean())
    level = curves["ppo"][-1]
    for arm in ("rto", "ppo"):
        reached = next((i for i, reward in enumerate(curves[arm]) if reward >= level), len(curves[arm]) - 1)
        found[f"{arm}/iterations"] = math.log(max(reached, 1))
    return found


def _claim(
    name: str,
    statement: str,
    metric: str,
    treatment: str,
    control: str,
    direction: Direction = "higher",
    margin: float = 0.0,
) -> Claim:
    baseline = {"ppo": "ppo on the sentence reward", "dpo": "the DPO model"}.get(
        control.partition("/")[0], "rto, token rewards shuffled within answers"
    )
    return Claim(
        "rto", name, statement, "exact", baseline, metric, direction, treatment, control, margin=margin, measure=measure
    )


MEAN = "exact expected reward, mean over 30 iterations"
END = "exact expected reward after 30 iterations"

CLAIMS = (
    _claim("efficiency", "RTO learns faster than PPO on the sentence reward.", MEAN, "rto/mean", "ppo/mean"),
    _claim(
        "iterations",
        "RTO needs fewer rollouts to the level at which PPO ends.",
        "log iterations to PPO's last expected reward",
        "rto/iterations",
        "ppo/iterations",
        "lower",
    ),
    _claim("end-ppo", "RTO ends no lower than PPO.", END, "rto/end", "ppo/end", margin=0.01),
    _claim("end-dpo", "RTO ends above the DPO model that rewards it.", END, "rto/end", "dpo/end"),
    _claim(
        "placement",
        "The same token rewards at shuffled places of their answers help less.",
        MEAN,
        "rto/mean",
        "shuffled/mean",
    ),
)

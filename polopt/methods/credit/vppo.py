"""VPPO: visually-perceptive policy optimisation (Huang et al. 2025, arXiv:2510.09285).

u_t = clip(log pi_old(o_t | corrupted prompt, o_<t) - log pi_old(o_t | prompt, o_<t), -20, 20);
S_t = clip(e^u_t - u_t - 1, 0, 10), how much step t depends on what was seen: E_{o ~ pi}[e^u - u - 1] = KL;
x_i = mean_t S_t of response i, scaled to [0, 1] over the batch;  f_i = b + x_i (b_max - b), b_max such that mean f = 1;
A_i = f_i (r_i - mean_g) / (std_g + 1e-6);  M_t = 1 on the ceil(p n) steps of a response with the largest S, else 0;
L = (1/N) sum_t M_t c_t - (c_H / N) sum_t log pi_t, N all steps.
Here c_t is the clipped surrogate (0.2, 0.28) with dual clip 3. The last term is meant to lower the entropy, which it
estimates (its gradient has expectation 0 where pi is pi_old). Groups that are all right or all wrong are dropped.

All as in the authors' code (huaixuheqing/VPPO-RL), p = 0.4, b = 0.9 and c_H = 0.06 as in its scripts; the paper has a
KL over all tokens for S. There the range of x is that of a device's minibatch and the mean that of a microbatch; here
both are of the rollout, before it is cut into minibatches. There images lose squares of 14 x 14 pixels with probability
1/2; here the prompt's observation loses tokens (`polopt.models.corrupted_prompt`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.advantages.group import GroupZScore
from polopt.core.loss import Evaluation, Loss, per_step
from polopt.core.part import Part, part
from polopt.core.registry import method
from polopt.core.rollout import Rollout
from polopt.core.segments import segment_rank
from polopt.methods.base.dapo import dapo
from polopt.models.corrupted_prompt import CorruptedPrompt
from polopt.objectives.clipped_surrogate import ClippedSurrogate


@part("advantage", "dependency-scaled")
@dataclass(frozen=True)
class DependencyScaled(Part):
    """A_i = f_i * group z-score; also gives ``dependency`` S [N], measured by the model ``view``, 0 on masked steps.

    f_i rises linearly with the mean dependency of response i, from ``floor``, with mean 1 over the batch; 1 where the
    range is below 1e-6 or fewer than two responses count. Those without a trainable step or a valid reward do not.
    """

    floor: float = 0.9
    view: str = "blind"

    gives = frozenset({"dependency"})
    unit = "batch"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"reward", "logp", f"logp/{self.view}"})

    def __call__(self, rollout: Rollout) -> dict[str, Tensor]:
        gap = torch.where(rollout.mask, rollout[f"logp/{self.view}"] - rollout.logp, 0.0).clamp(-20.0, 20.0)
        dependency = (torch.expm1(gap) - gap).clamp(0.0, 10.0)
        mean = rollout.mean_steps(dependency)
        counts = (rollout.active_lengths > 0) & ~rollout.trajectory_return.isnan()
        advantage, known = GroupZScore(eps=1e-6)(rollout), mean[counts]
        if known.numel() > 1 and float(known.max() - known.min()) > 1e-6:
            x = (mean - known.min()) / (known.max() - known.min())
            top = self.floor + (1 - self.floor) / (x[counts].mean() + 1e-8)
            advantage = advantage * (self.floor + x * (top - self.floor))
        return {"advantage": advantage, "dependency": dependency}


@part("weight", "most-dependent")
@dataclass(frozen=True)
class MostDependent(Part):
    """M_t in {0, 1}, [N]: 1 on the ceil(p n) of a response's n trainable steps with the largest ``dependency``.

    Of equal ones the earlier.
    """

    p: float = 0.4

    needs = frozenset({"dependency"})

    def __call__(self, rollout: Rollout) -> Float[Tensor, " step"]:
        least = -rollout["dependency"]
        rank = segment_rank(least, rollout.trajectory, rollout.n_trajectories, mask=rollout.mask, method="ordinal")
        # Less a little: the rounding of p n above a whole number must not keep one more.
        kept = (self.p * rollout.active_lengths - 1e-4).ceil()
        return ((rank <= rollout.spread(kept)) & rollout.mask).to(least.dtype)


@part("regularizer", "sampled-entropy-penalty")
@dataclass(frozen=True)
class SampledEntropyPenalty(Part):
    """l_t = -coefficient * log pi(a_t): on samples of pi its mean estimates coefficient times the entropy."""

    coefficient: float = 0.06

    def __call__(self, evaluation: Evaluation, rollout: Rollout) -> Loss:
        return per_step(-self.coefficient * evaluation.logp)


vppo = method(
    "vppo",
    dapo,
    seed="172",
    paper="arXiv:2510.09285",
    task="grid",
    reward=None,
    advantage=DependencyScaled(),
    weight=MostDependent(),
    objective=ClippedSurrogate(low=0.2, high=0.28, dual=3.0),
    regularizer=SampledEntropyPenalty(),
    models={"blind": CorruptedPrompt()},
)

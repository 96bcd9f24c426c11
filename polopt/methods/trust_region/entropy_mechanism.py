"""KL-Cov and Clip-Cov: entropy kept at the few steps that cost it (Cui et al. 2025, arXiv:2505.22617).

A step along logits dz changes the entropy of a softmax by -eta Cov_{a ~ pi}(log pi(a), dz_a): it falls where likely
actions are good. Over the N steps of an update, most of it comes from a tiny share, measured (without gradient) by
cov_t = (A_t - mean A) (log pi_t - mean log pi), log pi that of the present policy.
KL-Cov: S = the max(1, floor(k N)) steps of largest cov_t; the ratio is not clipped;
  L = (1/N) sum_t [-A_t rho_t + beta |log pi_t - log pi_old,t| [t in S]]; it acts from the second update on
Clip-Cov: max(1, floor(r N)) steps drawn from those with lower < cov_t < upper that the clip leaves teach nothing;
  L = -(1/N) sum_t m_t min(A_t rho_t, A_t clip(rho_t, 1 - low, 1 + high)), m_t = 0 for those, N as it was.
The recipe is KL-Cov, ahead in the paper's main table at 7B (40.6 to 40.4) and 32B (52.2 to 50.3); `--objective
clip-cov` is the other. k is that of 7B (32B: 2e-4; the code writes percent). As in the authors' scripts groups of one
score are dropped and a rollout makes 8 minibatches. Their code selects per micro-batch, here the whole update does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from polopt.aggregations import TokenMean
from polopt.core.loss import Evaluation, Loss, per_step
from polopt.core.method import Schedule
from polopt.core.part import Part, part
from polopt.core.registry import method
from polopt.core.rollout import Rollout
from polopt.methods.base.dapo import DynamicSampling
from polopt.methods.base.grpo import grpo
from polopt.objectives.clipped_surrogate import ClippedSurrogate
from polopt.objectives.ratio import log_ratio


def covariance(evaluation: Evaluation, rollout: Rollout) -> Float[Tensor, " step"]:
    """cov_t = (A_t - mean A) (log pi_t - mean log pi) over the trainable steps of the whole batch; 0 at others."""
    advantage, logp = rollout.advantage, evaluation.logp.detach()
    product = (advantage - rollout.batch_mean(advantage)) * (logp - rollout.batch_mean(logp))
    return torch.where(rollout.mask, product, 0.0)


def lottery(rollout: Rollout) -> Int[Tensor, " step"]:
    """A pseudo-random number per step: its log-prob when sampled, its advantage and its place, hashed (splitmix64).

    A draw by it depends neither on the order of trajectories nor on how the batch is cut, and repeats in every epoch.
    """
    start = rollout.lengths.cumsum(0) - rollout.lengths
    place = torch.arange(rollout.n_steps, device=rollout.device) - start[rollout.trajectory]
    state = (rollout.logp.double() + 0.6180339887498949 * rollout.advantage.double() + place).view(torch.int64)
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685), (31, 1)):
        # A shift of int64 copies the sign; the mask makes it logical.
        state = (state ^ ((state >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return state


def chosen(candidates: Bool[Tensor, " step"], share: float, rollout: Rollout, by: Tensor) -> Bool[Tensor, " step"]:
    """The max(1, floor(share N)) candidates of largest ``by``, ties by `lottery`; all where they are fewer."""
    count = max(1, int(share * rollout.counts.steps))
    places = candidates.nonzero().flatten()
    places = places[lottery(rollout)[places].argsort(stable=True)]
    places = places[by[places].argsort(descending=True, stable=True)][:count]
    return torch.zeros_like(candidates).index_fill(0, places, True)


@part("objective", "kl-cov")
@dataclass(frozen=True)
class KLCov(Part):
    """l_t = -A_t rho_t (+ beta |log rho_t| on the ``share`` k of largest covariance); arXiv:2505.22617, section 4.

    dl/dlogp_t = -A_t rho_t (+ beta sign(log rho_t), 0 at rho_t = 1).
    """

    share: float = 2e-3
    beta: float = 1.0

    needs = frozenset({"logp", "advantage"})
    unit = "batch"

    def __call__(self, evaluation: Evaluation, rollout: Rollout) -> Loss:
        cov, gap = covariance(evaluation, rollout), log_ratio(evaluation, rollout)
        held = chosen(rollout.mask, self.share, rollout, cov)
        loss = -rollout.advantage * gap.exp() + self.beta * torch.where(held, gap.abs(), 0.0)
        return per_step(loss, covariance=rollout.batch_mean(cov))


@part("objective", "clip-cov")
@dataclass(frozen=True)
class ClipCov(ClippedSurrogate):
    """The clipped surrogate without the steps that `lottery` draws; ``share`` is r. arXiv:2505.22617, section 4."""

    low: float = 1.0
    high: float = 1.0
    share: float = 2e-4
    lower: float = 1.0
    upper: float = 5.0

    unit = "batch"

    def __call__(self, evaluation: Evaluation, rollout: Rollout) -> Loss:
        cov, advantage = covariance(evaluation, rollout), rollout.advantage
        ratio = log_ratio(evaluation, rollout).exp().detach()
        dropped = ((advantage > 0) & (ratio > 1 + self.high)) | ((advantage < 0) & (ratio < 1 - self.low))
        candidates = rollout.mask & ~dropped & (cov > self.lower) & (cov < self.upper)
        silent = chosen(candidates, self.share, rollout, torch.zeros_like(cov))
        plain = super().__call__(evaluation, rollout)
        return per_step(torch.where(silent, 0.0, plain.value), **plain.metrics, covariance=rollout.batch_mean(cov))


entropy_mechanism = method(
    "entropy-mechanism",
    grpo,
    seed="211",
    paper="arXiv:2505.22617",
    filter=DynamicSampling(),
    objective=KLCov(),
    aggregation=TokenMean(),
    schedule=Schedule(minibatches=8),
)

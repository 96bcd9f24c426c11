"""Checks that run by default, cost next to nothing, are logged, and with ``strict`` end the run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from polopt.core.errors import UsageError
from polopt.core.loss import Evaluation
from polopt.core.rollout import Rollout, Source


class CheckFailed(UsageError):
    """A default check failed under ``--strict``."""


@dataclass
class RatioStatistics:
    """Running sums of rho = pi / pi_old over the trainable steps that went through an update."""

    steps: float = 0.0
    gap: float = 0.0
    largest: float = 0.0
    kl: float = 0.0
    weight: float = 0.0
    weight_squared: float = 0.0

    def add(self, evaluation: Evaluation, rollout: Rollout, only: Tensor | None = None) -> None:
        """Count the steps of a micro-batch, of the trajectories ``only`` [M] where given.

        Nothing is counted when the rollout has no log-probs of its sampler, or the loss reads none of the policy.
        """
        if "logp" not in rollout or "logp" not in evaluation.columns:
            return
        counted = rollout.mask if only is None else rollout.mask & rollout.spread(only)
        with torch.no_grad():
            gap = (evaluation.logp.detach() - rollout.logp)[counted].double()
            if not gap.numel():
                return
            ratio = gap.clamp(-20, 20).exp()
            self.steps += gap.numel()
            self.gap += float(gap.abs().sum())
            self.largest = max(self.largest, float(gap.abs().max()))
            self.kl += float((ratio - 1 - gap).sum())
            self.weight += float(ratio.sum())
            self.weight_squared += float(ratio.square().sum())

    def metrics(self) -> dict[str, float]:
        """Mean and largest |log rho|, k3 estimate of KL(pi_old || pi), effective sample size as a share of the steps.

        ESS = (sum rho)^2 / (N sum rho^2).
        """
        if not self.steps:
            return {}
        ess = self.weight**2 / (self.steps * self.weight_squared) if self.weight_squared else math.nan
        return {
            "policy/logp_difference_mean": self.gap / self.steps,
            "policy/logp_difference_max": self.largest,
            "policy/kl_to_sampler": self.kl / self.steps,
            "policy/effective_sample_size": ess,
        }


def check_first_update(statistics: RatioStatistics, tolerance: float, strict: bool) -> dict[str, float]:
    """First update after sampling: learner and sampler are the same weights, so the mean |log rho| is rounding error.

    ``statistics`` are of the trajectories that the present weights sampled; nothing is said where there are none.
    With ``strict`` a mean above ``tolerance`` raises CheckFailed.
    """
    if not statistics.steps:
        return {}
    mean = statistics.gap / statistics.steps
    if strict and not mean <= tolerance:  # a gap of NaN is not small
        raise CheckFailed(
            f"strict check: the learner's log-probs differ from the sampler's by {mean:.2g} on average before the "
            f"first update (allowed: {tolerance:.2g}); the ratio does not start at 1"
        )
    return {"policy/first_update_gap": mean}


def sampler_gap(rollout: Rollout) -> dict[str, float]:
    """Mean and largest |log-prob of the learner - log-prob of the sampler|, under TRL's names.

    Nothing where the sampler's log-probs are the learner's to float32 rounding and were not recomputed.
    """
    if "logp/sampler" not in rollout:
        return {}
    compared = rollout.mask
    if "source" in rollout:  # what is replayed keeps its sampler's log-probs
        compared = compared & rollout.spread(rollout["source"] != Source.REPLAY)
    gap = (rollout.logp - rollout["logp/sampler"])[compared].abs()
    if not gap.numel():
        return {}
    return {
        "sampling/sampling_logp_difference/mean": float(gap.mean()),
        "sampling/sampling_logp_difference/max": float(gap.max()),
    }


def check_versions(rollout: Rollout, version: int, strict: bool) -> dict[str, float]:
    """Age of the data in updates: policy version minus the version that sampled each trajectory.

    With ``strict`` a trajectory from the future raises CheckFailed: its weights are unknown to this run.
    """
    if "version" not in rollout or not rollout.n_trajectories:
        return {}
    age = (version - rollout["version"]).float()
    if strict and float(age.min()) < 0:
        raise CheckFailed(
            f"strict check: a trajectory was sampled by version {int(rollout['version'].max())} > {version}"
        )
    return {"policy/age_mean": float(age.mean()), "policy/age_max": float(age.max())}


def check_rewards(rollout: Rollout, strict: bool) -> dict[str, float]:
    """Share of trajectories whose reward is invalid; with ``strict`` any invalid reward raises CheckFailed."""
    share = float(rollout.reward.isnan().float().mean()) if rollout.n_trajectories else 0.0
    if strict and share > 0:
        raise CheckFailed(f"strict check: {share:.1%} of the rewards of this batch could not be computed")
    return {"frac_reward_invalid": share}


def check_finite(values: Mapping[str, float], strict: bool, reason: str) -> None:
    """With ``strict`` a rejected update raises CheckFailed; otherwise it was counted and the batch kept."""
    if strict:
        raise CheckFailed(f"strict check: {reason}; last metrics {dict(values)}")

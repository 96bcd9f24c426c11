"""KTO: model alignment as prospect theoretic optimisation (Ethayarajh et al. 2024, arXiv:2402.01306).

Single answers that are good or bad, no pairs. The value of an answer saturates around a reference point z:
l_i = lambda_D (1 - sigma(beta (s_i - z))) for a good one, lambda_U (1 - sigma(beta (z - s_i))) for a bad one,
s_i = sum_t log pi(a_t) - log pi_ref(a_t); L is the mean over all answers. z = max(0, mean of s over answers to other
prompts), an estimate of KL(pi || pi_ref) without gradient: the answers of the batch, moved on to the next prompt.
beta = 0.1, lambda_D = lambda_U = 1; keep lambda_D n_D / (lambda_U n_U) within 1 .. 4/3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from polopt.core.errors import UsageError
from polopt.core.loss import Evaluation, Loss, total
from polopt.core.part import Part, part
from polopt.core.policy import Policy, Request
from polopt.core.registry import method
from polopt.core.rollout import Rollout, Source
from polopt.methods.preference.dpo import dpo
from polopt.objectives.preference import answered, sequence_log_ratio
from polopt.rollouts.dataset import Dataset, Form, Found


@part("rollout", "mismatched")
@dataclass(frozen=True)
class Mismatched(Dataset):
    """Labelled singles, and each of their answers once more as an answer to another prompt: a probe without a label.

    The answers of a batch go on to the next example's prompts, as many as there are answers of one example. Nothing is
    added where all answers are to one prompt.
    """

    form: Form = "singles"

    def __call__(
        self,
        policy: Policy,
        requests: Sequence[Request],
        *,
        limit: int,
        seed: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> Rollout:
        found = self.read(requests)
        rollout = self.write(policy, requests, found, limit=limit)
        owners = [place for place, _ in found]
        if len(set(owners)) < 2:
            return rollout
        by = max(owners.count(place) for place in set(owners))
        texts = [answers[0][0] for _, answers in (*found[-by:], *found[:-by])]
        moved: list[Found] = [(place, ((text, math.nan),)) for place, text in zip(owners, texts, strict=True)]
        probes = self.write(policy, requests, moved, limit=limit)
        source = {"source": torch.full_like(probes.lengths, int(Source.PROBE))}
        return Rollout.concat([rollout, probes.with_columns(trajectory=source)])


@part("objective", "kto")
@dataclass(frozen=True)
class KTO(Part):
    """L = mean over labelled answers of lambda (1 - sigma(+-beta (s - z))), + where label > 1/2 (Eq. 7).

    z = max(0, mean of s over the probes of the batch), or over its answers where it has no probes, as where these are
    the policy's own; 0 with ``reference_point`` off. z is a constant.
    """

    beta: float = 0.1
    desirable: float = 1.0
    undesirable: float = 1.0
    reference_point: bool = True

    needs = frozenset({"label", "logp/ref", "source"})
    unit = "batch"

    def __post_init__(self) -> None:
        if not (self.beta > 0 and self.desirable >= 0 and self.undesirable >= 0):
            raise UsageError(
                f"kto needs beta > 0 and weights of at least 0, got {self.beta}, {self.desirable}, {self.undesirable}"
            )

    def __call__(self, evaluation: Evaluation, rollout: Rollout) -> Loss:
        ratio = sequence_log_ratio(evaluation, rollout)
        probe = (rollout["source"] == Source.PROBE) & (rollout.active_lengths > 0)
        known = answered(rollout) & ~probe
        point = ratio.new_zeros(())
        others = probe if bool(probe.any()) else known
        if self.reference_point and bool(others.any()):
            point = ratio.detach()[others].mean().clamp_min(0)
        good = rollout["label"] > 0.5
        gap = self.beta * torch.where(good, ratio - point, point - ratio)
        weight = torch.where(good, self.desirable, self.undesirable)
        count = max(int(known.sum()), 1)
        reward = self.beta * ratio.detach()
        metrics = {"kl__mismatched": point}
        for name, members in (("chosen", known & good), ("rejected", known & ~good)):
            metrics[f"rewards__{name}"] = torch.where(members, reward, 0.0).sum() / max(int(members.sum()), 1)
        return total(torch.where(known, weight * torch.sigmoid(-gap), 0.0).sum() / count, **metrics)


kto = method("kto", dpo, seed="base", paper="arXiv:2402.01306", rollout=Mismatched(), objective=KTO())

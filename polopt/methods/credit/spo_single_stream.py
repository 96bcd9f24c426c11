"""SPO: single-stream policy optimisation (Xu and Ding 2025, arXiv:2509.13232).

One rollout per prompt; the baseline is a success rate tracked over training, v = alpha / (alpha + beta):
A_i = (a_i - mean a) / (std a + 1e-8) over the batch, a_i = r_i - v before this visit; clipped surrogate, token mean.
After the updates, with D = mean over the tokens of the prompt's previous response of |log pi then - log pi now|,
rho = clip(2^(-D / half), rho_min, rho_max);  alpha <- rho alpha + r;  beta <- rho beta + 1 - r.
Prompts are drawn with weight sqrt(v (1 - v)) / (alpha + beta)^gamma + explore.

As in the code (verl, recipe/spo): D is a mean of absolute differences, not the KL of the text, and 0 on a first visit;
gamma is 0; its 14,000 candidates are nearly all prompts, here all of them. For rewards between 0 and 1 the update is
the same moving average, v <- v + (r - v) / (rho (alpha + beta) + 1). A prompt drawn several times into one batch (from
a pool smaller than the batch) is updated visit by visit, where the code keeps the last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.aggregations import TokenMean
from polopt.core.errors import UsageError
from polopt.core.example import Example
from polopt.core.method import Schedule
from polopt.core.part import Evaluate, Part, Stateful, part
from polopt.core.policy import Request
from polopt.core.registry import method
from polopt.core.rollout import Rollout
from polopt.methods.base.grpo import grpo
from polopt.objectives.clipped_surrogate import ClippedSurrogate


@part("curriculum", "value-tracker")
@dataclass(frozen=True)
class ValueTracker(Stateful):
    """prompts x group examples of one trajectory each, drawn by weight; their v is the trajectory column ``baseline``.

    Without replacement (with it from a pool that is too small), from the whole pool or from ``candidates`` times as
    many random examples. An unseen prompt has alpha = beta = 1/2, or after offline rollouts, as the example columns
    ``successes`` s and ``attempts`` n say, (s + 1/2, n - s + 1/2) / (n + 1) / (1 - rho_min). State: alpha and beta of
    all prompts visited, and their last responses with the log-probs of the policy updated on them: in the end one
    response per prompt of the pool, in memory and in every checkpoint. Two more forward passes per iteration.
    Raises UsageError for settings out of range and for rewards outside [0, 1].
    """

    half: float = 0.06
    rho_min: float = 0.875
    rho_max: float = 0.96
    explore: float = 0.05
    gamma: float = 0.0
    candidates: float | None = None
    evidence: dict[str, list[float]] = field(default_factory=dict, init=False, compare=False)
    responses: Rollout | None = field(default=None, init=False, compare=False)

    gives = frozenset({"baseline"})
    state = ("evidence", "responses")

    def __post_init__(self) -> None:
        if not (0 < self.rho_min <= self.rho_max <= 1 and self.half > 0 and self.explore > 0):
            raise UsageError(f"{self} needs 0 < rho_min <= rho_max <= 1, half > 0 and explore > 0")

    def __call__(
        self, pool: Sequence[Example], *, prompts: int, group: int, generator: torch.Generator
    ) -> list[Request]:
        if not pool:
            raise UsageError("there is no example to draw: the pool is empty")
        count, found = prompts * group, pool
        if self.candidates is not None:
            some = torch.randperm(len(pool), generator=generator)[: math.ceil(max(self.candidates, 1) * count)]
            found = [pool[index] for index in some.tolist()]
        alpha, beta = torch.tensor([self.belief(example) for example in found], dtype=torch.float64).T
        value = alpha / (alpha + beta)
        weight = (value * (1 - value)).sqrt() / (alpha + beta) ** self.gamma + self.explore
        drawn = torch.multinomial(weight, count, replacement=count > len(found), generator=generator).tolist()
        return [Request(found[index], 1, columns={"baseline": float(value[index])}) for index in drawn]

    def belief(self, example: Example) -> list[float]:
        """alpha and beta of an example."""
        if example.id in self.evidence:
            return self.evidence[example.id]
        attempts, successes = (float(example.columns.get(name, 0)) for name in ("attempts", "successes"))
        if not 0 <= successes <= attempts:
            raise UsageError(f"example {example.id!r} has {successes:g} successes in {attempts:g} attempts")
        # Where nothing is forgotten no weight is a fixed point, and the counts stand as they are.
        total = 1 / (1 - self.rho_min) if attempts and self.rho_min < 1 else attempts + 1
        return [total * (count + 0.5) / (attempts + 1) for count in (successes, attempts - successes)]

    def observe(self, rollout: Rollout, evaluate: Evaluate) -> None:
        """Forget by the drift since the previous response, count the rewards, keep the new responses."""
        valid = rollout.select(~rollout.trajectory_return.isnan())
        latest = {example.id: place for place, example in enumerate(valid.examples)}
        kept, drift = list[Rollout](), dict[str, float]()
        if self.responses is not None:
            again = torch.tensor([example.id in latest for example in self.responses.examples], dtype=torch.bool)
            then = self.responses.select(again).to(rollout.device)
            gap = then.mean_steps((evaluate(then, frozenset({"logp"})).logp - then.logp).abs())
            drift = {example.id: moved for example, moved in zip(then.examples, gap.tolist(), strict=True)}
            kept = [self.responses.select(~again)]
        self.remember(evidence=dict(self.evidence))
        for example, reward in zip(valid.examples, valid.trajectory_return.tolist(), strict=True):
            if not 0 <= reward <= 1:
                raise UsageError(f"a success rate takes rewards from 0 to 1; example {example.id!r} got {reward:g}")
            rho = min(max(2 ** (-drift.pop(example.id, 0.0) / self.half), self.rho_min), self.rho_max)
            alpha, beta = self.belief(example)
            self.evidence[example.id] = [rho * alpha + reward, rho * beta + 1 - reward]
        new = evaluate(valid.select(torch.tensor(list(latest.values()), dtype=torch.int64)), frozenset({"logp"}))
        kept.append(replace(new, columns={"step": {"logp": new.logp, "mask": new.mask}}).to("cpu"))
        self.remember(responses=Rollout.concat(kept))


@part("advantage", "tracked-baseline")
@dataclass(frozen=True)
class TrackedBaseline(Part):
    """A_i = (a_i - mean a) / (std a + eps), a_i = R_i - ``baseline``, which a curriculum gives; [M].

    Mean and sample standard deviation over the batch's valid (not NaN) returns. The others, equal a and a single valid
    one get exactly 0.
    """

    eps: float = 1e-8

    needs = frozenset({"reward", "baseline"})
    unit = "batch"

    def __call__(self, rollout: Rollout) -> Float[Tensor, " trajectory"]:
        return rollout.as_one_group.group_zscore(rollout.trajectory_return - rollout["baseline"], eps=self.eps)


spo = method(
    "spo-single-stream",
    grpo,
    seed="157",
    paper="arXiv:2509.13232",
    curriculum=ValueTracker(),
    advantage=TrackedBaseline(),
    objective=ClippedSurrogate(low=0.2, high=0.28, dual=10.0),
    aggregation=TokenMean(),
    schedule=Schedule(minibatches=8),
)

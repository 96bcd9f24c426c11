"""Everything that is measured of one method on one problem."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from polopt.core.method import Method
from polopt.diagnosis.curve import Curve, weight_by_pass_rate
from polopt.diagnosis.estimator import Estimate, Kind, estimate
from polopt.diagnosis.follow import FixedPoint, follow
from polopt.diagnosis.world import World
from polopt.policies.exact import ExactPolicy, enumeration, kl_regularised_objective, policy_gradient
from polopt.tasks.problems import Problem


@dataclass(frozen=True)
class Bias:
    """An expected direction g against a true gradient t.

    ``angle`` between them in degrees; ``norm_ratio`` |g| / |t|; ``scale`` c = max(0, <g, t>) / |t|^2, the best positive
    multiple of t; ``residual`` |g - c t| / |g|, what no scale explains. NaN where g or t vanishes. ``angle_floor`` is
    the angle that a direction without bias would show on average in a sample of this size, ``norm_error`` the standard
    error of ``norm_ratio`` (jackknife over 20 blocks); both 0 where exact.
    """

    angle: float
    norm_ratio: float
    scale: float
    residual: float
    angle_floor: float = 0.0
    norm_error: float = 0.0


@dataclass(frozen=True)
class Signal:
    """What groups of one kind contribute.

    ``probability`` of such a group before any filter, ``norm`` of its part of the expected direction relative to the
    whole, ``share`` of the expected length of a group's direction: E[|g| 1] / E[|g|].
    """

    probability: float
    norm: float
    share: float


@dataclass(frozen=True)
class Diagnosis:
    """One method on one problem.

    ``noise`` n tr Cov(g) / |E g|^2 in trajectories: how many a batch needs for its noise to equal its signal
    (McCandlish et al. 2018, arXiv:1812.06162, the simple noise scale). ``signal_to_noise`` is its inverse root,
    |E g| / sqrt(n tr Cov(g)) per trajectory. ``ess_sequence`` 1 / E_mu[rho^2] is the effective share of the samples of
    the behaviour mu under ratios rho = pi / mu of sequences, ``ess_step`` that of steps. ``kept`` is the share of
    groups that a filter keeps.
    ``kl_bias`` is against grad (E[r] - beta KL(pi || ref)) of a method with a KL, None without.
    """

    slug: str
    kind: Kind
    draws: int
    group_sizes: tuple[int, ...]
    beta: float
    bias: Bias
    kl_bias: Bias | None
    noise: float
    signal_to_noise: float
    ess_sequence: float
    ess_step: float
    kept: float
    all_right: Signal
    all_wrong: Signal
    curve: Curve | None
    fixed_point: FixedPoint | None

    def as_dict(self) -> dict[str, Any]:
        """Plain data; the policy of the fixed point as the probabilities of its sequences, [B][S]."""
        made = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("bias", "kl_bias", "all_right", "all_wrong"):
            made[name] = None if made[name] is None else dataclasses.asdict(made[name])
        made["group_sizes"] = list(self.group_sizes)
        if self.curve is not None:
            made["curve"] = {**dataclasses.asdict(self.curve), "relative": list(self.curve.relative)}
        if (point := self.fixed_point) is not None:
            made["fixed_point"] = {f.name: getattr(point, f.name) for f in dataclasses.fields(point)}
            made["fixed_point"]["policy"] = point.policy.probabilities().tolist()
        return made


def diagnose(
    method: Method,
    problem: Problem,
    *,
    prompts: int = 8,
    seed: int = 0,
    seconds: float = 10.0,
    curve: bool = True,
    fixed_point: bool = True,
    tell: Callable[[str], None] = lambda text: None,
) -> Diagnosis:
    """Measure the first update of a method on a problem; ``seconds`` bound the search for its fixed point.

    Raises UsageError when the method needs what the exact world does not have.
    """
    world = World(method, problem)
    policy, behaviour = world.policy(), world.behaviour()
    found = estimate(world, policy, behaviour, prompts=prompts, seed=seed, tell=tell)
    beta = world.beta()
    truth = policy_gradient(policy, problem.reward).detach().flatten() / problem.batch
    squared = found.length**2
    return Diagnosis(
        slug=method.slug,
        kind=found.kind,
        draws=found.draws,
        group_sizes=problem.group_sizes,
        beta=beta,
        bias=measure_bias(found, truth),
        kl_bias=measure_bias(found, regularised_gradient(world, policy, beta)) if beta > 0 else None,
        noise=found.noise / squared if squared else math.nan,
        signal_to_noise=math.sqrt(squared / found.noise) if found.noise > 0 else math.nan,
        **effective_sample_size(policy, behaviour),
        kept=found.kept,
        all_right=measure_signal(found, found.right, found.right_before),
        all_wrong=measure_signal(found, found.wrong, found.wrong_before),
        curve=weight_by_pass_rate(method, max(problem.group_sizes), prompts=prompts, seed=seed, tell=tell)
        if curve and not set(named(method)) - {"reward/*"}
        else None,
        fixed_point=follow(world, local=found.kind != "sampled batches", seconds=seconds, seed=seed, tell=tell)
        if fixed_point
        else None,
    )


def named(method: Method) -> list[str]:
    """The named rewards that the method's parts ask for."""
    return sorted(name for name in method.needs if name.startswith("reward/"))


def regularised_gradient(world: World, policy: ExactPolicy, beta: float) -> Float[Tensor, " parameter"]:
    """grad (E[r] - beta KL(pi || reference)), mean over problems, flat."""
    problem = world.problem
    with torch.no_grad():
        reference = ExactPolicy(policy.space, policy.problems, problem.reference).probabilities()
    value = kl_regularised_objective(policy, problem.reward, reference, beta)
    return enumeration.gradient(policy, value).flatten() / problem.batch


def measure_bias(found: Estimate, truth: Float[Tensor, " parameter"]) -> Bias:
    """Angle, length and residual of the expected direction against a true gradient."""
    made = _bias(found.mean, truth) if found.length else _bias(torch.zeros_like(truth), truth)
    if not found.length or not found.error or found.blocks is None:
        return made
    floor = math.degrees(math.atan2(math.sqrt(found.error), float(found.mean.norm())))
    total, count = found.blocks.sum(0), len(found.blocks)
    without = torch.stack([(total - block) / (count - 1) for block in found.blocks]).norm(dim=1) / truth.norm()
    error = math.sqrt((count - 1) / count * float((without - without.mean()).square().sum()))
    return dataclasses.replace(made, angle_floor=floor, norm_error=error)


def _bias(g: Tensor, t: Tensor) -> Bias:
    long, true = float(g.norm()), float(t.norm())
    if not long or not true:
        return Bias(math.nan, long / true if true else math.nan, 0.0, math.nan)
    scale = max(0.0, float(g @ t)) / true**2
    # atan2 keeps small angles that the arc cosine of a product near 1 rounds away.
    along = float(g @ t) / true
    across = float((g - (g @ t) / true**2 * t).norm())
    return Bias(math.degrees(math.atan2(across, along)), long / true, scale, float((g - scale * t).norm()) / long)


def measure_signal(found: Estimate, which: Bool[Tensor, " group"], probability: float) -> Signal:
    """What the groups in ``which`` contribute."""
    if not len(found.chance):
        return Signal(probability, math.nan, math.nan)
    lengths = found.chance * found.rows.norm(dim=1)
    part, whole, total = (found.chance[which] @ found.rows[which]).norm(), found.length, lengths.sum()
    return Signal(
        probability,
        float(part / whole) if whole else math.nan,
        float(lengths[which].sum() / total) if total else math.nan,
    )


@torch.no_grad()
def effective_sample_size(policy: ExactPolicy, behaviour: ExactPolicy) -> Mapping[str, float]:
    """Shares of the samples of ``behaviour`` that count, under ratios of sequences and of steps."""
    mu, space = behaviour.probabilities(), policy.space
    rho = (policy.log_probabilities() - behaviour.log_probabilities()).exp()
    sequence = 1 / (mu * rho.square()).sum(1).mean()
    step = (policy.step_logp() - behaviour.step_logp()).exp()
    weight = mu[:, :, None] * space.mask
    first, second = (weight * step).sum((1, 2)).mean(), (weight * step.square()).sum((1, 2)).mean()
    return {"ess_sequence": float(sequence), "ess_step": float(first.square() / (second * weight.sum() / len(mu)))}


def within(problem: Problem, group: int | None) -> Problem:
    """The problem with groups of another size."""
    return problem if group is None else dataclasses.replace(problem, group_sizes=(group,) * problem.batch)

"""The update: the gradient of a batch, exact however the batch is cut into micro-batches.

One pass: micro-batches of whole units, each contributing its share of the loss of the whole batch (the counts that
normalise it are the batch's). Two passes, for an objective whose unit does not fit the token budget: evaluate the
packed log-probs without gradient, take dLoss/dlogp on the whole vector, then back-propagate sum(logp * dLoss/dlogp)
micro-batch by micro-batch. Trajectories that cannot have a gradient are left out of both. Where the gradients of chunks
of the batch are asked for, micro-batches are cut within the chunks.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Parameter

from polopt.core.loss import Evaluation
from polopt.core.method import Method
from polopt.core.policy import START, Policy
from polopt.core.rollout import Rollout, Unit
from polopt.training.checks import RatioStatistics
from polopt.training.optimizer import load_optimizer_state, optimizer_state
from polopt.training.profile import Profiler

SCORE_NORM: Final = "score_norm"
"""Trajectory column: square norm of the score of a trajectory under the present policy (`score_norms`)."""

T = TypeVar("T")


def contributing(method: Method, batch: Rollout) -> Tensor:
    """Which trajectories [M] can have a gradient: some step trains and, where the loss vanishes with a column, that
    column is not zero on all of them. For units wider than a trajectory, whole groups or the whole batch count.
    """
    matters = method.trains(batch)
    if method.vanishes_with is not None and method.vanishes_with in batch:
        matters = matters & (batch[method.vanishes_with] != 0)
        if method.weight is not None:
            matters = matters & (batch.weight != 0)
    active = torch.zeros(batch.n_trajectories, dtype=torch.bool, device=batch.device)
    active[batch.trajectory[matters]] = True
    match method.unit:
        case "step" | "trajectory":
            return active
        case "group":
            groups = torch.zeros(batch.n_groups, dtype=torch.bool, device=batch.device)
            groups[batch.group[active]] = True
            return groups[batch.group]
        case _:
            return active.any().expand_as(active)


@dataclass
class BatchStep:
    """One update of a policy on one batch; implements `polopt.core.update.Step`.

    ``token_budget`` bounds what goes through the policy at once (rows times the longest row, prompts included).
    ``on_reject`` is told why an update was given up. After `gradient`, ``ratios`` holds the statistics of pi / pi_old,
    and ``reused`` says that the sampler's log-probs stood in for the learner's. ``first`` is the ratios in the first
    `gradient` of the trajectories that the present weights sampled: there they must be 1. It is None where there are
    none, as in a batch that is stale.
    """

    policy: Policy
    method: Method
    batch: Rollout
    optimizer: torch.optim.Optimizer
    token_budget: int
    on_reject: Callable[[str, Rollout], None]
    profiler: Profiler = field(default_factory=lambda: Profiler(enabled=False))
    finite: bool = True
    ratios: RatioStatistics = field(default_factory=RatioStatistics)
    two_pass: bool = False
    reused: bool = False
    first: RatioStatistics | None = None
    chunk_square_norms: list[float] = field(default_factory=list)
    _fresh: RatioStatistics = field(default_factory=RatioStatistics)

    @property
    def parameters(self) -> Sequence[Parameter]:
        """What is trained."""
        return self.policy.parameters()

    def gradient(self, chunks: int = 1) -> dict[str, float]:
        """Fill ``.grad`` with the gradient of the batch's loss; returns ``loss`` and the objective's metrics.

        With ``chunks`` the batch is cut into that many parts of whole groups, or of whole trajectories where it is one
        group, and ``chunk_square_norms`` holds their ||g_m||^2; a loss whose unit they cut takes two passes.
        """
        self.optimizer.zero_grad(set_to_none=True)
        self.finite, self.two_pass, self.reused = True, False, False
        self.ratios, self.chunk_square_norms, self._fresh = RatioStatistics(), [], RatioStatistics()
        active = contributing(self.method, self.batch)
        if not bool(active.any()):
            return {"loss": 0.0}
        work = self.batch if bool(active.all()) else self.batch.piece(active)
        cost = self.policy.cost(work)
        parts, whole_units = self._chunks(chunks, active)
        unit = "trajectory" if self.method.unit == "step" else self.method.unit
        plan = [_bins(work, part, unit, cost, self.token_budget) for part in parts]
        fits = all(len(b) * max(cost[i] for i in b) <= self.token_budget for bins in plan for b in bins)
        if unit == "trajectory" or (whole_units and fits):
            metrics = self._one_pass(work, plan)
        else:
            self.two_pass = True
            plan = [_bins(work, part, "trajectory", cost, self.token_budget) for part in parts]
            metrics = self._two_passes(work, plan)
        if self.first is None and not self.reused and self._fresh.steps:
            self.first = self._fresh
        if not self.finite:
            self.optimizer.zero_grad(set_to_none=True)
        return metrics

    def preview(self) -> float:
        """The KL of a whole step along ``.grad``, for two forward passes and a copy of parameters and moments."""
        saved = self.saved()
        before = self._present_logp()
        self.optimizer.step()
        gap = (self._present_logp() - before)[self.batch.mask].clamp(-20, 20)
        self._put_back(saved)
        return float((torch.expm1(gap) - gap).mean()) if gap.numel() else 0.0

    def _present_logp(self) -> Float[Tensor, " step"]:
        return evaluate_columns(self.policy, self.batch, frozenset({"logp"}), self.token_budget, self.profiler).logp

    def apply(self, scale: float = 1.0) -> None:
        """Step along ``.grad``, at ``scale`` times the learning rate, and count the version up."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        with self.profiler.phase("update"):
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = scale * rate
            self.optimizer.step()
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
        self.policy.version += 1

    def saved(self) -> dict[str, Any]:
        """Copies of parameters and moments, by the parameter's index."""
        kept = {str(index): parameter.detach().clone() for index, parameter in enumerate(self.parameters)}
        return {"parameters": kept, "optimizer": copy.deepcopy(optimizer_state(self.optimizer))}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Put back what `saved` gave; the version counts up, as with every change of the weights."""
        self._put_back(saved)
        self.policy.version += 1

    @torch.no_grad()
    def _put_back(self, saved: Mapping[str, Any]) -> None:
        for index, parameter in enumerate(self.parameters):
            parameter.copy_(saved["parameters"][str(index)])
        load_optimizer_state(self.optimizer, copy.deepcopy(saved["optimizer"]))

    def reject(self, reason: str) -> None:
        """Drop the gradient and report the batch."""
        self.finite = False
        self.optimizer.zero_grad(set_to_none=True)
        self.on_reject(reason, self.batch)

    # --- chunks -------------------------------------------------------------------------------------------------

    def _chunks(self, count: int, active: Tensor) -> tuple[list[Tensor], bool]:
        """Places of each chunk's trajectories among the active ones; whether chunks cut no unit of the method.

        Trajectories without a gradient count: a chunk may be empty, and its gradient 0.
        """
        batch = self.batch
        owners = batch.group if batch.n_groups > 1 else torch.arange(batch.n_trajectories, device=batch.device)
        units = int(owners.max()) + 1
        count = min(count, units)
        chunk_of = torch.empty(units, dtype=torch.int64, device=batch.device)
        for number, members in enumerate(torch.arange(units, device=batch.device).tensor_split(count)):
            chunk_of[members] = number
        mine = chunk_of[owners][active]
        whole_units = count == 1 or (self.method.unit == "group" and batch.n_groups > 1)
        return [(mine == number).nonzero().flatten() for number in range(count)], whole_units

    def _by_chunk(self, plan: Sequence[Sequence[T]]) -> Iterator[T]:
        """The pieces of one chunk after the other, whose gradients the caller adds to ``.grad`` as they come.

        Between chunks ``.grad`` is that of the chunk alone, whose square norm is noted; at the end it is the sum.
        """
        if len(plan) == 1:
            yield from plan[0]
            return
        total: list[Tensor | None] = [None] * len(self.parameters)
        for pieces in plan:
            yield from pieces
            own = [parameter.grad for parameter in self.parameters]
            self.chunk_square_norms.append(len(plan) ** 2 * square_norm(own))
            total = [t if g is None else g if t is None else t.add_(g) for t, g in zip(total, own, strict=True)]
            for parameter in self.parameters:
                parameter.grad = None
        for parameter, gradient in zip(self.parameters, total, strict=True):
            parameter.grad = gradient

    # --- the two ways -------------------------------------------------------------------------------------------

    def _one_pass(self, work: Rollout, plan: Sequence[Sequence[Sequence[int]]]) -> dict[str, float]:
        totals: dict[str, float] = {}
        for members in self._by_chunk(plan):
            piece = work.piece(torch.tensor(members))
            with self.profiler.phase("evaluate"):
                evaluation = self.policy.evaluate(piece, self.method.evaluates)
                loss, metrics = self.method.loss(evaluation, piece)
                self._count(evaluation, piece)
            if not self._check(loss):
                return totals
            _accumulate(totals, loss, metrics)
            if loss.requires_grad:
                with self.profiler.phase("backward"):
                    loss.backward()  # type: ignore[no-untyped-call]
        return totals

    def _two_passes(self, work: Rollout, plan: Sequence[Sequence[Sequence[int]]]) -> dict[str, float]:
        order = [members for bins in plan for members in bins]
        # Reordered so that the pieces lie one after the other in the packed vectors.
        whole = work.piece(torch.tensor([index for members in order for index in members]))
        starts = torch.tensor([0, *(len(members) for members in order)]).cumsum(0).tolist()
        pieces = [whole.piece(torch.arange(a, b)) for a, b in itertools.pairwise(starts)]
        with self.profiler.phase("evaluate"):
            leaves = {
                name: value.detach().requires_grad_() for name, value in self._without_gradient(whole, pieces).items()
            }
            evaluation = Evaluation(leaves)
            loss, metrics = self.method.loss(evaluation, whole)
            self._count(evaluation, whole)
        totals: dict[str, float] = {}
        if not self._check(loss):
            return totals
        _accumulate(totals, loss, metrics)
        if not loss.requires_grad:
            return totals
        slopes = dict(
            zip(leaves, torch.autograd.grad(loss, list(leaves.values()), allow_unused=True), strict=True),
        )
        remaining = iter(pieces)
        at = 0
        for piece in self._by_chunk([[next(remaining) for _ in bins] for bins in plan]):
            ours = {n: g[at : at + piece.n_steps] for n, g in slopes.items() if g is not None}
            at += piece.n_steps
            if all(not bool(g.any()) for g in ours.values()):
                continue
            with self.profiler.phase("evaluate"):
                again = self.policy.evaluate(piece, frozenset(ours))
                surrogate = sum((again[n] * g).sum() for n, g in ours.items())
            with self.profiler.phase("backward"):
                surrogate.backward()  # type: ignore[union-attr]
        return totals

    def _without_gradient(self, whole: Rollout, pieces: Sequence[Rollout]) -> dict[str, Tensor]:
        names = self.method.evaluates
        if names == {"logp"} and _is_fresh(self.policy, whole):
            # The sampler's own log-probs: same weights, so the first pass is already done.
            self.reused = True
            return {"logp": whole.logp}
        with torch.no_grad():
            evaluated = [self.policy.evaluate(piece, names) for piece in pieces]
        return {name: torch.cat([e[name] for e in evaluated]) for name in names}

    def _count(self, evaluation: Evaluation, piece: Rollout) -> None:
        self.ratios.add(evaluation, piece)
        if self.first is None and "version" in piece:
            self._fresh.add(evaluation, piece, only=piece["version"] == self.policy.version)

    def _check(self, loss: Tensor) -> bool:
        if not bool(torch.isfinite(loss.detach())):
            self.reject(f"the loss is {float(loss.detach())}")
        return self.finite


def _bins(work: Rollout, members: Tensor, unit: Unit, cost: Sequence[int], budget: int) -> list[list[int]]:
    """`Rollout.bins` of some of the trajectories."""
    if len(members) == work.n_trajectories:
        return work.bins(unit, cost, budget)
    places = members.tolist()
    bins = work.piece(members).bins(unit, [cost[i] for i in places], budget) if places else []
    return [[places[i] for i in chosen] for chosen in bins]


def _is_fresh(policy: Policy, rollout: Rollout) -> bool:
    # What a data set holds was written, not sampled: it may have no log-probs.
    return {"version", "logp"} <= set(rollout.names()) and bool((rollout["version"] == policy.version).all())


def _accumulate(totals: dict[str, float], loss: Tensor, metrics: Mapping[str, Tensor]) -> None:
    for name, value in {"loss": loss.detach(), **metrics}.items():
        totals[name] = totals.get(name, 0.0) + float(value)


def evaluate_columns(
    policy: Policy, rollout: Rollout, names: frozenset[str], token_budget: int, profiler: Profiler
) -> Rollout:
    """The rollout with these functionals of the policy and its frozen models as step columns, without gradient.

    `SCORE_NORM` becomes a trajectory column. `START` costs a forward pass over what other weights sampled; where the
    present ones did, it is ``logp``.
    """
    if not names or rollout.n_trajectories == 0:
        return rollout
    if SCORE_NORM in names:
        with profiler.phase("evaluate"):
            rollout = rollout.with_columns(trajectory={SCORE_NORM: score_norms(policy, rollout)})
        return evaluate_columns(policy, rollout, names - {SCORE_NORM}, token_budget, profiler)
    if START in names:
        # The learner's own log-probs of what these weights sampled are there already.
        own = policy.exact_sampler or "logp/sampler" in rollout
        other = (rollout["version"] != policy.version) if own else torch.ones_like(rollout.lengths, dtype=torch.bool)
        if "logp" not in rollout:
            # Written, not sampled.
            whole = evaluate_columns(policy, rollout, frozenset({"logp"}), token_budget, profiler)
            rollout, other = whole, torch.zeros_like(other)
        start = rollout.logp.clone()
        if bool(other.any()):
            again = evaluate_columns(policy, rollout.select(other), frozenset({"logp"}), token_budget, profiler)
            start[rollout.spread(other)] = again.logp.to(start)
        rollout = rollout.with_columns(step={START: start})
        return evaluate_columns(policy, rollout, names - {START}, token_budget, profiler)
    order = rollout.bins("trajectory", policy.cost(rollout), token_budget)
    found: dict[str, Tensor] = {}
    first = rollout.lengths.cumsum(0) - rollout.lengths
    with torch.no_grad(), profiler.phase("evaluate"):
        for members in order:
            index = torch.tensor(members)
            piece = rollout.piece(index)
            evaluation = policy.evaluate(piece, names)
            lengths = piece.lengths
            within = torch.arange(piece.n_steps, device=rollout.device) - (
                lengths.cumsum(0) - lengths
            ).repeat_interleave(lengths)
            at = first[index].repeat_interleave(lengths) + within
            for name in names:
                value = evaluation[name]
                found.setdefault(name, value.new_zeros(rollout.n_steps, *value.shape[1:]))[at] = value
    return rollout.with_columns(step=found)


def score_norms(policy: Policy, rollout: Rollout) -> Float[Tensor, " trajectory"]:
    """||grad_theta sum_t log pi(a_t)||^2 of each trajectory, over its trainable steps, under the present policy.

    Exact, for any policy: one forward and one backward pass per trajectory, so that it costs at least as much as an
    update on the batch. ``.grad`` stays as it is.
    """
    parameters = list(policy.parameters())
    norms = []
    for index in range(rollout.n_trajectories):
        piece = rollout.select(torch.tensor([index]))
        if not bool(piece.mask.any()):
            norms.append(0.0)
            continue
        with torch.enable_grad():
            logp = policy.evaluate(piece, frozenset({"logp"}))["logp"]
            norms.append(square_norm(torch.autograd.grad(logp[piece.mask].sum(), parameters, allow_unused=True)))
    dtype = torch.promote_types(parameters[0].dtype, torch.float32)
    return torch.tensor(norms, dtype=dtype, device=rollout.device)


def square_norm(gradients: Iterable[Tensor | None]) -> float:
    """Sum of the squares of all entries, in float32 or better; None counts for nothing."""
    squares = [
        torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)).square()
        for g in gradients
        if g is not None
    ]
    return float(torch.stack(squares).sum()) if squares else 0.0


def minibatches(rollout: Rollout, count: int, unit: str, generator: torch.Generator) -> list[Rollout]:
    """The rollout shuffled into ``count`` batches of whole trajectories, or of whole groups where the unit is a group.

    A unit of the whole batch becomes one of the mini-batch, and its groups are cut.
    """
    if count == 1:
        return [rollout]
    owners = rollout.group if unit == "group" else torch.arange(rollout.n_trajectories)
    units = int(owners.max()) + 1 if owners.numel() else 0
    shuffled = torch.randperm(units, generator=generator)
    batches = []
    # Not `chunk`, which gives fewer or very unequal parts: 14 in 4 would be 4, 4, 4, 2, and 6 in 4 would be 3 parts.
    for chosen in shuffled.tensor_split(min(count, max(units, 1))):
        member = torch.isin(owners.cpu(), chosen)
        if bool(member.any()):
            batches.append(rollout.select(member.to(rollout.device)))
    return batches

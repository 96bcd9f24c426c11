"""The update: the gradient of a batch, exact however the batch is cut into micro-batches.

One pass: micro-batches of whole units, each contributing its share of the loss of the whole batch (the counts that
normalise it are the batch's). Two passes, for an objective whose unit does not fit the token budget: evaluate the
packed log-probs without gradient, take dLoss/dlogp on the whole vector, then back-propagate sum(logp * dLoss/dlogp)
micro-batch by micro-batch. Trajectories that cannot have a gradient are left out of both.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import Parameter

from polopt.core.loss import Evaluation
from polopt.core.method import Method
from polopt.core.policy import Policy
from polopt.core.rollout import Rollout
from polopt.training.checks import RatioStatistics
from polopt.training.profile import Profiler


def contributing(method: Method, batch: Rollout) -> Tensor:
    """Which trajectories [M] can have a gradient: some step trains and, where the loss vanishes with a column, that
    column is not zero on all of them. For units wider than a trajectory, whole groups or the whole batch count.
    """
    matters = batch.mask
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
    and ``reused`` says that the sampler's log-probs stood in for the learner's. ``first`` is the ratios of the first
    `gradient` on a batch that the present weights sampled: there they must be 1.
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

    @property
    def parameters(self) -> Sequence[Parameter]:
        """What is trained."""
        return self.policy.parameters()

    def gradient(self) -> dict[str, float]:
        """Fill ``.grad`` with the gradient of the batch's loss; returns ``loss`` and the objective's metrics."""
        self.optimizer.zero_grad(set_to_none=True)
        self.finite, self.two_pass, self.reused = True, False, False
        self.ratios = RatioStatistics()
        active = contributing(self.method, self.batch)
        if not bool(active.any()):
            return {"loss": 0.0}
        work = self.batch if bool(active.all()) else self.batch.piece(active)
        cost = self.policy.cost(work)
        unit = "trajectory" if self.method.unit == "step" else self.method.unit
        if unit == "trajectory" or work.fits(unit, cost, self.token_budget):
            metrics = self._one_pass([work.piece(torch.tensor(b)) for b in work.bins(unit, cost, self.token_budget)])
        else:
            self.two_pass = True
            order = work.bins("trajectory", cost, self.token_budget)
            metrics = self._two_passes(work, order)
        if self.first is None and not self.reused and _is_fresh(self.policy, self.batch):
            self.first = self.ratios
        if not self.finite:
            self.optimizer.zero_grad(set_to_none=True)
        return metrics

    def apply(self) -> None:
        """Step along ``.grad`` and count the version up."""
        with self.profiler.phase("update"):
            self.optimizer.step()
        self.policy.version += 1

    def reject(self, reason: str) -> None:
        """Drop the gradient and report the batch."""
        self.finite = False
        self.optimizer.zero_grad(set_to_none=True)
        self.on_reject(reason, self.batch)

    # --- the two ways -------------------------------------------------------------------------------------------

    def _one_pass(self, pieces: Sequence[Rollout]) -> dict[str, float]:
        totals: dict[str, float] = {}
        for piece in pieces:
            with self.profiler.phase("evaluate"):
                evaluation = self.policy.evaluate(piece, self.method.evaluates)
                loss, metrics = self.method.loss(evaluation, piece)
                self.ratios.add(evaluation, piece)
            if not self._check(loss):
                return totals
            _accumulate(totals, loss, metrics)
            if loss.requires_grad:
                with self.profiler.phase("backward"):
                    loss.backward()  # type: ignore[no-untyped-call]
        return totals

    def _two_passes(self, work: Rollout, order: Sequence[Sequence[int]]) -> dict[str, float]:
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
            self.ratios.add(evaluation, whole)
        totals: dict[str, float] = {}
        if not self._check(loss):
            return totals
        _accumulate(totals, loss, metrics)
        if not loss.requires_grad:
            return totals
        slopes = dict(
            zip(leaves, torch.autograd.grad(loss, list(leaves.values()), allow_unused=True), strict=True),
        )
        at = 0
        for piece in pieces:
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

    def _check(self, loss: Tensor) -> bool:
        if not bool(torch.isfinite(loss.detach())):
            self.reject(f"the loss is {float(loss.detach())}")
        return self.finite


def _is_fresh(policy: Policy, rollout: Rollout) -> bool:
    return "version" in rollout and bool((rollout["version"] == policy.version).all())


def _accumulate(totals: dict[str, float], loss: Tensor, metrics: Mapping[str, Tensor]) -> None:
    for name, value in {"loss": loss.detach(), **metrics}.items():
        totals[name] = totals.get(name, 0.0) + float(value)


def evaluate_columns(
    policy: Policy, rollout: Rollout, names: frozenset[str], token_budget: int, profiler: Profiler
) -> Rollout:
    """The rollout with these functionals of the policy and its frozen models as step columns, without gradient."""
    if not names or rollout.n_trajectories == 0:
        return rollout
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
                found.setdefault(name, value.new_zeros(rollout.n_steps))[at] = value
    return rollout.with_columns(step=found)


def minibatches(rollout: Rollout, count: int, unit: str, generator: torch.Generator) -> list[Rollout]:
    """The rollout shuffled into ``count`` batches of whole trajectories, or of whole groups where the unit is wider."""
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

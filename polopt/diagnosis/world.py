"""A method on a problem of the exact world: the columns that its parts see, and the gradient that it makes of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from polopt.core.errors import UsageError
from polopt.core.loss import Evaluation
from polopt.core.method import Method
from polopt.core.part import declared, flatten, settings
from polopt.core.policy import MASKED, START, of_critic, pattern
from polopt.core.rollout import Counts, MissingColumn, Rollout
from polopt.diagnosis.draws import Draws
from polopt.policies.exact import ExactPolicy, SequencePayload
from polopt.tasks.problems import Problem

CHANCE = "diagnosis/chance"
NUMBER = "diagnosis/number"
_SAMPLED = frozenset(
    {"action", "logp", "entropy", "mask", "truncated", "version", "source", "limit", "reward", "score"}
)


@dataclass(frozen=True, eq=False)
class World:
    """A method and a problem. Every frozen model that the method owns is the problem's reference policy.

    Raises UsageError when a part needs a column, or the loss a functional, that the exact world does not have.
    """

    method: Method
    problem: Problem

    def __post_init__(self) -> None:
        if self.method.offline:
            raise UsageError(
                f"diagnosis enumerates what a policy samples, and method {self.method.slug!r} learns from answers that "
                f"are known already; diagnose it on its own answers: --pairs on-policy"
            )
        named = {f"reward/{name}" for name in self.problem.rewards}
        # Groups are enumerated here, whatever the method's rollout part does: what that adds is not there, nor what
        # depends on it.
        known = (self.policy().columns | self._values | {START}) - MASKED
        (self.method | {"rollout": None}).check(_SAMPLED | known | named | {"turn"})
        for name in sorted(name for name in self.method.evaluates if pattern(name) not in known):
            raise UsageError(
                f"method {self.method.slug!r} evaluates {name!r}, which a policy of the exact world cannot compute "
                f"(it can: {', '.join(sorted(known))})"
            )

    @property
    def _values(self) -> frozenset[str]:
        """The columns of a critic, one or several heads, that the method reads."""
        return of_critic(self.method.needs | self.method.evaluates)

    def policy(self) -> ExactPolicy:
        """The problem's initial policy with the method's models."""
        return self._with_models(self.problem.policy())

    def behaviour(self) -> ExactPolicy:
        """The problem's policy that samples."""
        return self._with_models(self.problem.sampler())

    def _fresh(self) -> Method:
        """The method at its first update, whatever came before."""
        return self.method.clone() if self.method.state_dict() else self.method

    def _with_models(self, policy: ExactPolicy) -> ExactPolicy:
        for name, model in self.method.models.items():
            model.install(policy, name)
            if name in policy.models:
                policy.add_model(name, self.problem.reference)
        return policy

    def beta(self) -> float:
        """Coefficient of the method's KL to one of its models, 0 without.

        The sum of the fields ``beta`` of the reward, objective and regularizer parts that read such a model's
        log-probs.
        """
        models = {f"logp/{name}" for name in self.method.models}
        members = (*flatten(self.method.reward), *flatten(self.method.objective), *flatten(self.method.regularizer))
        return float(
            sum(settings(m).get("beta") or 0.0 for m in members if models & set(getattr(m, "needs", frozenset())))
        )

    # --- what the parts see -------------------------------------------------------------------------------------

    def rollout(self, policy: ExactPolicy, behaviour: ExactPolicy, draws: Draws) -> Rollout:
        """The drawn groups with every column that a run would have, and `CHANCE` [G] and `NUMBER` [T] of each.

        ``value`` (of every head) is the exact value function of ``policy`` (`exact_values`).
        """
        made = self._scored(behaviour, draws)
        if START in self.method.needs:
            made = made.with_columns(step={START: self._model(policy, made, "logp")})
        if not self._values:
            return made
        values = self.exact_values(policy)
        payload = _payload(made)
        exact = values[payload.step_problem, payload.nodes]
        return made.with_columns(step=dict.fromkeys(self._values, exact))

    def _scored(self, behaviour: ExactPolicy, draws: Draws) -> Rollout:
        made = behaviour.rollout(draws.problem, draws.sequence, draws.group, examples=self.problem.examples())
        rewards = {f"reward/{n}": table[draws.problem, draws.sequence] for n, table in self.problem.rewards.items()}
        total = self.problem.reward[draws.problem, draws.sequence]
        return made.with_columns(
            step={
                **{name: self._model(behaviour, made, name) for name in self._model_columns()},
                # No environment answers here: a trajectory is one turn.
                "turn": torch.zeros_like(made.trajectory),
            },
            trajectory={
                **rewards,
                "reward": total,
                "score": total.clone(),
                "limit": torch.full_like(made.lengths, self.problem.space.length),
                **{name: values[draws.problem] for name, values in self._attached.items()},
                NUMBER: torch.arange(made.n_trajectories),
            },
            group={CHANCE: draws.chance},
        )

    @cached_property
    def _attached(self) -> dict[str, Tensor]:
        """What the method's curriculum attaches to each problem before it has seen anything, [B] by name."""
        names = declared(self.method.curriculum, "gives")
        if not names:
            return {}
        generator = torch.Generator().manual_seed(0)
        asked = [
            self._fresh().curriculum([example], prompts=1, group=1, generator=generator)[0].columns
            for example in self.problem.examples()
        ]
        return {name: torch.tensor([own[name] for own in asked], dtype=torch.float64) for name in sorted(names)}

    def _model_columns(self) -> list[str]:
        known = self.policy().columns
        return sorted(name for name in self.method.needs - _SAMPLED if pattern(name) in known)

    @torch.no_grad()
    def _model(self, policy: ExactPolicy, rollout: Rollout, name: str) -> Tensor:
        return policy.evaluate(rollout, frozenset({name}))[name]

    @torch.no_grad()
    def exact_values(self, policy: ExactPolicy) -> Float[Tensor, "problem node"]:
        """V(k) = E[return from step t on | prefix k], the return as the method's reward parts shape it, [B, K].

        A trajectory is shaped by itself here; a reward that looks at the rest of its group is taken as if alone.
        """
        b, s = self.problem.batch, self.problem.space.n_sequences
        every = torch.arange(b * s)
        draws = Draws(every // s, every % s, every, torch.full((b * s,), 1 / (b * s), dtype=torch.float64), True)
        alone = self._fresh().shape_reward(self._scored(policy, draws))
        later = alone.spread(alone.reward).clone()
        if "step_reward" in alone:
            rewards = alone.pad(alone["step_reward"].to(later))
            to_go = rewards.flip(1).cumsum(1).flip(1)
            later = later + to_go[alone.pad(torch.ones_like(later)) > 0]
        payload = _payload(alone)
        chance = alone.spread(policy.probabilities().flatten())
        place = payload.step_problem * self.problem.space.n_nodes + payload.nodes
        empty = chance.new_zeros(b * self.problem.space.n_nodes)
        mass = empty.index_add(0, place, chance)
        return (empty.index_add(0, place, chance * later) / mass.clamp_min(1e-300)).view(b, -1)

    def filtered(self, rollout: Rollout) -> Rollout:
        """The rollout with shaped rewards, after the method's filter."""
        method = self._fresh()
        shaped = method.shape_reward(rollout)
        return shaped if method.filter is None else method.filter(shaped)

    # --- what the loss makes of it ------------------------------------------------------------------------------

    def slopes(self, policy: ExactPolicy, rollout: Rollout, counts: Counts | None = None) -> dict[str, Tensor]:
        """dLoss / d functional of each step of a filtered rollout, [N] by name of the functional.

        ``counts`` normalise the loss, those of the rollout itself when left out. Parts with state are fresh.
        """
        try:
            credited = self._fresh().credit(rollout)
            credited = dataclasses.replace(credited, batch_counts=counts)
            with torch.no_grad():
                found = dict(policy.evaluate(credited, self.method.evaluates - self._values).columns)
            found |= {name: credited[name] for name in self._values & self.method.evaluates}  # the critic is exact
            leaves = {name: value.detach().clone().requires_grad_() for name, value in found.items()}
            loss, _ = self.method.loss(Evaluation(leaves), credited)
        except MissingColumn as error:
            raise UsageError(f"method {self.method.slug!r} on problem {self.problem.name!r}: {error}") from error
        if not loss.requires_grad:
            return {name: torch.zeros_like(value) for name, value in found.items()}
        slopes = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
        return dict(zip(leaves, slopes, strict=True))

    def is_local(self, policy: ExactPolicy, rollout: Rollout) -> bool:
        """Whether what happens to a group does not depend on the groups beside it: filter, credit and slopes.

        Tried on some of the groups, and on one by itself, of a rollout before its reward is shaped.
        """
        if self.method.unit == "batch":
            return False
        count = rollout.n_groups
        shown = torch.linspace(0, count - 1, min(count, 200)).long()
        whole = rollout.select(torch.isin(rollout.group, shown))
        kept = self.filtered(whole)
        if not kept.n_trajectories:
            return True
        counts = Counts(10.0, 4.0, 1.0, dict.fromkeys(kept.counts.masks, 5.0))
        everything = self._traces(policy, kept, counts)
        # By themselves: the first, of one sequence repeated, and the one with the greatest spread; then some together.
        # A batch's mean may be that of some of its groups by symmetry, but hardly that of all these.
        widest = int(whole.group_std(whole.reward).argmax())
        some = torch.rand(whole.n_groups, generator=torch.Generator().manual_seed(0)) < 0.4
        for chosen in (whole.group == 0, whole.group == widest, some[whole.group]):
            alone = self.filtered(whole.select(chosen))
            place = torch.isin(kept[NUMBER], whole[NUMBER][chosen])
            if not torch.equal(kept[NUMBER][place], alone[NUMBER]):
                return False
            if not alone.n_trajectories:
                continue
            mine = place[kept.trajectory]
            for name, value in self._traces(policy, alone, counts).items():
                if not torch.allclose(everything[name][mine], value, rtol=1e-6, atol=1e-9):
                    return False
        return True

    def _traces(self, policy: ExactPolicy, rollout: Rollout, counts: Counts) -> dict[str, Tensor]:
        credited = self._fresh().credit(rollout)
        made = {name: credited[name] for name in ("advantage", "weight") if name in credited}
        return {**made, **{f"slope/{n}": v for n, v in self.slopes(policy, rollout, counts).items()}}


def expected_counts(rollout: Rollout, chance: Float[Tensor, " group"]) -> Counts:
    """Steps, trajectories and groups that a group has in expectation: what normalises a large batch, per group."""
    per_group = chance[rollout.group]
    per_step = per_group[rollout.trajectory]

    def steps(mask: Tensor) -> float:
        return float((per_step * mask.to(per_step)).sum())

    masks = {name: steps(rollout[name]) for name in rollout.counts.masks}
    return Counts(steps(rollout.mask), float(per_group.sum()), 1.0, masks)


@dataclass(frozen=True, eq=False)
class Catalogue:
    """Every decision that a policy can take, U = B K V of them, and the gradient of functionals there.

    A functional of a step depends on its decision (problem, prefix, token) alone, so that gradients of any number of
    trajectories are sums over the catalogue.
    """

    rollout: Rollout
    """Trajectories that take every decision."""
    first: Int[Tensor, " decision"]
    """A step at which each decision is taken."""

    @classmethod
    def of(cls, policy: ExactPolicy) -> Catalogue:
        """The catalogue of a policy's space."""
        space, b = policy.space, policy.problems
        s = space.n_sequences
        every = torch.arange(b * s)
        rollout = policy.rollout(every // s, every % s, every)
        place = decisions(rollout, policy)
        first = torch.full((b * space.n_nodes * space.vocabulary,), -1).scatter(
            0, place.flip(0), torch.arange(rollout.n_steps).flip(0)
        )
        return cls(rollout, first)

    def expected(self, policy: ExactPolicy, coefficients: Mapping[str, Tensor]) -> Float[Tensor, " parameter"]:
        """sum_u c_u grad f(u) over functionals f by name, c [U] each; flat in the logits."""
        names = frozenset(coefficients) - of_critic(coefficients)
        evaluation = policy.evaluate(self.rollout, names)
        total = sum((coefficients[name] * evaluation[name][self.first]).sum() for name in coefficients if name in names)
        if not isinstance(total, Tensor) or not total.requires_grad:
            return torch.zeros_like(policy.logits).flatten()
        (gradient,) = torch.autograd.grad(total, policy.logits, allow_unused=True, materialize_grads=True)
        return gradient.flatten()

    def jacobian(self, policy: ExactPolicy, name: str) -> Float[Tensor, "prefix token logit"]:
        """Gradient of one functional at every decision in the logits of its own prefix, [B K, V, V].

        The policy is tabular: a decision depends on no other prefix, so that one pass per token finds all of them.
        """
        vocabulary = policy.space.vocabulary
        value = policy.evaluate(self.rollout, frozenset({name}))[name][self.first].view(-1, vocabulary)
        if not value.requires_grad:
            return value.new_zeros(len(value), vocabulary, vocabulary)
        passes = [
            torch.autograd.grad(
                value[:, token].sum(), policy.logits, retain_graph=True, allow_unused=True, materialize_grads=True
            )[0]
            for token in range(vocabulary)
        ]
        return torch.stack([found.flatten(0, 1) for found in passes], dim=1)


def decisions(rollout: Rollout, policy: ExactPolicy) -> Int[Tensor, " step"]:
    """Number of each step's decision: (problem K + node) V + token."""
    payload = _payload(rollout)
    return (payload.step_problem * policy.space.n_nodes + payload.nodes) * policy.space.vocabulary + payload.ids


def _payload(rollout: Rollout) -> SequencePayload:
    payload = rollout.payload
    assert isinstance(payload, SequencePayload)
    return payload

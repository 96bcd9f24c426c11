"""The gradient of a batch is that of one plain forward pass, however the batch is cut, and nothing idle is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from polopt.core.loss import Evaluation, Loss, per_group, per_step, total
from polopt.core.method import Method
from polopt.core.part import Part
from polopt.core.rollout import Rollout
from polopt.methods import methods
from polopt.regularizers.kl import KL
from polopt.training.checks import CheckFailed
from polopt.training.profile import Profiler
from polopt.training.update import contributing, evaluate_columns, minibatches
from tests.training.conftest import (
    CountingPolicy,
    collected,
    gradients,
    make_step,
    make_tiny,
    make_trainer,
    nudge,
    plain_evaluation,
    same_gradients,
    short,
)

HUGE, SMALL = 10**9, 60


def oracle(policy: CountingPolicy, method: Method, batch: Rollout) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradient from one padded forward pass over everything."""
    policy.model.zero_grad(set_to_none=True)
    for parameter in policy.parameters():
        parameter.grad = None
    loss, _ = method.loss(plain_evaluation(policy, batch), batch)
    loss.backward()
    return float(loss.detach()), gradients(policy)


# --- every method -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slug", sorted(methods()))
def test_the_gradient_is_that_of_one_plain_forward_pass(slug: str, policy: CountingPolicy) -> None:
    method = short(slug)
    batch = collected(method, policy)
    nudge(policy)
    expected_loss, expected = oracle(policy, method, batch)
    for budget in (1, SMALL, HUGE):
        policy.calls.clear()
        step = make_step(policy, method, batch, budget)
        metrics = step.gradient()
        same_gradients(gradients(policy), expected)
        assert metrics["loss"] == pytest.approx(expected_loss, rel=1e-4, abs=1e-6)
        pieces = len([call for call in policy.calls if call.gradient])
        few = budget == SMALL and int(contributing(method, batch).sum()) <= 4  # may fit at once
        assert pieces == 1 if budget == HUGE else pieces > 1 or few


def test_a_parameter_group_is_reached_by_the_loss_of_each_functional(policy: CountingPolicy) -> None:
    # The critic trains too: else the comparison above would compare zeros.
    method = short("ppo")
    batch = collected(method, policy)
    nudge(policy)
    make_step(policy, method, batch, SMALL).gradient()
    assert policy.critic is not None
    assert all(bool(p.grad.any()) for p in policy.critic.parameters())  # type: ignore[union-attr]


# --- units wider than a trajectory ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GroupSoftmax(Part):
    """-log sum_i exp(A_i + log pi(y_i)) over each group: every step depends on all others of its group."""

    needs = frozenset({"advantage"})
    unit = "group"

    def __call__(self, evaluation: Evaluation, rollout: Rollout) -> Loss:
        sequence = rollout.sum_steps(evaluation.logp)
        score = sequence - sequence.detach() + rollout.mean_steps(rollout.advantage)
        groups = [torch.logsumexp(score[rollout.group == g], 0) for g in range(rollout.n_groups)]
        return per_group(-torch.stack(groups))


@dataclass(frozen=True)
class BatchSoftmax(Part):
    """-log sum_i exp(A_i + log pi(y_i) + mean entropy of y_i) over the batch."""

    entropy: bool = False

    needs = frozenset({"advantage"})
    unit = "batch"

    @property
    def evaluates(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"entropy"}) if self.entropy else frozenset()

    def __call__(self, evaluation: Evaluation, rollout: Rollout) -> Loss:
        sequence = rollout.sum_steps(evaluation.logp)
        score = sequence - sequence.detach() + rollout.mean_steps(rollout.advantage)
        if self.entropy:
            score = score + rollout.mean_steps(evaluation.entropy)
        return total(-torch.logsumexp(score, 0))


COUPLED = [GroupSoftmax(), BatchSoftmax(), BatchSoftmax(entropy=True)]


@pytest.mark.parametrize("objective", COUPLED, ids=repr)
def test_two_passes_give_the_gradient_of_one(objective: Part, policy: CountingPolicy) -> None:
    method = short("grpo", objective=objective)
    batch = collected(method, policy)
    nudge(policy)
    loss, expected = oracle(policy, method, batch)
    one, two = make_step(policy, method, batch, HUGE), make_step(policy, method, batch, SMALL)
    metrics = one.gradient()
    same_gradients(gradients(policy), expected)
    assert not one.two_pass and metrics["loss"] == pytest.approx(loss, rel=1e-4)
    policy.calls.clear()
    metrics = two.gradient()
    same_gradients(gradients(policy), expected)
    assert two.two_pass and not two.reused and metrics["loss"] == pytest.approx(loss, rel=1e-4)
    assert two.ratios.metrics() == pytest.approx(one.ratios.metrics(), rel=1e-3)
    # Each piece once without gradient and once with it.
    assert sum(call.rows for call in policy.calls if not call.gradient) == batch.n_trajectories
    assert sum(call.rows for call in policy.calls if call.gradient) == batch.n_trajectories


@pytest.mark.parametrize("objective", COUPLED[:2], ids=repr)
def test_the_samplers_own_log_probs_spare_the_first_pass(objective: Part, policy: CountingPolicy) -> None:
    method = short("grpo", objective=objective)
    batch = collected(method, policy)
    _, expected = oracle(policy, method, batch)
    policy.calls.clear()
    fresh = make_step(policy, method, batch, SMALL)
    fresh.gradient()
    same_gradients(gradients(policy), expected)
    spared = len(policy.calls)
    assert fresh.reused and all(call.gradient for call in policy.calls)
    policy.calls.clear()
    policy.version += 1  # as after an update; the weights are what they were
    stale = make_step(policy, method, batch, SMALL)
    stale.gradient()
    same_gradients(gradients(policy), expected)
    assert not stale.reused and len(policy.calls) == 2 * spared


# --- nothing for nothing ----------------------------------------------------------------------------------------------


def without_credit(batch: Rollout, trajectories: list[int]) -> Rollout:
    """The batch with advantage 0 on these trajectories."""
    zero = torch.isin(batch.trajectory, torch.tensor(trajectories))
    return batch.with_columns(step={"advantage": batch.advantage.masked_fill(zero, 0.0)})


@pytest.mark.parametrize("slug", ["grpo", "reinforce", "gspo", "dr-grpo"])
def test_trajectories_without_advantage_are_not_evaluated(slug: str, policy: CountingPolicy) -> None:
    method = short(slug)
    batch = without_credit(collected(method, policy), [0, 3, 7, 8, 9, 10, 11])
    nudge(policy)
    _, expected = oracle(policy, method, batch)
    policy.calls.clear()
    make_step(policy, method, batch, SMALL).gradient()
    same_gradients(gradients(policy), expected)
    assert sum(call.rows for call in policy.calls) == int(contributing(method, batch).sum()) <= 9


def test_whole_groups_without_advantage_are_not_evaluated_when_the_unit_is_the_group(policy: CountingPolicy) -> None:
    @dataclass(frozen=True)
    class Vanishing(GroupSoftmax):
        """The advantage times the group's softmax: no advantage in a group, no gradient in it."""

        vanishes_with = "advantage"

        def __call__(self, evaluation: Evaluation, rollout: Rollout) -> Loss:
            sequence = rollout.sum_steps(evaluation.logp)
            credit = rollout.mean_steps(rollout.advantage)
            terms = [
                (credit[rollout.group == g] * sequence[rollout.group == g].log_softmax(0)).sum()
                for g in range(rollout.n_groups)
            ]
            return per_group(-torch.stack(terms))

    method = short("grpo", objective=Vanishing())
    batch = without_credit(collected(method, policy), [0, 1, 4, 5, 6, 7])  # group 0 in part, group 1 altogether
    nudge(policy)
    _, expected = oracle(policy, method, batch)
    for budget in (HUGE, SMALL):
        policy.calls.clear()
        make_step(policy, method, batch, budget).gradient()
        same_gradients(gradients(policy), expected)
        assert sum(call.rows for call in policy.calls if call.gradient) == 12


def test_a_regularizer_keeps_trajectories_without_advantage(policy: CountingPolicy) -> None:
    method = short("grpo", regularizer=KL(beta=0.5))
    batch = without_credit(collected(method, policy), [0, 1, 2, 3])
    nudge(policy)
    _, expected = oracle(policy, method, batch)
    policy.calls.clear()
    make_step(policy, method, batch, SMALL).gradient()
    same_gradients(gradients(policy), expected)
    assert sum(call.rows for call in policy.calls) == 16


@dataclass(frozen=True)
class SomeWeights(Part):
    """0 on every step of the first two trajectories, 2 elsewhere."""

    def __call__(self, rollout: Rollout) -> torch.Tensor:
        return torch.where(rollout.trajectory < 2, 0.0, 2.0)


def test_steps_of_weight_zero_are_not_evaluated(policy: CountingPolicy) -> None:
    method = short("grpo", weight=SomeWeights())
    batch = collected(method, policy)
    nudge(policy)
    _, expected = oracle(policy, method, batch)
    policy.calls.clear()
    make_step(policy, method, batch, SMALL).gradient()
    same_gradients(gradients(policy), expected)
    active = contributing(method, batch)
    assert not bool(active[:2].any()) and sum(call.rows for call in policy.calls) == int(active.sum())


def test_a_batch_without_any_advantage_costs_nothing(policy: CountingPolicy) -> None:
    method = short("grpo")
    batch = without_credit(collected(method, policy), list(range(16)))
    policy.calls.clear()
    assert make_step(policy, method, batch, SMALL).gradient() == {"loss": 0.0}
    assert not policy.calls and all(p.grad is None for p in policy.parameters())


# --- minibatches ------------------------------------------------------------------------------------------------------


def numbered(groups: list[int]) -> Rollout:
    """Trajectories of one step, which carry their index and their group."""
    index = torch.arange(len(groups))
    return Rollout.from_arrays(
        index, groups, step={"mask": index >= 0}, trajectories={"id": index, "of": torch.tensor(groups)}
    )


@pytest.mark.parametrize("unit", ["step", "trajectory", "group"])
@pytest.mark.parametrize("count", [1, 2, 4, 5])
def test_minibatches_are_a_partition_into_the_asked_number(unit: str, count: int) -> None:
    rollout = numbered([0, 0, 1, 1, 1, 2, 3, 3, 4, 5, 5, 5, 5, 0])
    batches = minibatches(rollout, count, unit, torch.Generator().manual_seed(0))
    assert sorted(i for batch in batches for i in batch["id"].tolist()) == list(range(14))
    assert len(batches) == count
    if unit == "group":
        owners = [set(batch["of"].tolist()) for batch in batches]
        assert sum(map(len, owners)) == 6
    elif count > 1:
        sizes = [batch.n_trajectories for batch in batches]
        assert max(sizes) - min(sizes) <= 1
    for batch in batches:
        assert batch.counts.trajectories == batch.n_trajectories  # normalised by itself


def test_minibatches_depend_on_the_generator_alone() -> None:
    def ids(seed: int) -> list[list[int]]:
        found = minibatches(numbered([0] * 12), 3, "step", torch.Generator().manual_seed(seed))
        return [batch["id"].tolist() for batch in found]

    assert ids(0) == ids(0) != ids(1)


def test_there_are_no_more_minibatches_than_units() -> None:
    batches = minibatches(numbered([0, 0, 1]), 5, "group", torch.Generator().manual_seed(0))
    assert sorted(batch.n_trajectories for batch in batches) == [1, 2]


# --- a loss that is not finite ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Broken(Part):
    """A finite number of good steps, then NaN."""

    value: float = float("nan")

    needs = frozenset({"advantage"})

    def __call__(self, evaluation: Evaluation, rollout: Rollout) -> Loss:
        bad = torch.zeros_like(evaluation.logp)
        if rollout.batch_counts is not None and rollout.trajectory.numel() and float(rollout["reward"].max()) > 0:
            bad = torch.full_like(bad, self.value)
        return per_step(evaluation.logp + bad)


@dataclass(frozen=True)
class InfiniteSlope(Part):
    """Loss 0, slope infinite."""

    def __call__(self, evaluation: Evaluation, rollout: Rollout) -> Loss:
        return per_step((evaluation.logp - evaluation.logp.detach()).abs().sqrt())


@pytest.mark.parametrize(
    "objective", [Broken(), Broken(float("inf")), InfiniteSlope()], ids=["nan", "inf", "infinite slope"]
)
def test_an_update_that_is_not_finite_changes_nothing_and_keeps_the_batch(objective: Part, tmp_path: Any) -> None:
    method = short("grpo", objective=objective)
    trainer = make_trainer(tmp_path, method)
    before = [p.detach().clone() for p in trainer.policy.parameters()]
    trainer.step()
    trainer.step()
    assert trainer.rejected == 2 and trainer.policy.version == 0
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.policy.parameters(), strict=True))
    assert all(p.grad is None for p in trainer.policy.parameters())
    dumps = [load_file(path) for path in sorted((tmp_path / "rejected").iterdir())]
    assert len(dumps) == 2
    for dump in dumps:
        assert {"step/advantage", "step/logp", "trajectory/reward", "lengths", "group"} <= set(dump)
        assert dump["step/logp"].shape[0] == int(dump["lengths"].sum())


def test_every_rejected_update_of_an_iteration_is_kept(tmp_path: Any) -> None:
    method = short("gspo", objective=InfiniteSlope())  # four minibatches
    trainer = make_trainer(tmp_path, method)
    trainer.step()
    assert trainer.rejected == 4 == len(list((tmp_path / "rejected").iterdir()))


def test_strict_ends_the_run_at_an_update_that_is_not_finite(tmp_path: Any) -> None:
    trainer = make_trainer(tmp_path, short("grpo", objective=Broken()), strict=True)
    with pytest.raises(CheckFailed, match="loss is nan"):
        trainer.step()
    assert list((tmp_path / "rejected").iterdir())


# --- columns ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, SMALL])
def test_columns_come_back_in_the_order_of_the_rollout(budget: int, policy: CountingPolicy) -> None:
    batch = collected(short("grpo"), policy)
    policy.add_model("ref")
    policy.add_critic()
    nudge(policy)
    names = frozenset({"logp", "logp/ref", "entropy", "value"})
    whole = policy.evaluate(batch, names)
    policy.calls.clear()
    found = evaluate_columns(policy, batch, names, budget, Profiler(enabled=False))
    assert len(policy.calls) > 1 and not any(call.gradient for call in policy.calls)
    for name in names:
        torch.testing.assert_close(found[name], whole[name].detach(), rtol=1e-4, atol=1e-5)
    assert not torch.equal(found["logp"], found["logp/ref"])


def test_no_columns_cost_nothing(policy: CountingPolicy) -> None:
    batch = collected(short("grpo"), policy)
    policy.calls.clear()
    assert evaluate_columns(policy, batch, frozenset(), SMALL, Profiler(enabled=False)) is batch
    assert not policy.calls


def test_two_policies_of_one_seed_are_one() -> None:
    assert all(torch.equal(a, b) for a, b in zip(make_tiny().parameters(), make_tiny().parameters(), strict=True))

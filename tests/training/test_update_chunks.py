"""Gradients of parts of a batch, scaled steps, and square norms of scores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from polopt.claims.exact import credited
from polopt.core.loss import Evaluation
from polopt.core.method import Method
from polopt.core.part import Part, Stateful
from polopt.core.rollout import Rollout
from polopt.methods import get_method
from polopt.policies.exact import ExactPolicy, SequenceSpace, enumeration
from polopt.training.budget import Budget
from polopt.training.profile import Profiler
from polopt.training.update import evaluate_columns, score_norms
from tests.training.conftest import (
    CountingPolicy,
    collected,
    gradients,
    make_step,
    make_trainer,
    nudge,
    plain_evaluation,
    same_gradients,
    short,
)
from tests.training.test_update import HUGE, SMALL, BatchSoftmax, GroupSoftmax, without_credit


def by_chunk(policy: CountingPolicy, method: Method, batch: Rollout, chunk: Tensor) -> list[list[Tensor]]:
    """g_m of each chunk, from the slopes of the loss in the log-probs of one plain forward pass."""
    logp = plain_evaluation(policy, batch)["logp"]
    loss, _ = method.loss(Evaluation({"logp": logp}), batch)
    (slope,) = torch.autograd.grad(loss, logp, retain_graph=True)
    count = int(chunk.max()) + 1
    parameters = list(policy.parameters())
    found = []
    for number in range(count):
        ours = (chunk == number)[batch.trajectory]
        g = torch.autograd.grad((logp * slope)[ours].sum(), parameters, retain_graph=True, allow_unused=True)
        found.append([torch.zeros_like(p) if x is None else count * x for p, x in zip(parameters, g, strict=True)])
    return found


def norms(gradients: list[list[Tensor]]) -> list[float]:
    return [sum(float(g.square().sum()) for g in each) for each in gradients]


OBJECTIVES = {
    "step": (None, False),
    "group": (GroupSoftmax(), False),
    "batch": (BatchSoftmax(), True),  # its unit is cut by any chunk: two passes, whatever the budget
}


@pytest.mark.parametrize("kind", list(OBJECTIVES))
@pytest.mark.parametrize("chunks", [2, 3, 4, 9])
@pytest.mark.parametrize("budget", [1, SMALL, HUGE])
def test_chunks_leave_the_gradient_and_tell_their_own(
    kind: str, chunks: int, budget: int, policy: CountingPolicy
) -> None:
    objective, cut = OBJECTIVES[kind]
    method = short("dr-grpo") if objective is None else short("dr-grpo", objective=objective)
    batch = collected(method, policy)
    nudge(policy)
    # Four groups; more chunks than groups are as many as groups.
    chunk = {2: [0, 0, 1, 1], 3: [0, 0, 1, 2], 4: [0, 1, 2, 3], 9: [0, 1, 2, 3]}[chunks]
    expected = by_chunk(policy, method, batch, torch.tensor(chunk)[batch.group])
    whole = [torch.stack(each).mean(0) for each in zip(*expected, strict=True)]
    step = make_step(policy, method, batch, budget)
    plain = step.gradient()
    same_gradients(gradients(policy), whole)
    assert step.chunk_square_norms == []
    metrics = step.gradient(chunks)
    same_gradients(gradients(policy), whole)
    assert step.chunk_square_norms == pytest.approx(norms(expected), rel=1e-3)
    assert metrics == pytest.approx(plain, rel=1e-4, abs=1e-6)
    assert step.two_pass == (cut or (kind == "group" and budget != HUGE))


@pytest.mark.parametrize("objective", [None, GroupSoftmax()], ids=["step", "group"])
def test_a_batch_of_one_group_is_cut_into_trajectories(objective: Part | None, policy: CountingPolicy) -> None:
    method = short("dr-grpo") if objective is None else short("dr-grpo", objective=objective)
    whole = collected(method, policy)
    batch = whole.select(whole.group == 1)
    nudge(policy)
    expected = by_chunk(policy, method, batch, torch.tensor([0, 0, 1, 2]))
    step = make_step(policy, method, batch, HUGE)
    step.gradient(3)
    same_gradients(gradients(policy), [torch.stack(each).mean(0) for each in zip(*expected, strict=True)])
    assert step.chunk_square_norms == pytest.approx(norms(expected), rel=1e-3)
    assert step.two_pass == (objective is not None)


def test_a_chunk_without_a_gradient_has_norm_zero_and_is_not_evaluated(policy: CountingPolicy) -> None:
    method = short("grpo")
    batch = without_credit(collected(method, policy), [0, 1, 2, 3, 6])
    nudge(policy)
    expected = by_chunk(policy, method, batch, batch.group)
    policy.calls.clear()
    step = make_step(policy, method, batch, HUGE)
    step.gradient(4)
    same_gradients(gradients(policy), [torch.stack(each).mean(0) for each in zip(*expected, strict=True)])
    assert step.chunk_square_norms[0] == 0.0 and all(n > 0 for n in step.chunk_square_norms[1:])
    assert sum(call.rows for call in policy.calls) <= 11 and len(policy.calls) == 3


def test_a_scaled_step_is_a_step_at_that_rate(policy: CountingPolicy) -> None:
    method = short("grpo")
    step = make_step(policy, method, collected(method, policy), HUGE)
    step.gradient()
    slope = gradients(policy)
    before = [p.detach().clone() for p in policy.parameters()]
    step.apply(scale=0.25)
    for p, old, g in zip(policy.parameters(), before, slope, strict=True):
        torch.testing.assert_close(p.detach(), old - 0.1 * 0.25 * g)
    assert [group["lr"] for group in step.optimizer.param_groups] == [0.1]
    assert policy.version == 1


# --- progress ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recorder(Stateful):
    """Notes the progress that it is told."""

    seen: tuple[float, ...] = ()

    state = ("seen",)

    def __call__(self, statistics: dict[str, float]) -> dict[str, float]:
        self.remember(seen=(*self.seen, statistics["progress"]))
        return {}


def test_controllers_are_told_the_share_of_the_budget_that_is_spent(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, short("grpo", controller=Recorder()), budget=Budget(steps=4, rollouts=1000))
    trainer.train()
    assert trainer.method.controller.seen == (0.25, 0.5, 0.75, 1.0)


# --- score norms ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ByScore(Part):
    """The column as the advantage."""

    needs = frozenset({"score_norm"})

    def __call__(self, rollout: Rollout) -> Tensor:
        return rollout["score_norm"]


@pytest.mark.parametrize("head", ["tabular", "order-0", "order-1"])
def test_score_norms_are_those_of_the_enumerated_scores(head: str) -> None:
    space = SequenceSpace(3, 4, end=True)
    rows = ExactPolicy(space, 2, head=head).logits.shape
    generator = torch.Generator().manual_seed(0)
    policy = ExactPolicy(space, 2, torch.randn(rows, generator=generator, dtype=torch.float64), head=head)
    problem = torch.arange(2).repeat_interleave(space.n_sequences)
    sequence = torch.arange(space.n_sequences).repeat(2)
    rollout = policy.rollout(problem, sequence, problem)
    found = score_norms(policy, rollout)
    expected = enumeration.scores(policy).square().sum((-1, -2)).flatten()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert credited(get_method("grpo") | {"advantage": ByScore()}, policy, scored(rollout)).advantage[0] == found[0]
    assert policy.logits.grad is None


def scored(rollout: Rollout) -> Rollout:
    """With a reward of 1 everywhere."""
    return rollout.with_columns(trajectory={"reward": torch.ones(rollout.n_trajectories, dtype=torch.float64)})


def test_score_norms_leave_out_masked_steps_and_the_gradient(policy: CountingPolicy) -> None:
    batch = collected(short("grpo"), policy)
    nudge(policy)
    mask = torch.arange(batch.n_steps) % 3 != 0
    mask[batch.trajectory == 5] = False
    batch = batch.with_columns(step={"mask": mask})
    for parameter in policy.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    with torch.no_grad():
        found = evaluate_columns(policy, batch, frozenset({"score_norm", "entropy"}), SMALL, Profiler(enabled=False))
    assert found.level("score_norm") == "trajectory" and found.level("entropy") == "step"
    assert all(bool((p.grad == 7.0).all()) for p in policy.parameters() if p.grad is not None)
    logp = plain_evaluation(policy, batch)["logp"]
    for i in range(batch.n_trajectories):
        ours = mask & (batch.trajectory == i)
        g = torch.autograd.grad(logp[ours].sum(), list(policy.parameters()), retain_graph=True, allow_unused=True)
        expected = sum(float(x.square().sum()) for x in g if x is not None)
        assert float(found["score_norm"][i]) == pytest.approx(expected, rel=1e-4)
    assert float(found["score_norm"][5]) == 0.0


def test_a_part_that_needs_score_norms_gets_them(policy: CountingPolicy) -> None:
    method = short("grpo", advantage=ByScore())
    batch = collected(method, policy)
    torch.testing.assert_close(batch["score_norm"], score_norms(policy, batch))
    torch.testing.assert_close(batch.advantage, batch.spread(batch["score_norm"]))

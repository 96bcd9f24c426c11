"""The card of SPIN: worked losses, the optimum over all policies, and what a group of self-play holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from polopt.claims.exact import Run, start
from polopt.core.errors import UsageError
from polopt.core.example import Example
from polopt.core.loss import Evaluation
from polopt.core.part import clone
from polopt.core.policy import Request
from polopt.core.rollout import Rollout, Source
from polopt.methods.preference.dpo import DPO
from polopt.methods.preference.spin import SelfPlay, spin
from polopt.objectives.pair_losses import Hinge
from polopt.policies.exact import ExactPolicy, SequenceSpace
from polopt.policies.exact.policy import example_of
from polopt.tasks.preferences import labelled
from polopt.tasks.problems import problem
from tests.support import close, f64, now, same, value_and_gradient

IDS = [0, 0, 1, 1, 1, 2, 3]
POLICY = [-0.5, -1.0, -0.2, -0.7, -0.4, -0.9, -1.1]
OPPONENT = [-0.6, -0.9, -0.3, -0.6, -0.8, -0.7, -1.0]


def card(labels: Sequence[float] = (1, 0, 1, 0), groups: Sequence[int] = (0, 0, 1, 1), **step: Any) -> Rollout:
    return Rollout.from_arrays(
        IDS, list(groups), step={"logp/ref": f64(OPPONENT), **step}, trajectories={"label": f64(labels)}
    )


def of(rollout: Rollout, objective: Any, logp: Sequence[float] = POLICY) -> tuple[float, Tensor]:
    return value_and_gradient(spin | {"objective": objective}, now(logp), rollout)


def test_worked_example() -> None:
    loss, gradient = of(card(), DPO(beta=1.0))
    close(loss, 0.8287059562, digits=10)
    close(gradient, [-0.29934383] * 2 + [0.29934383] * 3 + [-0.26248959, 0.26248959], digits=8)
    loss, gradient = of(card(), Hinge(beta=1.0))
    close(loss, 1.25, digits=10)
    same(gradient, [-0.5] * 2 + [0.5] * 3 + [-0.5, 0.5])


def test_at_the_opponent() -> None:
    same(of(card(), DPO(beta=0.1), OPPONENT)[0], math.log(2))
    same(of(card(), Hinge(beta=0.1), OPPONENT)[0], 1.0)


def test_several_answers_of_the_policy_to_one_demonstration() -> None:
    """A group's mean over its pairs (real, generated); a masked answer is no rival."""
    m = [0.1 * (0.0 - s) for s in (0.4, -0.2, -0.1)]
    loss = of(card((1, 0, 0, 0), (0, 0, 0, 0)), DPO(beta=0.1))[0]
    same(loss, np.mean([math.log1p(math.exp(-x)) for x in m]))
    mask = torch.tensor([True] * 5 + [False, True])
    masked, gradient = of(card((1, 0, 0, 0), (0, 0, 0, 0), mask=mask), DPO(beta=0.1))
    same(masked, np.mean([math.log1p(math.exp(-x)) for x in (m[0], m[2])]))
    assert gradient[5] == 0


# --- the optimum over all policies ------------------------------------------------------------------------------------

DATA, START = f64([0.5, 0.3, 0.2]), f64([0.2, 0.3, 0.5])


def population_gradient(logits: Tensor, opponent: Tensor, strength: float) -> Tensor:
    """Gradient of the expected loss over real ~ data and generated ~ opponent, by the method's own loss."""
    z = logits.clone().requires_grad_()
    logp = z.log_softmax(-1)
    total = torch.zeros((), dtype=torch.float64)
    for real in range(3):
        for made in range(3):
            rollout = Rollout.from_arrays(
                range(2),
                [0, 0],
                step={"logp/ref": opponent.log()[[real, made]]},
                trajectories={"label": f64([1, 0])},
            )
            loss, _ = (spin | {"objective": DPO(beta=strength)}).loss(Evaluation({"logp": logp[[real, made]]}), rollout)
            total = total + DATA[real] * opponent[made] * loss
    (gradient,) = torch.autograd.grad(total, z)
    return gradient


@pytest.mark.parametrize(
    ("strength", "optimum"),
    [
        (0.5, [0.76687117, 0.18404908, 0.04907975]),
        (1.0, [0.5, 0.3, 0.2]),
        (2.0, [0.33913442, 0.32173116, 0.33913442]),
    ],
)
def test_the_worked_optimum_is_stationary(strength: float, optimum: list[float]) -> None:
    exact = START * (DATA / START) ** (1 / strength)
    close(exact / exact.sum(), optimum, digits=8)
    assert float(population_gradient(exact.log(), START, strength).abs().max()) < 1e-15
    assert float(population_gradient(START.log(), START, strength).abs().max()) > 0.01


def test_against_an_opponent_that_is_the_data_nothing_is_learned() -> None:
    assert float(population_gradient(DATA.log(), DATA, 0.7).abs().max()) < 1e-15
    assert float(population_gradient(START.log(), DATA, 0.7).abs().max()) > 0.01


# --- groups of self-play ----------------------------------------------------------------------------------------------

SPACE = SequenceSpace(4, 3, end=True)


def played(part: SelfPlay, seed: int = 0, count: int = 2, policy: ExactPolicy | None = None) -> Rollout:
    policy = policy or ExactPolicy(SPACE, 3)
    examples = [Example(f"{b}", "", completion="2 1 0", columns={"problem": b}) for b in range(3)]
    requests = [Request(example, count) for example in examples]
    return part(policy, [*requests, Request(example_of(0), 0)], limit=3, seed=seed)


def test_a_group_is_a_demonstration_and_answers_of_the_policy() -> None:
    rollout = played(SelfPlay())
    assert rollout.group.tolist() == [0, 1, 2, 0, 0, 1, 1, 2, 2]
    assert rollout["label"].tolist() == [1] * 3 + [0] * 6
    assert rollout["source"].tolist() == [Source.DEMONSTRATION] * 3 + [Source.POLICY] * 6
    texts: Any = rollout.payload
    assert texts.completions[:3] == ("2 1 0",) * 3 and len(set(texts.completions[3:])) > 1
    assert (rollout["mask/chosen"] == (rollout.trajectory < 3)).all()
    assert "logp" not in rollout and rollout["limit"].tolist() == [3] * 9
    # Answers are drawn as plain groups are.
    again = played(SelfPlay())
    assert torch.equal(again["action"], rollout["action"])


def test_a_short_demonstration_ends() -> None:
    example = Example("0", "", completion="2", columns={"problem": 0})
    policy = ExactPolicy(SPACE)
    for end, length in ((True, 2), (False, 1)):
        rollout = SelfPlay(end=end)(policy, [Request(example, 1)], limit=3, seed=0)
        assert int(rollout.lengths[0]) == length


def test_the_groups_of_the_iteration_before_follow() -> None:
    part, alone = SelfPlay(), SelfPlay(mixed=False)
    first = played(part)
    part.observe(first, lambda rollout, names: rollout)
    alone.observe(first, lambda rollout, names: rollout)
    second, fresh = played(part, seed=1), played(alone, seed=1)
    assert second.n_groups == 6 and fresh.n_groups == 3
    assert torch.equal(second["action"], torch.cat([fresh["action"], first["action"]]))
    assert second["source"].tolist()[9:] == [Source.REPLAY] * 9
    assert torch.equal(second["label"], torch.cat([first["label"]] * 2))
    assert alone.past is None


def test_the_state_is_the_iteration_before() -> None:
    part = SelfPlay()
    part.observe(played(part), lambda rollout, names: rollout)
    restored = clone(SelfPlay())
    restored.load_state_dict(part.state_dict())
    one, other = played(part, seed=1), played(restored, seed=1)
    assert torch.equal(one["action"], other["action"]) and one.n_groups == other.n_groups == 6


def test_an_example_without_a_demonstration() -> None:
    bare = Example("seven", "", columns={"problem": 0})
    with pytest.raises(UsageError, match=r"'seven' brings no demonstration"):
        SelfPlay()(ExactPolicy(SPACE), [Request(bare, 1)], limit=3, seed=0)
    with pytest.raises(UsageError, match="'seven'"):
        SelfPlay().check([bare])


def trained(**slots: Any) -> Run:
    made = problem("binary-verifier", space=SequenceSpace(3, 2), batch=2, seed=0)
    pool = labelled(made, 8, kind="demonstrations", law=made.reward, seed=0)
    return start(made, spin | slots, seed=0, examples=pool, group=2)


def test_the_opponent_is_the_policy_of_the_iterations_start() -> None:
    """Also for the answers of the iteration before: at the first update every margin is 0 and the loss log 2."""
    run = trained(schedule=spin.schedule.__class__(1, 1))
    sizes = []
    for _ in range(3):
        before = run.policy.logits.detach().clone()
        run.step()
        same(run.metrics["loss"], math.log(2), rtol=1e-7)
        assert torch.equal(run.policy.model("ref"), before) and not torch.equal(run.policy.logits, before)
        sizes.append((run.metrics["groups/kept"], run.trainer.meter.spent.rollouts))
    # What is replayed was counted when it was sampled.
    assert sizes == [(8, 24), (16, 48), (16, 72)]


def test_an_iteration_is_eight_updates_against_one_opponent() -> None:
    run = trained()
    run.step()
    assert run.policy.version == 8
    assert run.metrics["loss"] < math.log(2) - 1e-3


def test_what_it_declares() -> None:
    assert spin.unit == "group" and spin.offline and spin.objective.beta == 0.1
    assert "label" in spin.rollout.gives and spin.models["ref"].every == 1

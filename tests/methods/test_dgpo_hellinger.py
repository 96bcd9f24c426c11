"""The card of DGPO (Hellinger): weights from gated deviations, their identities, worked example."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from polopt.aggregations import TokenMean
from polopt.core.policy import Request, Sampling
from polopt.core.rollout import Rollout
from polopt.methods.base.grpo import grpo
from polopt.methods.credit.dgpo_hellinger import GatedDeviation, dgpo_hellinger
from polopt.policies.exact import ExactPolicy, SequenceSpace
from polopt.policies.exact.policy import example_of
from tests.support import close, f64, now, same, value_and_gradient

PI = [(0.7, 0.2, 0.1), (0.4, 0.3, 0.3), (0.98, 0.01, 0.01), (0.5, 0.25, 0.25), (0.25, 0.5, 0.25)]
REF = [(0.7, 0.2, 0.1), (0.1, 0.8, 0.1), (0.1, 0.8, 0.1), (0.5, 0.25, 0.25), (0.5, 0.25, 0.25)]
OWNER = [0, 0, 0, 1, 1]


def hellinger(p: tuple[float, ...], q: tuple[float, ...]) -> float:
    return 1 - sum(math.sqrt(a * b) for a, b in zip(p, q, strict=True))


def entropy(p: tuple[float, ...]) -> float:
    return -sum(a * math.log(a) for a in p if a)


def columns(pi: Any = PI, ref: Any = REF) -> dict[str, Tensor]:
    return {
        "hellinger/ref": f64([hellinger(p, q) for p, q in zip(pi, ref, strict=True)]),
        "entropy": f64([entropy(p) for p in pi]),
        "max_entropy": f64([math.log(3)] * len(pi)),
        "logp": f64([-1.0] * len(pi)),
    }


def rollout(**step: Any) -> Rollout:
    given = {name.replace("__", "/"): f64(value) if name != "mask" else value for name, value in step.items()}
    return Rollout.from_arrays(OWNER, [0, 0], step=columns() | given, trajectories={"reward": f64([1.0, 0.0])})


def random_rollout(seed: int, lengths: tuple[int, ...] = (4, 1, 3, 6)) -> Rollout:
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    names = ("hellinger/ref", "entropy", "logp")
    step = {name: torch.rand(n, generator=generator, dtype=torch.float64) for name in names}
    return Rollout.from_arrays(
        torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)),
        [0, 0, 1, 1],
        step=step | {"max_entropy": f64([1.0] * n)},
        trajectories={"reward": f64([1.0, 0.0, 0.3, 0.9])},
    )


def by_loop(made: Rollout, tau: float, kappa: float) -> list[float]:
    """The weights response by response, from the definition."""
    found = []
    for i in range(made.n_trajectories):
        mine = [t for t in range(made.n_steps) if int(made.trajectory[t]) == i and bool(made.mask[t])]
        score = {
            t: float(made["hellinger/ref"][t]) * (float(made["entropy"][t]) / float(made["max_entropy"][t])) ** kappa
            for t in mine
        }
        total = sum(math.exp(s / tau) for s in score.values())
        own = [t for t in range(made.n_steps) if int(made.trajectory[t]) == i]
        found += [len(mine) * math.exp(score[t] / tau) / total if t in score else 0.0 for t in own]
    return found


def test_worked_example() -> None:
    given = columns()
    close(given["hellinger/ref"], [0, 0.136897, 0.565885, 0, 0.042893])
    close(given["entropy"] / math.log(3), [0.729847, 0.991159, 0.101858, 0.946395, 0.946395])
    method = grpo | {"advantage": grpo.advantage.__class__(eps=0.0), "weight": GatedDeviation()}
    credited = method.credit(rollout())
    close(credited.weight, [0.873629, 1.145996, 0.980375, 0.959428, 1.040572])
    close(credited.advantage, [0.707107] * 3 + [-0.707107] * 2)
    close(credited.advantage * credited.weight, [0.617749, 0.810341, 0.693230, -0.678418, -0.735795])
    moved = f64([-1.0] * 5) + f64([0.1, -0.1, 0.3, -0.3, 0.05])
    loss, gradient = value_and_gradient(method, now(moved), credited)
    close(loss, -0.045573)
    close(gradient, [-0.113786, -0.122205, 0, 0, 0.193380])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("tau", "kappa"), [(0.5, 1.0), (0.05, 0.5), (1.0, 3.0)])
def test_weights_are_a_softmax_per_response(seed: int, tau: float, kappa: float) -> None:
    made = random_rollout(seed)
    weight = GatedDeviation(tau=tau, kappa=kappa)(made)
    same(weight, by_loop(made, tau, kappa))
    same(made.mean_steps(weight), [1.0] * 4)
    credited = (dgpo_hellinger | {"weight": GatedDeviation(tau, kappa)}).credit(made)
    total = made.sum_steps(credited.advantage * credited.weight)
    same(total, made.active_lengths * grpo.advantage(made))
    assert (credited.weight > 0).all()  # so that the sign of the credit is that of the advantage
    for i in range(4):
        mine = weight[made.trajectory == i]
        assert float(mine.max() / mine.min()) <= math.exp(1 / tau) * (1 + 1e-12)


def test_the_bound_on_the_ratio_of_weights_is_reached() -> None:
    made = rollout(hellinger__ref=[0, 1, 0, 0, 0], entropy=[math.log(3)] * 5)
    weight = GatedDeviation()(made)
    same(weight[1] / weight[0], math.exp(2))
    close(weight[1] / weight[0], 7.389, digits=3)


def test_weights_of_one_leave_grpo() -> None:
    uniform = [1.0] * 5
    same(GatedDeviation()(rollout(hellinger__ref=[0.0] * 5)), uniform)  # the policy is its reference
    same(GatedDeviation(tau=1e12)(rollout()), uniform, atol=1e-9)
    same(GatedDeviation()(rollout(hellinger__ref=[0.3] * 5, entropy=[0.6] * 5)), uniform)  # equal scores
    moved = f64([-0.9, -1.1, -1.2, -0.8, -1.0])
    start = rollout(hellinger__ref=[0.0] * 5)
    loss, gradient = value_and_gradient(dgpo_hellinger, now(moved), dgpo_hellinger.credit(start))
    expected_loss, expected = value_and_gradient(grpo, now(moved), grpo.credit(start))
    same(loss, expected_loss)
    same(gradient, expected)
    same(GatedDeviation()(random_rollout(0))[4], 1.0)  # a response of one step


def test_the_gate() -> None:
    ungated = GatedDeviation(kappa=0.0)
    assert ungated.needs == {"hellinger/ref"}
    mirrored = columns(REF, PI)["hellinger/ref"]
    same(ungated(rollout()), ungated(rollout(hellinger__ref=mirrored)))  # d is symmetric
    same(ungated(rollout()), ungated(rollout(entropy=[0.0, 1.0, 0.2, 0.3, 0.0])))
    weight = ungated(rollout())
    assert int(weight[:3].argmax()) == 2  # the confident deviation gets most without a gate
    certain = GatedDeviation()(rollout(hellinger__ref=[0.0, 0.9, 0.0, 0, 0], entropy=[1.0, -1e-9, 1.0, 1, 1]))
    same(certain[:3], [1.0] * 3)  # a deterministic step scores 0, also where its entropy rounds below 0
    assert torch.isfinite(GatedDeviation(kappa=0.5)(rollout(entropy=[-1e-9] * 5))).all()


def test_the_weight_scales_the_advantage() -> None:
    made = random_rollout(1)
    credited = dgpo_hellinger.credit(made)
    shaped = made.with_columns(step={"advantage": credited.advantage * credited.weight})
    moved = made.logp + 0.3 * torch.randn(made.n_steps, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for aggregation in (grpo.aggregation, TokenMean()):
        weighted, plain = (one | {"aggregation": aggregation} for one in (dgpo_hellinger, grpo))
        actual = value_and_gradient(weighted, now(moved), credited)
        expected = value_and_gradient(plain, now(moved), shaped)
        same(actual[0], expected[0])
        same(actual[1], expected[1])


def test_masked_steps_take_no_part() -> None:
    mask = torch.tensor([True, False, True, False, False])
    made = rollout(mask=mask, hellinger__ref=[0.1, math.nan, 0.4, 0.3, 0.2])
    weight = GatedDeviation()(made)
    same(weight, by_loop(made, 0.5, 1.0))
    assert (weight[[1, 3, 4]] == 0).all()
    same(weight[:3].sum(), 2.0)


@pytest.mark.parametrize(("groups", "reward"), [([0, 0], [math.nan, 1.0]), ([0, 0], [0.5, 0.5]), ([0, 1], [1.0, 0.0])])
def test_nothing_to_compare_teaches_nothing(groups: list[int], reward: list[float]) -> None:
    made = Rollout.from_arrays(OWNER, groups, step=columns(), trajectories={"reward": f64(reward)})
    credited = dgpo_hellinger.credit(made)
    assert (credited.advantage == 0).all() and torch.isfinite(credited.weight).all()
    _, gradient = value_and_gradient(dgpo_hellinger, now([-1.1] * 5), credited)
    assert (gradient == 0).all()


def test_columns_of_a_policy_give_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    space = SequenceSpace(3, 3)
    policy = ExactPolicy(space, 1, torch.randn(1, space.n_nodes, 3, generator=generator, dtype=torch.float64))
    policy.add_model("ref", torch.randn(1, space.n_nodes, 3, generator=generator, dtype=torch.float64))
    made = policy.sample([Request(example_of(0), 6)], Sampling(), seed=0)
    with torch.no_grad():
        found = policy.evaluate(made, dgpo_hellinger.weight.needs - {"entropy"})
    made = made.with_columns(step=dict(found.columns))
    payload: Any = made.payload
    rows = policy.table()[0].detach().softmax(-1)[payload.nodes].tolist()
    other = policy.model("ref")[0].softmax(-1)[payload.nodes].tolist()
    same(made["hellinger/ref"], [hellinger(p, q) for p, q in zip(rows, other, strict=True)])
    same(GatedDeviation()(made), by_loop(made, 0.5, 1.0))


def test_what_it_declares() -> None:
    assert dgpo_hellinger.regularizer is None
    assert dgpo_hellinger.vanishes_with == "advantage"
    assert dgpo_hellinger.models_in_use.keys() == {"ref"}
    assert grpo.models_in_use == {}

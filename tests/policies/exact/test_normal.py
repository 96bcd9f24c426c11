"""The discretised normal: its distribution, its two parameters, and that it generalises over actions."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from polopt.core.errors import UsageError
from polopt.core.policy import Request, Sampling
from polopt.policies.exact import ExactPolicy, SequenceSpace
from polopt.policies.exact.normal import NormalPolicy
from polopt.policies.exact.policy import example_of
from tests.support import close, same

SPACE = SequenceSpace(9, 1)


def by_hand(mean: float, width: float) -> list[float]:
    weights = [math.exp(-((v - mean) ** 2) / (2 * width**2)) for v in range(9)]
    return [w / sum(weights) for w in weights]


@pytest.mark.parametrize(("mean", "width"), [(4.0, 2.0), (-1.0, 3.5), (7.3, 0.4)])
def test_it_is_a_discretised_normal(mean: float, width: float) -> None:
    policy = NormalPolicy(SPACE, 2, mean=mean, width=width)
    same(policy.probabilities().detach(), [by_hand(mean, width)] * 2)
    same(NormalPolicy.logits_of(SPACE, mean, width).softmax(-1)[0, 0], by_hand(mean, width))


def test_each_problem_has_a_mean_and_a_width() -> None:
    policy = NormalPolicy(SPACE, 2, mean=4.0, width=2.0)
    assert [p.shape for p in policy.parameters()] == [(2, 1, 2)]
    with torch.no_grad():
        # Means are counted in widths of the start, widths by their logarithm.
        policy.logits[1, 0, 0] += 0.5
        policy.logits[1, 0, 1] += math.log(1.5)
    same(policy.probabilities().detach(), [by_hand(4.0, 2.0), by_hand(5.0, 3.0)])


def test_gradient_by_central_differences() -> None:
    policy = NormalPolicy(SPACE, 1, mean=3.0, width=1.5)
    rollout = policy.rollout(torch.tensor([0]), torch.tensor([6]), torch.tensor([0]))
    logp = policy.evaluate(rollout, frozenset({"logp"})).logp[0]
    (gradient,) = torch.autograd.grad(logp, policy.logits)

    def at(mean: float, log_width: float) -> float:
        return math.log(by_hand(1.5 * mean, math.exp(log_width))[6])

    place, h = (2.0, math.log(1.5)), 1e-6
    expected = [
        (at(place[0] + h, place[1]) - at(place[0] - h, place[1])) / (2 * h),
        (at(place[0], place[1] + h) - at(place[0], place[1] - h)) / (2 * h),
    ]
    close(gradient[0, 0], expected, digits=7)


def test_what_it_learns_of_an_action_it_learns_of_its_neighbours() -> None:
    """One step up the likelihood of action 6 from a mean of 3."""
    normal = NormalPolicy(SPACE, 1, mean=3.0, width=1.5)
    table = ExactPolicy(SPACE, 1, NormalPolicy.logits_of(SPACE, 3.0, 1.5))
    change = {}
    for name, policy in (("normal", normal), ("tabular", table)):
        before = policy.log_probabilities().detach()
        (gradient,) = torch.autograd.grad(policy.log_probabilities()[0, 6], policy.logits)
        with torch.no_grad():
            policy.logits.add_(gradient, alpha=1e-3)
        change[name] = (policy.log_probabilities().detach() - before)[0]
    # 5 and 1 are as likely as each other; 5 lies beside what was learned.
    assert float(change["normal"][5] - change["normal"][1]) > 1e-3
    same(change["tabular"][5], change["tabular"][1])


def test_samples_have_its_frequencies() -> None:
    policy = NormalPolicy(SPACE, 1, mean=4.0, width=2.0)
    drawn = policy.sample([Request(example_of(0), 20_000)], Sampling(), seed=0)
    share = np.bincount(drawn["action"].numpy(), minlength=9) / 20_000
    np.testing.assert_allclose(share, by_hand(4.0, 2.0), atol=0.012)
    same(drawn.logp.exp(), np.array(by_hand(4.0, 2.0))[drawn["action"].numpy()])


def test_models_and_state() -> None:
    policy = NormalPolicy(SPACE, 2, mean=4.0, width=2.0)
    policy.add_model("ref")
    policy.add_critic()
    with torch.no_grad():
        policy.logits += 0.3
    again = NormalPolicy(SPACE, 2, mean=0.0, width=2.0)
    again.load_state_dict(policy.state_dict())
    assert torch.equal(again.probabilities(), policy.probabilities())
    assert torch.equal(again.model("ref"), policy.model("ref"))
    assert "hidden" not in policy.columns and {"logp", "value", "logp/ref"} <= policy.columns


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="one action"):
        NormalPolicy(SequenceSpace(3, 2), mean=0.0, width=1.0)
    for width in (0.0, -1.0, math.inf):
        with pytest.raises(UsageError, match="width above 0"):
            NormalPolicy(SPACE, mean=0.0, width=width)
    with pytest.raises(UsageError, match="not saved"):
        NormalPolicy(SPACE, mean=0.0, width=1.0).save(tmp_path)
    with pytest.raises(UsageError, match="not saved"):
        NormalPolicy.load(tmp_path)

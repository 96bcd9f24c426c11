"""Named problems are what they say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from polopt.core.errors import UsageError
from polopt.core.policy import Request, Sampling
from polopt.core.rollout import Rollout
from polopt.policies.exact import HEADS, ExactPolicy, SequencePayload, SequenceSpace, expected_reward, policy_gradient
from polopt.rewards.scoring import Scorer
from polopt.tasks.problems import PROBLEMS, Problem, description_of, options_of, problem

every_problem = pytest.mark.parametrize("name", PROBLEMS)


def scored(made: Problem, requests: list[Request], sampling: Sampling | None = None) -> Rollout:
    return Scorer(made.reward_functions())(made.sampler().sample(requests, sampling or Sampling(), seed=0))[0]


def probabilities(made: Problem, table: torch.Tensor) -> torch.Tensor:
    return ExactPolicy(made.space, made.batch, table).probabilities().detach()


@every_problem
def test_a_problem_is_a_function_of_its_seed(name: str) -> None:
    first, again, other = (problem(name, batch=3, seed=seed) for seed in (5, 5, 6))
    assert first.name == name and first.batch == 3
    assert torch.equal(first.initial, again.initial) and torch.equal(first.reward, again.reward)
    assert not torch.equal(first.initial, other.initial)
    assert first.reward.shape == (3, first.space.n_sequences) and first.reward.dtype == torch.float64
    assert first.initial.shape == (3, first.space.n_nodes, first.space.vocabulary)
    assert len({tuple(row.tolist()) for row in first.initial.flatten(1)}) == 3
    assert description_of(name)


@every_problem
def test_rewards_of_trajectories_are_those_of_the_table(name: str) -> None:
    made = problem(name, batch=3, seed=2)
    rollout = scored(made, made.requests())
    assert torch.bincount(rollout.group).tolist() == list(made.group_sizes)
    payload = rollout.payload
    assert isinstance(payload, SequencePayload)
    for i, ids in enumerate(payload.completion_ids):
        b, s = int(rollout.group[i]), made.space.index(ids)
        for reward, table in made.rewards.items():
            assert float(rollout[f"reward/{reward}"][i]) == pytest.approx(float(table[b, s]), rel=1e-6)
        assert float(rollout.reward[i]) == pytest.approx(float(made.reward[b, s]), rel=1e-6)


@every_problem
@pytest.mark.parametrize("head", HEADS)
def test_policies_start_where_the_problem_says(name: str, head: str) -> None:
    made = problem(name, batch=2, space=SequenceSpace(3, 3, end=True))
    policy = made.policy(head)
    if head == "tabular":
        torch.testing.assert_close(policy.probabilities().detach(), probabilities(made, made.initial))
    reference = ExactPolicy(made.space, 2, policy.model("ref")).probabilities().detach()
    torch.testing.assert_close(reference, probabilities(made, made.reference))
    # Something can be learnt.
    assert float(policy_gradient(policy, made.reward).detach().abs().amax((1, 2)).min()) > 1e-3


def test_a_trajectory_cut_short_has_no_reward() -> None:
    made = problem("random-rewards", batch=2)
    rollout = scored(made, made.requests(), Sampling(max_new_tokens=1))
    assert rollout.reward.isnan().all() and not rollout.mask.any()


@pytest.mark.parametrize("rate", [1e-6, 0.01, 0.5, 0.999])
@pytest.mark.parametrize("space", [None, SequenceSpace(2, 4, end=True)])
def test_pass_rates_are_exact(rate: float, space: SequenceSpace | None) -> None:
    made = problem("binary-verifier", batch=4, pass_rate=rate, space=space)
    assert set(made.reward.unique().tolist()) == {0.0, 1.0}
    passing = expected_reward(made.policy(), made.reward).detach()
    torch.testing.assert_close(passing, torch.full_like(passing, rate), rtol=1e-9, atol=1e-12)


def test_pass_rates_of_each_problem() -> None:
    made = problem("binary-verifier", batch=3, pass_rate=(0.1, 0.5, 0.9), right=1 / 3)
    passing = expected_reward(made.policy(), made.reward).tolist()
    assert passing == pytest.approx([0.1, 0.5, 0.9], rel=1e-12)
    assert made.reward.sum(-1).tolist() == [3.0] * 3


def test_sparse_rewards_and_modes() -> None:
    assert problem("sparse-rewards", batch=4, winners=2).reward.sum(-1).tolist() == [2.0] * 4
    made = problem("several-modes", batch=5, modes=3, space=SequenceSpace(3, 3))
    for b in range(5):
        good = made.space.sequences[made.reward[b] == 1]
        assert sorted(good[:, 0].tolist()) == [0, 1, 2]
    near = problem("several-modes", modes=1, near=0.25, space=SequenceSpace(3, 3))
    (mode,) = near.space.sequences[near.reward[0] == 1]
    wrong = (near.space.sequences != mode).sum(-1)
    assert near.reward[0].tolist() == [{0: 1.0, 1: 0.25}.get(n, 0.0) for n in wrong.tolist()]


def test_several_rewards_are_added_with_their_weights() -> None:
    made = problem("multi-reward", batch=2, rates=(0.5, 0.25, 0.1), scales=(1.0, 2.0, 5.0), space=SequenceSpace(4, 2))
    assert {name: (table.sum(-1).tolist(), float(table.max())) for name, table in made.rewards.items()} == {
        "reward-1": ([8.0, 8.0], 1.0),
        "reward-2": ([8.0, 8.0], 2.0),
        "reward-3": ([10.0, 10.0], 5.0),
    }
    torch.testing.assert_close(made.reward, sum(made.rewards.values()))


def test_preferences() -> None:
    noisy = problem("noisy-preferences", batch=2, flip=0.2, scale=1e6)
    assert noisy.game is not None
    expected = torch.where(noisy.reward[:, :, None] > noisy.reward[:, None], 0.8, 0.2).double()
    expected.diagonal(dim1=1, dim2=2).fill_(0.5)
    torch.testing.assert_close(noisy.game.preference, expected)

    cyclic = problem("intransitive-preferences", batch=2, cycle=1.0)
    assert cyclic.game is not None
    uniform = torch.full((2, 9), 1 / 9, dtype=torch.float64)
    assert float(cyclic.game.duality_gap(uniform).abs().max()) < 1e-12
    start = probabilities(cyclic, cyclic.initial)
    torch.testing.assert_close(cyclic.reward, torch.einsum("bij,bj->bi", cyclic.game.preference, start))
    # The ranked game is won by one sequence alone, the mixture need not be.
    ranked = problem("intransitive-preferences", batch=2, cycle=0.0)
    assert ranked.game is not None
    assert float(ranked.game.nash().amax(-1).min()) == pytest.approx(1.0)


def test_stale_behaviour_is_so_many_ascents_behind() -> None:
    made = problem("stale-behaviour", batch=2, age=3, lr=0.5)
    assert made.behaviour is not None
    policy = ExactPolicy(made.space, 2, made.behaviour)
    for _ in range(3):
        loss = -expected_reward(policy, made.reward).sum()
        (slope,) = torch.autograd.grad(loss, policy.logits)
        with torch.no_grad():
            policy.logits -= 0.5 * slope
    torch.testing.assert_close(policy.probabilities().detach(), probabilities(made, made.initial))
    assert made.sampler().version == -3 and made.policy().version == 0
    torch.testing.assert_close(made.sampler().probabilities().detach(), probabilities(made, made.behaviour))
    rollout = scored(made, made.requests())
    now = made.policy().evaluate(rollout, frozenset({"logp"})).logp.detach()
    assert float((now - rollout.logp).abs().max()) > 0.01
    none = problem("stale-behaviour", age=0)
    assert none.behaviour is not None and torch.allclose(
        probabilities(none, none.initial), probabilities(none, none.behaviour)
    )


def test_group_sizes() -> None:
    assert problem("unequal-groups", batch=5).group_sizes == (2, 3, 5, 8, 2)
    assert problem("unequal-groups", batch=2, sizes=(1, 4)).group_sizes == (1, 4)


@pytest.mark.parametrize("correlation", [-1.0, -0.3, 0.0, 0.7, 1.0])
def test_the_correlation_with_length_is_exact(correlation: float) -> None:
    made = problem("length-correlated-rewards", batch=3, correlation=correlation)
    p = probabilities(made, made.initial)
    length = made.space.lengths.double()
    mean, mean_length = (p * made.reward).sum(-1), (p * length).sum(-1)
    covariance = (p * (made.reward - mean[:, None]) * (length - mean_length[:, None])).sum(-1)
    spread = (p * (length - mean_length[:, None]) ** 2).sum(-1).sqrt()
    assert mean.tolist() == pytest.approx([0.0] * 3, abs=1e-12)
    assert (p * made.reward**2).sum(-1).tolist() == pytest.approx([1.0] * 3)
    assert (covariance / spread).tolist() == pytest.approx([correlation] * 3, abs=1e-12)


def test_multi_step_rewards_count_matches() -> None:
    made = problem("multi-step", batch=2, space=SequenceSpace(2, 3))
    for b in range(2):
        target = made.space.sequences[made.reward[b].argmax()]
        expected = [(row == target).double().mean().item() for row in made.space.sequences]
        assert made.reward[b].tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("binary-verifyer", {}, "unknown problem 'binary-verifyer'; did you mean 'binary-verifier'"),
        ("binary-verifier", {"passrate": 0.5}, "no option 'passrate'; its options are pass_rate, right, spread"),
        ("binary-verifier", {"pass_rate": 1.0}, r"strictly between 0 and 1, got 1\.0"),
        ("binary-verifier", {"pass_rate": (0.1, 0.2)}, "2 entries for 1 problems"),
        ("random-rewards", {"batch": 0}, "batch of at least 1, got 0"),
        ("sparse-rewards", {"winners": 9}, "winners must lie between 1 and 8, got 9"),
        ("several-modes", {"near": 1.0}, "near must be below"),
        ("multi-reward", {"rates": (0.1,)}, "got 1 and 2"),
        ("intransitive-preferences", {"cycle": 2.0}, r"share in \[0, 1\], got 2\.0"),
        ("stale-behaviour", {"age": -1}, "age must lie between 0"),
        ("unequal-groups", {"sizes": (0, 2)}, r"at least 1, got \(0, 2\)"),
        ("length-correlated-rewards", {"space": SequenceSpace(2, 2)}, "end token"),
        ("length-correlated-rewards", {"correlation": 1.5}, r"got 1\.5"),
    ],
)
def test_misuse(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        problem(name, **options)


def test_options_are_listed_with_their_defaults() -> None:
    assert options_of("stale-behaviour") == {"age": 4, "lr": 1.0, "scale": 1.0, "spread": 0.5}

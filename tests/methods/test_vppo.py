"""The card of VPPO: dependency on the prompt, its factor per response and mask per step, entropy penalty."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from polopt.core.loss import Evaluation
from polopt.core.method import Method
from polopt.core.policy import Corruption, Request, Sampling
from polopt.core.rollout import Rollout
from polopt.methods.base.dapo import dapo
from polopt.methods.credit.vppo import DependencyScaled, MostDependent, SampledEntropyPenalty, vppo
from polopt.objectives.clipped_surrogate import ClippedSurrogate
from polopt.policies.exact import ExactPolicy, SequenceSpace
from polopt.policies.exact.policy import example_of
from tests.support import close, f64, now, same, value_and_gradient

SEEN = [0.9, 0.5, 0.8, 0.6, 0.95, 0.7, 0.4, 0.9, 0.8, 0.99]
SPOILT = [0.9, 0.1, 0.7, 0.55, 0.95, 0.65, 0.38, 0.5, 0.8, 0.99]
GAP = [0.1, 0.1, -0.1, 0.2, 0.0, 0.1, -0.1, 0.3, -0.3, 0.0]
OWNER = [0] * 5 + [1] * 5
S = [0, 0.809438, 0.008531, 0.003678, 0, 0.002679, 0.001293, 0.143342, 0, 0]


def rollout(reward: Any = (1.0, -1.0), groups: Any = (0, 0), **step: Any) -> Rollout:
    given = {name.replace("__", "/"): f64(value) if name != "mask" else value for name, value in step.items()}
    columns = {"logp": f64(SEEN).log(), "logp/blind": f64(SPOILT).log()}
    return Rollout.from_arrays(OWNER, list(groups), step=columns | given, trajectories={"reward": f64(reward)})


def random_rollout(seed: int, lengths: tuple[int, ...] = (4, 1, 3, 7, 5)) -> Rollout:
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    step = {name: -2 * torch.rand(n, generator=generator, dtype=torch.float64) for name in ("logp", "logp/blind")}
    owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return Rollout.from_arrays(
        owner, [0, 0, 1, 1, 1], step=step, trajectories={"reward": f64([1.0, 0.0, 0.3, 0.9, 0.2])}
    )


def factors(made: Rollout, floor: float = 0.9) -> Tensor:
    """f_i, from advantages of which none is 0."""
    credited = DependencyScaled(floor=floor)(made)
    plain = DependencyScaled(floor=1.0)(made)
    return credited["advantage"] / plain["advantage"]


def without_penalty(method: Method = vppo) -> Method:
    return method | {"regularizer": None}


def test_worked_example() -> None:
    made = rollout()
    credited = vppo.credit(made)
    close(credited["dependency"], S)
    assert credited.weight.tolist() == [0, 1, 1, 0, 0, 1, 0, 1, 0, 0]
    close(factors(made), [1.1, 0.9])
    # The card's A is (1, -1): the z-score of two responses is 0.707107 times that.
    credited = credited.with_columns(step={"advantage": f64([1.1] * 5 + [-0.9] * 5)})
    moved = f64(SEEN).log() + f64(GAP)
    loss, gradient = value_and_gradient(without_penalty(), now(moved), credited)
    close(loss, -0.000148)
    close(gradient, [0, -0.121569, -0.099532, 0, 0, 0.099465, 0, 0.121487, 0, 0])
    penalised_loss, penalised = value_and_gradient(vppo, now(moved), credited)
    close(penalised_loss, 0.017224)
    same(penalised, gradient - 0.006)


def test_dependency_against_its_definition() -> None:
    made = random_rollout(0)
    u = np.clip((made["logp/blind"] - made.logp).numpy(), -20, 20)
    found = DependencyScaled()(made)["dependency"]
    same(found, np.clip(np.exp(u) - u - 1, 0, 10))
    assert (found >= 0).all()
    far = rollout(logp=[-1e-3] * 10, logp__blind=[-1e-3, -0.5, -5.0, -30.0, -1e4, -1e-3, 0.0, -1e-3, -1e-3, -1e-3])
    found = DependencyScaled()(far)["dependency"]
    assert found[0] == 0 and found[3] == 10 and found[4] == 10  # 29 and 10^4 nats count alike
    assert 0 < found[6] < 1e-6  # no cancellation near equal log-probs


def test_its_mean_over_the_policy_is_the_divergence() -> None:
    """Sum_v pi(v) (e^u_v - u_v - 1) = KL(pi || view), for a view of the exact world."""
    space = SequenceSpace(4, 1)
    logits = torch.randn(3, 1, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    policy = ExactPolicy(space, 3, logits)
    policy.add_view("blind", Corruption())
    every = policy.rollout(torch.arange(3).repeat_interleave(4), torch.arange(4).repeat(3), torch.zeros(12).long())
    with torch.no_grad():
        found = policy.evaluate(every, frozenset({"logp/blind", "kl/blind"}))
    made = every.with_columns(step=dict(found.columns), trajectory={"reward": f64([0.0] * 12)})
    mean = (made.logp.exp() * DependencyScaled()(made)["dependency"]).view(3, 4).sum(1)
    same(mean, found["kl/blind"].view(3, 4)[:, 0])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("floor", [0.9, 0.5])
def test_the_factor_has_mean_one_and_rises_with_the_mean_dependency(seed: int, floor: float) -> None:
    made = random_rollout(seed)
    f = factors(made, floor)
    mean = made.mean_steps(DependencyScaled()(made)["dependency"])
    same(f.mean(), 1.0, atol=1e-7)  # up to the 1e-8 of the definition
    same(f.min(), floor)
    assert f.argsort().tolist() == mean.argsort().tolist()
    x = ((mean - mean.min()) / (mean.max() - mean.min())).numpy()
    same(f, floor + x * (1 - floor) / (x.mean() + 1e-8))
    # Only the order and the spacing of the means count: S -> a S + b.
    scaled = 3 * mean + 2
    y = (scaled - scaled.min()) / (scaled.max() - scaled.min())
    same(f, floor + y * (1 - floor) / (y.mean() + 1e-8))


def test_factors_of_one() -> None:
    made = random_rollout(0)
    z = DependencyScaled(floor=1.0)(made)["advantage"]
    r = made.reward.numpy()
    for group in ([0, 1], [2, 3, 4]):
        same(z[group], (r[group] - r[group].mean()) / (r[group].std(ddof=1) + 1e-6))
    uncorrupted = made.with_columns(step={"logp/blind": made.logp})
    found = DependencyScaled()(uncorrupted)
    same(found["advantage"], z)
    assert not found["dependency"].any()
    single = Rollout.from_arrays([0, 0], [0], step={"logp": f64([-1, -1]), "logp/blind": f64([-2, -1])},
                                 trajectories={"reward": f64([1.0])})  # fmt: skip
    assert DependencyScaled()(single)["advantage"].tolist() == [0.0]


@pytest.mark.parametrize("p", [0.07, 0.1, 0.2, 0.4, 0.5, 0.9, 1.0])
def test_each_response_keeps_its_share_of_steps(p: float) -> None:
    lengths = (1, 2, 5, 10, 30, 100)
    owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    score = torch.rand(len(owner), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    made = Rollout.from_arrays(owner, [0] * 6, step={"dependency": score})
    kept = MostDependent(p=p)(made)
    for i, length in enumerate(lengths):
        mine, values = kept[owner == i], score[owner == i]
        # In whole hundredths: 0.07 * 100 is 7.000000000000001 in floating point.
        count = -(-round(100 * p) * length // 100)
        assert int(mine.sum()) == count
        assert set(mine.nonzero().flatten().tolist()) == set(values.argsort(descending=True)[:count].tolist())


def test_ties_go_to_the_earlier_step() -> None:
    made = Rollout.from_arrays(OWNER, [0, 0], step={"dependency": f64([1, 0, 1, 1, 0, 0, 0, 0, 0, 0])})
    assert MostDependent()(made).tolist() == [1, 0, 1, 0, 0, 1, 1, 0, 0, 0]


def test_masked_steps_take_no_part() -> None:
    mask = torch.tensor([True, False, True, True, True] + [False] * 5)
    made = rollout(
        mask=mask, logp__blind=[math.log(0.8), math.nan, math.log(0.7), math.log(0.55), -3.0, *[math.nan] * 5]
    )
    credited = vppo.credit(made)
    assert credited["dependency"][[1, 5, 6, 7, 8, 9]].tolist() == [0.0] * 6
    assert credited.weight.tolist() == [0, 0, 1, 0, 1] + [0] * 5  # two of four
    same(credited.advantage[:5], [math.sqrt(0.5) * 2 / (2 + math.sqrt(2) * 1e-6)] * 5)  # the other takes no part: f = 1


def test_an_invalid_reward_takes_no_part_in_the_range() -> None:
    made = random_rollout(1)
    reward = made.reward.clone()
    reward[3] = math.nan
    spoilt = made.with_columns(trajectory={"reward": reward})
    rest = made.select(torch.tensor([0, 1, 2, 4]))
    found = DependencyScaled()(spoilt)["advantage"]
    assert found[3] == 0
    same(found[[0, 1, 2, 4]], DependencyScaled()(rest)["advantage"])


@pytest.mark.parametrize(("groups", "reward"), [([0, 0], [0.5, 0.5]), ([0, 1], [1.0, 0.0]), ([0, 0], [math.nan] * 2)])
def test_nothing_to_compare_leaves_the_entropy_penalty(groups: list[int], reward: list[float]) -> None:
    credited = vppo.credit(rollout(reward, groups))
    assert (credited.advantage == 0).all()
    _, gradient = value_and_gradient(vppo, now(f64(SEEN).log() + f64(GAP)), credited)
    same(gradient, [-0.006] * 10)


def test_steps_out_of_the_mask_have_the_gradient_of_the_penalty_alone() -> None:
    made = random_rollout(2)
    credited = vppo.credit(made)
    _, gradient = value_and_gradient(vppo, now(made.logp), credited)
    out = credited.weight == 0
    assert bool(out.any())
    same(gradient[out], torch.full_like(gradient[out], -0.06 / 20))
    assert (gradient[~out] != -0.06 / 20).all()


def test_what_is_left_without_corruption_mask_and_penalty_is_dapo() -> None:
    made = random_rollout(3).with_columns(step={"logp/blind": random_rollout(3).logp})
    bare = without_penalty() | {
        "weight": MostDependent(p=1.0),
        "objective": ClippedSurrogate(low=0.2, high=0.28),
    }
    credited = bare.credit(made)
    plain = (dapo | {"advantage": dapo.advantage.__class__(eps=1e-6)}).credit(made)
    noise = torch.randn(made.n_steps, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moved = made.logp + 0.3 * noise
    actual = value_and_gradient(bare, now(moved), credited)
    expected = value_and_gradient(dapo, now(moved), plain)
    same(actual[0], expected[0])
    same(actual[1], expected[1])


def test_the_dual_clip_bounds_the_loss_of_a_bad_step() -> None:
    credited = rollout().with_columns(step={"advantage": f64([-1.0] * 10)})
    moved = f64(SEEN).log() + f64([2.0] * 5 + [0.0] * 5)  # e^2 > 3
    loss, gradient = value_and_gradient(without_penalty(vppo | {"weight": None}), now(moved), credited)
    same(loss, (5 * 3 + 5 * 1) / 10)
    same(gradient, [0.0] * 5 + [0.1] * 5)


def test_the_penalty_estimates_the_entropy_and_its_gradient_vanishes_in_expectation() -> None:
    """E_{a ~ pi}[-c log pi(a)] = c H, but E[grad] = -c sum_v pi(v) grad log pi(v) = 0 where pi is the sampler."""
    z = torch.randn(5, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    logp = z.log_softmax(0)
    chance = logp.detach().exp()
    made = Rollout.from_arrays(range(5), [0] * 5)
    terms = SampledEntropyPenalty(0.06)(Evaluation({"logp": logp}), made).value
    same((chance * terms).sum().detach(), 0.06 * float(torch.distributions.Categorical(probs=chance).entropy()))
    (expected,) = torch.autograd.grad((chance * terms).sum(), z)
    same(expected, [0.0] * 5)
    # What one sample does is to make itself more likely.
    (one,) = torch.autograd.grad(SampledEntropyPenalty(0.06)(Evaluation({"logp": z.log_softmax(0)}), made).value[2], z)
    same(-one, 0.06 * (torch.nn.functional.one_hot(torch.tensor(2), 5) - chance))


def test_a_view_of_the_exact_world_gives_its_columns() -> None:
    space = SequenceSpace(3, 2)
    generator = torch.Generator().manual_seed(0)
    policy = ExactPolicy(space, 2, torch.randn(2, space.n_nodes, 3, generator=generator, dtype=torch.float64))
    vppo.models["blind"].install(policy, "blind")
    made = policy.sample([Request(example_of(i), 4) for i in range(2)], Sampling(), seed=0)
    with torch.no_grad():
        blind = policy.evaluate(made, frozenset({"logp/blind"}))["logp/blind"]
    payload: Any = made.payload
    chance = policy.table().detach().softmax(-1).mean(0)
    same(blind, chance[payload.nodes, payload.ids].log())


def test_what_it_declares() -> None:
    assert vppo.task == "grid"
    assert vppo.models_in_use.keys() == {"blind"}
    assert vppo.reward is None and vppo.filter == dapo.filter
    assert vppo.vanishes_with is None  # the penalty acts where the advantage is 0

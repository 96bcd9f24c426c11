"""MaxMin-RLHF: its card's worked examples, the egalitarian optimum, expectation-maximisation over users."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from polopt.claims.exact import start
from polopt.core.errors import UsageError
from polopt.core.example import Example
from polopt.core.override import override
from polopt.core.rollout import Rollout
from polopt.methods import get_method
from polopt.methods.base.ppo import ppo
from polopt.methods.preference.maxmin_rlhf import MaxMin, maxmin_rlhf
from polopt.policies.causal_lm.policy import CausalLM
from polopt.policies.exact.egalitarian import egalitarian
from polopt.rewards.mixtures import (
    LinearRewards,
    expectation,
    expectation_maximisation,
    numbered,
    user_log_likelihood,
)
from polopt.rewards.models import RewardModel
from polopt.rewards.shaping import KLPenalty
from polopt.tasks.problems import Problem, problem
from polopt.training.mixtures import Fitting, train_mixture
from tests.policies.causal_lm.models import byte_tokenizer, tiny
from tests.support import MIXED, close, f64, flow, outcome, same
from tests.support import batch as random_batch

REFERENCE = f64([[0.4, 0.2, 0.2, 0.2]])
FIRST, SECOND = [1.0, 0.0, 0.6, 0.2], [0.0, 0.9, 0.5, 0.1]
TABLES = f64([[FIRST], [SECOND]])
BETA = 0.1


def responses(first: Any = FIRST, second: Any = SECOND) -> Rollout:
    return Rollout.from_arrays(
        range(4),
        [0, 0, 1, 1],
        step={"logp": f64([-1.0] * 4)},
        trajectories={"reward/a": f64(first), "reward/b": f64(second), "reward": f64([9.0] * 4)},
    )


# --- the reward -------------------------------------------------------------------------------------------------------


def test_the_worst_group_of_the_worked_batch_is_the_second() -> None:
    made = MaxMin()(responses())
    same(made.reward, SECOND)
    assert made["worst"].tolist() == [1] * 4
    same([sum(FIRST) / 4, sum(SECOND) / 4], [0.45, 0.375])


def test_per_sample_rewards_of_the_worked_batch() -> None:
    made = MaxMin(mode="sample")(responses())
    same(made.reward, [0.0, 0.0, 0.5, 0.1])
    assert made["worst"].tolist() == [1, 0, 1, 1]


def test_the_least_of_samples_is_below_the_least_of_groups() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        tables = torch.randn(2, 4, generator=generator, dtype=torch.float64)
        per_sample = MaxMin(mode="sample")(responses(*tables)).reward
        assert float(per_sample.mean()) <= float(MaxMin()(responses(*tables)).reward.mean())


def test_the_smooth_variant_lies_between() -> None:
    same(MaxMin(eta=0.0)(responses()).reward, [(a + b) / 2 for a, b in zip(FIRST, SECOND, strict=True)])
    same(MaxMin(eta=1e4)(responses()).reward, SECOND)
    # Weights of exp(-2 * 0.45) and exp(-2 * 0.375).
    w = math.exp(-0.9) / (math.exp(-0.9) + math.exp(-0.75))
    same(MaxMin(eta=2.0)(responses()).reward, [w * a + (1 - w) * b for a, b in zip(FIRST, SECOND, strict=True)])


def test_an_invalid_reward_enters_no_mean() -> None:
    # Without its 0 the second reward's mean is 0.5, above the first one's 0.45.
    made = MaxMin()(responses(second=[math.nan, 0.9, 0.5, 0.1]))
    same(made.reward, FIRST)
    made = MaxMin()(responses(first=[math.nan, 0.0, 0.6, 0.2]))
    # Of the first reward 0.8 / 3 is left, which is the least.
    assert made["worst"].tolist() == [0] * 4 and made.reward.isnan().tolist() == [True, False, False, False]
    sample = MaxMin(mode="sample")(responses(first=[math.nan, 0.0, 0.6, 0.2])).reward
    assert sample.isnan().tolist() == [True, False, False, False]


def test_one_reward_or_equal_ones_are_ordinary_rlhf() -> None:
    ordinary = ppo | {"reward": KLPenalty(beta=0.05), "schedule": maxmin_rlhf.schedule}
    rollout = random_batch(maxmin_rlhf, MIXED)
    shared = rollout["reward/first"]
    for names in (["reward/first"], ["reward/first", "reward/second"]):
        trajectory = {n: v for n, v in rollout.columns["trajectory"].items() if not n.startswith("reward/")}
        columns = {**trajectory, **dict.fromkeys(names, shared), "reward": shared}
        same_rewards = replace(rollout, columns={**rollout.columns, "trajectory": columns})
        for mode in ("group", "sample"):
            ours = outcome(override(maxmin_rlhf, {"reward.mode": mode}), flow(maxmin_rlhf, same_rewards))
            theirs = outcome(ordinary, flow(ordinary, same_rewards))
            assert torch.equal(ours.loss, theirs.loss)
            assert all(torch.equal(ours.gradient[name], theirs.gradient[name]) for name in theirs.gradient)


def test_settings_out_of_range_are_refused() -> None:
    for options in ({"eta": -1.0}, {"eta": 1.0, "mode": "sample"}):
        with pytest.raises(UsageError, match="eta"):
            MaxMin(**options)  # type: ignore[arg-type]


# --- the optimum ------------------------------------------------------------------------------------------------------


def utilities(policy: Tensor) -> Tensor:
    return (TABLES * policy).sum(-1).mean(1)


def regularised(policy: Tensor) -> Tensor:
    """F_k = E[r_k] - beta KL, what the card calls utilities, by hand."""
    return utilities(policy) - BETA * float((policy * (policy / REFERENCE).log()).sum())


def objective(policy: Tensor) -> float:
    """min_k F_k."""
    return float(regularised(policy).min())


def test_the_worked_policy() -> None:
    policy, weights = egalitarian(TABLES, REFERENCE, BETA)
    close(weights, [0.4235259, 0.5764741], 6)
    close(policy[0], [0.25204824, 0.32684342, 0.4135342, 0.00757414], 6)
    close(regularised(policy), [0.46971031, 0.46971031], 6)


@pytest.mark.parametrize(
    ("mixture", "expected"), [((10 / 11, 1 / 11), [0.90876009, -0.0723767]), ((0.5, 0.5), [0.67382545, 0.29533205])]
)
def test_pooled_rewards_serve_the_majority(mixture: tuple[float, float], expected: list[float]) -> None:
    tilted = (REFERENCE.log() + sum(w * t for w, t in zip(mixture, TABLES, strict=True)) / BETA).softmax(-1)
    best, _ = egalitarian(TABLES, REFERENCE, BETA)
    assert objective(tilted) < objective(best)
    close(regularised(tilted), expected, 6)


def test_no_policy_has_a_larger_minimum() -> None:
    policy, _ = egalitarian(TABLES, REFERENCE, BETA)
    best = objective(policy)
    generator = np.random.default_rng(0)
    for _ in range(500):
        near = policy * torch.as_tensor(np.exp(0.05 * generator.normal(size=(1, 4))))
        assert objective(near / near.sum()) <= best + 1e-9
        anywhere = torch.as_tensor(generator.dirichlet(np.ones(4)))[None]
        assert objective(anywhere) <= best + 1e-9
    for w in np.linspace(0, 1, 101):
        mixed = (REFERENCE.log() + (w * TABLES[0] + (1 - w) * TABLES[1]) / BETA).softmax(-1)
        assert objective(mixed) <= best + 1e-9


def test_a_reward_that_is_never_worst_has_no_weight() -> None:
    tables = torch.cat([TABLES, TABLES[:1] + 5.0])
    policy, weights = egalitarian(tables, REFERENCE, BETA)
    close(weights, [0.4235259, 0.5764741, 0.0], 5)
    close(policy, egalitarian(TABLES, REFERENCE, BETA)[0], 5)


def test_training_finds_the_egalitarian_policy() -> None:
    """Exact world, the worked example as four one-token answers."""
    base = problem("random-rewards", space=_space(), batch=1)
    initial = REFERENCE.log()[:, None]
    made: Problem = replace(base, rewards={"a": TABLES[0], "b": TABLES[1]}, initial=initial, reference=initial)
    method = override(maxmin_rlhf, {"reward.beta": BETA, "reward.eta": 5.0})
    run = start(made, method, seed=0, group=256)
    kept = []
    for step in range(60):
        run.step()
        if step >= 30:
            kept.append(run.policy.probabilities().detach())
    found = utilities(torch.stack(kept).mean(0))
    assert float(found.min()) > 0.42
    assert float(found.max() - found.min()) < 0.1


def _space() -> Any:
    from polopt.policies.exact import SequenceSpace

    return SequenceSpace(4, 1)


# --- expectation-maximisation -----------------------------------------------------------------------------------------

USER = torch.tensor([0, 0, 1, 2, 2, 2])
MARGINS = f64([[2, -1], [1, 0.5], [-0.5, 0.7], [0.1, -0.2], [0.1, -0.2], [-3, -0.2]])


def test_the_worked_e_step() -> None:
    likelihood = user_log_likelihood(MARGINS, USER, 3)
    close(likelihood, [[-0.4401897, -1.78733867], [-0.97407698, -0.40318605], [-4.33738067, -2.39441661]], 7)
    responsibility, total = expectation(likelihood, torch.full((2,), 0.5), hard=True)
    assert responsibility.argmax(1).tolist() == [0, 1, 1]
    close(total, -0.4401897 - 0.40318605 - 2.39441661, 6)


def test_the_worked_likelihood_and_its_gradient() -> None:
    margins = f64([2.0, 1.0, -0.5]).requires_grad_()
    loss = -torch.nn.functional.logsigmoid(margins).mean()
    loss.backward()
    close(loss.detach(), 0.47142223, 8)
    assert margins.grad is not None
    close(margins.grad, [-0.03973431, -0.08964714, -0.20748644], 8)
    # The same from the pieces that EM is made of.
    found = user_log_likelihood(f64([[2.0], [1.0], [-0.5]]), torch.zeros(3, dtype=torch.int64), 1)
    close(-found / 3, [[0.47142223]], 8)


def test_the_soft_e_step_is_bayes_rule() -> None:
    likelihood, shares = user_log_likelihood(MARGINS, USER, 3), f64([0.3, 0.7])
    responsibility, total = expectation(likelihood, shares, hard=False)
    joint = np.exp(likelihood.numpy()) * shares.numpy()
    same(responsibility, joint / joint.sum(1, keepdims=True))
    same(total, np.log(joint.sum(1)).sum())


def test_constants_change_nothing_and_scales_do() -> None:
    rewards = f64([[0.3, 1.0, -0.2], [0.5, 0.1, 0.4]])
    winner, loser, user = torch.tensor([0, 1, 2]), torch.tensor([1, 2, 0]), torch.tensor([0, 0, 1])

    def found(tables: Tensor) -> Tensor:
        return user_log_likelihood((tables[:, winner] - tables[:, loser]).T, user, 2)

    same(found(rewards + f64([[5.0], [-3.0]])), found(rewards))
    assert float((found(rewards * f64([[3.0], [1.0]])) - found(rewards)).abs().max()) > 0.1


class World:
    """Users of two opposite tastes who compare six answers."""

    def __init__(self, sizes: tuple[int, int], seed: int, each: int = 30) -> None:
        generator = torch.Generator().manual_seed(seed)
        taste = torch.randn(6, generator=generator, dtype=torch.float64)
        self.taste = torch.repeat_interleave(torch.tensor([0, 1]), torch.tensor(sizes))
        # Shuffled, so that a round-robin start is no luck.
        self.taste = self.taste[torch.randperm(len(self.taste), generator=generator)]
        self.user = torch.arange(sum(sizes)).repeat_interleave(each)
        a = torch.randint(6, (len(self.user),), generator=generator)
        b = (a + torch.randint(1, 6, a.shape, generator=generator)) % 6
        sign = 1.0 - 2.0 * self.taste[self.user]
        chance = torch.sigmoid(3 * sign * (taste[a] - taste[b]))
        wins = torch.rand(a.shape, generator=generator, dtype=torch.float64) < chance
        self.winner, self.loser = torch.where(wins, a, b), torch.where(wins, b, a)
        one_hot = torch.nn.functional.one_hot
        self.difference = (one_hot(self.winner, 6) - one_hot(self.loser, 6)).double()


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("sizes", [(10, 10), (18, 3)])
def test_em_finds_the_tastes_and_never_falls(hard: bool, sizes: tuple[int, int]) -> None:
    for seed in range(3):
        world = World(sizes, seed)
        models = LinearRewards(world.difference, 2, ridge=1e-9)
        mixture = expectation_maximisation(models.margins, models.fit, world.user, 2, hard=hard, restart=False)
        trace = mixture.log_likelihood
        assert len(trace) == 10
        assert all(later >= earlier - 1e-6 for earlier, later in itertools.pairwise(trace))
        agree = float((mixture.assignment == world.taste).float().mean())
        assert max(agree, 1 - agree) == 1.0
        same(mixture.responsibility.sum(1), torch.ones(sum(sizes)), rtol=1e-6)
        same(mixture.shares, mixture.responsibility.mean(0))


def test_the_exact_m_step_is_a_weighted_logistic_regression() -> None:
    world = World((5, 5), 0)
    weight = torch.rand(len(world.user), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    models = LinearRewards(world.difference, 1, ridge=0.1)
    models.fit(0, weight)
    optimize = pytest.importorskip("scipy.optimize")
    d, w = world.difference.numpy(), weight.numpy()
    found = optimize.minimize(
        lambda t: (w * np.log1p(np.exp(-d @ t))).sum() + 0.05 * (t @ t), np.zeros(6), options={"gtol": 1e-10}
    )
    same(models.theta[0], found.x, atol=1e-6)
    with pytest.raises(UsageError, match="ridge"):
        LinearRewards(world.difference, 1, ridge=0.0)


def test_a_collapsed_mixture_is_restarted() -> None:
    world = World((6, 6), 0)
    calls: list[int] = []

    class Collapsing(LinearRewards):
        """The second model explains nobody in the first round."""

        def margins(self) -> Tensor:
            calls.append(1)
            found = super().margins()
            return torch.stack([found[:, 0], torch.full_like(found[:, 0], -50.0)], 1) if len(calls) == 1 else found

    models = Collapsing(world.difference, 2)
    mixture = expectation_maximisation(models.margins, models.fit, world.user, 2)
    agree = float((mixture.assignment == world.taste).float().mean())
    assert max(agree, 1 - agree) == 1.0
    calls.clear()
    models = Collapsing(world.difference, 2)
    lost = expectation_maximisation(models.margins, models.fit, world.user, 2, rounds=1, restart=False)
    assert lost.assignment.unique().tolist() == [0]


def test_one_model_is_the_pooled_one() -> None:
    world = World((6, 6), 0)
    models, alone = LinearRewards(world.difference, 1), LinearRewards(world.difference, 1)
    mixture = expectation_maximisation(models.margins, models.fit, world.user, 1, rounds=2)
    alone.fit(0, torch.ones(len(world.user)))
    same(models.theta, alone.theta, rtol=1e-6)
    assert mixture.assignment.tolist() == [0] * 12


def test_what_cannot_be_a_mixture_is_refused() -> None:
    models = LinearRewards(f64([[1.0]]), 1)
    for arguments, said in (((torch.tensor([0]), 2), "as many users"), ((torch.tensor([0]), 0), "at least one model")):
        with pytest.raises(UsageError, match=said):
            expectation_maximisation(models.margins, models.fit, *arguments)


def test_users_are_numbered_in_order_of_appearance() -> None:
    number, names = numbered(["b", "a", "b", "c"])
    assert number.tolist() == [0, 1, 0, 2] and names == ["b", "a", "c"]
    assert get_method("maxmin-rlhf").family == "preference"


def test_reward_models_of_language_find_the_tastes() -> None:
    """Half of the users like an answer of a, the others one of b; which is which shows in their comparisons alone."""
    generator = random.Random(0)
    examples = []
    for place in range(80):
        who = generator.randrange(8)
        sides = ("aa", "bb") if who < 4 else ("bb", "aa")
        prompt = f"{generator.randrange(100)}="
        columns = {"user": f"user {who}"}
        examples.append(Example(str(place), prompt, chosen=sides[0], rejected=sides[1], columns=columns))
    policies = [CausalLM(tiny(seed=seed), byte_tokenizer()) for seed in range(2)]
    method = get_method("reward-model")
    found = train_mixture(method, policies, examples, rounds=3, fitting=Fitting(steps=10, pairs=8, lr=3e-3))
    _, names = numbered([example.columns["user"] for example in examples])
    taste = torch.tensor([int(str(name)[-1]) < 4 for name in names])
    agree = float((found.assignment.bool() == taste).double().mean())
    assert max(agree, 1 - agree) == 1.0
    assert found.log_likelihood[-1] > found.log_likelihood[0]
    # Each model now prefers what its users prefer.
    for model, policy in enumerate(policies):
        likes = bool(taste[found.assignment == model][0])
        a, b = RewardModel(policy).scores(["7=", "7="], ["aa", "bb"])[0].tolist()
        assert (a > b) == likes
    with pytest.raises(UsageError, match="no column 'rater'"):
        train_mixture(method, policies, examples, user="rater")

"""The card of MA-RLHF: boundaries, pooled values and rewards, GAE over macro actions, worked example."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from polopt.advantages.macro import LENGTHS, MacroActions, constituents
from polopt.core.errors import UsageError
from polopt.core.override import override
from polopt.core.rollout import Rollout
from polopt.methods.base.ppo import GAE, ClippedValueLoss, ppo
from polopt.methods.credit.ma_rlhf import MacroGAE, ma_rlhf
from polopt.objectives.clipped_surrogate import ClippedSurrogate
from tests.support import close, f64, now, same, value_and_gradient

VALUE = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
REWARD = [-0.01, 0, 0.01, -0.02, 0, -0.03, 0, -0.01]
MOVED = [0.3, -0.3, 0.1, -0.1, 0, 0.2, -0.25, 0.05]
PPL = [-0.5, -1, -0.2, -0.8, -0.1, -1.5, -0.3, -0.4]

actor = ma_rlhf | {"reward": None, "advantage": MacroGAE(n=3), "objective": ClippedSurrogate()}
critic = actor | {"objective": ClippedValueLoss(coefficient=1.0)}


def one(score: float = 1.0, **step: Any) -> Rollout:
    """The card's response of eight tokens."""
    columns = {"value": VALUE, "step_reward": REWARD, "logp": [-1.0] * 8, **step}
    return Rollout.from_arrays(
        [0] * 8,
        [0],
        step={name.replace("__", "/"): f64(v) for name, v in columns.items()},
        trajectories={"reward": f64([score])},
    )


def cut(part: MacroGAE, rollout: Rollout) -> list[int]:
    """Places at which the macro actions of a single response start."""
    return part.starts(rollout).nonzero().flatten().tolist()


def packed(seed: int, *, masked: bool = False) -> Rollout:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([9, 1, 6, 13, 2])
    count = int(lengths.sum())
    step = {
        name: torch.randn(count, generator=generator, dtype=torch.float64) for name in ("value", "step_reward", "logp")
    }
    step |= {"logp/ref": torch.randn(count, generator=generator, dtype=torch.float64)}
    step |= {"action": torch.randint(7, (count,), generator=generator)}
    step |= {"macro": torch.randint(2, (count,), generator=generator)}
    if masked:
        step["mask"] = torch.rand(count, generator=generator) > 0.3
        step["mask"][9] = False
    score = torch.randn(5, generator=generator, dtype=torch.float64)
    owner = torch.arange(5).repeat_interleave(lengths)
    return Rollout.from_arrays(owner, [0, 0, 1, 1, 0], step=step, trajectories={"reward": score})


def by_loop(part: MacroGAE, rollout: Rollout, bounds: list[list[int]]) -> tuple[list[float], list[float]]:
    """Advantage and return of every step from the boundaries of each response, as the equations are written."""
    advantage, returns = np.zeros(rollout.n_steps), np.zeros(rollout.n_steps)
    value, reward = rollout["value"].numpy(), rollout["step_reward"].numpy()
    for i, starts in enumerate(bounds):
        mine = [t for t in range(rollout.n_steps) if rollout.trajectory[t] == i and rollout.mask[t]]
        later_value = later = 0.0
        ends = [*starts[1:], len(mine)] if mine else []
        for first, end in reversed(list(zip(starts, ends, strict=True))):
            steps = mine[first:end]
            n = len(steps)
            sigma = {
                "equal": [1 / n] * n,
                "unit": [0.0] * (n - 1) + [1.0],
                "position": [1 / (j + 1) / sum(1 / (m + 1) for m in range(n)) for j in range(n)],
            }[part.pool]
            r = [reward[t] + (float(rollout.reward[i]) if t == mine[-1] else 0.0) for t in steps]
            weight = sigma if part.reward_pool == "pooled" else [part.gamma**j for j in range(n)]
            v = sum(s * value[t] for s, t in zip(sigma, steps, strict=True))
            total = sum(w * x for w, x in zip(weight, r, strict=True))
            later = total + part.gamma * later_value - v + part.gamma * part.lam * later
            later_value = v
            advantage[steps], returns[steps] = later, later + v
    return advantage.tolist(), returns.tolist()


def every_n(n: int, count: int) -> list[int]:
    """Boundaries of fixed n-grams with the last token by itself."""
    return sorted({*range(0, count, n), count - 1}) if count else []


# --- worked example ---------------------------------------------------------------------------------------------------


def test_worked_example_of_the_credit() -> None:
    assert cut(MacroGAE(n=3), one()) == [0, 3, 6, 7]
    made = MacroGAE(n=3)(one())
    credit = [0.727318] * 3 + [0.449808] * 3 + [0.2805, 0.19]
    close(made["advantage"], credit)
    close(made["return"], [0.927318] * 3 + [0.949808] * 3 + [0.9805, 0.99])
    summed = MacroGAE(n=3, reward_pool="sum")(one())
    close(summed["advantage"], [0.695651] * 3 + [0.416475] * 3 + [0.2805, 0.19])


def test_worked_example_of_the_actor() -> None:
    loss, gradient = value_and_gradient(actor, now(f64(MOVED) - 1.0), actor.credit(one()))
    close(loss, -0.503772)
    close(gradient, [0, -0.067351, -0.100476, -0.050875, -0.056226, 0, -0.027307, -0.024968])


def test_worked_example_of_the_critic() -> None:
    evaluation = now([-1.0] * 8, value=f64(VALUE) + 0.3)
    loss, gradient = value_and_gradient(critic, evaluation, critic.credit(one()), "value")
    close(loss, 0.067499)
    close(gradient, [0] * 7 + [0.013750])


def test_worked_example_of_the_perplexity() -> None:
    rollout = one(logp__ref=PPL)
    assert cut(MacroGAE(boundary="perplexity"), rollout) == [0, 2, 4, 6, 7]
    assert cut(MacroGAE(boundary="perplexity", isolate=False), rollout) == [0, 2, 4, 6]
    assert cut(MacroGAE(boundary="perplexity", model=None), one(logp=PPL)) == [0, 2, 4, 6, 7]


# --- identities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("pool", ["equal", "unit", "position"])
@pytest.mark.parametrize("whiten", [False, True])
def test_macro_actions_of_one_token_are_ppo(pool: str, whiten: bool, masked: bool) -> None:
    rollout = packed(0, masked=masked)
    for options in ({"n": 1}, {"boundary": "parsing"}):
        given = rollout.with_columns(step={"macro": torch.arange(rollout.n_steps)})
        made = override(ma_rlhf, {"advantage.pool": pool, "advantage.whiten": whiten}).advantage
        made = type(made)(**{**vars(made), **options})(given)
        expected = GAE(whiten=whiten)(rollout)
        same(made["advantage"], expected["advantage"])
        same(made["return"], expected["return"])


def test_the_losses_of_one_token_macro_actions_are_those_of_ppo() -> None:
    rollout = packed(1)
    token = ppo | {"advantage": GAE(whiten=False), "reward": None}
    macro = ma_rlhf | {"advantage": MacroGAE(n=1), "reward": None}
    moved = 0.3 * torch.randn(rollout.n_steps, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for name in ("logp", "value"):
        evaluation = now(rollout["logp"] + moved, value=rollout["value"] + moved.flip(0))
        expected = value_and_gradient(token, evaluation, token.credit(rollout), name)
        found = value_and_gradient(macro, evaluation, macro.credit(rollout), name)
        same(found[0], expected[0])
        same(found[1], expected[1])


@pytest.mark.parametrize("pool", ["equal", "unit", "position"])
def test_one_macro_action_is_a_bandit(pool: Any) -> None:
    part = MacroGAE(n=None, isolate=False, pool=pool, reward_pool="sum")
    sigma = {"equal": [1 / 8] * 8, "unit": [0] * 7 + [1], "position": 1 / np.arange(1, 9) / sum(1 / np.arange(1, 9))}
    expected = sum(REWARD) + 1.0 - float(np.dot(sigma[pool], VALUE))
    same(part(one())["advantage"], [expected] * 8)
    assert cut(MacroGAE(n=None), one()) == [0, 7]


@pytest.mark.parametrize("boundary", ["fixed", "randomised", "perplexity", "parsing"])
def test_reward_to_go_with_a_constant_value(boundary: Any) -> None:
    rollout = packed(2, masked=True)
    rollout = rollout.with_columns(step={"value": torch.full_like(rollout["value"], 0.7)})
    part = MacroGAE(boundary, 3, lam=1.0, reward_pool="sum")
    made, starts = part(rollout)["advantage"], part.starts(rollout)
    expected = torch.zeros_like(made)
    for t in rollout.mask.nonzero().flatten().tolist():
        i = rollout.trajectory[t]
        first = max(s for s in starts.nonzero().flatten().tolist() if s <= t and rollout.trajectory[s] == i)
        later = (rollout.trajectory == i) & rollout.mask & (torch.arange(rollout.n_steps) >= first)
        expected[t] = rollout["step_reward"][later].sum() + rollout.reward[i] - 0.7
    same(made, expected)


@pytest.mark.parametrize("pool", ["equal", "unit", "position"])
def test_pooling_a_constant_gives_it_and_advantages_are_shared(pool: Any) -> None:
    flat = one(score=0.0, value=[0.4] * 8, step_reward=[0.0] * 8)
    made = MacroGAE(n=3, pool=pool, lam=0.0)(flat)
    same(made["advantage"], [0.0] * 7 + [-0.4])  # delta_k = V_{k+1} - V_k, and -V at the end
    varied = MacroGAE(n=3, pool=pool)(one())
    for name in ("advantage", "return"):
        assert [len(set(varied[name][a:b].tolist())) for a, b in ((0, 3), (3, 6))] == [1, 1]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("pool", ["equal", "unit", "position"])
@pytest.mark.parametrize("rewards", ["pooled", "sum"])
@pytest.mark.parametrize("n", [2, 3, 5])
def test_against_the_equations(seed: int, pool: Any, rewards: Any, n: int) -> None:
    rollout = packed(seed, masked=True)
    part = MacroGAE(n=n, pool=pool, reward_pool=rewards, gamma=0.9, lam=0.8)
    made = part(rollout)
    bounds = [every_n(n, int(count)) for count in rollout.active_lengths]
    advantage, returns = by_loop(part, rollout, bounds)
    same(made["advantage"], advantage)
    same(made["return"][rollout.mask], f64(returns)[rollout.mask])


def test_at_the_sampling_policy_the_gradient_is_the_credit() -> None:
    rollout = actor.credit(one())
    _, gradient = value_and_gradient(actor, now([-1.0] * 8), rollout)
    same(gradient, -rollout.advantage / 8)


def test_the_mean_divides_the_penalty() -> None:
    penalised = one(score=0.0, value=[0.0] * 8, step_reward=[-1.0] * 8)
    pooled = MacroGAE(n=None, isolate=False)(penalised)["advantage"]
    summed = MacroGAE(n=None, isolate=False, reward_pool="sum")(penalised)["advantage"]
    same(pooled, [-1.0] * 8)
    same(summed, [-8.0] * 8)


# --- boundaries -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", range(1, 10))
@pytest.mark.parametrize("count", range(1, 12))
def test_fixed_boundaries_have_no_empty_macro_action(n: int, count: int) -> None:
    rollout = Rollout.from_arrays([0] * count, [0], step={"logp": [0.0] * count})
    found = cut(MacroGAE(n=n), rollout)
    assert found == every_n(n, count)
    assert cut(MacroGAE(n=n, isolate=False), rollout) == list(range(0, count, n))


def random_lengths(part: MacroGAE, rollout: Rollout) -> list[int]:
    bounds = [*cut(part, rollout), rollout.n_steps]
    return np.diff(bounds).tolist()


def test_randomised_lengths_are_each_used_once_and_the_rest_is_one() -> None:
    orders = set()
    for seed in range(30):
        action = torch.arange(30) % 7
        rollout = Rollout.from_arrays([0] * 30, [0], step={"action": action})
        lengths = random_lengths(MacroGAE("randomised", seed=seed, isolate=False), rollout)
        assert sorted(lengths[:5]) == sorted(LENGTHS) and lengths[5:] == [9]
        orders.add(tuple(lengths))
    assert len(orders) > 15
    rollout = Rollout.from_arrays([0] * 50, [0], step={"action": torch.zeros(50, dtype=torch.int64)})
    twice = random_lengths(MacroGAE("randomised", repeats=2, isolate=False), rollout)
    assert sorted(twice[:10]) == sorted(LENGTHS * 2) and twice[10:] == [8]


def test_every_order_is_as_likely() -> None:
    first = [0] * 11
    rollout = Rollout.from_arrays(
        torch.arange(600).repeat_interleave(12), [0] * 600, step={"action": torch.arange(7200) % 97}
    )
    starts = MacroGAE("randomised", isolate=False).starts(rollout).view(600, 12)
    for row in starts:
        first[int(row[1:].nonzero()[0]) + 1] += 1
    assert {n for n in range(11) if first[n]} == set(LENGTHS)
    assert min(first[n] for n in LENGTHS) > 70


def test_randomised_boundaries_depend_on_the_answer_alone() -> None:
    rollout = packed(0)
    part = MacroGAE("randomised", seed=3)
    alone = [part.starts(rollout.select(torch.tensor([i]))) for i in range(5)]
    assert torch.equal(torch.cat(alone), part.starts(rollout))
    order = torch.tensor([3, 0, 4, 2, 1])
    assert torch.equal(part.starts(rollout.select(order)), torch.cat([alone[i] for i in order.tolist()]))
    long = Rollout.from_arrays([0] * 13, [0], step={"action": rollout["action"][16:29] + 1})
    others = [torch.equal(MacroGAE("randomised", seed=s).starts(long), alone[3]) for s in range(8)]
    assert not all(others), "another answer is cut in another way"


def test_masked_steps_are_in_no_macro_action() -> None:
    mask = torch.tensor([True, False, True, False, False, True, True, True])
    rollout = one(mask=mask, logp__ref=PPL).with_columns(step={"mask": mask, "action": torch.arange(8)})
    assert cut(MacroGAE(n=2), rollout) == [0, 5, 7]
    assert cut(MacroGAE("perplexity"), rollout) == [0, 2, 6, 7]  # -0.5, -0.2, -1.5, -0.3, -0.4: falls at 1 and 3
    within = rollout.with_columns(step={"macro": torch.tensor([4, 9, 4, 9, 9, 5, 5, 5])})
    assert cut(MacroGAE("parsing", isolate=False), within) == [0, 5]
    made = MacroGAE(n=2)(rollout)
    assert (made["advantage"][~mask] == 0).all() and torch.isfinite(made["return"]).all()


def test_a_column_of_constituents_bounds_them() -> None:
    rollout = one().with_columns(step={"macro": torch.tensor([0, 0, 0, 1, 1, 0, 0, 2])})
    assert cut(MacroGAE("parsing", isolate=False), rollout) == [0, 3, 5, 7]


# A parse of ten tokens: "the old man (walked) (to (the big red house)) ."
PARSE = "(S (NP (D the) (A old) (N man)) (VP (V walked) (PP (P to) (NP (D the) (A big) (A red) (N house)))) (. .))"


@pytest.mark.parametrize(
    ("tree", "cutoff", "bounds"),
    [
        # The noun phrase is short enough; "walked" joins it, "to" too; then the second noun phrase; the full stop
        # joins that.
        (PARSE, 5, (0, 5, 10)),
        # With 6 the prepositional phrase of 5 tokens is a macro action.
        (PARSE, 6, (0, 4, 10)),
        # With 3 nothing has fewer than 3 tokens but several leaves: all single leaves join the leading one.
        (PARSE, 3, (0, 10)),
        (PARSE, 100, (0, 10)),
        ("(S (D a) (NP (A b) (N c)) (V d))", 3, (0, 1, 4)),
        ("(S (D a) (C z) (NP (A b) (N c)) (V d))", 3, (0, 2, 5)),
        ("( (S (NP (A b) (N c)) (VP (A d) (N e))))", 3, (0, 2, 4)),
        ("(S (N a)) (S (NP (A b) (N c)) (V d) (V e))", 4, (0, 1, 5)),
        ("(X a b c)", 2, (0, 3)),
        ("a", 5, (0, 1)),
        ("", 5, (0,)),
    ],
)
def test_boundaries_of_a_parse(tree: str, cutoff: int, bounds: tuple[int, ...]) -> None:
    assert constituents(tree, cutoff) == bounds


def test_words_of_several_tokens() -> None:
    tree = "(S (NP (A b) (N c)) (VP (A d) (N e)))"
    assert constituents(tree, 5) == (0, 4)
    assert constituents(tree, 4, [1, 2, 1, 1]) == (0, 3, 5)
    assert constituents(tree, 3, [1, 2, 1, 1]) == (0, 3, 5)  # the first phrase is divided into its leaves
    with pytest.raises(UsageError, match="3 entries for the 4 leaves"):
        constituents(tree, 5, [1, 1, 1])


@pytest.mark.parametrize("tree", ["(S a", "S a)", "(S (N a)))", "((N a)"])
def test_brackets_that_do_not_match(tree: str) -> None:
    with pytest.raises(UsageError, match="do not match"):
        constituents(tree, 5)


# --- edges ------------------------------------------------------------------------------------------------------------


def test_an_invalid_score_teaches_nothing() -> None:
    rollout = packed(4)
    score = rollout.reward.clone()
    score[2] = math.nan
    spoilt = rollout.with_columns(trajectory={"reward": score})
    for whiten in (False, True):
        made = MacroGAE(n=3, whiten=whiten)(spoilt)
        ours = rollout.trajectory == 2
        assert (made["advantage"][ours] == 0).all()
        same(made["return"][ours], rollout["value"][ours])
        kept = torch.tensor([0, 1, 3, 4])
        same(made["advantage"][~ours], MacroGAE(n=3, whiten=whiten)(rollout.select(kept))["advantage"])


def test_a_batch_in_which_nothing_trains() -> None:
    rollout = one().with_columns(step={"mask": torch.zeros(8, dtype=torch.bool)})
    made = MacroGAE()(rollout)
    assert (made["advantage"] == 0).all() and (made["return"] == 0).all()


def test_the_score_is_clipped_before_the_penalty() -> None:
    rollout = one(score=9.0, logp__ref=[-2.0] * 8)
    shaped = ma_rlhf.shape_reward(Rollout(rollout.lengths, rollout.group, rollout.columns))
    same(shaped.reward, [2.5])
    same(shaped["step_reward"], f64(REWARD) - 0.05)


@pytest.mark.parametrize("options", [{"n": 0}, {"repeats": 0}])
def test_lengths_below_one_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="n >= 1 and repeats >= 1"):
        MacroActions(**options)  # type: ignore[arg-type]


def test_what_it_declares() -> None:
    assert ma_rlhf.advantage == MacroGAE(n=5, gamma=1.0, lam=0.95)
    assert ma_rlhf.schedule.epochs == 1
    assert MacroGAE().needs == {"reward", "value"} and MacroGAE().gives == {"return"}
    assert MacroGAE("perplexity").needs == {"reward", "value", "logp/ref"}
    assert MacroGAE("perplexity", model=None).needs == {"reward", "value", "logp"}
    assert MacroGAE("randomised").needs == {"reward", "value", "action"}
    assert MacroGAE("parsing").needs == {"reward", "value", "macro"}
    bandit = override(ma_rlhf, {"advantage.n": "none", "advantage.boundary": "fixed"})
    assert bandit.advantage.n is None

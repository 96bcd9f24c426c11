"""The card of GEPO: worked example, the DPO cases, what the variance does, one-sided groups, RL beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from polopt.core.errors import UsageError
from polopt.core.example import Example
from polopt.core.policy import Request
from polopt.core.rollout import Rollout, Source
from polopt.methods.preference.dpo import dpo
from polopt.methods.preference.gepo import GEPO, BatchWhitened, gepo
from polopt.objectives.clipped_surrogate import ClippedSurrogate
from polopt.policies.exact import ExactPolicy, SequenceSpace
from polopt.rollouts.beside import BesideAnswers
from polopt.rollouts.groups import Groups
from tests.support import close, f64, now, same, value_and_gradient

LENGTHS = [3, 2, 2, 4]
POLICY = [-0.5, -1.0, -0.2, -0.8, -1.4, -0.3, -0.6, -1.1, -0.4, -0.9, -0.7]
REFERENCE = [-0.7, -0.9, -0.4, -0.6, -1.2, -0.5, -0.5, -1.0, -0.5, -1.0, -0.6]
RATIOS = [0.3, -0.4, 0.1, 0.0]
STARTS = [0, 3, 5, 7]
IDS = [i for i, length in enumerate(LENGTHS) for _ in range(length)]


def card(labels: Sequence[float] = (1, 0, 1, 0), groups: Sequence[int] = (0, 0, 0, 0), **step: Any) -> Rollout:
    return Rollout.from_arrays(
        IDS, list(groups), step={"logp/ref": f64(REFERENCE), **step}, trajectories={"label": f64(labels)}
    )


def ours(
    rollout: Rollout | None = None, logp: Sequence[float] | Tensor = POLICY, **fields: Any
) -> tuple[float, Tensor]:
    method = dpo | {"objective": GEPO(**fields)}
    return value_and_gradient(method, now(logp), card() if rollout is None else rollout)


def by_hand(winners: Sequence[float], losers: Sequence[float], beta: float, variance: float) -> float:
    """The loss of one prompt from its log-ratios; a term without its answers is left out."""
    contrast = 0.0
    if len(winners) and len(losers):
        contrast = math.log1p(math.exp(-beta * (np.mean(winners) - np.mean(losers))))
    return contrast + (variance * float(np.var(winners)) if len(winners) else 0.0)


def test_worked_example() -> None:
    loss, gradient = ours()
    close(loss, 0.6833471672, digits=10)
    close(gradient[STARTS], [0.07549993, 0.02450007, -0.12450007, 0.02450007], digits=8)
    for i, (start, length) in enumerate(zip(STARTS, LENGTHS, strict=True)):
        assert (gradient[start : start + length] == gradient[start]).all(), i
    _, metrics = (dpo | {"objective": GEPO()}).loss(now(POLICY), card())
    close(metrics["rewards/margins"], 0.04, digits=9)
    close(metrics["winners/variance"], 0.01, digits=9)
    assert metrics["rewards/accuracies"] == 1 and metrics["groups/one_sided"] == 0


@pytest.mark.parametrize("variance", [0.0, 1.0, 5.0])
def test_one_winner_and_one_loser_are_dpo(variance: float) -> None:
    rollout = card(groups=(0, 0, 1, 1))
    loss, gradient = ours(rollout, variance=variance)
    expected, slope = value_and_gradient(dpo, now(POLICY), rollout)
    same(loss, expected)
    same(gradient, slope)


def test_a_winner_many_times_is_the_dpo_of_that_winner() -> None:
    """Three copies of the first answer against the second: each copy gets a third of the gradient."""
    ids, logp, ref = [], [], []
    for copy, source in enumerate((0, 0, 0, 1)):
        steps = slice(STARTS[source], STARTS[source] + LENGTHS[source])
        ids += [copy] * LENGTHS[source]
        logp += POLICY[steps]
        ref += REFERENCE[steps]
    many = Rollout.from_arrays(ids, [0] * 4, step={"logp/ref": f64(ref)}, trajectories={"label": f64([1, 1, 1, 0])})
    one = card((1, 0, math.nan, math.nan)).select(torch.tensor([0, 1]))
    expected, slope = value_and_gradient(dpo, now(POLICY[:5]), one)
    loss, gradient = ours(many, logp, variance=0.0)
    same(loss, expected)
    same(gradient[0:3] * 3, slope[:3])
    same(gradient[9:], slope[3:])


@pytest.mark.parametrize("seed", range(3))
def test_groups_against_a_loop(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    group = torch.tensor([0, 1, 0, 1, 2, 0, 3, 1, 0, 3])
    label = torch.tensor([1.0, 0, 1, 1, 1, 0, 0, 0, 1, 0.5], dtype=torch.float64)
    logp = -torch.rand(10, generator=generator, dtype=torch.float64)
    ref = -torch.rand(10, generator=generator, dtype=torch.float64)
    rollout = Rollout.from_arrays(range(10), group, step={"logp/ref": ref}, trajectories={"label": label})
    s = (logp - ref).tolist()
    expected = 0.0
    for g in range(4):
        winners = [s[i] for i in range(10) if group[i] == g and label[i] == 1]
        losers = [s[i] for i in range(10) if group[i] == g and label[i] < 1]
        expected += by_hand(winners, losers, 0.7, 2.0) / 4
    same(ours(rollout, logp, beta=0.7, variance=2.0)[0], expected)
    same(3 * ours(rollout, logp, beta=0.7, variance=2.0)[0], ours(rollout, logp, beta=0.7, variance=2.0, weight=3.0)[0])


def test_order_and_a_common_constant_do_not_matter() -> None:
    moved = f64(POLICY) + torch.tensor([0.6 / n for n in LENGTHS for _ in range(n)], dtype=torch.float64)
    same(ours(logp=moved)[0], ours()[0])
    same(ours(logp=moved)[1], ours()[1])


def test_the_variance_knows_winners_alone() -> None:
    _, with_it = ours(variance=1.0)
    _, without = ours(variance=0.0)
    term = (with_it - without)[STARTS]
    same(term[[1, 3]], [0.0, 0.0])
    same(term[[0, 2]], [2 * (0.3 - 0.2) / 2, 2 * (0.1 - 0.2) / 2])
    same(term.sum(), 0.0, atol=1e-12)
    lower = f64(POLICY).clone()
    lower[3:5] -= 2.0
    same((ours(logp=lower)[1] - ours(logp=lower, variance=0.0)[1])[STARTS], term)


def test_equal_log_ratios_have_no_variance() -> None:
    equal = f64(POLICY).clone()
    equal[5] += 0.2
    same(ours(logp=equal)[0], ours(logp=equal, variance=0.0)[0])
    assert ours()[0] > ours(variance=0.0)[0] + 1e-3


def test_at_the_reference_the_loss_is_log_two() -> None:
    same(ours(logp=REFERENCE)[0], math.log(2))


@pytest.mark.parametrize(
    ("labels", "winners", "losers", "single"),
    [
        ((1, 1, 1, 1), (0, 1, 2, 3), (), 0),
        ((0, 0, 0, 0), (), (0, 1, 2, 3), 0),
        ((1, 0.5, 0, 0), (0,), (1, 2, 3), 1),
        ((1, math.nan, math.nan, math.nan), (0,), (), 1),
    ],
)
def test_missing_sides_are_legal_and_counted(labels: Any, winners: Any, losers: Any, single: int) -> None:
    expected = by_hand([RATIOS[i] for i in winners], [RATIOS[i] for i in losers], 0.1, 1.0)
    same(ours(card(labels))[0], expected)
    _, metrics = (dpo | {"objective": GEPO()}).loss(now(POLICY), card(labels))
    assert metrics["groups/one_sided"] == float(not (winners and losers))
    assert metrics["groups/single_winner"] == single


def test_an_answer_without_a_step_that_trains_is_in_no_group() -> None:
    mask = torch.ones(11, dtype=torch.bool)
    mask[5:7] = False
    same(ours(card(mask=mask))[0], by_hand([0.3], [-0.4, 0.0], 0.1, 1.0))


# --- beside reinforcement learning ------------------------------------------------------------------------------------

SPACE = SequenceSpace(3, 3, end=True)


def both(policy: ExactPolicy, part: BesideAnswers | None = None) -> Rollout:
    pool = [
        Example("a", "", completions=("0", "1 0", "0 1 1"), labels=(1.0, 1.0, 0.0), columns={"problem": 0}),
        Example("b", "", chosen="1 1", rejected="0 0", columns={"problem": 1}),
    ]
    requests = [Request(pool[0], 2), Request(pool[1], 0), Request(pool[1], 3)]
    return (part or BesideAnswers())(policy, requests, limit=3, seed=1)


def test_known_answers_join_the_group_of_their_prompt() -> None:
    policy = ExactPolicy(SPACE, 2)
    rollout = both(policy)
    plain = Groups()(policy, [Request(e, n) for e, n in ((rollout.examples[0], 2), (rollout.examples[2], 3))],
                     limit=3, seed=1)  # fmt: skip
    assert rollout.group.tolist() == [0, 0, 1, 1, 1, 0, 0, 0, 1, 1]
    known = rollout["source"] == Source.OPPONENT
    assert known.tolist() == [False] * 5 + [True] * 5
    assert rollout["label"][:5].isnan().all()
    assert rollout["label"][5:].tolist() == [1, 1, 0, 1, 0]
    assert torch.equal(rollout["mask/known"].bool(), rollout.spread(known)) and torch.equal(
        rollout.mask, ~rollout.spread(known)
    )
    assert rollout["limit"].tolist() == [3] * 10
    sampled = rollout.select(~known)
    for name in plain.names():
        assert torch.equal(sampled[name], plain[name]), name
    # The end token (2) closes what could go on.
    given = rollout.select(known)
    assert torch.split(given["action"], given.lengths.tolist())[0].tolist() == [0, 2]
    assert given.lengths.tolist() == [2, 3, 3, 3, 3]
    assert both(policy, BesideAnswers(end=False)).lengths.tolist()[5:] == [1, 2, 3, 2, 2]


def test_an_example_without_answers_is_named() -> None:
    bare = Example("lonely", "", columns={"problem": 0})
    with pytest.raises(UsageError, match="lonely"):
        BesideAnswers().check([bare])
    with pytest.raises(UsageError, match="lonely"):
        BesideAnswers()(ExactPolicy(SPACE, 1), [Request(bare, 2)], limit=3, seed=0)


def test_each_loss_learns_from_its_own_answers() -> None:
    """The whole loss is the clipped surrogate of the sampled and 0.01 times GEPO of the known answers."""
    policy = ExactPolicy(
        SPACE, 2, torch.randn(2, SPACE.n_nodes, 3, generator=torch.Generator().manual_seed(0)).double()
    )
    policy.add_model("ref", torch.zeros(2, SPACE.n_nodes, 3))
    rollout = both(policy)
    reward = f64([1, 0, 0, 1, 0.5, 7, 8, 9, 10, 11])
    ref = policy.evaluate(rollout, frozenset({"logp/ref"}))["logp/ref"]
    rollout = gepo.credit(rollout.with_columns(trajectory={"reward": reward}, step={"logp/ref": ref}))
    logp = policy.evaluate(rollout, frozenset({"logp"})).logp.detach()
    loss, gradient = value_and_gradient(gepo, now(logp), rollout)
    known = rollout["source"] == Source.OPPONENT
    steps = rollout.spread(known)

    def alone(objective: Any, which: Tensor, where: Tensor) -> tuple[float, Tensor]:
        kept = rollout.select(which)
        kept = kept.with_columns(step={"mask": torch.ones(kept.n_steps, dtype=torch.bool)})
        return value_and_gradient(gepo | {"objective": objective}, now(logp[where]), kept)

    surrogate, first = alone(ClippedSurrogate(), ~known, ~steps)
    preference, second = alone(GEPO(), known, steps)
    same(loss, surrogate + 0.01 * preference)
    same(gradient[~steps], first)
    same(gradient[steps], 0.01 * second)
    assert (second != 0).any() and (first != 0).any()
    # The rewards of known answers play no part in the advantages.
    own = reward[:5].repeat_interleave(rollout.lengths[:5])
    expected = (own - own.mean()) / (own.var() + 1e-8).sqrt()
    same(rollout.advantage[~steps], expected)
    assert (rollout.advantage[steps] == 0).all()


def test_whitening_leaves_invalid_returns_out() -> None:
    rollout = Rollout.from_arrays(IDS, [0, 0, 1, 1], trajectories={"reward": f64([1, math.nan, 0, 4])})
    found = BatchWhitened()(rollout)
    own = np.array([1.0] * 3 + [0.0] * 2 + [4.0] * 4)
    white = (own - own.mean()) / math.sqrt(own.var(ddof=1) + 1e-8)
    same(found, [*white[:3], 0, 0, *white[3:]])


def test_what_it_declares() -> None:
    assert gepo.unit == "group"
    assert gepo.masks == {"mask", "mask/known"} and gepo.reads_answers and not gepo.offline
    assert dpo.reads_answers
    assert gepo.objective.parts[1].weight == 0.01 and gepo.objective.parts[1].variance == 1.0

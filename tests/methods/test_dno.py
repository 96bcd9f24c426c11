"""The card of DNO: soft and practical loss, the tabular step, win rates, the pair rule, gold answers and history."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from polopt.claims.exact import start
from polopt.core.errors import UsageError
from polopt.core.policy import Request
from polopt.core.rollout import Rollout, Source
from polopt.filters.points import Points
from polopt.methods.preference.dno import DNO, SoftDNO, dno
from polopt.methods.preference.dpo import DPO, dpo
from polopt.rewards.judges import MatrixJudge, ScoreJudge
from polopt.rollouts.batched import Batched
from polopt.tasks.problems import problem
from tests.methods.test_dpo import POLICY, card
from tests.support import close, f64, now, same, value_and_gradient

Floats = NDArray[np.float64]
WIN = (0.9, 0.2, 0.6, 0.5)
LENGTHS = [3, 2, 2, 4]


def soft(win: Sequence[float] = WIN, eta: float = 0.5, groups: Sequence[int] = (0, 0, 1, 1)) -> tuple[float, Tensor]:
    rollout = card(groups=groups).with_columns(trajectory={"win": f64(list(win))})
    return value_and_gradient(dno | {"objective": SoftDNO(beta=eta)}, now(POLICY), rollout)


def logsigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def test_worked_example_of_the_soft_loss() -> None:
    value, gradient = soft()
    close(1 / (1 + np.exp(-np.array([0.7, 0.1]))), [0.66818777, 0.52497919], digits=8)
    close(value, 0.6708635619, digits=10)
    expected = [-0.02039255] * 3 + [0.02039255] * 2 + [-0.00312045] * 2 + [0.00312045] * 4
    close(gradient, expected, digits=8)


def test_worked_example_of_the_practical_loss() -> None:
    rollout = card((6.0, 1.0, 6.0, 1.0))
    value, gradient = value_and_gradient(dno, now(POLICY), rollout)
    close(value, 0.6734596180, digits=10)
    expected = value_and_gradient(dpo | {"objective": DPO(beta=0.1)}, now(POLICY), rollout)
    same(value, expected[0])
    same(gradient, expected[1])


def test_the_soft_loss_is_label_smoothing_pair_by_pair() -> None:
    """eps = 1 - q; q = 1 is the practical loss."""
    total, s = 0.0, [0.3, -0.4, 0.1, 0.0]
    for i, j in ((0, 1), (2, 3)):
        q, z = 1 / (1 + math.exp(WIN[j] - WIN[i])), 0.5 * (s[i] - s[j])
        total += -q * logsigmoid(z) - (1 - q) * logsigmoid(-z)
    same(soft()[0], total / 2)
    certain = soft((1e3, 0.0, 1e3, 0.0), eta=0.1)
    same(certain[0], value_and_gradient(dno, now(POLICY), card((6.0, 1.0, 6.0, 1.0)))[0])


def test_the_order_of_a_pair_does_not_matter() -> None:
    order = torch.tensor([1, 0, 3, 2])
    rollout = card().with_columns(trajectory={"win": f64(list(WIN))})
    swapped = rollout.with_columns(step={"now": f64(POLICY)}).select(order)
    value, _ = value_and_gradient(dno | {"objective": SoftDNO(beta=0.5)}, now(swapped["now"]), swapped)
    same(value, soft()[0])


@pytest.mark.parametrize("seed", range(3))
def test_the_soft_loss_is_stationary_at_soft_policy_iteration(seed: int) -> None:
    """Over all pairs of answers the gradient is 0 at pi_t exp(r / eta) / Z, and only there."""
    rng = np.random.default_rng(seed)
    p, r, eta = rng.dirichlet(np.ones(5)), rng.uniform(size=5), 0.8
    rollout = Rollout.from_arrays(
        range(5), [0] * 5, step={"logp/ref": f64(np.log(p))}, trajectories={"win": f64(r), "label": f64(r)}
    )

    def gradient(target: Floats) -> Tensor:
        logits = f64(np.log(target)).requires_grad_()
        evaluation = now([0.0] * 5)
        evaluation.columns["logp"] = logits.log_softmax(-1)  # type: ignore[index]
        loss, _ = (dno | {"objective": SoftDNO(beta=eta)}).loss(evaluation, rollout)
        return torch.autograd.grad(loss, logits)[0]

    same(gradient(p * np.exp(r / eta)), np.zeros(5), atol=1e-14)
    assert float(gradient(p * np.exp(r)).abs().max()) > 1e-4


def test_soft_policy_iteration_of_the_card() -> None:
    table, p = np.array([[0.5, 0.9, 0.2], [0.1, 0.5, 0.7], [0.8, 0.3, 0.5]]), np.array([0.5, 0.3, 0.2])
    made = p * np.exp(table @ p / 0.8)
    close(made / made.sum(), [0.53446552, 0.24357907, 0.22195541], digits=8)


def test_win_rates_average_a_half_and_the_best_has_one() -> None:
    made = problem("intransitive-preferences", batch=3, seed=2)
    rollout = Batched(gold=False)(made.policy(), [Request(e, 6) for e in made.examples()], limit=2, seed=0)
    judged = MatrixJudge().of_problem(made)(rollout)
    same(judged.group_mean(judged["win"].double()), [0.5] * 3, rtol=1e-6)
    scores = rollout.with_columns(trajectory={"score": torch.arange(18.0)})
    assert ScoreJudge(scale=None)(scores)["win"].view(3, 6)[:, -1].tolist() == [1.0] * 3


# --- the pair rule --------------------------------------------------------------------------------------------------


def chosen(points: Sequence[float], gold: Sequence[bool] | None, **fields: Any) -> set[tuple[int, int]]:
    count = len(points)
    columns: dict[str, Any] = {"label": f64(list(points))}
    if gold is not None:
        columns["gold"] = torch.tensor(list(gold))
    rollout = Rollout.from_arrays(range(count), [0] * count, trajectories=columns)
    pairs = DNO(**fields).pairs(rollout)
    return set(zip(pairs.winner.tolist(), pairs.loser.tolist(), strict=True))


def test_pair_rule_of_the_card() -> None:
    assert chosen([6, 5, 4, 3], [True, False, False, False]) == {(0, 2), (0, 3), (1, 2), (1, 3)}


def test_pair_rule() -> None:
    # An own answer that beats gold trains; gold needs the larger margin; a winner below 5 is none.
    assert chosen([5, 6, 4.5], [True, False, False]) == {(1, 0), (1, 2)}
    assert chosen([4.9, 1, 1], [False] * 3) == set()
    assert chosen([5, 5, 5], [True, False, False]) == set()
    # Without gold answers all are the policy's own.
    assert chosen([6, 5, 4], None) == {(0, 1), (0, 2), (1, 2)}
    assert chosen([6, 5, 4], None, own_margin=2.0) == {(0, 2)}
    # Points that float32 has rounded.
    rounded = (1 + 5 * torch.tensor([0.8, 0.6], dtype=torch.float32)).tolist()
    assert chosen(rounded, None) == {(0, 1)}


def test_points_are_those_of_the_score() -> None:
    rollout = Rollout.from_arrays(
        range(7), [0, 0, 0, 1, 1, 2, 2], trajectories={"score": f64([1.0, 0.0, math.nan, 0.4, 0.4, math.nan, 1.0])}
    )
    kept = Points()(rollout)
    assert kept["label"].tolist() == [6.0, 1.0]


def test_groups_count_alike_and_without_pairs_with_nothing() -> None:
    rollout = card((6.0, 1.0, 4.0, 1.0)).with_columns(trajectory={"gold": torch.zeros(4).bool()})
    value, gradient = value_and_gradient(dno, now(POLICY), rollout)
    same(value, -logsigmoid(0.07) / 2)
    assert not bool(gradient[5:].any())


def test_what_does_not_train_or_is_invalid_is_in_no_soft_pair() -> None:
    win = (0.9, math.nan, 0.6, 0.5)
    value, gradient = soft(win, groups=(0, 0, 0, 0))
    rollout = card(groups=(0, 0, 0, 0)).with_columns(trajectory={"win": f64([*win])})
    kept = rollout.select(torch.tensor([0, 2, 3]))
    logp = f64(POLICY)[[0, 1, 2, 5, 6, 7, 8, 9, 10]]
    same(value, value_and_gradient(dno | {"objective": SoftDNO(beta=0.5)}, now(logp), kept)[0])
    assert not bool(gradient[3:5].any()) and bool(torch.isfinite(gradient).all())


# --- gold answers and history ---------------------------------------------------------------------------------------


def asked(count: int, gold: bool = True) -> tuple[Any, list[Request]]:
    made = problem("intransitive-preferences", batch=count, seed=1)
    examples = [replace(e, completion="0 1") if gold else e for e in made.examples()]
    return made, [Request(e, 3) for e in examples]


def test_the_gold_answer_is_one_more_of_its_group() -> None:
    made, requests = asked(2)
    requests[1] = replace(requests[1], example=made.examples()[1])
    rollout = Batched()(made.policy(), requests, limit=2, seed=0)
    assert rollout.group.tolist() == [0, 0, 0, 1, 1, 1, 0]
    assert rollout["gold"].tolist() == [False] * 6 + [True]
    assert rollout["action"][-2:].tolist() == [0, 1]
    assert int(rollout["source"][-1]) == Source.DEMONSTRATION and (rollout["limit"] == 2).all()
    none = Batched(gold=False)(made.policy(), requests, limit=2, seed=0)
    assert none.n_trajectories == 6 and torch.equal(none["action"], rollout["action"][:-2])


def test_history_comes_in_halving_shares() -> None:
    """Of 20 new groups 6, 3 and 1 of the last three iterations; what came again is not kept twice."""
    made, requests = asked(20)
    part, policy = Batched(), made.policy()
    expected = [0, 6, 6 + 3, 6 + 3 + 1, 6 + 3 + 1]
    for turn, more in enumerate(expected):
        policy.version = turn
        rollout = part(policy, requests, limit=2, seed=turn)
        again = rollout["source"] == Source.REPLAY
        assert rollout.n_groups == 20 + more
        assert [len(torch.unique(rollout.group[again & (rollout["version"] == turn - 1 - k)])) for k in range(4)] == [
            6 if more >= 6 else 0,
            3 if more >= 9 else 0,
            1 if more >= 10 else 0,
            0,
        ]
        # Whole groups, gold answers with them.
        assert rollout.group.bincount().tolist() == [4] * (20 + more)
        scored = rollout.with_columns(trajectory={"score": torch.rand(rollout.n_trajectories)})
        part.observe(scored.select(~again), lambda r, names: r)
    resumed = Batched()
    resumed.load_state_dict(part.state_dict())
    one, other = (p(policy, requests, limit=2, seed=9) for p in (part, resumed))
    assert torch.equal(one["action"], other["action"]) and one.n_groups == 30


def test_replayed_answers_keep_their_scores() -> None:
    made, requests = asked(4)
    method = dno | {"rollout": Batched(history=0.5)}
    run = start(made, method, seed=0, group=3, examples=[r.example for r in requests])
    seen: list[Rollout] = []
    collect: Any = run.trainer.collect

    def watched(*arguments: Any) -> Any:
        batch = collect(*arguments)
        seen.append(batch.drawn)
        return batch

    run.trainer.collect = watched  # type: ignore[assignment]
    for _ in range(2):
        run.step()
    again = seen[1]["source"] == Source.REPLAY
    assert int(again.sum()) == 8 and not bool(seen[1]["score"].isnan().any())
    known = set(seen[0]["score"].tolist())
    assert set(seen[1]["score"][again].tolist()) <= known


def test_values_out_of_range() -> None:
    with pytest.raises(UsageError, match="history"):
        Batched(history=1.5)
    with pytest.raises(UsageError, match="beta"):
        SoftDNO(beta=0.0)


def test_what_it_declares() -> None:
    assert dno.models["ref"].every == 1 and dno.unit == "group" and dno.offline
    assert dno.rollout.trained_temperature == 1.0

"""The card of EGPO: the mirror step in one gradient, half and whole steps, the equilibrium, the worked examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from polopt.claims.exact import start
from polopt.claims.games import everything, gap, played, probabilities
from polopt.core.errors import UsageError
from polopt.core.policy import Request
from polopt.core.rollout import Rollout, Source
from polopt.filters.opponents import AgainstOpponents
from polopt.methods.preference.egpo import OnlineIPO, egpo
from polopt.policies.exact.game import PreferenceGame
from polopt.rewards.judges import MatrixJudge
from polopt.rollouts.opponents import Opponents
from polopt.tasks.problems import problem
from polopt.updates.extragradient import Extragradient
from polopt.updates.gradient_step import GradientStep
from tests.support import close, f64, now, same, value_and_gradient

Floats = NDArray[np.float64]
TABLE = np.array([[0.5, 0.9, 0.2], [0.1, 0.5, 0.7], [0.8, 0.3, 0.5]])
REFERENCE = np.array([0.5, 0.3, 0.2])
BETA, ETA = 0.1, 0.3
FREE = Extragradient(max_norm=math.inf)


def mirror(p: Floats, v: Floats, eta: float = ETA, beta: float = BETA, reference: Floats = REFERENCE) -> Floats:
    made = p ** (1 - eta * beta) * reference ** (eta * beta) * np.exp(eta * v)
    return np.asarray(made / made.sum())


def softmax(logits: Floats) -> Floats:
    made = np.exp(logits - logits.max())
    return np.asarray(made / made.sum())


def loss(logits: Sequence[float], win: Floats, reference: Floats = REFERENCE, beta: float = BETA) -> Any:
    """Value and gradient in the logits of the loss on every answer once."""
    count = len(logits)
    rollout = Rollout.from_arrays(
        range(count),
        [0] * count,
        step={"logp/ref": f64(np.log(reference))},
        trajectories={"win": f64(win)},
    )
    z = f64(list(logits)).requires_grad_()
    evaluation = now([0.0] * count)
    evaluation.columns["logp"] = z.log_softmax(-1)  # type: ignore[index]
    value, _ = (egpo | {"objective": OnlineIPO(beta=beta)}).loss(evaluation, rollout)
    (gradient,) = torch.autograd.grad(value, z)
    return float(value.detach()), gradient.numpy()


def runs(update: Any, steps: int, table: Floats = TABLE, eta: float = ETA, beta: float = BETA) -> Any:
    """The trainer on every answer at once by SGD at the rate that makes a gradient a mirror step."""
    made = played(PreferenceGame(f64(table)[None]), f64(REFERENCE)[None])
    method = everything(egpo | {"objective": OnlineIPO(beta=beta), "update": update}, made)
    # The paper's uniform pairs include y = y', which add nothing: A^2 instead of A (A - 1).
    run = start(made, method, seed=0, optimizer="sgd", lr=eta * beta * (len(table) - 1) / 4)
    for _ in range(steps):
        run.step()
    return run


def test_triple_of_the_card() -> None:
    """log pi = (-1, -2), log ref = (-1.2, -1.9), P against the opponent (.9, .2), beta = .5."""
    rollout = Rollout.from_arrays(
        [0, 1], [0, 0], step={"logp/ref": f64([-1.2, -1.9])}, trajectories={"win": f64([0.9, 0.2])}
    )
    value, gradient = value_and_gradient(egpo | {"objective": OnlineIPO(beta=0.5)}, now([-1.0, -2.0]), rollout)
    same(value, 1.21)
    same(gradient, [-2.2, 2.2])


def test_loss_of_the_card_against_itself() -> None:
    logits = [0.3, -0.4, 0.2]
    value, gradient = loss(logits, TABLE @ softmax(np.array(logits)))
    # The card's mean is over all A^2 pairs, ours over those of different answers.
    close(value * 2 / 3, 0.1847234237, digits=10)
    close(gradient * 2 / 3, [-0.04314575, 0.51644835, -0.47330260], digits=8)


def test_half_and_whole_step_of_the_card() -> None:
    close(probabilities(runs(FREE, 1).policy)[0], [0.50882952, 0.28579861, 0.20537186], digits=8)
    close(probabilities(runs(GradientStep(math.inf), 1).policy)[0], [0.50882952, 0.28579861, 0.20537186], digits=8)
    run = runs(FREE, 2)
    close(probabilities(run.policy)[0], [0.50821773, 0.28586931, 0.20591297], digits=8)
    # The gap of both players is twice that of one: the game is symmetric.
    close(2 * gap(run, BETA), 0.0707660258, digits=9)


@pytest.mark.parametrize("seed", range(3))
def test_a_step_is_the_mirror_step(seed: int) -> None:
    """theta - (eta beta A / 4) grad L(theta; uniform, mu) = M(pi_theta, P mu), for any opponent."""
    rng = np.random.default_rng(seed)
    size, eta, beta = 6, 0.4, 0.3
    margin = rng.uniform(-0.5, 0.5, (size, size))
    table = 0.5 + (margin - margin.T) / 2
    logits, reference, rival = rng.normal(size=size), softmax(rng.normal(size=size)), softmax(rng.normal(size=size))
    _, gradient = loss(list(logits), table @ rival, reference, beta)
    moved = softmax(logits - eta * beta * size / 4 * gradient * (size - 1) / size)
    same(moved, mirror(softmax(logits), table @ rival, eta, beta, reference))


def test_twenty_steps_are_those_of_the_equations() -> None:
    p = REFERENCE
    for _ in range(20):
        half = mirror(p, TABLE @ p)
        p = mirror(p, TABLE @ half)
    same(probabilities(runs(FREE, 40).policy)[0], p)
    q = REFERENCE
    for _ in range(40):
        q = mirror(q, TABLE @ q)
    same(probabilities(runs(GradientStep(math.inf), 40).policy)[0], q)
    assert float(np.abs(p - q).max()) > 1e-3


def test_the_equilibrium_is_stationary() -> None:
    game = PreferenceGame(f64(TABLE)[None])
    nash = game.regularised_nash(f64(REFERENCE)[None], BETA)[0]
    close(nash, [0.35192521, 0.20624474, 0.44183005], digits=8)
    value, gradient = loss(nash.log().tolist(), TABLE @ nash.numpy())
    same(value, 0, atol=1e-18)
    same(gradient, [0, 0, 0], atol=1e-9)
    for v in (TABLE @ nash.numpy(), TABLE @ mirror(nash.numpy(), TABLE @ nash.numpy())):
        same(mirror(nash.numpy(), v), nash, rtol=1e-8)
    same(game.regularised_gap(nash[None], f64(REFERENCE)[None], BETA), [0], atol=1e-9)


def test_the_last_iterate_converges_linearly() -> None:
    run, gaps = runs(FREE, 60), []
    for _ in range(3):
        for _ in range(60):
            run.step()
        gaps.append(gap(run, BETA))
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2]
    first, second = math.log(gaps[0] / gaps[1]), math.log(gaps[1] / gaps[2])
    assert first == pytest.approx(second, rel=0.2)


def test_equal_payoffs_lead_to_the_reference() -> None:
    logits = np.array([0.3, -0.4, 0.2])
    _, gradient = loss(list(logits), np.full(3, 0.5))
    moved = softmax(logits - ETA * BETA * 2 / 4 * gradient)
    between = softmax(logits) ** (1 - ETA * BETA) * REFERENCE ** (ETA * BETA)
    same(moved, between / between.sum())


def test_rock_paper_scissors_is_played_ahead() -> None:
    """beta = 1e-3, eta = .5: looking ahead comes in where plain steps of as many gradients spiral out."""
    cycle = PreferenceGame.cyclic(3).preference[0].numpy()
    initial = gap(runs(FREE, 0, cycle, 0.5, 1e-3), 1e-3)
    ahead = gap(runs(FREE, 240, cycle, 0.5, 1e-3), 1e-3)
    plain = gap(runs(GradientStep(math.inf), 240, cycle, 0.5, 1e-3), 1e-3)
    assert ahead < initial / 3 < initial < plain


# --- the update part ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_whole_step_starts_from_the_saved_weights_and_moments(optimizer: str) -> None:
    """By hand: the half step's gradient enters neither the weights nor the moments that stay."""
    made = played(PreferenceGame(f64(TABLE)[None]), f64(REFERENCE)[None])
    run = start(made, everything(egpo | {"update": FREE}, made), seed=0, optimizer=optimizer, lr=0.01)
    by_hand = torch.nn.Parameter(f64(np.log(REFERENCE)))
    kinds: dict[str, Any] = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
    ours = kinds[optimizer]([by_hand], 0.01)
    for _ in range(3):
        state, kept = ours.state_dict(), by_hand.detach().clone()
        moments = {k: {n: v.clone() for n, v in s.items()} for k, s in state["state"].items()}
        by_hand.grad = f64(loss(kept.tolist(), TABLE @ softmax(kept.numpy()))[1])
        ours.step()
        ahead = softmax(by_hand.detach().numpy())
        ours.load_state_dict({**state, "state": moments})
        with torch.no_grad():
            by_hand.copy_(kept)
        by_hand.grad = f64(loss(kept.tolist(), TABLE @ ahead)[1])
        ours.step()
        run.step()
        run.step()
        same(run.policy.logits.detach()[0, 0].softmax(-1), by_hand.detach().softmax(-1))


def test_it_resumes_between_the_two_steps() -> None:
    one = runs(FREE, 3)
    state = one.trainer.method.update.state_dict()
    assert set(state) == {"before"} and set(state["before"]) == {"parameters", "optimizer"}
    other = runs(FREE, 0)
    other.policy.load_state_dict(one.policy.state_dict())
    other.trainer.method.update.load_state_dict(state)
    one.step()
    other.step()
    assert torch.equal(one.policy.logits, other.policy.logits)
    assert one.trainer.method.update.state_dict() == {"before": None}


def test_the_policy_is_another_version_after_every_change() -> None:
    run = runs(FREE, 1)
    assert run.policy.version == 1
    run.step()
    assert run.policy.version == 3


# --- sampled --------------------------------------------------------------------------------------------------------


def test_answers_and_opponents_of_a_group() -> None:
    made = problem("intransitive-preferences", batch=2, seed=1)
    rollout = egpo.rollout(made.policy(), [Request(e, 7) for e in made.examples()], limit=2, seed=0)
    assert rollout.group.bincount().tolist() == [7, 7]
    opponent = rollout["opponent"]
    assert [int(opponent[rollout.group == g].sum()) for g in range(2)] == [2, 2]
    assert (rollout["source"][opponent] == Source.POLICY).all()
    assert (rollout["source"][~opponent] == Source.TEMPERED).all()
    # Log-probs are of the policy at temperature 1, whatever was drawn from.
    own = made.policy().evaluate(rollout, frozenset({"logp"})).logp.detach()
    same(rollout.logp, own)
    steps = rollout.spread(opponent)
    same(rollout["logp/sampled"][steps], own[steps])
    assert (rollout["logp/sampled"][~steps] != own[~steps]).all()
    assert (rollout["limit"] == 2).all()


def test_the_win_rate_is_that_against_the_opponents() -> None:
    made = problem("intransitive-preferences", batch=2, seed=1)
    assert made.game is not None
    requests = [Request(e, 6) for e in made.examples()]
    rollout = Opponents(share=0.5)(made.policy(), requests, limit=2, seed=0)
    judged = MatrixJudge().of_problem(made)(rollout)
    found = AgainstOpponents()(judged)
    assert found.n_trajectories == 6 and not bool(found["opponent"].any())
    payload: Any = rollout.payload
    number = [made.space.index(ids) for ids in payload.completion_ids]
    table, expected = made.game.preference, []
    for i in range(12):
        if not rollout["opponent"][i]:
            rivals = [j for j in range(12) if rollout["opponent"][j] and rollout.group[j] == rollout.group[i]]
            b = int(payload.problem[i])
            expected.append(float(np.mean([float(table[b, number[i], number[j]]) for j in rivals])))
    same(found["win"], expected, rtol=1e-6)


def test_invalid_comparisons_and_masked_answers_are_in_no_pair() -> None:
    rollout = Rollout.from_arrays(
        [0, 1, 2, 3, 4],
        [0, 0, 0, 0, 1],
        step={"logp/ref": f64([-1.0] * 5), "mask": torch.tensor([True, True, True, False, True])},
        trajectories={"win": f64([0.9, 0.2, torch.nan, 0.5, 0.3])},
    )
    method = egpo | {"objective": OnlineIPO(beta=0.5)}
    value, gradient = value_and_gradient(method, now([-0.8, -1.1, -3.0, -2.0, -1.0]), rollout)
    # One pair, and a group without any counts in the mean over groups.
    e = (0.2 + 0.1) - 0.7 / 0.5
    same(value, e**2 / 2)
    same(gradient, [e, -e, 0, 0, 0])


def test_means_per_step_change_the_scale() -> None:
    rollout = Rollout.from_arrays(
        [0, 0, 1], [0, 0], step={"logp/ref": f64([-1.0, -1.0, -1.0])}, trajectories={"win": f64([0.6, 0.4])}
    )
    logp = now([-0.5, -0.7, -2.0])
    sums = value_and_gradient(egpo, logp, rollout)[0]
    means = value_and_gradient(egpo | {"objective": OnlineIPO(normalise=True)}, logp, rollout)[0]
    same([sums, means], [(0.8 + 1.0 - 2.0) ** 2, (0.4 + 1.0 - 2.0) ** 2])


def test_opponents_that_are_invalid_leave_the_others() -> None:
    rollout = Rollout.from_arrays(
        range(4),
        [0, 0, 0, 0],
        trajectories={
            "opponent": torch.tensor([False, True, True, False]),
            "member": torch.arange(4),
            "beats": f64([[0.5, torch.nan, 0.7, 0.1], [0.2] * 4, [0.3] * 4, [0.4, torch.nan, torch.nan, 0.5]]),
        },
    )
    kept = AgainstOpponents()(rollout)
    same(kept["win"][0], 0.7)
    assert bool(kept["win"][1].isnan()) and kept.n_trajectories == 2


def test_what_cannot_be() -> None:
    made = problem("intransitive-preferences", batch=1)
    with pytest.raises(UsageError, match="group of at least 2"):
        Opponents()(made.policy(), [Request(made.examples()[0], 1)], limit=2, seed=0)
    with pytest.raises(UsageError, match="share"):
        Opponents(share=1.0)
    with pytest.raises(UsageError, match="beta"):
        OnlineIPO(beta=0.0)

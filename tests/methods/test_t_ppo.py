"""The card of T-PPO: EGAE, which steps train which model, worked examples, and what windows add up to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from polopt.core.method import Method, Schedule
from polopt.core.rollout import Rollout
from polopt.methods.base.ppo import GAE, ClippedValueLoss
from polopt.methods.trust_region.t_ppo import EGAE, EndedValueLoss, t_ppo
from polopt.objectives.clipped_surrogate import ClippedSurrogate
from polopt.policies.exact import SequenceSpace
from polopt.rollouts.windows import Windows
from polopt.tasks.problems import problem
from polopt.training.update import BatchStep, contributing
from tests.policies.exact.test_training import make_trainer
from tests.support import close, f64, now, same, value_and_gradient, with_advantage

VALUE = [0.5, 0.6, 0.4, 0.7]

policy_loss = t_ppo | {"objective": ClippedSurrogate()}
value_loss = t_ppo | {"objective": EndedValueLoss(coefficient=1.0)}


def responses(
    lengths: list[int], unfinished: list[bool], reward: list[float], value: Any, before: list[int] | None = None
) -> Rollout:
    """Responses of which the first ``before`` steps are of earlier windows."""
    size = torch.tensor(lengths)
    ids = torch.arange(len(lengths)).repeat_interleave(size)
    time = torch.cat([torch.arange(n) for n in lengths])
    start = torch.tensor(before or [0] * len(lengths))
    goes_on = torch.tensor(unfinished)
    step = {"logp": -torch.ones(len(ids)).double(), "value": f64(value), "mask": time >= start[ids]}
    return Rollout.from_arrays(
        ids,
        list(range(len(lengths))),
        step={**step, "mask/critic": ~goes_on[ids]},
        trajectories={"reward": f64(reward), "unfinished": goes_on},
    )


# --- worked examples -------------------------------------------------------------------------------------------------


def test_worked_example_of_the_advantages() -> None:
    made = EGAE()(responses([4, 4], [True, False], [0, 1], VALUE * 2))
    close(made["advantage"], [0.18075, 0.085, 0.3, 0, 0.4379625, 0.35575, 0.585, 0.3], digits=12)
    close(made["return"][4:], [1, 1, 1, 1], digits=12)


def test_worked_example_of_the_policy_loss() -> None:
    rollout = responses([4], [True], [0], VALUE)
    delta = f64([0.3, -0.1, 0.05, 0.4])
    loss, gradient = value_and_gradient(policy_loss, now(rollout.logp + delta), policy_loss.credit(rollout))
    close(loss, -0.1522981274, digits=10)
    close(gradient, [0, -0.019228, -0.078845, 0])


def test_worked_example_of_the_slots() -> None:
    """Progress [8, 3, 24] with a budget of 24: the first goes on at 8, the others make room."""
    made = problem("length-correlated-rewards", batch=3, seed=0, space=SequenceSpace(2, 12, end=True))
    policy = made.policy()
    part = Windows(window=4)
    with torch.no_grad():
        policy.logits[:] = torch.tensor([30.0, 0.0])  # nobody ends by itself ...
        policy.logits[1, 2] = torch.tensor([0.0, 30.0])  # ... but the second, at its third step
    requests = made.requests()
    asked = [type(requests[0])(r.example, 1, limit=limit) for r, limit in zip(requests, (12, 12, 4), strict=True)]
    first = part(policy, asked, limit=12, seed=0)
    assert first.lengths.tolist() == [4, 3, 4] and first["unfinished"].tolist() == [True, False, False]
    second = part(policy, asked, limit=12, seed=1)
    assert second["before"].tolist() == [4, 0, 0]


# --- EGAE ------------------------------------------------------------------------------------------------------------


def by_hand(value: list[float], reward: float, unfinished: bool, gamma: float, lam: float) -> list[float]:
    """The sum as it is written, with V(s_l) by the rule at the boundary."""
    size = len(value)
    after = [*value, value[-1] if unfinished else 0.0]
    gain = [0.0] * (size - 1) + [0.0 if unfinished else reward]
    delta = [gain[t] + gamma * after[t + 1] - after[t] for t in range(size)]
    return [sum((gamma * lam) ** k * delta[t + k] for k in range(size - t)) for t in range(size)]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.97, 0.0)])
def test_egae_is_the_sum_of_the_card(gamma: float, lam: float) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths, unfinished = [5, 1, 3, 4, 1], [True, True, False, True, False]
    value = torch.randn(sum(lengths), generator=generator, dtype=torch.float64)
    reward = torch.randn(5, generator=generator, dtype=torch.float64).tolist()
    rollout = responses(lengths, unfinished, reward, value)
    made = EGAE(gamma=gamma, lam=lam)(rollout)
    split = [part.tolist() for part in torch.split(value, lengths)]
    expected = [by_hand(v, r, u, gamma, lam) for v, r, u in zip(split, reward, unfinished, strict=True)]
    same(made["advantage"], [a for row in expected for a in row])
    returns = torch.split(made["return"], lengths)
    for i, (size, goes_on) in enumerate(zip(lengths, unfinished, strict=True)):
        if not goes_on:
            same(returns[i], [gamma ** (size - 1 - t) * reward[i] for t in range(size)])


def test_at_the_cut_nothing_is_known() -> None:
    rollout = responses([4, 3], [True, True], [0, 0], [0.5, 0.6, 0.4, 0.7, -0.2, 0.3, 0.1])
    assert EGAE()(rollout)["advantage"][[3, 6]].tolist() == [0.0, 0.0]
    same(EGAE(lam=1.0)(rollout)["advantage"], [0.2, 0.1, 0.3, 0.0, 0.3, -0.2, 0.0])
    constant = rollout.with_columns(step={"value": torch.full((7,), 0.37, dtype=torch.float64)})
    assert not EGAE()(constant)["advantage"].any()


def test_what_ended_has_the_return_less_the_value() -> None:
    rollout = responses([4, 3], [False, False], [1, 0], [0.5, 0.6, 0.4, 0.7, -0.2, 0.3, 0.1])
    made = EGAE(lam=1.0)(rollout)
    same(made["advantage"], made["return"] - rollout["value"])
    same(made["return"], [1, 1, 1, 1, 0, 0, 0])


def test_earlier_windows_change_nothing() -> None:
    later = responses([3, 2], [True, False], [0, 1], [0.4, 0.7, 0.1, 0.3, 0.6])
    whole = responses([5, 6], [True, False], [0, 1], [9, 8, 0.4, 0.7, 0.1, 7, 6, 5, 4, 0.3, 0.6], [2, 4])
    made = EGAE()(whole)["advantage"]
    same(made[whole.mask], EGAE()(later)["advantage"])
    assert not made[~whole.mask].any()


def test_a_zero_at_the_cut_is_gae_of_what_is_there() -> None:
    rollout = responses([4, 3], [True, False], [0, 1], [0.5, 0.6, 0.4, 0.7, -0.2, 0.3, 0.1])
    same(EGAE(cut=0.0)(rollout)["advantage"], GAE(whiten=False)(rollout)["advantage"])
    assert (EGAE()(rollout)["advantage"][:4] != EGAE(cut=0.0)(rollout)["advantage"][:4]).all()


def test_step_rewards_count_where_they_are() -> None:
    rollout = responses([3], [True], [0], [0.0, 0.0, 0.0]).with_columns(step={"step_reward": f64([0, 1, 0])})
    same(EGAE(lam=1.0)(rollout)["advantage"], [1, 1, 0])


def test_an_invalid_reward_teaches_nothing() -> None:
    rollout = responses([3, 2], [False, True], [float("nan"), float("nan")], [0.5, 0.6, 0.4, 0.7, 0.1])
    made = EGAE()(rollout)
    assert not made["advantage"].any()
    same(made["return"], [0.5, 0.6, 0.4, 0.0, 0.0])  # where it ended, V_t itself


# --- which steps train which model -----------------------------------------------------------------------------------


def mixed() -> Rollout:
    """Unfinished after an earlier window; ended, its first two steps of an earlier window; ended in one."""
    value = [0.5, 0.6, 0.4, 0.7, 0.2, 0.3, 0.1, 0.8]
    return responses([3, 3, 2], [True, False, False], [0, 1, -1], value, [2, 2, 0])


def test_the_policy_trains_on_this_window_and_the_critic_on_what_ended() -> None:
    rollout = t_ppo.credit(mixed())
    assert rollout.mask.tolist() == [False, False, True, False, False, True, True, True]
    evaluation = now(rollout.logp, value=rollout["value"] + 0.1)
    loss, _ = t_ppo.loss(evaluation, rollout)
    by_logp, by_value = torch.autograd.grad(loss, [evaluation["logp"], evaluation["value"]])
    # PPO's clip averages over the 4 steps of this window ...
    same(by_logp, torch.where(rollout.mask, -rollout.advantage / 4, 0.0))
    # ... and the critic's loss over the 5 steps of responses that ended.
    target = f64([0, 0, 0, 1, 1, 1, -1, -1])
    ended = f64([0, 0, 0, 1, 1, 1, 1, 1])
    same(by_value, 0.1 * ended * (evaluation["value"].detach() - target) / 5)


def test_micro_batches_share_the_counts_of_both_masks() -> None:
    rollout = t_ppo.credit(mixed())
    moved = now(rollout.logp + 0.05, value=rollout["value"] + 0.1)
    whole, metrics = t_ppo.loss(moved, rollout)
    index = torch.split(torch.arange(8), [3, 3, 2])
    parts = [
        t_ppo.loss(type(moved)({n: v[index[i]] for n, v in moved.columns.items()}), rollout.piece(torch.tensor([i])))
        for i in range(3)
    ]
    same(torch.stack([loss for loss, _ in parts]).sum().detach(), whole.detach())
    for name, value in metrics.items():
        same(sum(float(m[name]) for _, m in parts), float(value), rtol=1e-6)


def test_without_an_ended_response_the_critic_rests() -> None:
    rollout = value_loss.credit(responses([3, 2], [True, True], [0, 0], [0.5, 0.6, 0.4, 0.7, 0.1]))
    loss, gradient = value_and_gradient(value_loss, now(rollout.logp, value=[1.0] * 5), rollout, "value")
    assert loss == 0 and not gradient.any()


def test_a_response_whose_window_is_masked_still_trains_the_critic() -> None:
    rollout = t_ppo.credit(mixed())
    masked = rollout.with_columns(step={"mask": rollout.mask & (rollout.trajectory != 1)})
    assert contributing(t_ppo, masked).tolist() == [True, True, True]
    quiet = masked.with_columns(step={"mask/critic": masked["mask/critic"] & (masked.trajectory != 1)})
    assert contributing(t_ppo, quiet).tolist() == [True, False, True]


def test_a_window_of_the_whole_response_is_ppo() -> None:
    rollout = responses([4, 3], [False, False], [1, 0], [0.5, 0.6, 0.4, 0.7, -0.2, 0.3, 0.1])
    plain = t_ppo | {
        "advantage": GAE(whiten=False),
        "objective": ClippedSurrogate() + ClippedValueLoss(width=None),
    }
    ours, theirs = t_ppo.credit(rollout), plain.credit(rollout)
    same(ours.advantage, theirs.advantage)
    moved = now(rollout.logp + 0.1, value=rollout["value"] + 0.3)
    ours_loss, theirs_loss = (
        torch.autograd.grad(m.loss(moved, r.with_columns(step={"return": ours["return"]}))[0], moved["logp"])[0]
        for m, r in ((t_ppo, ours), (plain, theirs))
    )
    same(ours_loss, theirs_loss)
    # The critic's target is the lambda = 1 return.
    same(ours["return"], GAE(lam=1.0, whiten=False)(rollout)["return"])


# --- in training -----------------------------------------------------------------------------------------------------


def windowed(method: Method = t_ppo) -> Method:
    return method | {"rollout": Windows(window=2), "schedule": Schedule(minibatches=3)}


def test_every_token_trains_once_and_every_response_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = problem("length-correlated-rewards", batch=3, seed=1, space=SequenceSpace(3, 5, end=True))
    trainer = make_trainer(tmp_path, made, "t-ppo", steps=10)
    trainer.method = windowed(trainer.method).clone()
    policy_steps = critic_steps = 0
    plain = BatchStep.gradient

    def counted(step: BatchStep, chunks: int = 1) -> Any:
        nonlocal policy_steps, critic_steps
        policy_steps += int(step.batch.mask.sum())
        critic_steps += int(step.batch["mask/critic"].sum())
        return plain(step, chunks)

    monkeypatch.setattr(BatchStep, "gradient", counted)
    collect: Any = trainer.collect
    ended = 0

    def watched(*arguments: Any) -> Any:
        nonlocal ended
        batch = collect(*arguments)
        ended += int(batch.answers.n_steps)
        return batch

    trainer.collect = watched  # type: ignore[assignment]
    trainer.train()
    waiting: Rollout = trainer.method.rollout.pending
    # What was sampled is what trained the policy; what ended, whole, is what trained the critic.
    assert policy_steps == trainer.meter.spent.tokens == ended + waiting.n_steps
    assert critic_steps == ended > 0 and waiting.n_steps > 0
    assert trainer.rejected == 0


def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path: Path) -> None:
    made = problem("length-correlated-rewards", batch=3, seed=1, space=SequenceSpace(3, 5, end=True))

    def fresh(folder: str, steps: int) -> Any:
        trainer = make_trainer(tmp_path / folder, made, "t-ppo", steps=steps)
        trainer.method = windowed(trainer.method).clone()
        return trainer

    whole = fresh("whole", 8)
    whole.train()
    half = fresh("half", 4)
    half.train()
    assert half.method.rollout.pending is not None
    later = make_trainer(tmp_path / "half", made, "t-ppo", steps=8, resume=True)
    later.method = windowed(later.method).clone()
    later.resume(half.save())
    later.train()
    for one, other in zip(later.policy.parameters(), whole.policy.parameters(), strict=True):
        assert torch.equal(one, other)
    assert later.meter.spent.tokens == whole.meter.spent.tokens


def test_it_learns_what_takes_several_windows(tmp_path: Path) -> None:
    made = problem("length-correlated-rewards", batch=3, seed=1, space=SequenceSpace(3, 5, end=True))
    trainer = make_trainer(tmp_path, made, "t-ppo", steps=40)
    trainer.method = windowed(trainer.method).clone()

    def reward() -> float:
        with torch.no_grad():
            policy: Any = trainer.policy
            return float((policy.probabilities() * made.reward).sum(-1).mean())

    before = reward()
    trainer.train()
    assert reward() > before + 0.3


def test_with_advantage_is_what_the_objective_reads() -> None:
    """The clip is PPO's: outside of it the gradient is 0."""
    rollout = with_advantage(responses([2], [True], [0], [0.0, 0.0]), [1.0, 1.0])
    _, gradient = value_and_gradient(policy_loss, now(rollout.logp + f64([0.3, 0.1])), rollout)
    assert gradient[0] == 0 and gradient[1] < 0

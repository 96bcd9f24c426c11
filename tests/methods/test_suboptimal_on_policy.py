"""The card of the study of on-policy data and negative gradients: its losses, their expectations, what they leave."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from polopt.advantages.group import GroupCenter
from polopt.aggregations import SequenceSum
from polopt.core.errors import UsageError
from polopt.core.loss import Evaluation
from polopt.core.method import Method
from polopt.core.override import override
from polopt.core.rollout import Rollout
from polopt.methods.base.reinforce import BatchBaseline, PolicyGradient
from polopt.methods.preference.dpo import DPO
from polopt.methods.preference.ipo import IPO
from polopt.methods.preference.suboptimal_on_policy import RewardWeighted, suboptimal_on_policy
from polopt.objectives.best_of_n import BestOfN
from polopt.rewards.shaping import KLPenalty
from tests.support import close, f64, now, same, value_and_gradient

LOGP, REFERENCE, REWARDS = [-1.0, -2.0, -0.5], [-1.2, -1.8, -0.9], [0.2, 1.0, 0.0]

SCORED = suboptimal_on_policy | {"objective": PolicyGradient(), "aggregation": SequenceSum()}
LOSSES = {
    "best_of_n": override(suboptimal_on_policy, {"objective.negative": 0.0}),
    "negative": suboptimal_on_policy,
    "rwr": SCORED | {"advantage": RewardWeighted(beta=0.5)},
    "reinforce": SCORED | {"advantage": GroupCenter()},
    "dpo": suboptimal_on_policy | {"objective": DPO(beta=0.5)},
    "ipo": suboptimal_on_policy | {"objective": IPO(beta=0.5, per_step=False)},
}


def answers(rewards: Sequence[float], groups: Sequence[int], **step: Sequence[float] | Tensor) -> Rollout:
    """One-step answers; their label is their reward."""
    columns = {name.replace("__", "/"): f64(values) for name, values in step.items()}
    values = {"reward": f64(rewards), "label": f64(rewards)}
    return Rollout.from_arrays(range(len(rewards)), list(groups), step=columns, trajectories=values)


@pytest.mark.parametrize(
    ("loss", "value", "gradient"),
    [
        ("best_of_n", 2.0, [0, -1, 0]),
        ("negative", 1.75, [0, -1, 0.5]),
        ("rwr", 5.58997897, [-0.4972749, -2.4630187, -0.33333333]),
        ("reinforce", 0.26666667, [0.06666667, -0.2, 0.13333333]),
        ("dpo", 0.79896359, [0.00414247, -0.18737942, 0.18323695]),
        ("ipo", 1.98666667, [0.13333333, -2, 1.86666667]),
    ],
)
def test_worked_example(loss: str, value: float, gradient: list[float]) -> None:
    method = LOSSES[loss]
    rollout = answers(REWARDS, [0, 0, 0], logp=LOGP, logp__ref=REFERENCE)
    found, slope = value_and_gradient(method, now(LOGP), method.credit(rollout))
    close(found, value, digits=8)
    close(slope, gradient, digits=7)


# --- expectations ------------------------------------------------------------------------------------------------


def expected(
    method: Method, logits: Tensor, law: Sequence[float], rewards: Sequence[float], size: int, reference: Tensor
) -> Tensor:
    """E over all groups drawn from a law of the gradient of the loss in the logits."""
    mean = torch.zeros_like(logits)
    for actions in itertools.product(range(len(law)), repeat=size):
        chance = math.prod(law[a] for a in actions)
        z = logits.clone().requires_grad_()
        logp, those = z.log_softmax(0)[list(actions)], list(actions)
        rollout = answers([rewards[a] for a in those], [0] * size, logp=logp.detach(), logp__ref=reference[those])
        fresh = method.clone()
        value, _ = fresh.loss(Evaluation({"logp": logp}), fresh.credit(fresh.shape_reward(rollout)))
        (gradient,) = torch.autograd.grad(value, z)
        mean += chance * gradient
    return mean


LAW, WORTH = f64([0.7, 0.2, 0.09, 0.01]), [0.0, 0.2, 0.5, 1.0]
POLICY = f64([0.3, -0.2, 0.1, 0.4])


def test_worked_bandit() -> None:
    for loss, gradient in (
        ("best_of_n", [0.21, -0.12, -0.0801, -0.0099]),
        ("negative", [0.315, -0.18, -0.12015, -0.01485]),
    ):
        same(expected(LOSSES[loss], LAW.log(), LAW.tolist(), WORTH, 2, LAW.log()), gradient)


@pytest.mark.parametrize("beta", [0.3, 2.0])
def test_reward_weighting_of_the_reference_is_the_forward_kl(beta: float) -> None:
    method = SCORED | {"advantage": RewardWeighted(beta=beta)}
    weights = LAW * (f64(WORTH) / beta).exp()
    p, total = POLICY.softmax(0), weights.sum()
    same(expected(method, POLICY, LAW.tolist(), WORTH, 1, LAW.log()), total * (p - weights / total))


@pytest.mark.parametrize("beta", [0.3, 2.0])
def test_reinforce_with_a_kl_penalty_is_the_reverse_kl(beta: float) -> None:
    p = POLICY.softmax(0)
    method = SCORED | {"advantage": BatchBaseline("none"), "reward": KLPenalty(beta=beta)}
    target = (LAW.log() + f64(WORTH) / beta).log_softmax(0)
    gap = p.log() - target
    reverse = p * (gap - (p * gap).sum())
    same(expected(method, POLICY, p.tolist(), WORTH, 1, LAW.log()), beta * reverse)


@pytest.mark.parametrize("size", [2, 3])
def test_the_mean_of_the_group_takes_one_part_in_n(size: int) -> None:
    p = POLICY.softmax(0)
    plain = expected(SCORED | {"advantage": BatchBaseline("none")}, POLICY, p.tolist(), WORTH, 1, LAW.log())
    centred = expected(LOSSES["reinforce"], POLICY, p.tolist(), WORTH, size, LAW.log())
    same(centred, plain * (size - 1) / size)
    same(plain, -p * (f64(WORTH) - p @ f64(WORTH)))


# --- what a loss does to answers that were not drawn ------------------------------------------------------------------


def in_logits(loss: str, actions: Sequence[int], method: Method | None = None) -> Tensor:
    """Gradient in the logits of five answers from one drawn group."""
    logits = f64([0.3, -0.2, 0.1, 0.4, -0.6]).requires_grad_()
    logp = logits.log_softmax(0)[list(actions)]
    worth = [[0.1, 0.9, 0.4, 0.3, 0.7][a] for a in actions]
    chosen = method or LOSSES[loss]
    rollout = answers(worth, [0] * len(worth), logp=logp.detach(), logp__ref=[-1.5] * len(worth))
    value, _ = chosen.loss(Evaluation({"logp": logp}), chosen.credit(rollout))
    (found,) = torch.autograd.grad(value, logits)
    return found


@pytest.mark.parametrize("loss", ["dpo", "ipo", "reinforce"])
def test_losses_of_differences_do_not_touch_what_was_not_drawn(loss: str) -> None:
    found = in_logits(loss, [0, 1, 2])
    assert float(found[3:].abs().max()) < 1e-15 < float(found[:3].abs().min())


def test_likelihood_takes_from_what_was_not_drawn_in_proportion() -> None:
    p = f64([0.3, -0.2, 0.1, 0.4, -0.6]).softmax(0)
    same(in_logits("best_of_n", [0, 1, 2])[3:], p[3:])
    # A negative gradient gives part of it back.
    same(in_logits("negative", [0, 1, 2])[3:], p[3:] / 2)
    weights = np.exp(np.array([0.1, 0.9, 0.4]) / 0.5).mean()
    same(in_logits("rwr", [0, 1, 2])[3:], p[3:] * weights)


def test_one_step_changes_odds_as_the_kl_does() -> None:
    """Step eta along either KL: the logits move by eta (q - p), and by eta p (log(q / p) + KL)."""
    p, eta = POLICY.softmax(0), 0.1
    q = (LAW * (f64(WORTH) / 0.5).exp()) / (LAW * (f64(WORTH) / 0.5).exp()).sum()
    z = POLICY.clone().requires_grad_()
    (forward,) = torch.autograd.grad((q * (q.log() - z.log_softmax(0))).sum(), z)
    (reverse,) = torch.autograd.grad((z.softmax(0) * (z.log_softmax(0) - q.log())).sum(), z)
    same(-eta * forward, eta * (q - p))
    gap = (p * (p.log() - q.log())).sum()
    same(-eta * reverse, eta * p * ((q / p).log() + gap))


# --- edges -----------------------------------------------------------------------------------------------------------


def test_equal_rewards() -> None:
    rollout = answers([0.5] * 3, [0] * 3, logp=LOGP, logp__ref=REFERENCE)
    for loss in ("dpo", "ipo", "reinforce"):
        found, slope = value_and_gradient(LOSSES[loss], now(LOGP), LOSSES[loss].credit(rollout))
        assert found == 0 and not bool(slope.any()), loss
    # Best and worst are the same answers; the recipe's filter leaves them out.
    found, slope = value_and_gradient(LOSSES["negative"], now(LOGP), rollout)
    same(found, -0.5 * np.mean(LOGP))
    same(slope, [-0.5 / 3] * 3)
    scored = rollout.with_columns(trajectory={"score": rollout["label"]})
    assert suboptimal_on_policy.filter(scored).n_trajectories == 0


def by_loop(rollout: Rollout, logp: Sequence[float], negative: float) -> float:
    """The loss as it is written, over groups of which some have nobody valid."""
    total, likelihood = 0.0, np.zeros(rollout.n_trajectories)
    np.add.at(likelihood, rollout.trajectory.numpy(), np.where(rollout.mask.numpy(), logp, 0.0))
    label = rollout["label"].tolist()
    for g in range(rollout.n_groups):
        able = [
            i
            for i in range(rollout.n_trajectories)
            if int(rollout.group[i]) == g and not math.isnan(label[i]) and int(rollout.active_lengths[i])
        ]
        if able:
            high, low = max(label[i] for i in able), min(label[i] for i in able)
            total -= np.mean([likelihood[i] for i in able if label[i] == high])
            total += negative * np.mean([likelihood[i] for i in able if label[i] == low])
    return float(total / rollout.n_groups)


@pytest.mark.parametrize("negative", [0.0, 0.5, 1.0])
def test_unequal_groups_ties_invalid_and_masked_answers(negative: float) -> None:
    generator = torch.Generator().manual_seed(3)
    logp = -torch.rand(10, generator=generator, dtype=torch.float64)
    mask = torch.tensor([1, 1, 1, 0, 0, 1, 1, 0, 1, 1], dtype=torch.bool)
    label = f64([1, 0, 3, 1, math.nan, 0, math.nan])
    rollout = Rollout.from_arrays(
        [0, 0, 1, 2, 2, 3, 4, 4, 5, 6], [0, 0, 0, 0, 0, 1, 2], step={"mask": mask}, trajectories={"label": label}
    )
    method = suboptimal_on_policy | {"objective": BestOfN(negative=negative)}
    found, slope = value_and_gradient(method, now(logp), rollout)
    same(found, by_loop(rollout, logp.tolist(), negative))
    # Answer 2 has no trainable step, answers 4 and 6 no label, 5 is alone; 0 and 3 share the best place.
    same(slope[:2], [-1 / 6] * 2)
    same(slope[2], negative / 3)
    same(slope[8], (negative - 1) / 3)
    assert not bool(slope[[3, 4, 6, 7, 9]].any())


def test_an_invalid_reward_has_no_weight() -> None:
    rollout = answers([0.2, math.nan, 0.0], [0] * 3, logp=LOGP)
    same(RewardWeighted(beta=0.5)(rollout), [math.exp(0.4), 0.0, 1.0])


@pytest.mark.parametrize("negative", [-0.1, math.inf, math.nan])
def test_a_share_that_means_nothing_is_refused(negative: float) -> None:
    with pytest.raises(UsageError, match="negative"):
        BestOfN(negative=negative)
    with pytest.raises(UsageError, match="beta"):
        RewardWeighted(beta=-abs(negative))

"""The card of NLPO: the ratio of the masked policy, the controller, the KL reward, what it reduces to, its refresh."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polopt.core.loss import Evaluation
from polopt.core.override import override
from polopt.core.rollout import Rollout
from polopt.methods.base.ppo import GAE, ppo
from polopt.methods.trust_region.nlpo import MaskedSurrogate, ProportionalKL, nlpo
from polopt.objectives.clipped_surrogate import ClippedSurrogate
from polopt.policies.exact import SequenceSpace
from polopt.policies.nucleus import unpack
from polopt.rewards.shaping import KLPenalty
from polopt.rollouts.groups import Groups
from polopt.tasks.problems import Problem, problem
from tests.policies.exact.test_training import make_trainer
from tests.support import close, f64, now, same, value_and_gradient, with_advantage

policy_loss = nlpo | {"objective": MaskedSurrogate()}


def steps(**columns: Any) -> Rollout:
    size = len(next(iter(columns.values())))
    named = {name.replace("__", "/"): f64(value) for name, value in columns.items()}
    return Rollout.from_arrays([0] * size, [0], step=named, trajectories={"reward": f64([0.0])})


# --- worked examples -------------------------------------------------------------------------------------------------


def test_worked_example_of_the_policy_loss() -> None:
    old = f64([-0.9, -1.1, -0.4, -2.0])
    rollout = steps(masked_logp=old, logp=old - 0.7)
    rollout = with_advantage(rollout, rollout.whiten(f64([1, 0.5, -0.2, -0.3])))
    evaluation = now([-9.0] * 4, masked_logp=old + f64([0.3, -0.1, 0.05, 0.4]))
    loss, gradient = value_and_gradient(policy_loss, evaluation, rollout, "masked_logp")
    close(loss, 0.0681756396, digits=8)
    close(gradient, [0, -0.092145, 0.192703, 0.334227])


def test_worked_example_of_the_controller() -> None:
    for kl, expected in ((0.2, 0.102), (0.0, 0.098), (0.101, 0.1001)):
        for trajectories in (1.0, 4096.0):  # the size of an iteration does not matter
            made = ProportionalKL().__class__()({"kl": kl, "trajectories": trajectories})
            assert made == {"reward.beta": pytest.approx(expected, abs=1e-12)}


def test_the_controller_compounds_and_waits_for_a_kl() -> None:
    part = ProportionalKL(target=0.5, initial=0.2)
    assert part({}) == {"reward.beta": 0.2}
    first = part({"kl": 0.55, "trajectories": 8.0})["reward.beta"]
    second = part({"kl": 5.0, "trajectories": 8.0})["reward.beta"]
    assert first == pytest.approx(0.2 * 1.01) and second == pytest.approx(0.2 * 1.01 * 1.02)


def test_worked_example_of_the_kl_reward() -> None:
    """Without mask on either side, whatever the masked log-probs are."""
    rollout = steps(logp=[-1.0, -0.5], masked_logp=[-0.4, -0.1], logp__ref=[-1.2, -0.4])
    made = KLPenalty(beta=0.1)(rollout)["step_reward"]
    close(made, [-0.02, 0.01], digits=12)
    assert nlpo.reward == KLPenalty(beta=0.1)


# --- the objective ---------------------------------------------------------------------------------------------------


def test_the_ratio_is_of_the_masked_policy_only() -> None:
    generator = torch.Generator().manual_seed(0)
    old, new, plain = (-torch.rand(9, generator=generator, dtype=torch.float64) for _ in range(3))
    advantage = torch.randn(9, generator=generator, dtype=torch.float64)
    rollout = with_advantage(steps(masked_logp=old, logp=plain), advantage)
    evaluation = now(plain + 3.0, masked_logp=new)
    found, gradient = value_and_gradient(policy_loss, evaluation, rollout, "masked_logp")
    ratio = np.exp((new - old).numpy())
    gain = np.minimum(ratio * advantage.numpy(), np.clip(ratio, 0.8, 1.2) * advantage.numpy())
    same(found, -gain.mean())
    inside = np.where(advantage.numpy() > 0, ratio <= 1.2, ratio >= 0.8)
    same(gradient, -(inside * ratio * advantage.numpy()) / 9)
    loss, _ = policy_loss.loss(evaluation, rollout)
    (of_plain,) = torch.autograd.grad(loss, evaluation["logp"], allow_unused=True)
    assert of_plain is None


def world(seed: int = 0) -> Problem:
    return problem("random-rewards", batch=2, seed=seed, space=SequenceSpace(6, 3))


def collected(method: Any, made: Problem, prepare: Any = lambda policy: None) -> tuple[Any, Rollout]:
    """A credited rollout of the method, and the policy after it has moved a little."""
    from polopt.claims.exact import credited, scored

    policy = made.policy()
    policy.add_critic()
    policy.add_model("mask")
    prepare(policy)
    requests = [type(r)(r.example, 30) for r in made.requests()]
    rollout = credited(method, policy, scored(made, method.rollout(policy, requests, limit=3, seed=1)))
    with torch.no_grad():
        policy.logits.add_(0.3 * torch.randn(policy.logits.shape, generator=torch.Generator().manual_seed(1)))
    return policy, rollout


@pytest.mark.parametrize("everything", [{"rollout.nucleus_p": 1.0}, {"rollout.nucleus_min": 6}])
def test_without_a_mask_it_is_ppo(everything: dict[str, Any]) -> None:
    plain = nlpo | {"rollout": Groups(), "objective": ppo.objective}
    loose = override(nlpo, everything)
    gradients = []
    for method in (
        loose | {"objective": MaskedSurrogate()},
        plain | {"objective": ClippedSurrogate()},
    ):
        policy, rollout = collected(method, world())
        loss, _ = method.loss(policy.evaluate(rollout, method.evaluates), rollout)
        gradients.append(torch.autograd.grad(loss, policy.logits)[0])
    same(gradients[0], gradients[1])
    assert gradients[0].any()


def test_exactly_no_gradient_outside_the_mask() -> None:
    method = override(nlpo, {"rollout.nucleus_p": 0.5})
    policy, rollout = collected(method, world())
    loss, _ = method.loss(policy.evaluate(rollout, method.evaluates), rollout)
    (gradient,) = torch.autograd.grad(loss, policy.logits)
    payload: Any = rollout.payload
    kept = torch.zeros_like(gradient, dtype=torch.bool)
    kept[payload.step_problem, payload.nodes] = unpack(rollout["kept"], 6)
    assert (gradient[~kept] == 0).all() and (gradient[kept] != 0).any()


def test_the_first_update_has_ratio_one() -> None:
    made = world()
    policy = made.policy()
    policy.add_critic()
    policy.add_model("mask")
    rollout = Groups(nucleus_of="mask", nucleus_p=0.4)(policy, made.requests(), limit=3, seed=0)
    found = policy.evaluate(rollout, frozenset({"masked_logp"}))["masked_logp"]
    same(found.detach(), rollout["masked_logp"], rtol=1e-12)


def test_masked_steps_and_invalid_rewards_teach_nothing() -> None:
    rollout = steps(
        masked_logp=[-1.0, -2.0, -0.5], logp=[-1.0, -2.0, -0.5], value=[0.1, 0.2, 0.3], step_reward=[0.0] * 3
    )
    rollout = rollout.with_columns(step={"mask": torch.tensor([True, False, True])})
    masked = with_advantage(rollout, [1.0, 5.0, -1.0])
    evaluation = now([0.0] * 3, masked_logp=[-1.1, torch.nan, -0.4])
    loss, gradient = value_and_gradient(policy_loss, evaluation, masked, "masked_logp")
    assert np.isfinite(loss) and gradient[1] == 0 and gradient[0] != 0
    invalid = rollout.with_columns(trajectory={"reward": f64([torch.nan])})
    assert not GAE(gamma=0.99)(invalid)["advantage"].any()


def test_the_value_loss_has_the_coefficient_of_the_code() -> None:
    """c_v MSE with c_v = 0.5."""
    value_only = nlpo | {"objective": nlpo.objective.parts[1]}
    rollout = steps(logp=[-1.0, -1.0], value=[0.0, 0.0], **{"return": [1.0, 3.0]})
    loss, _ = value_only.loss(Evaluation({"logp": f64([-1.0, -1.0]), "value": f64([0.5, 0.5])}), rollout)
    same(loss, 0.5 * (0.25 + 6.25) / 2)


# --- the mask policy in training -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("every", "expected"), [(1, [0, 1, 2, 3, 4]), (2, [0, 0, 2, 2, 4]), (None, [0] * 5)])
def test_the_mask_policy_is_the_policy_of_every_mu_th_iteration(
    every: int | None, expected: list[int], tmp_path: Path
) -> None:
    made = world()
    trainer = make_trainer(tmp_path, made, "nlpo", steps=5)
    trainer.method = override(trainer.method, {"models.mask.every": every})
    policy: Any = trainer.policy
    tables, found = [], []
    for _ in range(5):
        tables.append(policy.table().detach().clone())
        trainer.step()
        found.append(next(i for i, table in enumerate(tables) if torch.equal(table, policy.model("mask"))))
    assert found == expected
    assert torch.equal(policy.model("ref"), tables[0])


def test_training_raises_the_reward_within_the_mask(tmp_path: Path) -> None:
    made = world(seed=3)
    trainer = make_trainer(tmp_path, made, "nlpo", steps=20)
    policy: Any = trainer.policy

    def reward() -> float:
        with torch.no_grad():
            return float((policy.probabilities() * made.reward).sum(-1).mean())

    before = reward()
    trainer.train()
    assert reward() > before + 0.3 and trainer.rejected == 0
    # Beta follows the KL, and is saved with the run.
    assert trainer.controlled["reward.beta"] != 0.1

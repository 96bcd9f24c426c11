"""The card of RTO: worked example, what the token rewards sum to, bounds, the DPO model that a run trains itself."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from polopt.claims.exact import start
from polopt.core.errors import UsageError
from polopt.core.method import Method
from polopt.core.override import override
from polopt.core.rollout import Rollout
from polopt.methods.base.ppo import GAE, ppo
from polopt.methods.preference.dpo import dpo
from polopt.methods.preference.rto import DPOTrained, TokenReward, rto
from polopt.models import Snapshot
from polopt.policies.exact import SequenceSpace
from polopt.tasks.preferences import labelled
from polopt.tasks.problems import Problem, problem
from tests.support import close, f64, now, same, value_and_gradient

IDS = [0, 0, 0, 1, 1]
OLD = [-0.5, -1, -0.2, -0.7, -0.4]
REF = [-0.7, -1.1, -0.4, -0.5, -0.9]
TEACHER = [-0.3, -3, -0.3, -0.1, -0.6]
VALUE = [0.2, 0.1, 0, -0.1, 0.3]


def card(reward: Any = (1.5, -0.5), **step: Any) -> Rollout:
    columns = {"logp": f64(OLD), "logp/ref": f64(REF), "logp/dpo": f64(TEACHER), "value": f64(VALUE), **step}
    return Rollout.from_arrays(IDS, [0, 1], step=columns, trajectories={"reward": f64(reward)})


def step_rewards(method: Method, rollout: Rollout | None = None) -> Tensor:
    """What every step is rewarded with, the sentence's reward on the last one included."""
    shaped = method.shape_reward(card() if rollout is None else rollout)
    found = shaped["step_reward"].clone()
    found[[2, 4]] += shaped.reward
    return found


def test_worked_example() -> None:
    close(step_rewards(rto), [0.018, -0.051, 1.503, 0.022, -0.49], digits=9)
    raw = (rto | {"advantage": GAE(whiten=False)}).credit(rto.shape_reward(card()))
    close(raw.advantage, [1.1310075, 1.27685, 1.503, -0.3285, -0.79], digits=7)
    close(raw["return"], [1.3310075, 1.37685, 1.503, -0.4285, -0.49], digits=7)
    rollout = rto.credit(rto.shape_reward(card()))
    close(rollout.advantage, [0.61445241, 0.77097231, 1.01367917, -0.95190831, -1.44719558], digits=7)
    surrogate = rto | {"objective": rto.objective.parts[0]}
    loss, gradient = value_and_gradient(surrogate, now(f64(OLD) + f64([0, 0.3, -0.3, 0.1, 0.3])), rollout)
    close(loss, 0.36962090642, digits=7)
    close(gradient, [-0.10240874, 0, -0.12515867, 0.26300535, 0.48837742], digits=7)


def test_without_token_rewards_it_is_ppo_with_a_kl_penalty() -> None:
    plain = override(rto, {"reward.token-reward.beta": 0.0})
    penalised = override(ppo, {"reward.beta": 0.01})
    same(step_rewards(plain), step_rewards(penalised))
    assert "logp/dpo" not in plain.needs and "dpo" not in plain.models_in_use


def test_unclipped_token_rewards_telescope() -> None:
    part = TokenReward(beta=0.3, bound=0.0)
    found = part(card()).sum_steps(part(card())["step_reward"])
    same(found, [0.3 * (sum(TEACHER[:3]) - sum(REF[:3])), 0.3 * (sum(TEACHER[3:]) - sum(REF[3:]))])


def test_equal_weights_cancel_the_reference() -> None:
    beta = 0.4
    fields = {"reward.token-reward.beta": beta, "reward.token-reward.bound": 0.0, "reward.kl-penalty.beta": beta}
    method = override(rto, fields)
    expected = [beta * (t - o) for t, o in zip(TEACHER, OLD, strict=True)]
    same(step_rewards(method, card((0.0, 0.0))), expected)
    moved = card((0.0, 0.0), **{"logp/ref": f64([-2.0, -0.1, -1.0, -3.0, -0.2])})
    same(step_rewards(method, moved), expected)


@pytest.mark.parametrize("seed", range(3))
def test_an_exact_dpo_optimum_orders_policies_as_the_reward_does(seed: int) -> None:
    """beta log pi_dpo/pi_ref = r - const for pi_dpo ~ pi_ref exp(r / beta): differences of answers are those of r."""
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(-1)
    reward, beta = torch.randn(6, generator=generator, dtype=torch.float64), 0.2
    optimum = (reference + reward / beta).log_softmax(-1)
    columns = {"logp": reference, "logp/ref": reference, "logp/dpo": optimum}
    rollout = Rollout.from_arrays(range(6), [0] * 6, step=columns, trajectories={"reward": torch.zeros(6).double()})
    found = TokenReward(beta=beta, bound=0.0)(rollout)["step_reward"]
    same(found - found[0], reward - reward[0])


@pytest.mark.parametrize("bound", [0.05, 0.3])
def test_scale_comes_before_the_clip_and_bounds_hold(bound: float) -> None:
    part = TokenReward(beta=0.5, bound=bound)
    found = part(card())["step_reward"]
    same(found, [min(max(0.5 * (t - r), -bound), bound) for t, r in zip(TEACHER, REF, strict=True)])
    assert found.abs().max() <= bound
    far = step_rewards(rto, card((400.0, -400.0)))
    penalty = [0.01 * (o - r) for o, r in zip(OLD, REF, strict=True)]
    for i, places in enumerate(((0, 1, 2), (3, 4))):
        total = float(far[list(places)].sum()) + sum(penalty[t] for t in places)
        assert abs(total) <= 0.05 * len(places) + 10
        assert math.copysign(1, total) == (1, -1)[i]


def test_masked_steps_and_invalid_rewards() -> None:
    mask = torch.tensor([True, False, True, True, True])
    spoilt = f64(TEACHER).clone()
    spoilt[1] = torch.nan
    found = rto.shape_reward(card(mask=mask, **{"logp/dpo": spoilt}))
    assert found["step_reward"][1] == 0
    same(found["step_reward"][[0, 2]], [0.02 - 0.002, 0.005 - 0.002])
    credited = rto.credit(rto.shape_reward(card((math.nan, 1.0))))
    assert (credited.advantage[:3] == 0).all() and (credited.advantage[3:] != 0).any()


def test_a_negative_bound_is_refused() -> None:
    with pytest.raises(UsageError, match="bound must be at least 0"):
        TokenReward(bound=-0.1)


# --- the model that DPO trains ----------------------------------------------------------------------------------------

STEPS = 5


def world() -> Problem:
    return problem("noisy-preferences", space=SequenceSpace(3, 2), batch=3, seed=0)


@pytest.mark.parametrize("pairs", ["data", "on-policy"])
def test_the_run_first_trains_the_model_from_its_start(pairs: str) -> None:
    """The model is what the same DPO run ends at; policy, version and optimizer are at their start again."""
    made = world()
    pool = labelled(made, 12, seed=1)
    own = DPOTrained(steps=STEPS, beta=0.3, pairs=pairs)  # type: ignore[arg-type]
    method = rto | {"models": {"ref": Snapshot(), "dpo": own}}
    assert own.recipe is not None
    assert method.reads_answers == (pairs == "data")
    alone = start(made, own.recipe, seed=8, group=4, prompts=6, examples=pool)
    for _ in range(STEPS):
        alone.step()
    run = start(made, method, seed=7, group=4, prompts=6, examples=pool)
    before = run.policy.logits.detach().clone()
    run.trainer._refresh_models()
    assert torch.equal(run.policy.logits, before) and run.policy.version == 0
    assert not run.trainer.optimizer.state
    same(run.policy.model("dpo"), alone.policy.logits, rtol=0, atol=0)
    assert not torch.equal(run.policy.model("dpo"), before)
    same(run.policy.model("ref"), before)
    spent = run.trainer.meter.spent
    assert (spent.steps, spent.rollouts) == (0, alone.trainer.meter.spent.rollouts) and spent.rollouts > 0
    frozen = run.policy.model("dpo").clone()
    for _ in range(2):
        run.step()
    assert torch.equal(run.policy.model("dpo"), frozen), "it is trained once"
    assert not torch.equal(run.policy.logits, before) and run.trainer.iteration == 2


def test_a_resumed_run_keeps_the_trained_model() -> None:
    made = world()
    method = rto | {"models": {"ref": Snapshot(), "dpo": DPOTrained(steps=STEPS)}}
    first = start(made, method, seed=7, group=4)
    first.step()
    state = first.policy.state_dict()
    second = start(made, method, seed=7, group=4)
    second.policy.load_state_dict(state)
    second.trainer.iteration = 1
    second.trainer._refresh_models()
    assert torch.equal(second.policy.model("dpo"), first.policy.model("dpo"))


def test_a_folder_takes_the_place_of_training(tmp_path: Path) -> None:
    made = world()
    teacher = made.policy()
    with torch.no_grad():
        teacher.logits.add_(1.5 * torch.randn(teacher.logits.shape, generator=torch.Generator().manual_seed(3)))
    teacher.save(tmp_path / "model")
    method = override(rto, {"models.dpo.folder": str(tmp_path / "model")})
    assert method.models["dpo"].recipe is None and not method.reads_answers
    run = start(made, method, seed=0, group=4)
    run.step()
    same(run.policy.model("dpo"), teacher.logits)


def test_what_it_declares() -> None:
    assert rto.unit == "trajectory"
    assert set(rto.models_in_use) == {"ref", "dpo"}
    assert rto.models["dpo"].recipe.offline is False and rto.models["dpo"].recipe.objective == dpo.objective
    assert (rto.schedule.epochs, rto.schedule.minibatches) == (1, 8)

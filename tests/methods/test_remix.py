"""The card of ReMix: the clip around the present iterate, the convex anchor, its schedule, reincarnation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from polopt.aggregations import TokenMean
from polopt.claims.exact import start
from polopt.core.override import override
from polopt.core.rollout import Rollout, Source
from polopt.methods.trust_region.remix import MixedClip, Reincarnation, remix
from polopt.objectives.clipped_surrogate import ClippedSurrogate
from polopt.regularizers.kl import KL
from polopt.rollouts.replay import Replay
from polopt.tasks.problems import problem
from tests.support import OLD, REF, close, f64, now, same, value_and_gradient, with_advantage, worked

ITERATE = [-0.5, -1.0, -0.2, -0.7, -1.5, -0.8, -1.5, -0.9, -0.4, -1.2]
MOVE = [0.3, -0.1, 0.05, 0.4, -0.5, 0.0, 0.3, -0.45, 0.1, -0.05]
NEW = [a + b for a, b in zip(ITERATE, MOVE, strict=True)]
ADVANTAGE = [1.0, 1.0, 1.0, -1.0, -1.0, 0.5, 0.5, -0.5, -0.5, -0.5]
MIXED = remix | {"regularizer": None}


def example(iterate: Any = ITERATE) -> Rollout:
    return with_advantage(worked(logp__start=iterate, logp__base=REF), ADVANTAGE)


def random_example(seed: int) -> tuple[Rollout, torch.Tensor]:
    generator = np.random.default_rng(seed)
    iterate = f64(OLD) + f64(generator.normal(size=10))
    rollout = with_advantage(worked(logp__start=iterate), generator.normal(size=10).tolist())
    return rollout, iterate + f64(0.3 * generator.normal(size=10))


# --- the clip ---------------------------------------------------------------------------------------------------------


def test_worked_example() -> None:
    value, slope = value_and_gradient(MIXED, now(NEW), example())
    close(value, -0.0501970340, digits=10)
    close(slope, [0, -0.090484, -0.105127, 0.149182, 0, -0.030327, 0, 0, 0.091106, 0.047561])


@pytest.mark.parametrize("seed", range(5))
def test_it_is_the_iterates_own_clip_times_the_centre(seed: int) -> None:
    """c min(rho A, clip(rho, 1 - eps/c, 1 + eps/c) A), rho = pi / pi_k."""
    rollout, new = random_example(seed)
    centre = np.exp(rollout["logp/start"].numpy() - np.array(OLD))
    rho, advantage = np.exp((new - rollout["logp/start"]).numpy()), rollout.advantage.numpy()
    clipped = np.clip(rho, 1 - 0.2 / centre, 1 + 0.2 / centre)
    expected = -centre * np.minimum(rho * advantage, clipped * advantage)
    same(MixedClip()(now(new), rollout).value.detach(), expected)
    assert (clipped != rho).any() and (clipped == rho).any()


@pytest.mark.parametrize("seed", range(5))
def test_fresh_data_give_the_clip_of_ppo(seed: int) -> None:
    rollout, _ = random_example(seed)
    fresh = rollout.with_columns(step={"logp/start": rollout.logp})
    new = rollout.logp + 0.3 * torch.randn(10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ours, ppo = MixedClip()(now(new), fresh), ClippedSurrogate()(now(new), fresh)
    same(ours.value.detach(), ppo.value.detach())
    same(ours.metrics["clip_ratio/region_mean"], ppo.metrics["clip_ratio/region_mean"])


def test_nothing_is_clipped_at_the_start_of_an_iteration_however_old_the_data() -> None:
    far = [a + b for a, b in zip(OLD, [0.9, -2.0, 3.0, -0.5, 1.0, -1.0, 0.4, 2.0, -3.0, 0.1], strict=True)]
    _, slope = value_and_gradient(MIXED, now(far), example(far))
    centre = np.exp(np.array(far) - np.array(OLD))
    same(slope, -centre * np.array(ADVANTAGE) / 10)
    # The clip around 1 has dropped most of them already.
    around = MIXED | {"objective": ClippedSurrogate()}
    _, dropped = value_and_gradient(around, now(far), example(far))
    assert int((dropped == 0).sum()) >= 4


def test_masked_steps_are_nothing() -> None:
    mask = torch.tensor([True] * 8 + [False] * 2)
    rollout = example().with_columns(step={"mask": mask, "logp/start": f64([*ITERATE[:8], torch.nan, torch.nan])})
    value, slope = value_and_gradient(MIXED, now(NEW), rollout)
    _, whole = value_and_gradient(MIXED, now(NEW), example())
    assert np.isfinite(value) and slope[8:].tolist() == [0, 0]
    same(slope[:8] * 8, whole[:8] * 10)


# --- the anchor -------------------------------------------------------------------------------------------------------


def anchored(beta: float, lam: float) -> Any:
    coefficients = override(remix, Reincarnation(beta=beta)({})).regularizer
    assert [part.model for part in coefficients.parts[:2]] == ["base", "start"]
    return remix | {"regularizer": KL(lam * beta, model="base") + KL((1 - lam) * beta, model="start")}


def only_anchor(lam: float, new: Any, rollout: Rollout) -> float:
    """(1/N) sum_t of the convex KL."""
    still = rollout.with_columns(step={"advantage": torch.zeros(rollout.n_steps, dtype=torch.float64)})
    return value_and_gradient(anchored(1.0, lam), now(new), still)[0]


def test_worked_example_of_the_anchor() -> None:
    close(only_anchor(0.8, NEW, example()), 0.1309742307, digits=10)


def test_the_anchor_is_linear_in_lambda_and_vanishes_where_all_policies_agree() -> None:
    ends = [only_anchor(lam, NEW, example()) for lam in (0.0, 1.0)]
    base = TokenMean()(KL(1.0, model="base")(now(NEW), example()).value, example())
    same(ends[1], base.detach())
    assert ends[0] != ends[1]
    for lam in (0.25, 0.5, 0.9):
        same(only_anchor(lam, NEW, example()), (1 - lam) * ends[0] + lam * ends[1])
    assert only_anchor(0.5, REF, example(REF)) == 0
    assert min(only_anchor(0.5, REF, example()), only_anchor(0.5, ITERATE, example())) > 0


def test_beta_scales_it_and_zero_reads_nothing_of_it() -> None:
    one, none = (value_and_gradient(anchored(beta, 0.8), now(NEW), example())[0] for beta in (1.0, 0.0))
    half, _ = value_and_gradient(anchored(0.5, 0.8), now(NEW), example())
    same(half - none, (one - none) / 2)


# --- the phases -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("iteration", "lam"), [(1, 1), (50, 1), (51, 0.9), (60, 0.9), (61, 0.8), (71, 0.7), (91, 0.5), (500, 0.5)]
)
def test_the_schedule_of_lambda(iteration: int, lam: float) -> None:
    found = Reincarnation()({} if iteration == 1 else {"iteration": iteration - 1.0})
    assert found["regularizer.0.beta"] == pytest.approx(0.001 * lam)
    assert found["regularizer.1.beta"] == pytest.approx(0.001 * (1 - lam))


def test_after_the_switch_there_is_neither_replay_nor_reuse() -> None:
    part = Reincarnation(switch=3)
    found = [part({"iteration": float(done)}) for done in range(5)]
    assert [(each["rollout.share"], each["schedule.epochs"]) for each in found] == [(0.4, 2)] * 3 + [(0.0, 1)] * 2
    assert all(each["models.base.at"] == 3 for each in found)


def test_a_run_changes_its_phase_and_its_base() -> None:
    method = remix | {"controller": Reincarnation(switch=4)}
    run = start(problem("multi-step", batch=5, seed=0), method, seed=0, group=4)
    batches: list[Any] = []
    collect = run.trainer.collect
    run.trainer.collect = lambda *a: batches.append(collect(*a)) or batches[-1]  # type: ignore[assignment, func-returns-value]
    initial = run.policy.logits.detach().clone()
    versions, at_switch = [], initial
    for iteration in range(7):
        if iteration == 4:
            at_switch = run.policy.logits.detach().clone()
        run.step()
        versions.append(run.policy.version)
    replayed = [int((batch.kept["source"] == Source.REPLAY).sum()) for batch in batches]
    # 0.4 of 5 groups of 4; nothing to replay at first, nothing replayed after the switch.
    assert replayed == [0, 8, 8, 8, 0, 0, 0]
    # In the first iteration the method's own schedule holds: the controller speaks after it.
    assert np.diff([0, *versions]).tolist() == [2, 2, 2, 2, 1, 1, 1]
    kept = batches[-1].kept
    base = run.policy.logits.detach().clone()
    with torch.no_grad():
        run.policy.logits.copy_(at_switch)
        same(run.policy.evaluate(kept, frozenset({"logp"})).logp, kept["logp/base"])
        run.policy.logits.copy_(initial)
        same(run.policy.evaluate(batches[3].kept, frozenset({"logp"})).logp, batches[3].kept["logp/base"])
        run.policy.logits.copy_(base)
    assert run.trainer.method.rollout.past is None
    # Everything is on policy: c = 1, and the clip is that of PPO around the sampler.
    assert torch.equal(kept["logp/start"], kept.logp)
    assert run.metrics["controller/regularizer.0.beta"] == 0.001 and run.metrics["controller/regularizer.1.beta"] == 0


def test_the_ratio_of_replayed_data_starts_at_the_centre() -> None:
    run = start(problem("multi-step", batch=5, seed=0), remix, seed=0, group=4)
    clipped = []
    for _ in range(6):
        run.step()
        clipped.append(run.metrics["clip_ratio/region_mean"])
    assert run.metrics["policy/logp_difference_max"] > 0.2 and max(clipped) < 0.5


def test_what_the_method_is() -> None:
    assert isinstance(remix.rollout, Replay) and (remix.rollout.share, remix.rollout.window) == (0.4, 2)
    controller = remix.controller
    assert (controller.share, controller.updates) == (remix.rollout.share, remix.schedule.epochs)
    assert remix.models["base"].at == controller.switch == 50
    assert set(remix.models_in_use) == {"base"} and remix.objective.width == 0.2

"""The card of TGDPO: worked example, what it reduces to, its two stages and a guide from a folder."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from polopt.claims.exact import Run, start
from polopt.core.errors import UsageError
from polopt.core.method import Method
from polopt.core.override import override
from polopt.core.rollout import Rollout
from polopt.methods.preference.dpo import DPO, dpo
from polopt.methods.preference.tgdpo import TokenGuidedDPO, tgdpo
from polopt.models import Snapshot
from polopt.policies.exact import ExactPolicy, SequenceSpace
from polopt.tasks.preferences import labelled
from polopt.tasks.problems import problem
from tests.methods.test_dpo import LENGTHS, POLICY, REFERENCE
from tests.methods.test_dpo import card as dpo_card
from tests.support import close, f64, now, same, value_and_gradient

GUIDE = [-0.3, -1.5, -0.2, -1.0, -0.9, -0.2, -0.9, -1.6, -0.3, -0.8, -1.0]
FACTORS = [1.08, 0.88, 1.04, 1.08, 0.94, 1.06, 0.92, 1.12, 0.96, 0.96, 1.08]


def card(guide: Any = GUIDE, labels: Any = (1, 0, 1, 0), groups: Any = (0, 0, 1, 1)) -> Rollout:
    return dpo_card(labels, groups).with_columns(step={"logp/guide": f64(guide)})


def ours(rollout: Rollout | None = None, logp: Any = POLICY, **fields: Any) -> tuple[float, Tensor]:
    method = tgdpo | {"objective": TokenGuidedDPO(**{"alpha": 2.0, **fields})}
    return value_and_gradient(method, now(logp), card() if rollout is None else rollout)


def plain(rollout: Rollout | None = None, beta: float = 0.1) -> tuple[float, Tensor]:
    return value_and_gradient(
        dpo | {"objective": DPO(beta=beta)}, now(POLICY), dpo_card() if rollout is None else rollout
    )


def by_hand(
    groups: list[list[tuple[int, int]]], alpha: float, beta: float, logp: Any = POLICY, guide: Any = GUIDE
) -> float:
    """Pair by pair and step by step."""
    starts = np.cumsum([0, *LENGTHS])
    total = 0.0
    for pairs in groups:
        terms = []
        for pair in pairs:
            h = 0.0
            for i, sign in zip(pair, (1, -1), strict=True):
                for t in range(starts[i], starts[i + 1]):
                    f = 1 + sign * alpha * beta * (guide[t] - REFERENCE[t])
                    h += sign * beta * f * (logp[t] - REFERENCE[t])
            terms.append(math.log1p(math.exp(-h)))
        total += float(np.mean(terms)) if terms else 0.0
    return total / len(groups)


def test_worked_example() -> None:
    objective = TokenGuidedDPO(alpha=2.0)
    up, down = objective.factor(card(), 1), objective.factor(card(), -1)
    winner = torch.tensor([True] * 3 + [False] * 2 + [True] * 2 + [False] * 4)
    close(torch.where(winner, up, down), FACTORS, digits=9)
    loss, gradient = ours()
    close(loss, 0.6713030424, digits=10)
    close(gradient[:4], [-0.02600146, -0.02118637, -0.02503844, 0.02600146], digits=8)
    # All other steps, by the equation: -+ beta f sigma(-h) / 2.
    slope = [0.1 * f / (1 + math.exp(h)) / 2 for f, h in zip(FACTORS, [0.074] * 5 + [0.0148] * 6, strict=True)]
    close(gradient, torch.where(winner, -f64(slope), f64(slope)), digits=9)


@pytest.mark.parametrize("seed", range(3))
def test_random_pairs_step_by_step(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logp, guide = -2 * rng.random(11), -2 * rng.random(11)
    loss, _ = ours(card(guide), logp, alpha=1.7, beta=0.6)
    same(loss, by_hand([[(0, 1)], [(2, 3)]], 1.7, 0.6, logp, guide))


def test_without_guidance_it_is_dpo() -> None:
    for rollout, alpha in ((card(), 0.0), (card(REFERENCE), 3.0)):
        loss, gradient = ours(rollout, alpha=alpha)
        same(loss, plain()[0])
        same(gradient, plain()[1])
    # At the reference the loss knows no guide, its gradient does.
    loss, gradient = ours(logp=REFERENCE)
    same(loss, math.log(2))
    winner = torch.tensor([1.0] * 3 + [-1.0] * 2 + [1.0] * 2 + [-1.0] * 4, dtype=torch.float64)
    same(gradient, -0.025 * winner * f64(FACTORS))


def test_steps_of_an_answer_learn_in_proportion_to_their_factors() -> None:
    gradient, starts = ours()[1], [0, *np.cumsum(LENGTHS)]
    for i in range(4):
        own = slice(starts[i], starts[i + 1])
        close(gradient[own] / gradient[starts[i]], f64(FACTORS[own]) / FACTORS[starts[i]], digits=9)


def test_the_factors_are_constants_of_the_role() -> None:
    """Labels swapped: h is not -h, for a winner's factor is not a loser's."""
    one, other = ours()[0], ours(card(labels=(0, 1, 0, 1)))[0]
    same(other, by_hand([[(1, 0)], [(3, 2)]], 2.0, 0.1))
    opposite = np.mean([math.log1p(math.exp(h)) for h in (0.074, 0.0148)])
    assert abs(other - float(opposite)) > 1e-4 and abs(one - other) > 1e-3
    # Without guidance it is.
    swapped = ours(card(REFERENCE, labels=(0, 1, 0, 1)))[0]
    same(swapped, np.mean([math.log1p(math.exp(h)) for h in (0.07, 0.01)]))


def test_an_answer_of_a_list_has_both_roles() -> None:
    pairs = [(2, 0), (2, 1), (2, 3), (0, 1), (3, 1), (3, 0)]
    same(ours(card(labels=(0.3, 0.1, 0.9, 0.6), groups=(0, 0, 0, 0)))[0], by_hand([pairs], 2.0, 0.1))


def test_what_cannot_be_compared_adds_nothing() -> None:
    same(ours(card(labels=(1, 0, 1, 1), groups=(0, 0, 1, 2)))[0], by_hand([[(0, 1)], [], []], 2.0, 0.1))
    loss, gradient = ours(card(labels=(1, 0, torch.nan, 0)))
    same(loss, by_hand([[(0, 1)], []], 2.0, 0.1))
    assert bool((gradient[5:] == 0).all())
    assert ours(card(labels=(1, 1, 0, 0)))[0] == 0.0


def test_a_masked_step_does_not_count_whatever_the_guide_says_there() -> None:
    mask = torch.ones(11, dtype=torch.bool)
    mask[[1, 8]] = False
    guide = f64(GUIDE).masked_fill(~mask, torch.nan)
    logp = np.where(mask.numpy(), POLICY, REFERENCE)
    loss, gradient = ours(card(guide).with_columns(step={"mask": mask}))
    same(loss, by_hand([[(0, 1)], [(2, 3)]], 2.0, 0.1, logp))
    assert bool((gradient[~mask] == 0).all()) and bool((gradient[mask] != 0).all())


def test_negative_factors_are_told_and_can_be_held() -> None:
    """alpha = 10: 1 - 0.6 on the second step; alpha = 20: -0.2."""
    _, metrics = (tgdpo | {"objective": TokenGuidedDPO(alpha=20.0)}).loss(now(POLICY), card())
    factors = 1 + 10 * (f64(FACTORS) - 1)
    close(metrics["factor/least"], (float(factors[:5].min()) + float(factors[5:].min())) / 2, digits=9)
    close(metrics["factor/negative"], (1 / 3 + 0) / 2 / 2, digits=7)
    held = ours(alpha=20.0, floor=0.0)[1]
    free = ours(alpha=20.0)[1]
    assert float(free[1]) > 0 and float(held[1]) == 0.0
    held = ours(alpha=20.0, floor=0.5)[1]
    close(held[1] / held[0], 0.5 / float(factors[0]), digits=9)


# --- where the guide comes from -------------------------------------------------------------------------------------

SPACE = SequenceSpace(3, 3)


def run_of(method: Method, *, lr: float = 0.1) -> Run:
    made = problem("random-rewards", space=SPACE, batch=2, seed=3)
    return start(made, method, seed=0, lr=lr, examples=labelled(made, 12, scale=2.0, seed=1))


def two_stages(at: int, alpha: float = 2.0) -> Method:
    return override(tgdpo, {"models.guide.at": at, "objective.alpha": alpha})


def test_the_first_stage_is_dpo_and_the_second_begins_at_the_start() -> None:
    run, teacher = run_of(two_stages(3)), run_of(dpo)
    initial = run.policy.logits.detach().clone()
    for _ in range(3):
        run.step()
        teacher.step()
        same(run.policy.logits.detach(), teacher.policy.logits.detach())
    assert float((run.policy.logits.detach() - initial).abs().max()) > 0.1
    run.step()
    # The guide is what DPO made; one update of Adam from the start moves no logit by more than its rate.
    same(run.policy.model("guide"), teacher.policy.logits.detach())
    same(run.policy.model("ref"), initial)
    assert float((run.policy.logits.detach() - initial).abs().max()) < 0.1001
    assert run.metrics["factor/least"] < 1


def test_two_stages_are_two_runs(tmp_path: Path) -> None:
    """Parameters and moments alike: DPO saved to a folder, then TGDPO with the guide of that folder."""
    teacher = run_of(dpo)
    for _ in range(3):
        teacher.step()
    teacher.policy.save(tmp_path / "guide")
    given = run_of(override(tgdpo, {"models.guide.folder": str(tmp_path / "guide"), "objective.alpha": 2.0}))
    run = run_of(two_stages(3))
    for _ in range(3):
        run.step()
    for _ in range(4):
        given.step()
        run.step()
    assert given.metrics["factor/least"] < 1
    # The order of the pairs differs with the seed's state; every update sees them all.
    same(given.policy.logits, run.policy.logits, rtol=1e-7, atol=1e-9)


def test_without_guidance_the_second_stage_repeats_the_first() -> None:
    run, teacher = run_of(two_stages(2, alpha=0.0)), run_of(dpo)
    for _ in range(2):
        run.step()
        teacher.step()
    first = teacher.policy.logits.detach().clone()
    for _ in range(2):
        run.step()
    same(run.policy.logits, first, rtol=1e-7, atol=1e-9)


def test_a_run_that_is_resumed_in_its_first_stage_still_returns() -> None:
    whole, cut = run_of(two_stages(2)), run_of(two_stages(2))
    for _ in range(4):
        whole.step()
    cut.step()
    state = cut.trainer.state_dict()
    rest = run_of(two_stages(2))
    rest.policy.load_state_dict(state["policy"])
    rest.trainer.method.load_state_dict(state["parts"])
    rest.trainer.generator.set_state(state["generator"])
    rest.trainer.optimizer.load_state_dict(cut.trainer.optimizer.state_dict())
    rest.trainer.iteration = state["iteration"]
    for _ in range(3):
        rest.step()
    same(rest.policy.logits, whole.policy.logits)


def test_a_folder_with_another_policy_is_named(tmp_path: Path) -> None:
    ExactPolicy(SPACE, 5).save(tmp_path / "five")
    with pytest.raises(UsageError, match=r"five holds a policy of 5 problems .* model 'guide' must have 2"):
        run_of(override(tgdpo, {"models.guide.folder": str(tmp_path / "five")}))
    with pytest.raises(UsageError, match="nothing"):
        run_of(override(tgdpo, {"models.guide.folder": str(tmp_path / "nothing")}))


def test_a_model_of_a_folder_is_never_refreshed() -> None:
    snapshot = Snapshot(every=2, at=3)
    assert [snapshot.due(i) for i in range(5)] == [False, False, True, True, True]
    assert not any(replace(snapshot, folder="somewhere").due(i) for i in range(5))

"""The flow of one batch through a method's parts, its declarations and its state."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from polopt.aggregations import SequenceSum, TokenMean
from polopt.core.errors import UsageError
from polopt.core.loss import Evaluation, Loss, per_group, per_step, per_trajectory, total
from polopt.core.method import Method, Schedule
from polopt.core.part import Part, Stateful
from polopt.core.rollout import MissingColumn, Rollout
from polopt.methods.base.grpo import grpo
from polopt.methods.base.ppo import ppo
from polopt.methods.base.rloo import SequenceSurrogate
from polopt.regularizers.entropy import Entropy
from polopt.regularizers.kl import KL
from tests.support import f64, now, same, value_and_gradient, with_advantage, worked


@dataclass(frozen=True)
class Level(Part):
    """Log-probs summed to one level."""

    level: str = "step"
    scale: float = 1.0

    def __call__(self, evaluation: Evaluation, rollout: Rollout) -> Loss:
        logp = self.scale * evaluation.logp
        sums = rollout.sum_steps(logp)
        match self.level:
            case "step":
                return per_step(logp, some__name=logp.sum())
            case "trajectory":
                return per_trajectory(sums)
            case "group":
                return per_group(torch.stack([sums[rollout.group == g].sum() for g in range(rollout.n_groups)]))
            case _:
                return total(logp.sum())


@dataclass(frozen=True)
class Sign(Part):
    """Step weights."""

    needs = frozenset({"sign"})

    def __call__(self, rollout: Rollout) -> torch.Tensor:
        return rollout["sign"]


def method(**slots: Any) -> Method:
    return Method("mine", "user", "", "", "Mine: a method.\n\nMore.", aggregation=TokenMean(), **slots)


@pytest.mark.parametrize(
    ("level", "divisor"), [("step", 10), ("trajectory", 4), ("group", 2), ("batch", 1)], ids=lambda x: str(x)
)
def test_terms_are_normalised_by_the_counts_of_their_level(level: str, divisor: int) -> None:
    rollout = worked()
    logp = rollout.logp
    loss, gradient = value_and_gradient(method(objective=Level(level)), now(logp), rollout)
    same(loss, logp.sum() / divisor)
    same(gradient, [1 / divisor] * 10)


def test_members_of_objective_and_regularizer_add_up() -> None:
    made = method(objective=Level() + Level("trajectory", 2.0), regularizer=Level("batch", 3.0))
    _, gradient = value_and_gradient(made, now(worked().logp), worked())
    same(gradient, [1 / 10 + 2 / 4 + 3] * 10)


def test_metrics_are_detached_and_named() -> None:
    _, metrics = method(objective=Level()).loss(now(worked().logp), worked())
    assert set(metrics) == {"some/name"}
    assert not metrics["some/name"].requires_grad


def test_weights_multiply_the_objective_and_not_the_regularizer() -> None:
    sign = torch.arange(10.0, dtype=torch.float64)
    made = method(weight=Sign(), objective=Level(), regularizer=Level("batch", 3.0))
    rollout = made.credit(worked(sign=sign))
    _, gradient = value_and_gradient(made, now(rollout.logp), rollout)
    same(gradient, sign / 10 + 3)


def test_a_weight_per_step_needs_terms_per_step() -> None:
    made = method(weight=Sign(), objective=SequenceSurrogate())
    rollout = with_advantage(made.credit(worked(sign=[1.0] * 10)), [1, 1, 1, 1])
    with pytest.raises(UsageError, match="'mine': a weight per step cannot act on the objective sequence-surrogate"):
        made.loss(now(rollout.logp), rollout)


def test_credit_is_spread_and_detached() -> None:
    rollout = grpo.credit(worked())
    assert rollout.advantage.shape == (10,)
    assert rollout.level("advantage") == "step"
    both = ppo.credit(ppo.shape_reward(worked(value=[0.0] * 10, logp__ref=[-1.0] * 10)))
    assert both.level("return") == "step"


def test_what_a_method_needs() -> None:
    assert {"reward", "logp"} <= grpo.needs
    assert "advantage" not in grpo.needs
    assert "return" not in ppo.needs
    assert "value" in ppo.needs
    with_kl = grpo | {"regularizer": KL() + Entropy()}
    assert "logp/ref" in with_kl.needs
    assert with_kl.evaluates == {"logp", "entropy"}
    assert with_kl.vanishes_with is None
    assert grpo.vanishes_with == "advantage"
    assert (grpo | {"aggregation": TokenMean()}).unit == "step"
    assert (grpo | {"aggregation": SequenceSum(), "objective": Level("group")}).unit == "step"


def test_a_missing_column_names_method_part_and_column() -> None:
    with pytest.raises(UsageError) as error:
        ppo.check(ppo.needs - {"value"})
    assert "method 'ppo': its advantage gae(" in str(error.value)
    assert "needs column 'value'" in str(error.value)
    ppo.check((ppo.needs - {"logp/ref"}) | {"logp/*"})
    with pytest.raises(UsageError, match="logp/ref"):
        ppo.check((ppo.needs - {"logp/ref"}) | {"reward/*"})


def test_a_column_must_come_before_the_part_that_needs_it() -> None:
    @dataclass(frozen=True)
    class Late(Part):
        gives = frozenset({"early"})

    @dataclass(frozen=True)
    class Early(Part):
        needs = frozenset({"early"})

    method(reward=Late(), advantage=Early()).check(frozenset())
    with pytest.raises(UsageError, match="needs column 'early'"):
        method(reward=Early(), advantage=Late()).check(frozenset())
    assert "early" in method(reward=Early(), advantage=Late()).needs
    assert "early" not in method(reward=Late(), advantage=Early()).needs


def test_what_the_curriculum_attaches_is_there_for_every_part() -> None:
    @dataclass(frozen=True)
    class Attaches(Part):
        gives = frozenset({"difficulty"})

    @dataclass(frozen=True)
    class Reads(Part):
        needs = frozenset({"difficulty"})

    for slot in ("reward", "filter", "advantage", "objective"):
        made = method(curriculum=Attaches(), **{slot: Reads()})
        made.check(frozenset())
        assert "difficulty" not in made.needs
        with pytest.raises(UsageError, match="needs column 'difficulty'"):
            method(**{slot: Reads()}).check(frozenset())


def test_any_named_reward_will_do() -> None:
    @dataclass(frozen=True)
    class Any_(Part):
        needs = frozenset({"reward/*"})

    made = method(advantage=Any_())
    made.check(frozenset({"reward/format"}))
    with pytest.raises(UsageError, match=r"'reward/\*'"):
        made.check(frozenset({"reward"}))


def test_slots_are_replaced_by_name() -> None:
    changed = grpo | {"aggregation": TokenMean()}
    assert changed.aggregation == TokenMean()
    assert grpo.aggregation != TokenMean()
    assert changed.slug == "grpo"
    with pytest.raises(UsageError, match="unknown slot 'agg'"):
        _ = grpo | {"agg": TokenMean()}


def test_slots_come_in_the_order_of_the_flow() -> None:
    assert list(ppo.slots()) == [
        "curriculum",
        "rollout",
        "reward",
        "advantage",
        "objective",
        "aggregation",
        "models",
        "update",
        "schedule",
    ]


def test_the_title_is_the_first_line_of_the_file() -> None:
    assert method().title == "Mine: a method."
    assert grpo.title.startswith("GRPO: group relative policy optimisation (Shao et al. 2024")


@pytest.mark.parametrize(("epochs", "minibatches"), [(0, 1), (1, 0)])
def test_a_schedule_has_at_least_one_update(epochs: int, minibatches: int) -> None:
    with pytest.raises(UsageError, match=f"got {epochs} and {minibatches}"):
        Schedule(epochs, minibatches)


@dataclass(frozen=True)
class Tally(Stateful):
    """Counts its calls."""

    count: int = field(default=0, init=False, compare=False)
    state = ("count",)

    def __call__(self, rollout: Rollout) -> torch.Tensor:
        self.remember(count=self.count + 1)
        return torch.full((rollout.n_trajectories,), float(self.count), dtype=torch.float64)


def test_state_is_by_slot_and_model() -> None:
    made = method(advantage=Tally(), filter=Tally(), models={"teacher": Tally(), "ref": object()})
    made.credit(worked())
    state = made.state_dict()
    assert state == {"filter": {"count": 0}, "advantage": {"count": 1}, "models/teacher": {"count": 0}}
    fresh = method(advantage=Tally(), filter=Tally(), models={"teacher": Tally(), "ref": object()})
    fresh.load_state_dict(state)
    same(fresh.credit(worked()).advantage, [2.0] * 10)
    with pytest.raises(UsageError, match=r"has slots \['advantage', 'filter', 'models/teacher'\], this one"):
        method(advantage=Tally()).load_state_dict(state)


def test_a_clone_shares_no_state() -> None:
    made = method(advantage=Tally())
    other = made.clone()
    other.credit(worked())
    assert (made.advantage.count, other.advantage.count) == (0, 1)


def test_what_was_not_evaluated_is_named() -> None:
    made = method(objective=Entropy())
    with pytest.raises(MissingColumn, match=r"not asked for 'entropy'.*\(evaluated: logp\)"):
        made.loss(now(worked().logp), worked())


def test_masked_steps_reach_no_part() -> None:
    @dataclass(frozen=True)
    class Squares(Part):
        def __call__(self, evaluation: Evaluation, rollout: Rollout) -> Loss:
            return per_step(evaluation.logp.square() * evaluation["wide"].sum(-1))

    mask = torch.arange(10) != 3
    logp = f64(worked().logp).masked_fill(~mask, float("nan"))
    wide = torch.ones(10, 2, dtype=torch.float64).masked_fill(~mask[:, None], float("inf"))
    evaluation = now(logp, wide=wide)
    rollout = worked().with_columns(step={"mask": mask})
    loss, gradient = value_and_gradient(method(objective=Squares()), evaluation, rollout)
    same(loss, 2 * logp[mask].square().sum() / 9)
    same(gradient, torch.where(mask, 4 * logp / 9, 0.0))

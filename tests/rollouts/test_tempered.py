"""Tempered groups: what lies beside the policy's answers, and that only its draw is another one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from polopt.claims.exact import start
from polopt.core.errors import UsageError
from polopt.core.example import Example
from polopt.core.part import Part
from polopt.core.policy import Request, at_temperature
from polopt.core.rollout import Rollout, Source
from polopt.methods.base.grpo import grpo
from polopt.policies.causal_lm.policy import CausalLM
from polopt.policies.exact import ExactPolicy, SequenceSpace
from polopt.policies.exact.policy import example_of
from polopt.rollouts.groups import Groups
from polopt.rollouts.tempered import TemperedGroups
from polopt.tasks.problems import problem
from polopt.training.collect import Collected
from polopt.training.run import _held_out
from tests.policies.causal_lm.models import byte_tokenizer, tiny

SPACE = SequenceSpace(4, 3)
ASKED = [Request(example_of(number), 3, columns={"n": float(number)}) for number in range(5)]


def exact(scale: float = 2.0) -> ExactPolicy:
    logits = scale * torch.randn(5, SPACE.n_nodes, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return ExactPolicy(SPACE, 5, logits)


def sampled(part: Groups, policy: Any = None, asked: Any = None, seed: int = 0) -> Rollout:
    return part(policy or exact(), asked or ASKED, limit=3, seed=seed)


def test_the_first_share_of_the_prompts_is_asked_again() -> None:
    rollout = sampled(TemperedGroups(share=0.4))
    assert rollout["source"].tolist() == [Source.POLICY] * 15 + [Source.TEMPERED] * 6
    assert rollout.group.tolist() == [i // 3 for i in range(21)]
    assert [example.id for example in rollout.examples] == [str(i // 3) for i in range(15)] + ["0"] * 3 + ["1"] * 3
    assert rollout["n"].tolist() == [float(i // 3) for i in range(15)] + [0.0] * 3 + [1.0] * 3
    assert rollout["limit"].tolist() == [3] * 21


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.01, 1), (0.2, 1), (0.25, 2), (0.6, 3), (1.0, 5)])
def test_how_many(share: float, count: int) -> None:
    assert int((sampled(TemperedGroups(share=share))["source"] == Source.TEMPERED).sum()) == 3 * count


def test_prompts_that_ask_for_nothing_do_not_count() -> None:
    asked = [Request(example_of(4), 0), *(Request(example_of(number), 2) for number in range(2))]
    rollout = sampled(TemperedGroups(share=0.5), asked=asked)
    assert [example.id for example in rollout.examples] == ["0", "0", "1", "1", "0", "0"]


def test_the_policys_answers_are_those_of_groups() -> None:
    rollout, plain = sampled(TemperedGroups(other=1.7)), sampled(Groups())
    main = rollout.select(rollout["source"] == Source.POLICY)
    assert set(rollout.names()) == set(plain.names()) | {"logp/sampled"}
    assert all(torch.equal(main[name], plain[name]) for name in plain.names())
    assert torch.equal(main["logp/sampled"], plain.logp)


def test_what_lies_beside_does_not_repeat_the_policys_draws() -> None:
    rollout = sampled(TemperedGroups(other=1.0, share=1.0))
    one, other = (rollout.select(rollout["source"] == source) for source in (Source.POLICY, Source.TEMPERED))
    assert not torch.equal(one["action"], other["action"])


@pytest.mark.parametrize("other", [1.5, 0.6])
@pytest.mark.parametrize("own", [1.0, 0.8])
def test_only_the_draw_is_at_the_other_temperature(other: float, own: float) -> None:
    policy = exact()
    rollout = sampled(TemperedGroups(temperature=own, other=other, share=1.0), policy)
    found = policy.evaluate(rollout, frozenset({"logp", "entropy", f"logp@{own}", f"logp@{other}"}))
    torch.testing.assert_close(rollout.logp, found.logp.detach())
    torch.testing.assert_close(rollout.logp, found[f"logp@{own}"].detach())
    torch.testing.assert_close(rollout["entropy"], found.entropy.detach())
    beside = rollout.spread(rollout["source"] == Source.TEMPERED)
    torch.testing.assert_close(rollout["logp/sampled"][beside], found[f"logp@{other}"].detach()[beside])
    torch.testing.assert_close(rollout["logp/sampled"][~beside], rollout.logp[~beside])


def test_frequencies_are_those_of_the_other_temperature() -> None:
    policy, count = exact(), 4000
    rollout = sampled(TemperedGroups(other=2.5, share=1.0), policy, [Request(example_of(2), count)])
    for source, temperature in ((Source.POLICY, 1.0), (Source.TEMPERED, 2.5)):
        first = rollout.select(rollout["source"] == source)["action"][:: SPACE.length]
        chance = (policy.logits[2, 0].detach() / temperature).softmax(-1)
        spread = 5 * (chance * (1 - chance) / count).sqrt() + 1e-9
        assert ((torch.bincount(first, minlength=4) / count - chance).abs() < spread).all()


def test_in_the_world_of_language_models() -> None:
    policy = CausalLM(tiny("Qwen3"), byte_tokenizer())
    asked = [Request(Example("1", "one"), 3), Request(Example("2", "another prompt"), 2)]
    rollout = sampled(TemperedGroups(other=1.5, share=0.5), policy, asked)
    assert rollout["source"].tolist() == [Source.POLICY] * 5 + [Source.TEMPERED] * 3
    with torch.no_grad():
        found = policy.evaluate(rollout, frozenset({"logp", "logp@1.5"}))
    torch.testing.assert_close(rollout.logp, found.logp, rtol=0, atol=1e-5)
    beside = rollout.spread(rollout["source"] == Source.TEMPERED)
    torch.testing.assert_close(rollout["logp/sampled"][beside], found["logp@1.5"][beside], rtol=0, atol=1e-5)
    again = Rollout.from_state(rollout.state_dict())
    with torch.no_grad():
        assert torch.equal(policy.evaluate(again, frozenset({"logp"})).logp, found.logp)


def test_statistics_are_of_the_policys_answers() -> None:
    rollout = sampled(TemperedGroups(share=0.4))
    assert Collected(None, rollout, ()).answers.n_trajectories == 15
    plain = sampled(Groups())
    assert Collected(None, plain, ()).answers is plain


def test_held_out_answers_are_plain_ones() -> None:
    assert _held_out(TemperedGroups(temperature=0.9, top_k=5)) == Groups(temperature=0.9, top_k=5)


@pytest.mark.parametrize(("options", "named"), [({"other": 0.0}, "other is 0.0"), ({"share": 1.5}, "share is 1.5")])
def test_options_out_of_range_are_named(options: dict[str, float], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        TemperedGroups(**options)


def test_a_part_may_change_the_temperature_that_it_needs() -> None:
    """`needs` is read again for every batch: a controller decides at which temperature."""
    seen: list[float] = []

    @dataclass(frozen=True)
    class Heated(Part):
        temperature: float = 1.5

        @property
        def needs(self) -> frozenset[str]:
            return frozenset({"reward", at_temperature("logp", self.temperature)})

        def __call__(self, rollout: Rollout) -> torch.Tensor:
            seen.append(float((rollout[at_temperature("logp", self.temperature)] - rollout.logp).abs().max()))
            return rollout.group_center(rollout.reward)

    @dataclass(frozen=True)
    class Cooling(Part):
        def __call__(self, statistics: Any) -> dict[str, float]:
            return {"advantage.temperature": 1.0 if statistics else 1.5}

    method = grpo | {"advantage": Heated(), "controller": Cooling()}
    run = start(problem("random-rewards", batch=3), method, seed=0, group=4)
    run.step()
    run.step()
    assert seen[0] > 0.01 and seen[1] < 1e-12

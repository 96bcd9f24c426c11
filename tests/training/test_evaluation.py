"""Accuracy, intervals and pass@k of a scripted policy against NumPy and enumeration."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from polopt.core.example import Example
from polopt.core.policy import Request, Sampling
from polopt.core.rollout import Rollout
from polopt.methods import get_method
from polopt.rewards import NamedReward
from polopt.rewards.scoring import Scorer
from polopt.rollouts.groups import Groups
from polopt.training.evaluation import Evaluator, samples_of
from polopt.training.run import _held_out
from tests.training.conftest import EVEN, LIMIT, POOL, CountingPolicy


class Scripted:
    """Gives the texts of a table, prompt by prompt, and notes how it was asked."""

    def __init__(self, table: Sequence[Sequence[str]]) -> None:
        self.table = table
        self.seeds: list[int] = []

    def sample(self, requests: Sequence[Request], sampling: Sampling, *, seed: int, progress: Any = None) -> Rollout:
        self.seeds.append(seed)
        rows = [(g, text) for g, request in enumerate(requests) for text in self.table[g][: request.count]]
        payload = SimpleNamespace(
            examples=[requests[g].example for g, _ in rows],
            prompt_texts=[requests[g].example.prompt for g, _ in rows],
            completions=[text for _, text in rows],
            completion_ids=[tuple(text.encode()) for _, text in rows],
        )
        lengths = [len(text) for _, text in rows]
        ids = [i for i, length in enumerate(lengths) for _ in range(length)]
        noted = {"entropy": torch.arange(len(ids)).float(), "logp": torch.zeros(len(ids))}
        step = {"mask": torch.ones(len(ids), dtype=torch.bool), **noted}
        return Rollout.from_arrays(ids, [g for g, _ in rows], step=step, payload=payload)  # type: ignore[arg-type]


def value(completions: Sequence[str], **_: Any) -> list[float | None]:
    """The number that a text begins with; None for a question mark."""
    return [None if text[0] == "?" else float(text.rstrip("x")) for text in completions]


def evaluate(table: Sequence[Sequence[str]], prompts: int | None = None, samples: int = 1) -> dict[str, float]:
    examples = [Example(str(i), f"prompt {i}") for i in range(len(table))]
    evaluator = Evaluator(examples, Scorer((NamedReward("value", value),)), Groups(), LIMIT, samples)
    metrics, _ = evaluator(Scripted(table), prompts=prompts)  # type: ignore[arg-type]
    return {name.removeprefix("eval/"): number for name, number in metrics.items() if name.startswith("eval/")}


def test_accuracy_of_one_sample_per_prompt_has_wilsons_interval() -> None:
    found = evaluate([["1xx"], ["0"], ["1"], ["1x"], ["0xxx"], ["1"], ["1"]])
    p, n, z = 5 / 7, 7, 1.959963984540054
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert found["accuracy"] == pytest.approx(p)
    assert (found["accuracy/low"], found["accuracy/high"]) == pytest.approx((centre - half, centre + half))
    assert found["prompts"] == 7 and found["reward"] == pytest.approx(p)
    assert found["completions/mean_length"] == pytest.approx(np.mean([3, 1, 1, 2, 4, 1, 1]))
    assert found["entropy"] == pytest.approx(np.arange(13).mean())
    assert not any(name.startswith("pass@") for name in found)


def test_several_samples_are_clustered_by_prompt_and_give_pass_at_k() -> None:
    right = [3, 0, 4, 1, 2]
    table = [["1"] * c + ["0"] * (4 - c) for c in right]
    found = evaluate(table, samples=4)
    rates = np.array(right) / 4
    half = 2.7764451051977987 * rates.std(ddof=1) / math.sqrt(5)  # t_4 at 0.975
    assert found["accuracy"] == pytest.approx(rates.mean())
    assert (found["accuracy/low"], found["accuracy/high"]) == pytest.approx((rates.mean() - half, rates.mean() + half))
    for k in (1, 2, 4):
        draws = [[any(d) for d in itertools.combinations([True] * c + [False] * (4 - c), k)] for c in right]
        assert found[f"pass@{k}"] == pytest.approx(np.mean([np.mean(d) for d in draws]))
    assert "pass@3" not in found and "pass@8" not in found


def test_a_graded_reward_is_no_proportion() -> None:
    found = evaluate([["0.5"], ["1"], ["0.25"]])
    values = np.array([0.5, 1.0, 0.25])
    half = 4.302652729911275 * values.std(ddof=1) / math.sqrt(3)
    assert found["accuracy"] == pytest.approx(values.mean())
    assert found["accuracy/high"] - found["accuracy"] == pytest.approx(half, rel=1e-5)


def test_what_could_not_be_scored_counts_as_neither() -> None:
    found = evaluate([["1"], ["?"], ["0"], ["1"]])
    assert found["accuracy"] == pytest.approx(2 / 3) and found["prompts"] == 3
    several = evaluate([["1", "?"], ["?", "?"], ["0", "1"]], samples=2)
    assert several["accuracy"] == pytest.approx(np.mean([1.0, 0.5])) and several["prompts"] == 2
    assert several["pass@2"] == pytest.approx(1.0)  # of the one prompt with two scored samples


def test_nothing_scored_is_no_number() -> None:
    found = evaluate([["?"], ["?"]])
    assert math.isnan(found["accuracy"]) and found["prompts"] == 0 and "accuracy/low" not in found


def test_the_first_reward_is_the_accuracy_and_the_total_the_reward() -> None:
    examples = [Example("0", "a"), Example("1", "b")]
    long = NamedReward("long", lambda completions, **_: [float(len(t)) for t in completions], 0.5)
    evaluator = Evaluator(examples, Scorer((NamedReward("value", value), long)), Groups(), LIMIT)
    metrics, rollout = evaluator(Scripted([["1xxx"], ["0"]]))  # type: ignore[arg-type]
    assert evaluator.primary == "value"
    assert metrics["eval/accuracy"] == 0.5 and metrics["eval/reward"] == pytest.approx((3 + 0.5) / 2)
    assert [(s.prompt, s.completion, s.reward) for s in samples_of(rollout)] == [("a", "1xxx", 3.0), ("b", "0", 0.5)]


def test_some_of_the_prompts_are_the_first_ones() -> None:
    assert evaluate([["1"], ["1"], ["0"], ["0"]], prompts=2)["accuracy"] == 1.0


def test_an_evaluation_repeats_and_leaves_the_runs_random_numbers_alone(policy: CountingPolicy) -> None:
    evaluator = Evaluator(POOL, Scorer((EVEN,)), Groups(), LIMIT)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, rollout = evaluator(policy)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    again, _ = evaluator(policy)
    assert again == first and first["eval/prompts"] == 12
    quarter, part = evaluator(policy, prompts=3)
    # The same trajectories: a quarter is comparable with the whole.
    assert part.payload.completions == rollout.payload.completions[:3]  # type: ignore[union-attr]
    assert quarter["eval/accuracy"] == pytest.approx(float(rollout.reward[:3].mean()))


@pytest.mark.parametrize("slug", ["did", "nash-md", "egpo", "grpo"])
def test_held_out_answers_are_the_policy_s_own(slug: str) -> None:
    """Not those of a mixture with the reference, nor of a hotter sampler that explores for it."""
    drawn = _held_out(get_method(slug).rollout)
    assert (drawn.mixture_of, drawn.temperature, drawn.top_k, drawn.top_p) == (None, 1.0, 0, 1.0)

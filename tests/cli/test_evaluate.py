from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from polopt.core.policy import Request, Sampling
from polopt.policies.causal_lm.policy import CausalLM
from polopt.training.build import make_held_out
from polopt.training.config import RunConfig
from tests.cli.conftest import Result

REWARD = "def even(completions, **_):\n    return [float(sum(map(ord, text)) % 2 == 0) for text in completions]\n"


@pytest.fixture(autouse=True)
def files(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(REWARD, encoding="utf-8")
    rows = [{"question": f"{n}+1=", "answer": str(n + 1)} for n in range(30)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def evaluated(run: Callable[..., Result], model: str, *arguments: object) -> dict[str, float]:
    result = run("eval", "--model", model, "--reward", "mine.py:even", "--json", "e.json", *arguments)
    assert (result.code, result.err) == (0, "")
    for word in ("accuracy", "entropy", "completions/mean_length"):
        assert word in result.out
    found: dict[str, float] = json.loads(Path("e.json").read_text(encoding="utf-8"))
    return found


def test_eval_measures_what_sampling_by_hand_does(run: Callable[..., Result], model: str) -> None:
    options = ("--data", "data.jsonl", "--map", "prompt=question", "--eval-prompts", 12)
    found = evaluated(run, model, *options, "--max-new-tokens", 6, "--seed", 3)
    config = RunConfig(data="data.jsonl", map=("prompt=question",), eval_prompts=12, reward=("mine.py:even",))
    problem = make_held_out(config)
    assert [example.prompt for example in problem.held_out] == [f"{n}+1=" for n in range(12)]

    policy = CausalLM.load(model)
    rollout = policy.sample([Request(e, 1) for e in problem.held_out], Sampling(max_new_tokens=6), seed=3)
    texts = policy.decode([ids.tolist() for ids in rollout.payload.ids.split(rollout.lengths.tolist())])
    right = sum(sum(map(ord, text)) % 2 == 0 for text in texts)
    assert 0 < right < 12
    assert found["accuracy"] == pytest.approx(right / 12)
    assert found["accuracy/low"] < found["accuracy"] < found["accuracy/high"]
    assert found["prompts"] == 12
    assert found["completions/mean_length"] == pytest.approx(rollout.lengths.float().mean().item())


def test_eval_of_several_samples_has_pass_at_k(run: Callable[..., Result], model: str) -> None:
    found = evaluated(run, model, "--eval-prompts", 4, "--eval-samples", 4, "--max-new-tokens", 4)
    rates = [found[f"pass@{k}"] for k in (1, 2, 4)]
    assert rates[0] == pytest.approx(found["accuracy"])
    assert rates == sorted(rates) and rates[0] < rates[2]


def test_greedy_eval_does_not_depend_on_the_seed(run: Callable[..., Result], model: str) -> None:
    same = [
        evaluated(run, model, "--eval-prompts", 8, "--max-new-tokens", 6, "--temperature", 0, "--seed", seed)
        for seed in (1, 2)
    ]
    assert same[0] == same[1]
    other = [
        evaluated(run, model, "--eval-prompts", 8, "--max-new-tokens", 6, "--seed", seed)["entropy"] for seed in (1, 2)
    ]
    assert other[0] != other[1]


def test_a_runs_folder_stands_for_its_model(run: Callable[..., Result], model: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("method: grpo\n", encoding="utf-8")
    (tmp_path / "run" / "model").symlink_to(model)
    found = evaluated(run, "run", "--eval-prompts", 2, "--max-new-tokens", 2)
    assert found["model"] == "run/model"

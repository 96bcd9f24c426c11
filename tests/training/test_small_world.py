"""Every method's recipe runs for three iterations in the small world, with the policy that is shipped."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from polopt.assets import base_policy_path
from polopt.core.part import declared
from polopt.methods import methods
from polopt.rollouts.replay import Replay
from polopt.tasks.registry import get_task
from polopt.training.build import default_task
from polopt.training.config import RunConfig
from polopt.training.run import train

WEIGHTS = base_policy_path() / "model.safetensors"

pytestmark = pytest.mark.skipif(not WEIGHTS.is_file(), reason=f"the base policy is not built: {WEIGHTS} is missing")


@pytest.mark.parametrize("slug", sorted(methods()))
def test_three_iterations_of_every_method(slug: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = RunConfig(
        method=slug,
        # The easiest of the task that the method is for.
        level=get_task(default_task(methods()[slug])).levels[:1],
        steps=3,
        prompts=4,
        group=4,
        eval_prompts=4,
        track=("none",),
        device="cpu",
        threads=1,
        # The checks of a run that are on by default: the ratio starts at 1, nothing is invalid or infinite.
        strict=True,
        out=str(run),
    )
    summary = train(config, quiet=True)
    # Where trajectories go on in the next iteration, their slots take no new ones; what is replayed is not sampled.
    least = 16 if "unfinished" in declared(methods()[slug].rollout, "gives") else 48
    least = 32 if isinstance(methods()[slug].rollout, Replay) else least
    # A data set decides how many answers a prompt has: a pair, or a single one.
    least = 12 if methods()[slug].offline else least
    assert summary["steps"] == 3 and summary["rollouts"] >= least
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert all(isinstance(v, int | float) and math.isfinite(v) for line in lines for v in line.values())
    steps = [line for line in lines if "groups/kept" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert steps[-1]["updates/rejected"] == 0 if "updates/rejected" in steps[-1] else steps[-1]["groups/kept"] == 0
    learned = any(line.get("grad_norm", 0.0) > 0 for line in steps)
    before, after = load_file(WEIGHTS), load_file(run / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    assert learned == any(not torch.equal(before[name], after[name]) for name in before)
    # A group in which every answer is worth the same teaches most methods nothing; where they differ, all learn.
    if any(line.get("frac_reward_zero_std", 0.0) < 1 for line in steps):
        assert learned
    model, tokenizer = (auto.from_pretrained(run / "model") for auto in (AutoModelForCausalLM, AutoTokenizer))
    assert bool(torch.isfinite(model(tokenizer("1+2=?\n", return_tensors="pt")["input_ids"]).logits).all())

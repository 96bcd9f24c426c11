"""Packing in the script that trains the base policy: sequences in one row must not see each other."""

from __future__ import annotations

import importlib.util
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch

from polopt.tasks.task import split_of

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_base_policy.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_base_policy", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_packed_loss_is_the_loss_of_each_sequence_alone(script: ModuleType) -> None:
    torch.manual_seed(0)
    model = script.untrained_policy(hidden=32, layers=2, context=128)
    for parameter in model.parameters():
        parameter.data *= 4.0  # far from uniform, so that seeing a wrong token changes the loss
    batch = next(script.batch_stream(script.demonstration_stream(0, [0.0]), rows=3, width=112, seed=0))
    total, count = 0.0, 0
    for row in range(3):
        for index in range(int(batch.sequence[row].max()) + 1):
            inside = batch.sequence[row] == index
            ids, completion = batch.token[row][inside], batch.is_completion[row][inside]
            assert ids[-1] == script.EOS
            logp = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
            chosen = logp.gather(1, ids[1:, None])[:, 0][completion[1:]]
            total, count = total - chosen.sum().item(), count + len(chosen)
    assert script.completion_loss(model.model, batch).item() == pytest.approx(total / count, rel=0.01)


def test_only_train_prompts_are_demonstrated(script: ModuleType) -> None:
    pairs = script.demonstration_stream(3, [0.9])
    assert {split_of(next(pairs)[0]) for _ in range(300)} == {"train"}


def test_learning_rate_warms_up_holds_and_decays(script: ModuleType) -> None:
    rates = [script.learning_rate_at(step / 1000, step, 1.0) for step in range(1001)]
    assert rates[0] < 0.05
    assert rates[100] == rates[600] == 1.0
    assert rates[1000] == pytest.approx(0.02)
    assert all(later <= earlier for earlier, later in pairwise(rates[100:]))

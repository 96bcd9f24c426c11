from __future__ import annotations

import copy

import pytest
import torch

from polopt.claims import fresh_pairs
from polopt.claims.small import answers, small_trainer
from polopt.policies.causal_lm.payload import TokenPayload


def test_the_kl_is_the_mean_log_ratio_of_the_answers() -> None:
    asked = fresh_pairs.TASK.examples(4, seed=0, split="test")
    with small_trainer("ipo", seed=0, quick=True, steps=1) as trainer:
        model = trainer.policy.model  # type: ignore[attr-defined]
        reference = copy.deepcopy(model)
        trainer.step()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        said = answers(trainer, asked)
        found = fresh_pairs._kl(trainer, said)

    def log_probability(network: torch.nn.Module, prompt: list[int], answer: list[int]) -> float:
        with torch.no_grad():
            logits = network(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double()
        return float(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum())

    expected = 0.0
    payload = said.payload
    assert isinstance(payload, TokenPayload)
    for place, answer in zip(payload.prompt_of.tolist(), payload.completion_ids, strict=True):
        both = list(payload.prompts[place]), list(answer)
        expected += (log_probability(model, *both) - log_probability(reference, *both)) / 4
    assert abs(expected) > 0.1
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)

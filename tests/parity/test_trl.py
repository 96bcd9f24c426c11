"""Loss and gradient of the shared methods against those of TRL's own trainers, driven without a model.

TRL's `_compute_loss` runs as it is; only its forward pass is replaced, by log-probs that the test chooses. Its
advantage block sits inside generation, so the formula is written out here with TRL's own `nanstd`.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.trl_loss import bare_trainer, loss
from polopt.aggregations import FixedLength
from polopt.core.method import Method
from polopt.core.override import override
from polopt.core.rollout import Rollout
from polopt.methods import get_method
from polopt.objectives.clipped_surrogate import ClippedSurrogate
from polopt.regularizers.kl import KL
from polopt.rewards.shaping import KLPenalty
from tests.support import now, value_and_gradient

grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="the parity tests compare with TRL")
rloo_trainer = pytest.importorskip("trl.trainer.rloo_trainer", reason="the parity tests compare with TRL")
nanstd = pytest.importorskip("trl.trainer.utils").nanstd

PROMPTS, GROUP, WIDTH, BUDGET = 3, 4, 9, 11
SEEDS = range(4)


class Batch:
    """Right-padded random responses of unequal length, some steps of which are not the policy's (tool output)."""

    def __init__(self, seed: int, *, tools: bool = True) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        count = PROMPTS * GROUP
        lengths = torch.randint(1, WIDTH + 1, (count,), generator=self.generator)
        lengths[0] = WIDTH
        self.completion = (torch.arange(WIDTH)[None] < lengths[:, None]).long()
        self.tool = torch.ones_like(self.completion)
        if tools:
            self.tool = (torch.rand(self.tool.shape, generator=self.generator) > 0.2).long()
            self.tool[:, 0] = 1
        self.mask = self.completion * self.tool
        self.old = -2 * torch.rand(count, WIDTH, generator=self.generator, dtype=torch.float64)
        self.new = self.old + 0.3 * self.noise()
        self.ref = self.new + 0.5 * self.noise()
        self.reward = torch.rand(count, generator=self.generator, dtype=torch.float64).round(decimals=1)
        self.reward[:GROUP] = 0.3  # a group without spread

    def noise(self) -> Tensor:
        return torch.randn(self.old.shape, generator=self.generator, dtype=torch.float64)

    @property
    def group(self) -> Tensor:
        return torch.arange(PROMPTS).repeat_interleave(GROUP)

    def rollout(self) -> Rollout:
        """The same batch packed."""
        limit = torch.full((len(self.reward),), BUDGET)
        return Rollout.from_padded(
            self.mask,
            self.group,
            step={"logp": self.old, "logp/ref": self.ref, "now": self.new},
            trajectories={"reward": self.reward, "limit": limit},
        )

    def trl(self, trainer: type, **settings: Any) -> tuple[float, Tensor]:
        """TRL's loss and its gradient in the log-probs [M, T]."""
        logp = self.new.clone().requires_grad_()
        made = bare_trainer(trainer, logp, BUDGET, **settings)
        inputs = {
            "completion_mask": self.completion,
            "tool_mask": self.tool,
            "advantages": self.advantage(trainer, **settings),
            "old_per_token_logps": self.old,
            "old_logps": (self.old * self.completion).sum(1),
            "ref_per_token_logps": self.ref,
            "num_items_in_batch": self.mask.sum(),
        }
        value = loss(made, inputs)
        value.backward()
        assert logp.grad is not None
        return float(value.detach()), logp.grad

    def advantage(self, trainer: type, scale_rewards: str = "group", beta: float = 0.0, **others: Any) -> Tensor:
        if trainer is rloo_trainer.RLOOTrainer:
            rewards = self.reward - beta * ((self.old - self.ref) * self.completion).sum(-1)
            grouped = rewards.view(-1, GROUP)
            counts = (~grouped.isnan()).sum(dim=1, keepdim=True)
            baselines = (grouped.nansum(dim=1, keepdim=True) - grouped) / (counts - 1)
            return torch.nan_to_num(rewards - baselines.view(-1), nan=0.0)
        grouped = self.reward.view(-1, GROUP)
        advantage = self.reward - grouped.nanmean(dim=1).repeat_interleave(GROUP)
        if scale_rewards != "none":
            advantage = advantage / (nanstd(grouped, dim=1).repeat_interleave(GROUP) + 1e-4)
        return torch.nan_to_num(advantage, nan=0.0)


def compare(method: Method, batch: Batch, expected: tuple[float, Tensor]) -> None:
    fresh = method.clone()
    rollout = fresh.credit(fresh.shape_reward(batch.rollout()))
    loss, gradient = value_and_gradient(fresh, now(rollout["now"]), rollout)
    expected_loss, expected_gradient = expected
    assert (expected_gradient != 0).any()
    padded = torch.zeros_like(expected_gradient)
    matrix = rollout.pad(gradient)
    padded[:, : matrix.shape[1]] = matrix
    # TRL holds n / (n - 1) of its nanstd and SAPO's temperatures in float32.
    assert loss == pytest.approx(expected_loss, rel=1e-6, abs=1e-7)
    torch.testing.assert_close(padded, expected_gradient, rtol=1e-6, atol=1e-9)


GRPO = grpo_trainer.GRPOTrainer

CASES: dict[str, tuple[Method, dict[str, Any]]] = {
    "grpo": (get_method("grpo"), {"loss_type": "grpo"}),
    "grpo with kl": (
        get_method("grpo") | {"regularizer": KL(beta=0.04)},
        {"loss_type": "grpo", "beta": 0.04},
    ),
    "grpo asymmetric": (
        override(get_method("grpo"), {"objective.low": 0.1, "objective.high": 0.3}),
        {"loss_type": "grpo", "epsilon_low": 0.1, "epsilon_high": 0.3},
    ),
    "grpo two-sided": (
        get_method("grpo") | {"objective": ClippedSurrogate(cap=1.5)},
        {"loss_type": "grpo", "delta": 1.5},
    ),
    "dr-grpo": (get_method("dr-grpo"), {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    "dr-grpo with kl and a given length": (
        get_method("dr-grpo") | {"regularizer": KL(beta=0.1), "aggregation": FixedLength(BUDGET)},
        {"loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.1},
    ),
    "dapo": (get_method("dapo") | {"reward": None}, {"loss_type": "dapo", "epsilon_high": 0.28}),
    "dapo with kl": (
        get_method("dapo") | {"reward": None, "regularizer": KL(beta=0.02)},
        {"loss_type": "dapo", "epsilon_high": 0.28, "beta": 0.02},
    ),
    "gspo": (
        get_method("gspo"),
        {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "epsilon_low": 3e-4,
            "epsilon_high": 4e-4,
        },
    ),
    "gspo with wide bounds and kl": (
        override(get_method("gspo") | {"regularizer": KL(beta=0.04)}, {"objective.low": 0.1, "objective.high": 0.1}),
        {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "epsilon_low": 0.1,
            "epsilon_high": 0.1,
            "beta": 0.04,
        },
    ),
    "cispo": (
        override(get_method("cispo"), {"objective.cap": 1.3}),
        {"loss_type": "cispo", "epsilon_high": 1.3},
    ),
    "cispo with kl": (
        get_method("cispo") | {"regularizer": KL(beta=0.04)},
        {"loss_type": "cispo", "epsilon_high": 5.0, "beta": 0.04},
    ),
    "sapo": (get_method("sapo"), {"loss_type": "sapo"}),
    "sapo with kl": (get_method("sapo") | {"regularizer": KL(beta=0.04)}, {"loss_type": "sapo", "beta": 0.04}),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", CASES)
def test_the_group_methods(case: str, seed: int) -> None:
    method, settings = CASES[case]
    batch = Batch(seed)
    compare(method, batch, batch.trl(GRPO, **settings))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_rloo(beta: float, seed: int) -> None:
    batch = Batch(seed, tools=False)  # TRL's trainer knows no tool mask
    batch.new = batch.old + 0.05 * batch.noise()  # else the product of ratios is clipped everywhere
    method = get_method("rloo") | {"reward": KLPenalty(beta=beta)}
    compare(method, batch, batch.trl(rloo_trainer.RLOOTrainer, beta=beta))


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_unscorable_responses(method: str) -> None:
    batch = Batch(7, tools=False)
    batch.new = batch.old + 0.05 * batch.noise()
    batch.reward[[1, 6]] = torch.nan
    trainer, settings = (GRPO, {"loss_type": "grpo"}) if method == "grpo" else (rloo_trainer.RLOOTrainer, {})
    compare(get_method(method) | {"reward": None}, batch, batch.trl(trainer, **settings))


def test_reported_clip_shares() -> None:
    """The metrics carry TRL's names, so they must be TRL's numbers."""
    batch = Batch(3)
    metrics: dict[str, list[float]] = defaultdict(list)
    batch.trl(GRPO, loss_type="dapo", epsilon_high=0.28, _metrics={"train": metrics})
    method = get_method("dapo") | {"reward": None}
    rollout = method.credit(batch.rollout())
    _, ours = method.loss(now(rollout["now"]), rollout)
    for name in ("low_mean", "high_mean", "region_mean"):
        assert float(ours[f"clip_ratio/{name}"]) == pytest.approx(metrics[f"clip_ratio/{name}"][0], rel=1e-5)
        assert metrics[f"clip_ratio/{name}"][0] > 0

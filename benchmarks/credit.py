"""(d) Advantage and clipped objective, forward and backward, for a million steps, against TRL's and against a copy.

16,384 trajectories in 2,048 groups of 8, a million steps in all. TRL works on matrices padded to the longest response:
its advantage formula, then its own `_compute_loss` with the forward pass replaced by given log-probs. The copy is of
the same bytes: the packed float32 columns that must be read (log-probs now and then) and written (the gradient).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.row import Row
from benchmarks.timing import alternate
from benchmarks.trl_loss import bare_trainer, loss

TRAJECTORIES, GROUP, STEPS = 16_384, 8, 1_000_000
CASES: Mapping[str, str] = {"credit": "grpo"}
GOAL = 5.0
COPIES_GOAL = 30.0


def run(name: str, rounds: int) -> Row:
    """Measure the case."""
    batch = _Batch()
    contenders = {"polopt": batch.polopt(CASES[name]), "trl": batch.trl(), "copy": batch.copy()}
    times = alternate(contenders, rounds=3 * rounds, warmup=2)
    ratio, low, high = times.ratio("trl", "polopt")
    seconds = times.median("polopt")
    copies = times.ratio("polopt", "copy")[0]
    more = {
        "trl_seconds": times.median("trl"),
        "copy_seconds": times.median("copy"),
        "copies": copies,
        "padded_share": 1 - STEPS / (TRAJECTORIES * int(batch.lengths.max())),
    }
    peer, most = "TRL's advantage and loss", {"copies": COPIES_GOAL}
    return Row(name, peer, ratio, low, high, 1 / copies, GOAL, seconds, more, most)


class _Batch:
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        cuts = torch.randint(1, 2 * STEPS // TRAJECTORIES, (TRAJECTORIES,), generator=generator)
        cuts[-1] += STEPS - int(cuts.sum())
        while int(cuts[-1]) < 1 or int(cuts[-1]) > int(cuts[:-1].max()):
            # Spread what is missing or left over over all.
            rest = int(cuts[-1]) - STEPS // TRAJECTORIES
            cuts[-1] -= rest
            at = torch.randperm(TRAJECTORIES - 1, generator=generator)[: abs(rest)]
            cuts[at] += 1 if rest > 0 else -1
            cuts.clamp_(min=1)
            cuts[-1] += STEPS - int(cuts.sum())
        self.lengths = cuts
        self.old = -2 * torch.rand(STEPS, generator=generator)
        self.new = self.old + 0.1 * torch.randn(STEPS, generator=generator)
        self.reward = torch.rand(TRAJECTORIES, generator=generator)
        self.group = torch.arange(TRAJECTORIES) // GROUP

    def polopt(self, slug: str) -> Any:
        from polopt.core.loss import Evaluation
        from polopt.core.rollout import Rollout
        from polopt.methods import get_method

        method = get_method(slug)
        logp = self.new.clone().requires_grad_()
        mask = torch.ones(STEPS, dtype=torch.bool)

        def work() -> None:
            logp.grad = None
            rollout = Rollout(
                self.lengths,
                self.group,
                {"step": {"logp": self.old, "mask": mask}, "trajectory": {"reward": self.reward}},
            )
            loss, _ = method.loss(Evaluation({"logp": logp}), method.credit(rollout))
            loss.backward()  # type: ignore[no-untyped-call]

        return work

    def padded(self, values: Tensor) -> Tensor:
        width = int(self.lengths.max())
        keep = torch.arange(width)[None] < self.lengths[:, None]
        return torch.zeros(TRAJECTORIES, width).masked_scatter(keep, values)

    def trl(self) -> Any:
        from trl.trainer.grpo_trainer import GRPOTrainer
        from trl.trainer.utils import nanstd

        logp = self.padded(self.new).requires_grad_()
        old, mask = self.padded(self.old), self.padded(torch.ones(STEPS)).long()
        made = bare_trainer(GRPOTrainer, logp, mask.shape[1])
        count = mask.sum()

        def work() -> None:
            logp.grad = None
            grouped = self.reward.view(-1, GROUP)
            advantage = self.reward - grouped.nanmean(dim=1).repeat_interleave(GROUP)
            advantage = advantage / (nanstd(grouped, dim=1).repeat_interleave(GROUP) + 1e-4)
            inputs = {
                "completion_mask": mask,
                "advantages": torch.nan_to_num(advantage, nan=0.0),
                "old_per_token_logps": old,
                "num_items_in_batch": count,
            }
            loss(made, inputs).backward()  # type: ignore[no-untyped-call]

        return work

    def copy(self) -> Any:
        source = [self.old, self.new, self.old]
        target = [torch.empty_like(values) for values in source]

        def work() -> None:
            for values, into in zip(source, target, strict=True):
                into.copy_(values)

        return work

"""Models and views that a method owns: installed when some part reads one of their functionals, refreshed, resumed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from polopt.core.errors import UsageError
from polopt.methods import get_method
from polopt.methods.credit.dgpo_hellinger import GatedDeviation
from polopt.models import Snapshot
from polopt.models.corrupted_prompt import CorruptedPrompt
from polopt.regularizers.kl import KL
from polopt.training.budget import Budget
from polopt.training.build import check_needs
from polopt.training.checkpoint import latest_checkpoint
from polopt.training.collect import provides
from tests.training.conftest import EVEN, make_tiny, make_trainer, short


@pytest.mark.parametrize("functional", ["logp", "hellinger", "kl"])
def test_a_model_is_installed_when_a_part_reads_any_of_its_functionals(functional: str) -> None:
    policy, plain = make_tiny(), get_method("grpo")
    check_needs(plain, policy, (EVEN,))
    assert not any("/" in name for name in policy.columns)  # it owns a reference that no part reads

    class Reads(KL):
        needs = frozenset({f"{functional}/ref"})  # type: ignore[assignment]

    method = plain | {"regularizer": Reads()}
    assert method.models_in_use == {"ref": Snapshot()}
    check_needs(method, policy, (EVEN,))
    assert provides(policy, f"{functional}/ref") and not provides(policy, f"{functional}/teacher")
    with pytest.raises(UsageError, match=f"needs column '{functional}/ref'"):
        check_needs(method | {"models": {"teacher": Snapshot()}}, make_tiny(), (EVEN,))


def test_any_name_of_a_functional_is_provided_where_the_policy_says_so() -> None:
    policy: Any = type("Wide", (), {"columns": frozenset({"hellinger/*", "logp"})})()
    assert provides(policy, "hellinger/old") and provides(policy, "logp") and not provides(policy, "logp/old")


def test_a_reference_read_by_its_distance_alone_is_refreshed(tmp_path: Path) -> None:
    method = short("dgpo-hellinger", models={"ref": Snapshot(every=2)}, weight=GatedDeviation(tau=1e-3))
    trainer = make_trainer(tmp_path, method, budget=Budget(steps=4))
    deviates = []
    collect = trainer.collect

    def watched(*arguments: Any) -> Any:
        batch = collect(*arguments)
        assert batch.kept is not None
        deviates.append(float(batch.kept["hellinger/ref"].max()))
        return batch

    trainer.collect = watched  # type: ignore[assignment]
    trainer.train()
    assert deviates[0] == deviates[2] == 0 and min(deviates[1], deviates[3]) > 1e-6


@pytest.mark.parametrize(
    "method",
    [
        short("dgpo-hellinger", weight=GatedDeviation(tau=1e-3)),
        short("vppo", filter=None, models={"blind": CorruptedPrompt(probability=0.7, seed=3)}),
    ],
    ids=lambda method: method.slug,
)
def test_a_resumed_run_has_its_models_and_views(method: Any, tmp_path: Path) -> None:
    whole = make_trainer(tmp_path / "whole", method, budget=Budget(steps=3))
    whole.train()
    make_trainer(tmp_path / "cut", method, budget=Budget(steps=2)).train()
    resumed = make_trainer(tmp_path / "rest", method, budget=Budget(steps=3))
    shutil.copytree(tmp_path / "cut", tmp_path / "rest", dirs_exist_ok=True)
    checkpoint = latest_checkpoint(tmp_path / "rest")
    assert checkpoint is not None
    resumed.resume(checkpoint)
    resumed.train()
    for one, other in zip(whole.policy.parameters(), resumed.policy.parameters(), strict=True):
        assert torch.equal(one, other)

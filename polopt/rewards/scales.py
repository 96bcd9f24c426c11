"""The scale of a reward model: mean and standard deviation of its rewards of the answers it was trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.core.errors import UsageError

FILE: Final = "reward.json"


def write_scales(rewards: Float[Tensor, "head answer"], folder: Path) -> None:
    """``reward.json`` in the model's folder: mean and (sample) standard deviation of each head.

    Nothing is written of fewer than two answers, or where some head has the same reward for all.
    """
    found = rewards.double()
    if found.shape[1] < 2 or not bool((found.std(1) > 0).all()):
        return
    scales = {"mean": found.mean(1).tolist(), "std": found.std(1).tolist(), "answers": found.shape[1]}
    (folder / FILE).write_text(json.dumps(scales, indent=2) + "\n", encoding="utf-8")


def read_scales(folder: Path, heads: int) -> tuple[Float[Tensor, " head"], Float[Tensor, " head"]] | None:
    """Mean and standard deviation of each head; None where the folder has none.

    Raises UsageError for a file that cannot be read or is of other heads.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        mean, std = (torch.tensor(found[name], dtype=torch.float64) for name in ("mean", "std"))
        fits = mean.shape == std.shape == (heads,) and bool((std > 0).all())
    except (ValueError, KeyError, TypeError):
        fits = False
    if not fits:
        raise UsageError(f"{path} does not hold a mean and a standard deviation above 0 for each of {heads} heads")
    return mean, std

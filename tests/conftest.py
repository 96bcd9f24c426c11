"""Before polopt is imported: every annotated shape of core and of the parts is checked at run time."""

from __future__ import annotations

import torch
from jaxtyping import install_import_hook

from tests import typechecked

# One test process per core, so one thread each.
torch.set_num_threads(1)

CHECKED = (
    # Not core.registry: it looks at its caller's file, which a wrapper would hide.
    "core.loss",
    "core.method",
    "core.override",
    "core.part",
    "core.rollout",
    "core.segments",
    "core.statistics",
    "advantages",
    "aggregations",
    "controllers",
    "curricula",
    "filters",
    "methods",
    "objectives",
    "regularizers",
    "rewards.columns",
    "rewards.judges",
    "rewards.mixtures",
    "rewards.shaping",
    "rewards.uncertainty",
)

# The hook stays for the whole run: modules are imported on demand.
install_import_hook([f"polopt.{room}" for room in CHECKED], f"{typechecked.__name__}.typechecked")

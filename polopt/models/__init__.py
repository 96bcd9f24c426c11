"""Models that a method owns besides its policy: how each is installed in the policy, and when it is refreshed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from polopt.core.part import Part, part
from polopt.core.policy import Policy


@part("models", "snapshot")
@dataclass(frozen=True)
class Snapshot(Part):
    """The policy's weights at the start of the run, taken anew every ``every`` iterations where that is set, and once
    after ``at`` of them.

    With ``folder`` the weights are those of a policy that was saved there, for the whole run: the ``model`` of another
    run's folder, say.
    """

    every: int | None = None
    at: int | None = None
    folder: str | None = None

    def install(self, policy: Policy, name: str) -> None:
        """Freeze the present weights, or those of the folder, as the model ``name``."""
        if self.folder is None:
            policy.add_model(name)
        else:
            policy.load_model(name, Path(self.folder))

    def due(self, iteration: int) -> bool:
        """Whether the model is replaced by the present policy before this iteration (the first is 0)."""
        if self.folder is not None:
            return False
        if iteration and iteration == self.at:
            return True
        return self.every is not None and iteration > 0 and iteration % self.every == 0

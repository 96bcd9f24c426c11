"""A view of the policy: its present weights under a prompt whose observation is partly blanked out."""

from __future__ import annotations

from dataclasses import dataclass

from polopt.core.part import Part, part
from polopt.core.policy import Corruption, Policy


@part("models", "corrupted-prompt")
@dataclass(frozen=True)
class CorruptedPrompt(Part):
    """``logp/<name>`` = log pi(o_t | corrupted prompt, o_<t) under the present weights; nothing is copied.

    Each token of the observation becomes ``blank`` with ``probability``, independently, anew for every version of the
    policy and every trajectory. The observation is the example's column ``observation``, found in the prompt, or the
    whole prompt where there is none (`polopt.core.policy.Corruption`). Huang et al. 2025, arXiv:2510.09285.
    """

    probability: float = 0.5
    blank: str = " "
    seed: int = 0

    def install(self, policy: Policy, name: str) -> None:
        """Let the policy evaluate itself under the corrupted prompt as ``name``."""
        policy.add_view(name, Corruption(self.probability, self.blank, self.seed))

    def due(self, iteration: int) -> bool:
        """Never: a view is always that of the present weights."""
        return False

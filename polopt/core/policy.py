"""What the trainer asks of a policy. Language models, exact softmax policies and later worlds all answer it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from torch.nn import Parameter

from polopt.core.errors import UsageError
from polopt.core.example import Example, Text
from polopt.core.loss import Evaluation
from polopt.core.rollout import Rollout


@dataclass(frozen=True)
class Request:
    """``count`` trajectories for one example; ``prompt`` replaces the example's where a method conditions on more.

    ``prefix`` are actions (token ids) that are taken already: the policy goes on after prompt and prefix. ``limit``
    bounds the steps of this request's trajectories, below the bound that all have. ``columns`` are values that the
    curriculum attaches: trajectory columns of the rollout, the same names in all requests of a batch.
    """

    example: Example
    count: int
    prompt: Text | None = None
    prefix: tuple[int, ...] = ()
    limit: int | None = None
    columns: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Sampling:
    """How actions are drawn and when a trajectory ends.

    ``temperature`` divides the logits; 0 takes the most likely token. ``top_k``, ``top_p`` and ``min_p`` truncate the
    tempered distribution (0, 1 and 0 switch them off), in that order. A trajectory ends at its
    policy's own end, at one of ``stop_ids``, at the token that completes one of the ``stop`` strings, or after
    ``max_new_tokens`` (None leaves that to the task).

    Raises UsageError naming the field and its value when a value is out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"temperature is {self.temperature}; it must be finite and at least 0 (0 is greedy)")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}; it must be above 0 and at most 1 (1 switches it off)")
        if self.top_k < 0:
            raise UsageError(f"top_k is {self.top_k}; it must be at least 0 (0 switches it off)")
        if not 0 <= self.min_p <= 1:
            raise UsageError(f"min_p is {self.min_p}; it must be between 0 and 1 (0 switches it off)")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise UsageError(f"stop is {self.stop!r}; it must be a tuple of non-empty strings")
        if any(token < 0 for token in self.stop_ids):
            raise UsageError(f"stop_ids is {self.stop_ids}; token ids must be at least 0")

    @property
    def truncates(self) -> bool:
        """Whether tokens are drawn from less than the full distribution."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0


OF_MODELS: Final = ("logp", "hellinger", "kl")
"""Functionals ``<functional>/<model>`` of the policy pi and an added model or view m, per step and without gradient.

``logp``: log m(a_t). ``hellinger``: 1 - sum_v sqrt(pi(v) m(v)), in [0, 1]. ``kl``: KL(pi || m) in nats. The last two
are sums over all actions and cost one pass through each of the two.
"""


@dataclass(frozen=True)
class Corruption:
    """How a view of the policy spoils what it sees: each token of the observation becomes ``blank`` with
    ``probability``, independently.

    Which ones is a function of ``seed``, the policy's version, and the prompt and completion of the trajectory alone.
    Raises UsageError for a probability outside [0, 1].
    """

    probability: float = 0.5
    blank: str = " "
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise UsageError(f"a token is blanked with a probability in [0, 1], got {self.probability}")


class Policy(Protocol):
    """A policy that can be sampled from, evaluated with gradient, and saved."""

    version: int
    """Number of parameter updates so far; written into every sampled trajectory."""

    @property
    def exact_sampler(self) -> bool:
        """Whether sampled log-probs equal evaluated ones up to float32 rounding, so that none is recomputed."""
        ...

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Actions that end a trajectory."""
        ...

    @property
    def columns(self) -> frozenset[str]:
        """Names that `evaluate` can compute now (``logp/*``: under any model)."""
        ...

    def sample(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        seed: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> Rollout:
        """One group of trajectories per request, with ``action``, ``logp``, ``entropy``, ``truncated``, ``version`` and
        ``source``.

        Steps are those after the request's prefix; texts are whole. A trajectory is a function of the weights, its
        prompt, ``seed`` and its place in the requests alone.
        """
        ...

    def write(self, requests: Sequence[Request], texts: Sequence[str]) -> Rollout:
        """One trajectory per request whose steps are given, not sampled: the actions that spell the text.

        With ``action``, ``truncated`` (no), ``version`` and ``source`` (dataset), and no log-probs: what an environment
        said, a demonstration, an answer of a preference pair. Raises UsageError for a text of no action.
        """
        ...

    def room(self, rollout: Rollout) -> list[int]:
        """Steps that each trajectory may still take before the policy's context or space ends."""
        ...

    def evaluate(self, rollout: Rollout, names: frozenset[str]) -> Evaluation:
        """The named functionals at every step of the rollout; differentiable unless gradients are off."""
        ...

    def cost(self, rollout: Rollout) -> list[int]:
        """What each trajectory costs in one forward pass (tokens, its prompt included)."""
        ...

    def add_model(self, name: str) -> None:
        """Freeze the present weights as the model ``name``; `evaluate` then knows its functionals (`OF_MODELS`)."""
        ...

    def add_view(self, name: str, corruption: Corruption) -> None:
        """Let ``name`` stand for the present weights under a corrupted prompt, with the functionals of a model.

        A view is a setting, not weights: it follows every update.
        """
        ...

    def add_critic(self) -> None:
        """Add a value head; `evaluate` then knows ``value``."""
        ...

    def parameters(self) -> Sequence[Parameter]:
        """What the optimizer trains."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that training changes, added models included, and the settings of views."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`."""
        ...

    def save(self, folder: Path) -> None:
        """Write the policy in the format that its world loads."""
        ...

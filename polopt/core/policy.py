"""What the trainer asks of a policy. Language models, exact softmax policies and later worlds all answer it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch.nn import Parameter

from polopt.core.errors import UsageError
from polopt.core.example import Example, Text
from polopt.core.loss import Evaluation
from polopt.core.rollout import Rollout


@dataclass(frozen=True)
class Request:
    """``count`` trajectories for one example; ``prompt`` replaces the example's where a method conditions on more."""

    example: Example
    count: int
    prompt: Text | None = None


@dataclass(frozen=True)
class Sampling:
    """How actions are drawn: softmax(logits / temperature), truncated by top-k, then top-p, then min-p; 0 is greedy.

    ``max_new_tokens`` None leaves it to the task. ``stop`` are strings, ``stop_ids`` actions, that end a trajectory.
    Raises UsageError for a value out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        checks = {
            "temperature": self.temperature >= 0,
            "top_p": 0 < self.top_p <= 1,
            "top_k": self.top_k >= 0,
            "min_p": 0 <= self.min_p < 1,
            "max_new_tokens": self.max_new_tokens is None or self.max_new_tokens >= 1,
        }
        for name, fine in checks.items():
            if not fine:
                raise UsageError(f"sampling option {name} cannot be {getattr(self, name)}")


class Policy(Protocol):
    """A policy that can be sampled from, evaluated with gradient, and saved."""

    version: int
    """Number of parameter updates so far; written into every sampled trajectory."""

    @property
    def columns(self) -> frozenset[str]:
        """Names that `evaluate` can compute (``logp/*``: under any added model)."""
        ...

    def sample(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        seed: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> Rollout:
        """One group of trajectories per request, with ``logp``, ``entropy``, ``truncated``, ``version``, ``source``.

        A trajectory is a function of the weights, its prompt, ``seed`` and its place in the requests alone.
        """
        ...

    def evaluate(self, rollout: Rollout, names: frozenset[str]) -> Evaluation:
        """The named functionals at every step of the rollout; differentiable unless gradients are off."""
        ...

    def cost(self, rollout: Rollout) -> list[int]:
        """What each trajectory costs in one forward pass (tokens, its prompt included)."""
        ...

    def add_model(self, name: str) -> None:
        """Freeze the present weights as the model ``name``, whose log-probs are ``logp/<name>``."""
        ...

    def add_critic(self) -> None:
        """Add a value head; `evaluate` then knows ``value``."""
        ...

    def parameters(self) -> Sequence[Parameter]:
        """What the optimizer trains."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that training changes, added models included."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`."""
        ...

    def save(self, folder: Path) -> None:
        """Write the policy in the format that its world loads."""
        ...

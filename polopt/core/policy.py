"""What the trainer asks of a policy. Language models, exact softmax policies and later worlds all answer it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    tempered distribution (0, 1 and 0 switch them off), in that order. ``policy_temperature`` is that of the policy
    which trains on what was drawn: ``logp``, ``entropy`` and all that `Policy.evaluate` says of it later are of
    softmax(logits / policy_temperature), and ``logp/sampled`` is of the distribution drawn from. None: ``temperature``
    itself (1 where that is 0). With ``nucleus_of`` only the top-p nucleus (``nucleus_p``) of that model of the policy
    may be drawn, whatever the policy itself makes of it: at least its ``nucleus_min`` most likely actions, and always
    those that end a trajectory and other special ones; the step column ``kept`` says which, one bit per action, and
    `MASKED` are functionals of the policy on them alone. With ``mixture_of`` actions are drawn, step by step, from the
    geometric mixture softmax(((1 - b) l + b l_m) / temperature) of the policy (logits l) and that model of it (l_m),
    b = ``mixture_weight``: 0 is the policy, 1 the model. A trajectory ends at its policy's own end, at one of
    ``stop_ids``, at the token that completes one of the ``stop`` strings, or after ``max_new_tokens`` (None leaves that
    to the task).

    Raises UsageError naming the field and its value when a value is out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    policy_temperature: float | None = None
    nucleus_of: str | None = None
    nucleus_p: float = 0.9
    nucleus_min: int = 1
    mixture_of: str | None = None
    mixture_weight: float = 0.5

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"temperature is {self.temperature}; it must be finite and at least 0 (0 is greedy)")
        if self.policy_temperature is not None and not 0 < self.policy_temperature < math.inf:
            raise UsageError(f"policy_temperature is {self.policy_temperature}; it must be finite and above 0")
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
        if not 0 < self.nucleus_p <= 1:
            raise UsageError(f"nucleus_p is {self.nucleus_p}; it must be above 0 and at most 1 (1 keeps every action)")
        if self.nucleus_min < 1:
            raise UsageError(f"nucleus_min is {self.nucleus_min}; it must be at least 1")
        if not 0 <= self.mixture_weight <= 1:
            raise UsageError(f"mixture_weight is {self.mixture_weight}; it must be between 0 (the policy) and 1")
        if any(token < 0 for token in self.stop_ids):
            raise UsageError(f"stop_ids is {self.stop_ids}; token ids must be at least 0")

    @property
    def truncates(self) -> bool:
        """Whether tokens are drawn from less than the full distribution."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0 or self.nucleus_of is not None

    @property
    def trained_temperature(self) -> float:
        """The temperature of the policy that log-probs and entropies are of."""
        return (self.temperature or 1.0) if self.policy_temperature is None else self.policy_temperature

    @property
    def differs(self) -> bool:
        """Whether tokens are drawn from another distribution than that of ``logp``: ``logp/sampled`` says which.

        Greedy tokens, where nothing else is asked for, count as the policy's own.
        """
        mixed = self.mixture_of is not None
        return self.truncates or mixed or self.policy_temperature not in (None, self.temperature)


OF_MODELS: Final = ("logp", "hellinger", "kl")
"""Functionals ``<functional>/<model>`` of the policy pi and an added model or view m, per step and without gradient.

``logp``: log m(a_t). ``hellinger``: 1 - sum_v sqrt(pi(v) m(v)), in [0, 1]. ``kl``: KL(pi || m) in nats. The last two
are sums over all actions and cost one pass through each of the two.
"""


START: Final = "logp/start"
"""Step column: log-prob of the policy at which learning from the batch begins, whichever policy sampled it.

No model may be called start.
"""


TEMPERED: Final = ("logp", "entropy", "lse", "collision")
"""Functionals of the policy's logits: each of them is one more at another temperature, ``<functional>@<temperature>``.

``logp@1.2`` is that of softmax(logits / 1.2), whatever the temperature of the trajectory.
"""


def at_temperature(functional: str, temperature: float) -> str:
    """The name of a functional at a temperature: ``logp@1.2``; `split_temperature` reads it back."""
    return f"{functional}@{float(temperature)!r}"


def split_temperature(name: str) -> tuple[str, float | None]:
    """A name as its functional and the temperature at which it is wanted; None: that of the trajectory.

    Raises UsageError for a temperature that is no finite number above 0.
    """
    functional, mark, given = name.partition("@")
    if not mark:
        return name, None
    try:
        temperature = float(given)
    except ValueError:
        temperature = math.nan
    if not 0 < temperature < math.inf:
        raise UsageError(f"{name!r} asks for the temperature {given!r}; it must be a finite number above 0")
    return functional, temperature


def pattern(name: str) -> str:
    """What `Policy.columns` has where the policy can compute ``name``: ``logp@*`` for ``logp@1.2``, else the name."""
    functional, temperature = split_temperature(name)
    return name if temperature is None else f"{functional}@*"


MASKED: Final = frozenset({"masked_logp", "masked_entropy"})
"""Functionals of the policy on the actions that could be drawn, m of the step column ``kept``, with gradient.

pi^m(a) = m_a pi(a) / sum_b m_b pi(b): its log-prob of the chosen action, and its entropy in nats.
"""


TOP: Final = 64
"""Most likely actions of which ``top_id`` and ``top_logp`` tell, most likely first; all of them where there are fewer.

Both are step columns [N, K] without gradient: the ids and their log-probs in the policy's full distribution.
``hidden`` [N, D] is what the output layer W [V, D] sees, such that the distribution is softmax(W h) (biases and caps on
logits left out). They are computed chunk by chunk; nothing of size [N, V] is held.
"""

OUTPUT_LAYER: Final = frozenset({"hidden", "top_id", "top_logp"})


def critic_heads(names: Iterable[str]) -> int:
    """How many value heads there must be for these columns: 2 for ``value/2``, 1 for ``value``, 0 for none of them."""
    values = [name.partition("/")[2] for name in names if name.partition("/")[0] == "value"]
    return max((int(head) if head.isdecimal() else 1 for head in values), default=0)


def head_of(name: str) -> int | None:
    """The value head, from 1, that a column is of; None for other columns. ``value`` is of the first."""
    return critic_heads([name]) or None


def of_critic(names: Iterable[str]) -> frozenset[str]:
    """Those of the columns that a critic gives."""
    return frozenset(name for name in names if head_of(name) is not None)


def value_columns(heads: int) -> frozenset[str]:
    """The columns of a critic with that many heads."""
    return frozenset({"value", *(f"value/{k + 1}" for k in range(heads))}) if heads else frozenset()


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
        """Names that `evaluate` can compute now (``logp/*``: under any model; ``logp@*``: at any temperature)."""
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

    def write(self, requests: Sequence[Request], texts: Sequence[Text], *, end: bool = False) -> Rollout:
        """One trajectory per request whose steps are given, not sampled: the actions that spell the text.

        With ``action``, ``truncated`` (no), ``version`` and ``source`` (dataset), and no log-probs: what an environment
        said, a demonstration, an answer of a preference pair. ``end`` adds the action that ends a trajectory where the
        text has none. Raises UsageError for a text of no action.
        """
        ...

    def corrupted(self, rollout: Rollout, corruption: Corruption) -> Rollout:
        """The same trajectories after spoilt prompts: what `evaluate` says of them, of models too, is under these."""
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

    def load_model(self, name: str, folder: Path) -> None:
        """`add_model` with the weights that `save` wrote to a folder; raises UsageError where they do not fit."""
        ...

    def add_view(self, name: str, corruption: Corruption) -> None:
        """Let ``name`` stand for the present weights under a corrupted prompt, with the functionals of a model.

        A view is a setting, not weights: it follows every update.
        """
        ...

    def add_critic(self, heads: int = 1) -> None:
        """Add value heads; `evaluate` then knows ``value``, that of the first, and ``value/1`` to ``value/<heads>``.

        Nothing changes where there are that many. Raises UsageError where there are others.
        """
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

"""Functions that say which of two answers is better: a user's own, or a language model that is asked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Protocol

from polopt.core.errors import UsageError
from polopt.core.example import Example
from polopt.core.plugins import load_object
from polopt.core.policy import Request

Preference = Callable[..., Sequence[float | None]]
"""``f(prompts, first, second, **columns) -> P(first beats second)``, one probability per comparison.

``prompts``, ``first`` and ``second`` are lists of texts (of a chat, the prompt is a list of messages), ``columns`` the
columns of the examples, and ``answer``, ``example``, ``first_ids`` and ``second_ids`` (tokens). None: does not apply.
"""

TEMPLATE = (
    "Which answer to the question is better?\n\nQuestion:\n{prompt}\n\nAnswer A:\n{first}\n\nAnswer B:\n{second}\n\n"
    "The better answer is:"
)
VERDICTS = (" A", " B")
MODEL = "lm:"
"""How the name of a judge begins that is a language model: ``lm:PATH``."""
TOKENS = 16_384
"""Tokens in one forward pass of a judge or reward model, padding included."""


class Judging(Protocol):
    """A language model policy, as far as a judge needs it."""

    def write(self, requests: Sequence[Request], texts: Sequence[str]) -> Any: ...

    def cost(self, rollout: Any) -> list[int]: ...

    def evaluate(self, rollout: Any, names: frozenset[str]) -> Any: ...


@cache
def load_preference(
    name: str, template: str = TEMPLATE, verdicts: tuple[str, str] = VERDICTS, device: str = "auto"
) -> Preference:
    """The judge of that name, loaded once: ``lm:PATH`` or ``file.py:function``.

    Raises UsageError for a file, function or model that cannot be loaded.
    """
    if not name.startswith(MODEL):
        return load_object(name, "judge")
    from polopt.policies.causal_lm.policy import CausalLM  # the other judges need no transformers

    return LanguageModelJudge(CausalLM.load(name.removeprefix(MODEL), device=device), template, verdicts)


class LanguageModelJudge:
    """P(first better) = softmax(log pi(A | question), log pi(B | question))_A, pi a language model that is asked.

    ``template`` holds ``{prompt}``, ``{first}`` and ``{second}``; ``verdicts`` are the answers that stand for the first
    and for the second, one token each. Raises UsageError for a template without one of these, or a longer verdict.
    """

    def __init__(self, model: Judging, template: str = TEMPLATE, verdicts: tuple[str, str] = VERDICTS) -> None:
        if lacking := [name for name in ("{prompt}", "{first}", "{second}") if name not in template]:
            raise UsageError(f"the template of a judge must hold {lacking[0]}")
        self.model, self.template, self.verdicts = model, template, verdicts
        asked = [Request(Example("verdict", "?"), 1)] * 2
        lengths = model.write(asked, list(verdicts)).lengths.tolist()
        if long := [verdict for verdict, length in zip(verdicts, lengths, strict=True) if length != 1]:
            raise UsageError(f"a verdict must be one token of the judge's model, but {long[0]!r} is not")

    def __call__(
        self, prompts: Sequence[Any], first: Sequence[str], second: Sequence[str], **columns: Any
    ) -> list[float]:
        questions = [
            # Not str.format: answers may hold braces, and so may what they quote.
            _filled(self.template, {"prompt": as_text(prompt), "first": a, "second": b})
            for prompt, a, b in zip(prompts, first, second, strict=True)
        ]
        asked = [Request(Example(str(place), question), 1) for place, question in enumerate(questions)]
        logp = [self._logp(asked, [verdict] * len(asked)) for verdict in self.verdicts]
        return [1 / (1 + math.exp(min(b - a, 700.0))) for a, b in zip(*logp, strict=True)]

    def _logp(self, asked: Sequence[Request], texts: Sequence[str]) -> list[float]:
        written = self.model.write(asked, texts)
        return last_values(self.model, written, "logp")


def last_values(model: Judging, rollout: Any, name: str) -> list[float]:
    """A functional of the model at the last step of each trajectory, within `TOKENS` at a time, without gradient."""
    import torch

    cost = model.cost(rollout)
    found = torch.empty(rollout.n_trajectories)
    with torch.no_grad():
        for members in rollout.bins("trajectory", cost, TOKENS):
            piece = rollout.select(torch.tensor(members))
            value = model.evaluate(piece, frozenset({name}))[name]
            found[members] = value[piece.lengths.cumsum(0) - 1].float().cpu()
    return [float(value) for value in found]


def as_text(prompt: Any) -> str:
    """A prompt as one text: of a chat, each message after the name of its role."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _filled(template: str, values: Mapping[str, str]) -> str:
    pieces = [template]
    for name, value in values.items():
        mark = "{" + name + "}"
        # Only pieces of the template are searched: what was filled in stands at odd places.
        pieces = [
            part
            for place, piece in enumerate(pieces)
            for part in (_joined(piece.split(mark), value) if place % 2 == 0 else [piece])
        ]
    return "".join(pieces)


def _joined(parts: Sequence[str], value: str) -> list[str]:
    return [item for place, part in enumerate(parts) for item in ([value, part] if place else [part])]

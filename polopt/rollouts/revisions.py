"""Three answers a prompt, a reference, the policy's own and an expert's revision of it, two of them also half blind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from enum import IntEnum
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.core.errors import UsageError
from polopt.core.example import Example, Text, answers_of
from polopt.core.part import part
from polopt.core.policy import Corruption, Policy, Request
from polopt.core.rollout import Rollout
from polopt.rollouts.dataset import Answers, Dataset, Form, Found, asked


class Role(IntEnum):
    """What a trajectory is in its group (trajectory column ``role``)."""

    REFERENCE = 0
    GENERATED = 1
    REVISED = 2
    BLIND_REFERENCE = 3
    """The reference answer under a corrupted prompt."""
    BLIND_REVISED = 4


@part("rollout", "revisions")
@dataclass(frozen=True)
class Revisions(Dataset):
    """Each example as one group of five: y_ref, y_gen and y_rev, then y_ref and y_rev under a corrupted prompt.

    ``chosen`` is y_ref, ``rejected`` is y_gen, the column ``revised`` is y_rev. Of a list y_ref is the best answer,
    y_gen the worst, and y_rev the one most like y_gen of the others above the middle of their labels, or y_ref again.
    A column ``report`` holds the expert's report of y_gen, a mapping per sentence: ``generated`` and ``revised``, its
    text in the two answers (either may lack), ``score`` from 4 (right) to 1, ``error``.

    Trajectory columns ``role`` (`Role`) and ``label``: 1 for y_ref and y_rev, 0 for y_gen, NaN under a corrupted
    prompt. Step columns ``severity``, 1 + (4 - score) / 2 on the sentences of y_gen and y_rev, and ``relevance``, 3 on
    those sentences of y_rev whose error is "observation" (what the prompt shows was misread); both are 1 elsewhere. A
    prompt is corrupted with ``probability`` and ``blank`` of `Corruption`. Raises UsageError as `Dataset` does.
    """

    form: Form = "lists"
    probability: float = 0.3
    blank: str = " "
    corruption_seed: int = 0

    gives = Dataset.gives | {"role", "severity", "relevance"}

    def __call__(
        self,
        policy: Policy,
        requests: Sequence[Request],
        *,
        limit: int,
        seed: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> Rollout:
        seeing = self.write(policy, requests, self.read(requests), limit=limit)
        role = torch.arange(seeing.n_trajectories, device=seeing.device) % 3
        weights = self._weights(policy, seeing)
        seeing = seeing.with_columns(trajectory={"role": role}, step=weights)
        again = seeing.select(role != Role.GENERATED)
        blind = policy.corrupted(again, Corruption(self.probability, self.blank, self.corruption_seed))
        columns = {
            "role": torch.where(again["role"] == Role.REFERENCE, int(Role.BLIND_REFERENCE), int(Role.BLIND_REVISED)),
            "label": torch.full_like(again["label"], torch.nan),
        }
        blind = blind.with_columns(trajectory=columns, step={"mask/chosen": torch.zeros_like(again.mask)})
        return Rollout.concat([seeing, blind], torch.cat([seeing.group, again.group]))

    def read(self, requests: Sequence[Request]) -> list[Found]:
        found: list[Found] = []
        reason: UsageError | None = None
        for place, request in enumerate(asked(requests)):
            try:
                found.append((place, three_answers(request.example)))
            except UsageError as error:
                if self.unusable == "raise":
                    raise
                reason = error
        if not found:
            raise reason or UsageError("nothing to learn from: no request asks for an answer")
        return found

    def check(self, examples: Sequence[Example]) -> None:
        self.read([Request(example, 1) for example in examples])

    def on_policy(self) -> Mapping[str, Any]:
        raise UsageError(
            "an answer must be revised before it trains: sample with polopt pairs, let an expert revise what is "
            "rejected, and give its --data with a column 'revised'"
        )

    def _weights(self, policy: Policy, rollout: Rollout) -> dict[str, Float[Tensor, " step"]]:
        ones = [torch.ones(length) for length in rollout.lengths.tolist()]
        severity, relevance = ones, [one.clone() for one in ones]
        for group, example in enumerate(rollout.examples[::3]):
            report = example.columns.get("report") or ()
            for role, side in ((Role.GENERATED, "generated"), (Role.REVISED, "revised")):
                sentences = [sentence for sentence in report if sentence.get(side)]
                if not sentences:
                    continue
                place = 3 * group + role
                text = three_answers(example)[role][0]
                ends = _ends(policy, example, text, [str(sentence[side]) for sentence in sentences])
                start = 0
                for sentence, end in zip(sentences, [*ends[:-1], len(severity[place])], strict=True):
                    # What the expert added has nothing to be judged by.
                    known = bool(sentence.get("generated"))
                    severity[place][start:end] = 1 + (4 - float(sentence.get("score", 4))) / 2 if known else 1.0
                    if role == Role.REVISED and known and sentence.get("error") == "observation":
                        relevance[place][start:end] = 3.0
                    start = end
        made = {"severity": severity, "relevance": relevance}
        return {name: torch.cat(values).to(rollout.device) for name, values in made.items()}


def three_answers(example: Example) -> Answers:
    """Reference, generated and revised answer with their labels; raises UsageError naming an example without them."""
    revised = example.columns.get("revised")
    if revised is not None and example.chosen is not None and example.rejected is not None:
        text: Text = revised if isinstance(revised, str) else tuple(revised)
        return (example.chosen, 1.0), (example.rejected, 0.0), (text, 1.0)
    if not example.completions:
        raise UsageError(
            f"example {example.id!r} brings no revised answer: it needs chosen (a reference), rejected (the policy's "
            f"own answer) and a column 'revised', or a list of answers (completions and labels)"
        )
    answers = answers_of(example)
    (best, high), (worst, low) = (pick(answers, key=lambda answer: answer[1]) for pick in (max, min))
    if not high > low:
        raise UsageError(f"example {example.id!r} prefers none of its answers: all {len(answers)} have one label")
    others = [answer for answer, label in answers if 2 * label > high + low and answer != best]
    near = max(others, key=lambda answer: _likeness(answer, worst), default=best)
    return (best, 1.0), (worst, 0.0), (near, 1.0)


def _likeness(one: Text, other: Text) -> float:
    return SequenceMatcher(None, str(one), str(other), autojunk=False).ratio()


def _ends(policy: Policy, example: Example, text: Text, sentences: Sequence[str]) -> list[int]:
    """The number of steps of the answer up to the end of each sentence."""
    place, prefixes = 0, []
    for sentence in sentences:
        at = text.find(sentence, place) if isinstance(text, str) else -1
        if at < 0:
            raise UsageError(
                f"the report of example {example.id!r} has a sentence that its answer, a plain text, does not have at "
                f"that place: {sentence[:60]!r}"
            )
        place = at + len(sentence)
        prefixes.append(text[:place])
    return [int(n) for n in policy.write([Request(example, 1)] * len(prefixes), prefixes).lengths]

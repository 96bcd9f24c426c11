"""Answers that are known already, written as groups: pairs, lists, singles and demonstrations from a data set."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from polopt.core.errors import UsageError
from polopt.core.example import Example, Text, answers_of
from polopt.core.part import Part, part
from polopt.core.policy import Policy, Request
from polopt.core.rollout import Rollout, Source
from polopt.filters.preferences import Best, BestWorst, Ranked, with_labels
from polopt.rollouts.groups import Groups, requested

Form = Literal["pairs", "lists", "singles", "demonstrations"]
Answers = tuple[tuple[Text, float], ...]
"""The answers of one group with their labels."""
Found = tuple[int, Answers]
"""A group, and the place of its request among those that ask for something."""


@part("rollout", "dataset")
@dataclass(frozen=True)
class Dataset(Part):
    """The answers that each requested example brings, as groups; nothing is sampled, group sizes are the data's.

    ``form`` says what to make of an example (`polopt.core.example.answers_of`):

    - ``pairs``: the best answer of its list with label 1 against the worst with label 0;
    - ``lists``: all its answers with their labels;
    - ``singles``: every answer a group of its own, label 1 or 0; of a list with other labels its best and its worst;
    - ``demonstrations``: its best answer, or its single unless that is labelled false: a group of one with label 1.

    ``end`` ends every answer with the policy's own end action, which counts as a step. Trajectory columns ``label``
    [M], ``limit`` (the steps that the run allows to sampled answers) and those that the requests carry; step column
    ``mask/chosen``, the answers to imitate (`polopt.filters.preferences.with_labels`).

    Raises UsageError naming the example that lacks such answers, has labels that are not finite, equal answers in a
    pair, or an answer that is empty or does not fit the policy; with ``unusable`` "drop" it is left out, and only a
    batch without any other is an error.
    """

    form: Form = "pairs"
    end: bool = True
    unusable: Literal["raise", "drop"] = "raise"

    gives = frozenset({"label", "limit", "mask/chosen"})
    offline = True

    def __call__(
        self,
        policy: Policy,
        requests: Sequence[Request],
        *,
        limit: int,
        seed: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> Rollout:
        return self.write(policy, requests, self.read(requests), limit=limit)

    def read(self, requests: Sequence[Request]) -> list[Found]:
        """The groups of the requested examples."""
        found: list[Found] = []
        reason: UsageError | None = None
        for place, request in enumerate(asked(requests)):
            try:
                found += [(place, answers) for answers in groups_of(request.example, self.form)]
            except UsageError as error:
                if self.unusable == "raise":
                    raise
                reason = error
        if not found:
            raise reason or UsageError("nothing to learn from: no request asks for an answer")
        return found

    def write(self, policy: Policy, requests: Sequence[Request], found: Sequence[Found], *, limit: int) -> Rollout:
        """The groups as trajectories of a policy, with the columns of this part."""
        those = asked(requests)
        try:
            written, kept = [self._written(policy, those, found)], list(found)
        except UsageError as error:
            if self.unusable == "raise":
                raise
            # One of them cannot be written: all that can, one by one.
            written, kept, reason = [], [], error
            for one in found:
                try:
                    written.append(self._written(policy, those, [one]))
                    kept.append(one)
                except UsageError as failure:
                    reason = failure
            if not written:
                raise reason from None
        rollout = Rollout.concat(written)
        owner = torch.tensor([place for place, answers in kept for _ in answers], device=rollout.device)
        label = torch.tensor([label for _, answers in kept for _, label in answers], device=rollout.device)
        columns = requested(those, owner, label) | {"limit": torch.full_like(rollout.lengths, limit)}
        if self.form == "demonstrations":
            columns["source"] = torch.full_like(rollout.lengths, int(Source.DEMONSTRATION))
        return with_labels(rollout.with_columns(trajectory=columns), label)

    def _written(self, policy: Policy, those: Sequence[Request], found: Sequence[Found]) -> Rollout:
        requests = [those[place] for place, answers in found for _ in answers]
        texts = [text for _, answers in found for text, _ in answers]
        rollout = policy.write(requests, texts, end=self.end)
        sizes = torch.tensor([len(answers) for _, answers in found])
        group = torch.arange(len(sizes)).repeat_interleave(sizes).to(rollout.device)
        return dataclasses.replace(rollout, group=group)

    def check(self, examples: Sequence[Example]) -> None:
        """Raise UsageError, before anything is trained, for the first example that lacks what the form asks for.

        Where such examples are dropped, only if there is no other.
        """
        reason: UsageError | None = None
        for example in examples:
            try:
                groups_of(example, self.form)
            except UsageError as error:
                if self.unusable == "raise":
                    raise
                reason = reason or error
            else:
                if self.unusable == "drop":
                    return
        if reason is not None:
            raise reason

    def on_policy(self) -> Mapping[str, Any]:
        """Slots that give the same form from answers of the policy: sampled groups, labelled by their score."""
        judged = {"pairs": BestWorst(), "lists": Ranked(), "singles": BestWorst(), "demonstrations": Best()}
        return {"rollout": Groups(), "filter": judged[self.form]}


def groups_of(example: Example, form: Form) -> list[Answers]:
    """The groups that an example makes; raises UsageError where it makes none, or has labels that mean nothing."""
    answers = answers_of(example)
    if not all(math.isfinite(label) for _, label in answers):
        raise UsageError(f"example {example.id!r} has a label that is not a finite number")
    if form == "demonstrations":
        best = _best(answers)
        if best is None or (len(answers) == 1 and not best[1] > 0):
            raise _lacking(example, "demonstration (a completion, or chosen)")
        return [((best[0], 1.0),)]
    if form == "singles" and answers and all(label in (0.0, 1.0) for _, label in answers):
        return [(answer,) for answer in answers]
    if len(answers) < 2:
        wanted = "labelled single (completion and label)" if form == "singles" else "pair (chosen and rejected)"
        raise _lacking(example, wanted if form != "lists" else "list of answers (completions and labels)")
    best, worst = _best(answers), min(answers, key=lambda answer: answer[1])
    assert best is not None
    if best[1] == worst[1]:
        # Of a list too: a group without a pair would count as 0 in a mean over groups.
        raise UsageError(f"example {example.id!r} prefers none of its answers: all {len(answers)} have one label")
    if form == "lists":
        return [answers]
    if best[0] == worst[0]:
        raise UsageError(f"example {example.id!r} has a pair of equal answers: chosen and rejected are the same text")
    pair = ((best[0], 1.0), (worst[0], 0.0))
    return [pair] if form == "pairs" else [(answer,) for answer in pair]


def _best(answers: Answers) -> tuple[Text, float] | None:
    return max(answers, key=lambda answer: answer[1], default=None)


def _lacking(example: Example, wanted: str) -> UsageError:
    return UsageError(
        f"example {example.id!r} brings no {wanted}; name its columns with --map, or let the policy's own answers be "
        f"compared by their reward: --pairs on-policy"
    )


def asked(requests: Sequence[Request]) -> list[Request]:
    """The requests that ask for a trajectory."""
    return [request for request in requests if request.count]

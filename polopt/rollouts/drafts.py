"""Answers behind a draft: pairs as six sequences to learn revision from, and answers that are revised k times."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from polopt.core.errors import UsageError
from polopt.core.example import Example, Text
from polopt.core.part import Part, part
from polopt.core.policy import Policy, Request
from polopt.core.rollout import Rollout, Source
from polopt.core.segments import segment_mean
from polopt.filters.preferences import with_labels
from polopt.rewards.scoring import transcripts
from polopt.rollouts.dataset import Dataset, groups_of
from polopt.rollouts.groups import Groups, requested
from polopt.rollouts.states import another_seed

NO_DRAFT: Final = -1
"""In column ``draft``: the answer is the first."""

TEMPLATE: Final = "{prompt}{draft}\n{prompt}"
INSTRUCTION: Final = "Improve your answer."


@dataclass(frozen=True)
class Drafts:
    """How a prompt shows a draft: ``template`` makes it of plain texts, ``{prompt}`` and ``{draft}``.

    A chat goes on with the draft as the assistant's message, and ``instruction`` as the user's. Raises UsageError for a
    template that lacks the draft.
    """

    template: str = TEMPLATE
    instruction: str = INSTRUCTION

    def __post_init__(self) -> None:
        if "{draft}" not in self.template:
            raise UsageError(f"template {self.template!r} does not show the draft; write {{draft}} where it stands")

    def with_draft(self, request: Request, draft: Text) -> Request:
        """The request for a revision of this draft."""
        prompt = request.example.prompt if request.prompt is None else request.prompt
        if not isinstance(prompt, str):
            said = ({"role": "assistant", "content": draft},) if isinstance(draft, str) else draft
            return dataclasses.replace(request, prompt=(*prompt, *said, {"role": "user", "content": self.instruction}))
        if not isinstance(draft, str):
            raise UsageError(f"an answer to example {request.example.id!r} is a chat, but its prompt is plain text")
        # One after the other, so that braces in a prompt or a draft stay as they are.
        pieces = [piece.replace("{prompt}", prompt) for piece in self.template.split("{draft}")]
        return dataclasses.replace(request, prompt=draft.join(pieces))

    def six(
        self, policy: Policy, requests: Sequence[Request], pairs: Sequence[tuple[Text, Text]], *, end: bool
    ) -> Rollout:
        """A group per pair (1, 0): both after the prompt, both behind the draft 0, both behind 1, in this order.

        Trajectory columns ``answer`` [M], 1 or 0, and ``draft`` [M], that of the draft or -1.
        """
        placed: list[Request] = []
        for request, (one, zero) in zip(requests, pairs, strict=True):
            for behind in (request, self.with_draft(request, zero), self.with_draft(request, one)):
                placed += [behind] * 2
        rollout = policy.write(placed, [text for pair in pairs for text in pair * 3], end=end)
        count, on = len(pairs), rollout.device
        columns = {
            "answer": torch.tensor([1, 0], device=on).repeat(3 * count),
            "draft": torch.tensor([NO_DRAFT, NO_DRAFT, 0, 0, 1, 1], device=on).repeat(count),
        }
        group = torch.arange(count, device=on).repeat_interleave(6)
        return dataclasses.replace(rollout, group=group).with_columns(trajectory=columns)


@part("rollout", "drafted-pairs")
@dataclass(frozen=True)
class DraftedPairs(Drafts, Part):
    """The pair (w, l) of each requested example as a group of six: w and l after x, after (x, l) and after (x, w).

    Trajectory columns ``label`` and ``answer`` [M], 1 for w and 0 for l, ``draft`` [M], the same of the draft that is
    shown (-1 for none), ``limit``, and those that the requests carry; step column ``mask/chosen``. ``end`` as in
    `Dataset`. Held-out answers are revised ``rounds`` times. Raises UsageError for an example without a pair.
    """

    end: bool = True
    rounds: int = 0

    gives = Dataset.gives | {"answer", "draft"}
    offline = True
    form = "pairs"

    def __call__(
        self,
        policy: Policy,
        requests: Sequence[Request],
        *,
        limit: int,
        seed: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> Rollout:
        asked = [request for request in requests if request.count]
        found = [groups_of(request.example, "pairs")[0] for request in asked]
        rollout = self.six(policy, asked, [(best[0], worst[0]) for best, worst in found], end=self.end)
        label = rollout["answer"].float()
        columns = requested(asked, rollout.group, label) | {"limit": torch.full_like(rollout.lengths, limit)}
        return with_labels(rollout.with_columns(trajectory=columns), label)

    def check(self, examples: Sequence[Example]) -> None:
        """Raise UsageError for the first example without a pair."""
        Dataset("pairs").check(examples)

    def held_out(self) -> Groups:
        """Held-out answers are revised as often as ``rounds`` says."""
        return Revised(template=self.template, instruction=self.instruction, rounds=self.rounds)

    def on_policy(self) -> Mapping[str, Any]:
        """Slots that give the same six from two answers of the policy, labelled by their score."""
        return {"rollout": DraftedGroups(template=self.template, instruction=self.instruction), "filter": BetterDraft()}


@part("rollout", "drafted-groups")
@dataclass(frozen=True)
class DraftedGroups(Groups):
    """Of a request's answers the first two, the next two, ... as groups of six (`Drafts.six`), written again.

    Which of the two is better is not known yet. Pairs of equal texts, and with an answer that is empty or cut by the
    limit, are left out; raises UsageError where nothing else was drawn, and for a request of fewer than two answers.
    Trajectory columns ``answer`` and ``draft`` [M].
    """

    template: str = TEMPLATE
    instruction: str = INSTRUCTION

    gives = Groups.gives | {"answer", "draft"}

    def drafts(self) -> Drafts:
        """How prompts show drafts."""
        return Drafts(self.template, self.instruction)

    def __call__(
        self,
        policy: Policy,
        requests: Sequence[Request],
        *,
        limit: int,
        seed: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> Rollout:
        asked = [request for request in requests if request.count]
        if alone := [request for request in asked if request.count < 2]:
            raise UsageError(
                f"example {alone[0].example.id!r} asks for one answer; a pair needs a --group of at least 2"
            )
        drawn = super().__call__(policy, asked, limit=limit, seed=seed, progress=progress)
        texts, cut, owner = [one.completion for one in transcripts(drawn)], drawn["truncated"].tolist(), []
        pairs: list[tuple[Text, Text]] = []
        start = 0
        for place, request in enumerate(asked):
            for i in range(start, start + request.count - 1, 2):
                if texts[i] and texts[i + 1] and texts[i] != texts[i + 1] and not (cut[i] or cut[i + 1]):
                    pairs.append((texts[i], texts[i + 1]))
                    owner.append(place)
            start += request.count
        if not pairs:
            raise UsageError("no two answers can be compared: all are equal, empty or cut by the limit")
        rollout = self.drafts().six(policy, [asked[place] for place in owner], pairs, end=True)
        of = torch.tensor(owner, device=rollout.device)[rollout.group]
        columns = requested(asked, of, drawn.logp) | {
            "limit": torch.full_like(rollout.lengths, self.max_new_tokens or limit),
            "source": torch.full_like(rollout.lengths, int(Source.POLICY)),
        }
        return rollout.with_columns(trajectory=columns)

    def held_out(self) -> Groups:
        """Held-out answers are first ones."""
        return Revised(template=self.template, instruction=self.instruction, rounds=0)


@part("filter", "better-draft")
@dataclass(frozen=True)
class BetterDraft(Part):
    """``label`` and ``draft`` of drafted groups: 1 for the answer with the higher mean of a column [M] over its copies.

    NaN values do not count; groups in which one answer has no other, or both the same mean, go.
    """

    column: str = "score"

    gives = frozenset({"label", "mask/chosen"})

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.column, "answer", "draft"})

    def __call__(self, rollout: Rollout) -> Rollout:
        values, answer, draft = rollout[self.column], rollout["answer"], rollout["draft"]
        valid, count = ~values.isnan(), rollout.n_groups
        one, zero = (
            segment_mean(values, rollout.group, count, mask=valid & (answer == side), empty=torch.nan)
            for side in (1, 0)
        )
        gap = (one - zero)[rollout.group]
        as_is = gap > 0
        label = torch.where(as_is, answer, 1 - answer).to(values)
        made = rollout.with_columns(
            trajectory={"draft": torch.where(as_is | (draft == NO_DRAFT), draft, 1 - draft), "label": label}
        ).select((gap > 0) | (gap < 0))
        return with_labels(made, made["label"])


@part("rollout", "revised")
@dataclass(frozen=True)
class Revised(Groups):
    """Groups of answers y_k: y_0 is drawn after the prompt, y_{j+1} after the prompt that shows y_j, k = ``rounds``.

    Trajectories are the last revisions, after what they saw; earlier answers are not kept. A draft is its whole text.
    The options are those of `Sampling` and `Drafts`.
    """

    template: str = TEMPLATE
    instruction: str = INSTRUCTION
    rounds: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds < 0:
            raise UsageError(f"rounds is {self.rounds}; answers are revised 0 times or more")
        Drafts(self.template, self.instruction)

    def with_draft(self, request: Request, draft: Text) -> Request:
        """The request for a revision of this draft."""
        return Drafts(self.template, self.instruction).with_draft(request, draft)

    def __call__(
        self,
        policy: Policy,
        requests: Sequence[Request],
        *,
        limit: int,
        seed: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> Rollout:
        asked = [request for request in requests if request.count]
        answers = super().__call__(policy, asked, limit=limit, seed=seed, progress=progress)
        group = answers.group
        each = [dataclasses.replace(asked[owner], count=1) for owner in group.tolist()]
        for number in range(1, self.rounds + 1):
            read = transcripts(answers)
            shown = [self.with_draft(request, one.completion) for request, one in zip(each, read, strict=True)]
            answers = super().__call__(policy, shown, limit=limit, seed=another_seed(seed, number), progress=progress)
        return dataclasses.replace(answers, group=group)

    def held_out(self) -> Groups:
        """Held-out answers are revised as training ones are."""
        return self

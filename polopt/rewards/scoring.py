"""The task's rewards as a part: transcripts out of a rollout's payload, reward columns into the rollout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from polopt.core.example import Example, Text
from polopt.core.rollout import Rollout, Source
from polopt.rewards.reward import InvalidReward, NamedReward, score
from polopt.rewards.transcript import Transcript


class ReadablePayload(Protocol):
    """What a payload must offer for its trajectories to be judged by their text; one entry per trajectory."""

    @property
    def examples(self) -> Sequence[Example]:
        """What was asked."""
        ...

    @property
    def prompt_texts(self) -> Sequence[Text]:
        """What the policy saw."""
        ...

    @property
    def completions(self) -> Sequence[str]:
        """What it answered."""
        ...

    @property
    def completion_ids(self) -> Sequence[tuple[int, ...]]:
        """What it answered, in tokens."""
        ...


def transcripts(rollout: Rollout) -> list[Transcript]:
    """What a reward sees of each trajectory."""
    payload: ReadablePayload = rollout.payload  # type: ignore[assignment]
    cut = rollout["truncated"].tolist() if "truncated" in rollout else [False] * rollout.n_trajectories
    return [
        Transcript(example, prompt, completion, ids, bool(truncated))
        for example, prompt, completion, ids, truncated in zip(
            payload.examples, payload.prompt_texts, payload.completions, payload.completion_ids, cut, strict=True
        )
    ]


@dataclass(frozen=True)
class Scorer:
    """Adds ``reward/<name>``, ``score`` and ``reward`` (the weighted total) to a rollout, and masks what has no reward.

    A weight other than 1 stands in ``reward_weight/<name>``, for parts that combine the rewards in their own way.

    A trajectory whose total is NaN (a reward failed under ``on_error="skip"``, or none applies) has every step masked,
    for every model: no part trains on it. One that is ``unfinished`` is not judged and has 0 everywhere. Replayed
    trajectories that bring their rewards keep them. Without any reward the rollout stays as it is.
    """

    rewards: tuple[NamedReward, ...]
    on_error: Literal["raise", "skip"] = "raise"
    timeout: float | None = None

    def __call__(self, rollout: Rollout) -> tuple[Rollout, tuple[InvalidReward, ...]]:
        """The scored rollout, and every reward that failed with its reason.

        Raises RewardError under ``on_error="raise"``.
        """
        if not self.rewards:
            return rollout, ()
        names = {f"reward/{reward.name}" for reward in self.rewards} | {"score", "source"}
        known = torch.zeros_like(rollout.lengths, dtype=torch.bool)
        if names <= set(rollout.names()):
            known = rollout["source"] == Source.REPLAY
        if "unfinished" in rollout:
            known = known | rollout["unfinished"].bool()
        place = (~known).nonzero().flatten()
        unknown = rollout.select(place) if bool(known.any()) else rollout
        scores = score(transcripts(unknown), self.rewards, on_error=self.on_error, timeout=self.timeout)

        def filled(name: str, found: Tensor) -> Tensor:
            found = found.to(rollout.device)
            if not bool(known.any()):
                return found
            before = rollout[name].to(found) if name in rollout else found.new_zeros(rollout.n_trajectories)
            return before.index_copy(0, place, found)

        total = filled("score", scores.total)
        columns = {f"reward/{name}": filled(f"reward/{name}", value) for name, value in scores.rewards.items()}
        for reward in self.rewards:
            if reward.weight != 1.0:
                columns[f"reward_weight/{reward.name}"] = torch.full_like(total, reward.weight)
        masks = ["mask", *rollout.counts.masks]
        scored = rollout.with_columns(
            trajectory={**columns, "score": total, "reward": total.clone()},
            step={name: rollout.under(name).mask & ~rollout.spread(torch.isnan(total)) for name in masks},
        )
        where = place.tolist()
        return scored, tuple(replace(failure, index=where[failure.index]) for failure in scores.invalid)

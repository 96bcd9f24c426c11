"""The task's rewards as a part: transcripts out of a rollout's payload, reward columns into the rollout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from polopt.core.example import Example, Text
from polopt.core.rollout import Rollout
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

    A trajectory whose total is NaN (a reward failed under ``on_error="skip"``, or none applies) has every step masked:
    no part trains on it.
    """

    rewards: tuple[NamedReward, ...]
    on_error: Literal["raise", "skip"] = "raise"
    timeout: float | None = None

    def __call__(self, rollout: Rollout) -> tuple[Rollout, tuple[InvalidReward, ...]]:
        """The scored rollout, and every reward that failed with its reason.

        Raises RewardError under ``on_error="raise"``.
        """
        scores = score(transcripts(rollout), self.rewards, on_error=self.on_error, timeout=self.timeout)
        total = scores.total.to(rollout.device)
        columns = {f"reward/{name}": value.to(rollout.device) for name, value in scores.rewards.items()}
        for reward in self.rewards:
            if reward.weight != 1.0:
                columns[f"reward_weight/{reward.name}"] = torch.full_like(total, reward.weight)
        scored = rollout.with_columns(
            trajectory={**columns, "score": total, "reward": total.clone()},
            step={"mask": rollout.mask & ~rollout.spread(torch.isnan(total))},
        )
        return scored, scores.invalid

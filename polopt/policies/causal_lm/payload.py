"""The tokens of a rollout: what a language model conditions on and what it wrote, packed like the rollout itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from polopt.core.example import Example, Text, from_plain, plain
from polopt.core.rollout import payload_kind

Tokens = tuple[int, ...]


@payload_kind("tokens")
@dataclass(frozen=True, eq=False)
class TokenPayload:
    """Prompts and completions of M trajectories with N completion tokens in all.

    ``prompts`` are the distinct token prompts, each stored once; trajectory i was conditioned on
    ``prompts[prompt_of[i]]``. ``ids`` [N] are completion tokens, ``lengths`` [M] long. The policy that trains on
    trajectory i is softmax(logits / ``temperature[i]``). ``examples``, ``prompt_texts`` (what was tokenized) and
    ``completions`` (text without special tokens) have one entry per trajectory. The last ``continued[i]``
    tokens of its prompt belong to its answer, which it goes on with (0 for all when left out). Everything is on the
    CPU.

    Raises ValueError when the sizes disagree.
    """

    prompts: tuple[Tokens, ...]
    prompt_of: Int[Tensor, " trajectory"]
    ids: Int[Tensor, " step"]
    lengths: Int[Tensor, " trajectory"]
    temperature: Float[Tensor, " trajectory"]
    examples: tuple[Example, ...]
    prompt_texts: tuple[Text, ...]
    completions: tuple[str, ...]
    continued: Int[Tensor, " trajectory"] | None = None

    def __post_init__(self) -> None:
        count = self.lengths.numel()
        for name in ("prompt_of", "temperature", "examples", "prompt_texts", "completions"):
            if len(getattr(self, name)) != count:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for {count} trajectories")
        if int(self.lengths.sum()) != self.ids.numel():
            raise ValueError(f"lengths add up to {int(self.lengths.sum())}, but there are {self.ids.numel()} tokens")
        if count and not 0 <= int(self.prompt_of.min()) <= int(self.prompt_of.max()) < len(self.prompts):
            raise ValueError(f"prompt_of names prompts up to {int(self.prompt_of.max())} of {len(self.prompts)}")

    @classmethod
    def build(
        cls,
        prompts: Iterable[Sequence[int]],
        completions: Iterable[Sequence[int]],
        temperature: Float[Tensor, " trajectory"],
        examples: Iterable[Example],
        prompt_texts: Iterable[Text],
        texts: Iterable[str],
        continued: Iterable[int] | None = None,
    ) -> Self:
        """A payload from one prompt, completion, example and text per trajectory; equal prompts are stored once."""
        distinct: dict[Tokens, int] = {}
        owner = [distinct.setdefault(tuple(prompt), len(distinct)) for prompt in prompts]
        written = [list(ids) for ids in completions]
        return cls(
            tuple(distinct),
            torch.tensor(owner, dtype=torch.int64),
            torch.tensor([token for ids in written for token in ids], dtype=torch.int64),
            torch.tensor([len(ids) for ids in written], dtype=torch.int64),
            temperature,
            tuple(examples),
            tuple(prompt_texts),
            tuple(texts),
            None if continued is None else torch.tensor(list(continued), dtype=torch.int64),
        )

    @cached_property
    def prompt_lengths(self) -> Int[Tensor, " trajectory"]:
        """Tokens of each trajectory's prompt."""
        return torch.tensor([len(prompt) for prompt in self.prompts], dtype=torch.int64)[self.prompt_of]

    @cached_property
    def completion_ids(self) -> tuple[Tokens, ...]:
        """Tokens of each trajectory's answer, those that it goes on with included."""
        pieces = torch.split(self.ids, self.lengths.tolist())
        before = self.tokens_before.tolist()
        prompts = [self.prompts[index] for index in self.prompt_of.tolist()]
        return tuple(
            (*prompt[len(prompt) - count :], *ids.tolist())
            for prompt, count, ids in zip(prompts, before, pieces, strict=True)
        )

    @property
    def tokens_before(self) -> Int[Tensor, " trajectory"]:
        """Tokens of each prompt that belong to the answer."""
        return torch.zeros_like(self.lengths) if self.continued is None else self.continued

    def select(self, trajectories: Int[Tensor, " kept"]) -> Self:
        """The entries of these trajectories, in this order; indices may repeat. Prompts nobody uses any more go."""
        chosen = trajectories.cpu()
        used, owner = torch.unique(self.prompt_of[chosen], return_inverse=True)
        pieces = torch.split(self.ids, self.lengths.tolist())
        index = chosen.tolist()
        return dataclasses.replace(
            self,
            prompts=tuple(self.prompts[i] for i in used.tolist()),
            prompt_of=owner,
            ids=torch.cat([pieces[i] for i in index]) if index else self.ids[:0],
            lengths=self.lengths[chosen],
            temperature=self.temperature[chosen],
            examples=tuple(self.examples[i] for i in index),
            prompt_texts=tuple(self.prompt_texts[i] for i in index),
            completions=tuple(self.completions[i] for i in index),
            continued=None if self.continued is None else self.continued[chosen],
        )

    def join(self, later: Self) -> Self:
        """Trajectory by trajectory, these tokens, then the later ones; texts are the later ones, which are whole."""
        first, second = (torch.split(part.ids, part.lengths.tolist()) for part in (self, later))
        return dataclasses.replace(
            self,
            ids=torch.cat([piece for pair in zip(first, second, strict=True) for piece in pair]),
            lengths=self.lengths + later.lengths,
            completions=later.completions,
        )

    def concat(self, others: Sequence[Self]) -> Self:
        """This payload followed by the others; prompts they share are stored once."""
        parts = (self, *others)
        distinct: dict[Tokens, int] = {}
        owners = []
        for part in parts:
            place = [distinct.setdefault(prompt, len(distinct)) for prompt in part.prompts]
            owners.append(torch.tensor(place, dtype=torch.int64)[part.prompt_of])
        return dataclasses.replace(
            self,
            prompts=tuple(distinct),
            prompt_of=torch.cat(owners),
            ids=torch.cat([part.ids for part in parts]),
            lengths=torch.cat([part.lengths for part in parts]),
            temperature=torch.cat([part.temperature for part in parts]),
            examples=tuple(example for part in parts for example in part.examples),
            prompt_texts=tuple(text for part in parts for text in part.prompt_texts),
            completions=tuple(text for part in parts for text in part.completions),
            continued=torch.cat([part.tokens_before for part in parts]),
        )

    def state_dict(self) -> dict[str, Any]:
        """Prompts packed into one tensor, examples once, and a prompt's text only where it is not its example's."""
        pool = {id(example): example for example in self.examples}
        place = {key: index for index, key in enumerate(pool)}
        return {
            "prompts": torch.tensor([token for prompt in self.prompts for token in prompt], dtype=torch.int64),
            "prompt_lengths": torch.tensor([len(prompt) for prompt in self.prompts], dtype=torch.int64),
            "prompt_of": self.prompt_of,
            "ids": self.ids,
            "lengths": self.lengths,
            "temperature": self.temperature,
            "pool": plain(tuple(pool.values())),
            "example_of": [place[id(example)] for example in self.examples],
            "prompt_texts": [
                None if text == example.prompt else text
                for text, example in zip(self.prompt_texts, self.examples, strict=True)
            ],
            "completions": list(self.completions),
            "continued": self.continued,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The payload that was saved."""
        pool = from_plain(state["pool"])
        examples = tuple(pool[index] for index in state["example_of"])
        return cls(
            tuple(tuple(ids.tolist()) for ids in torch.split(state["prompts"], state["prompt_lengths"].tolist())),
            state["prompt_of"],
            state["ids"],
            state["lengths"],
            state["temperature"],
            examples,
            tuple(e.prompt if text is None else text for e, text in zip(examples, state["prompt_texts"], strict=True)),
            tuple(state["completions"]),
            state["continued"],
        )

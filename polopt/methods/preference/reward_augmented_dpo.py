"""Reward-augmented DPO: scored pairs relabelled under goals in the prompt (Zhang et al. 2024, arXiv:2410.08067).

Under a goal g, written into the prompt, an answer is worth R(x, y, g) = -(g - r(x, y))^2, r its score. A pair with
r_w > r_l makes two: (x, g = r_w) with y_w before y_l, and (x, g = r_l) with y_l before y_w. A pair loss, here DPO,
learns from the 2 P entries; policy and reference both read the goal. One asks for the highest goal in the end. A good
rejected answer is not unlearned but filed under its own score.

Settled: ties and pairs without scores are dropped; where scores contradict the label of a pair, the scores hold (the
official script filters by another score than the one it writes). A list makes an entry per different score. Goals must
be written before answers are sampled: iterate with `polopt pairs`, not with `--pairs on-policy`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from polopt.core.errors import UsageError
from polopt.core.example import Example, Text, answers_of
from polopt.core.part import part
from polopt.core.policy import Policy, Request
from polopt.core.registry import method
from polopt.core.rollout import Rollout
from polopt.methods.preference.dpo import DPO, dpo
from polopt.rollouts.dataset import Dataset
from polopt.rollouts.groups import Groups


@part("rollout", "goals")
@dataclass(frozen=True)
class Goals(Dataset):
    """`Dataset` in which an example is used once for each different score g of its answers, under `conditioned`.

    Labels follow R(., g); ``form`` "pairs" takes the best and the worst answer by score, "lists" all of them. Scores
    are the labels of a list, and of a pair the data's columns ``scores``, chosen first. Held-out prompts ask for
    ``top``, the largest score of the scale. A goal is written into plain text by ``template`` and into a chat as the
    system message ``message``. With ``unusable`` "raise" a tie and an example without scores are errors.
    """

    unusable: Literal["raise", "drop"] = "drop"
    scores: tuple[str, ...] = ("chosen_score", "rejected_score")
    top: float = 1.0
    template: str = "{goal} {prompt}"
    message: str = "Give an answer whose quality is {goal}."

    def __post_init__(self) -> None:
        if self.form not in ("pairs", "lists"):
            raise UsageError(f"goals are scores of answers that are compared, pairs or lists, not of {self.form}")

    def __call__(self, policy: Policy, requests: Sequence[Request], **options: Any) -> Rollout:
        made = [entry for request in requests if request.count for entry in self.relabelled(request)]
        return super().__call__(policy, made, **options)

    def check(self, examples: Sequence[Example]) -> None:
        if not any(map(self._scored, examples)):
            raise UsageError(f"no example has answers with scores: a list, or a pair and the columns {self.scores}")
        super().check([entry.example for example in examples for entry in self.relabelled(Request(example, 1))])

    def relabelled(self, request: Request) -> list[Request]:
        """The request once per goal, highest first, with R(., g) as the labels of its answers."""
        scored, made = self._scored(request.example), []
        if self.form == "pairs" and scored:
            scored = tuple(pick(scored, key=lambda answer: answer[1]) for pick in (max, min))
        for goal in sorted({score for _, score in scored}, reverse=True):
            labels = tuple(-((goal - score) ** 2) for _, score in scored)
            example = replace(request.example, completions=tuple(text for text, _ in scored), labels=labels)
            made.append(self.conditioned(replace(request, example=example), goal))
        return made

    def conditioned(self, request: Request, goal: float) -> Request:
        """The request under a prompt that asks for the goal; whole numbers are printed as such."""
        prompt, said = request.prompt or request.example.prompt, f"{goal:.6g}"
        if isinstance(prompt, str):
            return replace(request, prompt=self.template.format(goal=said, prompt=prompt))
        first, own = self.message.format(goal=said), prompt[0]["role"] == "system"
        content = f"{first}\n\n{prompt[0]['content']}" if own else first
        return replace(request, prompt=({"role": "system", "content": content}, *prompt[own:]))

    def _scored(self, example: Example) -> tuple[tuple[Text, float], ...]:
        if example.completions:
            return answers_of(example)
        given = [float(example.columns[name]) for name in self.scores if example.columns.get(name) is not None]
        if example.chosen is not None and example.rejected is not None and len(given) == 2:
            return (example.chosen, given[0]), (example.rejected, given[1])
        if self.unusable == "raise":
            raise UsageError(f"example {example.id!r} has no pair with the scores {' and '.join(self.scores)}")
        return ()

    def held_out(self) -> Groups:
        return Aiming(condition=lambda request: self.conditioned(request, self.top))

    def on_policy(self) -> Mapping[str, Any]:
        raise UsageError("goals are scores of known answers: let polopt pairs sample and score them, train on its file")


@dataclass(frozen=True)
class Aiming(Groups):
    """Groups of answers to requests that ``condition`` has rewritten."""

    condition: Callable[[Request], Request] = lambda request: request

    def __call__(self, policy: Policy, requests: Sequence[Request], **options: Any) -> Rollout:
        return super().__call__(policy, [self.condition(request) for request in requests], **options)


reward_augmented_dpo = method(
    "reward-augmented-dpo",
    dpo,
    seed="190",
    paper="arXiv:2410.08067",
    rollout=Goals(),
    objective=DPO(beta=0.01),
)

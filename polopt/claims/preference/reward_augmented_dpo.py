"""Reward-augmented data: what to reach for is part of the prompt (Zhang et al. 2024, arXiv:2410.08067).

Design, fixed before the first run. Exact world: 4 tokens, length 2, so 16 answers to each of 8 prompts. Qualities are
whole numbers on a scale from 1 to 10: of each prompt one answer has 10, two 9, four 8, four 7, five a random number
from 1 to 6, in random order: many good answers, few of the best. The first policy's logits are normal with standard
deviation 0.5. Data: 32 pairs of different answers per prompt, drawn from the first policy, the better one preferred,
ties drawn again.

The policy reads a goal g as a feature that answers share over goals: its logits are c_0 + c_1 u + c_2 u^2 with
u = (g - 5.5) / 4.5 and tables c_k of each prompt, c_1 and c_2 being 0 at first. All arms have this policy, beta 0.1,
Adam at rate 0.02, all pairs in every update. Reward-augmented DPO makes 60 updates on the 2 P entries and is asked
under goal 10. "dpo" makes 60 updates on the P pairs, "dpo twice" 120, both under the constant goal 10, which gives them
the same parameters and step sizes.

- Quality: exact expected quality, against either baseline.
- Unlearning: mean over the pairs whose rejected answer has quality 8 or 9 of its exact log-prob less that at the start;
  of reward-augmented DPO under the answer's own quality as the goal, and as a further claim under goal 10.
- Calibration: slope of the exact expected quality under goal g in g, from 5 to 10, above 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import Parameter

from polopt.claims.claim import Claim
from polopt.claims.exact import Run, start
from polopt.core.example import Example
from polopt.core.method import Method
from polopt.core.override import override
from polopt.core.policy import Request
from polopt.methods.preference.dpo import dpo
from polopt.methods.preference.reward_augmented_dpo import Goals, reward_augmented_dpo
from polopt.policies.exact import ExactPolicy, SequenceSpace
from polopt.tasks.preferences import law_of, text_of
from polopt.tasks.problems import Problem, problem

SPACE = SequenceSpace(4, 2)
PROMPTS, PAIRS, UPDATES, RATE, TOP = 8, 32, 60, 0.02, 10
GOALS = torch.arange(1, TOP + 1, dtype=torch.float64)
FIXED = (10, 9, 9, 8, 8, 8, 8, 7, 7, 7, 7)


class SharedGoals(ExactPolicy):
    """One table of logits [B 10, K, V] for every prompt and goal, quadratic in the goal: parameters [B, 3, K, V]."""

    def __init__(self, initial: Tensor) -> None:
        super().__init__(SPACE, PROMPTS * TOP, initial.repeat_interleave(TOP, 0))
        u = (GOALS - 5.5) / 4.5
        self.features = torch.stack([torch.ones_like(u), u, u.square()], 1)
        self.logits = Parameter(torch.stack([initial, torch.zeros_like(initial), torch.zeros_like(initial)], 1))

    def table(self) -> Tensor:
        return torch.einsum("gf,bfkv->bgkv", self.features, self.logits).flatten(0, 1)


class World(Problem):
    """A problem for every prompt and goal, with a policy that shares over goals."""

    def policy(self, head: str = "tabular") -> ExactPolicy:
        return SharedGoals(self.initial)


@dataclass(frozen=True)
class Numbered(Goals):
    """A goal in the prompt is a number of the problem here."""

    def conditioned(self, request: Request, goal: float) -> Request:
        number = TOP * int(request.example.columns["prompt"]) + round(goal) - 1
        return replace(request, example=replace(request.example, columns={"problem": number}))


AUGMENTED = override(reward_augmented_dpo, {"objective.beta": 0.1}) | {"rollout": Numbered(top=TOP)}
PLAIN = override(dpo, {"objective.beta": 0.1})


def world(seed: int) -> tuple[World, Tensor]:
    """The problems and the quality of every answer, [B, S]."""
    base = problem("random-rewards", space=SPACE, batch=PROMPTS, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    quality = torch.randint(1, 7, (PROMPTS, SPACE.n_sequences), generator=generator).double()
    quality[:, : len(FIXED)] = torch.tensor(FIXED, dtype=torch.float64)
    order = torch.rand(quality.shape, generator=generator).argsort(1)
    quality = quality.gather(1, order)
    fields = {name: getattr(base, name) for name in base.__dataclass_fields__}
    return World(**{**fields, "rewards": {"quality": quality.repeat_interleave(TOP, 0)}}), quality


def compared(made: World, quality: Tensor, seed: int) -> list[tuple[int, int, int]]:
    """(prompt, better answer, worse answer) of every pair."""
    generator = torch.Generator().manual_seed(10_000 + seed)
    law = law_of(replace(made, rewards={"quality": quality}), None)[TOP - 1 :: TOP]
    pairs: list[tuple[int, int, int]] = []
    for prompt in range(PROMPTS):
        while len(pairs) < PAIRS * (prompt + 1):
            first, second = torch.multinomial(law[prompt], 2, generator=generator).tolist()
            a, b = (float(quality[prompt, answer]) for answer in (first, second))
            if a != b:
                pairs.append((prompt, first, second) if a > b else (prompt, second, first))
    return pairs


def examples_of(pairs: list[tuple[int, int, int]], quality: Tensor) -> list[Example]:
    """The pairs with their scores; their own prompt is that of goal 10."""
    made = []
    for number, (prompt, better, worse) in enumerate(pairs):
        columns = {
            "problem": TOP * prompt + TOP - 1,
            "prompt": prompt,
            "chosen_score": float(quality[prompt, better]),
            "rejected_score": float(quality[prompt, worse]),
        }
        chosen, rejected = text_of(SPACE, better), text_of(SPACE, worse)
        made.append(Example(str(number), f"problem {prompt}", chosen=chosen, rejected=rejected, columns=columns))
    return made


def measure(seed: int, quick: bool) -> Mapping[str, float]:
    """Quality, unlearning and calibration of the three arms."""
    made, quality = world(seed)
    pairs = compared(made, quality, seed)
    pool = examples_of(pairs, quality)
    hard = [(prompt, worse) for prompt, _, worse in pairs if quality[prompt, worse] >= 8]
    prompts, rejected = (torch.tensor(column) for column in zip(*hard, strict=True))
    updates = 2 if quick else UPDATES

    def trained(method: Method, count: int) -> tuple[Run, Tensor, Tensor]:
        """The run, its log-probs [B, 10, S], and their change."""
        run = start(made, method, seed=seed, lr=RATE, examples=pool)
        before = run.policy.log_probabilities().detach()
        for _ in range(count):
            run.step()
        after = run.policy.log_probabilities().detach()
        shape = (PROMPTS, TOP, -1)
        return run, after.view(shape), (after - before).view(shape)

    found: dict[str, float] = {}
    for arm, method, count in (
        ("augmented", AUGMENTED, updates),
        ("dpo", PLAIN, updates),
        ("dpo twice", PLAIN, 2 * updates),
    ):
        _, logp, change = trained(method, count)
        reached = (logp.exp() * quality[:, None]).sum(-1).mean(0)
        found[f"{arm}/quality"] = float(reached[TOP - 1])
        found[f"{arm}/unlearned"] = float(change[prompts, TOP - 1, rejected].mean())
        if method is AUGMENTED:
            own = quality[prompts, rejected].long() - 1
            found[f"{arm}/own"] = float(change[prompts, own, rejected].mean())
            goals = GOALS[4:] - GOALS[4:].mean()
            found["slope"] = float((goals * reached[4:]).sum() / goals.square().sum())
    return found


def _claim(name: str, statement: str, baseline: str, metric: str, treatment: str, control: str | None) -> Claim:
    return Claim(
        "reward-augmented-dpo",
        name,
        statement,
        "exact",
        baseline,
        metric,
        "higher",
        treatment,
        control,
        measure=measure,
    )


QUALITY = "exact expected quality, asked for 10"
FALL = "change of the log-prob of rejected answers of quality 8 or 9, nats"

CLAIMS = (
    _claim(
        "quality",
        "Reward-augmented data give answers of higher quality than the same pairs without goals.",
        "dpo, as many updates",
        QUALITY,
        "augmented/quality",
        "dpo/quality",
    ),
    _claim(
        "quality-volume",
        "The gain is not one of the volume of data: it holds against DPO with twice the updates.",
        "dpo, twice the updates",
        QUALITY,
        "augmented/quality",
        "dpo twice/quality",
    ),
    _claim(
        "unlearning",
        "Good rejected answers fall less, asked for under their own quality.",
        "dpo, as many updates",
        FALL,
        "augmented/own",
        "dpo/unlearned",
    ),
    _claim(
        "unlearning-top",
        "Good rejected answers fall less when the top is asked for.",
        "dpo, as many updates",
        FALL,
        "augmented/unlearned",
        "dpo/unlearned",
    ),
    _claim(
        "calibration",
        "The higher the goal, the higher the expected quality.",
        "no slope",
        "slope of the exact expected quality in the goal",
        "slope",
        None,
    ),
)

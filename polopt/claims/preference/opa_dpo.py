"""OPA-DPO: preferred answers must be likely before they are preferred (Yang et al. 2025, arXiv:2501.09695).

Design, fixed before the first run.

Exact world: 8 prompts, a bandit of 11 answers each, tabular. To each prompt two random answers are the expert's, y_ref
and y_rev; the initial policy gives each of them half of a mass m = 1e-6 or 1e-3, and the others normal logits with
standard deviation 0.5. y_gen is drawn from the initial policy's others. Every update sees all 8 prompts, which are
corrupted once; SGD at rate 8, which is 1 for each prompt's own loss; beta, coefficients and the share of corrupted
prompts are the method's defaults.

Arms: "opa", 25 updates of imitation, then 400 of the method's loss against the policy after imitation; "first", 400
updates of the same loss against the initial policy, without imitation; "dpo", the same with its language part alone,
which is DPO on both pairs; "sft", the 25 updates of imitation alone.

Metrics, exact, mean over prompts: the probability of the two preferred answers, and that of the 8 unrelated ones.

For both m:
- opa prefers more than dpo, more than first, and more than sft.
- For m = 1e-6 the unrelated answers are less likely under opa than under dpo, whose mass has to go somewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from polopt.claims.claim import Claim
from polopt.claims.exact import start, with_updates
from polopt.core.example import Example
from polopt.core.method import Method
from polopt.core.override import override
from polopt.methods.preference.opa_dpo import opa_dpo
from polopt.policies.exact import ExactPolicy, SequenceSpace
from polopt.tasks.preferences import text_of
from polopt.tasks.problems import Problem, problem

SPACE = SequenceSpace(11, 1)
PROMPTS, IMITATIONS, UPDATES, RATE = 8, 25, 400, 8.0
MASSES = (1e-6, 1e-3)
NAMES = {1e-6: "millionth", 1e-3: "thousandth"}

IMITATION = override(
    opa_dpo | {"controller": None}, {"objective.opa-dpo.weight": 0.0, "objective.sft.coefficient": 1.0}
)
PREFERENCE = opa_dpo | {"controller": None}
LANGUAGE = override(PREFERENCE, {"objective.image": 0.0, "objective.anchor": 0.0})


@dataclass(frozen=True, eq=False)
class World:
    """The problem, its examples, and which answers [8, 11] are preferred and which unrelated."""

    made: Problem
    examples: Sequence[Example]
    preferred: Tensor
    unrelated: Tensor


def world(seed: int, mass: float) -> World:
    """A world by seed and the mass of its preferred answers."""
    made = problem("random-rewards", space=SPACE, batch=PROMPTS, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    expert = torch.rand(PROMPTS, 11, generator=generator).argsort(1)[:, :2]
    preferred = torch.zeros(PROMPTS, 11, dtype=torch.bool).scatter(1, expert, True)
    other = made.initial[:, 0].masked_fill(preferred, -torch.inf).softmax(1)
    generated = torch.multinomial(other, 1, generator=generator)
    initial = torch.where(preferred, mass / 2, (1 - mass) * other).log()[:, None]
    examples = [
        replace(
            plain,
            chosen=text_of(SPACE, int(expert[b, 0])),
            rejected=text_of(SPACE, int(generated[b])),
            columns={**plain.columns, "revised": text_of(SPACE, int(expert[b, 1]))},
        )
        for b, plain in enumerate(made.examples())
    ]
    unrelated = ~preferred.scatter(1, generated, True)
    return World(replace(made, initial=initial, reference=initial), examples, preferred, unrelated)


def trained(there: World, method: Method, logits: Tensor | None, updates: int, seed: int) -> Tensor:
    """Logits after some updates of a method that starts, and has its reference, at the given ones."""

    def prepare(policy: ExactPolicy) -> None:
        if logits is not None:
            with torch.no_grad():
                policy.logits.copy_(logits)

    method = with_updates(method, updates)
    run = start(there.made, method, seed=seed, optimizer="sgd", lr=RATE, prepare=prepare, examples=there.examples)
    run.step()
    return run.policy.logits.detach().clone()


def probabilities(seed: int, quick: bool) -> Mapping[str, float]:
    """Mass of the preferred and of the unrelated answers after every arm."""
    found = {}
    few, many = (2, 3) if quick else (IMITATIONS, UPDATES)
    for mass in MASSES:
        there = world(seed, mass)
        imitated = trained(there, IMITATION, None, few, seed)
        arms = {
            "sft": imitated,
            "opa": trained(there, PREFERENCE, imitated, many, seed),
            "first": trained(there, PREFERENCE, None, many, seed),
            "dpo": trained(there, LANGUAGE, None, many, seed),
        }
        for arm, logits in arms.items():
            chance = logits[:, 0].softmax(1)
            found[f"{arm}/{mass:g}"] = float((chance * there.preferred).sum(1).mean())
            found[f"{arm}/{mass:g}/unrelated"] = float((chance * there.unrelated).sum(1).mean())
    return found


def _prefers(other: str, mass: float, title: str) -> Claim:
    return Claim(
        "opa-dpo",
        f"{other}-{NAMES[mass]}",
        f"Imitation, then preference makes answers of mass {mass:g} more likely than {title}.",
        "exact",
        title,
        "exact probability of the preferred answers",
        "higher",
        f"opa/{mass:g}",
        f"{other}/{mass:g}",
        measure=probabilities,
    )


CLAIMS = (
    *(_prefers("dpo", mass, "DPO from the original reference") for mass in MASSES),
    *(_prefers("first", mass, "its own loss from the original reference") for mass in MASSES),
    *(_prefers("sft", mass, "imitation alone") for mass in MASSES),
    Claim(
        "opa-dpo",
        "unrelated",
        "Less mass goes to unrelated answers than under DPO from the original reference.",
        "exact",
        "DPO from the original reference",
        "exact probability of the unrelated answers, preferred ones starting at 1e-6",
        "lower",
        "opa/1e-06/unrelated",
        "dpo/1e-06/unrelated",
        measure=probabilities,
    ),
    Claim(
        "opa-dpo",
        "hallucination",
        "OPA-DPO hallucinates less than other preference methods with 4.8 thousand samples.",
        "exact",
        "DPO variants for vision-language models",
        "hallucination rates on AMBER, MMHal-Bench and Object HalBench",
        "lower",
        untestable="needs a vision-language model, images and an expert that revises answers",
    ),
)

"""Differential information: the closed-form law of rejected answers (Won et al. 2025, arXiv:2505.23761).

Design, fixed before the first run. Exact world, 12 seeds. Study: one prompt, 21 answers of 1 or 2 tokens (vocabulary 5
with an end), tabular policy; logits of pi_ref normal with standard deviation 0.5; the target is pi* ~ pi_ref exp(z), z
standard normal per answer. 1500 pairs, chosen from pi_ref, rejected from pi_l, equal ones drawn anew; all in every
update, 80 updates of Adam at rate 0.2 from pi_ref, beta = 0.5. JS is that of pi and pi* in nats, exact.

- Closed: with pi_l ~ pi_ref (pi_ref / pi*)^0.5 DPO's JS is below 0.03; below DPO's with rejected answers drawn
  uniformly, and from pi_ref; and, on the same pairs, below that of the reference-free loss (reward log pi) and of the
  length-normalised one (SimPO without margin, beta = 0.5).
- Matching beta: on the same pairs JS with beta = 0.5 is below that with 0.25, and with 1.
- Displacement: sum pi_ref (log pi - log pi_ref) after training is negative; and lower than for a nearer target, z with
  half the standard deviation.

Recipe: 16 prompts, the same space, standard normal rewards r, pi* ~ pi_ref exp(r / beta), beta = 0.5; 8 answers of the
reference per prompt and iteration, 100 updates of Adam at rate 0.1. The method's pairs against the best and the worst
of the same groups: JS, mean over prompts and the last 20 updates, is lower.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from polopt.claims.claim import Claim
from polopt.claims.exact import Run, curve, start, with_updates
from polopt.core.example import Example
from polopt.core.override import override
from polopt.filters.preferences import BestWorst
from polopt.methods.preference.did import did
from polopt.methods.preference.dpo import dpo
from polopt.methods.preference.simpo import simpo
from polopt.policies.differential_information import rejected_law
from polopt.policies.exact import SequenceSpace, divergences, tree
from polopt.policies.exact.policy import example_of
from polopt.tasks.preferences import text_of
from polopt.tasks.problems import problem

SPACE = SequenceSpace(5, 2, end=True)
PAIRS, BETA, UPDATES, RATE = 1500, 0.5, 80, 0.2
PROMPTS, GROUP, ITERATIONS, LAST = 16, 8, 100, 20
REWARDS: Final = {
    "dpo": override(dpo, {"objective.beta": BETA}),
    "beta=0.25": override(dpo, {"objective.beta": 0.25}),
    "beta=1": override(dpo, {"objective.beta": 1.0}),
    "log-pi": override(dpo, {"objective.beta": BETA, "objective.reference_free": True}),
    "length": override(simpo, {"objective.beta": BETA, "objective.gamma": 0.0}),
}


def jensen_shannon(p: Tensor, q: Tensor) -> float:
    """(KL(p || m) + KL(q || m)) / 2, m the mean of both; mean over prompts."""
    middle = (p + q) / 2
    return float((divergences.kl(p, middle) + divergences.kl(q, middle)).mean() / 2)


def drawn(reference: Tensor, rejected: Tensor, count: int, generator: torch.Generator) -> tuple[Example, ...]:
    """Pairs of different answers from two laws [S]."""
    chance = (reference[:, None] * rejected[None]).fill_diagonal_(0.0).flatten()
    pairs = torch.multinomial(chance, count, replacement=True, generator=generator).tolist()
    plain = example_of(0)
    return tuple(
        Example(
            f"{plain.id}/{number}",
            plain.prompt,
            columns=plain.columns,
            chosen=text_of(SPACE, pair // SPACE.n_sequences),
            rejected=text_of(SPACE, pair % SPACE.n_sequences),
        )
        for number, pair in enumerate(pairs)
    )


def study(seed: int, quick: bool) -> Mapping[str, float]:
    """JS of every arm, and the displacement for both targets."""
    made = problem("random-rewards", space=SPACE, seed=seed)
    reference = tree.log_probabilities(SPACE, made.reference)
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(reference.shape, generator=generator, dtype=torch.float64)
    target, near = ((reference + scale * z).log_softmax(-1) for scale in (1.0, 0.5))
    closed = rejected_law(reference, target, BETA)
    rejected = {"uniform": torch.zeros_like(closed).log_softmax(-1), "reference": reference}
    rejected["near"] = rejected_law(reference, near, BETA)
    arms = [(name, method, closed) for name, method in REWARDS.items()]
    arms += [(name, REWARDS["dpo"], law) for name, law in rejected.items()]
    found: dict[str, float] = {"bound": 0.03}
    for name, method, law in arms:
        # Arms on one law see the same pairs.
        pairs = torch.Generator().manual_seed(seed)
        pool = drawn(reference[0].exp(), law[0].exp(), 20 if quick else PAIRS, pairs)
        run = start(made, with_updates(method, 2 if quick else UPDATES), seed=seed, lr=RATE, examples=pool)
        run.step()
        with torch.no_grad():
            log_pi = run.policy.log_probabilities()
        found[name] = jensen_shannon(log_pi.exp(), target.exp())
        found[f"{name}/displacement"] = float((reference.exp() * (log_pi - reference)).sum())
    return found


def recipe(seed: int, quick: bool) -> Mapping[str, float]:
    """JS to the regularised optimum of the method's pairs and of the best and worst ones."""
    made = problem("random-rewards", space=SPACE, batch=PROMPTS, seed=seed)
    target = (tree.log_probabilities(SPACE, made.reference) + made.reward / BETA).softmax(-1)
    method = override(did, {"objective.beta": BETA})
    found: dict[str, float] = {}

    def distance(run: Run) -> float:
        return jensen_shannon(run.policy.probabilities().detach(), target)

    for name, arm in (("did", method), ("best-worst", method | {"filter": BestWorst()})):
        seen = curve(start(made, arm, seed=seed, group=GROUP), 2 if quick else ITERATIONS, distance)[-LAST:]
        found[name] = sum(seen) / len(seen)
    return found


JS = "exact Jensen-Shannon divergence from the target"


def _below(name: str, statement: str, baseline: str, other: str) -> Claim:
    return Claim("did", name, statement, "exact", baseline, JS, "lower", "dpo", other, measure=study)


CLAIMS = (
    _below("reaches-the-target", "With the closed-form law DPO reaches the target.", "a divergence of 0.03", "bound"),
    _below("law-uniform", "The closed-form law beats uniform rejected answers.", "uniform law", "uniform"),
    _below("law-reference", "It beats rejected answers of the reference.", "the reference's law", "reference"),
    _below("reward-log-pi", "On its pairs the log-ratio beats log pi as a reward.", "reference-free loss", "log-pi"),
    _below("reward-length", "On its pairs the log-ratio beats the mean log pi.", "SimPO without margin", "length"),
    _below("beta-half", "The matching beta beats half of it.", "DPO with beta = 0.25", "beta=0.25"),
    _below("beta-double", "The matching beta beats twice as much.", "DPO with beta = 1", "beta=1"),
    Claim(
        "did",
        "displacement",
        "The chosen answers lose likelihood.",
        "exact",
        "no change",
        "change of the mean log-likelihood of chosen answers",
        "lower",
        "dpo/displacement",
        None,
        measure=study,
    ),
    Claim(
        "did",
        "displacement-grows",
        "They lose more where the target is further away.",
        "exact",
        "the nearer target",
        "change of the mean log-likelihood of chosen answers",
        "lower",
        "dpo/displacement",
        "near/displacement",
        measure=study,
    ),
    Claim(
        "did",
        "recipe",
        "Resampled rejected answers bring DPO nearer to the optimum of a reward than the best and worst of a group.",
        "exact",
        "best against worst of the same groups",
        JS,
        "lower",
        "did",
        "best-worst",
        measure=recipe,
    ),
)

"""GEPO: equivalent winners stay equivalent (Wu et al. 2025, arXiv:2505.12723).

Design, fixed before the first run. Exact world: 4 tokens, length 3, so 64 answers to each of 8 prompts, 8 of them
right; the first policy is right with probability 0.1. Of each prompt 4 right and 4 wrong answers are known, drawn
uniformly.
beta is 0.1 everywhere, lambda 1 where there is one; Adam at rate 0.05 on the prefixes' logits.

Offline: "gepo" on the groups, "all pairs" is DPO on all 16 pairs of a prompt, "random pairs" is DPO on 4 pairs of a
prompt, each a winner and a loser drawn at random. Full batches, until the mean over prompts of mean_w s - mean_l s is 4
nats (s the log-ratio to the first policy; at most 400 updates): what follows is at equal margins.
- Spread: standard deviation of s over the known winners of a prompt, mean over prompts; lower, against either.
- Worst winner: least log-probability over the known winners of a prompt, mean over prompts; higher, against either.
- Entropy of the distribution over all right answers of a prompt, renormalised, nats; higher than all pairs.

Beside RL: 8 answers per prompt, reward 1 for right ones, 30 iterations. "rl" is the clipped surrogate alone, "rl+dpo"
adds 0.01 DPO on all pairs of the known answers, "rl+gepo" 0.01 GEPO, the method itself. Metric: exact pass rate, mean
over the iterations. The claimed order rl+gepo >= rl+dpo >= rl is judged with a margin of 0.01. Answers that are not
known share only prefixes with known ones here; generalisation to unseen prompts is not tested.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from polopt.claims.claim import Claim, Direction
from polopt.claims.exact import Run, curve, start
from polopt.core.example import Example
from polopt.core.loss import Evaluation, Loss
from polopt.core.method import Method
from polopt.core.rollout import Rollout
from polopt.methods.preference.dpo import DPO, dpo
from polopt.methods.preference.gepo import GEPO, gepo
from polopt.objectives.clipped_surrogate import ClippedSurrogate
from polopt.policies.exact import SequenceSpace
from polopt.policies.exact.policy import example_of
from polopt.rollouts.dataset import Dataset
from polopt.tasks.preferences import text_of
from polopt.tasks.problems import Problem, problem

SPACE = SequenceSpace(4, 3)
PROMPTS, KNOWN, RATE, MARGIN, MOST = 8, 4, 0.05, 4.0, 400
GROUP, ITERATIONS = 8, 30

LISTS = {"rollout": Dataset(form="lists")}
ALONE: Mapping[str, Method] = {
    "gepo": dpo | LISTS | {"objective": GEPO()},
    "all pairs": dpo | LISTS,
    "random pairs": dpo,
}


@dataclass(frozen=True)
class KnownDPO(DPO):
    """0.01 DPO on the known answers beside sampled ones."""

    mask = "mask/known"

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"mask/known"}

    def __call__(self, evaluation: Evaluation, rollout: Rollout) -> Loss:
        found = super().__call__(evaluation, rollout)
        return replace(found, value=0.01 * found.value)


BESIDE: Mapping[str, Method] = {
    "rl": gepo | {"objective": ClippedSurrogate()},
    "rl+dpo": gepo | {"objective": ClippedSurrogate() + KnownDPO()},
    "rl+gepo": gepo,
}


def world(seed: int) -> tuple[Problem, Tensor, Tensor]:
    """The problem, and the known winners and losers of each prompt, [B, n] each."""
    made = problem("binary-verifier", space=SPACE, batch=PROMPTS, pass_rate=0.1, right=0.125, seed=seed)
    generator = torch.Generator().manual_seed(seed)

    def drawn(chance: Tensor) -> Tensor:
        return torch.multinomial(chance, KNOWN, generator=generator)

    return made, drawn(made.reward), drawn(1 - made.reward)


def lists(winners: Tensor, losers: Tensor) -> list[Example]:
    """All known answers of each prompt with their labels."""
    found = []
    for b, (good, bad) in enumerate(zip(winners.tolist(), losers.tolist(), strict=True)):
        texts = tuple(text_of(SPACE, y) for y in (*good, *bad))
        labels = (1.0,) * KNOWN + (0.0,) * KNOWN
        found.append(replace(example_of(b), completions=texts, labels=labels))
    return found


def pairs(winners: Tensor, losers: Tensor, seed: int) -> list[Example]:
    """As many random pairs of each prompt as it has winners."""
    generator = torch.Generator().manual_seed(1000 + seed)
    found = []
    for b in range(PROMPTS):
        for number, (i, j) in enumerate(torch.randint(KNOWN, (KNOWN, 2), generator=generator).tolist()):
            chosen, rejected = text_of(SPACE, int(winners[b, i])), text_of(SPACE, int(losers[b, j]))
            plain = example_of(b)
            found.append(replace(plain, id=f"{b}/{number}", chosen=chosen, rejected=rejected))
    return found


def offline(seed: int, quick: bool) -> Mapping[str, float]:
    """Spread, worst winner and entropy at equal margins."""
    made, winners, losers = world(seed)
    found: dict[str, float] = {}
    for arm, method in ALONE.items():
        pool = pairs(winners, losers, seed) if arm == "random pairs" else lists(winners, losers)
        run = start(made, method, seed=seed, lr=RATE, examples=pool)
        before = run.policy.log_probabilities().detach()
        for _ in range(2 if quick else MOST):
            run.step()
            s = run.policy.log_probabilities().detach() - before
            won = s.gather(1, winners)
            if float((won.mean(1) - s.gather(1, losers).mean(1)).mean()) >= MARGIN:
                break
        logp = run.policy.log_probabilities().detach()
        right = logp.masked_fill(made.reward == 0, -torch.inf).log_softmax(-1)
        entropy = -(right.exp() * right.masked_fill(made.reward == 0, 0.0)).sum(-1)
        found |= {
            f"{arm}/spread": float(won.std(1, correction=0).mean()),
            f"{arm}/worst": float(logp.gather(1, winners).amin(1).mean()),
            f"{arm}/entropy": float(entropy.mean()),
        }
    return found


def beside(seed: int, quick: bool) -> Mapping[str, float]:
    """Mean pass rate over the iterations of RL, alone and with either loss of the known answers."""
    made, winners, losers = world(seed)
    found = {}
    for arm, method in BESIDE.items():
        run: Run = start(made, method, seed=seed, group=GROUP, lr=RATE, examples=lists(winners, losers))
        rates = curve(run, 2 if quick else ITERATIONS)
        found[arm] = sum(rates[1:]) / (len(rates) - 1)
    return found


def _offline(name: str, statement: str, metric: str, direction: Direction, key: str, baseline: str) -> Claim:
    return Claim(
        "gepo",
        name,
        statement,
        "exact",
        f"dpo, {baseline}",
        metric,
        direction,
        f"gepo/{key}",
        f"{baseline}/{key}",
        measure=offline,
    )


SPREAD = "standard deviation of the winners' log-ratios at equal mean margin, nats"
WORST = "log-probability of the least likely known winner at equal mean margin, nats"
PASS = "exact pass rate, mean over 30 iterations"

CLAIMS = (
    _offline(
        "spread-all", "GEPO rewards winners more alike than DPO on all pairs.", SPREAD, "lower", "spread", "all pairs"
    ),
    _offline(
        "spread-random",
        "GEPO rewards winners more alike than DPO on random pairs.",
        SPREAD,
        "lower",
        "spread",
        "random pairs",
    ),
    _offline(
        "worst-all",
        "The least likely winner is likelier than under DPO on all pairs.",
        WORST,
        "higher",
        "worst",
        "all pairs",
    ),
    _offline(
        "worst-random",
        "The least likely winner is likelier than under DPO on random pairs.",
        WORST,
        "higher",
        "worst",
        "random pairs",
    ),
    _offline(
        "entropy",
        "Right answers keep a higher entropy than under DPO on all pairs.",
        "exact entropy over the right answers at equal mean margin, nats",
        "higher",
        "entropy",
        "all pairs",
    ),
    Claim(
        "gepo",
        "rl-gepo",
        "Beside RL, GEPO is at least as good as DPO on the same answers.",
        "exact",
        "clipped surrogate + 0.01 dpo",
        PASS,
        "higher",
        "rl+gepo",
        "rl+dpo",
        margin=0.01,
        measure=beside,
    ),
    Claim(
        "gepo",
        "rl-dpo",
        "Beside RL, DPO on known answers is at least as good as RL alone.",
        "exact",
        "clipped surrogate",
        PASS,
        "higher",
        "rl+dpo",
        "rl",
        margin=0.01,
        measure=beside,
    ),
)

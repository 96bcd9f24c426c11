"""RPO: imitating the chosen answers stops overoptimisation (Liu et al. 2024, arXiv:2405.16436).

Design, fixed before the first run. Exact world: 4 prompts, 27 answers of 3 tokens each (vocabulary 3); the policy is an
inhomogeneous Markov chain (head order-1: 14 free parameters per prompt, which answers share), its initial logits normal
with standard deviation 0.5 before the projection onto the head; rewards are standard normal; 12 seeds. Six pairs per
prompt, of different answers drawn from the initial policy restricted to the 12 best answers of the prompt (partial
coverage); labels are Bradley-Terry in the reward. All pairs are in every update; beta = 0.1, 300 updates of Adam at
rate 0.1. Arms: DPO, and RPO (sum over tokens) with eta = 0.2 and 1.

Exact metrics, means over the prompts: log pi(y_w) / pi_ref(y_w), mean over the pairs; probability of the answers that
are in no pair of their prompt; expected reward. Claimed for eta = 0.2 against DPO, and for eta = 1 against 0.2: the
first is higher, the second lower, the third higher.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch

from polopt.claims.claim import Claim, Direction
from polopt.claims.exact import start, with_updates
from polopt.core.override import override
from polopt.methods.preference.dpo import dpo
from polopt.methods.preference.rpo import rpo
from polopt.policies.exact import SequenceSpace
from polopt.tasks.preferences import labelled, sequence_of
from polopt.tasks.problems import problem

SPACE, HEAD = SequenceSpace(3, 3), "order-1"
PROMPTS, BEST, PAIRS, BETA, UPDATES = 4, 12, 6, 0.1, 300
ARMS: Final = {
    "dpo": override(dpo, {"objective.beta": BETA}),
    **{f"eta={eta}": override(rpo, {"objective.beta": BETA, "objective.eta": eta}) for eta in (0.2, 1.0)},
}


def covered(seed: int, quick: bool) -> Mapping[str, float]:
    """The three metrics of every arm."""
    made = problem("random-rewards", space=SPACE, batch=PROMPTS, seed=seed)
    initial = made.policy(HEAD).probabilities().detach()
    good = torch.zeros_like(initial).scatter(1, made.reward.topk(BEST).indices, 1.0)
    pool = labelled(made, PROMPTS * PAIRS, law=initial * good, seed=seed)
    prompt = torch.tensor([int(example.columns["problem"]) for example in pool])
    chosen, rejected = (
        torch.tensor([sequence_of(SPACE, text) for text in texts])
        for texts in ([example.chosen for example in pool], [example.rejected for example in pool])
    )
    seen = torch.zeros_like(initial).index_put(
        (prompt.repeat(2), torch.cat([chosen, rejected])), torch.tensor(1.0).double()
    )
    found: dict[str, float] = {}
    for arm, method in ARMS.items():
        run = start(made, with_updates(method, 2 if quick else UPDATES), seed=seed, examples=pool, head=HEAD)
        run.step()
        now = run.policy.probabilities().detach()
        found[f"{arm}/chosen"] = float((now.log() - initial.log())[prompt, chosen].mean())
        found[f"{arm}/outside"] = float((now * (1 - seen)).sum(-1).mean())
        found[f"{arm}/reward"] = run.reward
    return found


METRICS: Final[Mapping[str, tuple[str, str, Direction]]] = {
    "chosen": ("raises the chosen answers' likelihood", "log-ratio of the chosen answers to the reference", "higher"),
    "outside": ("keeps mass off what no comparison is about", "probability of answers outside the data", "lower"),
    "reward": ("raises the expected reward", "exact expected reward", "higher"),
}


def _claim(metric: str, name: str, arm: str, other: str, words: str) -> Claim:
    says, measured, direction = METRICS[metric]
    return Claim(
        "rpo",
        f"{metric}-{name}",
        f"On data of partial coverage {words} {says}.",
        "exact",
        other.replace("dpo", "DPO").replace("eta=", "RPO with eta = "),
        measured,
        direction,
        f"{arm}/{metric}",
        f"{other}/{metric}",
        measure=covered,
    )


CLAIMS = (
    *(_claim(metric, "against-dpo", "eta=0.2", "dpo", "imitating the chosen answers") for metric in METRICS),
    *(_claim(metric, "with-eta", "eta=1.0", "eta=0.2", "a larger eta") for metric in METRICS),
)

"""TGDPO: with token rewards of a guide DPO converges faster, to the same quality (Zhu et al. 2025, arXiv:2506.14574).

Design, fixed before the first run. Exact world: 4 tokens, length 4, one prompt, tabular policy; rewards are standard
normal, initial logits normal with standard deviation 0.5; 12 seeds. 200 pairs of different answers drawn from the
reference, labels Bradley-Terry at twice the difference in reward. All pairs are in every update, Adam at rate 0.1,
beta = 0.1. Arms: DPO for 100 updates, and TGDPO with alpha = 0.5 and 2, whose guide is DPO stopped after 15 updates on
the same pairs and which then makes 100 updates from the start.

- Faster: after 20 updates the training loss (that of each arm) is lower with alpha = 0.5 than DPO's, and lower with
  2 than with 0.5. The same for the number of updates until it is below 0.3 (100 where it never is).
- Not by its scale alone: after 20 updates DPO's loss of the policy is lower with alpha = 2 than for DPO.
- Same quality: after 100 updates the exact expected reward with alpha = 0.5, and with 2, is at most 0.05 below DPO's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch.nn import functional as F

from polopt.claims.claim import Claim
from polopt.claims.exact import Run, start
from polopt.core.override import override
from polopt.methods.preference.dpo import dpo
from polopt.methods.preference.tgdpo import tgdpo
from polopt.policies.exact import SequenceSpace
from polopt.tasks.preferences import labelled, sequence_of
from polopt.tasks.problems import problem

SPACE = SequenceSpace(4, 4)
PAIRS, SHARPNESS, BETA = 200, 2.0, 0.1
GUIDE, EARLY, UPDATES, TARGET = 15, 20, 100, 0.3
ALPHAS: Final = (0.5, 2.0)


def stages(seed: int, quick: bool) -> Mapping[str, float]:
    """Loss, DPO's loss, updates to the target and final reward of every arm."""
    made = problem("random-rewards", space=SPACE, seed=seed)
    pool = labelled(made, 20 if quick else PAIRS, scale=SHARPNESS, seed=seed)
    guide, early, updates = (2, 1, 3) if quick else (GUIDE, EARLY, UPDATES)
    sides = torch.tensor([[sequence_of(SPACE, text) for text in (e.chosen, e.rejected)] for e in pool])
    initial = made.policy().log_probabilities().detach()[0]

    def plain(run: Run) -> float:
        with torch.no_grad():
            ratio = run.policy.log_probabilities()[0] - initial
        return float(-F.logsigmoid(BETA * (ratio[sides[:, 0]] - ratio[sides[:, 1]])).mean())

    found: dict[str, float] = {}
    arms = {"dpo": (override(dpo, {"objective.beta": BETA}), 0)}
    for alpha in ALPHAS:
        fields = {"objective.beta": BETA, "objective.alpha": alpha, "models.guide.at": guide}
        arms[f"alpha={alpha:g}"] = (override(tgdpo, fields), guide)
    for arm, (method, before) in arms.items():
        run = start(made, method, seed=seed, examples=pool)
        for _ in range(before):
            run.step()
        losses = []
        for done in range(updates):
            run.step()
            losses.append(run.metrics["loss"])  # before this update
            if done + 1 == early:
                found[f"{arm}/plain"] = plain(run)
        found[f"{arm}/loss"] = losses[early]
        found[f"{arm}/steps"] = float(next((i for i, loss in enumerate(losses) if loss < TARGET), updates))
        found[f"{arm}/reward"] = run.reward
    return found


def _faster(name: str, metric: str, words: str, arm: str, other: str) -> Claim:
    return Claim(
        "tgdpo",
        name,
        words,
        "exact",
        {"dpo": "DPO"}.get(other, f"TGDPO with {other.replace('=', ' = ')}"),
        metric,
        "lower",
        f"{arm}/{name.split('-')[0]}",
        f"{other}/{name.split('-')[0]}",
        measure=stages,
    )


def _quality(alpha: str) -> Claim:
    return Claim(
        "tgdpo",
        f"quality-alpha-{alpha.replace('.', '-')}",
        f"At convergence TGDPO with alpha = {alpha} is no worse than DPO.",
        "exact",
        "DPO",
        "exact expected reward after 100 updates",
        "higher",
        f"alpha={alpha}/reward",
        "dpo/reward",
        margin=0.05,
        measure=stages,
    )


LOSS, STEPS = "training loss after 20 updates", "updates until the training loss is below 0.3"
CLAIMS = (
    _faster("loss-guided", LOSS, "Guidance makes the training loss fall faster.", "alpha=0.5", "dpo"),
    _faster("loss-alpha", LOSS, "More guidance makes the training loss fall faster.", "alpha=2", "alpha=0.5"),
    _faster("steps-guided", STEPS, "Guidance saves updates.", "alpha=0.5", "dpo"),
    _faster("steps-alpha", STEPS, "More guidance saves updates.", "alpha=2", "alpha=0.5"),
    _faster(
        "plain-loss", "DPO's loss after 20 updates", "Guidance makes DPO's own loss fall faster.", "alpha=2", "dpo"
    ),
    _quality("0.5"),
    _quality("2"),
    Claim(
        "tgdpo",
        "degradation",
        "Training on after convergence harms TGDPO less than DPO.",
        "exact",
        "DPO",
        "true reward at equal KL, after convergence",
        "lower",
        untestable="a tabular policy that has fitted its pairs has no shared weights to be misled by wrong labels: the "
        "effect is close to zero there; it takes a network trained on a mis-specified label set to convergence",
    ),
)

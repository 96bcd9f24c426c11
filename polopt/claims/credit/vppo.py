"""VPPO: credit where a response depends on what was seen (Huang et al. 2025, arXiv:2510.09285).

Design, fixed before the first run.

Exact world (the view is the mean of all prompts' policies: the prompt removed): 4 tokens, length 6, 12 prompts x 8,
Adam at rate 0.1, one update per rollout, 20 updates. The second and the fifth token must match the prompt, reward 1 iff
both are its targets; for half of the prompts both targets are token 0, so that they can be guessed. Initial logits of
these positions are normal with standard deviation 0.5 for each prompt; those of the others too, but the same for all.

- Focus: share of the steps that VPPO keeps at the two positions, mean over fresh batches after 0, 5, 10, 15 and 20
  updates, against their share of the positions, 1/3.
- Sparsity: in the same batches, share of the sum of S on the fifth of the steps with the largest, against 1/2.
- Penalty: exact entropy after 20 updates with the entropy penalty (0.06) against without it.

Small world, because a mask can only help where parameters are shared: the shipped policy on the grid task, whose grid
is the observation that every answer needs, level 3, 16 x 8, 15 iterations at rate 2e-4, 5 seeds. Success on 256
held-out grids, one answer each, after training. All arms clip alike and drop groups without spread (without drawing
others for them); the entropy penalty, a part of the shipped runs, is in VPPO and in its random mask alone. A first,
larger design (all levels, 20 iterations, 8 rounds of drawing) was stopped as too slow before it gave a number.

- VPPO against DAPO; VPPO against itself with a random mask of the same share; DAPO with the mask against DAPO; DAPO
  with the factor against DAPO.
- Sparsity there: as above, in one batch after one iteration.

Not compared, for want of a direction on the card: a mask of the highest entropies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.advantages.group import GroupZScore
from polopt.claims.claim import Claim
from polopt.claims.exact import batch, credited, start
from polopt.claims.small import answers, trained
from polopt.core.part import Stateful
from polopt.core.rollout import Rollout
from polopt.methods.base.dapo import DynamicSampling
from polopt.methods.credit.vppo import DependencyScaled, MostDependent, vppo
from polopt.policies.exact import SequenceSpace
from polopt.tasks.problems import Problem
from polopt.tasks.registry import get_task

SPACE = SequenceSpace(4, 6)
SEEN = (1, 4)
PROMPTS, GROUP, UPDATES, EVERY = 12, 8, 20, 5
ITERATIONS, HELD_OUT, FIFTH = 15, 256, 0.2
LEVEL = (3,)


@dataclass(frozen=True)
class RandomShare(Stateful):
    """The mask of VPPO by random numbers instead of dependency."""

    p: float = 0.4
    draws: int = field(default=0, init=False, compare=False)

    state = ("draws",)

    def __call__(self, rollout: Rollout) -> Float[Tensor, " step"]:
        self.remember(draws=self.draws + 1)
        noise = torch.rand(rollout.n_steps, generator=torch.Generator().manual_seed(self.draws))
        return MostDependent(self.p)(rollout.with_columns(step={"dependency": noise.to(rollout.logp)}))


def seeing(seed: int) -> Problem:
    """Two positions depend on the prompt and decide the reward; half of the prompts share their targets."""
    generator = torch.Generator().manual_seed(seed)

    def noise(prompts: int) -> Tensor:
        return 0.5 * torch.randn(prompts, SPACE.n_nodes, 4, generator=generator, dtype=torch.float64)

    needs = torch.isin(SPACE.depths, torch.tensor(SEEN))
    initial = torch.where(needs[None, :, None], noise(PROMPTS), noise(1))
    target = torch.randint(0, 4, (PROMPTS, 2), generator=generator)
    target[: PROMPTS // 2] = 0
    reward = (SPACE.sequences[None][..., SEEN] == target[:, None]).all(-1).double()
    return Problem("seeing", SPACE, {"correct": reward}, initial, initial, {}, (GROUP,) * PROMPTS)


def top_share(dependency: Tensor) -> float:
    """Share of the sum of S on the fifth of the steps with the largest."""
    count = max(1, round(FIFTH * len(dependency)))
    return float(dependency.topk(count).values.sum() / dependency.sum().clamp_min(1e-12))


def exact(seed: int, quick: bool) -> Mapping[str, float]:
    """Kept steps at the positions that need the prompt, sparsity of S, and entropy with and without the penalty."""
    made = seeing(seed)
    found = {"uniform": len(SEEN) / SPACE.length, "half": 0.5}
    focus: list[float] = []
    sparsity: list[float] = []
    for name, method in {"penalty": vppo, "none": vppo | {"regularizer": None}}.items():
        run = start(made, method, seed=seed, group=GROUP)
        for done in range((2 if quick else UPDATES) + 1):
            if name == "penalty" and (quick or done % EVERY == 0):
                drawn = batch(made, run.policy, seed=1000 * (seed + 1) + done, sizes=[GROUP])
                scored = credited(method, run.policy, drawn)
                place = torch.arange(scored.n_steps) % SPACE.length
                focus.append(float(scored.weight[torch.isin(place, torch.tensor(SEEN))].sum() / scored.weight.sum()))
                sparsity.append(top_share(scored["dependency"]))
            if done < (2 if quick else UPDATES):
                run.step()
        found[f"{name}/entropy"] = run.entropy
    return found | {"focus": sum(focus) / len(focus), "sparsity": sum(sparsity) / len(sparsity)}


def small(seed: int, quick: bool) -> Mapping[str, float]:
    """Success on held-out grids after training, by what of VPPO is there."""
    plain: dict[str, Any] = {"regularizer": None}
    arms: dict[str, dict[str, Any]] = {
        "vppo": {},
        "random": {"weight": RandomShare()},
        "dapo": plain | {"advantage": GroupZScore(eps=1e-6), "weight": None},
        "mask": plain | {"advantage": DependencyScaled(floor=1.0)},
        "factor": plain | {"weight": None},
    }
    asked = get_task("grid").examples(4 if quick else HELD_OUT, seed=0, split="test", levels=LEVEL)
    found: dict[str, float] = {}
    for name, slots in arms.items():
        once = {"filter": DynamicSampling(rounds=1)}
        trainer = trained("vppo", seed=seed, quick=quick, steps=ITERATIONS, level=LEVEL, slots=once | slots)
        found[name] = float(answers(trainer, asked)["score"].mean())
    return found


def sparse(seed: int, quick: bool) -> Mapping[str, float]:
    """Sparsity of the dependency in the small world."""
    trainer = trained("vppo", seed=seed, quick=quick, steps=1)
    kept = trainer.collect(trainer.method, trainer.generator).kept
    return {"sparsity": 0.5 if kept is None else top_share(trainer.method.credit(kept)["dependency"]), "half": 0.5}


def _exact(
    name: str, statement: str, baseline: str, metric: str, direction: Any, treatment: str, control: str
) -> Claim:
    return Claim("vppo", name, statement, "exact", baseline, metric, direction, treatment, control, measure=exact)


def _small(name: str, statement: str, baseline: str, treatment: str, control: str) -> Claim:
    metric = "success on 256 held-out grids after 15 iterations"
    return Claim("vppo", name, statement, "small", baseline, metric, "higher", treatment, control, measure=small)


CLAIMS = (
    _exact(
        "focus",
        "The mask keeps the steps that depend on the prompt.",
        "uniform choice, 1/3",
        "share of the kept steps at the positions that depend on the prompt",
        "higher",
        "focus",
        "uniform",
    ),
    _exact(
        "sparsity",
        "Dependency is sparse: a fifth of the steps holds most of it.",
        "half of the sum",
        "share of the sum of S on the fifth of the steps with the largest",
        "higher",
        "sparsity",
        "half",
    ),
    _exact(
        "penalty-entropy",
        "The entropy penalty lowers the entropy.",
        "vppo without the penalty",
        "exact entropy after 20 updates, nats",
        "lower",
        "penalty/entropy",
        "none/entropy",
    ),
    _small("better-than-dapo", "VPPO has a higher success than DAPO.", "dapo", "vppo", "dapo"),
    _small(
        "better-than-random",
        "Masking by dependency has a higher success than masking as many steps at random.",
        "vppo with a random mask",
        "vppo",
        "random",
    ),
    _small("mask-helps", "The mask alone raises the success.", "dapo", "mask", "dapo"),
    _small("factor-helps", "The factor per response alone raises the success.", "dapo", "factor", "dapo"),
    Claim(
        "vppo",
        "sparsity-small",
        "Dependency is sparse: a fifth of the steps holds most of it.",
        "small",
        "half of the sum",
        "share of the sum of S on the fifth of the steps with the largest",
        "higher",
        "sparsity",
        "half",
        measure=sparse,
    ),
)

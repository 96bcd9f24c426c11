"""On-policy data and negative gradients help where good answers are unlikely (Tajwar et al. 2024, arXiv:2404.14367).

Design, fixed before the first run.

Exact world, one answer of V ordered actions, reward r(a) = exp(-((a - peak) / width)^2), 4 answers per update, 400
updates of Adam at rate 0.1 from pi_ref: 1600 queries of the reward. Two policies:

- tabular, V = 20: a logit per action, width 3; pi_ref is a discretised normal around 4 with standard deviation 2; the
  peak is at 12 ("far") or at 4 ("near").
- normal, V = 40: a discretised normal with learned mean and width, which generalises over actions; pi_ref is one around
  8 with standard deviation 4, the width of the reward is 6, its peak at 26.

Losses: best-of-N; explicit negative (0.5 of the likelihood of the worst); RWR with beta 0.05; REINFORCE with the mean
of the group as its baseline; DPO with beta 0.01 and IPO with the target 1 on all pairs of different rewards. Each with
answers of the present policy ("on") and with fresh answers of pi_ref ("off"), on as many queries. 12 seeds, which are
12 problems of one policy, whose gradient is not clipped. Metric: exact expected reward at the end.

- Far: each loss but the explicit negative, under both policies, has more reward on-policy than off-policy.
- Negative gradient: under the normal policy explicit negative has more reward than best-of-N, on-policy and off-policy.
- Under the tabular policy off-policy it is no help: within 0.05 of best-of-N.
- Near: the best and the worst of the five losses, on- and off-policy, differ by less than 0.2 (tabular).

Open comparisons, of which nothing is claimed: reuse. Under the normal policy 100 batches of 4 on-policy answers, with
1, 4 or 16 updates on each: best-of-N, explicit negative, DPO, REINFORCE, and PPO's clipped surrogate with the same
baseline.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from polopt.advantages.group import GroupCenter
from polopt.aggregations import SequenceSum
from polopt.claims.claim import Claim, note
from polopt.claims.exact import Run, start, with_updates
from polopt.claims.study import Curves, Effects, Study, at_once
from polopt.core.method import Method
from polopt.core.override import override
from polopt.core.part import Part
from polopt.core.rollout import Rollout
from polopt.filters.preferences import with_labels
from polopt.methods.base.reinforce import PolicyGradient
from polopt.methods.preference.dpo import DPO
from polopt.methods.preference.ipo import IPO
from polopt.methods.preference.suboptimal_on_policy import RewardWeighted, suboptimal_on_policy
from polopt.models import Snapshot
from polopt.objectives.clipped_surrogate import ClippedSurrogate
from polopt.policies.exact import SequenceSpace, divergences, enumeration
from polopt.policies.exact.normal import NormalPolicy
from polopt.rollouts.groups import Groups
from polopt.tasks.problems import Problem
from polopt.updates.gradient_step import GradientStep

ANSWERS, UPDATES, RATE, BATCHES = 4, 400, 0.1, 100
SHOWN = (0, 10, 25, 50, 100, 150, 200, 250, 300, 350, 400)
REUSE = (1, 4, 16)


@dataclass(frozen=True)
class Scored(Part):
    """The score of every answer is its label; no group goes, so that each seed's loss counts the same in every step."""

    gives = frozenset({"label", "mask/chosen"})
    needs = frozenset({"score"})

    def __call__(self, rollout: Rollout) -> Rollout:
        return with_labels(rollout, rollout["score"])


RECIPE = suboptimal_on_policy | {
    "filter": Scored(),
    "models": {"ref": Snapshot()},
    # A norm that is clipped would join the problems of one policy.
    "update": GradientStep(max_norm=math.inf),
}
SCORED = RECIPE | {"filter": None, "aggregation": SequenceSum()}
LOSSES: Final[Mapping[str, Method]] = {
    "best-of-n": override(RECIPE, {"objective.negative": 0.0}),
    "negative": RECIPE,
    "rwr": SCORED | {"advantage": RewardWeighted(beta=0.05), "objective": PolicyGradient()},
    "reinforce": SCORED | {"advantage": GroupCenter(), "objective": PolicyGradient()},
    "dpo": RECIPE | {"objective": DPO(beta=0.01)},
    "ipo": RECIPE | {"objective": IPO(beta=0.5, per_step=False)},
}
CLIPPED = SCORED | {"advantage": GroupCenter(), "objective": ClippedSurrogate()}
TITLES: Final[Mapping[str, str]] = {
    "best-of-n": "best-of-N",
    "negative": "explicit negative",
    "rwr": "RWR",
    "reinforce": "REINFORCE",
    "dpo": "DPO",
    "ipo": "IPO",
    "ppo": "PPO's clip",
}
CLAIMED = ("best-of-n", "rwr", "reinforce", "dpo", "ipo")
"""Losses of which the gap is claimed."""
SAMPLERS: Final = {"on": Groups(), "off": Groups(mixture_of="ref", mixture_weight=1.0)}


@dataclass(frozen=True)
class Place:
    """A world: actions, pi_ref as a normal, and the reward's width and peaks by name."""

    actions: int
    mean: float
    spread: float
    width: float
    peaks: Mapping[str, float]
    normal: bool = False

    def start(self, method: Method, seeds: Sequence[int]) -> Run:
        """A run in which every seed has one problem for each peak."""
        space = SequenceSpace(self.actions, 1)
        count = len(seeds) * len(self.peaks)
        table = NormalPolicy.logits_of(space, self.mean, self.spread).expand(count, 1, -1).contiguous()
        action = torch.arange(self.actions, dtype=torch.float64)
        worth = torch.stack([torch.exp(-((action - peak) / self.width).square()) for peak in self.peaks.values()])
        reward = worth.repeat(len(seeds), 1)
        made = Problem("ordered", space, {"reward": reward}, table, table, {}, (ANSWERS,) * count)
        policy = NormalPolicy(space, count, mean=self.mean, width=self.spread) if self.normal else made.policy()
        policy.add_model("ref")
        return start(made, method, seed=seeds[0], group=ANSWERS, lr=RATE, policy=policy)


TABULAR = Place(20, 4, 2, 3, {"far": 12, "near": 4})
NORMAL = Place(40, 8, 4, 6, {"far": 26}, normal=True)
PLACES: Final = {"tabular": TABULAR, "normal": NORMAL}


def state(run: Run) -> Mapping[str, Tensor]:
    """Expected reward, and KL to pi_ref, of every problem."""
    with torch.no_grad():
        p, reference = run.policy.probabilities(), run.policy.model("ref")[:, 0].softmax(-1)
        worth = enumeration.expected_reward(run.policy, run.problem.reward)
        return {"reward": worth, "kl": divergences.kl(p, reference)}


@at_once
def cells(seeds: Sequence[int], quick: bool) -> Sequence[Mapping[str, float]]:
    """Reward and KL of every loss, sampler and place along the way, and the range of the near cells."""
    rows: list[dict[str, float]] = [{} for _ in seeds]
    total = len(PLACES) * len(LOSSES) * len(SAMPLERS)
    for number, (place, loss, sampler) in enumerate((p, m, s) for p in PLACES for m in LOSSES for s in SAMPLERS):
        note(f"run {number + 1} of {total}")
        run = PLACES[place].start(LOSSES[loss] | {"rollout": SAMPLERS[sampler]}, seeds)
        for step in range(UPDATES + 1):
            if step in SHOWN:
                # A quick run stands still after its second update.
                for name, values in state(run).items():
                    for row, found in zip(rows, values.view(len(seeds), -1).tolist(), strict=True):
                        for peak, value in zip(PLACES[place].peaks, found, strict=True):
                            row[f"{place}/{peak}/{loss}/{sampler}/{name}@{step}"] = value
            if step < (2 if quick else UPDATES):
                run.step()
    for row in rows:
        near = [row[cell("tabular/near", loss, sampler)] for loss in CLAIMED for sampler in SAMPLERS]
        row["near/range"] = max(near) - min(near)
    return rows


@at_once
def reuse(seeds: Sequence[int], quick: bool) -> Sequence[Mapping[str, float]]:
    """Reward of on-policy losses with several updates on each batch, under the normal policy."""
    rows: list[dict[str, float]] = [{} for _ in seeds]
    losses = {name: LOSSES[name] for name in ("best-of-n", "negative", "reinforce", "dpo")} | {"ppo": CLIPPED}
    for loss, method in losses.items():
        for updates in REUSE:
            note(f"{TITLES[loss]}, {updates} updates on each batch")
            run = NORMAL.start(with_updates(method, updates), seeds)
            for _ in range(2 if quick else BATCHES):
                run.step()
            for row, value in zip(rows, state(run)["reward"].tolist(), strict=True):
                row[f"{loss}/{updates}"] = value
    return rows


def cell(place: str, loss: str, sampler: str, name: str = "reward", step: int = UPDATES) -> str:
    """The name of a measurement."""
    return f"{place}/{loss}/{sampler}/{name}@{step}"


METRIC = "exact expected reward after 1600 queries"


def _on_policy(place: str, loss: str) -> Claim:
    return Claim(
        "suboptimal-on-policy",
        f"on-policy-{place}-{loss}",
        f"Far from the reward {TITLES[loss]} does better on answers of the {place} policy than on those of pi_ref.",
        "exact",
        "the same loss on fresh answers of the reference",
        METRIC,
        "higher",
        cell(f"{place}/far", loss, "on"),
        cell(f"{place}/far", loss, "off"),
        measure=cells,
    )


def _negative(sampler: str) -> Claim:
    return Claim(
        "suboptimal-on-policy",
        f"negative-{sampler}-policy",
        f"In a policy that generalises a negative gradient helps {sampler}-policy.",
        "exact",
        "best-of-N",
        METRIC,
        "higher",
        cell("normal/far", "negative", sampler),
        cell("normal/far", "best-of-n", sampler),
        measure=cells,
    )


CLAIMS = (
    *(_on_policy(place, loss) for place in PLACES for loss in CLAIMED),
    _negative("on"),
    _negative("off"),
    Claim(
        "suboptimal-on-policy",
        "negative-tabular",
        "Where no action tells of another a negative gradient off-policy is no help.",
        "exact",
        "best-of-N",
        METRIC,
        "equal",
        cell("tabular/far", "negative", "off"),
        cell("tabular/far", "best-of-n", "off"),
        margin=0.05,
        measure=cells,
    ),
    Claim(
        "suboptimal-on-policy",
        "near",
        "Where the reference is near the reward all losses are close, on- and off-policy.",
        "exact",
        "no difference",
        "range of the exact expected reward over five losses and two samplers",
        "lower",
        "near/range",
        None,
        margin=0.2,
        measure=cells,
    ),
)


def _lines(place: str, sampler: str) -> dict[str, list[tuple[float, str]]]:
    return {
        TITLES[loss]: [(step * ANSWERS, cell(place, loss, sampler, step=step)) for step in SHOWN] for loss in LOSSES
    }


WORDS = {"tabular/far": "tabular, far reward", "normal/far": "normal, far reward", "tabular/near": "tabular, near"}

STUDY = Study(
    "On-policy answers and negative gradients",
    "Does it help to learn from answers of the present policy, and to push bad answers down?",
    (
        *(
            Curves(
                f"{words}: {'answers of the policy' if sampler == 'on' else 'answers of the reference'}",
                "queries of the reward",
                "exact expected reward",
                cells,
                _lines(place, sampler),
            )
            for place, words in WORDS.items()
            for sampler in SAMPLERS
        ),
        Curves(
            "Sample reuse (normal, on-policy, 400 queries)",
            "updates on each batch",
            "exact expected reward",
            reuse,
            {
                TITLES[loss]: [(updates, f"{loss}/{updates}") for updates in REUSE]
                for loss in ("best-of-n", "negative", "reinforce", "dpo", "ppo")
            },
            logarithmic=True,
        ),
        Effects(
            "On-policy minus off-policy, reward",
            "exact expected reward",
            cells,
            {
                f"{words.split(',')[0]}, {place.partition('/')[2]}: {TITLES[loss]}": (
                    cell(place, loss, "on"),
                    cell(place, loss, "off"),
                )
                for place, words in WORDS.items()
                for loss in LOSSES
            },
        ),
    ),
)

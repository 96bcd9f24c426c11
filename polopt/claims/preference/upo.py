"""UPO: pairs that an independent estimator is sure of are cleaner, and teach more (Wang et al. 2024, arXiv:2409.11212).

Design, fixed before the first run.

Exact world: 8 prompts, sequences of two tokens out of 8 (64 answers). The quality of an answer to prompt b is
q = (u(first token) + v(second token) + e_b(answer) / 2) / 1.5, u, v and e standard normal, u and v shared by the
prompts; the 16 best answers to a prompt are right. The reward model sees q + 1.2 z, z standard normal and fixed per
prompt and answer: it orders 72% of uniform pairs as q does. The policy's tokens are independent (head order-0), its
first logits normal with standard deviation 0.5.

Estimator: 64 features tanh(A [one-hot first token, one-hot second token, one-hot prompt]), A normal, scaled to the
square norm 64; a head under dropout 0.1 (`fit_head`, 500 steps) learned before the run from 200 pairs per prompt of
answers of the initial policy, labelled by Bradley-Terry in 3 q. It does not see the reward model, nor that it; e_b is
beyond it. T = 10 passes.

Selected pairs, of 6 answers to each of 256 requests (32 per prompt) by the initial policy: the share that q orders the
other way (label noise) among UPO's (its defaults), pairs of the best and the worst reward ("margin"), pairs of the best
and a random other ("best-random"), and random pairs, each labelled by the reward. "Online" is UPO with a head
(`HeadEstimator` on these features) that learned from the reward model alone, from the pairs of three earlier batches.

Policies: three iterations, each of 256 requests, 6 answers and 30 updates on all its pairs, Adam at rate 0.1, against
the policy at the iteration's start; beta and lambda are the method's defaults. Arms: UPO; without the estimator (every
pair agrees and is as reliable as any: iterative DPO with the NLL term on a random half of the same candidates); without
smoothing ("none"); without the NLL term; with the printed smoothing ("paper").
Metric: the exact probability of a right answer, mean over prompts.

- Noise: UPO < margin < best-random < random; online < random.
- The solve rate of UPO is above that without the estimator, and above that of the printed smoothing.
- The estimator matters most: without it the solve rate is below that without smoothing, and that without NLL.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from polopt.claims.claim import Claim
from polopt.claims.exact import start
from polopt.core.method import Method, Schedule
from polopt.core.override import override
from polopt.core.part import Part
from polopt.core.policy import Request
from polopt.core.rollout import Rollout
from polopt.core.segments import segment_pairs
from polopt.filters.draws import as_groups
from polopt.filters.preferences import BestWorst
from polopt.methods.preference.upo import upo
from polopt.policies.exact import SequenceSpace
from polopt.rewards.estimators import HeadEstimator, fit_head
from polopt.rewards.scoring import Scorer
from polopt.rollouts.groups import Groups
from polopt.tasks.preferences import labelled, sequence_of
from polopt.tasks.problems import Problem, problem

SPACE = SequenceSpace(8, 2)
PROMPTS, REQUESTS, ANSWERS, RIGHT, WEAKNESS = 8, 256, 6, 16, 1.2
LABELLED, FEATURES, SCALE = 200, 64, 3.0
ITERATIONS, UPDATES, RATE = 3, 30, 0.1


@dataclass(frozen=True, eq=False)
class World:
    """The problem with the reward model's reward; quality and features [8, 64, ...] of every answer."""

    made: Problem
    quality: Tensor
    features: Tensor

    def of(self, rollout: Rollout, table: Tensor) -> Tensor:
        """The entries of a table for the answers of a rollout."""
        ids = rollout["action"].view(-1, SPACE.length)
        prompt = [int(example.columns["problem"]) for example in rollout.examples]
        return table[torch.tensor(prompt), ids[:, 0] * SPACE.vocabulary + ids[:, 1]]


def world(seed: int) -> World:
    """A world by seed."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tokens = SPACE.sequences
    quality = (normal(8)[tokens[:, 0]] + normal(8)[tokens[:, 1]] + normal(PROMPTS, SPACE.n_sequences) / 2) / 1.5
    weak = quality + WEAKNESS * normal(PROMPTS, SPACE.n_sequences)
    hot = torch.cat([F.one_hot(tokens[:, 0], 8), F.one_hot(tokens[:, 1], 8)], 1).double()
    prompt = torch.eye(PROMPTS, dtype=torch.float64)
    inputs = torch.cat([hot.expand(PROMPTS, -1, -1), prompt[:, None].expand(-1, len(hot), -1)], 2)
    features = F.normalize(torch.tanh(inputs @ normal(inputs.shape[2], FEATURES)), dim=2) * FEATURES**0.5
    made = problem("random-rewards", space=SPACE, batch=PROMPTS, seed=seed)
    return World(replace(made, rewards={"reward": weak}), quality, features)


@dataclass(frozen=True)
class TableEstimator(HeadEstimator):
    """A head on features of the world in the place of the policy's states; it goes on learning where ``learns``."""

    where: World | None = None
    learns: bool = False

    needs = frozenset()

    def __call__(self, rollout: Rollout) -> Rollout:
        assert self.where is not None
        x = self.where.of(rollout, self.where.features)
        # What the head reads at the last step of an answer.
        hidden = x.repeat_interleave(rollout.lengths, dim=0)
        return super().__call__(rollout.with_columns(step={"hidden": hidden}))

    def observe(self, rollout: Rollout, evaluate: object) -> None:
        if self.learns:
            super().observe(rollout, lambda asked, names: asked)


@dataclass(frozen=True)
class NoEstimator(Part):
    """Passes that know nothing."""

    slot = "reward"
    name = "no-estimator"
    gives = frozenset({"estimates"})

    def __call__(self, rollout: Rollout) -> Rollout:
        return rollout.with_columns(trajectory={"estimates": torch.zeros(rollout.n_trajectories, 2)})


def trained(there: World, seed: int, quick: bool) -> TableEstimator:
    """The estimator that learned from labelled pairs."""
    true = replace(there.made, rewards={"reward": there.quality})
    pairs = labelled(true, (10 if quick else LABELLED) * PROMPTS, scale=SCALE, seed=seed)
    prompt = torch.tensor([int(example.columns["problem"]) for example in pairs])
    sides = [[sequence_of(SPACE, text) for text in side] for side in _sides(pairs)]
    x = torch.cat([there.features[prompt, torch.tensor(side)] for side in sides])
    places = torch.arange(len(x))
    head = fit_head(
        x,
        places[: len(pairs)],
        places[len(pairs) :],
        start=x.new_zeros(FEATURES),
        generator=torch.Generator().manual_seed(seed),
        steps=20 if quick else 500,
    )
    return TableEstimator(seed=seed, where=there).remember(weight=head)


def _sides(pairs: tuple[object, ...]) -> tuple[list[object], list[object]]:
    return [p.chosen for p in pairs], [p.rejected for p in pairs]  # type: ignore[attr-defined]


def drawn(there: World, seed: int, each: int) -> Rollout:
    """Judged answers of the initial policy to ``each`` requests per prompt."""
    requests = [Request(example, ANSWERS) for _ in range(each) for example in there.made.examples()]
    rollout = Groups()(there.made.policy("order-0"), requests, limit=SPACE.length, seed=seed)
    return Scorer(there.made.reward_functions())(rollout)[0]


def noise(there: World, pairs: Rollout) -> float:
    """The share of groups whose answer with the higher label has the lower quality."""
    quality = there.of(pairs, there.quality)
    order = torch.argsort(2 * pairs.group + (1 - pairs["label"]).long())
    won, lost = quality[order][0::2], quality[order][1::2]
    return float((won < lost).double().mean())


def random_pairs(rollout: Rollout, generator: torch.Generator, *, best: bool) -> Rollout:
    """Of each group a random pair that the reward orders, one with its best answer where ``best``."""
    score = rollout["score"]
    i, j = segment_pairs(rollout.group, rollout.n_groups)
    top = torch.full((rollout.n_groups,), -torch.inf, dtype=score.dtype).scatter_reduce(0, rollout.group, score, "amax")
    ordered = score[i] > score[j]
    allowed = ordered & (score[i] == top[rollout.group[i]]) if best else ordered
    i, j = i[allowed], j[allowed]
    order = torch.randperm(len(i), generator=generator)
    _, first = torch.unique(rollout.group[i[order]], return_inverse=True)
    chosen = order[torch.full((int(first.max()) + 1,), len(i)).scatter_reduce(0, first, torch.arange(len(i)), "amin")]
    return as_groups(rollout, i[chosen], j[chosen])


def selection(seed: int, quick: bool) -> Mapping[str, float]:
    """Label noise of every way to select pairs."""
    there, each = world(seed), 2 if quick else REQUESTS // PROMPTS
    estimator, online = trained(there, seed, quick), TableEstimator(seed=seed, where=there, learns=True)
    for earlier in range(3):
        batch = drawn(there, 1000 * seed + 1 + earlier, each)
        online.observe(online(batch), None)
    rollout = drawn(there, 1000 * seed, each)
    generator = torch.Generator().manual_seed(seed)
    chosen = {
        "upo": upo.clone().filter(estimator(rollout)),
        "online": upo.clone().filter(online(rollout)),
        "margin": BestWorst()(rollout),
        "best-random": random_pairs(rollout, generator, best=True),
        "random": random_pairs(rollout, generator, best=False),
    }
    return {name: noise(there, pairs) for name, pairs in chosen.items()}


def arms(estimator: TableEstimator) -> dict[str, Method]:
    """Every way to train."""
    whole = upo | {"reward": estimator, "schedule": Schedule(epochs=UPDATES)}
    return {
        "upo": whole,
        "no estimator": whole | {"reward": NoEstimator()},
        "no smoothing": override(whole, {"filter.smoothing": "none"}),
        "no nll": override(whole, {"objective.nll": 0.0}),
        "printed": override(whole, {"filter.smoothing": "paper"}),
    }


def solving(seed: int, quick: bool) -> Mapping[str, float]:
    """Probability of a right answer after the iterations of every arm."""
    there = world(seed)
    right = torch.zeros_like(there.quality).scatter(1, there.quality.topk(RIGHT, dim=1).indices, 1.0)
    found = {}
    for arm, method in arms(trained(there, seed, quick)).items():
        method = override(method, {"schedule": Schedule(epochs=2)}) if quick else method
        pool = there.made.examples() * (1 if quick else REQUESTS // PROMPTS)
        run = start(there.made, method, seed=seed, group=ANSWERS, lr=RATE, examples=pool, head="order-0")
        for _ in range(ITERATIONS):
            run.step()
        with torch.no_grad():
            found[arm] = float((run.policy.probabilities() * right).sum(1).mean())
    return found


def _noise(arm: str, other: str, title: str, baseline: str) -> Claim:
    return Claim(
        "upo",
        f"noise-{arm}-{other}",
        f"{title} have less label noise than {baseline}.",
        "exact",
        baseline,
        "share of the selected pairs that the true quality orders the other way",
        "lower",
        arm,
        other,
        measure=selection,
    )


def _solves(name: str, arm: str, other: str, statement: str, baseline: str) -> Claim:
    return Claim(
        "upo",
        name,
        statement,
        "exact",
        baseline,
        "exact probability of a right answer after three iterations",
        "higher",
        arm,
        other,
        measure=solving,
    )


CLAIMS = (
    _noise("upo", "margin", "UPO's pairs", "pairs of the largest reward margin"),
    _noise("margin", "best-random", "Pairs of the largest reward margin", "pairs of the best and a random answer"),
    _noise("best-random", "random", "Pairs of the best and a random answer", "random pairs"),
    _noise("online", "random", "Pairs of UPO with a head that learned from the reward model alone", "random pairs"),
    _solves(
        "estimator", "upo", "no estimator", "UPO solves more than without its estimator.", "iterative DPO with NLL"
    ),
    _solves(
        "estimator-before-smoothing",
        "no smoothing",
        "no estimator",
        "Removing the estimator costs more than removing the smoothing.",
        "UPO without the estimator",
    ),
    _solves(
        "estimator-before-nll",
        "no nll",
        "no estimator",
        "Removing the estimator costs more than removing the NLL term.",
        "UPO without the estimator",
    ),
    _solves(
        "printed-smoothing",
        "upo",
        "printed",
        "The printed smoothing, above 1/2, solves less than the relative one.",
        "UPO with the printed smoothing",
    ),
    Claim(
        "upo",
        "win-rate",
        "Three iterations of UPO raise win rates and scores beyond iterative DPO.",
        "exact",
        "iterative DPO",
        "AlpacaEval 2.0 win rate, MT-Bench score, GSM8K and MATH accuracy",
        "higher",
        untestable="needs a 7B policy, its reward model and language model judges",
    ),
)

"""Data before algorithm before reward model (Ivison et al. 2024, arXiv:2406.09279).

Design, fixed before the first run.

Exact world: sequences of three tokens out of 4 (64 answers); the policy is a Markov chain by position, so that it
generalises over answers; pi_ref has normal logits with standard deviation 0.5. 8 prompts, each with its own gold reward
g of variance near 1 from standard normal tables: of the 4 easy ones g = sum_t a_t(y_t) / sqrt 3; of the 4 hard ones
g = sqrt 0.2 (the same) + sqrt 0.8 sum_t b_t(y_t, y_t+1) / sqrt 2.

Preference data: 200 pairs per prompt of pi_ref's answers, Bradley-Terry at 2 g, each label reversed with probability
rho = 0, 0.2 or 0.4. Reward models are fitted to the same pairs, a Bradley-Terry model per prompt with ridge 1, and
standardised under pi_ref: the small one is linear in the token at each position (12 features), the large one in pairs
of neighbours too (44).

Arms, in each rho: DPO (beta 0.1, 32 pairs per update), PPO of the paper's recipe with the small and with the large
model (256 answers per iteration, 8 updates of 32 on them). All make 120 updates of Adam at rate 0.05. 12 seeds.

Metric: exact gold reward, mean over prompts, where the KL to pi_ref (mean over prompts) first reaches 1 nat, linear
between the two points around it; at the end where it does not.

- Quality: labels without noise against rho = 0.4, mean of DPO and PPO (large model): higher.
- Data before algorithm: this effect is larger than the absolute difference of PPO (large) and DPO, mean over rho.
- Algorithm: with labels without noise PPO (large) is not worse than DPO by more than 0.05.
- Larger reward model: without noise the large model gives PPO more on the hard prompts; on the easy ones the two are
  within 0.1.
- Prompts of the test's own domain need policies whose prompts share parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from polopt.claims.claim import Claim, note
from polopt.claims.exact import start
from polopt.claims.study import Curves, Effects, Study
from polopt.core.example import Example
from polopt.core.method import Method
from polopt.core.override import override
from polopt.methods.preference.dpo import dpo
from polopt.methods.preference.unpacking_dpo_ppo import unpacking_dpo_ppo
from polopt.policies.exact import SequenceSpace, divergences
from polopt.rewards.mixtures import LinearRewards
from polopt.tasks.preferences import labelled
from polopt.tasks.problems import Problem, problem

SPACE = SequenceSpace(4, 3)
PROMPTS, EASY = 8, 4
PAIRS, SCALE, RIDGE, RATE = 200, 2.0, 1.0, 0.05
UPDATES, BATCH, ANSWERS = 120, 32, 32
NOISE = (0.0, 0.2, 0.4)
GRID = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
DISTANCE = 1.0
DPO: Final = override(dpo, {"objective.beta": 0.1})


def features(large: bool) -> Float[Tensor, "sequence feature"]:
    """Token at each position, and, of the large model, pairs of neighbours."""
    tokens = SPACE.sequences
    single = F.one_hot(tokens, 4).double().flatten(1)
    pairs = F.one_hot(4 * tokens[:, :-1] + tokens[:, 1:], 16).double().flatten(1)
    return torch.cat([single, pairs], 1) if large else single


def world(seed: int) -> Problem:
    """The prompts of a seed with their gold rewards."""
    made = problem("random-rewards", space=SPACE, batch=PROMPTS, seed=seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    single = torch.randn(PROMPTS, 12, generator=generator, dtype=torch.float64)
    pairs = torch.randn(PROMPTS, 32, generator=generator, dtype=torch.float64)
    phi = features(large=True)
    additive, joint = single @ phi[:, :12].T / 3**0.5, pairs @ phi[:, 12:].T / 2**0.5
    hard = (torch.arange(PROMPTS) >= EASY)[:, None]
    gold = torch.where(hard, 0.2**0.5 * additive + 0.8**0.5 * joint, additive)
    policy = made.policy("order-1")
    # The reference is what the policy can be.
    reference = policy.table().detach()
    return replace(made, rewards={"gold": gold}, initial=reference, reference=reference)


def reward_model(made: Problem, pool: Sequence[Example], large: bool) -> Float[Tensor, "problem sequence"]:
    """The fitted rewards of every answer, of mean 0 and variance 1 under pi_ref."""
    phi, reference = features(large), made.policy().probabilities().detach()
    found = []
    for prompt in range(PROMPTS):
        own = [example for example in pool if example.columns["problem"] == prompt]
        winner, loser = ([SPACE.index(_tokens(text)) for text in side] for side in _sides(own))
        model = LinearRewards(phi[winner] - phi[loser], 1, RIDGE)
        model.fit(0, torch.ones(len(own)))
        found.append(phi @ model.theta[0])
    table = torch.stack(found)
    centred = table - (reference * table).sum(-1, keepdim=True)
    return centred / (reference * centred.square()).sum(-1, keepdim=True).sqrt()


def _sides(pool: Sequence[Example]) -> tuple[list[str], list[str]]:
    return [str(example.chosen) for example in pool], [str(example.rejected) for example in pool]


def _tokens(text: str) -> list[int]:
    return [int(token) for token in text.split()]


@dataclass(frozen=True)
class Path:
    """KL to pi_ref and gold reward by sub-task, at every point where it was looked."""

    kl: Sequence[float]
    gold: Mapping[str, Sequence[float]]

    def at(self, level: float, skill: str) -> float:
        """Gold reward where the KL first reaches the level, the last one where it does not."""
        values = self.gold[skill]
        for t in range(1, len(self.kl)):
            if self.kl[t] >= level:
                share = (level - self.kl[t - 1]) / (self.kl[t] - self.kl[t - 1])
                return values[t - 1] + share * (values[t] - values[t - 1])
        return values[-1]


def trained(
    made: Problem,
    method: Method,
    seed: int,
    iterations: int,
    *,
    rewards: Mapping[str, Tensor] | None = None,
    pool: Sequence[Example] | None = None,
) -> Path:
    """Train on rewards or on pairs, and look after every iteration."""
    reference, gold = made.policy().probabilities().detach(), made.rewards["gold"]
    run = start(
        made if rewards is None else replace(made, rewards=rewards),
        method,
        seed=seed,
        group=ANSWERS if pool is None else 1,
        prompts=None if pool is None else BATCH,
        lr=RATE,
        examples=pool,
        head="order-1",
    )
    kls: list[float] = []
    found: dict[str, list[float]] = {"all": [], "easy": [], "hard": []}
    for step in range(iterations + 1):
        with torch.no_grad():
            p = run.policy.probabilities()
        worth = (p * gold).sum(-1)
        kls.append(float(divergences.kl(p, reference).mean()))
        for skill, values in {"all": worth, "easy": worth[:EASY], "hard": worth[EASY:]}.items():
            found[skill].append(float(values.mean()))
        if step < iterations:
            run.step()
    return Path(kls, found)


def cells(seed: int, quick: bool) -> Mapping[str, float]:
    """Gold reward by KL of every cell, and the effects of data and algorithm."""
    made = world(seed)
    found: dict[str, float] = {}
    updates = 8 if quick else UPDATES
    for rho in NOISE:
        note(f"labels reversed with probability {rho:g}")
        pool = labelled(made, PAIRS * PROMPTS, scale=SCALE, flip=rho, seed=seed)
        paths = {"dpo": trained(made, DPO, seed, updates, pool=pool)}
        for size in ("small", "large"):
            table = {"model": reward_model(made, pool, size == "large")}
            iterations = updates // unpacking_dpo_ppo.schedule.minibatches
            paths[f"ppo-{size}"] = trained(made, unpacking_dpo_ppo, seed, iterations, rewards=table)
        for arm, path in paths.items():
            found |= {
                f"{rho:g}/{arm}/{skill}@{level:g}": path.at(level, skill) for skill in path.gold for level in GRID
            }
            found[f"{rho:g}/{arm}/kl"] = path.kl[-1]
    arms = ("dpo", "ppo-large")
    found["clean"], found["noisy"] = (sum(found[name(rho, arm)] for arm in arms) / 2 for rho in (NOISE[0], NOISE[-1]))
    algorithm = sum(abs(found[name(rho, "ppo-large")] - found[name(rho, "dpo")]) for rho in NOISE) / len(NOISE)
    return {**found, "data": found["clean"] - found["noisy"], "algorithm": algorithm}


def name(rho: float, arm: str, skill: str = "all", level: float = DISTANCE) -> str:
    """The name of a measurement."""
    return f"{rho:g}/{arm}/{skill}@{level:g}"


METRIC = "exact gold reward at a KL of 1"

CLAIMS = (
    Claim(
        "unpacking-dpo-ppo",
        "quality",
        "Better preference data give a better policy.",
        "exact",
        "40% of the labels reversed",
        f"{METRIC}, mean of DPO and PPO",
        "higher",
        "clean",
        "noisy",
        measure=cells,
    ),
    Claim(
        "unpacking-dpo-ppo",
        "data-before-algorithm",
        "The effect of the data is larger than that of the algorithm.",
        "exact",
        "absolute difference of PPO and DPO, mean over noise",
        f"difference in {METRIC}",
        "higher",
        "data",
        "algorithm",
        measure=cells,
    ),
    Claim(
        "unpacking-dpo-ppo",
        "ppo",
        "With an accurate reward model PPO is at least as good as DPO at equal KL.",
        "exact",
        "DPO",
        METRIC,
        "higher",
        name(0.0, "ppo-large"),
        name(0.0, "dpo"),
        margin=0.05,
        measure=cells,
    ),
    Claim(
        "unpacking-dpo-ppo",
        "larger-model-hard",
        "A larger reward model helps PPO on the hard prompts.",
        "exact",
        "PPO with the small reward model",
        f"{METRIC}, hard prompts",
        "higher",
        name(0.0, "ppo-large", "hard"),
        name(0.0, "ppo-small", "hard"),
        measure=cells,
    ),
    Claim(
        "unpacking-dpo-ppo",
        "larger-model-easy",
        "On the easy prompts a larger reward model changes little.",
        "exact",
        "PPO with the small reward model",
        f"{METRIC}, easy prompts",
        "equal",
        name(0.0, "ppo-large", "easy"),
        name(0.0, "ppo-small", "easy"),
        margin=0.1,
        measure=cells,
    ),
    Claim(
        "unpacking-dpo-ppo",
        "prompts",
        "Extra unlabelled prompts help PPO on tasks of their own domain alone.",
        "exact",
        "PPO on the prompts of the preference data",
        "score on tasks of the prompts' domain and of others",
        "higher",
        untestable="prompts of the exact world share no parameters, so that it would hold by construction; it needs a "
        "language model and a reward model that both generalise over prompts",
    ),
)

TITLES: Final = {"dpo": "DPO", "ppo-small": "PPO, small reward model", "ppo-large": "PPO, large reward model"}


def _by_kl(rho: float, skill: str) -> dict[str, list[tuple[float, str]]]:
    return {title: [(level, name(rho, arm, skill, level)) for level in GRID] for arm, title in TITLES.items()}


STUDY = Study(
    "What matters in learning from preferences: data, algorithm, reward model",
    "In one budget and at equal KL: how much do label noise, DPO or PPO, and the size of the reward model change?",
    (
        *(
            Curves(
                f"{rho:.0%} of the labels reversed, {words}",
                "KL to the reference (nats)",
                "exact gold reward",
                cells,
                _by_kl(rho, skill),
            )
            for rho, skill, words in (
                (0.0, "all", "all prompts"),
                (0.4, "all", "all prompts"),
                (0.0, "easy", "easy prompts"),
                (0.0, "hard", "hard prompts"),
            )
        ),
        Effects(
            "Effects of the factors (KL 1)",
            "exact gold reward",
            cells,
            {
                **{
                    f"data: 0% - {rho:.0%} reversed, {title}": (name(0.0, arm), name(rho, arm))
                    for rho in NOISE[1:]
                    for arm, title in TITLES.items()
                },
                **{
                    f"algorithm: PPO (large) - DPO, {rho:.0%} reversed": (name(rho, "ppo-large"), name(rho, "dpo"))
                    for rho in NOISE
                },
                **{
                    f"reward model: large - small, {rho:.0%} reversed, {skill}": (
                        name(rho, "ppo-large", skill),
                        name(rho, "ppo-small", skill),
                    )
                    for rho in NOISE
                    for skill in ("easy", "hard")
                },
            },
        ),
    ),
)

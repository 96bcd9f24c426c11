"""Fresh pairs beat fixed ones at equal KL (Tang et al. 2024, arXiv:2405.08448).

Design, fixed before the first run.

Exact world, a bandit with a linear softmax policy: sequences of two tokens out of 8 (64 answers), a policy whose
tokens are independent (16 features). Gold reward g = (u(first) + v(second) + e(answer) / 2) / 1.5 with standard normal
u, v, e, not quite within the policy's reach; gold preference: Bradley-Terry in g. pi_ref and the policy mu of the data
have normal logits with standard deviations 0.5 and 1, each its own. The data set: 300 pairs of mu, labelled by draws
from the gold preference. The proxy is linear in the 16 features, fitted to these pairs (ridge 1). 12 seeds, which are
12 problems of one policy, whose gradient is not clipped.

Arms, 8 pairs per update, 200 updates of Adam at rate 0.05 from pi_ref:

- online: fresh pairs of the policy, labels drawn from the proxy's preference; all of them are logged.
- offline: pairs of the data set, drawn with replacement.
- shuffled: the pairs and labels of the online log in random order. Replayed: in their own order.

Losses: best-of-2, the likelihood of the winner alone; IPO of summed log-ratios with tau 0.1, 0.3 and 1.

Metrics, exact: win rate under the gold preference against pi_ref, the highest at any update with KL(pi || pi_ref) at
most 0.3, 1 and 3 (never the last one's); accuracy after the last update, the share of pairs of mu (the better answer by
g) that the policy's log-ratio to pi_ref orders rightly, ties counting one half.

- Best-of-2, KL at most 0.3, 1 and 3: online above offline.
- Best-of-2, KL at most 1 and 3: online above shuffled, so that coverage is no explanation.
- Replayed, the log gives the online run (best-of-2, KL at most 3: within 0.001).
- IPO, mean over the three tau: offline above online in accuracy.

- IPO in win rate: a claim of the small world (`polopt.claims.fresh_pairs`), since here one linear map generates and
  ranks.

Open comparisons, of which nothing is claimed: the gap of IPO in win rate; data from pi_ref and from a better policy,
pi_ref exp(g) up to a constant; the gap of best-of-2 in a policy that has a logit for every answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from polopt.claims.claim import Claim, note
from polopt.claims.exact import Run, start
from polopt.claims.fresh_pairs import fresh_against_fixed
from polopt.claims.games import sequences
from polopt.claims.study import Curves, Effects, Study, at_once
from polopt.core.method import Method
from polopt.core.override import override
from polopt.core.part import Part, Stateful
from polopt.core.policy import Policy, Request
from polopt.core.rollout import Rollout
from polopt.filters.preferences import RandomPair
from polopt.methods.preference.online_offline_gap import online_offline_gap
from polopt.objectives.best_of_n import BestOfN
from polopt.policies.exact import PreferenceGame, SequenceSpace, divergences, tree
from polopt.policies.exact.policy import ExactPolicy
from polopt.rewards.mixtures import LinearRewards
from polopt.tasks.problems import Problem
from polopt.updates.gradient_step import GradientStep

SPACE = SequenceSpace(8, 2)
PAIRS, DATA, UPDATES, RATE, RIDGE = 8, 300, 200, 0.05, 1.0
LEVELS = (0.3, 1.0, 3.0)
GRID = (0.03, 0.1, 0.3, 0.5, 1.0, 2.0, 3.0)
TAUS = (0.1, 0.3, 1.0)
# A norm that is clipped would join the problems of one policy.
RECIPE: Final = online_offline_gap | {"update": GradientStep(max_norm=math.inf)}
LOSSES: Final[Mapping[str, Method]] = {
    "best-of-2": RECIPE | {"objective": BestOfN()},
    **{f"ipo-{tau:g}": override(RECIPE, {"objective.beta": tau}) for tau in TAUS},
}
ARMS = ("online", "offline", "shuffled")


def accuracy(
    policy: Float[Tensor, "problem sequence"],
    reference: Float[Tensor, "problem sequence"],
    reward: Float[Tensor, "problem sequence"],
    law: Float[Tensor, "problem sequence"],
) -> Float[Tensor, " problem"]:
    """Share of a law's pairs of different rewards whose better answer has the higher log-ratio; ties one half."""
    ratio = policy.log() - reference.log()
    gap = ratio[:, :, None] - ratio[:, None, :]
    # Equal up to rounding is a tie.
    right = torch.where(gap.abs() < 1e-12, 0.5, (gap > 0).double())
    weight = law[:, :, None] * law[:, None, :] * (reward[:, :, None] > reward[:, None, :])
    return (weight * right).sum((1, 2)) / weight.sum((1, 2))


@dataclass(frozen=True, eq=False)
class World:
    """One problem per seed: its reward is the proxy's. ``law`` [B, S] is mu, ``gold`` the gold rewards."""

    problem: Problem
    gold: Tensor
    law: Tensor
    reference: Tensor

    @property
    def game(self) -> PreferenceGame:
        """The gold preference."""
        return PreferenceGame.bradley_terry(self.gold)


def features() -> Float[Tensor, "sequence feature"]:
    """Which token stands at each place, [64, 16]."""
    return F.one_hot(SPACE.sequences, 8).double().flatten(1)


def world(seeds: Sequence[int]) -> World:
    """The problems of these seeds, with their proxies."""
    gold, reference, data = [], [], []
    first, second = SPACE.sequences[:, 0], SPACE.sequences[:, 1]
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, source: torch.Generator = generator) -> Tensor:
            return torch.randn(shape, generator=source, dtype=torch.float64)

        gold.append((normal(8)[first] + normal(8)[second] + normal(SPACE.n_sequences) / 2) / 1.5)
        reference.append(0.5 * normal(2, 8))
        data.append(normal(2, 8))

    def table(rows: list[Tensor]) -> Tensor:
        return torch.stack(rows)[:, SPACE.depths]

    initial, law = table(reference), tree.log_probabilities(SPACE, table(data)).exp()
    made = Problem("pairs", SPACE, {"proxy": torch.stack(gold)}, initial, initial, {}, (2,) * len(seeds))
    found = World(made, torch.stack(gold), law, tree.log_probabilities(SPACE, initial).exp())
    proxies = [proxy(found, place, seed) for place, seed in enumerate(seeds)]
    return replace(found, problem=replace(made, rewards={"proxy": torch.stack(proxies)}))


def drawn(made: World, law: Tensor, place: int, seed: int) -> tuple[Tensor, Tensor]:
    """The data set of a problem: winners and losers, [DATA] each; pairs of different answers of a law."""
    generator = torch.Generator().manual_seed(10_000 + seed)
    both = torch.multinomial(law[place].expand(DATA, -1), 2, generator=generator)
    chance = made.game.preference[place, both[:, 0], both[:, 1]]
    wins = torch.rand(DATA, generator=generator, dtype=torch.float64) < chance
    return torch.where(wins, both[:, 0], both[:, 1]), torch.where(wins, both[:, 1], both[:, 0])


def proxy(made: World, place: int, seed: int) -> Tensor:
    """Rewards [S] of the linear Bradley-Terry model of the data set."""
    winner, loser = drawn(made, made.law, place, seed)
    phi = features()
    model = LinearRewards(phi[winner] - phi[loser], 1, RIDGE)
    model.fit(0, torch.ones(DATA))
    return phi @ model.theta[0]


# --- sources of pairs -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recorded(Stateful):
    """Pairs that are known already, the next batch of them in every call: ``batches`` are rows of problem, winner,
    loser, [steps, pairs, 3].
    """

    batches: Tensor
    step: int = field(default=0, init=False, compare=False)

    gives = frozenset({"label"})
    offline = True
    state = ("step",)

    def __call__(
        self,
        policy: Policy,
        requests: Sequence[Request],
        *,
        limit: int,
        seed: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> Rollout:
        assert isinstance(policy, ExactPolicy)
        rows = self.batches[self.step]
        self.remember(step=self.step + 1)
        problem = rows[:, 0].repeat_interleave(2)
        rollout = policy.rollout(problem, rows[:, 1:].flatten(), torch.arange(len(rows)).repeat_interleave(2))
        label = torch.tensor([1.0, 0.0], dtype=torch.float64).repeat(len(rows))
        return rollout.with_columns(trajectory={"label": label})


@dataclass(frozen=True)
class Logged(Part):
    """Labelled pairs as `RandomPair` makes them, written down: rows of problem, winner, loser in ``log``."""

    pairs: RandomPair
    log: list[Tensor] = field(default_factory=list, compare=False)

    needs = frozenset({"score"})
    gives = frozenset({"label", "mask/chosen"})

    def __call__(self, rollout: Rollout) -> Rollout:
        made = self.pairs(rollout)
        problem, answer = sequences(made, SPACE)
        won = made["label"] > 0.5
        # Both members of a pair are neighbours, so that winners and losers are in one order.
        self.log.append(torch.stack([problem[won], answer[won], answer[~won]], 1))
        return made

    def __deepcopy__(self, memo: object) -> Logged:
        # A run works on a copy of its method; what it writes down is read here.
        return self


def shuffled(log: Tensor, seed: int) -> Tensor:
    """The log [steps, pairs, 3] with the pairs of each problem in random order, as many of it in every step."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for problem in range(int(log[..., 0].max()) + 1):
        own = log.flatten(0, 1)
        own = own[own[:, 0] == problem]
        found.append(own[torch.randperm(len(own), generator=generator)].view(len(log), -1, 3))
    return torch.cat(found, 1)


def offline(made: World, law: Tensor, seeds: Sequence[int], steps: int) -> Tensor:
    """Batches of pairs drawn from the data sets of a law."""
    found = []
    for place, seed in enumerate(seeds):
        winner, loser = drawn(made, law, place, seed)
        order = torch.randint(DATA, (steps, PAIRS), generator=torch.Generator().manual_seed(20_000 + seed))
        found.append(torch.stack([torch.full_like(order, place), winner[order], loser[order]], -1))
    return torch.cat(found, 1)


# --- runs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Trace:
    """KL to pi_ref and win rate before and after every update, [T, B], and the last accuracy [B]."""

    kl: Tensor
    win: Tensor
    accuracy: Tensor

    def best(self, level: float) -> Tensor:
        """The highest win rate at a KL of at most ``level``, [B]; that of pi_ref is 1/2."""
        return self.win.masked_fill(self.kl > level, 0.0).amax(0)


def trace(made: World, method: Method, seeds: Sequence[int], steps: int, head: str = "order-0") -> Trace:
    """Train, and look after every update."""
    pool = [example for example in made.problem.examples() for _ in range(PAIRS)]
    run = start(made.problem, method, seed=seeds[0], group=2, lr=RATE, examples=pool, head=head)
    kls, wins = [], []

    def look(now: Run) -> Tensor:
        with torch.no_grad():
            p = now.policy.probabilities()
        kls.append(divergences.kl(p, made.reference))
        wins.append(made.game.win_rate(p, made.reference))
        return p

    last = look(run)
    for _ in range(steps):
        run.step()
        last = look(run)
    return Trace(torch.stack(kls), torch.stack(wins), accuracy(last, made.reference, made.gold, made.law))


def online_run(
    made: World, method: Method, seeds: Sequence[int], steps: int, head: str = "order-0"
) -> tuple[Trace, Tensor]:
    """The online arm and its log."""
    logged = Logged(RandomPair(seed=seeds[0]))
    found = trace(made, method | {"filter": logged}, seeds, steps, head)
    return found, torch.stack(logged.log)


def recorded(method: Method, batches: Tensor) -> Method:
    """The loss on known pairs."""
    return method | {"rollout": Recorded(batches), "filter": None}


@at_once
def arms(seeds: Sequence[int], quick: bool) -> Sequence[Mapping[str, float]]:
    """Best win rates by level of KL and last accuracy, of every loss and arm."""
    made, steps = world(seeds), 3 if quick else UPDATES
    rows: list[dict[str, float]] = [{} for _ in seeds]

    def keep(name: str, found: Trace) -> None:
        columns = {f"{name}@{level:g}": found.best(level) for level in GRID}
        for label, values in {**columns, f"{name}/accuracy": found.accuracy}.items():
            for row, value in zip(rows, values.tolist(), strict=True):
                row[label] = value

    for loss, method in LOSSES.items():
        note(f"{loss}, online")
        found, log = online_run(made, method, seeds, steps)
        keep(f"{loss}/online", found)
        known = {"shuffled": shuffled(log, seeds[0]), "offline": offline(made, made.law, seeds, steps)}
        known["from-reference"] = offline(made, made.reference, seeds, steps)
        known["from-better"] = offline(made, (made.reference.log() + made.gold).softmax(-1), seeds, steps)
        if loss == "best-of-2":
            known["replayed"] = log
        for arm, batches in known.items():
            note(f"{loss}, {arm}")
            keep(f"{loss}/{arm}", trace(made, recorded(method, batches), seeds, steps))
    note("a logit for every answer")
    whole = LOSSES["best-of-2"]
    keep("best-of-2/online-tabular", online_run(made, whole, seeds, steps, "tabular")[0])
    batches = offline(made, made.law, seeds, steps)
    keep("best-of-2/offline-tabular", trace(made, recorded(whole, batches), seeds, steps, "tabular"))
    for row in rows:
        for arm in ARMS:
            row[f"ipo/{arm}/accuracy"] = sum(row[f"ipo-{tau:g}/{arm}/accuracy"] for tau in TAUS) / len(TAUS)
        for level in GRID:
            gap = row[f"best-of-2/online@{level:g}"] - row[f"best-of-2/offline@{level:g}"]
            larger = row[f"best-of-2/online-tabular@{level:g}"] - row[f"best-of-2/offline-tabular@{level:g}"]
            row |= {f"gap@{level:g}": gap, f"gap-tabular@{level:g}": larger}
    return rows


WIN = "highest exact gold win rate against the reference at a KL of at most"


def _gap(arm: str, level: float, statement: str, baseline: str) -> Claim:
    return Claim(
        "online-offline-gap",
        f"best-of-2-{arm}-kl-{level:g}".replace(".", "-"),
        f"{statement} at a KL of at most {level:g}.",
        "exact",
        baseline,
        f"{WIN} {level:g}",
        "higher",
        f"best-of-2/online@{level:g}",
        f"best-of-2/{arm}@{level:g}",
        measure=arms,
    )


CLAIMS = (
    *(
        _gap("offline", level, "Best-of-2 on fresh pairs beats best-of-2 on a fixed data set", "the fixed data set")
        for level in LEVELS
    ),
    *(
        _gap("shuffled", level, "Shuffling the online pairs of best-of-2 loses win rate", "the shuffled online log")
        for level in LEVELS[1:]
    ),
    Claim(
        "online-offline-gap",
        "replayed",
        "Replayed in its own order the online log of best-of-2 gives the online run.",
        "exact",
        "the online run",
        f"{WIN} 3",
        "equal",
        "best-of-2/replayed@3",
        "best-of-2/online@3",
        margin=0.001,
        measure=arms,
    ),
    Claim(
        "online-offline-gap",
        "accuracy",
        "Offline IPO classifies pairs of the data set's policy better than online IPO does.",
        "exact",
        "online IPO",
        "exact accuracy on pairs of the data set's policy, mean over three tau",
        "higher",
        "ipo/offline/accuracy",
        "ipo/online/accuracy",
        measure=arms,
    ),
    Claim(
        "online-offline-gap",
        "ipo-win-rate",
        "At equal KL online IPO wins more often than offline IPO.",
        "small",
        "offline IPO",
        "highest held-out win rate against the reference at a KL of at most 3",
        "higher",
        "online/win",
        "offline/win",
        measure=fresh_against_fixed,
    ),
)


def _levels(loss: str, names: Mapping[str, str]) -> dict[str, list[tuple[float, str]]]:
    return {title: [(level, f"{loss}/{arm}@{level:g}") for level in GRID] for arm, title in names.items()}


NAMES = {"online": "online", "offline": "offline, data of another policy", "shuffled": "shuffled online log"}
SOURCES = {
    **NAMES,
    "from-reference": "offline, data of the reference",
    "from-better": "offline, data of a better policy",
}

STUDY = Study(
    "Online against offline alignment",
    "With one loss and at equal KL: do fresh pairs beat a fixed data set, and does anything but freshness explain it?",
    (
        *(
            Curves(
                f"{title}: best win rate by KL",
                "KL to the reference, at most (nats)",
                "gold win rate against the reference",
                arms,
                _levels(loss, SOURCES),
                logarithmic=True,
            )
            for loss, title in (("best-of-2", "Best-of-2"), *((f"ipo-{tau:g}", f"IPO, tau {tau:g}") for tau in TAUS))
        ),
        Effects(
            "Gap in win rate, online minus offline",
            "gold win rate",
            arms,
            {
                f"{loss}, KL at most {level:g}": (f"{loss}/online@{level:g}", f"{loss}/offline@{level:g}")
                for loss in LOSSES
                for level in LEVELS
            },
        ),
        Effects(
            "Explanations (KL at most 1)",
            "gold win rate or accuracy",
            arms,
            {
                **{
                    f"coverage: online - shuffled, {loss}": (f"{loss}/online@1", f"{loss}/shuffled@1")
                    for loss in LOSSES
                },
                **{
                    f"proximity: data of the reference - of another, {loss}": (
                        f"{loss}/from-reference@1",
                        f"{loss}/offline@1",
                    )
                    for loss in ("best-of-2", "ipo-0.1")
                },
                **{
                    f"quality: data of a better policy - of another, {loss}": (
                        f"{loss}/from-better@1",
                        f"{loss}/offline@1",
                    )
                    for loss in ("best-of-2", "ipo-0.1")
                },
                "capacity: gap with all logits - gap, best-of-2": ("gap-tabular@1", "gap@1"),
                **{
                    f"accuracy: offline - online, ipo-{tau:g}": (
                        f"ipo-{tau:g}/offline/accuracy",
                        f"ipo-{tau:g}/online/accuracy",
                    )
                    for tau in TAUS
                },
            },
        ),
    ),
)

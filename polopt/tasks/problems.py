"""Named problems of the exact world: rewards or preferences over all short sequences, and policies to start from.

made = problem("binary-verifier", pass_rate=0.1, seed=3)
policy = made.policy()                        # with the model ``ref``
trainer needs made.examples() and made.reward_functions()
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.core.errors import UsageError
from polopt.core.example import Example
from polopt.core.method import Method
from polopt.core.part import flatten, suggest
from polopt.core.policy import Request
from polopt.policies.exact import enumeration, heads, tree
from polopt.policies.exact.game import PreferenceGame
from polopt.policies.exact.policy import ExactPolicy, example_of
from polopt.policies.exact.space import SequenceSpace
from polopt.rewards.comparisons import Preference
from polopt.rewards.reward import NamedReward

GROUP = 4
"""Trajectories per prompt where a problem does not say."""


@dataclass(frozen=True, eq=False)
class Problem:
    """B independent problems on one space.

    ``rewards`` [B, S] by name, added with ``weights`` (1 where not given); ``initial`` and ``reference`` are tables of
    logits [B, K, V]. ``behaviour`` is the table that samples, where that is not ``initial``: ``age`` updates older.
    ``game`` is the preference behind the rewards, where there is one. ``group_sizes`` has one entry per problem.
    """

    name: str
    space: SequenceSpace
    rewards: Mapping[str, Float[Tensor, "problem sequence"]]
    initial: Float[Tensor, "problem node token"]
    reference: Float[Tensor, "problem node token"]
    weights: Mapping[str, float]
    group_sizes: tuple[int, ...]
    game: PreferenceGame | None = None
    behaviour: Float[Tensor, "problem node token"] | None = None
    age: int = 0

    @property
    def batch(self) -> int:
        """B."""
        return len(self.initial)

    @property
    def reward(self) -> Float[Tensor, "problem sequence"]:
        """Weighted total of the named rewards, [B, S]."""
        return torch.stack([self.weights.get(name, 1.0) * table for name, table in self.rewards.items()]).sum(0)

    def policy(self, head: str = "tabular") -> ExactPolicy:
        """A policy at ``initial`` with the model ``ref`` at ``reference``; a head that cannot represent ``initial``
        starts at the member nearest to it, argmin_q KL(initial || q)."""
        return self._at(self.initial, head)

    def sampler(self, head: str = "tabular") -> ExactPolicy:
        """The policy that samples: at ``behaviour``, ``age`` versions behind; the same as `policy` where there is none.

        The version of a stale one is -age, so that `policy` starts at 0.
        """
        made = self._at(self.initial if self.behaviour is None else self.behaviour, head)
        made.version = -self.age
        return made

    def _at(self, table: Tensor, head: str) -> ExactPolicy:
        kind = heads.check_head(head)
        made = ExactPolicy(self.space, self.batch, heads.project(self.space, table, kind), head=head, dtype=table.dtype)
        made.add_model("ref", self.reference)
        return made

    def examples(self) -> tuple[Example, ...]:
        """One example per problem, whose column ``problem`` is its number."""
        return tuple(example_of(number, self.name) for number in range(self.batch))

    def requests(self) -> list[Request]:
        """Every problem once, with its group size."""
        return [Request(example, count) for example, count in zip(self.examples(), self.group_sizes, strict=True)]

    def reward_functions(self) -> tuple[NamedReward, ...]:
        """The named rewards for a trainer; they do not apply (None) to a trajectory that is cut short of the space."""
        return tuple(
            NamedReward(name, _Lookup(self.space, table), self.weights.get(name, 1.0))
            for name, table in self.rewards.items()
        )

    def preference(self) -> Preference:
        """P(first beats second) by the game, as a function of the texts' tokens, for a judge.

        It does not apply (None) to a trajectory that is cut short of the space. Raises UsageError without a game.
        """
        if self.game is None:
            raise UsageError(
                f"problem {self.name!r} has no preferences; noisy-preferences and intransitive-preferences have"
            )
        return _Comparison(self.space, self.game.preference)

    def judged(self, method: Method) -> Method:
        """The method whose reward parts that ask a problem (``of_problem``) ask this one."""
        members = flatten(method.reward)
        if not any(hasattr(member, "of_problem") for member in members):
            return method
        asked = tuple(m.of_problem(self) if hasattr(m, "of_problem") else m for m in members)
        return method | {"reward": asked[0] if len(asked) == 1 else replace(method.reward, parts=asked)}


@dataclass(frozen=True)
class _Comparison:
    """A preference by table, in the calling convention of judges."""

    space: SequenceSpace
    table: Tensor

    def __call__(
        self, first_ids: Sequence[Sequence[int]], second_ids: Sequence[Sequence[int]], problem: Sequence[int], **_: Any
    ) -> list[float | None]:
        sides = [[self.space.index(ids) for ids in side] for side in (first_ids, second_ids)]
        return [float(self.table[b, i, j]) if min(i, j) >= 0 else None for b, i, j in zip(problem, *sides, strict=True)]


@dataclass(frozen=True)
class _Lookup:
    """A reward by table, in TRL's calling convention."""

    space: SequenceSpace
    table: Tensor

    def __call__(self, completion_ids: Sequence[Sequence[int]], problem: Sequence[int], **_: Any) -> list[float | None]:
        found = [self.space.index(ids) for ids in completion_ids]
        return [float(self.table[b, s]) if s >= 0 else None for b, s in zip(problem, found, strict=True)]


# --- what problems are made of ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _World:
    """What a problem is made from: a space, a number of problems, a source of randomness."""

    space: SequenceSpace
    batch: int
    generator: torch.Generator

    @property
    def shape(self) -> tuple[int, int]:
        return self.batch, self.space.n_sequences

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def logits(self, scale: float) -> Tensor:
        return scale * self.normal(self.batch, self.space.n_nodes, self.space.vocabulary)

    def choice(self, count: int, of: int) -> Tensor:
        """``count`` distinct numbers below ``of`` for every problem, [B, count]."""
        return torch.rand(self.batch, of, generator=self.generator).argsort(1)[:, :count]

    def problem(self, name: str, rewards: Mapping[str, Tensor], initial: Tensor, **more: Any) -> Problem:
        defaults = {"reference": initial, "weights": {}, "group_sizes": (GROUP,) * self.batch}
        return Problem(name, self.space, MappingProxyType(dict(rewards)), initial, **{**defaults, **more})


def _random_rewards(world: _World, *, scale: float = 1.0, spread: float = 0.5) -> Problem:
    """r(y) = scale times a standard normal; initial logits are normal with standard deviation ``spread``."""
    return world.problem("", {"reward": scale * world.normal(*world.shape)}, world.logits(spread))


def _sparse_rewards(world: _World, *, winners: int = 1, spread: float = 0.5) -> Problem:
    """r = 1 for ``winners`` random sequences, else 0."""
    _check_count("winners", winners, 1, world.space.n_sequences - 1)
    reward = torch.zeros(world.shape, dtype=torch.float64)
    reward.scatter_(1, world.choice(winners, world.space.n_sequences), 1.0)
    return world.problem("", {"reward": reward}, world.logits(spread))


def _binary_verifier(
    world: _World, *, pass_rate: float | Sequence[float] = 0.25, right: float = 0.25, spread: float = 0.5
) -> Problem:
    """r = 1 for a random share ``right`` of the sequences, else 0; the initial policy is right with ``pass_rate``.

    ``pass_rate`` is one number or one per problem. A random policy is tilted: the mass of right and of wrong sequences
    is rescaled, q(y) = rate p(y | right) or (1 - rate) p(y | wrong), which a tabular policy represents exactly.
    """
    rates = [pass_rate] * world.batch if isinstance(pass_rate, (int, float)) else list(pass_rate)
    if len(rates) != world.batch:
        raise UsageError(f"pass_rate has {len(rates)} entries for {world.batch} problems")
    for rate in rates:
        if not 0 < rate < 1:
            raise UsageError(f"a pass rate lies strictly between 0 and 1, got {rate}")
    size = world.space.n_sequences
    count = min(max(round(right * size), 1), size - 1)
    reward = torch.zeros(world.shape, dtype=torch.float64)
    reward.scatter_(1, world.choice(count, size), 1.0)
    before = tree.log_probabilities(world.space, world.logits(spread))
    passing = torch.tensor(rates, dtype=torch.float64)[:, None]
    good = reward > 0
    log_right = before.masked_fill(~good, -torch.inf).log_softmax(-1) + passing.log()
    log_wrong = before.masked_fill(good, -torch.inf).log_softmax(-1) + (-passing).log1p()
    initial = tree.table_of(world.space, torch.where(good, log_right, log_wrong))
    return world.problem("", {"correct": reward}, initial)


def _several_modes(world: _World, *, modes: int = 3, near: float = 0.0, spread: float = 0.5) -> Problem:
    """r = 1 for ``modes`` sequences, else ``near`` where one token differs from one of them, else 0.

    Modes differ in their first token as far as the vocabulary allows: keeping all of them is a choice at the root.
    """
    space = world.space
    _check_count("modes", modes, 1, space.n_sequences - 1)
    if not near < 1:
        raise UsageError(f"near must be below the reward 1 of a mode, got {near}")
    reward = torch.zeros(world.shape, dtype=torch.float64)
    for b in range(world.batch):
        order = torch.randperm(space.n_sequences, generator=world.generator)
        first = space.sequences[order, 0]
        # How many before it start alike: taking low ranks first spreads the modes over first tokens.
        alike = torch.nn.functional.one_hot(first, space.vocabulary).cumsum(0)
        rank = alike.gather(1, first[:, None])[:, 0]
        chosen = order[rank.argsort(stable=True)[:modes]]
        if near:
            differs = (space.sequences[:, None] != space.sequences[chosen][None]).sum(-1).amin(-1)
            reward[b, differs == 1] = near
        reward[b, chosen] = 1.0
    return world.problem("", {"reward": reward}, world.logits(spread))


def _multi_reward(
    world: _World, *, rates: Sequence[float] = (0.25, 0.5), scales: Sequence[float] = (1.0, 0.3), spread: float = 0.5
) -> Problem:
    """Independent binary rewards ``reward-1``, ``reward-2``, ...: the k-th is ``scales[k]`` on a share ``rates[k]``."""
    if not rates or len(rates) != len(scales):
        raise UsageError(f"multi-reward needs one rate and one scale per reward, got {len(rates)} and {len(scales)}")
    size = world.space.n_sequences
    rewards = {}
    for index, (rate, scale) in enumerate(zip(rates, scales, strict=True), 1):
        count = min(max(round(rate * size), 1), size - 1)
        table = torch.zeros(world.shape, dtype=torch.float64)
        rewards[f"reward-{index}"] = table.scatter_(1, world.choice(count, size), scale)
    return world.problem("", rewards, world.logits(spread))


def _noisy_preferences(world: _World, *, flip: float = 0.2, scale: float = 2.0, spread: float = 0.5) -> Problem:
    """Bradley-Terry preferences of normal rewards, reversed with probability ``flip``; r = the noiseless rewards."""
    reward = world.normal(*world.shape)
    game = PreferenceGame.bradley_terry(reward, scale).noisy(flip)
    return world.problem("", {"reward": reward}, world.logits(spread), game=game)


def _intransitive_preferences(world: _World, *, cycle: float = 0.5, scale: float = 1.0, spread: float = 0.5) -> Problem:
    """P = cycle * a circle + (1 - cycle) * Bradley-Terry of normal rewards, the circle over randomly ordered sequences.

    Each sequence of the circle beats the half before it. r(y) = P(y beats the initial policy).
    """
    if not 0 <= cycle <= 1:
        raise UsageError(f"cycle is a share in [0, 1], got {cycle}")
    size = world.space.n_sequences
    order = world.choice(size, size)
    circle = PreferenceGame.cyclic(size).preference[0]
    around = torch.stack([circle[o][:, o] for o in order])
    ranked = PreferenceGame.bradley_terry(world.normal(*world.shape), scale).preference
    game = PreferenceGame.antisymmetric((cycle * around + (1 - cycle) * ranked) - 0.5)
    initial = world.logits(spread)
    rival = tree.log_probabilities(world.space, initial).exp()
    return world.problem("", {"win-rate": game.payoff(rival)}, initial, game=game)


def _stale_behaviour(
    world: _World, *, age: int = 4, lr: float = 1.0, scale: float = 1.0, spread: float = 0.5
) -> Problem:
    """Random rewards; ``initial`` is ``behaviour`` after ``age`` ascents of size ``lr`` along the policy gradient."""
    _check_count("age", age, 0, 10_000)
    base = _random_rewards(world, scale=scale, spread=spread)
    policy = base.policy()
    for _ in range(age):
        step = enumeration.policy_gradient(policy, base.reward)
        with torch.no_grad():
            policy.logits.add_(step, alpha=lr)
    return replace(base, initial=policy.logits.detach().clone(), behaviour=base.initial, age=age)


def _unequal_groups(
    world: _World, *, sizes: Sequence[int] = (2, 3, 5, 8), scale: float = 1.0, spread: float = 0.5
) -> Problem:
    """Random rewards; problem b has groups of ``sizes[b mod len(sizes)]`` trajectories."""
    if not sizes or min(sizes) < 1:
        raise UsageError(f"group sizes must be at least 1, got {tuple(sizes)}")
    base = _random_rewards(world, scale=scale, spread=spread)
    return replace(base, group_sizes=tuple(sizes[b % len(sizes)] for b in range(world.batch)))


def _length_correlated_rewards(world: _World, *, correlation: float = 0.7, spread: float = 0.5) -> Problem:
    """Rewards of mean 0, variance 1 and this correlation with the length, all three exact under the initial policy."""
    if not world.space.end:
        raise UsageError("length-correlated rewards need a space with an end token, so that lengths vary")
    if not -1 <= correlation <= 1:
        raise UsageError(f"a correlation lies in [-1, 1], got {correlation}")
    initial = world.logits(spread)
    p = tree.log_probabilities(world.space, initial).exp()

    def standard(values: Tensor) -> Tensor:
        centred = values - (p * values).sum(-1, keepdim=True)
        return centred / (p * centred.square()).sum(-1, keepdim=True).sqrt()

    length = standard(world.space.lengths.double().expand(world.shape))
    noise = standard(world.normal(*world.shape))
    noise = standard(noise - (p * noise * length).sum(-1, keepdim=True) * length)
    reward = correlation * length + (1 - correlation**2) ** 0.5 * noise
    return world.problem("", {"reward": reward}, initial)


def _multi_step(world: _World, *, spread: float = 0.5) -> Problem:
    """r = the share of positions at which a random target sequence is matched: credit is earned step by step."""
    target = world.space.sequences[world.choice(1, world.space.n_sequences)[:, 0]]
    matched = (world.space.sequences[None] == target[:, None]) & world.space.mask[None] & (target >= 0)[:, None]
    reward = matched.sum(-1).double() / (target >= 0).sum(-1, keepdim=True)
    return world.problem("", {"reward": reward}, world.logits(spread))


_SMALL = SequenceSpace(3, 2)
_VARIABLE = SequenceSpace(3, 3, end=True)
_LONG = SequenceSpace(3, 4)

PROBLEMS: Mapping[str, tuple[Callable[..., Problem], SequenceSpace]] = MappingProxyType(
    {
        "random-rewards": (_random_rewards, _SMALL),
        "sparse-rewards": (_sparse_rewards, _SMALL),
        "binary-verifier": (_binary_verifier, _SMALL),
        "several-modes": (_several_modes, _SMALL),
        "multi-reward": (_multi_reward, _SMALL),
        "noisy-preferences": (_noisy_preferences, _SMALL),
        "intransitive-preferences": (_intransitive_preferences, _SMALL),
        "stale-behaviour": (_stale_behaviour, _SMALL),
        "unequal-groups": (_unequal_groups, _SMALL),
        "length-correlated-rewards": (_length_correlated_rewards, _VARIABLE),
        "multi-step": (_multi_step, _LONG),
    }
)
"""Maker and default space of every problem by name."""


def problem(name: str, *, space: SequenceSpace | None = None, batch: int = 1, seed: int = 0, **options: Any) -> Problem:
    """``batch`` problems of a kind, a function of the arguments.

    ``options`` are those of the kind (`options_of`). Raises UsageError for an unknown name or option, or a value that
    the kind cannot have.
    """
    make, default = _find(name)
    if unknown := sorted(set(options) - set(options_of(name))):
        raise UsageError(
            f"problem {name!r} has no option {unknown[0]!r}; its options are {', '.join(options_of(name))}"
        )
    if batch < 1:
        raise UsageError(f"a problem needs a batch of at least 1, got {batch}")
    world = _World(space or default, batch, torch.Generator().manual_seed(seed))
    return replace(make(world, **options), name=name)


def options_of(name: str) -> Mapping[str, Any]:
    """The options of a kind of problem and their defaults."""
    make, _ = _find(name)
    parameters = inspect.signature(make).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def description_of(name: str) -> str:
    """What a kind of problem is, in a line."""
    return (inspect.getdoc(_find(name)[0]) or "").splitlines()[0]


def _find(name: str) -> tuple[Callable[..., Problem], SequenceSpace]:
    if name not in PROBLEMS:
        raise UsageError(f"unknown problem {name!r}; {suggest(name, PROBLEMS)}")
    return PROBLEMS[name]


def _check_count(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise UsageError(f"{name} must lie between {low} and {high}, got {value}")

"""What is compared: contenders, worlds, one budget, seeds; and the runs that follow from it."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, Final

from polopt.core.errors import UsageError
from polopt.core.method import Method
from polopt.core.override import coerce
from polopt.core.part import check_slot
from polopt.methods import get_method
from polopt.tasks.problems import options_of, problem
from polopt.tasks.registry import get_task
from polopt.training.budget import UNITS, Unit
from polopt.training.build import at_start, composed, default_task, resolve
from polopt.training.config import RunConfig, make_config, slot_key

EXACT_LR: Final = 0.03
"""AdamW's learning rate on the logits of an exact policy."""
EXACT_BATCH: Final = 8
"""Problems of a kind in an exact run; each is asked once per iteration."""
EVALUATED: Final = 512
"""Held-out prompts of each evaluation where no setting says how many."""
TUNING_SEED: Final = 1_000_000
"""First seed of the trials that choose a learning rate; seeds of the comparison lie below."""

# What does not change the result of a run, or is set by the comparison itself.
_OWN: Final = frozenset(
    {"method", "slots", "pairs", "seed", "task", "lr", "out", "track", "save_every", "keep", "eval_every", "profile"}
    | {"threads", *UNITS}
)


@dataclass(frozen=True)
class Contender:
    """A method, some of its slots and fields of parts replaced. ``label`` names it in tables and figures.

    ``pairs`` is the setting of that name: whether a method that learns from a data set samples its own answers.
    """

    label: str
    slug: str
    slots: Mapping[str, str]
    pairs: str = "data"

    def method(self) -> Method:
        """The composition of parts. Raises UsageError for an unknown method, slot, part or field."""
        try:
            return composed(get_method(self.slug), self.slots, pairs=self.pairs)
        except UsageError as error:
            raise UsageError(f"contender {self.label!r}: {error}") from None


def parse_contender(text: str, shared: Mapping[str, str] = MappingProxyType({}), *, pairs: str = "data") -> Contender:
    """Read ``grpo``, ``"grpo --advantage stratified --objective.high 0.28"`` or ``grpo+advantage=stratified``.

    ``dpo+pairs=on-policy`` samples what it would read from a data set; ``pairs`` holds for those contenders that learn
    from one and do not say. ``shared`` are settings of every contender, which its own replace. Raises UsageError for
    anything else, and for an unknown method, slot, part or field.
    """
    words = _words(text)
    slug, *rest = words
    own: dict[str, str] = {}
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        if not flag.startswith("--"):
            raise UsageError(f"contender {text!r}: expected --SLOT VALUE after the method, got {flag!r}")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UsageError(f"contender {text!r}: {flag} needs a value")
            value = rest.pop(0)
        name = flag[2:].removeprefix("slots.")
        if name == "pairs":
            own[name] = value
            continue
        try:
            check_slot(name.partition(".")[0])
        except UsageError as error:
            raise UsageError(f"contender {text!r}: {error}") from None
        own[slot_key(name)] = value
    label = "+".join([slug, *(f"{name}={value}" for name, value in own.items())])
    # Fields of a part that this contender replaces are not the new part's.
    kept = {key: value for key, value in shared.items() if key.partition(".")[0] not in own}
    source = own.pop("pairs", pairs if get_method(slug).offline else "data")
    made = Contender(label, slug, {**kept, **own}, source)
    at_start(made.method())  # an error is said now, not when the other contenders have run
    return made


def _words(text: str) -> list[str]:
    if " --" in text:
        try:
            return shlex.split(text)
        except ValueError as error:
            raise UsageError(f"contender {text!r} cannot be read: {error}") from None
    slug, *pieces = text.split("+")
    # A plus sign within a value, such as 1e+3, is not followed by a setting.
    joined: list[str] = []
    for piece in pieces:
        if "=" in piece:
            joined.append(piece)
        elif joined:
            joined[-1] += f"+{piece}"
        else:
            raise UsageError(f"contender {text!r}: expected SLUG+SLOT=VALUE, got {piece!r} without a value")
    if not slug.strip():
        raise UsageError(f"contender {text!r} names no method")
    return [slug.strip(), *(f"--{piece}" for piece in joined)]


def parse_budget(text: str) -> tuple[Unit, float]:
    """Read ``rollouts=20000``, ``tokens=1e6``, ``steps=100`` or ``seconds=60``. Raises UsageError for anything else."""
    unit, _, amount = text.partition("=")
    try:
        limit = float(amount.replace("_", ""))
    except ValueError:
        limit = math.nan
    if unit not in UNITS or not 0 < limit < math.inf:
        raise UsageError(f"cannot read the budget {text!r}; write rollouts=20000, tokens=1e6, steps=100 or seconds=60")
    if unit != "seconds" and limit != int(limit):
        raise UsageError(f"a budget of {amount} {unit} is not a whole number")
    return unit, limit


@dataclass(frozen=True)
class World:
    """Where a run happens: a generated ``task``, the user's data (both None), or a ``problem`` of the exact world.

    ``options`` are those of the kind of problem, ``problems`` how many of the kind a run has. In a ``stale`` world
    batches train that many updates after they were sampled.
    """

    label: str
    task: str | None = None
    problem: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    problems: int = EXACT_BATCH
    stale: int = 0

    def after(self, stale: int) -> World:
        """The same world with that staleness, in its label too."""
        return dataclasses.replace(self, label=f"{self.place} stale {stale}", stale=stale)

    @property
    def place(self) -> str:
        """The label of the world whatever the staleness."""
        return self.label.removesuffix(f" stale {self.stale}")

    @property
    def exact(self) -> bool:
        """Whether every expectation is a finite sum."""
        return self.problem is not None


def parse_problem(text: str) -> World:
    """Read ``binary-verifier`` or ``binary-verifier:pass_rate=0.1,problems=16``.

    Raises UsageError for an unknown kind of problem or option, or a value that it cannot have.
    """
    name, _, rest = text.partition(":")
    known = {**options_of(name), "problems": EXACT_BATCH}
    options: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        key = key.strip().replace("-", "_")
        if key not in known or not equals:
            raise UsageError(f"problem {text!r}: {item!r} is no OPTION=VALUE; its options are {', '.join(known)}")
        kind = type(known[key])
        if kind not in (int, float):
            raise UsageError(f"problem {text!r}: option {key!r} cannot be set here")
        options[key] = coerce(value, kind, f"problem {key}")
    count = options.pop("problems", EXACT_BATCH)
    problem(name, batch=count, **options)
    return World(text, problem=name, options=options, problems=count)


@dataclass(frozen=True)
class Job:
    """One run, as plain data: with the version of the code it determines the result.

    ``settings`` are those of a `RunConfig`. ``tuning`` runs choose a learning rate and are judged on prompts that no
    other run is judged on, where these can be generated.
    """

    world: World
    settings: Mapping[str, Any]
    points: int
    tuning: bool = False

    @cached_property
    def config(self) -> RunConfig:
        """The settings, checked."""
        return make_config(self.settings)

    @cached_property
    def method(self) -> Method:
        """The composition of parts that is trained."""
        return composed(get_method(self.config.method), self.config.slots, pairs=self.config.pairs)

    def __getstate__(self) -> dict[str, Any]:
        # What is cached stays here: parts of a user's own file cannot be sent to a process that has not loaded it.
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def name(self) -> str:
        """For people: method, world, seed."""
        return f"{self.config.method} on {self.world.label}, seed {self.config.seed}"


@dataclass(frozen=True)
class Plan:
    """A comparison. Its first contender is the one that the others are compared with.

    Each contender is trained in each world with each seed, from the same initial policy and on the same prompts in the
    same order, until ``limit`` of ``unit`` is spent, and evaluated ``points`` times on the way. ``tune`` are learning
    rates to choose from, tried by every contender with ``tune_seeds`` seeds of their own; else ``lr`` holds, or the
    world's default. ``settings`` are further settings of a run. Raises UsageError for a plan that cannot be run.
    """

    contenders: tuple[Contender, ...]
    worlds: tuple[World, ...]
    unit: Unit
    limit: float
    seeds: int = 5
    first_seed: int = 0
    points: int = 8
    lr: float | None = None
    tune: tuple[float, ...] = ()
    tune_seeds: int = 2
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        labels = [contender.label for contender in self.contenders]
        if not labels:
            raise UsageError("name the methods to compare: polopt compare METHOD METHOD ...")
        if twice := next((label for label in labels if labels.count(label) > 1), None):
            raise UsageError(f"contender {twice!r} is named twice; two contenders must differ")
        worlds = [world.label for world in self.worlds]
        if twice := next((label for label in worlds if worlds.count(label) > 1), None):
            raise UsageError(f"{twice!r} is named twice; each task, problem and staleness is run once")
        for name in ("seeds", "points", "tune_seeds"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.first_seed <= TUNING_SEED - self.seeds:
            raise UsageError(f"seeds lie between 0 and {TUNING_SEED}, got {self.first_seed} and {self.seeds} of them")
        if self.tune and self.lr is not None:
            raise UsageError("--lr and --tune-lr exclude each other; give one of them")
        for rate in self.tune:
            if not 0 < rate < math.inf:
                raise UsageError(f"--tune-lr: a learning rate must be above 0, got {rate}")

    def job(self, contender: Contender, world: World, seed: int, lr: float | None, *, tuning: bool = False) -> Job:
        """The run of a contender in a world."""
        settings: dict[str, Any] = {name: value for name, value in self.settings.items() if name not in _OWN}
        settings |= {"method": contender.slug, "slots": dict(contender.slots), "seed": seed, self.unit: self.limit}
        if contender.pairs != "data":
            settings["pairs"] = contender.pairs
        if world.stale:
            settings["stale"] = world.stale
        if self.unit != "seconds":
            settings[self.unit] = int(self.limit)
        if world.exact:
            settings = {"prompts": world.problems, **settings, "lr": EXACT_LR if lr is None else lr}
            config = make_config(settings)
        else:
            settings = {"eval_prompts": EVALUATED, **settings}
            config = resolve(make_config({**settings, "task": world.task, "lr": lr, "out": ""}))
        kept = {name: value for name, value in config.as_dict().items() if name in settings or name not in _OWN}
        kept |= {"task": config.task, "lr": config.lr}
        return Job(world, kept, self.points, tuning)

    def trials(self) -> dict[tuple[str, str], dict[float, list[Job]]]:
        """Runs that choose the learning rate, by contender and world, then by rate."""
        seeds = range(TUNING_SEED, TUNING_SEED + self.tune_seeds)
        return {
            (c.label, w.label): {
                rate: [self.job(c, w, seed, rate, tuning=True) for seed in seeds] for rate in self.tune
            }
            for c in self.contenders
            for w in self.worlds
            if self.tune
        }

    def jobs(self, rates: Mapping[tuple[str, str], float]) -> dict[tuple[str, str], list[Job]]:
        """The runs of the comparison by contender and world, one per seed, at the learning rates that were chosen."""
        seeds = range(self.first_seed, self.first_seed + self.seeds)
        return {
            (c.label, w.label): [self.job(c, w, seed, rates.get((c.label, w.label), self.lr)) for seed in seeds]
            for c in self.contenders
            for w in self.worlds
        }


def make_worlds(
    tasks: Sequence[str],
    problems: Sequence[str],
    data: str | None,
    contenders: Sequence[Contender] = (),
    stale: Sequence[int] = (),
) -> tuple[World, ...]:
    """The worlds that the names mean; when there is none, the one task that is the contenders' default together.

    Each of them once for every number of updates in ``stale``. Raises UsageError for unknown ones, or tasks, problems
    and data together.
    """
    if stale:
        return tuple(world.after(k) for world in make_worlds(tasks, problems, data, contenders) for k in stale)
    if sum(map(bool, (tasks, problems, data))) > 1:
        raise UsageError("give tasks, problems of the exact world, or data: one kind per comparison")
    if data:
        return (World(data),)
    if problems:
        return tuple(map(parse_problem, problems))
    for name in tasks:
        get_task(name)
    methods = (contender.method() for contender in contenders)
    return tuple(World(name, task=name) for name in tasks or (default_task(*methods),))


def plain(value: Any) -> Any:
    """Plans, jobs and contenders as JSON data."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value

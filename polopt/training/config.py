"""Everything a run depends on, as one flat record that the command line, a file and Python all fill."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from polopt.core.errors import UsageError


@dataclass(frozen=True)
class RunConfig:
    """The settings of one training run; with the version of polopt they determine it.

    Slots and fields of the method's parts are in ``slots``, by dotted name.
    """

    method: str = "grpo"
    """Slug of the method, or the path of a file that defines one."""
    model: str | None = None
    """Path or hub name of a causal language model; the small policy shipped with polopt when left out."""
    task: str | None = None
    """Generated task; where neither a task nor data is given that of the method, 'arithmetic' for most."""
    level: tuple[int, ...] = ()
    """Difficulty levels of the task; its default ones when left out."""
    data: str | None = None
    """Training data: a .jsonl, .json, .csv or .parquet file, a saved dataset's folder, or a hub name."""
    eval_data: str | None = None
    """Held-out data; without it a part of the training data is held out."""
    split: str | None = None
    """Split of the training data."""
    map: tuple[str, ...] = ()
    """FIELD=COLUMN: which column of the data is the prompt, the answer, ..."""
    reward: tuple[str, ...] = ()
    """NAME[:ARGUMENT][@WEIGHT] or file.py:function; the task's own rewards when left out. The first is the accuracy."""
    pairs: Literal["data", "on-policy"] = "data"
    """Answers that a method which learns from preferences or demonstrations compares: those of the data, or the
    policy's own, sampled in groups and judged by the reward. Other methods sample in any case."""
    on_reward_error: Literal["raise", "skip"] = "raise"
    """A failing reward ends the run, or makes its trajectory invalid (it never trains, and is never 0)."""
    reward_timeout: float | None = None
    """Seconds that one call of a reward may take."""

    steps: int | None = None
    """Training iterations; 60 in the small world when no budget is given."""
    seconds: float | None = None
    """Wall seconds of training, evaluation left out."""
    tokens: int | None = None
    """Generated tokens."""
    rollouts: int | None = None
    """Generated trajectories."""

    prompts: int = 16
    """Prompts per iteration."""
    group: int = 8
    """Trajectories per prompt."""
    stale: int = 0
    """Optimizer updates between sampling a batch and learning from it, rounded up to whole batches: sampling runs ahead
    of learning by that much. The batches ahead are sampled in the first iteration and count in the budget."""
    seed: int = 0
    """The run is a function of it."""
    lr: float | None = None
    """Learning rate of AdamW; 2e-4 in the small world (2e-5 for a policy that learns from preferences or
    demonstrations), 1e-5 for LoRA and 1e-6 for other models when left out."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate over the budget, after the warm-up."""
    warmup: int = 0
    """Iterations over which the learning rate rises linearly."""
    weight_decay: float = 0.0
    """Weight decay of AdamW."""
    beta1: float = 0.9
    """Decay of AdamW's mean of gradients."""
    beta2: float = 0.999
    """Decay of AdamW's mean of squared gradients."""
    token_budget: int = 16_384
    """Most tokens (padding and prompts included) in one forward or backward pass."""
    max_rows: int = 256
    """Most trajectories decoded at once."""

    lora: int | None = None
    """Rank of LoRA adapters; full fine-tuning when left out."""
    lora_alpha: float | None = None
    """Scale of the adapters; twice the rank when left out."""
    lora_targets: tuple[str, ...] = ()
    """Names of the adapted modules; every linear layer when left out."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of matrix products; auto is bfloat16 where the machine has it and it pays."""
    device: str = "auto"
    """Where the policy is: auto, cpu, cuda, cuda:1, ..."""
    threads: int | None = None
    """Threads of the processor; all cores when left out."""

    eval_every: str | None = None
    """Evaluate this often: '25' iterations, '60s', '100000tok', '5000rollouts'; when left out every 10 iterations in
    the small world, elsewhere only before and after."""
    eval_prompts: int = 1024
    """Held-out prompts in the evaluations before and after training (a quarter of them in between)."""
    eval_samples: int = 1
    """Samples per held-out prompt; pass@k is reported for powers of two up to it."""
    save_every: str | None = None
    """Checkpoint this often, in the same units; only at the end when left out."""
    keep: int = 2
    """Checkpoints kept."""
    out: str | None = None
    """The run's folder; runs/METHOD-TASK-SEED-TIME when left out."""
    track: tuple[str, ...] = ("tensorboard",)
    """Trackers besides the log file: tensorboard, wandb, mlflow, trackio, or none."""
    strict: bool = False
    """Failed checks end the run."""
    profile: bool = False
    """Write a table of where time went and a Chrome trace."""
    slots: Mapping[str, Any] = field(default_factory=dict)
    """Replaced slots and fields of parts: {"advantage": "leave-one-out", "objective.high": 0.28}."""

    def __post_init__(self) -> None:
        for name in ("prompts", "group", "token_budget", "max_rows", "eval_prompts", "eval_samples", "keep"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        for name in ("stale", "warmup", "weight_decay", "beta1", "beta2"):
            value = getattr(self, name)
            if not value >= 0 or (name.startswith("beta") and value >= 1):
                bound = "at least 0 and below 1" if name.startswith("beta") else "at least 0"
                raise UsageError(f"--{name.replace('_', '-')} must be {bound}, got {value}")
        for name in ("lr", "reward_timeout", "threads"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"--{name.replace('_', '-')} must be above 0, got {value}")
        for name, allowed in _choices().items():
            if getattr(self, name) not in allowed:
                raise UsageError(
                    f"--{name.replace('_', '-')} cannot be {getattr(self, name)!r}; choose from {', '.join(allowed)}"
                )
        if self.task is not None and self.data is not None:
            raise UsageError(f"--task {self.task} and --data {self.data} exclude each other; give one of them")
        if self.lora is not None and self.lora < 1:
            raise UsageError(f"--lora is the rank of the adapters and must be at least 1, got {self.lora}")

        for name, value in self.slots.items():
            if not _is_plain(value):
                raise UsageError(
                    f"slot {name!r} cannot be {value!r} in a configuration, from which the run must be repeatable; "
                    f"give the name of a registered part and its fields, such as {{'advantage': 'group-zscore', "
                    f"'advantage.eps': 1e-6}}"
                )

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as written into the run's folder."""
        plain = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or type(value) in (bool, int, float, str)


@cache
def _choices() -> dict[str, tuple[str, ...]]:
    """What the settings with fixed choices can be."""
    hints = get_type_hints(RunConfig)
    return {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}


def read_config(path: Path) -> dict[str, Any]:
    """Settings from a TOML or YAML file, with part settings either dotted or nested under their slot.

    Raises UsageError when the file is absent, malformed, or not a table.
    """
    if not path.is_file():
        raise UsageError(f"there is no configuration file {path}")
    text = path.read_text(encoding="utf-8")
    try:
        found = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except (tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise UsageError(f"{path} must hold settings by name, such as 'lr: 1e-4'")
    return found


def make_config(settings: Mapping[str, Any]) -> RunConfig:
    """A configuration from plain data, checked by name and type.

    Names that are no setting but begin with a slot go to ``slots``. Raises UsageError for an unknown name or a value
    of the wrong type.
    """
    from polopt.core.part import SLOTS, suggest  # here: it imports torch, which `--help` need not wait for

    kinds = {f.name: str(f.type) for f in dataclasses.fields(RunConfig)}
    plain: dict[str, Any] = {}
    slots: dict[str, Any] = {}
    given = settings.get("slots") or {}
    if not isinstance(given, Mapping):
        raise UsageError(f"setting 'slots' cannot be {given!r}; it holds slots and fields of parts by name")
    for key, value in given.items():
        slots |= _dotted(str(key), value)
    for key, value in settings.items():
        name = str(key).replace("-", "_")
        if name == "slots":
            continue
        if name in kinds:
            plain[name] = _typed(name, value, kinds[name])
        elif name.split(".")[0] in SLOTS:
            slots |= _dotted(str(key), value)
        else:
            raise UsageError(f"unknown setting {key!r}; {suggest(name, [*kinds, *SLOTS])}")
    return RunConfig(**plain, slots=slots)


def _dotted(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {k: v for key, inner in value.items() for k, v in _dotted(f"{name}.{key}", inner).items()}
    return {slot_key(name): value}


def slot_key(name: str) -> str:
    """The dotted name of a slot or field with ``_`` for ``-``, but for the name of a part in its middle.

    ``objective.clipped-value.max-width`` is ``objective.clipped-value.max_width``.
    """
    head, dot, last = name.rpartition(".")
    return head + dot + last.replace("-", "_")


def _typed(name: str, value: Any, kind: str) -> Any:
    if kind.startswith("tuple"):
        value = tuple(value) if isinstance(value, list | tuple) else (value,)
        wanted: type | tuple[type, ...] = int if "int" in kind else str
        fine = all(isinstance(item, wanted) and not isinstance(item, bool) for item in value)
    elif value is None:
        fine = "None" in kind
    elif kind.startswith("bool"):
        fine = isinstance(value, bool)
    elif kind.startswith("float"):
        # YAML 1.1 reads 1e-4 as a string.
        try:
            fine = not isinstance(value, bool)
            value = float(value) if fine else value
        except (TypeError, ValueError):
            fine = False
    elif kind.startswith("int"):
        fine = isinstance(value, int) and not isinstance(value, bool)
    else:
        value = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
        fine = isinstance(value, str) and (not kind.startswith("Literal") or f"'{value}'" in kind.replace('"', "'"))
    if not fine:
        raise UsageError(f"setting {name!r} cannot be {value!r}; it is {kind}")
    return value


def write_config(config: RunConfig, path: Path) -> None:
    """The resolved configuration; `read_config` of it repeats the run."""
    # Complete or absent, whenever the run is killed: without it there is nothing to resume.
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text(yaml.safe_dump(config.as_dict(), sort_keys=False), encoding="utf-8")
    temporary.replace(path)

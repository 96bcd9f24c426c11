"""From a configuration to the parts of a run: problem, policy, method."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from polopt.assets import base_policy_path
from polopt.core.errors import UsageError
from polopt.core.example import Example
from polopt.core.method import Method
from polopt.core.override import override
from polopt.core.part import settings
from polopt.core.policy import START, Policy, critic_heads
from polopt.methods import get_method
from polopt.policies.causal_lm.loading import LoraOptions
from polopt.policies.causal_lm.policy import CausalLM
from polopt.rewards import NamedReward, RewardFunction, parse_reward
from polopt.tasks.answers import with_answers
from polopt.tasks.columns import parse_mapping
from polopt.tasks.datasets import load_examples
from polopt.tasks.registry import get_task
from polopt.tasks.task import Judge, Task, rewards_of
from polopt.training.collect import judged, provides
from polopt.training.config import RunConfig
from polopt.training.update import SCORE_NORM

DEFAULT_TASK = "arithmetic"
SMALL_WORLD_STEPS = 60
SMALL_WORLD_LR = 2e-4
SMALL_WORLD_OFFLINE_LR = 2e-5
"""Of methods that learn from preferences or demonstrations."""
SMALL_WORLD_EVALUATION = "10"
POOL = 4096
"""Generated training prompts; every default run sees each at most once."""
COMPLETION = 256
"""Completion budget on a user's data where no option sets one (TRL's default)."""


@dataclass(frozen=True)
class Problem:
    """What is asked and how answers are judged."""

    name: str
    train: Sequence[Example]
    held_out: Sequence[Example]
    rewards: tuple[NamedReward, ...]
    limit: int


def make_problem(config: RunConfig, method: Method | None = None) -> Problem:
    """Training and held-out examples, rewards and completion budget, for a method (the configuration's when left out).

    Of data for a method that needs none there may be no rewards. Raises UsageError for absent or malformed data, an
    unknown task or reward, a task without its own reward.
    """
    method = make_method(config) if method is None else method
    if config.data is None:
        return _generated(config, get_task(config.task or default_task(method)), method)
    mapping = parse_mapping(config.map) if config.map else None
    train = load_examples(config.data, mapping=mapping, split=config.split)
    if config.eval_data is not None:
        held_out = load_examples(config.eval_data, mapping=mapping)[: config.eval_prompts]
    else:
        # The tail of the file, at most a tenth of it; a single example can only train.
        count = min(config.eval_prompts, len(train) // 10)
        held_out = train[len(train) - count :]
        train = train[: len(train) - count]
    rewards = _given_rewards(config, config.data) if judged(method) or config.reward else ()
    return Problem(Path(config.data).stem, train, held_out, rewards, COMPLETION)


def make_held_out(config: RunConfig) -> Problem:
    """What an evaluation without training asks: the held-out prompts of a task, or the first rows of the user's data.

    ``eval_data`` where it is given, else ``data``; nothing is set aside for training. Raises UsageError as
    `make_problem` does.
    """
    if config.data is None and config.eval_data is None:
        return replace(make_problem(config), train=())
    source = str(config.eval_data or config.data)
    mapping = parse_mapping(config.map) if config.map else None
    rewards = _given_rewards(config, source)
    held_out = load_examples(source, mapping=mapping, split=config.split, limit=config.eval_prompts)
    return Problem(Path(source).stem, (), held_out, rewards, COMPLETION)


def make_asked(config: RunConfig, count: int | None = None) -> Problem:
    """Prompts of the training split to answer and judge, ``count`` of them or all of the data; none is held out."""
    if config.data is None:
        task = get_task(config.task or DEFAULT_TASK)
        levels = list(config.level) or None
        rewards = tuple(parse_reward(spec) for spec in config.reward) or task_rewards(task)
        asked = task.examples(POOL if count is None else count, seed=config.seed, split="train", levels=levels)
        return Problem(task.name, asked, (), rewards, task.max_new_tokens)
    rewards = _given_rewards(config, config.data)
    mapping = parse_mapping(config.map) if config.map else None
    asked = load_examples(config.data, mapping=mapping, split=config.split, limit=count)
    return Problem(Path(config.data).stem, asked, (), rewards, COMPLETION)


def _given_rewards(config: RunConfig, source: str) -> tuple[NamedReward, ...]:
    if not config.reward:
        raise UsageError(f"data {source!r} needs a reward: give --reward math-verify, exact-match or file.py:function")
    return tuple(parse_reward(spec, device=config.device) for spec in config.reward)


def _generated(config: RunConfig, task: Task, method: Method) -> Problem:
    levels = list(config.level) or None
    train = task.examples(POOL, seed=config.seed, split="train", levels=levels)
    held_out: Sequence[Example] = task.examples(config.eval_prompts, seed=0, split="test", levels=levels)
    if method.reads_answers:
        train = with_answers(task, train, seed=config.seed)
    if method.trains_policy or judged(method) or config.reward:
        rewards = tuple(parse_reward(spec, device=config.device) for spec in config.reward) or task_rewards(task)
    else:
        # No policy is trained that could answer: what is learned is measured on answers that are known.
        rewards, held_out = (), with_answers(task, held_out, seed=0)
    return Problem(task.name, train, held_out, rewards, task.max_new_tokens)


def default_task(*methods: Method) -> str:
    """The generated task of a run, or of a comparison, that is given neither a task nor data.

    It is the task that the methods name; where they name none, or not all the same, the one that any method can learn.
    """
    named = {method.task for method in methods if method.task is not None}
    return named.pop() if len(named) == 1 else DEFAULT_TASK


def task_rewards(task: Task) -> tuple[NamedReward, ...]:
    """The rewards of a generated task, its verifier first."""
    return tuple(NamedReward(name, _reward_function(judge)) for name, judge in rewards_of(task).items())


def _reward_function(judge: Judge) -> RewardFunction:
    def reward(completions: Sequence[Any], example: Sequence[Example], **_: Any) -> list[float]:
        return [judge(completion, asked) for completion, asked in zip(completions, example, strict=True)]

    return reward


def make_policy(config: RunConfig, limit: int) -> CausalLM:
    """The policy to improve: the shipped one, or a model from a path or the hub, with adapters where asked for."""
    torch.manual_seed(config.seed)
    lora = None
    if config.lora is not None:
        alpha = 2.0 * config.lora if config.lora_alpha is None else config.lora_alpha
        lora = LoraOptions(config.lora, alpha, config.lora_targets or "all-linear", config.seed)
    return CausalLM.load(
        config.model or str(base_policy_path()),
        lora=lora,
        device=config.device,
        precision=config.precision,
        default_max_new_tokens=limit,
        max_rows=config.max_rows,
    )


def make_method(config: RunConfig) -> Method:
    """The method with the configuration's slots and fields replaced, and its data by samples where it asks for that."""
    return at_start(composed(get_method(config.method), config.slots, pairs=config.pairs))


def composed(method: Method, slots: Mapping[str, Any], *, pairs: str = "data") -> Method:
    """The method with slots and fields replaced.

    ``pairs`` "on-policy" has the policy write what a rollout part would read from a data set: its ``on_policy`` names
    the slots for that. Raises UsageError where there is no such rollout part.
    """
    if pairs == "on-policy":
        # First what says which data set stands there; then what can be set of the parts that come in its place.
        fields = {f"rollout.{name}" for name in settings(method.rollout)}
        known = {name: value for name, value in slots.items() if name == "rollout" or name in fields}
        whole = override(method, known)
        if not hasattr(whole.rollout, "on_policy"):
            raise UsageError(
                f"--pairs on-policy is for methods that learn from a data set; {method.slug!r} samples its own answers"
            )
        method = whole | whole.rollout.on_policy()
        slots = {name: value for name, value in slots.items() if name not in known}
    return override(method, slots)


def at_start(method: Method) -> Method:
    """The method with its controller's starting coefficients, which hold from the first iteration on.

    Raises UsageError where it moves what the method does not have.
    """
    if method.controller is None:
        return method
    moved = method.clone().controller({})
    try:
        return override(method, moved)
    except UsageError as error:
        raise UsageError(
            f"the controller moves {', '.join(moved)}, which the method does not have ({error}); replace the "
            f"controller too, or leave it out: --controller none"
        ) from None


def resolve(config: RunConfig) -> RunConfig:
    """The configuration with every default that depends on others filled in."""
    small = config.model is None
    if config.lr is None:
        # A policy's losses of bad answers have no bound: at the faster rate they drag the good ones down with them.
        method = get_method(config.method)
        fast = SMALL_WORLD_OFFLINE_LR if method.offline and method.trains_policy else SMALL_WORLD_LR
        config = replace(config, lr=fast if small else 1e-5 if config.lora else 1e-6)
    if all(limit is None for limit in (config.steps, config.seconds, config.tokens, config.rollouts)):
        config = replace(config, steps=SMALL_WORLD_STEPS if small else 500)
    if config.eval_every is None and small:
        config = replace(config, eval_every=SMALL_WORLD_EVALUATION)
    if config.task is None and config.data is None:
        config = replace(config, task=default_task(get_method(config.method)))
    if config.out is None:
        subject = config.task or Path(str(config.data)).stem
        stamp = time.strftime("%Y%m%d-%H%M%S")
        # A method may be the path of a file.
        name = Path(config.method).stem
        config = replace(config, out=str(Path("runs") / f"{name}-{subject}-{config.seed}-{stamp}"))
    return config


def check_needs(method: Method, policy: Policy, rewards: Sequence[NamedReward]) -> None:
    """Fail before the first rollout when a part needs a column that nobody provides; add the models it asks for."""
    needs = method.needs
    if heads := critic_heads(needs | method.evaluates):
        policy.add_critic(heads=heads)
    for name, model in method.models_in_use.items():
        model.install(policy, name)
    sampled = {"action", "logp", "entropy", "mask", "truncated", "version", "source", "limit"}
    named = {"reward", "score", *(f"reward/{reward.name}" for reward in rewards)} if rewards else set()
    available = {column for column in policy.columns if column != "logp/*"}
    method.check(frozenset(sampled | named | available | {SCORE_NORM, START}))
    for name in sorted(method.evaluates):
        if not provides(policy, name):
            raise UsageError(f"method {method.slug!r} evaluates {name!r}, which this policy cannot compute")

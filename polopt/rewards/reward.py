"""Scoring trajectories with reward functions: TRL's calling convention, and no silent zeros."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.core.errors import UsageError
from polopt.core.example import Text
from polopt.rewards.timeout import OutOfTime, call_with_timeout
from polopt.rewards.transcript import Transcript

RewardFunction = Callable[..., Any]
"""``f(prompts=, completions=, completion_ids=, **columns) -> Sequence[float | None]``, one value per completion.

The convention of TRL's ``GRPOTrainer``; see ``score`` for what is passed. The function may be ``async``.
"""

_LARGEST = torch.finfo(torch.float32).max


class RewardError(UsageError):
    """A reward function failed: it raised, overran its time, or returned something that is no reward."""


@dataclass(frozen=True)
class NamedReward:
    """A reward function, the name of its column, and its weight in the total.

    Raises:
        UsageError: the name is empty or the weight is not a finite number.
    """

    name: str
    function: RewardFunction
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.name:
            raise UsageError("a reward needs a name")
        if not math.isfinite(self.weight):
            raise UsageError(f"the weight of reward {self.name!r} must be a finite number, but is {self.weight}")


@dataclass(frozen=True)
class InvalidReward:
    """A reward that could not be computed: trajectory ``index`` in the batch, and why."""

    index: int
    reward: str
    reason: str
    example_id: str


@dataclass(frozen=True)
class Scores:
    """Rewards of M trajectories.

    ``rewards[k]``: NaN where reward k does not apply (the function returned None) or is invalid. ``total``:
    ``sum_k weight_k * rewards[k]`` over the rewards that apply; NaN where none applies or any is invalid. ``invalid``
    lists the failures by trajectory. ``metrics``: the mean of each scalar the functions gave to TRL's ``log_metric``.
    """

    rewards: dict[str, Float[Tensor, "trajectory"]]
    total: Float[Tensor, "trajectory"]
    invalid: tuple[InvalidReward, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)


def score(
    transcripts: Sequence[Transcript],
    rewards: Sequence[NamedReward],
    *,
    on_error: Literal["raise", "skip"] = "raise",
    timeout: float | None = None,
    trainer_state: Any = None,
) -> Scores:
    """Every reward of every trajectory, and their weighted total.

    A function is called once per batch with these keywords, of which one without ``**kwargs`` gets those its
    signature names:

    - ``prompts``, ``completions``: strings, or for a chat a list of messages, the completion being
      ``[{"role": "assistant", "content": ...}]``; ``completion_ids``: lists of token ids;
    - every column of the examples, as a list under its name in the dataset; ``answer``, ``steps``, ``chosen``,
      ``rejected`` and ``label`` hold the fields of ``Example`` where any example has them; ``example``, the whole
      items; ``id``; ``truncated``;
    - ``trainer_state``, and ``log_metric`` and ``log_extra`` as TRL has them (the latter keeps nothing).

    A value of None means that the reward does not apply to that trajectory. An exception, a call of more than
    ``timeout`` seconds, a wrong number of values, and a value that is not a finite float32 are failures. With
    ``on_error="raise"`` a failure ends the call. With ``"skip"`` the affected trajectories are invalid: where a call
    fails as a whole, each trajectory is tried alone, so a function that compares trajectories of a batch must handle
    its failures itself.

    Raises:
        RewardError: a failure under ``on_error="raise"``; under either, a parameter that the examples have no column
            for.
        UsageError: no rewards, or two of one name.
    """
    if not rewards:
        raise UsageError("there is no reward to score with; name one with --reward")
    names = [reward.name for reward in rewards]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"two rewards have the name {name!r}; give each its own")
    columns: dict[str, Float[Tensor, "trajectory"]] = {}
    invalid: list[InvalidReward] = []
    metrics: dict[str, list[float]] = {}
    for reward in rewards:
        call = _Call(reward, timeout, trainer_state, metrics)
        values, failures = _score_one(call, transcripts, on_error) if transcripts else ([], [])
        columns[reward.name] = torch.tensor(values, dtype=torch.float32)
        invalid += failures
    return Scores(
        rewards=columns,
        total=_total(columns, rewards, invalid),
        invalid=tuple(sorted(invalid, key=lambda failure: failure.index)),
        metrics={name: sum(logged) / len(logged) for name, logged in metrics.items()},
    )


def _total(
    columns: Mapping[str, Float[Tensor, "trajectory"]],
    rewards: Sequence[NamedReward],
    invalid: Sequence[InvalidReward],
) -> Float[Tensor, "trajectory"]:
    values = torch.stack([columns[reward.name] for reward in rewards])
    weights = torch.tensor([reward.weight for reward in rewards], dtype=torch.float32)
    applies = ~values.isnan()
    total = (weights[:, None] * values.nan_to_num(0.0)).sum(dim=0)
    total[~applies.any(dim=0)] = math.nan
    total[[failure.index for failure in invalid]] = math.nan
    return total


def _score_one(
    call: _Call, transcripts: Sequence[Transcript], on_error: Literal["raise", "skip"]
) -> tuple[list[float], list[InvalidReward]]:
    """The values of one reward (NaN where None or invalid) and its failures."""
    name = call.reward.name
    try:
        values = call(transcripts)
    except _Failure as failure:
        if on_error == "raise":
            raise RewardError(
                f"reward {name!r} {failure} ({_blame(call, transcripts, failure)})"
            ) from failure.__cause__
        values = []
        failed: dict[int, str] = {}
        for index, transcript in enumerate(transcripts):
            try:
                values += call([transcript])
            except _Failure as alone:
                failed[index] = str(alone)
                values.append(None)
    else:
        failed = {}

    numbers: list[float] = []
    for index, value in enumerate(values):
        number = math.nan if value is None else _as_number(value)
        if number is None:
            failed[index] = f"returned {_shown(value)}, which is not a finite number"
            if on_error == "raise":
                raise RewardError(f"reward {name!r} {failed[index]} (example {transcripts[index].example.id!r})")
        numbers.append(math.nan if number is None else number)
    return numbers, [
        InvalidReward(index, name, reason, transcripts[index].example.id) for index, reason in failed.items()
    ]


def _blame(call: _Call, transcripts: Sequence[Transcript], failure: _Failure) -> str:
    """Which example made a batch fail; only an exception is worth calling the function again for."""
    if len(transcripts) == 1:
        return f"example {transcripts[0].example.id!r}"
    if failure.repeatable:
        for transcript in transcripts:
            try:
                call([transcript])
            except _Failure:
                return f"example {transcript.example.id!r}"
    return f"first example {transcripts[0].example.id!r}"


class _Failure(Exception):
    """A call that gave no usable values; the text completes "reward 'name' ..."."""

    def __init__(self, reason: str, *, repeatable: bool = False) -> None:
        super().__init__(reason)
        self.repeatable = repeatable


@dataclass(frozen=True)
class _Call:
    """One reward function with everything about it that does not depend on the trajectories."""

    reward: NamedReward
    timeout: float | None
    trainer_state: Any
    metrics: dict[str, list[float]]

    def __call__(self, transcripts: Sequence[Transcript]) -> list[Any]:
        """One raw value per transcript.

        Raises:
            _Failure: the function raised, overran, or returned anything but one value per transcript.
        """
        logged: list[tuple[str, float]] = []
        available = {
            **_keywords(transcripts),
            "trainer_state": self.trainer_state,
            "log_extra": lambda column, values: None,
            "log_metric": lambda name, value: logged.append((name, float(value))),
        }
        arguments = accepted(self.reward.function, available, f"reward {self.reward.name!r}")
        try:
            values = call_with_timeout(lambda: _as_list(self._run(arguments)), self.timeout)
        except (KeyboardInterrupt, SystemExit, GeneratorExit, _Failure):
            raise
        except OutOfTime as error:
            raise _Failure(str(error)) from error
        except BaseException as error:  # timeouts of libraries are often no Exception
            text = str(error).strip()
            raise _Failure(f"raised {type(error).__name__}{': ' if text else ''}{text}", repeatable=True) from error
        if len(values) != len(transcripts):
            raise _Failure(f"returned {len(values)} values for {len(transcripts)} completions")
        for name, value in logged:
            self.metrics.setdefault(name, []).append(value)
        return values

    def _run(self, arguments: Mapping[str, Any]) -> Any:
        result = self.reward.function(**arguments)
        return _wait_for(result) if inspect.isawaitable(result) else result


def _wait_for(awaitable: Any) -> Any:
    async def wait() -> Any:
        return await awaitable

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(wait())
    # A notebook already runs a loop on this thread.
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(asyncio.run, wait()).result()


def _keywords(transcripts: Sequence[Transcript]) -> dict[str, Any]:
    examples = [transcript.example for transcript in transcripts]
    names = dict.fromkeys(name for example in examples for name in example.columns)
    keywords: dict[str, Any] = {name: [example.columns.get(name) for example in examples] for name in names}
    fields: dict[str, list[Any]] = {
        "answer": [example.answer for example in examples],
        "steps": [list(example.steps) or None for example in examples],
        "chosen": [_as_trl(example.chosen) for example in examples],
        "rejected": [_as_trl(example.rejected) for example in examples],
        "label": [example.label for example in examples],
    }
    keywords |= {name: values for name, values in fields.items() if any(value is not None for value in values)}
    # The whole item, for verifiers of generated tasks.
    keywords.setdefault("example", examples)
    keywords.setdefault("id", [example.id for example in examples])
    keywords.setdefault("truncated", [transcript.truncated for transcript in transcripts])
    # What the dataset may hold of these is not what the policy said.
    keywords.pop("prompt", None)
    keywords.pop("completion", None)
    return keywords | {
        "prompts": [_as_trl(transcript.prompt) for transcript in transcripts],
        "completions": [_completion(transcript) for transcript in transcripts],
        "completion_ids": [list(transcript.completion_ids) for transcript in transcripts],
    }


def _as_trl(text: Text | None) -> str | list[dict[str, str]] | None:
    return text if text is None or isinstance(text, str) else [dict(message) for message in text]


def _completion(transcript: Transcript) -> str | list[dict[str, str]]:
    if isinstance(transcript.prompt, str):
        return transcript.completion
    return [{"role": "assistant", "content": transcript.completion}]


def accepted(function: Callable[..., Any], available: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The keywords that the function's signature takes.

    Raises RewardError naming ``what`` where it wants one that is not there.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a callable written in C
        return dict(available)
    for parameter in parameters:
        required = parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        )
        if required and (parameter.name not in available or parameter.kind is parameter.POSITIONAL_ONLY):
            raise RewardError(
                f"{what} takes {parameter.name!r}, which cannot be passed by name from these examples; "
                f"available are {', '.join(available)}"
            )
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return dict(available)
    named = {parameter.name for parameter in parameters if parameter.kind is not parameter.POSITIONAL_ONLY}
    return {name: value for name, value in available.items() if name in named}


def _as_list(values: Any) -> list[Any]:
    # A tensor without dimensions has a length that raises; a generator has none, and might never end.
    one = isinstance(values, str | bytes | Mapping) or getattr(values, "shape", None) == ()
    if one or not hasattr(values, "__len__") or not hasattr(values, "__iter__"):
        raise _Failure(f"returned {_shown(values)} instead of a list with one value per completion")
    return list(values)


def _as_number(value: Any) -> float | None:
    """A finite float, or None for anything else."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()  # NumPy and torch scalars
    if not isinstance(value, Real):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if abs(number) <= _LARGEST else None


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"

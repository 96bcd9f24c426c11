"""Trained reward models as reward functions: ``--reward model:FOLDER``, one or an ensemble, with or without dropout."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.core.errors import UsageError
from polopt.core.example import Example, Text
from polopt.core.policy import Request
from polopt.rewards.comparisons import TOKENS
from polopt.rewards.scales import read_scales

if TYPE_CHECKING:
    from polopt.policies.causal_lm.policy import CausalLM

Reduce = Literal["mean", "min", "pessimistic"]


@dataclass(frozen=True)
class Options:
    """How several rewards of one answer become one.

    ``reduce``: their mean, their least, or mean - ``k`` times their standard deviation (over n, so that one alone has
    none). ``normalize`` takes each model's mean of its training answers away and divides by their standard deviation,
    where its folder holds them. ``dropout`` switches off that share of the final hidden state before the head, in each
    of ``passes`` passes that draw from ``seed``; all answers of a call see the same draws.

    Raises UsageError for a value out of range.
    """

    reduce: Reduce = "mean"
    k: float = 1.0
    normalize: bool = True
    dropout: float = 0.0
    passes: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.reduce not in get_args(Reduce):
            raise UsageError(f"reward models are reduced by {', '.join(get_args(Reduce))}, not by {self.reduce!r}")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"dropout is a probability in [0, 1), got {self.dropout}")
        if self.passes < 1 or (self.passes > 1) != (self.dropout > 0):
            raise UsageError(
                f"dropout needs several passes, and several passes dropout; got dropout={self.dropout:g} and "
                f"passes={self.passes}"
            )


@dataclass(frozen=True)
class RewardModel:
    """r(x, y): the value of each head of a model when prompt and answer are read."""

    policy: CausalLM
    mean: Float[Tensor, " head"] | None = None
    std: Float[Tensor, " head"] | None = None

    @classmethod
    def load(cls, folder: str | Path, *, device: str = "auto") -> Self:
        """What `polopt train reward-model` wrote: the run's folder, or the model in it.

        Raises UsageError where there is no model, or none with a critic.
        """
        # Here, so that whoever scores by rules alone need not wait for transformers.
        from polopt.policies.causal_lm.critic import FILE
        from polopt.policies.causal_lm.policy import CausalLM

        place = Path(folder).expanduser()
        if (place / "config.yaml").is_file() and (place / "model").is_dir():
            place = place / "model"
        if not (place / FILE).is_file():
            raise UsageError(f"{str(folder)!r} holds no reward model: train one with polopt train reward-model")
        policy = CausalLM.load(place, device=device)
        policy.load_critic(place)
        assert policy.critic is not None
        scales = read_scales(place, policy.critic.heads)
        return cls(policy) if scales is None else cls(policy, *scales)

    @property
    def heads(self) -> int:
        """How many rewards an answer has."""
        assert self.policy.critic is not None
        return self.policy.critic.heads

    def scores(
        self, prompts: Sequence[Text], answers: Sequence[Text], options: Options | None = None
    ) -> Float[Tensor, "reward answer"]:
        """The reward of each answer by each head, times passes under dropout: [heads * passes, answers], float64.

        Within a bounded number of tokens at a time, on the model's device, without gradient. An empty answer has that
        of its prompt. Raises UsageError for a text that does not fit into the model's context.
        """
        options = options or Options()
        if not answers:
            return torch.zeros(self.heads * options.passes, 0, dtype=torch.float64)
        # An answer of no token is nothing but its end.
        ends = self.policy.tokenizer.decode([self.policy.end_ids[0]]) if self.policy.end_ids else ""
        requests = [Request(Example(str(place), prompt), 1) for place, prompt in enumerate(prompts)]
        written = self.policy.write(requests, [answer or ends for answer in answers], end=True)
        found = torch.empty(options.passes, self.heads, len(answers), dtype=torch.float64)
        kept = self._kept(options)
        for members in written.bins("trajectory", self.policy.cost(written), TOKENS):
            piece = written.select(torch.tensor(members))
            found[:, :, members] = self.policy.rewards_of(piece, kept).double().cpu()
        if options.normalize and self.mean is not None and self.std is not None:
            found = (found - self.mean[:, None]) / self.std[:, None]
        return found.flatten(0, 1)

    def _kept(self, options: Options) -> list[Tensor | None]:
        """What multiplies the hidden state in each pass: 0 or 1 / (1 - dropout)."""
        if not options.dropout:
            return [None]
        generator = torch.Generator().manual_seed(options.seed)
        assert self.policy.critic is not None
        shape = (options.passes, self.policy.critic.linear.in_features)
        kept = torch.rand(shape, generator=generator) >= options.dropout
        return list(kept.float() / (1 - options.dropout))


class ModelReward:
    """The reward function of one or several reward models, in TRL's calling convention."""

    def __init__(self, models: Sequence[RewardModel], options: Options | None = None) -> None:
        self.models, self.options = tuple(models), options or Options()

    def to(self, device: str) -> None:
        """Move the models to a device, ``auto`` being the best there is. Raises UsageError for one that is absent."""
        from polopt.policies.causal_lm.loading import pick_device

        where = pick_device(device)
        for model in self.models:
            model.policy.model.to(where)
            if model.policy.critic is not None:
                model.policy.critic.to(where)

    def scores(self, prompts: Sequence[Any], completions: Sequence[Any]) -> Float[Tensor, "reward answer"]:
        """Every reward of every answer: those of all models, heads and passes."""
        asked, said = [_text(prompt) for prompt in prompts], [_text(completion) for completion in completions]
        # Draws of one model tell nothing of another's.
        return torch.cat(
            [
                model.scores(asked, said, replace(self.options, seed=self.options.seed + place))
                for place, model in enumerate(self.models)
            ]
        )

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
        found = self.scores(prompts, completions)
        match self.options.reduce:
            case "mean":
                reduced = found.mean(0)
            case "min":
                reduced = found.amin(0)
            case "pessimistic":
                reduced = found.mean(0) - self.options.k * found.std(0, correction=0)
        return [float(value) for value in reduced]


def _text(given: Any) -> Text:
    if isinstance(given, str):
        return given
    return tuple(dict(message) for message in given)


def model_reward(argument: str | None = None) -> ModelReward:
    """The score of a trained reward model: ``model:FOLDER``, or of several: ``model:FOLDER+FOLDER,reduce=min``.

    Options after commas: ``reduce`` = mean, min or pessimistic (mean - k std), ``k``, ``normalize`` = true or false,
    ``dropout`` and ``passes``, ``seed``. Raises UsageError for an unknown option, a value out of range, or a folder
    without a reward model.
    """
    if not argument:
        raise UsageError("reward 'model' needs the folder of a reward model: model:FOLDER")
    folders, *given = argument.split(",")
    options = _options(given)
    return ModelReward([RewardModel.load(folder) for folder in folders.split("+")], options)


def _options(given: Sequence[str]) -> Options:
    read: dict[str, Callable[[str], Any]] = {
        "reduce": str,
        "k": float,
        "normalize": _truth,
        "dropout": float,
        "passes": int,
        "seed": int,
    }
    found: dict[str, Any] = {}
    for item in given:
        name, equals, value = item.partition("=")
        if name not in read or not equals:
            raise UsageError(f"a reward model has no option {item!r}; its options are {', '.join(read)}, as in k=0.5")
        try:
            found[name] = read[name](value)
        except (ValueError, KeyError):
            raise UsageError(f"option {name} of a reward model cannot be {value!r}") from None
        if name == "k" and not math.isfinite(found[name]):
            raise UsageError(f"option k of a reward model cannot be {value!r}")
    return Options(**found)


def _truth(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()]

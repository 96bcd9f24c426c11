"""Decoding for every architecture without a native decoder, through Hugging Face ``generate``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from polopt.policies.causal_lm.generations import Generations, Progress, Recorder, Request, check_request
from polopt.policies.nucleus import nucleus
from polopt.policies.sampling import draw, uniforms


@torch.no_grad()
def decode_with_generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    counts: Sequence[int],
    seeds: Int[Tensor, "trajectory"],
    sampling: Sampling,
    *,
    eos_ids: Sequence[int],
    tokenizer: Any = None,
    entropy: bool = False,
    max_rows: int = 256,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    limits: Sequence[int | None] | None = None,
    mask: MaskPolicy | None = None,
    mixture: Companion | None = None,
) -> Generations:
    """As ``decode``, for any model with ``generate``: same fields, and the same draws from the same seeds.

    ``generate`` only runs the forward passes; a logits processor makes the draw and forces it. Prompts are left-padded,
    except for recurrent models, whose state padding would enter: those run in batches of equal length. ``mask`` says at
    every step which tokens may be drawn, and ``mixture`` is the model that the policy is mixed with: each of them costs
    one more forward pass.
    """
    request = check_request(
        model,
        prompts,
        counts,
        seeds,
        sampling,
        eos_ids=eos_ids,
        tokenizer=tokenizer,
        entropy=entropy,
        max_rows=max_rows,
        progress=progress,
        limits=limits,
    )
    recorder = Recorder(request)
    device = request.device.type
    with evaluating(model), _own_generation_config(model), autocast(device, dtype):
        for rows in _batches(request, exact_lengths=bool(getattr(model, "_is_stateful", False))):
            _run(model, request, recorder, rows, mask, mixture)
    return recorder.finish()


def _batches(request: Request, exact_lengths: bool) -> Iterator[NDArray[np.int64]]:
    lengths = np.array([len(prompt) for prompt in request.prompts], np.int64)[request.owner]
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        rows = order[start : start + request.max_rows]
        # A row that ends keeps being fed until its batch does: with unequal limits it would leave the context.
        alike = lengths if exact_lengths else request.limits
        rows = rows[alike[rows] == alike[rows[0]]]
        yield rows
        start += len(rows)


def _run(
    model: Any,
    request: Request,
    recorder: Recorder,
    rows: NDArray[np.int64],
    policy: MaskPolicy | None,
    mixture: Companion | None,
) -> None:
    prompts = [request.prompts[request.owner[row]] for row in rows]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=request.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=request.device)
    steps = int(request.limits[rows].max())
    recorder.begin(rows, np.zeros(len(rows), np.int64))
    config = _plain_config(do_sample=False, num_beams=1, max_new_tokens=steps, pad_token_id=0)
    allowed = None if policy is None else policy.start(mask)
    other = None if mixture is None else mixture.logits(mask)
    model.generate(
        input_ids=ids,
        attention_mask=mask,
        generation_config=config,
        logits_processor=LogitsProcessorList([_Chooser(request, recorder, rows, allowed, other)]),
        stopping_criteria=StoppingCriteriaList([_Ended(recorder)]),
    )


def _plain_config(**options: Any) -> GenerationConfig:
    return GenerationConfig(**options)  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Companion:
    """A model that reads along while another one writes; ``weights`` opens a context in which a module holds it."""

    weights: Callable[[], AbstractContextManager[Any]]

    def logits(self, mask: Tensor) -> Callable[[Tensor], Tensor]:
        """Its next logits [row, vocab] after the tokens [row, time] of one batch, which grow by one from call to call.

        ``mask`` is that of the left-padded prompts.
        """
        past: Any = None

        def following(ids: Tensor) -> Tensor:
            nonlocal past
            with self.weights() as model:
                grown = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
                inputs = {"input_ids": ids, "attention_mask": grown}
                if "position_ids" in inspect.signature(model.forward).parameters:
                    inputs["position_ids"] = (grown.cumsum(-1) - 1).clamp_min(0)
                # The state of a recurrent model goes by other names; it reads everything again.
                cached = not getattr(model, "_is_stateful", False)
                if past is not None:
                    inputs = {n: v if n == "attention_mask" else v[:, -1:] for n, v in inputs.items()}
                with evaluating(model):
                    out = model(**inputs, past_key_values=past, use_cache=True) if cached else model(**inputs)
            past = out.past_key_values if cached else None
            return out.logits[:, -1].float()  # type: ignore[no-any-return]

        return following


@dataclass(frozen=True)
class MaskPolicy(Companion):
    """The tokens that may be drawn: the nucleus of a model (`polopt.policies.nucleus.nucleus`) at temperature 1."""

    p: float
    least: int
    always: tuple[int, ...]

    def start(self, mask: Tensor) -> Callable[[Tensor], Tensor]:
        """Allowed tokens [row, vocab], as `logits`."""
        following = self.logits(mask)
        return lambda ids: nucleus(following(ids).softmax(-1), self.p, self.least, self.always)


class _Chooser(LogitsProcessor):
    """Draws with the trajectories' own randomness and leaves ``generate`` no other choice."""

    def __init__(
        self,
        request: Request,
        recorder: Recorder,
        rows: NDArray[np.int64],
        allowed: Callable[[Tensor], Tensor] | None,
        other: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self.request, self.recorder, self.allowed, self.other = request, recorder, allowed, other
        self.seeds = request.seeds[torch.from_numpy(rows).to(request.device)]
        self.step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = torch.full_like(self.seeds, self.step)
        allowed = None if self.allowed is None else self.allowed(input_ids)
        other = None if self.other is None else self.other(input_ids)
        chosen = draw(scores, uniforms(self.seeds, step), self.request.sampling, self.request.entropy, allowed, other)
        self.recorder.add(chosen)
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen.token[:, None], 0.0)


class _Ended(StoppingCriteria):
    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.recorder.inspect()
        return torch.from_numpy(~self.recorder.live).to(input_ids.device)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Dropout off, and every submodule's training flag as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def autocast(device: str, dtype: torch.dtype | None) -> torch.autocast:
    """Autocast to ``dtype``, or the caller's own autocast state when None.

    Inside a caller's autocast the weight cache stays off: casts made here carry no gradient, and a training forward
    in the same context would find and use them.
    """
    outer = torch.is_autocast_enabled(device)
    if dtype is None and not outer:
        return torch.autocast(device, enabled=False)
    return torch.autocast(device, dtype or torch.get_autocast_dtype(device), cache_enabled=not outer)


@contextmanager
def _own_generation_config(model: Any) -> Iterator[None]:
    """``generate`` fills unset options from the model's generation config; a default one changes no logits."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    kept = base.generation_config
    base.generation_config = _plain_config()
    try:
        yield
    finally:
        base.generation_config = kept

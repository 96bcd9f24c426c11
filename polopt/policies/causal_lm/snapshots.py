"""Frozen models of a language model policy: whole copies, copies of its adapters, its base without adapters, or what
another run saved.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from polopt.core.errors import UsageError
from polopt.policies.causal_lm.loading import load_model, text_config


class Snapshot(Protocol):
    """Weights that no longer change."""

    def active(self, model: Any) -> AbstractContextManager[Any]:
        """A context that gives the Hugging Face module with these weights in it; ``model`` is the live policy."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What `snapshot_from_state` needs besides the live model."""
        ...


class WholeCopy:
    """A frozen copy of every weight."""

    def __init__(self, model: Any) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        for parameter in self.model.parameters():
            parameter.grad = None

    @contextmanager
    def active(self, model: Any) -> Iterator[Any]:
        yield self.model

    def state_dict(self) -> dict[str, Any]:
        return {"kind": "whole", "tensors": {name: p.detach() for name, p in self.model.named_parameters()}}


class BaseModel:
    """The policy's base with its adapters off: nothing is copied."""

    @contextmanager
    def active(self, model: Any) -> Iterator[Any]:
        with model.disable_adapter():
            yield unwrapped(model)

    def state_dict(self) -> dict[str, Any]:
        return {"kind": "base"}


class AdapterCopy:
    """A copy of the trainable adapter weights, put in place of the live ones for a forward pass."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}

    @contextmanager
    def active(self, model: Any) -> Iterator[Any]:
        live = trainable(model)
        kept = {name: parameter.data for name, parameter in live.items()}
        try:
            # Pointers change hands, nothing is copied; whatever happens inside, the live ones come back.
            for name, parameter in live.items():
                parameter.data = self.tensors[name]
            yield unwrapped(model)
        finally:
            for name, parameter in live.items():
                parameter.data = kept[name]

    def state_dict(self) -> dict[str, Any]:
        return {"kind": "adapter", "tensors": dict(self.tensors)}


class SavedModel:
    """The model of a folder; a checkpoint holds where it is."""

    def __init__(self, model: Any, folder: Path) -> None:
        """Read the model, for a live policy ``model``.

        Raises UsageError naming the folder when it holds no model, or one of another architecture or size.
        """
        live = unwrapped(model)
        self.folder = folder.resolve()
        self.model = load_model(folder, next(live.parameters()).device).eval().requires_grad_(False)
        own, other = (text_config(m) for m in (live, self.model))
        same = type(live) is type(self.model) and own.vocab_size == other.vocab_size
        if not same:
            raise UsageError(
                f"{folder} holds a {type(self.model).__name__} of {other.vocab_size} tokens, the policy is a "
                f"{type(live).__name__} of {own.vocab_size}; a frozen model must be of the policy's kind"
            )

    @contextmanager
    def active(self, model: Any) -> Iterator[Any]:
        yield self.model

    def state_dict(self) -> dict[str, Any]:
        return {"kind": "saved", "folder": str(self.folder)}


def snapshot(model: Any) -> Snapshot:
    """The present weights, frozen in the cheapest form that is exact."""
    if not is_adapted(model):
        return WholeCopy(model)
    products = [p for name, p in model.named_parameters() if "lora_B" in name or "lora_embedding_B" in name]
    # B = 0 for every adapter (before the first update, that is) makes W + BA = W.
    if products and not any(bool(p.any()) for p in products):
        return BaseModel()
    return AdapterCopy(trainable(model))


def snapshot_from_state(model: Any, name: str, state: Mapping[str, Any]) -> Snapshot:
    """Restore `Snapshot.state_dict`. Raises UsageError naming the model when it does not fit the policy."""
    kind = state.get("kind")
    if kind == "saved":
        return SavedModel(model, Path(state["folder"]))
    if kind == "whole" and not is_adapted(model):
        whole = WholeCopy(model)
        load_tensors(dict(whole.model.named_parameters()), state["tensors"], f"model {name!r}")
        return whole
    if kind == "base" and is_adapted(model):
        return BaseModel()
    if kind == "adapter" and is_adapted(model):
        adapter = AdapterCopy(trainable(model))
        load_tensors(adapter.tensors, state["tensors"], f"model {name!r}")
        return adapter
    policy = "trains LoRA adapters" if is_adapted(model) else "trains all weights"
    raise UsageError(f"the state's model {name!r} is of kind {kind!r}, but this policy {policy}")


def is_adapted(model: Any) -> bool:
    """Whether the model is wrapped by peft."""
    return hasattr(model, "disable_adapter")


def unwrapped(model: Any) -> Any:
    """The Hugging Face module itself; adapters stay in place inside it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def trainable(model: Any) -> dict[str, nn.Parameter]:
    """Parameters that train, by name; tied ones once."""
    named = cast("Iterator[tuple[str, nn.Parameter]]", model.named_parameters())
    return {name: parameter for name, parameter in named if parameter.requires_grad}


@torch.no_grad()
def load_tensors(targets: Mapping[str, Tensor], values: Mapping[str, Tensor], what: str) -> None:
    """Copy values into targets of the same names and shapes, or raise UsageError naming the first that differs."""
    if odd := sorted(set(targets) ^ set(values)):
        side = "the state lacks" if odd[0] in targets else "the policy lacks"
        raise UsageError(f"the state does not fit the policy: {side} {odd[0]!r} of {what} ({len(odd)} names differ)")
    for name, target in targets.items():
        if target.shape != values[name].shape:
            raise UsageError(
                f"the state does not fit the policy: {name!r} of {what} has shape {tuple(values[name].shape)}, "
                f"expected {tuple(target.shape)}"
            )
    for name, target in targets.items():
        target.copy_(values[name])

"""Causal language models and tokenizers from a folder or the hub, with errors that name what is wrong."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from polopt.core.errors import UsageError

Precision = Literal["auto", "float32", "bfloat16"]

# What the libraries raise for files that are missing, damaged or of an unknown kind.
_LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, SafetensorError)

SMALL_HIDDEN = 256
"""Below this hidden size bfloat16 autocast makes sampling slower on a CPU, and learning hardly faster: casts cost what
the products save, and the log-probs lose three digits for it."""


@dataclass(frozen=True)
class LoraOptions:
    """Low-rank adapters W + (alpha / rank) B A (Hu et al. 2021, arXiv:2106.09685); B starts at 0, A from ``seed``.

    ``target_modules`` are names of linear modules; "all-linear" is every linear module but the output layer. There is
    no dropout: the policy that samples and the one that learns must be the same distribution.

    Raises UsageError for a rank or alpha that is not positive.
    """

    rank: int = 16
    alpha: float = 32.0
    target_modules: str | tuple[str, ...] = "all-linear"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError(f"LoRA needs a rank of at least 1, got {self.rank}")
        if self.alpha <= 0:
            raise UsageError(f"LoRA needs an alpha above 0, got {self.alpha}")


def load_model(name_or_path: str | Path, device: torch.device) -> Any:
    """A causal language model with float32 weights on ``device``, from safetensors only.

    Raises UsageError naming the folder or hub name when it is no causal language model, cannot be reached, needs code
    of its own, is quantised, lacks weights, or is only an adapter.
    """
    name = str(name_or_path)
    config = _config(name)
    if getattr(config, "quantization_config", None) is not None:
        raise UsageError(f"{name} is quantised, which cannot be trained here; give the unquantised model")
    try:
        # The stubs leave out that loading information makes this a pair.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=torch.float32,
            trust_remote_code=False,
            use_safetensors=True,  # other formats are pickles, which run code when they are read
            output_loading_info=True,
        )
    except _LOAD_ERRORS as error:
        raise UsageError(f"cannot load a causal language model from {name}: {_first_line(error)}") from error
    model, report = loaded
    # A missing weight would be drawn at random and train without complaint.
    if missing := sorted(report["missing_keys"]):
        raise UsageError(f"{name} lacks {len(missing)} weights of a {type(model).__name__}, such as {missing[0]}")
    return model.to(device)


def load_tokenizer(name_or_path: str | Path) -> Any:
    """The tokenizer of a folder or hub name. Raises UsageError naming it when there is none."""
    name = str(name_or_path)
    _check_folder(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except _LOAD_ERRORS as error:
        raise UsageError(f"{name} has no tokenizer that can be loaded: {_first_line(error)}") from error
    # Without its files the library makes an empty tokenizer of the model's usual class, and says nothing.
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise UsageError(f"{name} has no tokenizer: save the tokenizer in the same folder as the model")
    return tokenizer


def check_vocabulary(model: Any, tokenizer: Any) -> None:
    """Raise UsageError when the tokenizer can give an id that the model has no embedding for."""
    rows = model.get_input_embeddings().weight.shape[0]
    token, index = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if index >= rows:
        raise UsageError(
            f"the tokenizer has token {token!r} with id {index}, but the model embeds ids below {rows} only; "
            "they do not belong together"
        )


def add_lora(model: Any, options: LoraOptions) -> Any:
    """The model with fresh adapters as its only trainable weights.

    Raises UsageError when the target modules are not in the model.
    """
    from peft import LoraConfig, get_peft_model  # slow to import, and only needed here

    targets = options.target_modules
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        bias="none",
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        try:
            return get_peft_model(model, config)
        except ValueError as error:
            raise UsageError(f"LoRA target_modules {targets!r} do not fit the model: {_first_line(error)}") from error


def pick_device(name: str) -> torch.device:
    """``auto`` is CUDA, else Apple's GPU, else the CPU. Raises UsageError for a device that is not there."""
    if name != "auto":
        try:
            device = torch.device(name)
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise UsageError(f"device {name!r} cannot be used: {_first_line(error)}") from error
        return device
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def pick_autocast(precision: Precision, device: torch.device, hidden_size: int) -> torch.dtype | None:
    """The autocast dtype of a precision; None computes in float32, the dtype of the weights in every case.

    ``auto`` is bfloat16 where the hardware multiplies it, except for small models on a CPU. Raises UsageError for an
    unknown precision.
    """
    if precision == "float32":
        return None
    if precision == "bfloat16":
        return torch.bfloat16
    if precision != "auto":
        raise UsageError(f"precision {precision!r} is none of auto, float32, bfloat16")
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    if device.type != "cpu" or hidden_size < SMALL_HIDDEN:
        return None
    capabilities = torch.cpu.get_capabilities()
    return torch.bfloat16 if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else None


def text_config(model: Any) -> Any:
    """The part of a model's configuration that describes its language model."""
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _config(name: str) -> Any:
    _check_folder(name)
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except _LOAD_ERRORS as error:
        if Path(name).is_dir():
            raise UsageError(f"{name} is not a model: {_first_line(error)}") from error
        raise UsageError(f"cannot reach model {name} on the hub, nor is it a folder: {_first_line(error)}") from error


def _check_folder(name: str) -> None:
    folder = Path(name).expanduser()
    if folder.is_dir():
        if (folder / "config.json").is_file():
            return
        if (folder / "adapter_config.json").is_file():
            raise UsageError(f"{name} holds an adapter only; give a folder with the whole model")
        raise UsageError(f"{name} is not a model: it has no config.json")
    if folder.exists():
        raise UsageError(f"{name} is a file; give the folder of a model or its name on the hub")
    # Hub names are "model" or "owner/model"; anything else can only have been meant as a folder.
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or not name.strip():
        raise UsageError(f"there is no model folder at {name!r}")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

"""The weights of Hugging Face Llama, Qwen2 and Qwen3 decoders, read where they are.

Nothing here owns a weight: projections are applied to the module's own parameters, or, where a module is not a plain
``nn.Linear`` (LoRA, quantised layers), by calling the module.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

Map = Callable[[Tensor], Tensor]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, queries [token head dim], keys [token kv_head dim], values) -> attention output [token head*dim]."""

FAMILIES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}


@dataclass(frozen=True)
class Layer:
    """One decoder block; the query and key norms are Qwen3's."""

    attention_norm: Map
    query: Map
    key: Map
    value: Map
    query_norm: Map | None
    key_norm: Map | None
    output: Map
    mlp_norm: Map
    gate: Map
    up: Map
    down: Map
    activation: Map


@dataclass(frozen=True)
class Network:
    """A decoder as functions over flat tokens [token, ...]; valid for one decode, never kept across updates."""

    layers: tuple[Layer, ...]
    embed: Map
    norm: Map
    head: Map
    rotary: nn.Module
    kv_heads: int
    head_dim: int
    scale: float
    device: torch.device
    hidden_dtype: torch.dtype
    kv_dtype: torch.dtype


def unwrap(model: Any) -> Any:
    """The Hugging Face module inside ``torch.compile`` and peft wrappers; adapters stay in place inside it."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def supports(model: Any) -> bool:
    """Whether the native decoder computes exactly what this model's own forward computes.

    True for Llama, Qwen2 and Qwen3 causal language models (LoRA adapters included) without sliding windows, prompt
    learning, hooks or patched submodules.
    """
    config = getattr(model, "active_peft_config", None)
    if config is not None and getattr(config, "is_prompt_learning", False):
        return False
    base = unwrap(model)
    family = FAMILIES.get(type(base).__name__)
    if family is None:
        return False
    source = f"transformers.models.{family}.modeling_{family}"
    inner = base.model
    fixed = [base, inner, inner.rotary_emb]
    for layer in inner.layers:
        fixed += [layer, layer.self_attn, layer.mlp]
    if any(type(module).__module__ != source or _altered(module) for module in fixed):
        return False
    if "sliding_attention" in (getattr(base.config, "layer_types", None) or ()):
        return False
    # longrope switches frequencies with the longest row of a batch: a trajectory would depend on its neighbours.
    return bool(inner.rotary_emb.rope_type != "longrope")


def _altered(module: Any) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def read(model: Any, dtype: torch.dtype | None) -> Network:
    """The functions of a supported, unwrapped model; ``dtype`` computes as ``torch.autocast(dtype)`` does."""
    inner = model.model
    attention = inner.layers[0].self_attn
    weight = inner.embed_tokens.weight
    return Network(
        layers=tuple(_layer(layer, dtype) for layer in inner.layers),
        embed=inner.embed_tokens,
        norm=_norm(inner.norm),
        head=_linear(model.lm_head, dtype),
        rotary=inner.rotary_emb,
        kv_heads=model.config.num_key_value_heads,
        head_dim=attention.head_dim,
        scale=attention.scaling,
        device=weight.device,
        hidden_dtype=weight.dtype,
        kv_dtype=dtype or weight.dtype,
    )


def _layer(layer: Any, dtype: torch.dtype | None) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return Layer(
        attention_norm=_norm(layer.input_layernorm),
        query=_linear(attention.q_proj, dtype),
        key=_linear(attention.k_proj, dtype),
        value=_linear(attention.v_proj, dtype),
        query_norm=_norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
        key_norm=_norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
        output=_linear(attention.o_proj, dtype),
        mlp_norm=_norm(layer.post_attention_layernorm),
        gate=_linear(mlp.gate_proj, dtype),
        up=_linear(mlp.up_proj, dtype),
        down=_linear(mlp.down_proj, dtype),
        activation=mlp.act_fn,
    )


def _linear(module: Any, dtype: torch.dtype | None) -> Map:
    if type(module) is not nn.Linear or _altered(module):
        if dtype is None:
            return lambda x: module(x)

        def under_autocast(x: Tensor) -> Tensor:
            # No cache: autocast would keep casts made without autograd and a later training forward would use them.
            with torch.autocast(x.device.type, dtype, cache_enabled=False):
                return module(x)  # type: ignore[no-any-return]

        return under_autocast
    weight, bias = module.weight, module.bias
    if dtype is None or weight.dtype == dtype:
        return lambda x: F.linear(x.to(weight.dtype), weight, bias)
    # Cast once per decode, not once per token, and dropped with the Network; autocast makes the same copy.
    low, low_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    return lambda x: F.linear(x.to(dtype), low, low_bias)


def _norm(module: Any) -> Map:
    weight = getattr(module, "weight", None)
    if not hasattr(module, "variance_epsilon") or _altered(module) or weight is None or weight.dtype != torch.float32:
        return lambda x: module(x)
    shape, eps = tuple(weight.shape), module.variance_epsilon
    # In half precision the module rounds before it scales; the fused kernel after. In float32 they are the same.
    return lambda x: F.rms_norm(x, shape, weight, eps) if x.dtype == torch.float32 else module(x)


def rotary_table(network: Network, length: int) -> tuple[Tensor, Tensor]:
    """cos and signed sin for positions 0..length-1, [position, 1, dim], from the model's own rotary module.

    rotate_half(x) * sin == roll(x, dim/2) * signed, where signed negates the first half of sin.
    """
    positions = torch.arange(length, device=network.device)[None]
    cos, sin = network.rotary(torch.empty(0, dtype=network.hidden_dtype, device=network.device), positions)
    half = sin.shape[-1] // 2
    signed = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
    return cos[0].unsqueeze(1), signed[0].unsqueeze(1)


def _rotate(x: Float[Tensor, "token head dim"], cos: Tensor, signed: Tensor) -> Tensor:
    return x * cos + x.roll(x.shape[-1] // 2, -1) * signed


def hidden_states(
    network: Network, tokens: Int[Tensor, "token"], cos: Tensor, signed: Tensor, attend: Attend
) -> Float[Tensor, "token hidden"]:
    """Final hidden states, before the last norm, of flat tokens; ``attend`` decides who sees whom and keeps keys."""
    count, dim = tokens.shape[0], network.head_dim
    x = network.embed(tokens)
    for index, layer in enumerate(network.layers):
        h = layer.attention_norm(x)
        query, key, value = (project(h).view(count, -1, dim) for project in (layer.query, layer.key, layer.value))
        if layer.query_norm is not None and layer.key_norm is not None:
            query, key = layer.query_norm(query), layer.key_norm(key)
        query, key = _rotate(query, cos, signed), _rotate(key, cos, signed)
        x = x + layer.output(attend(index, query, key, value))
        h = layer.mlp_norm(x)
        x = x + layer.down(layer.activation(layer.gate(h)) * layer.up(h))
    return x


def logits(network: Network, hidden: Float[Tensor, "token hidden"]) -> Float[Tensor, "token vocab"]:
    """Next-token logits, in the dtype in which the model itself gives them."""
    return network.head(network.norm(hidden))

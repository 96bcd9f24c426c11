"""Models to measure with: random Qwen3 decoders whose completions end after a chosen mean length."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from benchmarks.machine import product_rate

PAD, EOS = 0, 1


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder; ``eager`` attention is the faster one for very small ones."""

    name: str
    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    attention: str = "sdpa"

    @property
    def matrix_parameters(self) -> int:
        """Weights that every token is multiplied by: all but norms and the input embedding."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate) + self.vocabulary * self.hidden


SMALL = Shape("small", 259, 128, 6, 4, 2, 32, 384, "eager")
"""The shape of the shipped policy: 1.2 million parameters."""
MEDIUM = Shape("30M", 4096, 512, 8, 8, 4, 64, 1536)
"""30 million parameters."""


def make_model(shape: Shape, mean_length: float, seed: int = 0) -> Qwen3ForCausalLM:
    """A random decoder that ends a completion at every step with probability about 1 / ``mean_length``.

    A vector that all token embeddings share survives the layers; the output row of the end token is a multiple of it.
    The multiple is fitted so that the mean probability on random text is right.
    """
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    config._attn_implementation = shape.attention
    model = Qwen3ForCausalLM(config).eval()
    model.generation_config = GenerationConfig(
        pad_token_id=PAD, eos_token_id=EOS, do_sample=True, temperature=1.0, top_k=0, top_p=1.0
    )
    with torch.no_grad():
        shared = torch.randn(shape.hidden)
        weight = model.get_input_embeddings().weight
        weight.add_(shared * (2 * weight.norm(dim=1).mean() / shared.norm()))
        head = model.lm_head.weight
        head[PAD] = 0.0
        text = torch.randint(2, shape.vocabulary, (8, 64))
        states = model.model(input_ids=text).last_hidden_state.flatten(0, 1)
        direction = states.mean(0) / states.mean(0).norm()
        others = (states @ head.t())[:, 2:].logsumexp(-1)
        low, high = -50.0, 50.0
        for _ in range(60):
            middle = (low + high) / 2
            chance = torch.sigmoid(states @ direction * middle - others).mean()
            low, high = (middle, high) if chance < 1 / mean_length else (low, middle)
        head[EOS] = direction * low
    return model


def make_tokenizer(shape: Shape) -> PreTrainedTokenizerFast:
    """One word per token: ``w17``."""
    vocabulary = {"<pad>": PAD, "<eos>": EOS, **{f"w{i}": i for i in range(2, shape.vocabulary)}}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def make_prompts(shape: Shape, count: int, shortest: int = 16, longest: int = 48, seed: int = 0) -> list[str]:
    """Random texts of ``shortest`` to ``longest`` tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    texts = [torch.randint(2, shape.vocabulary, (n,), generator=generator).tolist() for n in lengths]
    return [" ".join(f"w{i}" for i in text) for text in texts]


def save(shape: Shape, mean_length: float, folder: Path, seed: int = 0) -> Any:
    """Model and tokenizer as a folder that both sides load."""
    model = make_model(shape, mean_length, seed)
    model.save_pretrained(folder)
    make_tokenizer(shape).save_pretrained(folder)
    return model


def clipped_mean(mean_length: float, limit: int) -> float:
    """Mean of a geometric length with this mean (above 1), cut at the limit."""
    stay = 1 - 1 / mean_length
    return (1 - stay**limit) / (1 - stay)


def least_seconds(shape: Shape, tokens: float, rows: int) -> float:
    """Time of every matrix product of a forward pass over ``tokens``, ``rows`` at a time, at the measured peak rate."""
    rate = max(product_rate(rows, shape.hidden, shape.intermediate, dtype) for dtype in (torch.float32, torch.bfloat16))
    return 2 * shape.matrix_parameters * tokens / rate
